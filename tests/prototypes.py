"""What do the prototypes of a run of msn.py or pmsn.py hold?

    python tests/prototypes.py runs/msn/checkpoint.pt

Every picture of the balanced test set of plates goes to its nearest prototype, by the embeddings of
the target network. Printed, and written as prototypes.json beside the checkpoint:

used         how many prototypes have a picture
effective    exp of the entropy of their shares: so many prototypes, equally used, have this entropy
information  per cent of the entropy of a label that the prototype tells: mutual information of
             prototype and class, each digit, count and size. Of the class's 1,000 values there are
             ten pictures each, so part of that is chance: compare it between runs alone.
shares       per cent of a prototype's ten nearest pictures that have the most common first digit,
             count and size among them, a mean over the prototypes in use
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import msn
import sampler

LABELS = ("first digit", "count", "size")
PICKED = 12  # prototypes of the picture
NEAREST = 10  # pictures of each


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


def similarities(target, options, images):
    """Grey plates (N, 1, 32, 32) uint8 -> cosine similarities to the prototypes (N, K)."""
    found = []
    with torch.no_grad():
        for part in images.split(500):
            pixels = part.expand(-1, 3, -1, -1).float() / 255
            z, prototypes = target([msn.normalise(pixels, options.standardise)])
            found.append(F.normalize(z) @ F.normalize(prototypes).T)
    return torch.cat(found)


def labels_by_name(labels):
    """draw_plates's labels as {name: (N,) array}."""
    digits = labels["digits"].numpy()
    return {
        "class": labels["number"].numpy(),
        "first digit": digits[:, 0],
        "middle digit": digits[:, 1],
        "last digit": digits[:, 2],
        "count": labels["count"].numpy(),
        "size": labels["size"].numpy(),
    }


def entropy(p):
    """Of probabilities, in nats."""
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def told(prototype, label):
    """Per cent of the entropy of N labels that their pictures' prototypes tell: mutual information
    of two arrays (N,) of integers, by the second's entropy."""
    joint = np.zeros((prototype.max() + 1, label.max() + 1))
    np.add.at(joint, (prototype, label), 1 / len(label))
    rows = joint.sum(axis=1)
    columns = joint.sum(axis=0)
    return 100 * (entropy(rows) + entropy(columns) - entropy(joint)) / entropy(columns)


def most_common_share(labels):
    """Per cent of each row (R, N) of integers that has the row's most common value -> (R,)."""
    counts = np.stack([(labels == value).sum(axis=1) for value in range(labels.max() + 1)])
    return 100 * counts.max(axis=0) / labels.shape[1]


def describe(similarity, labels):
    """What the module's docstring lists. similarity (N, K); labels {name: (N,)}."""
    prototype = similarity.argmax(dim=1).numpy()
    images_each = np.bincount(prototype, minlength=similarity.shape[1])
    by_use = np.argsort(-images_each, kind="stable")
    by_use = by_use[: (images_each > 0).sum()]
    nearest = similarity.T[by_use].topk(NEAREST).indices.numpy()  # (used, NEAREST)
    picked = np.linspace(0, len(by_use) - 1, min(PICKED, len(by_use))).round().astype(int)
    random = np.random.default_rng(0).integers(len(prototype), size=(10_000, NEAREST))

    def shares(pictures):
        return {name: most_common_share(labels[name][pictures]).mean() for name in LABELS}

    return dict(
        used=len(by_use),
        effective=float(np.exp(entropy(images_each / images_each.sum()))),
        information={name: told(prototype, label) for name, label in labels.items()},
        shares=shares(nearest),
        chance=shares(random),
        shown=nearest[picked].tolist(),
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run on plates")
    args = p.parse_args(argv)
    target, options = load_target(args.checkpoint)
    images, labels = sampler.open_data("plates", "val")
    found = describe(similarities(target, options, images), labels_by_name(labels))
    args.checkpoint.with_name("prototypes.json").write_text(json.dumps(found) + "\n")
    for name in ("used", "effective", "information", "shares", "chance"):
        value = found[name]
        if isinstance(value, dict):
            value = ", ".join(f"{key} {x:.1f}" for key, x in value.items())
        print(f"{name:12} {value if isinstance(value, (str, int)) else round(value, 1)}")


if __name__ == "__main__":
    main()
