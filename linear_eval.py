# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""Linear evaluation: how much of a target can a linear classifier read off a frozen encoder?

    python linear_eval.py runs/msn/checkpoint.pt                       the run's own data
    python linear_eval.py vitb16.pth --data IMAGENET --cached          a released file
    torchrun --nproc_per_node=8 linear_eval.py runs/msn/checkpoint.pt --task clevr-dist --data CLEVR

The encoder never learns. Linear classifiers on its features do, many at once: each has a feature,
a normalisation and a learning rate of its own; all are reported, the best is chosen on a tenth of
the training set that none saw, and the test set is used once. The control is the same network with
random weights. The recipe is the study's, VISSL's default for each task: images are augmented anew
in each epoch (--cached: features of whole images are computed once), SGD with Nesterov momentum,
rate 0.01 for a batch of 256 (larger ones besides, since small features need them).

N processes share out the images, not the heads: each sees all features, so that all train the same
heads and count the same test images, once each.
In shapes: N images, B a batch, D features, L heads of one kind, T targets an image, C classes.
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

# ---- 1. Hyper-parameters

# VISSL's defaults (configs/config/benchmark/linear_image_classification). The rate, for a batch of
# 256, is divided by 10 after 2/7, 4/7 and 6/7 of the epochs, or falls as a cosine to a hundredth.
# Training images are cropped and flipped, only flipped, or left as they are. Features: see
# `features`; norms: see Heads; std: of the initial weights, None: torch's own.
VISSL = dict(
    features=["pooled", "cls", "cls4", "patches"], norms=["batch", "none"], rates=[0.01, 0.1, 0.5],
    batch_size=256, epochs=28, warmup=0, cosine=False, final=0.01, by_step=False, std=None,
    weight_decay=5e-4, nesterov=True, lars=False, augment="crop", squash=False,
)  # fmt: skip
CLEVR = VISSL | dict(cosine=True, augment="flip", squash=True)  # to a square: no object is lost
TASKS = {
    "imagenet": VISSL,  # and any folder
    "inat18": VISSL | dict(epochs=84),
    "places205": VISSL | dict(epochs=14),
    "cifar10": VISSL | dict(augment="flip"),
    "cifar100": VISSL | dict(augment="flip"),
    "clevr-count": CLEVR | dict(epochs=50),
    "clevr-dist": CLEVR | dict(epochs=100),
    "kitti-dist": VISSL,
    "plates": VISSL | dict(augment="none", batch_size=512),  # a flipped digit is another sign
}
# What the methods' own repositories do instead: one head.
OWN = dict(norms=["none"], epochs=100, cosine=True, final=0.0, by_step=True, std=0.01)
PROTOCOLS = {
    "vissl": {},
    "msn": OWN | dict(features=["raw", "pooled"], norms=["layer"], rates=[0.2], weight_decay=0.0),
    "mae": OWN | dict(
        features=["cls", "pooled"], norms=["standard"], rates=[0.1], weight_decay=0.0, lars=True,
        epochs=90, warmup=10,
    ),
    "vicreg": OWN | dict(
        features=["pooled", "cls"], rates=[0.3], weight_decay=1e-6, nesterov=False, by_step=False,
    ),
}  # fmt: skip
IN_MEMORY, SPLITS = ("plates", "cifar10", "cifar100"), ("train", "val")


def fail(message, everywhere=False):
    """Bad input: one line on stderr (process 0 speaks for all, unless `everywhere`), status 2."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.error = fail
    p.add_argument("checkpoint", help="checkpoint.pt of a run, or a released file")
    p.add_argument("--data", help="plates, cifar10, cifar100 or a folder (default: the run's)")
    p.add_argument("--task", choices=TASKS, help="whose recipe (default: told by the data)")
    p.add_argument("--target", help="plates: digits, number, count or size; CLEVR: count or dist")
    p.add_argument("--out", help="JSON file (default: beside the checkpoint)")
    p.add_argument("--protocol", choices=PROTOCOLS, default="vissl", help="default: the study's")
    p.add_argument("--cached", action="store_true", help="features once, images not augmented")
    p.add_argument("--train-fraction", help="share, N-per-class, or a file of image names")
    p.add_argument("--rates", type=float, nargs="+", help="learning rates for a batch of 256")
    p.add_argument("--epochs", type=int, help="of the heads (default: the recipe's)")
    p.add_argument("--batch-size", type=int, help="of all processes; rates are scaled with it")
    p.add_argument("--knn", type=int, default=0, help="also classify by so many neighbours")
    p.add_argument("--nearest", type=int, default=0, help="picture of so many test images' nearest")
    p.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--plain-pixels", action="store_true", help="released SimCLR: no normalisation")
    p.add_argument("--workers", type=int, help="loader processes (default: all cores')")
    p.add_argument("--seed", type=int, default=0, help="of the held-out tenth, heads and order")
    args = p.parse_args(argv)
    least = dict(epochs=1, batch_size=2, workers=0, seed=0, knn=0, nearest=0)
    for name, low in least.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {low}")
    if not all(0 < rate < math.inf for rate in args.rates or ()):
        fail(f"--rates {args.rates}: give numbers above 0")
    choice = args.train_fraction or "1"
    share = re.fullmatch(r"[1-9]\d*-per-class|1(\.0*)?|0?\.\d*[1-9]\d*", choice)
    if not share and not Path(choice).is_file():
        fail(f"--train-fraction {choice}: give a share (0.01), 5-per-class or a file of names")
    return args


# ---- 2. Data
def draw_plates(per_class, seed):
    """Grey pictures of the numbers 000..999 over 0 to 3 discs -> images (N, 1, 32, 32) uint8, N =
    1000 * per_class, and labels: number (N,), digits (N, 3), count of discs (N,), size bin (N,)."""
    font, glyphs = ImageFont.load_default(size=35), []
    for number in range(1000):
        canvas = Image.new("L", (64, 64))
        ImageDraw.Draw(canvas).text((32, 32), f"{number:03}", fill=255, font=font, anchor="mm")
        glyphs.append(TF.pil_to_tensor(canvas) / 255)
    glyphs, numbers = torch.stack(glyphs), torch.arange(1000).repeat_interleave(per_class)
    N, rng = len(numbers), torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(N, *shape, generator=rng)

    height, angle = draw(32, 38), draw(-8, 8).deg2rad()  # on a canvas of 64 pixels, halved below
    shift = torch.stack([draw(-2, 2), draw(-3, 3)], dim=1) / 32
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(N, 2, 2)
    turn = turn * (35 / height).view(N, 1, 1)
    affine = torch.cat([turn, -turn @ shift[:, :, None]], dim=2)  # (N, 2, 3) picture -> glyph
    count, centre = torch.randint(4, (N,), generator=rng), draw(0, 32, 2, 3, 1, 1)
    radius, shade = draw(2.5, 6, 3, 1, 1), draw(0.12, 0.35, 3, 1, 1)
    shade = shade * (torch.arange(3) < count[:, None]).view(N, 3, 1, 1)
    light, dark, swap = draw(0.65, 1, 1, 1, 1), draw(0, 0.35, 1, 1, 1), draw(0, 1, 1, 1, 1) < 0.5
    ink, ground = torch.where(swap, dark, light), torch.where(swap, light, dark)
    pixel, images = torch.arange(32) + 0.5, []
    for part in torch.arange(N).split(1000):  # bounds memory
        distance = torch.hypot(pixel - centre[part, 0], pixel[:, None] - centre[part, 1])
        discs = ((radius[part] - distance + 0.5).clamp(0, 1) * shade[part]).amax(1, keepdim=True)
        grid = F.affine_grid(affine[part], discs.shape, align_corners=False)
        number = F.grid_sample(glyphs[numbers[part]], grid, align_corners=False)
        mixed = ground[part].lerp(ink[part], torch.maximum(number, discs))  # (1000, 1, 32, 32)
        images.append((255 * mixed).round().byte())
    digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], dim=1)
    labels = dict(number=numbers, digits=digits, count=count, size=(height - 32).long() // 2)
    return torch.cat(images), labels


def open_data(data, split):
    """-> images: uint8 (N, C, H, W), or N paths; labels: dict of N each, the class first."""
    train, root = split == "train", Path(data)
    if data == "plates":
        return draw_plates(50 if train else 10, seed=0 if train else 1)
    try:
        if data in ("cifar10", "cifar100"):
            source = (CIFAR10 if data == "cifar10" else CIFAR100)("data", train, download=True)
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
            return images, {"class": torch.tensor(source.targets)}
        if (root / f"{split}2018.json").is_file():  # iNaturalist 2018
            listing = json.loads((root / f"{split}2018.json").read_text())
            label = {item["image_id"]: item["category_id"] for item in listing["annotations"]}
            samples = [(root / item["file_name"], label[item["id"]]) for item in listing["images"]]
        else:
            samples = ImageFolder(root / split).samples
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        need = "a download or ./data" if "cifar" in data else f"{root / split}/CLASS/IMAGE"
        fail(f"--data {data}: needs {need} ({type(error).__name__}: {str(error).splitlines()[0]})")
    paths, labels = zip(*samples)
    return list(map(str, paths)), {"class": torch.tensor(labels)}


def read_image(path):
    """A file of any mode and orientation -> (3, H, W) uint8."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        upright = upright.convert("RGBA") if "transparency" in image.info else upright
        return TF.pil_to_tensor(upright.convert("RGB"))


def normalise(image, standardise):
    """(B, 3, H, W) in [0, 1] -> the network's input, by each image's own numbers or ImageNet's."""
    if standardise:
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (deviation + 1e-3)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Images(Dataset):
    """Item (epoch, indices): uint8 (B, 3, size, size), augmented by numbers that follow from (seed,
    epoch, index); epoch None: whole. Or a message if a file is unreadable. Whole files are resized
    to 8/7 of size (256 for 224) and cropped to the centre, or squashed to a square."""

    def __init__(self, images, size, augment, squash, seed):
        self.images, self.size, self.seed = images, size, seed
        squash = squash or torch.is_tensor(images)  # which are square
        whole = [v2.Resize((size, size))] if squash else [v2.Resize(size * 8 // 7)]
        self.whole = v2.Compose([*whole, v2.CenterCrop(size)])
        crop = v2.RandomResizedCrop(size) if augment == "crop" else self.whole
        self.augmented = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __getitem__(self, item):
        epoch, indices = item
        if epoch is None and torch.is_tensor(self.images):
            return self.whole(self.images[indices].expand(-1, 3, -1, -1))  # all at once
        shown = []
        for index in indices:
            image = self.images[index]
            try:
                image = image.expand(3, -1, -1) if torch.is_tensor(image) else read_image(image)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                return f"{image}: unreadable image ({error}): mend or remove it"
            if epoch is not None:  # CPU only: torch.manual_seed takes 25 times as long
                torch.default_generator.manual_seed(hash((self.seed, epoch, index)))
            shown.append((self.whole if epoch is None else self.augmented)(image))
        return torch.stack(shown)


def clevr_count(scene):
    """Class 0..7 of a CLEVR scene with 3 to 10 objects. VTAB count_all."""
    count = len(scene["objects"])
    if not 3 <= count <= 10:
        raise ValueError(f"{count} objects: a CLEVR scene has 3 to 10")
    return count - 3


def clevr_dist(scene):
    """Class 0..5 of the depth of the closest object: the third pixel coordinate, as float32, in
    (0, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100]. VTAB closest_object_distance."""
    depth = min(torch.tensor(item["pixel_coords"][2]).item() for item in scene["objects"])
    if not 0 < depth <= 100:
        raise ValueError(f"closest depth {depth} is not in (0, 100]")
    return sum(depth > edge for edge in (8, 8.5, 9, 9.5, 10))


def kitti_dist(label_lines):
    """Class 0..3 of the nearest car, van or truck: z in metres <= 8, <= 20, beyond, none. VTAB
    closest_vehicle_distance: a vehicle beside or behind the camera is class 0."""
    rows = [line.split() for line in label_lines if line.strip()]
    z = min((float(row[13]) for row in rows if row[0] in ("Car", "Van", "Truck")), default=1000.0)
    if z <= -100:
        raise ValueError(f"vehicle at z {z}: not above -100 metres")
    return sum(z > edge for edge in (8, 20, 999))


# Of the data sets that are no folders of classes: a file that gives each away; what else it needs.
LAYOUTS = {
    "clevr": ("scenes", "scenes/ and images/ of CLEVR_v1.0.zip (cs.stanford.edu/people/jcjohns)"),
    "kitti": ("training/label_2", "training/{image_2,label_2} of KITTI's objects (cvlibs.net)"),
    "places205": ("trainvalsplit_places205", "its lists and images256 (places.csail.mit.edu)"),
    "inat18": ("train2018.json", "{train,val}2018.json, train_val2018/ (github.com/visipedia)"),
}


def layout_of(data):
    """Which of LAYOUTS a folder has, or "" for any other."""
    found = [kind for kind, (name, _) in LAYOUTS.items() if (Path(data) / name).exists()]
    return found[0] if found and data not in IN_MEMORY else ""


def open_study(data, layout, split):
    """Paths of N images and labels, a dict of (N,), of a data set that open_data does not know.

    CLEVR: scenes/CLEVR_{train,val}_scenes.json, images/{train,val}. KITTI: training/{image_2,
    label_2}; it has no such split, so a fifth of the images, drawn with seed 0, is the test set (as
    VISSL does, without seed). Places205: trainvalsplit_places205/{train,val}_places205.csv, of
    lines `path label`, and the images below data/vision/torralba/deeplearning/images256."""
    root = Path(data)
    try:
        if layout == "clevr":
            scenes = json.loads((root / f"scenes/CLEVR_{split}_scenes.json").read_text())["scenes"]
            paths = [root / f"images/{split}" / scene["image_filename"] for scene in scenes]
            rules = dict(count=clevr_count, dist=clevr_dist)
            labels = {name: [rule(scene) for scene in scenes] for name, rule in rules.items()}
        elif layout == "kitti":
            files = sorted((root / "training/label_2").glob("*.txt"))
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
            fifth = len(files) // 5
            files = [files[i] for i in (order[fifth:] if split == "train" else order[:fifth])]
            paths = [root / f"training/image_2/{file.stem}.png" for file in files]
            labels = dict(dist=[kitti_dist(file.read_text().splitlines()) for file in files])
        else:
            rows = (root / f"trainvalsplit_places205/{split}_places205.csv").read_text().split("\n")
            rows = [row.rsplit(maxsplit=1) for row in rows if row.strip()]
            images = root / "data/vision/torralba/deeplearning/images256"
            paths, labels = [images / path for path, _ in rows], {}
            labels["class"] = [int(label) for _, label in rows]
        if not paths:
            raise ValueError(f"no images of {split}")
    except (OSError, ValueError, KeyError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        fail(f"--data {data}: not {layout} as published ({why}): it needs {LAYOUTS[layout][1]}")
    if missing := [path for path in paths if not path.is_file()]:
        fail(f"--data {data}: {missing[0]} is missing: unpack {LAYOUTS[layout][1]} there")
    return list(map(str, paths)), {name: torch.tensor(x) for name, x in labels.items()}


def open_task(data, target, task=None):
    """-> (images, labels (N, T), classes (N,)) of train and of test; how many labels there are; the
    target; the task, whose recipe it is."""
    layout, root, splits = layout_of(data), Path(data), []
    if task and "-" in task:
        wanted, target = task.split("-")
        if layout != wanted:
            fail(f"--data {data}: --task {task} needs {LAYOUTS[wanted][1]}: give their folder")
    if data not in IN_MEMORY and not layout:
        names = [{p.name for p in root.glob(f"{split}/*") if p.is_dir()} for split in SPLITS]
        if names[0] != names[1] and all(names):
            odd = sorted(names[0] ^ names[1])[0]
            fail(f"--data {data}: class {odd} is not in both train and val: make them agree")
    for split in SPLITS:
        known = layout in ("", "inat18")
        images, labels = open_data(data, split) if known else open_study(data, layout, split)
        chosen = target or ("digits" if "digits" in labels else next(iter(labels)))
        if chosen not in labels:
            fail(f"--target {target}: {data} has {', '.join(labels)}")
        kinds = next(iter(labels.values()))
        splits.append((images, labels[chosen].reshape(len(images), -1), kinds))
    if len(splits[0][0]) < 2:
        fail(f"--data {data}: one training image: BatchNorm needs at least two")
    classes = int(max(labels.max() for _, labels, _ in splits)) + 1
    named = f"{layout}-{chosen}" if layout in ("clevr", "kitti") else layout or data
    return *splits, classes, chosen, task or (named if named in TASKS else "imagenet")


def subset(choice, images, kinds, seed):
    """Which of N training images to use, sorted. choice: a share of each class, `N-per-class` (both
    drawn by the seed), or a file of image names, one a line. images: N paths, or pictures; kinds:
    their classes (N,)."""
    if Path(choice).is_file():
        names = set(Path(choice).read_text().split())
        found = {} if torch.is_tensor(images) else {Path(p).name: i for i, p in enumerate(images)}
        if missing := sorted(names - found.keys()) or not names and ["any name"]:
            fail(f"--train-fraction {choice}: {missing[0]} is no training image: mend the list")
        return torch.tensor(sorted(found[name] for name in names))
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    order = order[kinds[order].argsort(stable=True)]  # class by class, at random within
    sizes = kinds.bincount()
    place = torch.arange(len(kinds)) - (sizes.cumsum(0) - sizes)[kinds[order]]  # within its class
    each = choice.endswith("-per-class")
    number = torch.tensor(int(choice.split("-")[0])) if each else sizes * float(choice)
    number = number.round().clamp(min=1).expand(len(sizes))
    return order[place < number[kinds[order]]].sort().values


def frequency_groups(kinds, test_kinds, long_tail):
    """Which of N test images are of the tenth of the classes that the encoder saw most often, and
    which of the rarer half -> dict of (N,) bool. Class k from 1 was kept by k**-long_tail."""
    seen = kinds.bincount()
    seen = seen * (torch.arange(len(seen)) + 1.0) ** -long_tail
    place = seen.argsort(descending=True, stable=True).argsort()  # 0: the most frequent
    share = place[test_kinds] / len(seen)
    return dict(frequent=share < 0.1, rare=share >= 0.5)


# ---- 3. Encoder
class AnyBlock(nn.Module):
    """Transformer block, pre-norm, with timm's names; with a layer_scale as in BEiT: no bias of
    keys, branches scaled by gamma. x (B, 1 + N, D); bias (heads, 1 + N, 1 + N) of the logits."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        qkv, proj = nn.Linear(dim, 3 * dim, bias=layer_scale is None), nn.Linear(dim, dim)
        self.attn = nn.ModuleDict(dict(qkv=qkv, proj=proj))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        gammas = [1.0] * 2
        if layer_scale is not None:
            self.attn.q_bias = nn.Parameter(torch.zeros(dim))
            self.attn.v_bias = nn.Parameter(torch.zeros(dim))
            gammas = [nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)]
        self.gamma_1, self.gamma_2 = gammas

    def forward(self, x, bias):
        qkv = self.attn["qkv"](self.norm1(x))
        if bias is not None:
            q_bias, v_bias = self.attn.q_bias, self.attn.v_bias
            qkv = qkv + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, bias)
        x = x + self.gamma_1 * self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.gamma_2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class AnyViT(nn.Module):
    """The ViT of msn.py, mae.py and data2vec.py, to evaluate only, with their (timm's) names: with
    a stem of convolutions or none; with absolute positions or, if it has a layer_scale, BEiT's one
    relative position bias. images (B, 3, H, W) -> representations (B, D), cls after the norm."""

    def __init__(self, image_size, patch_size, dim, depth, heads, stem=(), layer_scale=None):
        super().__init__()
        g, halvings, layers, before = image_size // patch_size, patch_size.bit_length() - 1, [], 3
        for i, channels in enumerate(stem):
            stride = 1 + (i * halvings // len(stem) > (i - 1) * halvings // len(stem))
            conv = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
            layers, before = layers + [conv, nn.BatchNorm2d(channels), nn.ReLU()], channels
        layers.append(nn.Conv2d(before, dim, *[1 if stem else patch_size] * 2))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Sequential(*layers) if stem else layers[0]))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(AnyBlock(dim, heads, layer_scale) for _ in range(depth))
        self.norm, self.pos_embed = nn.LayerNorm(dim, 1e-6), None
        if layer_scale is None:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + g * g, dim))
            return
        self.rel_pos_bias = nn.Module()
        table = nn.Parameter(torch.zeros((2 * g - 1) ** 2 + 3, heads))
        self.rel_pos_bias.relative_position_bias_table = table
        place = torch.stack([torch.arange(g).repeat_interleave(g), torch.arange(g).repeat(g)])
        row, column = place[:, :, None] - place[:, None] + g - 1  # (N, N) each, query by key
        index = F.pad(row * (2 * g - 1) + column, (1, 0, 1, 0))
        index[0], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1  # cls
        self.register_buffer("index", index, persistent=False)

    def tokens(self, images):
        """-> outputs (B, 1 + N, D) of the last four blocks, before the final norm."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        outputs, bias = [], None
        if self.pos_embed is not None:
            x = x + self.pos_embed
        else:
            bias = self.rel_pos_bias.relative_position_bias_table[self.index].permute(2, 0, 1)
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs[-4:]

    def forward(self, images):
        return self.norm(self.tokens(images)[-1][:, 0])


def residual_network(arch, image_size):
    """torchvision's ResNet without classifier, as in simclr.py and vicreg.py: (B, 3, H, W) ->
    (B, D). For images of up to 32 pixels its stem neither strides nor pools."""
    if arch == "small":
        widths, layers = [3, 16, 32, 64, 64, 128], []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            conv = nn.Conv2d(before, after, 3, 2 - i % 2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = getattr(models, arch)(zero_init_residual=True)
    network.fc = nn.Identity()
    if image_size <= 32:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def initialise_as(script, module):
    """The official initial weights of each script's ViT; biases 0, but the convolution's of MAE."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        weight, convolution = module.weight.data.flatten(1), isinstance(module, nn.Conv2d)
        if script == "mae":
            nn.init.xavier_uniform_(weight)
        elif script == "data2vec":
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        elif convolution:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        else:
            nn.init.trunc_normal_(weight, std=0.02)
        if module.bias is not None and not (script == "mae" and convolution):
            nn.init.zeros_(module.bias)


def new_encoder(options):
    """A run's options -> an untrained encoder: its architecture, its initial distribution."""
    torch.manual_seed(options["seed"])
    names = "image_size patch_size dim depth heads stem layer_scale"
    if "arch" in options:
        encoder = residual_network(options["arch"], options["image_size"])
    else:
        encoder = AnyViT(**{name: options[name] for name in names.split() if name in options})
        encoder.apply(functools.partial(initialise_as, options["script"]))
    encoder.options = options
    return encoder.eval().requires_grad_(False)


def untrained(encoder):
    """The control: its network with initial weights; MAE's positions, which never learn, stay."""
    control = new_encoder(encoder.options)
    if encoder.options["script"] == "mae":
        control.pos_embed.data.copy_(encoder.pos_embed)
    return control


def load_encoder(path, plain_pixels=False):
    """The encoder of a checkpoint of ours or of a released file, frozen, in evaluation mode; its
    .options are the run's. plain_pixels: a released network takes pixels in [0, 1] as they are."""
    if not Path(path).is_file():
        fail(f"{path}: no such file; give a run's checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "options" not in state:
            options, weights = released_encoder(state)
            options |= {} if plain_pixels else dict(standardise=False)
            state = dict(options=options, encoder=weights, step=None)
        encoder = new_encoder(state["options"])
        encoder.load_state_dict(state["encoder"])
        encoder.step, _ = state["step"], [encoder.options[n] for n in ("data", "image_size")]
    except Exception as error:  # torch raises many kinds for damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        fail(f"{path}: damaged or foreign checkpoint ({reason}): give another")
    return encoder


def released_encoder(state):
    """Options and state dict of the encoder in a file of the official MSN, MAE, data2vec, VICReg,
    DINO, a converted SimCLR, timm or torchvision, known by its keys. Sizes follow from shapes,
    heads from a width of 64 each (ViT-H: 80)."""
    for part in ("target_encoder", "teacher", "model", "state_dict"):
        state = state[part] if isinstance(state.get(part), dict) else state
    found = {k.removeprefix("module."): x for k, x in state.items() if torch.is_tensor(x)}
    for prefix in ("backbone.", "encoder."):
        inner = {k.removeprefix(prefix): x for k, x in found.items() if k.startswith(prefix)}
        found = inner or found
    aside = "head fc. decoder lm_head mask_token projector rel_pos_bias.relative_position_index"
    kept = {k: x for k, x in found.items() if not k.startswith(tuple(aside.split()))}
    kept |= {k.removeprefix("fc_"): kept.pop(k) for k in list(kept) if k.startswith("fc_norm.")}
    options = dict(script="mae" if "mask_token" in found else "msn", seed=0, data=None)
    if "conv1.weight" in kept:
        arch = "resnet50" if "layer1.0.conv3.weight" in kept else "resnet18"
        image_size = 224 if kept["conv1.weight"].shape[2] == 7 else 32
        return options | dict(arch=arch, image_size=image_size), kept
    dim, _, patch_size, _ = kept["patch_embed.proj.weight"].shape
    depth = len({k.split(".")[1] for k in kept if k.startswith("blocks.")})
    if (table := kept.get("rel_pos_bias.relative_position_bias_table")) is not None:
        grid, heads = (math.isqrt(len(table) - 3) + 1) // 2, table.shape[1]
        options |= dict(script="data2vec", layer_scale=1e-4)
    else:
        grid, heads = math.isqrt(kept["pos_embed"].shape[1]), max(dim // 64, 1)
    options |= dict(dim=dim, depth=depth, heads=16 if dim == 1280 else heads)
    return options | dict(patch_size=patch_size, image_size=grid * patch_size), kept


def features(encoder, images):
    """uint8 (B, 3, size, size) -> dict of (B, D). Of a ResNet `pooled`; of a ViT `cls`, after the
    final norm; `raw`, before it; `cls4`, of the last four blocks, each after the final norm;
    `patches`, the mean of the patches' tokens."""
    x = images.float() / 255
    if "standardise" in encoder.options:  # SimCLR takes pixels as they are
        x = normalise(x, encoder.options["standardise"])
    if not isinstance(encoder, AnyViT):
        return dict(pooled=encoder(x))
    tokens = encoder.tokens(x)
    normed = [encoder.norm(x) for x in tokens]
    cls4 = torch.cat([x[:, 0] for x in normed], dim=1)
    found = dict(cls=normed[-1][:, 0], raw=tokens[-1][:, 0], cls4=cls4)
    return found | dict(patches=normed[-1][:, 1:].mean(dim=1))


@torch.no_grad()
def encode(encoders, images, order, batch_size, epoch=None, wanted=(), workers=0):
    """Features of an Images in this order, batch by batch -> yields indices (B,) and a dict of (B,
    D), named `trained cls` and so on. encoders: dict of name and network; wanted: which features.

    A batch is cut into eight parts, which processes share out, so their number changes no bit."""
    device, part = next(next(iter(encoders.values())).parameters()).device, -(-batch_size // 8)

    def select(pixels):
        pixels, found = pixels.to(device), {}
        for who, encoder in encoders.items():
            kinds = features(encoder, pixels)
            found |= {f"{who} {name}": x for name, x in kinds.items() if name in wanted}
        return found

    blank = torch.zeros(1, 3, images.size, images.size, dtype=torch.uint8)
    widths = {name: x.shape[1] for name, x in select(blank).items()}
    mine = slice(rank(), None, world_size())
    items = [(epoch, x.tolist()) for b in order.split(batch_size) for x in b.split(part)[mine]]
    workers = 0 if torch.is_tensor(images.images) else workers
    loader = iter(DataLoader(images, None, sampler=items, num_workers=workers))
    for batch in order.split(batch_size):
        joined = torch.zeros(len(batch), sum(widths.values()), device=device)
        for rows in torch.arange(len(batch)).split(part)[mine]:
            pixels = next(loader)
            if isinstance(pixels, str):
                fail(pixels, everywhere=True)
            joined[rows] = torch.cat(list(select(pixels).values()), dim=1)
        dist.all_reduce(joined)  # sum: the rows of other processes are 0 here
        yield batch, dict(zip(widths, joined.split(list(widths.values()), dim=1)))


def collect(batches):
    """All features of `encode`, in its order: dict of (N, D). Refuses those of a diverged run."""
    parts = [found for _, found in tqdm(batches, "features", disable=rank() > 0 or None)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(x.isfinite().all() for x in joined.values()):
        fail("the encoder's features are not finite: the run has diverged; give another checkpoint")
    return joined


# ---- 4. Heads
class Heads(nn.Module):
    """L linear classifiers of one feature, alike but for the rates they are trained with. x (B, D)
    -> logits (L, B, T, C). norm, before the linear map: `batch`, BatchNorm with a scale and shift
    of each head's own (VISSL); `standard`, BatchNorm without (MAE); `layer`, LayerNorm with, then
    unit length (MSN); `none`. std: of the initial weights; None: torch's own."""

    def __init__(self, dim, targets, classes, rates, norm="batch", std=None):
        super().__init__()
        self.shape, self.rates, self.kind = (targets, classes), rates, norm
        self.norm = nn.Identity()
        if norm in ("batch", "standard"):
            self.norm = nn.BatchNorm1d(dim, 1e-5 if norm == "batch" else 1e-6, affine=False)
        elif norm == "layer":
            self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        own = rates if norm in ("batch", "layer") else ()
        self.scales = nn.ParameterList(torch.ones(dim) for _ in own)
        self.shifts = nn.ParameterList(torch.zeros(dim) for _ in own)
        self.linears = nn.ModuleList(nn.Linear(dim, targets * classes) for _ in rates)
        for linear in self.linears if std else ():
            nn.init.trunc_normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        x = self.norm(x).expand(len(self.rates), -1, -1)  # (L, B, D)
        if self.scales:
            x = x * torch.stack([*self.scales])[:, None] + torch.stack([*self.shifts])[:, None]
        x = F.normalize(x, dim=2) if self.kind == "layer" else x
        weights = torch.stack([linear.weight for linear in self.linears])  # (L, T * C, D)
        bias = torch.stack([linear.bias for linear in self.linears])[:, None]
        return torch.baddbmm(bias, x, weights.transpose(1, 2)).unflatten(2, self.shape)

    def groups(self, batch_size, weight_decay):
        """The optimiser's: every head has its rate, scaled with the batch; norms do not decay."""
        for i, (rate, linear) in enumerate(zip(self.rates, self.linears)):
            lr = dict(lr=rate * batch_size / 256, peak=rate * batch_size / 256)
            yield dict(params=list(linear.parameters()), weight_decay=weight_decay) | lr
            if self.scales:
                yield dict(params=[self.scales[i], self.shifts[i]], weight_decay=0.0) | lr


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which the step of a weight tensor w, gradient g, is scaled by trust
    |w| / |g + weight_decay w|; biases and norms (one dimension) are neither scaled nor decayed.
    lr_in_buffer: momentum sums lr x gradient (SimCLR), else gradients (VICReg): they differ
    while the rate changes."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001, lr_in_buffer=False):
        options = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, options | dict(lr_in_buffer=lr_in_buffer))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.ndim <= 1]
            weights = [p for p in group["params"] if p.grad is not None and p.ndim > 1]
            steps = [p.grad for p in params]
            if weights:
                decay, gradients = group["weight_decay"], [p.grad for p in weights]
                gradients = torch._foreach_add(gradients, weights, alpha=decay)
                sizes = torch.stack(torch._foreach_norm(weights))
                ratios = group["trust"] * sizes / torch.stack(torch._foreach_norm(gradients))
                ratios = torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)  # a norm is 0
                params += weights
                steps += torch._foreach_mul(gradients, [*ratios])
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            inside, outside = (group["lr"], 1) if group["lr_in_buffer"] else (1, group["lr"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps, alpha=inside)
            torch._foreach_add_(params, buffers, alpha=-outside)


def rate_factor(epoch, epochs, cosine, final, warmup):
    """Of the learning rate: linear for `warmup` epochs, then a cosine to `final`, which the last
    epoch does not reach, or a tenth after 2/7, 4/7 and 6/7 of the epochs each."""
    if epoch < warmup:
        return epoch / warmup
    if not cosine:
        return 0.1 ** sum(epoch >= round(epochs * part / 7) for part in (2, 4, 6))
    wave = math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1))
    return final + (1 - final) * (1 + wave) / 2


def train_heads(banks, batches, steps, labels, recipe, file=None, key=None):
    """Train a ModuleDict of Heads, all at once, each as it would learn alone. batches(epoch) yields
    `steps` times indices (B,) into labels (N, T) and a dict of features (B, D). Begins where `file`
    ends, if it has the same key."""
    size, decay = recipe["batch_size"], recipe["weight_decay"]
    groups = [group for bank in banks.values() for group in bank.groups(size, decay)]
    if recipe["lars"]:
        optimizer = LARS(groups, 0.0, 0.0)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=recipe["nesterov"])
    saved, parts = load_partial(file, key), dict(banks=banks, optimizer=optimizer)
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved[name])
    schedule = {name: recipe[name] for name in ("epochs", "cosine", "final", "warmup")}
    start, hidden, _ = saved.get("epoch", 0), rank() > 0 or None, banks.train()
    bar = tqdm(total=steps * recipe["epochs"], initial=steps * start, desc="heads", disable=hidden)
    for epoch in range(start, recipe["epochs"]):
        for step, (index, found) in enumerate(batches(epoch)):
            bar.update()
            if len(index) == 1:
                continue  # BatchNorm needs two
            now = epoch + recipe["by_step"] * step / steps
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(now, **schedule)
            target, loss = labels[index.to(labels.device)], 0.0  # (B, T)
            for name, bank in banks.items():
                logits = bank(found[name.rsplit(" ", 1)[0]])  # (L, B, T, C)
                each = target.expand(len(logits), -1, -1).flatten()
                # The sum over heads, so that each learns as it would alone.
                loss = loss + len(logits) * F.cross_entropy(logits.flatten(0, 2), each)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = {name: part.state_dict() for name, part in parts.items()}
        save_partial(file, state | dict(key=key, epoch=epoch + 1))
    bar.close()
    banks.eval()


def accuracy(heads, x, labels):
    """Percent right of each head and target: (L, T)."""
    with torch.no_grad():
        right = [
            (heads(part).argmax(dim=3) == label).sum(dim=1)
            for part, label in zip(x.split(2000), labels.split(2000))
        ]
    return 100 * torch.stack(right).sum(dim=0) / len(x)


def scores(banks, who, held, held_labels, test, test_labels, groups):
    """Results of the heads on the encoder `who`, the best on the held-out images first: options,
    held_out, top1, and the top1 of each target, of all test images and of groups, a dict of (N,)
    bool. held, test: dicts of features (N, D)."""
    results = []
    for name, bank in banks.items():
        owner, feature, norm = name.split()
        x, held_out = test[f"{owner} {feature}"], held[f"{owner} {feature}"]
        held_out, right = accuracy(bank, held_out, held_labels), accuracy(bank, x, test_labels)
        parts = {g: accuracy(bank, x[rows], test_labels[rows]) for g, rows in groups.items()}
        for i, rate in enumerate(bank.rates if owner == who else ()):
            head = dict(feature=feature, norm=norm, lr=rate, held_out=held_out[i].mean().item())
            head |= dict(top1=right[i].mean().item(), targets=right[i].tolist())
            results.append(head | {group: part[i].tolist() for group, part in parts.items()})
    return sorted(results, key=lambda head: -head["held_out"])


def knn_accuracy(x, labels, test, test_labels, k, classes):
    """Percent right of each target when the k training images nearest by cosine vote, each with
    weight exp(cosine / 0.07), as in DINO. x, test (N, D), labels (N, T) -> (T,)."""
    x, right = F.normalize(x), 0
    for part, label in zip(F.normalize(test).split(200), test_labels.split(200)):
        cosine, index = (part @ x.T).topk(min(k, len(x)), dim=1)  # (200, k)
        votes = F.one_hot(labels[index], classes) * (cosine / 0.07).exp()[:, :, None, None]
        right = right + (votes.sum(dim=1).argmax(dim=2) == label).sum(dim=0)
    return 100 * right / len(test)


def draw_nearest(x, test, images, order, test_images, rows, path):
    """Picture: test images, evenly spaced, a row each, with the training images nearest by cosine.
    x (N, D): features of `images` in this order; test: of test_images."""
    chosen = torch.linspace(0, len(test) - 1, rows).long()
    near = (F.normalize(test[chosen]) @ F.normalize(x).T).topk(min(9, len(x))).indices.cpu()
    first = test_images[None, chosen.tolist()]  # (rows, 3, size, size)
    others = torch.stack([images[None, order[i].tolist()] for i in near])  # (rows, 9, ...)
    shown = torch.cat([first[:, None], others], dim=1)
    save_image(shown.flatten(0, 1) / 255, path, nrow=shown.shape[1])


# ---- 6. Distributed, checkpoints
def init_distributed():
    """Join torchrun's process group, or be one of size one -> this process's device."""
    device = torch.device("cpu")
    if cuda := torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return device


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def save_partial(path, state):
    """Save what an evaluation has so far; under another name first: a kill leaves no half file."""
    if path and rank() == 0:
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)


def load_partial(path, key):
    """What an evaluation of the same key has saved before it was stopped; or an empty dict."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["key"] == key else {}
    except Exception:  # none, or damaged: all that it would save is time
        return {}


# ---- 7. Evaluation
def evaluate(args):
    encoder = load_encoder(args.checkpoint, args.plain_pixels)
    data = args.data or encoder.options["data"]
    if data is None:
        fail("--data: needed, since a released checkpoint does not name its own: give one")
    train, test, classes, target, task = open_task(data, args.target, args.task)
    recipe = TASKS[task] | PROTOCOLS[args.protocol]
    given = {name: getattr(args, name) for name in ("epochs", "batch_size", "rates")}
    recipe |= {name: value for name, value in given.items() if value is not None}
    recipe["augment"] = "none" if args.cached else recipe["augment"]
    (images, labels, kinds), (test_images, test_labels, test_kinds) = train, test
    used = subset(args.train_fraction or "1", images, kinds, args.seed)
    own = data == encoder.options["data"]
    tail = encoder.options.get("long_tail", 0.0) if own else 0.0
    out = Path(args.checkpoint).parent / f"linear_eval_{Path(data).name}_{target}.json"
    out = Path(args.out) if args.out else out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{out}.partial")
        partial.touch()
        partial.unlink(missing_ok=True)  # only to try, as all processes do; leave nothing behind
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        fail(f"--out {out}: not writable ({error}): choose another file")

    device = init_distributed()
    encoders = dict(trained=encoder.to(device))
    if args.untrained:
        encoders["untrained"] = untrained(encoder).to(device)
    views = dict(size=encoder.options["image_size"], seed=args.seed, squash=recipe["squash"])
    images = Images(images, augment=recipe["augment"], **views)
    test_images = Images(test_images, augment="none", **views)
    order = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(args.seed))]
    held, kept = order[: len(order) // 10], order[len(order) // 10 :]
    if len(held) == 0:
        held = kept = order  # fewer than ten images: nothing can be held out
    augmented = recipe["augment"] != "none"
    whole = held if augmented and not args.knn and not args.nearest else used

    workers = os.cpu_count() // world_size() if args.workers is None else args.workers
    wanted, stat = dict(wanted=recipe["features"], workers=workers), os.stat(args.checkpoint)
    free = ("out", "workers", "knn", "nearest", "checkpoint")  # may change between two starts
    key = {name: value for name, value in vars(args).items() if name not in free}
    key |= dict(recipe=recipe, data=data, whole=len(whole), file=[stat.st_size, stat.st_mtime_ns])
    files = Path(f"{out}.features"), Path(f"{out}.heads")  # what is done when this is stopped
    saved = load_partial(files[0], key)
    if not saved:
        every = torch.arange(len(test_images.images))
        saved["trained"] = collect(encode(encoders, images, whole, 2000, **wanted))
        saved["tested"] = collect(encode(encoders, test_images, every, 2000, **wanted))
        save_partial(files[0], saved | dict(key=key))
    trained, tested = saved["trained"], saved["tested"]
    trained, tested = ({name: x.to(device) for name, x in f.items()} for f in (trained, tested))
    labels, test_labels, place = labels.to(device), test_labels.to(device), torch.zeros(len(labels))
    place = place.long().to(device)
    place[whole] = torch.arange(len(whole), device=device)  # of image i among the features

    def batches(epoch):
        rng = torch.Generator().manual_seed(hash((args.seed, epoch)) % 2**63)
        order, size = kept[torch.randperm(len(kept), generator=rng)], recipe["batch_size"]
        if augmented:
            return encode(encoders, images, order, size, epoch, **wanted)
        rows = ((index, place[index]) for index in order.split(size))
        return ((index, {name: x[row] for name, x in trained.items()}) for index, row in rows)

    torch.manual_seed(args.seed)
    banks = nn.ModuleDict()
    for (name, x), norm in itertools.product(tested.items(), recipe["norms"]):
        sizes = x.shape[1], labels.shape[1], classes
        banks[f"{name} {norm}"] = Heads(*sizes, recipe["rates"], norm, recipe["std"]).to(device)
    steps = -(-len(kept) // recipe["batch_size"])
    train_heads(banks, batches, steps, labels, recipe, files[1] if augmented else None, key)
    groups = frequency_groups(kinds, test_kinds, tail)
    groups = {name: chosen.to(device) for name, chosen in groups.items()}
    rows = {name: x[place[held]] for name, x in trained.items()}
    shown = rows, labels[held], tested, test_labels, groups
    heads, control = (scores(banks, who, *shown) for who in ("trained", "untrained"))
    report = dict(task=f"{data} {target}", top1=heads[0]["top1"], best=heads[0])
    report |= dict(untrained_top1=control[0]["top1"] if control else None, heads=heads)
    report |= dict(untrained_heads=control, checkpoint=args.checkpoint, step=encoder.step)
    report |= dict(recipe=task, protocol=args.protocol, training_images=len(kept), seed=args.seed)
    report |= {name: recipe[name] for name in ("augment", "epochs", "batch_size")}
    name = f"trained {heads[0]['feature']}"
    if args.knn:
        near = trained[name], labels[whole], tested[name], test_labels, args.knn, classes
        report["knn"] = knn_accuracy(*near).mean().item()
    if rank() == 0:
        if args.nearest:
            pictures = images, whole, test_images, args.nearest, out.with_suffix(".png")
            draw_nearest(trained[name], tested[name], *pictures)
        partial.write_text(json.dumps(report, indent=1))
        os.replace(partial, out)
        for file in files:
            file.unlink(missing_ok=True)
        tell(report, tail, out)


def tell(report, tail, out):
    """Print all heads, the result, and a row for a table: checkpoint, task, top1, untrained."""
    print(f"{'feature':10}{'norm':10}{'lr':>6}{'held out':>10}{'test':>7}")
    for head in report["heads"]:
        print("{feature:10}{norm:10}{lr:>6}{held_out:>10.1f}{top1:>7.1f}".format(**head))
    best, task = report["best"], report["task"]
    each = " ".join(f"{x:.1f}" for x in best["targets"])
    top1 = f"{best['top1']:.1f}" + f" ({each})" * (len(best["targets"]) > 1)
    bare = f"{report['untrained_top1']:.1f}" if report["untrained_heads"] else "not evaluated"
    print(f"{task}: {top1}, untrained {bare} -> {out}")
    near = f" {report['knn']:.1f} |" if "knn" in report else ""
    print(f"| `{report['checkpoint']}` | {task} | {top1} | {bare} |{near}")
    if tail:
        frequent, rare = (sum(best[g]) / len(best[g]) for g in ("frequent", "rare"))
        print(f"the tenth of the classes seen most: {frequent:.1f}, the rarer half: {rare:.1f}")


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
