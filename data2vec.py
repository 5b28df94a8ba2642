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

Read on as far as the line "Plumbing": that is the whole method. sampler.py has the data and
--k-classes. In shapes: B images in a process, g patches a side, N = g * g, D width, M masked
patches of a process's images.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from sampler import IN_MEMORY, KClassBatchSampler, Unreadable, open_data, read_image

# ---- 1. Recipe
SMALL = dict(
    image_size=32, patch_size=4, dim=128, depth=4, heads=4,
    layer_scale=0.1, drop_path=0.0, attention_dropout=0.0,
    num_masked=39, min_block=4, top_k=3,
    batch_size=128, epochs=100, warmup=5.0, lr=1e-3, ema=[0.99, 0.999], ema_anneal=50.0,
)  # fmt: skip

# Options have the values of the official code's command for ViT-B/16 as defaults; a recipe
# replaces some.
RECIPES = {
    "paper": {},
    "cifar10": SMALL,
    "cifar100": SMALL,
    "plates": SMALL | dict(
        patch_size=8, depth=2, top_k=2, num_masked=9, min_block=2,
        crop=[0.6, 1.0], flip=0.0, jitter=[0.0, 0.0, 0.0, 0.0], standardise=True,
        batch_size=960, epochs=3, warmup=0.33, lr=5e-3, ema_anneal=1.7,
    ),
}  # fmt: skip


def parse_args(argv=None):
    p = option_parser(__doc__, out="runs/data2vec", recipes=RECIPES)

    g = p.add_argument_group("method")
    g.add_argument("--num-masked", type=positive_int, default=120, help="patches, at most")
    g.add_argument("--min-block", type=positive_int, default=16, help="patches, drawn at least")
    g.add_argument("--top-k", type=positive_int, default=6, help="last blocks that are averaged")
    g.add_argument(
        "--beta", type=positive, default=2.0, help="distance at which the loss is linear"
    )
    g.add_argument("--ema", type=fraction, nargs=2, default=[0.999, 0.9998], help="target, from to")
    g.add_argument("--ema-anneal", type=nonnegative, default=0.0, help="epochs from first to last")

    g = p.add_argument_group("views")
    g.add_argument("--image-size", type=positive_int, default=224, help="pixels")
    g.add_argument("--crop", type=fraction, nargs=2, default=[0.08, 1.0], help="of the area")
    g.add_argument("--flip", type=fraction, default=0.5, help="probability")
    g.add_argument("--jitter", type=nonnegative, nargs=4, default=[0.4, 0.4, 0.4, 0.0],
                   help="strength: brightness, contrast, saturation, hue")  # fmt: skip
    g.add_argument("--standardise", action=argparse.BooleanOptionalAction, default=False,
                   help="normalise by each view's own mean and deviation")  # fmt: skip

    g = p.add_argument_group("model")
    g.add_argument("--patch-size", type=positive_int, default=16, help="pixels")
    g.add_argument("--dim", type=positive_int, default=768, help="width")
    g.add_argument("--depth", type=positive_int, default=12, help="blocks")
    g.add_argument("--heads", type=positive_int, default=12, help="of attention")
    g.add_argument("--layer-scale", type=positive, default=1e-4, help="of branches, at first")
    g.add_argument("--drop-path", type=fraction, default=0.25,
                   help="probability that the last block's branches are skipped")  # fmt: skip
    g.add_argument("--attention-dropout", type=fraction, default=0.05, help="probability")

    g = p.add_argument_group("optimiser: AdamW")
    g.add_argument("--batch-size", type=positive_int, default=2048, help="images, all processes")
    g.add_argument("--epochs", type=positive_int, default=800, help="until the rate is --final-lr")
    g.add_argument("--warmup", type=nonnegative, default=10.0, help="epochs")
    g.add_argument("--lr", type=positive, default=2e-3, help="peak rate, whatever the batch")
    g.add_argument("--final-lr", type=nonnegative, default=1e-5, help="rate at the end")
    g.add_argument("--weight-decay", type=nonnegative, default=0.05, help="of weights")
    g.add_argument("--clip", type=positive, default=3.0, help="norm of the gradient")

    args = parse_with_recipe(p, argv, RECIPES)
    check_sizes_of_data2vec(args)
    return args


def check_sizes_of_data2vec(args):
    """Patches must tile the image, heads must share the width, masks must leave something."""
    if args.drop_path == 1:
        fail("--drop-path 1: nothing would be left: give less")
    if args.attention_dropout == 1:
        fail("--attention-dropout 1: nothing would be left: give less")
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


# ---- 2. Loss
def data2vec_targets(layer_outputs, top_k=6):
    """Mean of the last top_k blocks' outputs, normalised before and after: a list or stack of
    (B, 1 + N, D), cls first -> (B, N, D), in float32 (or 64). Outputs are those at a block's end,
    after the second residual sum, before any final norm, as in the official vision code; the paper
    (section 3.3) takes them before that sum."""
    layers = [x[:, 1:] for x in layer_outputs[-top_k:]]
    layers = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in layers]
    mean = sum(F.layer_norm(x, x.shape[2:]) for x in layers) / len(layers)
    return F.layer_norm(mean, mean.shape[2:])


def data2vec_loss(pred, target, beta=2.0):
    """Smooth L1 distance, quadratic below beta; mean over all entries of pred, target (M, D)."""
    return F.smooth_l1_loss(pred.to(target), target, beta=beta)


# ---- 3. Model
def block_mask(grid_size, num_masked, min_block=16, rng=random):
    """Rectangles at random places until num_masked patches are masked -> (grid, grid) bool, True:
    masked. At most num_masked, often fewer: ten rectangles in a row that do not fit end the search.

    The draws and their order are the official code's (BEiT), so one seed gives one mask."""
    g = grid_size
    masked = set()
    while len(masked) < num_masked:
        room = num_masked - len(masked)
        for _ in range(10):
            area = rng.uniform(min_block, room)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= g or width >= g:
                continue
            top = rng.randint(0, g - height)
            left = rng.randint(0, g - width)
            rows = range(top, top + height)
            columns = range(left, left + width)
            block = {g * row + column for row in rows for column in columns}
            if 0 < len(block - masked) <= room:
                masked |= block
                break
        else:
            break
    return torch.tensor([patch in masked for patch in range(g * g)]).view(g, g)


class MaskedViews(Dataset):
    """CroppedViews, and at the end of each item a mask for each image: bool (B, N)."""

    def __init__(self, views, args):
        self.views = views
        self.grid_size = args.image_size // args.patch_size
        self.num_masked = args.num_masked
        self.min_block = args.min_block

    def __getitem__(self, item):
        crops = self.views[item]
        step, indices = item
        masks = []
        for position, _ in enumerate(indices, self.views.own.start):  # in the batch of all
            rng = random.Random(hash((self.views.args.seed, step, 2, position)))
            mask = block_mask(self.grid_size, self.num_masked, self.min_block, rng)
            masks.append(mask.flatten())
        return [*crops, torch.stack(masks)]


class RelativeBlock(nn.Module):
    """Transformer block of BEiT with timm's parameter names: pre-norm, no bias of keys, branches
    scaled by gamma. x (B, N, D); bias (heads, N, N) of the logits, query by key; paths: a factor
    of each branch and image (2, B, 1, 1), or None -> (B, N, D)."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn = nn.ModuleDict(dict(qkv=qkv, proj=nn.Linear(dim, dim)))
        self.attn.q_bias = nn.Parameter(torch.zeros(dim))
        self.attn.v_bias = nn.Parameter(torch.zeros(dim))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, bias, paths=None, dropout=0.0):
        first, second = (1.0, 1.0) if paths is None else paths
        mixed = self.attention(self.norm1(x), bias, dropout)
        x = x + first * self.gamma_1 * self.attn["proj"](mixed)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, N, 4D)
        return x + second * self.gamma_2 * self.mlp["fc2"](hidden)

    def attention(self, x, bias, dropout):
        q_bias = self.attn.q_bias
        biases = torch.cat([q_bias, torch.zeros_like(q_bias), self.attn.v_bias])
        qkv = F.linear(x, self.attn["qkv"].weight, biases).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None], dropout)
        return mixed.transpose(1, 2).flatten(2)  # (B, N, D)


class BeiT(nn.Module):
    """ViT with one relative position bias for all blocks instead of absolute positions, with timm's
    parameter names. images (B, 3, H, W) -> outputs of all blocks, (B, 1 + N, D) each, cls first.

    mask (B, N) bool: patches to replace by token (1, 1, D); paths (depth, 2, B, 1, 1) and dropout
    of the attention: random depth and noise, none by default."""

    def __init__(
        self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, layer_scale=1e-4
    ):
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(RelativeBlock(dim, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        index = relative_position_index(self.grid)
        self.register_buffer("index", index, persistent=False)
        self.rel_pos_bias = nn.Module()
        table = torch.zeros((2 * self.grid - 1) ** 2 + 3, heads)
        self.rel_pos_bias.relative_position_bias_table = nn.Parameter(table)

        self.apply(initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02, a=-0.02, b=0.02)
        for number, block in enumerate(self.blocks, 1):  # the sum of branches grows by depth
            for layer in (block.attn["proj"], block.mlp["fc2"]):
                layer.weight.data *= (2 * number) ** -0.5

    def forward(self, images, mask=None, token=None, paths=None, dropout=0.0):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[:, :, None], token.to(x), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        bias = self.rel_pos_bias.relative_position_bias_table[self.index].permute(2, 0, 1)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, bias, None if paths is None else paths[i], dropout)
            outputs.append(x)
        return outputs


def relative_position_index(grid):
    """Which row of the table of biases is used by query i and key j: (1 + N, 1 + N), cls first.

    Patches: (2g - 1)^2 rows by the difference of places; then one row each for cls as query, cls as
    key, and both."""
    g = grid
    row = torch.arange(g).repeat_interleave(g)  # (N,) of each patch
    column = torch.arange(g).repeat(g)
    down = row[:, None] - row + g - 1  # (N, N), query by key, from 0
    right = column[:, None] - column + g - 1
    index = F.pad(down * (2 * g - 1) + right, (1, 0, 1, 0))
    index[0] = (2 * g - 1) ** 2
    index[:, 0] = (2 * g - 1) ** 2 + 1
    index[0, 0] = (2 * g - 1) ** 2 + 2
    return index


def initialise(module):
    """The official initial weights: truncated normal 0.02, cut at one deviation; bias 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Data2Vec(nn.Module):
    """Encoder, mask token and linear head: images (B, 3, H, W), mask (B, N) with M masked patches
    -> predictions (M, D) of the targets there, image by image."""

    def __init__(self, encoder, dim):
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.lm_head = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        initialise(self.lm_head)

    def forward(self, images, mask, paths=None, dropout=0.0):
        x = self.encoder(images, mask, self.mask_token, paths, dropout)[-1]  # (B, 1 + N, D)
        return self.lm_head(self.encoder.norm(x)[:, 1:][mask])


def drop_paths(u, rate):
    """Stochastic depth: from uniform u (depth, 2, B) factors (depth, 2, B, 1, 1) of each image's
    branches, 0 with a probability that rises over blocks from 0 to rate, else with mean 1."""
    rates = torch.linspace(0, rate, len(u))[:, None, None]
    return ((u >= rates) / (1 - rates))[..., None, None]


# ---- 4. Optimiser and schedules
def parameter_groups(model):
    """For AdamW: matrices, mask token and position biases, which decay; vectors and cls token."""
    cls = model.encoder.cls_token
    weights = [p for p in model.parameters() if p.ndim > 1 and p is not cls]
    others = [p for p in model.parameters() if p.ndim <= 1 or p is cls]
    return [dict(params=weights), dict(params=others, weight_decay=0.0)]


def schedule(step, epoch_steps, args):
    """Learning rate and EMA of update `step` (from 0).

    The rate rises from 0 to its peak, which the last step of the warm-up and the next both have,
    then follows a cosine towards --final-lr. The EMA goes straight from its first value to its
    last within --ema-anneal epochs."""
    warmup = int(args.warmup * epoch_steps)
    steps = args.epochs * epoch_steps
    if step < warmup:
        lr = args.lr * step / max(warmup - 1, 1)
    else:
        progress = (step - warmup) / max(steps - warmup, 1)
        lr = args.final_lr + (args.lr - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    anneal = int(args.ema_anneal * epoch_steps)
    annealed = min(step / anneal, 1) if anneal else 1
    first, last = args.ema
    return dict(lr=lr, ema=first + annealed * (last - first))


# ---- 5. Views
def data2vec_inputs(crops, args, device):
    """Coloured and normalised images (B, 3, H, W), and the factors of stochastic depth, or None.

    crops (1, B, 3, H, W) uint8."""
    images = crops[0].to(device, non_blocking=True).float() / 255
    jitter_some(images, 1, args.jitter, probability=1.0)
    paths = None
    if args.drop_path:
        B = len(images)
        u = torch.rand(args.depth, 2, B * world_size())[..., own_part(B)]
        paths = drop_paths(u, args.drop_path).to(device, non_blocking=True)
    return normalise(images, args.standardise), paths


class CroppedViews(Dataset):
    """Crops of this process's share of a global batch, flipped at random.

    Item (step, indices): for each (V, size, area) in `sizes` a uint8 (V, B, 3, size, size), in a
    list. area: fraction of the image, from to. Random numbers follow from seed, step and position
    in the batch of all processes, so they do not depend on the number of processes."""

    def __init__(self, images, sizes, args):
        self.images = images
        self.sizes = sizes
        self.args = args
        self.own = own_part(args.batch_size // world_size())

    def __getitem__(self, item):
        step, indices = item
        if torch.is_tensor(self.images):
            return self.crop_tensors(step, self.images[indices])
        return self.crop_files(step, [self.images[i] for i in indices])

    def crop_tensors(self, step, images):
        """All images (B, C, H, H) at once; grey ones have a single channel."""
        torch.default_generator.manual_seed(hash((self.args.seed, step, 0)))
        views = []
        for V, size, area in self.sizes:
            u = torch.rand(V, self.args.batch_size, 10, 4)[:, self.own]
            crops = torch.stack([crop_batch(images, one, area, size, self.args.flip) for one in u])
            crops = crops.expand(-1, -1, 3, -1, -1)
            views.append(crops.contiguous())  # else memory cannot be pinned for a GPU
        return views

    def crop_files(self, step, paths):
        """One image after another: they differ in size."""
        flip = v2.RandomHorizontalFlip(self.args.flip)
        images = []
        for position, path in enumerate(paths, self.own.start):
            image = read_image(path)  # (3, H, W)
            torch.default_generator.manual_seed(hash((self.args.seed, step, 0, position)))
            views = []
            for V, size, area in self.sizes:
                crop = v2.RandomResizedCrop(size, area)
                views.append(torch.stack([flip(crop(image)) for _ in range(V)]))
            images.append(views)
        return [torch.stack(crops, dim=1) for crops in zip(*images)]


def crop_batch(images, u, area, size, flip):
    """RandomResizedCrop and flip of square images, all at once, by bilinear sampling.

    images (B, C, H, H) uint8, u (B, 10, 4) uniform: ten tries, as torchvision, for a box that
    fits, of `area` (fraction of the image) and aspect 3/4 to 4/3 -> (B, C, size, size) uint8."""
    share = area[0] + (area[1] - area[0]) * u[..., 0]  # (B, 10)
    aspect = (4 / 3) ** (2 * u[..., 1] - 1)
    tries = torch.stack([share * aspect, share / aspect], dim=2).sqrt()  # (B, 10, 2) of the side
    first = (tries <= 1).all(dim=2).int().argmax(dim=1)  # if none fits, the first, cut to the image
    sides = tries[torch.arange(len(u)), first].clamp(max=1)  # (B, 2): width, height
    centre = (2 * u[:, 0, 2:] - 1) * (1 - sides)  # in [-1, 1]
    sides[:, 0] *= torch.where(u[:, 1, 2] < flip, -1, 1)
    pixel = (2 * torch.arange(size) + 1) / size - 1  # their centres, in [-1, 1]
    places = centre[:, :, None] + sides[:, :, None] * pixel  # (B, 2, size)
    columns = places[:, 0, None, :].expand(-1, size, -1)
    rows = places[:, 1, :, None].expand(-1, -1, size)
    grid = torch.stack([columns, rows], dim=3)  # (B, size, size, 2)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return crops.round().byte()


def uniform(V, B, *shape):
    """Random numbers from 0 to 1 for V views of this process's B images, (V * B, *shape). They are
    drawn for the batch of all processes, so they do not depend on the number of processes."""
    return torch.rand(V, B * world_size(), *shape)[:, own_part(B)].flatten(0, 1)


def jitter_some(image, V, strengths, probability):
    """Jitter the colours of some of V views of B images (V * B, 3, H, W), in place. strengths: of
    brightness, contrast, saturation, hue, which come in one random order for all images."""
    B = len(image) // V
    shifts = torch.tensor(strengths) * (2 * uniform(V, B, 4) - 1)  # (V * B, 4)
    order = [kind for kind in torch.randperm(4).tolist() if strengths[kind] > 0]
    jitter = functools.partial(jitter_colours, order=order)
    change_some(image, uniform(V, B) < probability, jitter, shifts)


def change_some(image, chosen, change, *numbers):
    """Replace the chosen images of (B, 3, H, W) by change(images, *numbers of these), in place.

    chosen (B,) and numbers (B, ...) are on the CPU, so that nobody waits for a GPU. A CPU takes
    them in groups that fit its cache."""
    chosen = chosen.nonzero()[:, 0]
    if len(chosen) == 0:
        return
    group = len(chosen) if image.is_cuda else max(2**18 // image[0].numel(), 1)
    for part in chosen.split(group):
        values = [x[part].to(image.device, non_blocking=True) for x in numbers]
        part = part.to(image.device, non_blocking=True)
        image[part] = change(image.index_select(0, part), *values)


def jitter_colours(image, shifts, order):
    """Change (B, 3, H, W) in [0, 1]: 0 brightness, 1 contrast, 2 saturation, 3 hue, in this order.

    shifts (B, 4): by how much, 0: not at all; of the hue as a fraction of the circle."""
    for kind in order:
        shift = shifts[:, kind].view(-1, 1, 1, 1)
        if kind == 3:
            image = adjust_hue(image, shift)
            continue
        factor = (1 + shift).clamp(min=0)
        changed = factor * image
        if kind == 1:
            changed += (1 - factor) * greyscale(image.mean(dim=(2, 3), keepdim=True))
        if kind == 2:
            changed += (1 - factor) * greyscale(image)
        image = changed.clamp_(0, 1)
    return image


def greyscale(image):
    """(B, 3, H, W) -> (B, 1, H, W), with torchvision's weights."""
    r, g, b = image.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def adjust_hue(image, shift):
    """Turn the hue by `shift`, a fraction of the circle, through HSV and back."""
    value = image.amax(dim=1, keepdim=True)
    chroma = value - image.amin(dim=1, keepdim=True)
    r, g, b = image.split(1, dim=1)
    sixth = (r - g + 4 * chroma).lerp(b - r + 2 * chroma, (value == g).float())
    sixth = sixth.lerp(g - b, (value == r).float())  # hue x chroma, in sixths of the circle
    hue = sixth / (6 * chroma.clamp(min=1e-12)) + shift
    channel = torch.arange(5, 0, -2, device=image.device).view(3, 1, 1) / 6  # 5/6, 3/6, 1/6
    k = hue + channel  # (B, 3, H, W), in place from here on
    k -= k.floor()  # faster than %
    k.mul_(6).sub_(2).abs_()
    return value - chroma * (2 - k).clamp_(0, 1)


def normalise(image, standardise):
    """(B, 3, H, W) in [0, 1] -> the network's input, by each image's own numbers or ImageNet's."""
    if standardise:
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (deviation + 1e-3)
    # Not by TF.normalize, which waits for the GPU.
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    mean, deviation = imagenet.to(image.device, non_blocking=True).view(2, 3, 1, 1)
    return (image - mean).div_(deviation)


# ---- 6. Training
def data2vec_step(model, target, optimizer, images, mask, paths, rates, args):
    """One update in the official order: clip, step, move the target.

    images (B, 3, H, W); mask (B, N); paths: see drop_paths, None: all; rates: see schedule.
    Returns metrics {name: scalar tensor of this process}."""
    for group in optimizer.param_groups:
        group["lr"] = rates["lr"]

    with torch.no_grad():  # of the whole image, without noise, in float32, as official
        y = data2vec_targets(target.encoder(images), args.top_k)[mask]  # (M, D)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
        pred = model(images, mask, paths, args.attention_dropout)
    masked = torch.full((), float(len(y)), device=images.device)  # patches, by this process
    masked_by_all = masked.clone()
    if dist.is_initialized():
        dist.all_reduce(masked_by_all)
    share = masked * world_size() / masked_by_all  # DDP's mean is then that of all patches
    loss = data2vec_loss(pred, y, args.beta) * share

    optimizer.zero_grad()
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 1 - rates["ema"])

    target_std = y.std(dim=0).mean()  # over patches: 0 if all targets are the same
    return dict(loss=loss, target_std=target_std, gradient_norm=gradient_norm)


def train(args, device):
    """Train data2vec. Run continues, logs, saves and stops; the method is data2vec_step."""
    images, sampler = training_data(args)
    torch.manual_seed(args.seed)  # the same initial weights on every process
    encoder = BeiT(
        args.image_size, args.patch_size, args.dim, args.depth, args.heads, args.layer_scale
    )
    anchor = Data2Vec(encoder, args.dim).to(device)
    target = copy.deepcopy(anchor).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        parameter_groups(anchor),
        lr=0.0,  # set at every update
        weight_decay=args.weight_decay,
        fused=True,
    )
    parts = dict(anchor=anchor, target=target, encoder=target.encoder, optimizer=optimizer)
    run = Run("data2vec", parts, sampler, args)
    model = DistributedDataParallel(anchor, gradient_as_bucket_view=True)
    if device.type == "cuda":  # high: TensorFloat-32, without which the target takes half the time
        torch.set_float32_matmul_precision("high" if args.bf16 else "highest")

    views = CroppedViews(images, [(1, args.image_size, args.crop)], args)
    dataset = MaskedViews(views, args)
    for step, (crops, mask) in run.steps(batch_loader(dataset, sampler, run, args)):
        images, paths = data2vec_inputs(crops, args, device)
        mask = mask.to(device, non_blocking=True)
        rates = schedule(step, len(sampler), args)
        torch.manual_seed(hash((args.seed, step, 3, rank())))  # dropout is each process's own
        metrics = data2vec_step(model, target, optimizer, images, mask, paths, rates, args)
        if step == 0:
            draw_views([images[None]], run.out, normalised=True)
        run.log(metrics, rates)


def main(argv=None):
    args = parse_args(argv)
    with process_group() as device:
        train(args, device)


# ======== Plumbing. Nothing below is about the method; scripts share it to the letter.
# ---- Options
def fail(message):
    """Wrong input: one line on stderr, exit status 2. The first process of a machine speaks; the
    others would in three seconds, but torchrun ends them when one has left."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)
    line = f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " ")
    print(line, file=sys.stderr, flush=True)
    sys.exit(2)


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give a number {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse's own message has it
    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 1e-12)
nonnegative = number(float, 0)
fraction = number(float, 0, 1)


def option_parser(doc, out, recipes):
    """A parser with the options that all scripts share; `doc` is the script's docstring."""
    p = argparse.ArgumentParser(
        description=(doc or "").split("\n\n")[0],  # python -OO has none
        epilog="Defaults are the paper's, for folders of images. --recipe replaces some of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.error = fail
    g = p.add_argument_group("run")
    g.add_argument("--data", type=os.path.expanduser, default="plates",
                   help="plates, cifar10, cifar100 or a folder with train/CLASS/IMAGE")  # fmt: skip
    g.add_argument("--recipe", choices=recipes, help="None: that of --data; folders: paper")
    g.add_argument("--k-classes", type=positive_int, help="classes in every batch; None: any")
    g.add_argument("--long-tail", type=nonnegative, default=0.0,
                   help="exponent of a power law of class sizes; 0: as they are")  # fmt: skip
    g.add_argument("--steps", type=positive_int, help="updates in all; None: all of --epochs")
    g.add_argument("--out", type=os.path.expanduser, default=out,
                   help="folder of checkpoint, log and pictures")  # fmt: skip
    g.add_argument("--seed", type=count, default=0, help="of weights, batches and views")
    g.add_argument("--workers", type=count, help="processes that read files; None: a core each")
    g.add_argument("--log-every", type=positive_int, default=50, help="updates; fewer at first")
    g.add_argument("--save-minutes", type=positive, default=2.0, help="between checkpoints")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                   default=torch.cuda.is_available(), help="autocast to bfloat16")  # fmt: skip
    return p


def parse_with_recipe(parser, argv, recipes):
    """Parse twice: the recipe's values become the defaults of what the user leaves open."""
    first, _ = parser.parse_known_args(argv)
    name = first.recipe or (first.data if first.data in recipes else "paper")
    parser.set_defaults(recipe=name, **recipes[name])
    return parser.parse_args(argv)


# ---- Data
def training_data(args):
    """The images, uint8 (N, C, H, W) or N paths, and the sampler of their batches."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine: it downloads CIFAR
    try:
        if not first:
            dist.barrier()
        images, labels = open_data(args.data, "train", args.long_tail, args.seed)
        if first:
            dist.barrier()
        classes = next(iter(labels.values()))
        return images, KClassBatchSampler(
            classes, args.batch_size, args.k_classes, rank=rank(), world_size=world_size(),
            seed=args.seed,
        )  # fmt: skip
    except ValueError as error:
        options = f"--data {args.data} --batch-size {args.batch_size}"
        fail(f"{options} --k-classes {args.k_classes}: {error}")


def batch_loader(dataset, sampler, run, args):
    """The dataset's items (step, indices) of the updates that are left."""
    workers = args.workers
    if workers is None:
        workers = 0 if args.data in IN_MEMORY else cores_of_process()
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches(sampler, run.step, run.last),
        num_workers=workers,
        collate_fn=share_memory,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
    )


def batches(sampler, start, last):
    """Yield (step, indices) of the updates start to last - 1, epoch after epoch."""
    for epoch in itertools.count(start // len(sampler)):
        sampler.set_epoch(epoch)
        for step, indices in enumerate(sampler, epoch * len(sampler)):
            if step == last:
                return
            if step >= start:
                yield step, indices


def cores_of_process():
    """Those that this job may use on this machine, shared out among its processes."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_memory(views):
    """In a loader process: if /dev/shm is full it fails here; later on it would hang."""
    if get_worker_info():
        views = [view.share_memory_() for view in views]
    return views


def ignore_signals(worker):
    """A loader process goes on while its run, which has got the same signal, ends an update."""
    for number in warnings_of_end():
        signal.signal(number, signal.SIG_IGN)


# ---- Processes
@contextlib.contextmanager
def process_group():
    """Join torchrun's processes, or be a group of one; leave it at the end, whatever happens.

    Yields this process's device. One process is a world of size one: there is no other path."""
    if sys.platform == "linux":  # glibc shall keep freed memory: giving it back took half the time
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if len(tempfile.gettempdir()) > 70:  # TMPDIR: too long a name for loader processes' sockets
        tempfile.tempdir = "/tmp"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if alone and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        fail("srun starts this script several times: let each srun task start torchrun instead")
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    try:
        yield device
    except Unreadable as error:  # from a loader process it comes with a traceback
        fail(str(error).strip().split("Unreadable: ")[-1])
    finally:
        end_loader_processes()
        dist.destroy_process_group()


def end_loader_processes():
    """What is left of them after a failure ignores milder signals, and Python would wait for it."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for child in children:
        if child.daemon:
            child.kill()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def own_part(B):
    """Where this process's B images are in the batch of all processes."""
    return slice(rank() * B, (rank() + 1) * B)


# ---- A run in its folder
class Run:
    """A run's folder: where the run continues, its log, its checkpoints, and when it stops.

    run = Run("simclr", dict(simclr=model, optimizer=optimizer), sampler, args)
    for step, batch in run.steps(batch_loader(dataset, sampler, run, args)):
        run.log(metrics, rates)
    """

    MAY_CHANGE = ("data", "out", "steps", "workers", "log_every", "save_minutes")  # on continuing
    FIRST_LINES = (1, 2, 5, 10, 20)  # steps that are logged besides every --log-every
    INDICATORS = ("information", "embedding_std", "target_std")  # 0: all images look the same

    def __init__(self, script, parts, sampler, args):
        """Continue from the checkpoint, if there is one. parts: what it holds, network first."""
        self.parts = parts
        self.args = args
        self.out = Path(args.out)
        self.checkpoint = self.out / "checkpoint.pt"
        self.options = dict(script=script, images=len(sampler.labels)) | vars(args)
        self.epoch_steps = len(sampler)
        self.horizon = args.epochs * self.epoch_steps
        self.last = min(args.steps or self.horizon, self.horizon)
        self.step = 0  # updates made
        self.metrics = []  # of the updates since the last line of the log
        self.line = {}  # that one
        self.received = 0  # the number of the signal that this process got
        if rank() == 0:
            self.lock_folder()
        self.restore()
        if rank() == 0:
            network = next(iter(parts.values()))
            trained = [p for p in network.parameters() if p.requires_grad]
            start = f"continues after step {self.step:,}" if self.step else "new"
            print(f"{script}: {args.data}, {sampler.describe(self.last)}; {args.epochs} epochs, "
                  f"{self.horizon:,} steps; {sum(p.numel() for p in trained):,} parameters; "
                  f"{trained[0].device.type}, processes: {world_size()}; {self.out}, {start}",
                  flush=True)  # fmt: skip

    def lock_folder(self):
        """Make the folder; refuse it if another run writes there."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / "options.json").open("a")
        except OSError as error:
            fail(f"--out {self.out}: not writable ({error}): choose another")
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except BlockingIOError:
            fail(f"--out {self.out}: another run writes there: choose another")
        except OSError as error:
            print(f"--out {self.out}: its disk has no locks ({error}): start no second run there")

    def restore(self):
        """Load the parts from the checkpoint; cut off what a killed run logged after it."""
        log_size = 0
        if self.checkpoint.exists():
            try:
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
                there = state["options"]
            except Exception as error:  # torch raises many kinds for damaged files
                kind = type(error).__name__
                fail(f"{self.checkpoint}: damaged or foreign ({kind}): move it or change --out")
            made = [x for x in there.items() if x not in self.options.items()]
            made = [f"{name} {value}" for name, value in made if name not in self.MAY_CHANGE]
            if made:
                fail(f"--out {self.out}: its run has {', '.join(made)}: give that or another --out")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = state["step"]
            log_size = state["log_size"]
        seen = [None] * world_size()
        dist.all_gather_object(seen, (self.step, self.options["images"]))
        if len(set(seen)) > 1:
            fail(f"--out {self.out}, --data {self.args.data}: processes see different steps and "
                 f"numbers of images, {sorted(set(seen))}: share the folders")  # fmt: skip
        if rank() == 0:
            self.lock.truncate(0)
            self.lock.write(json.dumps(self.options, indent=1) + "\n")
            self.lock.flush()
            with (self.out / "log.jsonl").open("a") as log:
                log.truncate(log_size)

    def steps(self, loader):
        """Yield (step, batch) of the updates that are left; save on the way and at the end.

        A signal that warns of the end stops it after the present update, with exit status 128 + its
        number. What fails between two updates, such as a picture, is raised after saving."""
        handlers = {number: signal.signal(number, self.stop_soon) for number in warnings_of_end()}
        hidden = None if rank() == 0 else True  # None: unless it is a terminal
        self.bar = tqdm(total=self.last, initial=self.step, unit="step", disable=hidden)
        start = self.save_time = self.line_time = time.time()
        self.line_step = self.step
        items = iter(loader)
        while self.step < self.last:
            batch = self.next_batch(items)
            if self.stop_signal:
                break
            torch.manual_seed(hash((self.args.seed, self.step, 1)))  # the same after a restart
            yield self.step, batch
        self.save()
        self.bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if self.step < self.last:
            if rank() == 0:
                print(f"stopped after step {self.step} of {self.last}, saved in {self.checkpoint}; "
                      "the same command continues")  # fmt: skip
            sys.exit(128 + self.stop_signal)
        if rank() == 0:
            minutes = (time.time() - start) / 60
            print(f"{self.step} steps, {minutes:.1f} minutes: {self.checkpoint}\n"
                  f"next: python linear_eval.py {self.checkpoint}")  # fmt: skip
            for name in self.INDICATORS:
                if self.step == self.horizon and self.line.get(name, 1) < 0.02:
                    print(f"warning: collapse: {name} is {self.line[name]:.2g}: lower the rate")

    def next_batch(self, items):
        """The next item. What fails is raised when all is saved."""
        try:
            batch = next(items)
        except Exception:  # a picture, a loader process, the data's disk
            self.agree(failed=True)
            raise
        self.agree(failed=False)
        return batch

    def agree(self, failed):
        """Between two updates processes agree: whether to save, and whether to stop, because one
        has got a signal, or has failed."""
        due = rank() == 0 and time.time() - self.save_time > 60 * self.args.save_minutes
        wishes = torch.tensor([self.received, due, failed], dtype=torch.int)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        self.stop_signal, due, one_failed = wishes.tolist()
        if due or one_failed:
            self.save()
        if one_failed:
            self.bar.close()
            if not failed:
                time.sleep(10)  # that process says why, and torchrun ends the others
                sys.exit("another process has failed")

    def stop_soon(self, number, _):
        """Stop after this update. A second Ctrl-C stops at once."""
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def log(self, metrics, rates):
        """Count an update, and write a line of the log if it is time.

        metrics {name: scalar tensor}: the line has their means over updates since the last line and
        over processes. rates {name: number}: the line has the last."""
        self.step += 1
        self.metrics.append(torch.stack([*metrics.values()]).detach())
        self.names = list(metrics)
        self.rates = rates
        self.bar.update()
        if self.step in self.FIRST_LINES or self.step % self.args.log_every == 0:
            self.write_line()  # at other steps nothing waits for a GPU

    def write_line(self):
        """Append to log.jsonl; show the loss in the bar, or the line if there is no terminal."""
        values = torch.stack(self.metrics).double()  # (updates, metrics)
        dist.all_reduce(values)
        values = values.cpu() / world_size()
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            self.bar.close()
            step = self.step - len(finite) + 1 + finite.int().argmin().item()
            fail(f"the loss is not finite at step {step}: lower the learning rate")
        now = time.time()
        images = len(self.metrics) * self.args.batch_size
        line = dict(step=self.step, epoch=(self.step - 1) // self.epoch_steps) | self.rates
        line |= zip(self.names, values.mean(dim=0).tolist())
        line["images_per_second"] = images / (now - self.line_time)
        self.line = line
        self.metrics = []
        self.line_time = now
        if rank() > 0:
            return
        with (self.out / "log.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        with contextlib.suppress(OSError):  # a terminal that is gone must not end the run unsaved
            self.bar.set_postfix(loss=f"{line['loss']:.4g}")
            if self.bar.disable:
                print(*[f"{name} {x:.4g}" for name, x in line.items()], flush=True)

    def save(self):
        """Write the checkpoint under another name, then rename it: a kill leaves no half file."""
        if self.metrics:
            self.write_line()  # it finds a loss that is not finite
        self.save_time = time.time()
        if rank() == 0:
            log_size = (self.out / "log.jsonl").stat().st_size
            state = dict(options=self.options, step=self.step, log_size=log_size)
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            with (self.out / "checkpoint.partial").open("wb") as file:
                torch.save(state, file)
            os.replace(self.out / "checkpoint.partial", self.checkpoint)


def warnings_of_end():
    """Signals that say that the end is near, if this system has them and nohup ignores them not."""
    names = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
    known = [number for number in signal.Signals if number.name in names]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def draw_views(groups, out, normalised):
    """views.png: the first eight images as the network gets them, a row for each view.

    groups: a (V, B, 3, H, W) for each size of view; smaller ones are enlarged."""
    size = groups[0].shape[-2:]
    rows = [F.interpolate(view[:8], size) for group in groups for view in group]
    if rank() == 0:
        options = dict(normalize=normalised, scale_each=normalised)
        save_image(torch.cat(rows), out / "views.png", nrow=8, **options)


if __name__ == "__main__":
    main()
