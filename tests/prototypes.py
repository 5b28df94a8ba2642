"""What do the prototypes of a run of msn.py or pmsn.py hold?

    python tests/prototypes.py runs/msn/checkpoint.pt
    python tests/prototypes.py runs/mine/checkpoint.pt --data EMOJI

Every picture goes to its nearest prototype, by the embeddings of the target network. Pictures are
the balanced test set of plates or CIFAR, or 2,000 of a folder's train/. Beside the checkpoint come
prototypes.png, a row of ten pictures for each `shown` prototype, and prototypes.json:

used         how many prototypes have a picture
effective    exp of the entropy of their shares: so many prototypes, equally used, have this entropy
adjusted     adjusted mutual information of prototype and label, in percent: 0 by chance, however
             many prototypes there are, 100 if each is one value of the label
shares       percent of a prototype's ten nearest pictures that have the most common label among
             them, a mean over the prototypes in use
chance       the same for ten pictures drawn at random
shown        the pictures (indices) nearest to twelve prototypes, which are picked at even ranks of
             those in use, from the most to the least used
"""

import argparse
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import entropy, mode
from sklearn.metrics import adjusted_mutual_info_score
from torchvision.transforms import v2
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import msn
import sampler

PICKED = 12  # prototypes of the picture
NEAREST = 10  # pictures of each
MOST = 2000  # of a folder's pictures


def load_target(path):
    """The target network of a checkpoint, in evaluation mode, and its run's options."""
    state = torch.load(path, weights_only=True)
    options = types.SimpleNamespace(**state["options"])
    encoder = msn.VisionTransformer(
        options.image_size, options.patch_size, options.dim, options.depth, options.heads,
        options.stem,
    )  # fmt: skip
    target = msn.MSN(encoder, options.dim, options.hidden, options.output, options.num_prototypes)
    target.load_state_dict(state["target"])
    return target.eval(), options


def open_pictures(data, size):
    """Pictures (N, C, size, size) uint8 and labels {name: (N,)}."""
    to_size = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    if data in sampler.IN_MEMORY:
        images, labels = sampler.open_data(data, "val")
        images = to_size(images)
    else:
        paths, labels = sampler.open_data(data, "train")
        some = np.random.default_rng(0).permutation(len(paths))[:MOST]
        images = torch.stack([to_size(msn.read_image(paths[i])) for i in some])
        labels = {"class": labels["class"][some]}
    labels = {name: label.numpy() for name, label in labels.items()}
    if data == "plates":
        first, middle, last = labels.pop("digits").T
        digits = {"first digit": first, "middle digit": middle, "last digit": last}
        labels = {"class": labels.pop("number")} | digits | labels
    return images, labels


def similarities(target, options, images):
    """Pictures (N, C, H, W) uint8 -> cosine similarities to the prototypes (N, K)."""
    found = []
    with torch.no_grad():
        for part in images.split(500):
            pixels = part.expand(-1, 3, -1, -1).float() / 255
            z, prototypes = target([msn.normalise(pixels, options.standardise)])
            found.append(F.normalize(z) @ F.normalize(prototypes).T)
    return torch.cat(found)


def describe(similarity, labels):
    """What the module's docstring lists. similarity (N, K); labels {name: (N,)}."""
    prototype = similarity.argmax(dim=1).numpy()
    images_each = np.bincount(prototype, minlength=similarity.shape[1])
    by_use = np.argsort(-images_each, kind="stable")
    by_use = by_use[: (images_each > 0).sum()]
    nearest = similarity.T[by_use].topk(NEAREST).indices.numpy()  # (used, NEAREST)
    picked = np.linspace(0, len(by_use) - 1, min(PICKED, len(by_use))).round().astype(int)
    random = np.random.default_rng(0).integers(len(prototype), size=(10_000, NEAREST))
    adjusted = {}
    shares = {}
    chance = {}
    for name, label in labels.items():
        adjusted[name] = 100 * float(adjusted_mutual_info_score(label, prototype))
        shares[name] = 100 / NEAREST * float(mode(label[nearest], axis=1).count.mean())
        chance[name] = 100 / NEAREST * float(mode(label[random], axis=1).count.mean())
    return dict(
        used=len(by_use),
        effective=float(np.exp(entropy(images_each))),
        adjusted=adjusted,
        shares=shares,
        chance=chance,
        shown=nearest[picked].tolist(),
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint.pt of msn.py or pmsn.py")
    p.add_argument("--data", default="plates", help="plates, cifar10, cifar100 or a folder")
    args = p.parse_args(argv)
    target, options = load_target(args.checkpoint)
    images, labels = open_pictures(args.data, options.image_size)
    found = describe(similarities(target, options, images), labels)
    args.checkpoint.with_name("prototypes.json").write_text(json.dumps(found) + "\n")
    pictures = images[np.ravel(found["shown"])].float() / 255
    save_image(pictures, args.checkpoint.with_name("prototypes.png"), nrow=NEAREST)
    print(f"used         {found['used']}\neffective    {found['effective']:.1f}")
    for name in ("adjusted", "shares", "chance"):
        print(f"{name:12} {', '.join(f'{key} {x:.1f}' for key, x in found[name].items())}")


if __name__ == "__main__":
    main()
