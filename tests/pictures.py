"""Make docs/plates.png and docs/batches.png.

The first has plates with their labels and, below each, two views of it. The second has 32 plates of
a batch of 8 classes beside 32 of a batch of 960.

python tests/pictures.py
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sampler
import simclr

DOCS = Path(sampler.__file__).parent / "docs"


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


def pixels(figure):
    """Grey levels of a figure, (H, W) uint8."""
    figure.canvas.draw()
    return np.asarray(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("L"))


def main():
    draw().savefig(DOCS / "plates.png", metadata={"Software": None})
    grey = Image.fromarray(pixels(draw_batches()) // 16 * 17)  # 16 levels make a small file
    grey.save(DOCS / "batches.png", optimize=True)


if __name__ == "__main__":
    main()
