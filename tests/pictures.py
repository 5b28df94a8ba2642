"""Make docs/plates.png: plates with their labels and, below each, two views of it.

python tests/pictures.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sampler
import simclr

DOCS = Path(sampler.__file__).parent / "docs"


def some_plates(many):
    """Images (N, 1, 32, 32) uint8 of the training set, evenly spread, and their labels (N, ...)."""
    images, labels = sampler.open_data("plates", "train")
    chosen = torch.linspace(7, len(images) - 30, many).long()
    return images[chosen], {name: label[chosen] for name, label in labels.items()}


def two_views(images):
    """SimCLR's, as the network gets them: (2, N, 3, 32, 32) in [0, 1]."""
    args = simclr.parse_args([])
    with simclr.process_group() as device:
        dataset = simclr.CroppedViews(images, [(2, args.image_size, args.crop)], args)
        (crops,) = dataset[0, list(range(len(images)))]
        torch.manual_seed(0)
        return simclr.simclr_views(crops, args, device).unflatten(0, (2, -1))


def draw(many=8):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images, labels = some_plates(many)
    rows = [images / 255, *two_views(images)]
    figure, axes = plt.subplots(3, many, figsize=(8, 3.6), dpi=120, layout="constrained")
    for row, pictures, name in zip(axes, rows, ("plate", "a view", "another")):
        for axis, picture in zip(row, pictures):
            axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
    for i, axis in enumerate(axes[0]):
        digits = " ".join(str(digit) for digit in labels["digits"][i].tolist())
        text = f"digits {digits}\ncount {labels['count'][i]}\nsize {labels['size'][i]}"
        axis.set_title(text, fontsize=8)
    return figure


def main():
    draw().savefig(DOCS / "plates.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
