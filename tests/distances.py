"""How far apart are two views of an image, two images of a class, two images of different classes?

    python tests/distances.py runs/simclr/checkpoint.pt

For a run of simclr.py, vicreg.py or msn.py on plates. Every image of the balanced test set has two
views, as in training, which the network embeds in evaluation mode (MSN: the target network). The
answers are mean squared distances of embeddings of unit length, from 0 to 4, always from a first
view to a second one: printed, and written beside the checkpoint as distances.json. The same with
`representation`, the encoder's output, which linear_eval.py reads.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prototypes

import msn
import sampler
import simclr
import vicreg


def load_network(path):
    """Encoder and projector of a checkpoint in evaluation mode, its options, its script."""
    state = torch.load(path, weights_only=True)
    options = argparse.Namespace(**state["options"])
    if "msn" in state:
        target, options = prototypes.load_target(path)
        return target.encoder, target.projector, options, msn
    encoder, dim = simclr.resnet(options.arch, options.image_size)  # VICReg's too
    if "simclr" in state:
        network = simclr.SimCLR(encoder, dim, options.hidden, options.output, options.layers)
        network.load_state_dict(state["simclr"])
        network.eval()
        return encoder, network.projector, options, simclr
    network = vicreg.VICReg(encoder, dim, options.hidden, options.output)
    network.load_state_dict(state["vicreg"])
    network.eval()
    return encoder, network.expander, options, vicreg


def two_views(images, options, script):
    """Images (B, C, H, W) -> the network's input: (2, B, 3, H, W)."""
    options.batch_size = len(images)
    area = options.rand_crop if script is msn else options.crop
    dataset = script.CroppedViews(images, [(2, options.image_size, area)], options)
    (crops,) = dataset[0, list(range(len(images)))]
    draw = dict(simclr="simclr_views", vicreg="vicreg_views", msn="siamese_views")[script.__name__]
    views = getattr(script, draw)(crops, options, torch.device("cpu"))
    views = views if torch.is_tensor(views) else torch.stack(views)
    return views.view(2, len(images), *views.shape[-3:])


@torch.no_grad()
def embed(views, encoder, projector):
    """(2, B, 3, H, W) -> {name: unit vectors (2, B, D)}."""
    h = torch.cat([encoder(part) for part in views.flatten(0, 1).split(500)])
    found = dict(embedding=projector(h), representation=h)
    return {name: F.normalize(x).unflatten(0, (2, -1)) for name, x in found.items()}


def distances(first, second, classes):
    """Mean squared distances of unit vectors first, second (N, D); classes (N,)."""
    first = first.double()
    second = second.double()
    member = F.one_hot(classes).double()  # (N, C)
    sizes = member.sum(dim=0)
    product = (first * second).sum()  # over pairs of views of one image
    in_class = ((member.T @ first) * (member.T @ second)).sum()  # over pairs within classes
    every = first.sum(dim=0) @ second.sum(dim=0)
    N = len(classes)
    within = sizes.square().sum()
    return dict(
        image=2 - 2 * (product / N).item(),
        same_class=2 - 2 * ((in_class - product) / (within - N)).item(),
        other_class=2 - 2 * ((every - in_class) / (N**2 - within)).item(),
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint.pt of simclr.py, vicreg.py or msn.py")
    args = p.parse_args(argv)
    encoder, projector, options, script = load_network(args.checkpoint)
    images, labels = sampler.open_data("plates", "val")
    with script.process_group():
        views = two_views(images, options, script)
    found = {
        name: distances(*x, labels["number"])
        for name, x in embed(views, encoder, projector).items()
    }
    args.checkpoint.with_name("distances.json").write_text(json.dumps(found) + "\n")
    for name, numbers in found.items():
        print(f"{name:15}", *(f"{key} {x:.3f}" for key, x in numbers.items()))


if __name__ == "__main__":
    main()
