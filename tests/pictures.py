"""Make docs/plates.png, docs/batches.png, and the idea of each method as docs/METHOD-idea.png.

The first has plates with their labels and, below each, two views of it. The second has 32 plates of
a batch of 8 classes beside 32 of a batch of 960. The others have one grammar: what a network gets,
the network, what it puts out; green: what is compared; red: what spreads a batch; dashed: a moving
average, without gradient.

python tests/pictures.py
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import tables
import torch
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sampler
import simclr

DOCS = Path(sampler.__file__).parent / "docs"
MOVING = "moving\naverage"
TWO_VIEWS = dict(
    one=("one view", "encoder\n+ projector", "embedding"),
    other=("another view", "the same", "embedding"),
)
SOFTMAX = dict(
    one=("anchor view,\nsome patches", "encoder\n+ projector", "softmax over\nK prototypes"),
    other=("target view", MOVING, "the same,\nsharpened"),
    compared="cross-entropy",
)
IDEAS = {
    "simclr": TWO_VIEWS
    | dict(
        compared="cosine: high for the pair",
        spread="low for all other\nimages of the batch",
    ),
    "vicreg": TWO_VIEWS
    | dict(
        one=("one view", "encoder\n+ expander", "embedding"),
        compared="invariance: squared distance",
        spread="each dimension varies over the\nbatch, no two of them alike",
    ),
    "msn": SOFTMAX | dict(spread="mean over the batch:\nuniform over prototypes"),
    "pmsn": SOFTMAX | dict(spread="mean over the batch:\na power law over prototypes"),
    "mae": dict(
        one=("some patches", "encoder,\ndecoder", "pixels of\nthe rest"),
        other=("the image", "", "pixels of\nthe rest"),
        compared="squared error",
        spread="",
    ),
    "data2vec": dict(
        one=("some patches", "encoder\n+ head", "features of\nthe rest"),
        other=("the image", MOVING, "features of\nthe rest"),
        compared="smooth L1 distance",
        spread="",
    ),
}


def draw(many=8):
    """Of plates.png, as a figure."""
    images, labels = sampler.open_data("plates", "train")
    chosen = torch.linspace(7, len(images) - 30, many).long()
    rows = [images[chosen] / 255, *two_views(images[chosen])]
    figure, axes = plt.subplots(3, many, figsize=(8, 3.6), dpi=120, layout="constrained")
    for row, pictures, name in zip(axes, rows, ("plate", "a view", "another")):
        for axis, picture in zip(row, pictures):
            show(axis, picture[0])
        row[0].set_ylabel(name)
    for axis, i in zip(axes[0], chosen):
        digits = " ".join(str(digit) for digit in labels["digits"][i].tolist())
        text = f"digits {digits}\ncount {labels['count'][i]}\nsize {labels['size'][i]}"
        axis.set_title(text, fontsize=8)
    return figure


def show(axis, picture):
    """A picture (H, W) in [0, 1]."""
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def two_views(images):
    """SimCLR's, as the network gets them: (2, N, 3, 32, 32) in [0, 1]."""
    args = simclr.parse_args(["--batch-size", str(len(images))])
    with simclr.process_group() as device:
        dataset = simclr.CroppedViews(images, [(2, args.image_size, args.crop)], args)
        (crops,) = dataset[0, list(range(len(images)))]
        torch.manual_seed(0)
        return simclr.simclr_views(crops, args, device).unflatten(0, (2, -1))


def some_of_a_batch(numbers, k_classes):
    """Indices of 32 plates of the first batch that holds so many classes."""
    batches = sampler.KClassBatchSampler(numbers, 1024, k_classes)
    return next(iter(batches))[:32]


def draw_batches():
    """Of batches.png, as a figure."""
    images, labels = sampler.open_data("plates", "train")
    figure = plt.figure(figsize=(8, 2.25), dpi=100)
    for half, k_classes in enumerate((8, 960)):
        chosen = some_of_a_batch(labels["number"], k_classes)
        tiles = images[chosen, 0].view(4, 8, 32, 32)
        tiles = torch.nn.functional.pad(tiles, (0, 2, 0, 2), value=255)  # white gaps
        mosaic = tiles.permute(0, 2, 1, 3).reshape(4 * 34, 8 * 34).numpy()
        axis = figure.add_axes((0.005 + half * 0.505, 0, 0.49, 0.87))
        axis.imshow(mosaic, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.set_title(f"K = {k_classes}: 32 of a batch of 1,024", fontsize=10)
    return figure


def draw_idea(method):
    """Of METHOD-idea.png, as a figure."""
    idea = IDEAS[method]
    colour = tables.COLOURS[method]
    figure, axis = plt.subplots(figsize=(7.4, 2.3), dpi=100, layout="constrained")
    axis.set_xlim(0, 10.4)
    axis.set_ylim(0, 3)
    axis.axis("off")
    rows = zip((idea["one"], idea["other"]), inputs(method), (2.2, 0.7))
    for (label, network, output), picture, y in rows:
        place = (1.3, 2.5, y - 0.6, y + 0.6)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=place, aspect="auto")
        axis.text(1.15, y, label, ha="right", va="center", fontsize=8)
        box(axis, (6.4, y), output, "black")
        if network:
            box(axis, (4.1, y), network, colour, "--" if network == MOVING else "-")
            arrow(axis, (2.6, y), (3.35, y))
            arrow(axis, (4.85, y), (5.65, y))
        else:
            arrow(axis, (2.6, y), (5.65, y))
    if idea["other"][1] == MOVING:
        arrow(axis, (4.1, 1.85), (4.1, 1.08), color=colour, linestyle=":")
    arrow(axis, (6.4, 1.72), (6.4, 1.18), color="tab:green", arrowstyle="<->", linewidth=2)
    axis.text(6.55, 1.45, idea["compared"], va="center", fontsize=8, color="tab:green")
    if idea["spread"]:
        axis.text(7.4, 2.2, idea["spread"], va="center", fontsize=8, color="tab:red")
    else:
        axis.text(7.4, 2.2, "nothing spreads the batch", va="center", fontsize=8, color="grey")
    return figure


def inputs(method):
    """Of both rows of an idea, (32, 32) each; patches that a network does not get are white."""
    images, _ = sampler.open_data("plates", "val")
    image = images[4567:4568]
    if method in ("mae", "data2vec"):
        whole = image[0, 0] / 255
        some = whole.clone()
        some[:16, 16:] = 1
        some[16:, :16] = 1
        return some, whole
    one, other = two_views(torch.cat([image, image]))[:, 0, 0]
    if method in ("msn", "pmsn"):
        one[8:16, 16:24] = 1
        one[24:, :8] = 1
    return one, other


def box(axis, place, text, colour, linestyle="-"):
    style = dict(boxstyle="round,pad=0.4", facecolor="white", edgecolor=colour, linestyle=linestyle)
    axis.text(*place, text, ha="center", va="center", fontsize=8, bbox=style)


def arrow(axis, start, end, **style):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="->") | style)


def pixels(figure):
    """Grey levels of a figure, (H, W) uint8."""
    figure.canvas.draw()
    return np.asarray(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("L"))


def main():
    draw().savefig(DOCS / "plates.png", metadata={"Software": None})
    grey = Image.fromarray(pixels(draw_batches()) // 16 * 17)  # 16 levels make a small file
    grey.save(DOCS / "batches.png", optimize=True)
    for method in IDEAS:
        draw_idea(method).savefig(DOCS / f"{method}-idea.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
