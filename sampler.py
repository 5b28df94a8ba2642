"""Which images share a mini-batch, the prior, and the data of the study.

*The hidden uniform cluster prior in self-supervised learning* (Assran et al., ICLR 2023, arXiv
2210.07277) keeps the data and changes only the mini-batch: each one holds exactly K classes.
K = 960 of ImageNet's 1,000 classes is a balanced batch, K = 8 is not. At every K the same images
are seen equally often; only their company in the batch differs.

    images, labels = open_data("plates", "train")
    sampler = KClassBatchSampler(labels["number"], batch_size=1024, k_classes=8)
    for indices in sampler:
        batch = images[indices]  # 1,024 images of 8 classes

In shapes: N images, C channels, H and W pixels.
"""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder
from torchvision.transforms.v2 import functional as TF

Image.MAX_IMAGE_PIXELS = None  # pictures are the user's own: a large one is no attack,
PngImagePlugin.MAX_TEXT_CHUNK = 2**30  # nor is a long text or colour profile in it

IN_MEMORY = ("plates", "cifar10", "cifar100")  # one tensor; all other data sets are files


# ---- 1. Which images share a mini-batch
class KClassBatchSampler:
    """Batches of exactly `k_classes` distinct classes; None: plain shuffling of all images.

    labels: N integers. batch_size: images in a global batch. Iterating yields lists of indices:
    this process's share. ValueError: arguments that cannot be met.

    Batches are one endless sequence, of which epoch e is the piece from batch e * len(self) on. At
    every batch, over the whole run up to there:
    * The batch has K classes, and floor or ceil of batch_size / K images of each.
    * The numbers of images dealt of any two classes differ by at most one such share.
    * Within a class an image comes again only after all others have come as often.
    * No image is in a batch twice, unless its class has fewer images than its share.
    * Shares of the processes partition the batch that a single process sees.
    * All follows from (seed, number of the batch): processes agree without communicating.
    Without K every image comes at most once in an epoch; an incomplete last batch is left out."""

    def __init__(self, labels, batch_size, k_classes=None, *, rank=0, world_size=1, seed=0):
        self.labels = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu":
            raise ValueError(f"labels {self.labels.dtype} {self.labels.shape}: give N integers")
        self.sizes = np.unique(self.labels, return_counts=True)[1]  # images of each class
        N = len(self.labels)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes: choose 0 to {world_size - 1}")
        if batch_size < 1 or batch_size % world_size:
            fit = max(batch_size - batch_size % world_size, world_size)
            raise ValueError(f"{batch_size} is no multiple of {world_size} processes: use {fit}")
        if N < batch_size:
            raise ValueError(f"{N} images are fewer than a batch of {batch_size}: use at most {N}")
        most = min(len(self.sizes), batch_size)
        if k_classes is not None and not 1 <= k_classes <= most:
            have = f"{len(self.sizes)} classes, batches of {batch_size}"
            raise ValueError(f"{k_classes} classes in every batch ({have}): choose 1 to {most}")
        self.batch_size = batch_size
        self.k_classes = k_classes
        self.seed = seed
        self.epoch = 0
        local = batch_size // world_size
        self.share = slice(rank * local, (rank + 1) * local)
        self.dealer = None  # where the last iteration began

    def set_epoch(self, epoch):
        """Choose the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self):
        """Batches of an epoch."""
        return len(self.labels) // self.batch_size

    def __iter__(self):
        first = self.epoch * len(self)
        if self.k_classes is None:
            deck = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.labels))
            for start in range(0, len(self) * self.batch_size, self.batch_size):
                yield deck[start : start + self.batch_size][self.share].tolist()
            return

        dealer = copy.deepcopy(self.dealer)
        if dealer is None or dealer.dealt_batches > first:
            dealer = Dealer(self.labels, self.batch_size, self.k_classes, self.seed)
        while dealer.dealt_batches < first:  # what this run has not seen has been dealt before
            dealer.next_batch()
        self.dealer = copy.deepcopy(dealer)
        for number in range(first, first + len(self)):
            rng = np.random.default_rng([self.seed, number])
            batch = rng.permutation(dealer.next_batch())  # each process gets mixed classes
            yield batch[self.share].tolist()

    def describe(self, batches):
        """The classes, and what K means in a run of so many batches, in a line. It warns of classes
        that are never reached, and of images that must come twice in a batch."""
        sizes = np.sort(self.sizes)[::-1]
        text = f"{len(self.labels):,} images of {len(sizes):,} classes"
        if sizes[0] > sizes[-1]:
            ranks = np.arange(1, len(sizes) + 1)
            slope = np.polyfit(np.log(ranks), np.log(sizes), deg=1)[0]  # of a straight line
            text += f", {sizes[0]:,} to {sizes[-1]:,} each, about as rank^{slope:.2f}"
        text += f"; batches of {self.batch_size:,}, "
        if self.k_classes is None:
            return text + "any classes"
        share = math.ceil(self.batch_size / self.k_classes)
        visits = batches * self.k_classes / len(sizes)
        text += f"K = {self.k_classes}: a class is in {visits:.1f} of {batches:,} batches"
        if visits < 1:
            text += " (warning: some are never reached)"
        if share > sizes[-1]:
            text += f" (warning: {share} images of a class each: those of small ones come twice)"
        return text


class Dealer:
    """Every class has a deck of cards, its images, shuffled again when it is used up."""

    def __init__(self, labels, batch_size, k_classes, seed):
        self.rng = np.random.default_rng([seed, batch_size, k_classes])
        shuffled = self.rng.permutation(len(labels))
        self.cards = shuffled[np.argsort(labels[shuffled], kind="stable")]  # deck after deck
        self.sizes = np.unique(labels, return_counts=True)[1]
        self.starts = np.cumsum(self.sizes) - self.sizes  # where each deck begins
        self.spent = np.zeros_like(self.sizes)  # cards dealt of each deck
        self.dealt = np.zeros_like(self.sizes)  # cards dealt of each class from the beginning
        least, larger = divmod(batch_size, k_classes)
        self.shares = least + (np.arange(k_classes) < larger)  # of the classes in a batch
        self.dealt_batches = 0

    def next_batch(self):
        """Images of exactly K classes, class after class: indices (batch_size,)."""
        # Least dealt first keeps max(dealt) - min(dealt) <= one share at every batch, by
        # induction: whoever is dealt had no more than whoever is not. Ties are random.
        order = np.argsort(self.dealt + self.rng.random(len(self.dealt)))
        classes = order[: len(self.shares)]
        self.dealt[classes] += self.shares
        self.dealt_batches += 1

        enough = self.spent[classes] + self.shares <= self.sizes[classes]
        first = self.starts[classes] + self.spent[classes]
        hands = [self.cards[ranges(first[enough], self.shares[enough])]]
        self.spent[classes] += self.shares
        for k, share in zip(classes[~enough], self.shares[~enough]):
            deck = self.cards[self.starts[k] : self.starts[k] + self.sizes[k]]
            hand, self.spent[k] = deal_and_shuffle(deck, self.spent[k] - share, share, self.rng)
            hands.append(hand)
        return np.concatenate(hands)


def ranges(starts, lengths):
    """The numbers start, start + 1, ... of each range, one range after another."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)


def deal_and_shuffle(deck, spent, number, rng):
    """Deal `number` cards of a deck of which `spent` are dealt and the rest does not suffice.

    Those dealt are shuffled and put behind the rest, so none comes twice too early. Changes the
    deck, a new round of all cards. Returns the cards, and how many of the new round are dealt."""
    rest = len(deck) - spent
    queue = np.concatenate([deck[spent:], rng.permutation(deck[:spent])])
    cards = np.resize(queue, number)  # once around the queue, or several times
    spent = (number - rest) % len(deck)
    deck[:] = np.roll(queue, -rest)  # the new round begins behind the rest
    deck[spent:] = rng.permutation(deck[spent:])
    return cards, spent


# ---- 2. The prior
def power_law_prior(num_prototypes, exponent):
    """The prior of PMSN: (K,) float64 that sum to 1, entry k proportional to k**-exponent.

    k counts from 1; exponent 0 is the uniform prior. ValueError: num_prototypes below 1."""
    if num_prototypes < 1:
        raise ValueError(f"num_prototypes is {num_prototypes}: give at least 1")
    weights = torch.arange(1, num_prototypes + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


# ---- 3. The data
def open_data(data, split, tail=0.0, seed=0):
    """The images of a data set and their labels. split: "train" or "val".

    data: "plates", "cifar10" or "cifar100" (downloaded into ./data), a folder with
    SPLIT/CLASS/IMAGE, or one with iNaturalist 2018 as published. tail: exponent of a power law of
    class sizes, see long_tail; 0: as they are. It follows from the seed what is left.
    Returns images, uint8 (N, C, H, W) or a list of N paths, and labels, a dict of integer tensors
    of N rows each, of which the first is the class. ValueError says what the data set lacks."""
    if data == "plates":
        if split == "val":
            return draw_plates(per_class=10, seed=1)
        return draw_plates(long_tailed_sizes(tail, seed) if tail else 150, seed=0)
    if data in ("cifar10", "cifar100"):
        images, labels = open_cifar(data, split)
    else:
        images, labels = open_folder(data, split)
    if tail:
        kept = long_tail(labels["class"], tail, seed)
        images = images[kept] if torch.is_tensor(images) else [images[i] for i in kept]
        labels = {"class": labels["class"][kept]}
    return images, labels


def open_cifar(data, split):
    """CIFAR10 or CIFAR100 as one tensor (N, 3, 32, 32)."""
    kind = CIFAR10 if data == "cifar10" else CIFAR100
    try:
        source = kind("data", split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{data}: needs a download or ./data ({first_line(error)})") from None
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return images, {"class": torch.tensor(source.targets)}


def first_line(error):
    """Kind and text of an error, the latter cut to its first line."""
    text = f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


def open_folder(data, split):
    """Paths of the images below SPLIT/CLASS/, or of those that iNaturalist's SPLIT2018.json lists.

    Classes are numbered in the order of their folders' names. An image is what ends like one."""
    root = Path(data) / split
    listing = Path(data) / f"{split}2018.json"
    formats = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"}  # the reader of JPEG opens MPO
    endings = {ending for ending, name in formats.items() if name in readable}

    def is_image(path):
        hidden = f"{os.sep}." in path[len(str(root)) :]  # the file, or a folder that holds it
        return Path(path).suffix.lower() in endings and not hidden

    try:
        if listing.is_file():
            return read_listing(data, json.loads(listing.read_text()))
        folder = DatasetFolder(root, loader=None, is_valid_file=is_image)
        files = sum(len(names) for *_, names in os.walk(root, followlinks=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{data}: needs {root}/CLASS/IMAGE ({first_line(error)})") from None
    paths = [path for path, _ in folder.samples]
    if files > len(paths) and os.environ.get("RANK", "0") == "0":
        print(f"{root}: {files - len(paths):,} other files are left out")
    return paths, {"class": torch.tensor(folder.targets)}


def read_listing(data, listing):
    """Paths and classes of iNaturalist's images, by the contents of its JSON file."""
    category = {item["image_id"]: item["category_id"] for item in listing["annotations"]}
    classes = [int(category[item["id"]]) for item in listing["images"]]
    paths = [os.path.join(data, item["file_name"]) for item in listing["images"]]
    if not paths:
        raise ValueError("the listing has no images")
    return paths, {"class": torch.tensor(classes)}


class Unreadable(Exception):
    """An image file that cannot be used. Its text names the file."""


def read_image(path):
    """An image file -> (3, H, W) uint8, upright. Of 16 bits of grey the upper 8 are used.

    Unreadable: what Pillow cannot read, and 32 bits or floats: nobody knows what is white."""
    try:
        with Image.open(path) as image:
            image.load()
            sixteen_bits = image.mode.startswith("I;16")
            if image.mode == "I" and image.format in ("PNG", "PPM"):  # these hold 16 bits at most
                sixteen_bits = True
            if image.mode in ("I", "F") and not sixteen_bits:
                raise ValueError(f"mode {image.mode} has no white: convert it to 8 or 16 bits")
            image = upright(image)
            if sixteen_bits:
                grey = torch.from_numpy(np.array(image, dtype=np.int32) // 256)
                return grey.byte().expand(3, -1, -1)
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise Unreadable(f"{path}: unreadable image ({error}): replace it") from None


def upright(image):
    """Turn an image by its EXIF tag, unless that is broken."""
    try:
        image.getexif()  # is remembered
        image.info.pop("exif", None)  # exif_transpose would write it anew, which can fail
        return ImageOps.exif_transpose(image)
    except Exception:  # many kinds; the picture itself is fine
        return image


def draw_plates(per_class, seed):
    """Plates: grey pictures of the numbers 000 to 999 over 0 to 3 discs.

    A number has a random place, size and angle, light on dark or dark on light. per_class: images
    of each number, one for all or 1,000 of them. Returns images (N, 1, 32, 32) uint8, class after
    class, and labels: number (N,), the class; digits (N, 3); count (N,), of discs; size (N,), the
    bin 0 to 2 of the digits' height. They follow from the seed and Pillow's own font alone."""
    numbers = torch.arange(1000).repeat_interleave(torch.as_tensor(per_class))
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


def long_tailed_sizes(exponent, seed):
    """Images of each plate, (1000,): of the k-th most frequent one in proportion to k**-exponent,
    at least 10, as many in all as balanced plates have. The seed draws which one is the k-th."""
    shares = np.arange(1, 1001) ** -float(exponent)
    scale = 1.0
    for _ in range(100):  # raising the small ones to 10 takes images from the others
        sizes = np.maximum(scale * shares, 10)
        scale *= 150_000 / sizes.sum()
    sizes = np.round(sizes).astype(int)
    sizes[0] += 150_000 - sizes.sum()  # some ten, by rounding
    return sizes[np.random.default_rng(seed).permutation(1000)]


def long_tail(labels, exponent, seed):
    """Indices of a long-tailed part of a data set: of class k a share k**-exponent, k from 1.

    labels: N integers. At least one image of each class is kept. Returns sorted indices."""
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class after class, each shuffled
    sizes = np.unique(labels, return_counts=True)[1]
    shares = np.arange(1, len(sizes) + 1) ** -float(exponent)
    kept = np.maximum(np.round(sizes * shares).astype(int), 1)
    return np.sort(order[ranges(np.cumsum(sizes) - sizes, kept)])
