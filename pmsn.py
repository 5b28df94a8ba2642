# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""PMSN, Prior Matching for Siamese Networks (Assran et al., ICLR 2023, arXiv 2210.07277).

Several anchor views of an image, some with patches dropped, predict the soft assignment of one
target view to K prototypes. The target network is a moving average of the anchor's and gets no
gradient. Collapse is prevented by matching the mean prediction to a prior over prototypes, hence
over sizes of clusters: a power law, for long-tailed data. With the uniform one this is msn.py.

    p = softmax(cos(anchor, prototypes) / temperature)     t = sharpened softmax(cos(target, ...))
    loss = mean over anchors of H(t, p)  +  weight * KL(mean over anchors of p || prior)   (Eq. 1)

    python pmsn.py --long-tail 1                                     plates, minutes on a laptop
    torchrun --nproc_per_node=8 pmsn.py --data INATURALIST --exponent 0.25

Read the loss, MSN and the step in section 4, then train; sampler.py says what --k-classes does.
In shapes: B images a process, V views, N patches, D width, K prototypes.
"""

import argparse
import copy
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from sampler import KClassBatchSampler, long_tail, power_law_prior

# ---- 1. Hyper-parameters

# Every entry is an option of its name. These are the study's: ViT-B/16, batch 1024, 300 epochs,
# else the official code's defaults. Sizes in pixels, warm-up in epochs.
PAPER = dict(
    image_size=224, focal_size=96, patch_size=16, stem=[], dim=768, depth=12, heads=12,
    hidden=2048, output=256, num_prototypes=1024,  # projector's layers, embedding, K
    temperature=0.1, sharpen=0.25,  # sharpen: the targets' temperature, as a fraction
    prior_weight=1.0, prior="power-law", exponent=0.25, sinkhorn=False,  # or uniform, file:PATH
    rand_views=1, focal_views=10, patch_drop=0.3,  # anchors of each size; only rand views lose
    rand_crop=[0.3, 1.0], focal_crop=[0.05, 0.3],  # fraction of the image's area
    flip=0.5, grey=0.2, blur=0.5, solarise=0.0,  # probabilities
    jitter=[0.4, 0.4, 0.4, 0.1],  # brightness, contrast, saturation, hue; with probability 0.8
    blur_sigma=[0.1, 2.0], threshold=0.5,  # pixels; from which value on solarise inverts
    noise=0.0,  # deviation, after normalisation
    standardise=False,  # normalise by each view's own mean and deviation, not by ImageNet's
    batch_size=1024, epochs=300, warmup=15.0, start_lr=2e-4, lr=1e-3, final_lr=1e-6,
    weight_decay=[0.04, 0.4], ema=0.996, clip=3.0,  # first to last; rises to 1; gradient norm
)  # fmt: skip
SMALL = PAPER | dict(
    image_size=32, focal_size=16, patch_size=8, stem=[16, 32, 64, 64, 96], dim=96, depth=2,
    heads=3, hidden=512, output=128, num_prototypes=256, sinkhorn=True, rand_views=2, focal_views=0,
    patch_drop=0.15, rand_crop=[0.35, 1.0], focal_crop=[0.1, 0.35], blur_sigma=[0.1, 0.7],
    batch_size=128, epochs=100, warmup=5.0, ema=0.99,
)  # fmt: skip
RECIPES = {
    "paper": PAPER,
    "vit-s16": PAPER | dict(dim=384, heads=6, patch_drop=0.15, epochs=800),
    "cifar10": SMALL | dict(focal_views=4),
    "cifar100": SMALL | dict(focal_views=4),
    # MSN is content with a plate's grey level, polarity and place unless its views destroy them.
    "plates": SMALL | dict(
        flip=0.0, jitter=[0.8, 0.8, 0.0, 0.0], grey=0.0, blur=0.0, solarise=0.5,
        threshold=0.0, noise=0.2, standardise=True, rand_crop=[0.6, 1.0], epochs=7, warmup=0.5,
        ema=0.98,
    ),
}  # fmt: skip


def fail(message, everywhere=False):
    """Bad input: one line on stderr (process 0 speaks for all, unless `everywhere`), status 2."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.error = fail
    p.add_argument("--data", default="plates", help="plates, cifar10, cifar100 or a folder")
    p.add_argument("--k-classes", type=int, help="distinct classes in a batch (default: any)")
    p.add_argument("--long-tail", type=float, default=0.0, help="keep k**-this of class k")
    p.add_argument("--recipe", choices=RECIPES, help="default: the data's own; folders: paper")
    p.add_argument("--steps", type=int, help="stop after so many steps in all (default: epochs)")
    p.add_argument("--out", default="runs/pmsn", help="folder of checkpoint, log, pictures")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, help="loader processes (default: 0 for data in memory)")
    p.add_argument("--log-every", type=int, default=50, help="steps")
    p.add_argument("--save-every", type=int, default=500, help="steps")
    bf16 = dict(action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    p.add_argument("--bf16", help="autocast (default: on GPUs; pays on new CPUs, too)", **bf16)
    for name, value in PAPER.items():
        kind = dict(type=type(value))
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, list):
            kind = dict(type=float, nargs=len(value)) if value else dict(type=int, nargs="*")
        p.add_argument(f"--{name.replace('_', '-')}", help=f"paper: {value}", **kind)
    args = p.parse_args(argv)
    args.recipe = args.recipe or (args.data if args.data in RECIPES else "paper")
    recipe = dict(RECIPES[args.recipe])
    if (args.k_classes or 0) > recipe["batch_size"]:  # a batch that the user gave stays as it is
        recipe["batch_size"] = -(-args.k_classes // 128) * 128
        if args.batch_size is None and os.environ.get("RANK", "0") == "0":
            print(f"batch size raised to {recipe['batch_size']} to hold {args.k_classes} classes")
    vars(args).update({k: v for k, v in recipe.items() if getattr(args, k) is None})
    shares = "patch_drop flip grey blur solarise threshold ema rand_crop focal_crop".split()
    may_be_0 = "seed workers long_tail focal_views noise jitter warmup start_lr final_lr"
    may_be_0 = f"{may_be_0} weight_decay prior_weight exponent".split() + shares
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            limit = 1 if name in shares else 2**63 if name == "seed" else sys.float_info.max
            number, low = type(x) in (int, float), "from" if name in may_be_0 else "above"
            if number and not (0 < x <= limit or x == 0 and name in may_be_0):
                fail(f"--{name.replace('_', '-')} {x}: give a number {low} 0 to {limit:.2g}")
    if args.batch_size < 2:
        fail(f"--batch-size {args.batch_size}: BatchNorm needs at least 2")
    sizes = f"--image-size {args.image_size}, --focal-size {args.focal_size}"
    if args.image_size % args.patch_size or args.focal_views and args.focal_size % args.patch_size:
        fail(f"--patch-size {args.patch_size} does not divide {sizes}: choose multiples of it")
    if args.stem and 2 ** min(args.patch_size.bit_length() - 1, len(args.stem)) != args.patch_size:
        fail(f"--stem {args.stem}: cannot halve down to --patch-size {args.patch_size}: add layers")
    if args.dim % args.heads:
        fail(f"--heads {args.heads} does not divide --dim {args.dim}: choose a divisor")
    return args


# ---- 2. Data and views
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


def crop_batch(images, u, area, size, flip):
    """RandomResizedCrop and flip of B square images at once, by bilinear sampling.

    images (B, 3, H, H) uint8, u (B, 10, 4) uniform: ten tries, as torchvision, for a box of
    `area` (fraction of the image) and aspect 3/4 to 4/3 that fits -> (B, 3, size, size) uint8."""
    share, aspect = area[0] + (area[1] - area[0]) * u[..., 0], (4 / 3) ** (2 * u[..., 1] - 1)
    w, h = (share * aspect).sqrt(), (share / aspect).sqrt()  # (B, 10) fractions of the side
    first = ((w <= 1) & (h <= 1)).int().argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first)[:, 0].clamp(max=1), h.gather(1, first)[:, 0].clamp(max=1)
    x, y = (2 * u[:, 0, 2] - 1) * (1 - w), (2 * u[:, 0, 3] - 1) * (1 - h)  # centres in [-1, 1]
    w, zero = torch.where(u[:, 1, 2] < flip, -w, w), torch.zeros_like(x)
    affine = torch.stack([w, zero, x, zero, h, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(x), 3, size, size], align_corners=False)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return crops.round().byte()


class CroppedViews(Dataset):
    """Item (step, indices): this process's share of a global batch, cropped and flipped. For each
    (views, size, area) of `groups` uint8 (V, B, 3, size, size); or a message if a file fails."""

    def __init__(self, images, groups, flip, seed, rank, processes):
        self.images, self.groups, self.flip = images, groups, flip
        self.seed, self.rank, self.processes = seed, rank, processes

    def __getitem__(self, item):
        step, indices = item
        B, views = len(indices), []
        first = self.rank * B  # numbers are drawn for the global batch, then cut
        if torch.is_tensor(self.images):
            images = self.images[indices].expand(-1, 3, -1, -1)
            torch.manual_seed(hash((self.seed, step, 0)))
            for V, size, area in self.groups:
                u = torch.rand(V, B * self.processes, 10, 4)[:, first : first + B]
                views.append(torch.stack([crop_batch(images, v, area, size, self.flip) for v in u]))
            return views
        for position, path in enumerate((self.images[i] for i in indices), first):
            try:
                image = read_image(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                return f"{path}: unreadable image ({error}): mend or remove it"
            torch.manual_seed(hash((self.seed, step, 0, position)))
            for V, size, area in self.groups:
                crop, flip = v2.RandomResizedCrop(size, area), v2.RandomHorizontalFlip(self.flip)
                views.append(torch.stack([flip(crop(image)) for _ in range(V)]))
        return [torch.stack(views[g :: len(self.groups)], dim=1) for g in range(len(self.groups))]


def read_image(path):
    """A file of any mode and orientation -> (3, H, W) uint8."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        upright = upright.convert("RGBA") if "transparency" in image.info else upright
        return TF.pil_to_tensor(upright.convert("RGB"))


def adjust(image, kind, amount):
    """torchvision's adjust_brightness, _contrast, _saturation, _hue (kind 0 to 3), each image of
    (B, 3, H, W) in [0, 1] by its own amount (B,)."""
    amount = amount.view(-1, 1, 1, 1)
    if kind < 3:
        grey = (image * image.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        other = (torch.zeros_like(grey), grey.mean(dim=(2, 3), keepdim=True), grey)[kind]
        return (other + amount * (image - other)).clamp(0, 1)
    value, (r, g, b) = image.amax(1, keepdim=True), image.split(1, dim=1)
    chroma = value - image.amin(1, keepdim=True)
    other = torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma)
    sixth = torch.where(value == r, g - b, other)
    k = sixth / chroma.clamp(min=1e-12) + 6 * amount + image.new_tensor([5, 3, 1]).view(3, 1, 1)
    return value - chroma * torch.minimum(k % 6, 4 - k % 6).clamp(0, 1)  # HSV back to RGB


def gaussian_blur(image, sigma, radius):
    """Blur each of (B, 3, H, W) by its own sigma (B,), in pixels; 2 radius + 1 taps, reflected."""
    taps = torch.arange(-radius, radius + 1, device=image.device)
    weights = (-0.5 * (taps / sigma[:, None]).square()).softmax(dim=1)[:, :, None, None, None]
    for dim, pad in (2, [0, 0, radius, radius]), (3, [radius, radius, 0, 0]):
        padded, size = F.pad(image, pad, mode="reflect"), image.shape[dim]
        image = sum(weights[:, i] * padded.narrow(dim, i, size) for i in range(len(taps)))
    return image


def photometry(views, u, jitter, grey, blur, blur_sigma, solarise, threshold):
    """Colours of all views of one size in one call: uint8 (B, 3, H, W) -> float32 in [0, 1]. Each
    image has its own uniform numbers u (B, 13), on the CPU, and order of the four jitters."""
    image, device, order = views.float() / 255, views.device, u[:, 9:].argsort(dim=1)
    for place, kind in itertools.product(range(4), range(4)):
        if jitter[kind]:
            i = ((order[:, place] == kind) & (u[:, 0] < 0.8)).nonzero()[:, 0]
            shift = jitter[kind] * (2 * u[i, 1 + kind] - 1)
            amount = (1 + shift).clamp(min=0) if kind < 3 else shift
            i = i.to(device)
            image[i] = adjust(image[i], kind, amount.to(device))
    u = u.to(device)
    if grey:
        image = adjust(image, 2, (u[:, 5] >= grey).float())
    if blur:
        sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * u[:, 7]
        sigma = torch.where(u[:, 6] < blur, sigma, 1e-3)  # so narrow that nothing changes
        radius = min(math.ceil(3 * blur_sigma[1]), image.shape[-1] - 1)
        image = gaussian_blur(image, sigma, radius)
    inverted = (u[:, 8] < solarise).view(-1, 1, 1, 1) & (image >= threshold)
    return torch.where(inverted, 1 - image, image)


def normalise(image, standardise):
    """(B, 3, H, W) in [0, 1] -> the network's input, by each image's own numbers or ImageNet's."""
    if standardise:
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (deviation + 1e-3)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


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


def initialise(module):
    """The official initial weights: linear truncated normal 0.02, convolution Kaiming, bias 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- 4. Method
def open_prior(prior, exponent, num_prototypes):
    """power-law, uniform, or file:PATH of K weights, text or .npy -> (K,) float64, sums to 1."""
    if prior in ("power-law", "uniform"):
        return power_law_prior(num_prototypes, exponent * (prior == "power-law"))
    path = prior.removeprefix("file:")
    try:
        weights = np.load(path) if path.endswith(".npy") else Path(path).read_text().split()
        weights = torch.from_numpy(np.array(weights, dtype=float)).reshape(num_prototypes)
        if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
            raise ValueError("negative, not finite or all 0")
    except Exception as error:  # numpy raises many kinds
        fail(f"--prior {prior} ({error}): give power-law, uniform or file:PATH of K weights >= 0")
    return weights / weights.sum()


def log_assignment(z, prototypes, temperature):
    """log softmax(cos(z, prototypes) / temperature), of z (B, D) and prototypes (K, D), any lengths
    -> (B, K), in float32 (or 64), whatever autocast made of z."""
    prototypes = F.normalize(prototypes)
    return (F.normalize(z.to(prototypes)) @ prototypes.T / temperature).log_softmax(dim=1)


def pmsn_loss(anchors, targets, prototypes, prior, temperature=0.1, sharpen=0.25,
              prior_weight=1.0, sinkhorn=False):  # fmt: skip
    """Eq. 1 of MSN. anchors (V*B, D), view-major; targets (B, D); prototypes (K, D); any lengths.

    -> (loss, cross_entropy, kl), in nats. cross_entropy is this process's mean, which DDP
    averages; kl = KL(mean prediction || prior (K,)) >= 0 is over the anchors of all processes."""
    tiny = torch.finfo(prototypes.dtype).tiny  # a prototype that nobody chose: 0 log 0 = 0
    prior = prior.to(prototypes.device).clamp(min=tiny)  # of 0 the divergence would be infinite
    log_p = log_assignment(anchors, prototypes, temperature)  # (V*B, K)
    with torch.no_grad():  # targets are labels; were they trained, all would become the same
        t = log_assignment(targets, prototypes, temperature * sharpen).exp()  # (B, K)
        for _ in range(3 * sinkhorn):  # of the sharpened targets of all processes
            mass = all_reduce_mean(t.mean(dim=0)).clamp(min=tiny)  # (K,)
            t = t * (prior / mass).to(t)  # prototypes: mass as in the prior
            t = t / t.sum(dim=1, keepdim=True)  # samples: mass 1 each
    cross_entropy = -(t * log_p.unflatten(0, (-1, len(t)))).sum(dim=2).mean()
    p_bar = all_reduce_mean(log_p.exp().mean(dim=0))  # (K,)
    kl = (p_bar * (p_bar.clamp(min=tiny).log() - prior.log().to(p_bar))).sum()
    return cross_entropy + prior_weight * kl, cross_entropy, kl


class MSN(nn.Module):
    """Encoder and projector, which anchor and target have alike, and the prototypes, whose gradient
    DDP averages over processes like any other (the official code sums it)."""

    def __init__(self, encoder, dim, hidden, output, num_prototypes):
        super().__init__()
        self.encoder, self.projector = encoder, nn.Sequential()
        for before in (dim, hidden):
            self.projector.extend([nn.Linear(before, hidden), BatchNorm(hidden), nn.GELU()])
        self.projector.append(nn.Linear(hidden, output)).apply(initialise)
        bound = output**-0.5
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, output).uniform_(-bound, bound))

    def forward(self, groups, keep=None):
        """groups: full-size and, if any, focal views, each (V*B, 3, H, W), view-major, one batch
        for BatchNorm; `keep` is for the first only -> embeddings (all V*B, E), prototypes (K, E)"""
        keeps = [keep] + [None] * (len(groups) - 1)
        z = [self.projector(self.encoder(x, k)) for x, k in zip(groups, keeps)]
        return torch.cat(z), self.prototypes


def pmsn_step(
    model, target, optimizer, views, keep, lr, weight_decay, ema, clip, bf16=False, **loss_options
):
    """One step, in the official order: clip, step, move the target. views: the target view, then
    groups of anchors -> (gradient norm, loss, its two terms); the mean prediction (K,) of this
    process; the targets' embeddings."""
    groups = optimizer.param_groups
    groups[0]["weight_decay"] = weight_decay  # the other groups are not decayed
    for group in groups:
        group["lr"] = lr
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            targets, _ = target(views[:1])  # in training mode: BatchNorm by the batch, as official
        anchors, prototypes = model(views[1:], keep)
    loss, *terms = pmsn_loss(anchors, targets, prototypes, **loss_options)
    with torch.no_grad():
        usage = log_assignment(anchors, prototypes, loss_options["temperature"]).exp().mean(dim=0)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(groups[0]["params"] + groups[1]["params"], clip)
    optimizer.step()
    with torch.no_grad():  # parameters only: the target's BatchNorm keeps statistics of its own
        torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 1 - ema)
    return torch.stack([norm, loss, *terms]).detach(), usage, targets


def draw_prototypes(prototypes, embeddings, pictures, path, rows=12, columns=10):
    """Picture of prototypes (K, E), from the most to the least used, a row each, with the nearest
    of pictures (M, 3, H, W) uint8, whose embeddings are (M, E)."""
    similarity = F.normalize(prototypes) @ F.normalize(embeddings.to(prototypes)).T  # (K, M)
    used = similarity.argmax(dim=0).bincount(minlength=len(prototypes)).argsort(descending=True)
    chosen = used[torch.linspace(0, len(used) - 1, rows).long()]
    nearest = similarity[chosen].topk(min(columns, len(pictures))).indices.cpu()
    save_image(pictures[nearest.flatten()].float() / 255, path, nrow=nearest.shape[1])


def draw_usage(usage, prior, kl, path):
    """Picture. Left: use of the prototypes (K,), sorted (red), and the prior (black), by logarithm;
    right: the divergence kl of the one from the other, a number for each line of the log."""
    picture = Image.new("RGB", (840, 340), "white")
    pen, floor = ImageDraw.Draw(picture), 0.01 / len(prior)
    shares = [x.double().sort().values.flip(0).clamp(min=floor).log10() for x in (prior, usage)]
    for left, title, curves in (
        (10, "log10 of the share of each prototype, sorted: prior black, use red", shares),
        (430, "KL(use || prior) over the run, nats", [torch.tensor(kl)]),
    ):
        low, high = min(y.min() for y in curves), max(y.max() for y in curves)
        pen.text((left, 5), f"{title}; {low:.2f} to {high:.2f}", "black")
        for y, colour in zip(curves, ("black", "red")):
            y = 330 - 300 * (y - low) / (high - low).clamp(min=1e-9)
            x = torch.linspace(left, left + 400, len(y))
            pen.line(torch.stack([x, y], dim=1).flatten().tolist(), colour, 2)
    picture.save(path)


# ---- 5. Optimiser and schedules
def parameter_groups(model):
    """For AdamW: weights (also cls token and positions), which decay; biases, norms; prototypes."""
    network = [*model.encoder.parameters(), *model.projector.parameters()]
    weights, others = [p for p in network if p.ndim > 1], [p for p in network if p.ndim <= 1]
    return [dict(params=g, weight_decay=0.0) for g in (weights, others, [model.prototypes])]


def schedules(step, epoch_steps, epochs, warmup, start_lr, lr, final_lr, weight_decay, ema):
    """lr, weight decay and EMA decay of update `step` (from 0). As in the official code all are
    stretched to 1.25 times the run, and the first two step before the update."""

    def cosine(step, steps, start, end):
        return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2

    now, horizon, warmup = step + 1, int(1.25 * epochs * epoch_steps), int(warmup * epoch_steps)
    rate = cosine(now - warmup, max(horizon - warmup, 1), lr, final_lr)
    if now < warmup:
        rate = start_lr + (lr - start_lr) * now / warmup
    decay = ema + (1 - ema) * step / (1.25 * epochs * epoch_steps)
    return dict(lr=rate, weight_decay=cosine(now, horizon, *weight_decay), ema=decay)


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


def load_checkpoint(path, options):
    """The state at `path`, None if there is none; refuses what does not belong to this run."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = {name: state["options"].get(name) for name in options}
    except Exception as error:  # torch raises many kinds for damaged files
        fail(f"{path} is damaged or foreign ({type(error).__name__}): move it or change --out")
    for name, value in options.items():
        if there[name] != value:
            flag = f"--{name.replace('_', '-')} {value}"
            fail(f"{flag}: {path} was made with {there[name]}: give that, or another --out")
    return state


# ---- 7. Training
def train(args):
    def pick(names):
        return {name: getattr(args, name) for name in names.split()}

    device, W, out = init_distributed(), world_size(), Path(args.out)
    prior = open_prior(args.prior, args.exponent, args.num_prototypes)
    free = ("out", "steps", "workers", "log_every", "save_every")  # may change between starts
    options = {"script": "pmsn"} | {k: v for k, v in vars(args).items() if k not in free}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").touch()
    except OSError as error:
        fail(f"--out {out}: not writable ({error}): choose another folder")
    state = load_checkpoint(out / "checkpoint.pt", options) or dict(step=0, recent=[], logged=0)
    start, recent, logged = state["step"], state["recent"], state["logged"]

    images, labels = open_data(args.data, "train")
    labels = next(iter(labels.values())).numpy()
    if args.long_tail:
        kept = long_tail(labels, args.long_tail, args.seed)
        images = images[kept] if torch.is_tensor(images) else [images[i] for i in kept]
        labels = labels[kept]
        if rank() == 0:
            print(f"--long-tail {args.long_tail}: {len(kept)} images are kept")
    try:
        share = dict(rank=rank(), world_size=W, seed=args.seed)
        sampler = KClassBatchSampler(labels, args.batch_size, args.k_classes, **share)
    except ValueError as error:
        fail(f"--batch-size {args.batch_size}, --k-classes {args.k_classes}: {error}")
    epoch_steps = len(sampler)
    stop = min(args.steps or math.inf, args.epochs * epoch_steps)

    def stream():
        for epoch in range(start // epoch_steps, -(-stop // epoch_steps)):
            sampler.set_epoch(epoch)
            batches = enumerate(sampler, epoch * epoch_steps)
            yield from ((step, indices) for step, indices in batches if start <= step < stop)

    groups = [(1 + args.rand_views, args.image_size, args.rand_crop)]
    groups += [(args.focal_views, args.focal_size, args.focal_crop)] * (args.focal_views > 0)
    views = CroppedViews(images, groups, args.flip, args.seed, rank(), W)
    workers = 0 if torch.is_tensor(images) else os.cpu_count() // W
    workers = workers if args.workers is None else args.workers
    pin = device.type == "cuda"
    loader = DataLoader(views, None, sampler=stream(), num_workers=workers, pin_memory=pin)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    encoder = VisionTransformer(**pick("image_size patch_size dim depth heads stem"))
    msn = MSN(encoder, **pick("dim hidden output num_prototypes")).to(device)
    target = copy.deepcopy(msn).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(msn), fused=True)
    parts = dict(msn=msn, target=target, encoder=target.encoder, optimizer=optimizer)
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    model = DistributedDataParallel(msn)

    log, bar = out / "log.jsonl", tqdm(total=stop, initial=start, disable=rank() > 0 or None)
    if rank() == 0 and start < stop:
        print(json.dumps(options), flush=True)
        lines = log.read_bytes().splitlines(keepends=True)[:logged]
        os.truncate(log, sum(map(len, lines)))  # drop what a killed run logged after its last save
    terminated, seen, quiet, clock, mark, now = [], [], 0, time.time(), start, start
    handler = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    for step, crops in zip(range(start, stop), loader):
        if isinstance(crops, str):
            bar.close()
            fail(crops, everywhere=True)
        inputs, B = [], crops[0].shape[1]
        torch.manual_seed(hash((args.seed, step, 1)))
        for crop in crops:  # (V, B, 3, H, W); numbers are drawn for the global batch, then cut
            u = torch.rand(len(crop), B * W, 13)
            noise = args.noise * torch.randn(len(crop), B * W, 1, *crop.shape[3:])
            u, noise = (x[:, rank() * B :][:, :B].flatten(0, 1) for x in (u, noise))
            colours = pick("jitter grey blur blur_sigma solarise threshold")
            pixels = photometry(crop.flatten(0, 1).to(device), u, **colours)
            inputs.append(normalise(pixels, args.standardise) + noise.to(device))
        inputs[:1] = inputs[0][:B], inputs[0][B:]  # the first view is the target
        keep = torch.randperm((args.image_size // args.patch_size) ** 2)  # one for all images
        keep = keep[: int(len(keep) * (1 - args.patch_drop))].to(device)
        rates = pick("epochs warmup start_lr lr final_lr weight_decay ema")
        rates = schedules(step, epoch_steps, **rates)
        chosen = pick("clip bf16 temperature sharpen prior_weight sinkhorn") | dict(prior=prior)
        result = pmsn_step(model, target, optimizer, inputs, keep, **rates, **chosen)
        recent = [*recent, torch.cat(result[:2])]
        seen = [*seen, (result[2], crops[0][0])][-(1000 // B + 1) :]
        now, _ = step + 1, bar.update()
        flag = torch.tensor(float(bool(terminated)))
        dist.all_reduce(flag)
        last = now == stop or flag > 0
        if step == 0 and rank() == 0:
            rows = [F.interpolate(v[:8], inputs[0].shape[2:]) for x in inputs for v in x.split(B)]
            save_image(torch.cat(rows), out / "views.png", nrow=8, normalize=True, scale_each=True)
        if not last and now % args.log_every and now % args.save_every:
            continue
        recent = list(all_reduce_mean(torch.stack([x.to(device) for x in recent])).cpu())
        for number, values in enumerate(recent, now - len(recent) + 1):
            if not values.isfinite().all():
                bar.close()
                fail(f"the loss is not finite at step {number}: lower --lr {args.lr}")
        logs, saves = last or now % args.log_every == 0, last or now % args.save_every == 0
        means = torch.stack(recent).double().mean(dim=0)
        (norm, loss, cross_entropy, kl), usage = means[:4].tolist(), means[4:]
        if rank() == 0 and logs:
            entropy = -kl - (usage @ prior.clamp(min=1e-38).log()).item()  # of the mean prediction
            line = dict(step=now, epoch=step // epoch_steps) | rates | dict(loss=loss)
            line |= dict(cross_entropy=cross_entropy, kl=kl, entropy=entropy)
            # What predictions tell of their image, in nats: 0 in either kind of collapse.
            line |= dict(information=entropy - cross_entropy, gradient_norm=norm)
            line |= dict(images_per_second=(now - mark) * args.batch_size / (time.time() - clock))
            bar.set_postfix({name: f"{line[name]:.3g}" for name in list(line)[5:]})
            ranks = torch.linspace(0, args.num_prototypes - 1, 11).long()  # deciles
            for name, share in dict(usage=usage, prior=prior).items():
                share = share.sort(descending=True).values[ranks]
                line[name] = [float(f"{x:.3g}") for x in share]
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            told = line["information"] > 0.02 or now < args.warmup * epoch_steps
            quiet = 0 if told else quiet + 1
            if quiet == 5:
                bar.write("warning: collapse: predictions are the same for all images; lower --lr")
        if now % args.log_every == 0:
            recent, logged, clock, mark = [], logged + 1, time.time(), now
        if rank() == 0 and saves:
            saved = dict(options=options, step=now, recent=recent, logged=logged)
            saved |= {name: part.state_dict() for name, part in parts.items()}
            torch.save(saved, out / "checkpoint.partial")  # renamed: a kill leaves no half file
            os.replace(out / "checkpoint.partial", out / "checkpoint.pt")
            embeddings, pictures = map(torch.cat, zip(*seen))
            draw_prototypes(msn.prototypes.detach(), embeddings, pictures, out / "prototypes.png")
            history = [json.loads(line)["kl"] for line in log.read_text().splitlines()]
            draw_usage(usage, prior, [*history, kl], out / "prior.png")
        if last:
            break
    bar.close()
    signal.signal(signal.SIGTERM, handler)
    dist.destroy_process_group()


def main(argv=None):
    train(parse_args(argv))


if __name__ == "__main__":
    main()
