"""The data of the study: which images there are, which of them share a mini-batch, and the prior.

*The hidden uniform cluster prior in self-supervised learning* (Assran et al., ICLR 2023, arXiv
2210.07277) keeps the data and changes only the mini-batch: each one holds exactly K classes.
K = 960 of ImageNet's 1,000 classes is a balanced batch, K = 8 is not. Every image is still seen
equally often.

    images, labels = open_data("plates", "train")
    sampler = KClassBatchSampler(labels["number"], batch_size=1024, k_classes=8)
    for indices in sampler:
        batch = images[indices]  # 1,024 images of 8 classes

In shapes: N images, C channels, H and W pixels.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF

IN_MEMORY = ("plates", "cifar10", "cifar100")  # one tensor; all other data sets are files


# ---- 1. Which images there are
def open_data(data, split):
    """The images of a data set and their labels. split: "train" or "val".

    data: "plates", "cifar10" or "cifar100" (downloaded into ./data), a folder with
    SPLIT/CLASS/IMAGE, or one with iNaturalist 2018 as published.
    Returns images, uint8 (N, C, H, W) or Paths of N files, and labels, a dict of integer tensors
    of N rows each, of which the first is the class. ValueError says what the data set lacks."""
    if data == "plates":
        if split == "train":
            return draw_plates(per_class=50, seed=0)
        return draw_plates(per_class=10, seed=1)
    if data in ("cifar10", "cifar100"):
        return open_cifar(data, split)
    return open_folder(data, split)


def open_cifar(data, split):
    """CIFAR10 or CIFAR100 as one tensor (N, 3, 32, 32)."""
    kind = CIFAR10 if data == "cifar10" else CIFAR100
    try:
        source = kind("data", split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{data}: needs a download or ./data ({first_line(error)})") from None
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return images, {"class": torch.tensor(source.targets)}


class Paths(list):
    """Paths of images. `skipped`: hidden files and folders beside them, which are left out."""

    skipped = 0

    def keep(self, indices):
        """Those of the indices."""
        kept = Paths(self[i] for i in indices)
        kept.skipped = self.skipped
        return kept


def open_folder(data, split):
    """Paths of the images below SPLIT/CLASS/, or of those that iNaturalist's SPLIT2018.json lists.

    Classes are numbered in the order of their folders' names."""
    root = Path(data)
    listing = root / f"{split}2018.json"
    try:
        if listing.is_file():
            paths, classes = read_listing(root, json.loads(listing.read_text()))
        else:
            paths, classes = list_folder(root / split)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        needed = f"{root / split}/CLASS/IMAGE"
        raise ValueError(f"{data}: needs {needed} ({first_line(error)})") from None
    return paths, {"class": torch.tensor(classes)}


def read_listing(root, listing):
    """Paths and classes of iNaturalist's images, by the contents of its JSON file."""
    category = {item["image_id"]: item["category_id"] for item in listing["annotations"]}
    paths = Paths(str(root / item["file_name"]) for item in listing["images"])
    classes = [category[item["id"]] for item in listing["images"]]
    if not paths:
        raise ValueError("the listing has no images")
    if not all(isinstance(number, int) for number in classes):
        raise ValueError("a category_id is not a whole number")
    return paths, classes


def list_folder(root):
    """Paths of the images below root/CLASS/, and the number of each one's class.

    What file managers and notebooks leave behind is skipped. ValueError names a class folder
    without images."""
    paths = Paths()
    classes = []
    names = []
    for entry in os.scandir(root):
        if is_hidden(entry.name):
            paths.skipped += 1
        elif entry.is_dir():
            names.append(entry.name)
    if not names:
        raise ValueError(f"no class folders in {root}")
    for number, name in enumerate(sorted(names)):
        before = len(paths)
        list_images(root / name, paths)
        if len(paths) == before:
            raise ValueError(f"no images in {root / name}: fill or remove it")
        classes += [number] * (len(paths) - before)
    return paths, classes


def list_images(root, paths):
    """Add the images below root, at any depth, to paths, in the order of torchvision's
    ImageFolder."""
    folders = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        folders.append((folder, files))
        paths.skipped += sum(map(is_hidden, subfolders))
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
    for folder, files in sorted(folders):
        shown = [name for name in files if not name.startswith(".")]
        paths.skipped += len(files) - len(shown)
        images = sorted(name for name in shown if name.lower().endswith(IMG_EXTENSIONS))
        start = os.path.join(folder, "")
        paths += [start + name for name in images]


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def first_line(error):
    """Kind and text of an error, the latter cut to its first line."""
    text = f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


def draw_plates(per_class, seed):
    """Plates: grey pictures of the numbers 000 to 999 over 0 to 3 discs.

    A number has a random place, size and angle, light on dark or dark on light.
    Returns images (N, 1, 32, 32) uint8, N = 1000 * per_class, class after class, and labels:
    number (N,), the class; digits (N, 3); count (N,), of discs; size (N,), the bin 0 to 2 of the
    digits' height. They follow from the seed and from Pillow's own font alone."""
    numbers = torch.arange(1000).repeat_interleave(per_class)
    N = len(numbers)
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(N, *shape, generator=rng)

    # The order of these draws is part of the data set.
    height = draw(32, 38)  # of the digits' font, in half pixels
    angle = draw(-8, 8).deg2rad()
    right = draw(-2, 2) / 32  # shifts, as fractions of half the picture
    down = draw(-3, 3) / 32
    count = torch.randint(4, (N,), generator=rng)
    centre = draw(0, 32, 2, 3, 1, 1)  # x and y of three discs, pixels
    radius = draw(2.5, 6, 3, 1, 1)
    shade = draw(0.12, 0.35, 3, 1, 1)
    light = draw(0.65, 1, 1, 1, 1)
    dark = draw(0, 0.35, 1, 1, 1)
    dark_on_light = draw(0, 1, 1, 1, 1) < 0.5

    shade = shade * (torch.arange(3) < count[:, None]).view(N, 3, 1, 1)  # only `count` are seen
    ink = torch.where(dark_on_light, dark, light)
    ground = torch.where(dark_on_light, light, dark)
    affine = picture_to_glyph(35 / height, angle, torch.stack([right, down], dim=1))
    glyphs = draw_glyphs()
    pixel = torch.arange(32) + 0.5
    images = []
    for part in torch.arange(N).split(100):  # they fit into a processor's cache
        distance = torch.hypot(pixel - centre[part, 0], pixel[:, None] - centre[part, 1])
        discs = (radius[part] - distance + 0.5).clamp(0, 1) * shade[part]  # (100, 3, 32, 32)
        discs = discs.amax(dim=1, keepdim=True)
        grid = F.affine_grid(affine[part], discs.shape, align_corners=False)
        number = F.grid_sample(glyphs[numbers[part]], grid, align_corners=False)
        mixed = ground[part].lerp(ink[part], torch.maximum(number, discs))  # (100, 1, 32, 32)
        images.append((255 * mixed).round().byte())

    labels = dict(
        number=numbers,
        digits=torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], dim=1),
        count=count,
        size=(height - 32).long() // 2,
    )
    return torch.cat(images), labels


def picture_to_glyph(scale, angle, shift):
    """The affine maps (N, 2, 3) by which a picture looks up its glyph: a shift (N, 2), then a
    rotation by angle (N,) and a scale (N,)."""
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    rotation = rotation.view(-1, 2, 2) * scale.view(-1, 1, 1)
    return torch.cat([rotation, -rotation @ shift[:, :, None]], dim=2)


def draw_glyphs():
    """The numbers 000 to 999, white on black: (1000, 1, 64, 64) in [0, 1]."""
    font = ImageFont.load_default(size=35)
    glyphs = []
    for number in range(1000):
        canvas = Image.new("L", (64, 64))
        ImageDraw.Draw(canvas).text((32, 32), f"{number:03}", fill=255, font=font, anchor="mm")
        glyphs.append(TF.pil_to_tensor(canvas) / 255)
    return torch.stack(glyphs)


def long_tail(labels, exponent, seed):
    """Indices of a long-tailed part of a data set: of class k a share k**-exponent, k from 1.

    labels: N integers. At least one image of each class is kept. Returns sorted indices."""
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class after class, each shuffled
    sizes = np.unique(labels, return_counts=True)[1]
    shares = np.arange(1, len(sizes) + 1) ** -float(exponent)
    kept = np.maximum(np.round(sizes * shares).astype(int), 1)
    first = np.cumsum(sizes) - sizes
    return np.sort(order[_ranges(first, kept)])


# ---- 2. Which of them share a mini-batch
class KClassBatchSampler:
    """Batches of exactly `k_classes` distinct classes; None: plain shuffling of all images.

    labels: N integers. batch_size: images in a global batch. Iterating yields lists of indices:
    this process's share. Shares partition the batch; joined by rank they are the batch that a
    single process sees. Batches follow from (seed, epoch) alone, so processes agree on them
    without communicating.

    A class gets floor or ceil of batch / K images. Classes are dealt least-dealt first, ties
    shuffled: a deck of cards, refilled when empty, that repeats no class within a batch. The images
    of a class have a deck of their own. Within an epoch the counts of two classes differ by at most
    one share, and those of two images of a class by at most one.
    ValueError: arguments that cannot be met."""

    def __init__(self, labels, batch_size, k_classes=None, *, rank=0, world_size=1, seed=0):
        labels = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are not N integers but {labels.dtype} {labels.shape}")
        classes, labels = np.unique(labels, return_inverse=True)
        N = len(labels)
        if batch_size < 1 or batch_size % world_size:
            fit = max(batch_size - batch_size % world_size, world_size)
            raise ValueError(
                f"{batch_size} is no positive multiple of {world_size} processes: use {fit}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        if N < batch_size:
            raise ValueError(f"{N} images are fewer than a batch of {batch_size}: use at most {N}")
        most = min(len(classes), batch_size)
        if k_classes is not None and not 1 <= k_classes <= most:
            raise ValueError(
                f"{k_classes} classes in every batch of {batch_size} images, from a data set of "
                f"{len(classes)} classes: choose 1 to {most}"
            )
        self.batch_size = batch_size
        self.k_classes = k_classes
        self.seed = seed
        self.epoch = 0
        local = batch_size // world_size
        self.share = slice(rank * local, (rank + 1) * local)
        self.labels = labels.astype(np.min_scalar_type(len(classes)))  # small: sorted by radix
        self.sizes = np.bincount(labels)  # (classes,) images of each class
        self.starts = np.cumsum(self.sizes) - self.sizes  # of each class in the deck

    def set_epoch(self, epoch):
        """Choose the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self):
        """Batches of an epoch. An incomplete last batch is left out."""
        return len(self.labels) // self.batch_size

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        deck = rng.permutation(len(self.labels))
        if self.k_classes is None:
            whole = deck[: len(self) * self.batch_size]
            for batch in whole.reshape(len(self), -1):
                yield batch[self.share].tolist()
            return

        deck = deck[np.argsort(self.labels[deck], kind="stable")]  # class after class
        spent = np.zeros_like(self.sizes)  # cards dealt of each class's present deck
        dealt = np.zeros(len(self.sizes))  # images dealt of each class in this epoch
        least, larger = divmod(self.batch_size, self.k_classes)
        counts = least + (np.arange(self.k_classes) < larger)  # images of a batch's classes
        for _ in range(len(self)):
            # Least dealt first keeps max(dealt) - min(dealt) <= one share at every batch, by
            # induction: whoever is dealt had no more than whoever is not. Ties are random.
            classes = np.argsort(dealt + rng.random(len(dealt)))[: self.k_classes]
            dealt[classes] += counts
            short = spent[classes] + counts > self.sizes[classes]
            refilled = self._refill(deck, spent, classes[short], counts[short], rng)
            enough = classes[~short]
            taken = counts[~short]
            simple = deck[_ranges(self.starts[enough] + spent[enough], taken)]
            spent[enough] += taken
            batch = np.concatenate([refilled, simple])
            yield rng.permutation(batch)[self.share].tolist()  # each process gets mixed classes

    def _refill(self, deck, spent, classes, counts, rng):
        """Deal `counts` cards of `classes` whose decks do not suffice: what is left of each, then
        cards of a new shuffle. Changes deck and spent; returns the images' indices."""
        sizes = self.sizes[classes]
        left = sizes - spent[classes]
        place = _ranges(self.starts[classes], sizes)  # where these decks lie, one after another
        owner = np.repeat(np.arange(len(classes)), sizes)  # the class of each of their cards
        rank = _ranges(np.zeros_like(sizes), sizes)  # of a card in its deck

        # The rest to the front and the dealt cards, shuffled, behind it: none comes twice.
        was_dealt = rank < spent[classes][owner]
        cards = deck[place][np.lexsort((rng.random(len(place)), was_dealt, owner))]
        wrapped = _ranges(np.zeros_like(counts), counts) % np.repeat(sizes, counts)
        picks = cards[np.repeat(np.cumsum(sizes) - sizes, counts) + wrapped]

        # Behind the rest, `taken` cards of the new round are dealt; the others wait, shuffled.
        taken = (counts - left) % sizes
        waits = (rank - left[owner]) % sizes[owner] >= taken[owner]
        deck[place] = cards[np.lexsort((rng.random(len(place)), waits, owner))]
        spent[classes] = taken
        return picks


def _ranges(starts, counts):
    """The ranges start, start + 1, ... of `counts` numbers each, one after another."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)


# ---- 3. The prior
def power_law_prior(num_prototypes, exponent):
    """The prior of PMSN: (K,) float64 that sum to 1, entry k proportional to k**-exponent.

    k counts from 1; exponent 0 is the uniform prior. ValueError: num_prototypes below 1."""
    if num_prototypes < 1:
        raise ValueError(f"num_prototypes is {num_prototypes}: give at least 1")
    weights = torch.arange(1, num_prototypes + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def open_prior(prior, exponent, num_prototypes):
    """A prior over K prototypes by its name: (K,) float64 that sum to 1.

    prior: "power-law", "uniform", or "file:PATH" of K weights, text or .npy. ValueError: a file
    that has no K weights, or weights that are negative, not finite or all 0."""
    if prior == "power-law":
        return power_law_prior(num_prototypes, exponent)
    if prior == "uniform":
        return power_law_prior(num_prototypes, 0.0)
    path = prior.removeprefix("file:")
    try:
        weights = np.load(path) if path.endswith(".npy") else Path(path).read_text().split()
        weights = torch.from_numpy(np.array(weights, dtype=float)).reshape(num_prototypes)
        if not (weights >= 0).all() or not 0 < weights.sum() < float("inf"):
            raise ValueError("negative, not finite or all 0")
    except Exception as error:  # numpy raises many kinds
        raise ValueError(
            f"{prior} ({error}): give power-law, uniform or file:PATH of {num_prototypes} "
            "weights >= 0"
        ) from None
    return weights / weights.sum()
