# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""Linear evaluation: how much of a target can a linear classifier read off a frozen encoder?

    python linear_eval.py runs/msn/checkpoint.pt                      the checkpoint's own data
    python linear_eval.py runs/msn/checkpoint.pt --data FOLDER        train/CLASS/*, val/CLASS/*
    python linear_eval.py runs/msn/checkpoint.pt --target count       of plates: discs, not digits
    python linear_eval.py runs/msn/checkpoint.pt --data CLEVR_v1.0 --target dist

Folders as published are known by their files: CLEVR (targets count, dist), KITTI's object benchmark
(dist), Places205, iNaturalist 2018. ImageNet and others: train/CLASS/*, val/CLASS/*.

Features of whole, unaugmented images are computed once. On them several heads are trained at once,
each with its own feature and learning rate, by VISSL's recipe: BatchNorm and Linear, SGD, Nesterov
momentum 0.9, weight decay 5e-4, 28 epochs, learning rate 0.01 for a batch of 256, scaled with the
batch, divided by 10 at epochs 8, 16 and 24 (CLEVR: 50 and 100 epochs, cosine; iNaturalist 84,
Places205 14); larger rates besides, since small features need them.
The best head is chosen on a tenth of the training set that no head saw; the test set is used once.
The untrained encoder is the control.
In shapes: N images, B a batch, D features, L learning rates, T targets an image, C classes.
"""

import argparse
import itertools
import json
import math
import os
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
from tqdm import tqdm

# ---- 1. Hyper-parameters
LEARNING_RATES = (0.01, 0.1, 0.5)  # at batch 256; the first is VISSL's
NUMBER_RATES = (0.5,)  # of the 1,000 numbers: three take minutes; lower ones lag far behind
IN_MEMORY = ("plates", "cifar10", "cifar100")
EPOCHS = {"clevr count": 50, "clevr dist": 100, "inat18 class": 84, "places205 class": 14}  # or 28


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
    p.add_argument("--target", help="plates: digits, number, count or size; CLEVR: count or dist")
    p.add_argument("--out", help="JSON file (default: beside the checkpoint)")
    p.add_argument("--epochs", type=int, help="of the heads (default: VISSL's)")
    p.add_argument("--batch-size", type=int, default=512, help="of the heads; scales their rates")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="loader processes")
    p.add_argument("--seed", type=int, default=0, help="of the held-out tenth, heads and order")
    args = p.parse_args(argv)
    for name, least in dict(epochs=1, batch_size=2, workers=0, seed=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("WORLD_SIZE: linear_eval.py runs as one process: start it with python, not torchrun")
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


class PlainImages(Dataset):
    """Whole images, unaugmented: (3, size, size) uint8, or a message if a file is unreadable. Files
    are resized to 8/7 of size (256 for 224) and cropped to the centre, or squashed to a square."""

    def __init__(self, images, size, squash=False):
        self.images, self.size = images, size
        self.shape = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])
        self.shape = v2.Resize((size, size)) if squash else self.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            return self.shape(read_image(self.images[index]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{self.images[index]}: unreadable image ({error}): mend or remove it"

    def collate(self, items):
        return next((x for x in items if isinstance(x, str)), None) or torch.stack(items)


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


def layout_of(data):
    """Which of the study's data sets a folder holds, as published, or "" for any other."""
    kinds = dict(clevr="scenes", kitti="training/label_2", places205="trainvalsplit_places205")
    kinds |= dict(inat18="train2018.json")
    found = [kind for kind, name in kinds.items() if (Path(data) / name).exists()]
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
        fail(f"--data {data}: not {layout} as published ({type(error).__name__}: {error})")
    if missing := [path for path in paths if not path.is_file()]:
        fail(f"--data {data}: {missing[0]} is missing: unpack the images of {layout} there")
    return list(map(str, paths)), {name: torch.tensor(x) for name, x in labels.items()}


def open_task(data, target):
    """-> images, labels (N, T) and classes (N,) of train and of test; how many labels there are;
    the task's name."""
    layout = layout_of(data)
    if data not in IN_MEMORY and not layout:
        root = Path(data)
        names = [
            sorted(p.name for p in (root / split).glob("*") if p.is_dir())
            for split in ("train", "val")
        ]
        if names[0] != names[1] and all(names):
            odd = sorted(set(names[0]) ^ set(names[1]))[0]
            fail(f"--data {data}: class {odd} is not in both train and val: make them agree")
    splits = []
    for split in ("train", "val"):
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
    return *splits, classes, f"{data} {chosen}"


def frequency_groups(kinds, test_kinds, long_tail):
    """Which of N test images are of the tenth of the classes that the encoder saw most often, and
    which of the rarer half -> dict of (N,) bool. Class k from 1 was kept by k**-long_tail."""
    seen = kinds.bincount()
    seen = seen * (torch.arange(len(seen)) + 1.0) ** -long_tail
    place = seen.argsort(descending=True, stable=True).argsort()  # 0: the most frequent
    share = place[test_kinds] / len(seen)
    return dict(frequent=share < 0.1, rare=share >= 0.5)


# ---- 3. Encoder
class Block(nn.Module):
    """Transformer block, pre-norm, with timm's parameter names: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, D, ...) by the batch of all processes, on CPUs too, unlike SyncBatchNorm."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        x = x.to(self.weight)  # statistics of bfloat16 would be too coarse
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        mean = all_reduce_mean(x.mean(dims))
        centred = x - mean.view(shape)
        variance = all_reduce_mean(centred.square().mean(dims))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


class VisionTransformer(nn.Module):
    """ViT with timm's parameter names, without a classifier. images (B, 3, H, W), keep: indices of
    the patches to use, None: all -> representations (B, D), the cls token after the final norm.

    stem: channels of 3x3 convolutions with BatchNorm and ReLU, of which log2(patch_size), evenly
    spread, have stride 2, then a 1x1 to dim; none: one convolution cuts the patches, as in ViT."""

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, stem=()):
        super().__init__()
        self.grid, layers, before = image_size // patch_size, [], 3
        halvings = patch_size.bit_length() - 1
        for i, channels in enumerate(stem):
            stride = 1 + (i * halvings // len(stem) > (i - 1) * halvings // len(stem))
            conv = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
            layers, before = layers + [conv, BatchNorm(channels), nn.ReLU()], channels
        layers.append(nn.Conv2d(before, dim, *[1 if stem else patch_size] * 2))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Sequential(*layers) if stem else layers[0]))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6)
        for tensor in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)
        self.apply(initialise)

    def forward(self, images, keep=None):
        x = self.patch_embed["proj"](images)  # (B, D, g, g)
        cls, patches = self.pos_embed.split([1, self.grid**2], dim=1)
        if x.shape[-1] != self.grid:  # focal views
            patches = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            patches = F.interpolate(patches, size=x.shape[2:], mode="bicubic")
            patches = patches.flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2) + patches  # (B, N, D), N = g * g
        x = x if keep is None else x[:, keep]
        x = torch.cat([(self.cls_token + cls).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        return self.norm(self.blocks(x)[:, 0])


class RelativeBlock(nn.Module):
    """Transformer block of BEiT with timm's parameter names: pre-norm, no bias of keys, branches
    scaled by gamma. x (B, N, D); bias (heads, N, N) of the logits, query by key; paths: a factor
    of each branch and image (2, B, 1, 1), or None -> (B, N, D)."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        qkv, proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.attn = nn.ModuleDict(dict(qkv=qkv, proj=proj))
        self.attn.q_bias = nn.Parameter(torch.zeros(dim))
        self.attn.v_bias = nn.Parameter(torch.zeros(dim))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, bias, paths=None, dropout=0.0):
        first, second = (1.0, 1.0) if paths is None else paths
        q_bias, v_bias = self.attn.q_bias, self.attn.v_bias
        biases = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(self.norm1(x), self.attn["qkv"].weight, biases)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None], dropout)
        x = x + first * self.gamma_1 * self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + second * self.gamma_2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class BeiT(nn.Module):
    """ViT with one relative position bias for all blocks instead of absolute positions, with timm's
    parameter names. images (B, 3, H, W) -> outputs of all blocks, (B, 1 + N, D) each, cls first.

    mask (B, N) bool: patches to replace by token (1, 1, D); paths (depth, 2, B, 1, 1) and dropout
    of the attention: random depth and noise, none by default."""

    def __init__(
        self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, layer_scale=1e-4
    ):
        super().__init__()
        g = self.grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(RelativeBlock(dim, heads, layer_scale) for _ in range(depth))
        self.norm, self.rel_pos_bias = nn.LayerNorm(dim, 1e-6), nn.Module()
        table = nn.Parameter(torch.zeros((2 * g - 1) ** 2 + 3, heads))
        self.rel_pos_bias.relative_position_bias_table = table
        place = torch.stack([torch.arange(g).repeat_interleave(g), torch.arange(g).repeat(g)])
        row, column = place[:, :, None] - place[:, None] + g - 1  # (N, N) each, query by key
        index = F.pad(row * (2 * g - 1) + column, (1, 0, 1, 0))
        index[0], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1  # cls
        self.register_buffer("index", index, persistent=False)
        self.apply(initialise_beit)
        nn.init.trunc_normal_(self.cls_token, std=0.02, a=-0.02, b=0.02)
        for number, block in enumerate(self.blocks, 1):  # the sum of branches grows by depth
            for layer in (block.attn["proj"], block.mlp["fc2"]):
                layer.weight.data *= (2 * number) ** -0.5

    def forward(self, images, mask=None, token=None, paths=None, dropout=0.0):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[:, :, None], token.to(x), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias = self.rel_pos_bias.relative_position_bias_table[self.index].permute(2, 0, 1)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, bias, None if paths is None else paths[i], dropout)
            outputs.append(x)
        return outputs


def initialise_beit(module):
    """The official initial weights: truncated normal 0.02, cut at one deviation; bias 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


ARCHITECTURES = dict(resnet50=models.resnet50, resnet18=models.resnet18, small=None)


def resnet(arch, image_size):
    """torchvision's ResNet without classifier, the last scale of every residual block 0 at first:
    images (B, 3, H, W) -> representations (B, D); and D. For images of up to 32 pixels the stem
    neither strides nor pools, as in SimCLR's official code. `small` is five convolutions."""
    if arch == "small":
        widths, layers = [3, 16, 32, 64, 64, 128], []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            conv = nn.Conv2d(before, after, 3, 2 - i % 2, padding=1, bias=False)
            layers += [conv, BatchNorm(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]
    network = ARCHITECTURES[arch](zero_init_residual=True, norm_layer=BatchNorm)
    dim, network.fc = network.fc.in_features, nn.Identity()
    if image_size <= 32:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network, dim


def initialise(module):
    """The official initial weights: linear truncated normal 0.02, convolution Kaiming, bias 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_position_embedding(dim, grid_size, cls_token=True):
    """Fixed 2-D embedding -> (1 + N, dim) float64, N = grid_size**2; the first row, 0, is cls's.

    Of the patch in row r, column c: [sin(c w), cos(c w), sin(r w), cos(r w)], w_j = 10000^(-4j/dim)
    for j from 0; the first half is the column's, as in the official code (util/pos_embed)."""
    w = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = torch.arange(grid_size)[:, None] * w  # (g, D / 4)
    wave = torch.cat([place.sin(), place.cos()], dim=1)  # (g, D / 2)
    columns, rows = wave.repeat(grid_size, 1), wave.repeat_interleave(grid_size, dim=0)
    patches = torch.cat([columns, rows], dim=1)  # (N, D)
    return F.pad(patches, (0, 0, 1, 0)) if cls_token else patches


def initialise_mae(module):
    """The official initial weights: linear Xavier uniform, over the three of qkv at once; bias 0.
    The patches' convolution as a linear map, its bias as torch has it."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


class AllReduceMean(torch.autograd.Function):
    """Mean over processes. Backward: the mean of the processes' gradients, since the result is in
    the loss of each; DDP's mean over processes then makes it the full batch's gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x / world_size()
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return AllReduceMean.apply(gradient)


all_reduce_mean = AllReduceMean.apply


def load_encoder(path):
    """The encoder of a checkpoint of ours or of a released file, frozen, in evaluation mode; its
    .options are the run's."""
    if not Path(path).is_file():
        fail(f"{path}: no such file; give a run's checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "options" not in state:
            return released_encoder(state)
        encoder = new_encoder(state["options"])
        encoder.load_state_dict(state["encoder"])
        encoder.step, _ = state["step"], [encoder.options[n] for n in ("data", "image_size")]
    except Exception as error:  # torch raises many kinds for damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        fail(f"{path}: damaged or foreign checkpoint ({reason}): give another")
    return encoder


def released_encoder(state):
    """The encoder in a state dict of the official MSN, MAE, data2vec, VICReg, DINO, a converted
    SimCLR, timm or torchvision, known by its keys; sizes follow from shapes, heads from a width of
    64 each (ViT-H: 80), inputs are normalised as ImageNet's. Raises if a key has no place."""
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
    options |= dict(standardise=False)
    if "conv1.weight" in kept:
        arch = "resnet50" if "layer1.0.conv3.weight" in kept else "resnet18"
        options |= dict(arch=arch, image_size=224 if kept["conv1.weight"].shape[2] == 7 else 32)
    else:
        dim, _, patch_size, _ = kept["patch_embed.proj.weight"].shape
        depth = len({k.split(".")[1] for k in kept if k.startswith("blocks.")})
        heads = 16 if dim == 1280 else max(dim // 64, 1)
        if (table := kept.get("rel_pos_bias.relative_position_bias_table")) is not None:
            grid, heads = (math.isqrt(len(table) - 3) + 1) // 2, table.shape[1]
            options |= dict(script="data2vec", layer_scale=1e-4)
        else:
            grid = math.isqrt(kept["pos_embed"].shape[1])
        options |= dict(patch_size=patch_size, dim=dim, depth=depth, heads=heads)
        options |= dict(image_size=grid * patch_size)
    encoder = new_encoder(options)
    encoder.load_state_dict(kept)
    encoder.step = None
    return encoder


def new_encoder(options):
    """The encoder of a run at its first step, by the run's seed."""
    torch.manual_seed(options["seed"])
    names = "image_size patch_size dim depth heads layer_scale"
    sizes = {name: options[name] for name in names.split() if name in options}
    if "arch" in options:
        encoder, _ = resnet(options["arch"], options["image_size"])
    elif options["script"] == "data2vec":
        encoder = BeiT(**sizes)
    else:
        encoder = VisionTransformer(**sizes, stem=options.get("stem", []))
    if options["script"] == "mae":
        encoder.apply(initialise_mae)
        encoder.pos_embed.data[0] = sincos_position_embedding(options["dim"], encoder.grid)
    encoder.options = options
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(encoder, images, workers=0, squash=False):
    """Features of N images, whole -> dict of (N, D). Of a ResNet `pooled`; of a ViT `cls`, after
    the final norm; `cls4`, those of the last four blocks, each after the final norm; `patches`, the
    mean of the patch tokens."""
    options, device = encoder.options, next(encoder.parameters()).device
    size, outputs, parts, blocks = options["image_size"], [], [], getattr(encoder, "blocks", [])
    hooks = [b.register_forward_hook(lambda *x: outputs.append(x[2])) for b in blocks[-4:]]
    if torch.is_tensor(images):
        loader = (TF.resize(x.expand(-1, 3, -1, -1), [size, size]) for x in images.split(250))
    else:
        source = PlainImages(images, size, squash)
        loader = DataLoader(source, 250, num_workers=workers, collate_fn=source.collate)
    for batch in tqdm(
        loader, total=-(-len(images) // 250), desc="features", leave=False, disable=None
    ):
        if isinstance(batch, str):
            fail(batch)
        outputs.clear()
        x = batch.to(device).float() / 255
        if "standardise" in options:  # SimCLR takes pixels as they are
            x = normalise(x, options["standardise"])
        found = dict(pooled=encoder(x))
        if blocks:
            tokens = [encoder.norm(x) for x in outputs]  # (B, 1 + N, D) each
            cls4, patches = torch.cat([x[:, 0] for x in tokens], dim=1), tokens[-1][:, 1:]
            found = dict(cls=tokens[-1][:, 0], cls4=cls4, patches=patches.mean(dim=1))
        parts.append(found)
    for hook in hooks:
        hook.remove()
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(x.isfinite().all() for x in features.values()):
        fail("the encoder's features are not finite: the run has diverged; give another checkpoint")
    return features


# ---- 4. Heads
class Heads(nn.Module):
    """L linear classifiers behind BatchNorm, alike but for the learning rates they are trained
    with. x (B, D) -> logits (L, B, T, C). BatchNorm's statistics are common; each head has its own
    scale and shift. Were the shift left to the bias, VISSL's rate would reach half a point less."""

    def __init__(self, dim, targets, classes, rates):
        super().__init__()
        self.shape, self.rates = (targets, classes), rates
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.scales = nn.ParameterList(torch.ones(dim) for _ in rates)
        self.shifts = nn.ParameterList(torch.zeros(dim) for _ in rates)
        self.linears = nn.ModuleList(nn.Linear(dim, targets * classes) for _ in rates)

    def forward(self, x):
        weights = torch.stack([linear.weight for linear in self.linears])  # (L, T * C, D)
        bias = torch.stack([linear.bias for linear in self.linears])[:, None]
        bias = bias + torch.stack(list(self.shifts))[:, None] @ weights.transpose(1, 2)
        weights = weights * torch.stack(list(self.scales))[:, None]
        return (self.norm(x) @ weights.transpose(1, 2) + bias).unflatten(2, self.shape)

    def groups(self, batch_size):
        """SGD's: every head has its rate, scaled with the batch; BatchNorm is not decayed."""
        parts = zip(self.rates, self.scales, self.shifts, self.linears)
        for rate, scale, shift, linear in parts:
            lr = rate * batch_size / 256
            yield dict(params=[scale, shift], lr=lr, weight_decay=0.0)
            yield dict(params=list(linear.parameters()), lr=lr, weight_decay=5e-4)


def accuracy(heads, x, labels):
    """Percent right of each head and target: (L, T)."""
    heads.eval()
    with torch.no_grad():
        right = [
            (heads(part).argmax(dim=3) == label).sum(dim=1)
            for part, label in zip(x.split(2000), labels.split(2000))
        ]
    return 100 * torch.stack(right).sum(dim=0) / len(x)


def train_heads(features, labels, test_features, test_labels, classes, epochs, batch_size, seed,
                rates=LEARNING_RATES, groups=None, cosine=False):  # fmt: skip
    """Train heads on dicts of features (N, D) and labels (N, T), all at once -> a list of results,
    the best on the held-out tenth first: options, held_out, top1, and the top1 of each target, of
    all test images and of groups, a dict of (N,) bool."""
    torch.manual_seed(seed)
    order, T = torch.randperm(len(labels)), labels.shape[1]
    kept, held = order[len(order) // 10 :], order[: len(order) // 10]
    if len(held) == 0:
        kept = held = order  # fewer than ten images: nothing can be held out
    banks = {
        name: Heads(x.shape[1], T, classes, rates).to(x.device) for name, x in features.items()
    }
    params = [group for heads in banks.values() for group in heads.groups(batch_size)]
    optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True)
    milestones = [round(epochs * part / 7) for part in (2, 4, 6)]  # 8, 16, 24 of 28
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    if cosine:  # to a hundredth, which the last epoch does not reach
        wave = [0.01 + 0.99 * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs + 1)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, wave.__getitem__)
    for _ in tqdm(range(epochs), desc="heads", leave=False, disable=None):
        for heads in banks.values():
            heads.train()
        for index in kept[torch.randperm(len(kept))].split(batch_size):
            if len(index) == 1 < len(kept):
                continue  # BatchNorm needs two
            index, loss = index.to(labels.device), 0.0
            target = labels[index].expand(len(rates), -1, -1).flatten()
            for name, heads in banks.items():
                logits = heads(features[name][index]).flatten(0, 2)
                # The sum over heads, so that each learns as it would alone.
                loss = loss + len(rates) * F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    results = []
    for name, heads in banks.items():
        held_out = accuracy(heads, features[name][held], labels[held])
        test = accuracy(heads, test_features[name], test_labels)
        x, parts = test_features[name], {}
        for group, chosen in (groups or {}).items():
            chosen = chosen.to(x.device)
            parts[group] = accuracy(heads, x[chosen], test_labels[chosen]).tolist()
        for i, rate in enumerate(rates):
            options = dict(feature=name, lr=rate)
            scores = dict(held_out=held_out[i].mean().item(), top1=test[i].mean().item())
            scores |= dict(targets=test[i].tolist()) | {group: parts[group][i] for group in parts}
            results.append(options | scores)
    return sorted(results, key=lambda head: -head["held_out"])


# ---- 7. Evaluation
def main(argv=None):
    args = parse_args(argv)
    encoder = load_encoder(args.checkpoint)
    data = args.data or encoder.options["data"]
    if data is None:
        fail("--data: needed, since a released checkpoint does not name its own: give one")
    train, test, classes, task = open_task(data, args.target)
    target, layout = task.split()[-1], layout_of(data)
    epochs = args.epochs or EPOCHS.get(f"{layout} {target}", 28)
    (images, labels, kinds), (test_images, test_labels, test_kinds) = train, test
    tail = encoder.options.get("long_tail", 0.0) if data == encoder.options["data"] else 0.0
    groups = frequency_groups(kinds, test_kinds, tail)
    name = f"linear_eval_{Path(data).name}_{target}.json"
    out = Path(args.out) if args.out else Path(args.checkpoint).parent / name
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.touch()
        partial.unlink()  # it was only to try; what fails below leaves nothing behind
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        fail(f"--out {out}: not writable ({error}): choose another file")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for network in (encoder, new_encoder(encoder.options)):
        network.to(device)
        squash = layout == "clevr"  # every object stays
        features = [encode(network, x, args.workers, squash) for x in (images, test_images)]
        scores = labels.to(device), features[1], test_labels.to(device), classes
        training = epochs, args.batch_size, args.seed
        rates = NUMBER_RATES if task == "plates number" else LEARNING_RATES
        results.append(train_heads(features[0], *scores, *training, rates, groups, squash))
    (best, *_), (control, *_) = results
    print(f"{'feature':10}{'lr':>6}{'held out':>10}{'test':>7}")
    for head in results[0]:
        scores = f"{head['held_out']:>10.1f}{head['top1']:>7.1f}"
        print(f"{head['feature']:10}{head['lr']:>6}{scores}")
    report = dict(task=task, top1=best["top1"], untrained_top1=control["top1"], best=best)
    report |= dict(heads=results[0], untrained_heads=results[1], checkpoint=args.checkpoint)
    report |= dict(step=encoder.step, epochs=epochs, batch_size=args.batch_size)
    partial.write_text(json.dumps(report | dict(seed=args.seed), indent=1))
    os.replace(partial, out)
    each = " ".join(f"{x:.1f}" for x in best["targets"])
    each = f" ({each})" if len(best["targets"]) > 1 else ""
    print(f"{task}: {best['top1']:.1f}{each}, untrained {control['top1']:.1f} -> {out}")
    if tail:
        means = {group: sum(best[group]) / len(best[group]) for group in groups}
        text = "the tenth of the classes seen most: {frequent:.1f}, the rarer half: {rare:.1f}"
        print(text.format(**means))


if __name__ == "__main__":
    main()
