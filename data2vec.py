# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""data2vec for images (Baevski et al., ICML 2022, arXiv 2202.03555), in one file.

Blocks of patches are masked. From the rest the anchor network (the paper's student) predicts, at
every masked patch, what a target network (the teacher: a moving average of the anchor, without
gradient) makes of the whole image: the mean of its last blocks' outputs, normalised. No term
compares images with each other, so there is no prior over clusters: in the study (arXiv 2210.07277)
data2vec is, like MAE, the control, which hardly cares how many classes a mini-batch has.

    y = LN(mean over the last top_k blocks l of LN(the target's output of l))   LN: no parameters
    loss = mean over masked patches and entries of d^2 / 2b if |d| < b, else |d| - b/2;   d = f - y

    python data2vec.py                                               plates, minutes on a laptop
    torchrun --nproc_per_node=16 data2vec.py --data IMAGENET --k-classes 960    (or 8: imbalanced)

Read block_mask, data2vec_targets and data2vec_loss, then Data2Vec and data2vec_step, then train;
sampler.py says what --k-classes does. In shapes: B images a process, g patches a side, N = g * g,
D width, M masked patches of a process's images.
"""

import argparse
import copy
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

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

from sampler import KClassBatchSampler, long_tail

# ---- 1. Hyper-parameters

# Every entry is an option of its name. These are the official code's command for ViT-B/16.
PAPER = dict(
    image_size=224, patch_size=16, dim=768, depth=12, heads=12,
    layer_scale=1e-4, drop_path=0.25, attention_dropout=0.05,  # of the last block; of all
    num_masked=120, min_block=16,  # patches: at most, in all; at least, drawn for a block
    top_k=6, beta=2.0,  # blocks averaged; where the loss turns linear
    crop=[0.08, 1.0],  # fraction of the image's area
    flip=0.5, jitter=[0.4, 0.4, 0.4, 0.0],  # brightness, contrast, saturation, hue
    standardise=False,  # normalise by each view's own mean and deviation, not by ImageNet's
    batch_size=2048, epochs=800, warmup=10.0,  # of all processes; warm-up in epochs
    lr=2e-3, final_lr=1e-5,  # not scaled with the batch
    weight_decay=0.05, clip=3.0,
    ema=[0.999, 0.9998], ema_anneal=0.0,  # first to last within so many epochs: here at once last
)  # fmt: skip
SMALL = PAPER | dict(
    image_size=32, patch_size=4, dim=128, depth=4, heads=4, layer_scale=0.1, drop_path=0.0,
    attention_dropout=0.0, num_masked=39, min_block=4, top_k=3, batch_size=128, epochs=100,
    warmup=5.0, lr=1e-3, ema=[0.99, 0.999], ema_anneal=50.0,
)  # fmt: skip
RECIPES = {
    "paper": PAPER,
    "cifar10": SMALL,
    "cifar100": SMALL,
    "plates": SMALL | dict(
        patch_size=8, num_masked=9, min_block=2, flip=0.0, crop=[0.6, 1.0], jitter=[0.0] * 4,
        standardise=True, batch_size=960, epochs=10, warmup=1.0, lr=3e-3, ema_anneal=5.0,
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
    p.add_argument("--out", default="runs/data2vec", help="folder of checkpoint, log, picture")
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
            kind = dict(type=float, nargs=len(value))
        p.add_argument(f"--{name.replace('_', '-')}", help=f"paper: {value}", **kind)
    args = p.parse_args(argv)
    args.recipe = args.recipe or (args.data if args.data in RECIPES else "paper")
    recipe = dict(RECIPES[args.recipe])
    if (args.k_classes or 0) > recipe["batch_size"]:  # a batch that the user gave stays as it is
        recipe["batch_size"] = -(-args.k_classes // 128) * 128
        if args.batch_size is None and os.environ.get("RANK", "0") == "0":
            print(f"batch size raised to {recipe['batch_size']} to hold {args.k_classes} classes")
    vars(args).update({k: v for k, v in recipe.items() if getattr(args, k) is None})
    shares = "flip ema crop drop_path attention_dropout".split()
    may_be_0 = "seed workers long_tail jitter warmup final_lr weight_decay ema_anneal".split()
    may_be_0 += shares
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            limit = 1 if name in shares else 2**63 if name == "seed" else sys.float_info.max
            number, low = type(x) in (int, float), "from" if name in may_be_0 else "above"
            if number and not (0 < x <= limit or x == 0 and name in may_be_0):
                fail(f"--{name.replace('_', '-')} {x}: give a number {low} 0 to {limit:.2g}")
    for name in ("drop_path", "attention_dropout"):
        if getattr(args, name) == 1:
            fail(f"--{name.replace('_', '-')} 1: nothing would be left: give less")
    if args.image_size % args.patch_size:
        size = f"--image-size {args.image_size}"
        fail(f"--patch-size {args.patch_size} does not divide {size}: choose a divisor")
    if args.dim % args.heads:
        fail(f"--heads {args.heads} does not divide --dim {args.dim}: choose a divisor")
    if args.top_k > args.depth:
        fail(f"--top-k {args.top_k}: there are --depth {args.depth} blocks: give at most that")
    patches = (args.image_size // args.patch_size) ** 2
    if not args.min_block <= args.num_masked < patches:
        limits = f"from --min-block {args.min_block} to {patches - 1}, of {patches} patches"
        fail(f"--num-masked {args.num_masked}: give a number {limits}")
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


def block_mask(grid_size, num_masked, min_block=16, rng=random):
    """Rectangles at random places until num_masked patches are masked -> (grid, grid) bool, True:
    masked. At most num_masked, often fewer: ten rectangles in a row that do not fit end the search.
    The draws and their order are the official code's (BEiT), so one seed gives one mask."""
    masked, g = set(), grid_size
    while len(masked) < num_masked:
        cap = num_masked - len(masked)
        for _ in range(10):
            area = rng.uniform(min_block, cap)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= g or w >= g:
                continue
            top, left = rng.randint(0, g - h), rng.randint(0, g - w)
            block = {g * r + c for r in range(top, top + h) for c in range(left, left + w)}
            if 0 < len(block - masked) <= cap:
                masked |= block
                break
        else:
            break
    return torch.tensor([patch in masked for patch in range(g * g)]).view(g, g)


class MaskedViews(Dataset):
    """Item (step, indices) of CroppedViews, and a mask for each image: bool (B, N)."""

    def __init__(self, views, grid_size, num_masked, min_block):
        self.views, self.options = views, (grid_size, num_masked, min_block)

    def __getitem__(self, item):
        (step, indices), views = item, self.views
        crops, first = views[item], views.rank * len(indices)
        if isinstance(crops, str):
            return crops
        seeds = [hash((views.seed, step, 2, first + i)) for i in range(len(indices))]
        masks = [block_mask(*self.options, random.Random(seed)).flatten() for seed in seeds]
        return [*crops, torch.stack(masks)]


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


def jitter_colours(views, u, jitter):
    """Brightness, contrast, saturation, hue, each image in its own order: uint8 (B, 3, H, W) ->
    float32 in [0, 1]; amounts and order from u (B, 8), uniform, on the CPU."""
    image, order = views.float() / 255, u[:, 4:].argsort(dim=1)
    for place, kind in itertools.product(range(4), range(4)):
        if jitter[kind]:
            i = (order[:, place] == kind).nonzero()[:, 0]
            shift = jitter[kind] * (2 * u[i, kind] - 1)
            amount = (1 + shift).clamp(min=0) if kind < 3 else shift
            i = i.to(image.device)
            image[i] = adjust(image[i], kind, amount.to(image.device))
    return image


def normalise(image, standardise):
    """(B, 3, H, W) in [0, 1] -> the network's input, by each image's own numbers or ImageNet's."""
    if standardise:
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (deviation + 1e-3)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# ---- 3. Encoder
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


# ---- 4. Method
def data2vec_targets(layer_outputs, top_k=6):
    """Mean of the last top_k blocks' outputs, normalised before and after: a list or stack of
    (B, 1 + N, D), cls first -> (B, N, D), in float32 (or 64). Outputs are those at a block's end,
    after the second residual sum, before any final norm: section 3.1 of data2vec."""
    layers = [x[:, 1:] for x in layer_outputs[-top_k:]]
    layers = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in layers]
    mean = sum(F.layer_norm(x, x.shape[2:]) for x in layers) / len(layers)
    return F.layer_norm(mean, mean.shape[2:])


def data2vec_loss(pred, target, beta=2.0):
    """Smooth L1 distance, quadratic below beta; mean over all entries of pred, target (M, D)."""
    return F.smooth_l1_loss(pred.to(target), target, beta=beta)


class Data2Vec(nn.Module):
    """Encoder, mask token and linear head: images (B, 3, H, W), mask (B, N) with M masked patches
    -> predictions (M, D) of the targets there, image by image."""

    def __init__(self, **sizes):
        super().__init__()
        self.encoder, dim = BeiT(**sizes), sizes.get("dim", 768)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.lm_head = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        initialise_beit(self.lm_head)

    def forward(self, images, mask, paths=None, dropout=0.0):
        x = self.encoder(images, mask, self.mask_token, paths, dropout)[-1]
        return self.lm_head(self.encoder.norm(x)[:, 1:][mask])


def drop_paths(u, rate):
    """Stochastic depth: from uniform u (depth, 2, B) factors (depth, 2, B, 1, 1) of each image's
    branches, 0 with a probability that rises over blocks from 0 to rate, else with mean 1."""
    rates = torch.linspace(0, rate, len(u))[:, None, None]
    return ((u >= rates) / (1 - rates))[..., None, None]


def data2vec_step(model, target, optimizer, images, mask, lr, ema, clip, top_k=6, beta=2.0,
                  paths=None, dropout=0.0, bf16=False):  # fmt: skip
    """One step on images (B, 3, H, W), mask (B, N), in the official order: clip, step, move the
    target -> gradient norm; loss; deviation of the targets over patches, 0 if all are one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.no_grad():  # of the whole image, without noise, in float32, as official
        y = data2vec_targets(target.encoder(images), top_k)[mask]  # (M, D)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        pred = model(images, mask, paths, dropout)
    total = torch.tensor([float(len(y)), 1.0], device=images.device)  # patches, processes
    if dist.is_initialized():
        dist.all_reduce(total)
    share = len(y) * total[1] / total[0]  # so that DDP's mean is that of all patches
    loss = data2vec_loss(pred, y, beta) * share
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 1 - ema)
    return torch.stack([norm, loss, y.std(dim=0).mean()]).detach()


# ---- 5. Optimiser and schedule
def beit_groups(model):
    """For AdamW: matrices, mask token and position biases, which decay; vectors and cls token."""
    cls = model.encoder.cls_token
    weights = [p for p in model.parameters() if p.ndim > 1 and p is not cls]
    others = [p for p in model.parameters() if p.ndim <= 1 or p is cls]
    return [dict(params=weights), dict(params=others, weight_decay=0.0)]


def schedules_of(step, warmup, steps, lr, final_lr, ema, anneal):
    """lr and EMA decay of update `step` (from 0): lr rises from 0 to its peak, which the last of
    `warmup` steps and the next both have, then a cosine towards final_lr; the decay rises from
    ema[0] to ema[1] within `anneal` steps."""
    share = (step - warmup) / max(steps - warmup, 1)
    rate = final_lr + (lr - final_lr) * (1 + math.cos(math.pi * share)) / 2
    if step < warmup:
        rate = lr * step / max(warmup - 1, 1)
    return dict(lr=rate, ema=ema[0] + min(step / anneal if anneal else 1, 1) * (ema[1] - ema[0]))


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

    device, out = init_distributed(), Path(args.out)
    R, W = dist.get_rank(), dist.get_world_size()  # this process's number, of how many
    free = ("out", "steps", "workers", "log_every", "save_every")  # may change between starts
    options = {"script": "data2vec"} | {k: v for k, v in vars(args).items() if k not in free}
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
        if R == 0:
            print(f"--long-tail {args.long_tail}: {len(kept)} images are kept")
    try:
        share = dict(rank=R, world_size=W, seed=args.seed)
        sampler = KClassBatchSampler(labels, args.batch_size, args.k_classes, **share)
    except ValueError as error:
        fail(f"--batch-size {args.batch_size}, --k-classes {args.k_classes}: {error}")
    epoch_steps = len(sampler)
    steps = args.epochs * epoch_steps
    stop = min(args.steps or steps, steps)

    def stream():
        for epoch in range(start // epoch_steps, -(-stop // epoch_steps)):
            sampler.set_epoch(epoch)
            batches = enumerate(sampler, epoch * epoch_steps)
            yield from ((step, indices) for step, indices in batches if start <= step < stop)

    groups, grid = [(1, args.image_size, args.crop)], args.image_size // args.patch_size
    views = CroppedViews(images, groups, args.flip, args.seed, R, W)
    views = MaskedViews(views, grid, args.num_masked, args.min_block)
    workers = 0 if torch.is_tensor(images) else os.cpu_count() // W
    workers = workers if args.workers is None else args.workers
    pin = device.type == "cuda"
    loader = DataLoader(views, None, sampler=stream(), num_workers=workers, pin_memory=pin)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    anchor = Data2Vec(**pick("image_size patch_size dim depth heads layer_scale")).to(device)
    target = copy.deepcopy(anchor).requires_grad_(False)
    adamw = dict(weight_decay=args.weight_decay, fused=True)  # the rate is set at every step
    optimizer = torch.optim.AdamW(beit_groups(anchor), 0.0, **adamw)
    parts = dict(anchor=anchor, target=target, optimizer=optimizer)
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    model = DistributedDataParallel(anchor)

    log, bar = out / "log.jsonl", tqdm(total=stop, initial=start, disable=R > 0 or None)
    if R == 0 and start < stop:
        print(json.dumps(options), flush=True)
        lines = log.read_bytes().splitlines(keepends=True)[:logged]
        os.truncate(log, sum(map(len, lines)))  # drop what a killed run logged after its last save
    terminated, clock, mark, now = [], time.time(), start, start
    handler = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    for step, crops in zip(range(start, stop), loader):
        if isinstance(crops, str):
            bar.close()
            fail(crops, everywhere=True)
        images, mask = crops[0][0].to(device), crops[1].to(device)  # (B, 3, H, W), (B, N)
        B = len(images)
        torch.manual_seed(hash((args.seed, step, 1)))
        u = torch.rand(B * W, 8)[R * B :][:B]  # of the global batch, then cut
        paths = torch.rand(args.depth, 2, B * W)[..., R * B :][..., :B]
        paths = drop_paths(paths, args.drop_path).to(device) if args.drop_path else None
        images = normalise(jitter_colours(images, u, args.jitter), args.standardise)
        torch.manual_seed(hash((args.seed, step, 3, R)))  # dropout is each process's own
        warmup, anneal = (int(epochs * epoch_steps) for epochs in (args.warmup, args.ema_anneal))
        rates = schedules_of(step, warmup, steps, args.lr, args.final_lr, args.ema, anneal)
        chosen = pick("clip top_k beta bf16") | dict(paths=paths, dropout=args.attention_dropout)
        terms = data2vec_step(model, target, optimizer, images, mask, **rates, **chosen)
        recent.append(terms)
        now, _ = step + 1, bar.update()
        flag = torch.tensor(float(bool(terminated)))
        dist.all_reduce(flag)
        last = now == stop or flag > 0
        if step == 0 and R == 0:
            save_image(images[:8], out / "views.png", nrow=8, normalize=True, scale_each=True)
        if not last and now % args.log_every and now % args.save_every:
            continue
        recent = torch.stack([x.to(device) for x in recent]) / W
        dist.all_reduce(recent)  # terms are means over a process's images: now over all
        recent = list(recent.cpu())
        for number, values in enumerate(recent, now - len(recent) + 1):
            if not values.isfinite().all():
                bar.close()
                fail(f"the loss is not finite at step {number}: lower --lr {args.lr}")
        logs, saves = last or now % args.log_every == 0, last or now % args.save_every == 0
        if R == 0 and logs:
            norm, loss, deviation = torch.stack(recent).mean(dim=0).tolist()
            line = dict(step=now, epoch=step // epoch_steps, **rates, loss=loss)
            line |= dict(target_std=deviation, gradient_norm=norm)
            line |= dict(images_per_second=(now - mark) * args.batch_size / (time.time() - clock))
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            bar.set_postfix({name: f"{line[name]:.3g}" for name in list(line)[4:]})
        if now % args.log_every == 0:
            recent, logged, clock, mark = [], logged + 1, time.time(), now
        if R == 0 and saves:
            saved = dict(options=options, step=now, recent=recent, logged=logged)
            saved |= {name: part.state_dict() for name, part in parts.items()}
            saved["encoder"] = target.encoder.state_dict()
            torch.save(saved, out / "checkpoint.partial")  # renamed: a kill leaves no half file
            os.replace(out / "checkpoint.partial", out / "checkpoint.pt")
        if last:
            break
    bar.close()
    signal.signal(signal.SIGTERM, handler)
    dist.destroy_process_group()


def main(argv=None):
    train(parse_args(argv))


if __name__ == "__main__":
    main()
