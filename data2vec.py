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
import errno
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from sampler import IN_MEMORY, KClassBatchSampler, open_data

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
        patch_size=8, num_masked=9, min_block=2,
        crop=[0.6, 1.0], flip=0.0, jitter=[0.0, 0.0, 0.0, 0.0], standardise=True,
        batch_size=960, epochs=3, warmup=0.33, lr=3e-3, ema_anneal=1.7,
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
    g.add_argument("--crop", type=fraction, action=FromTo, default=[0.08, 1.0], help="of the area")
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
        self.images = views.images
        self.grid_size = args.image_size // args.patch_size
        self.num_masked = args.num_masked
        self.min_block = args.min_block

    def __getitem__(self, item):
        crops = self.views[item]
        if isinstance(crops, str):  # what could not be read
            return crops
        step, indices = item
        first = self.views.rank * len(indices)  # of the batch of all processes
        masks = []
        for position in range(first, first + len(indices)):
            rng = random.Random(hash((self.views.seed, step, 2, position)))
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


# ---- 5. Training
def data2vec_inputs(crops, args, device):
    """Coloured and normalised images (B, 3, H, W), and the factors of stochastic depth, or None.

    crops (1, B, 3, H, W) uint8. Random numbers are drawn for the batch of all processes, of which
    each takes its own part: the result does not depend on the number of processes."""
    B = crops.shape[1]
    u = torch.rand(B * world_size(), 8)[own_part(B)]
    images = jitter_colours(
        crops[0].to(device, non_blocking=True).float() / 255,
        strengths=args.jitter,
        chosen=torch.ones(B, dtype=torch.bool),
        amounts=u[:, :4],
        order=u[:, 4:].argsort(dim=1),
    )
    paths = None
    if args.drop_path:
        u = torch.rand(args.depth, 2, B * world_size())[..., own_part(B)]
        paths = drop_paths(u, args.drop_path).to(device, non_blocking=True)
    return normalise(images, args.standardise), paths


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
    with all_or_none():
        run = Run("data2vec", args, device)
        images, classes = training_set(args)
        run.check_data(images, classes)
        sampler = batch_sampler(classes, args)

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
    run.restore(sampler, anchor=anchor, target=target, encoder=target.encoder, optimizer=optimizer)
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


# ======== Plumbing: the same, to the letter, in every script. Nothing below is about the method.
# ---- Options
def fail(message, everywhere=False):
    """Bad input: one line on stderr and exit status 2. Process 0 speaks for all, or `everywhere`
    each for itself."""
    if everywhere or os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
        line = f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " ")
        print(line, file=sys.stderr, flush=True)
    sys.exit(2)


class Refusal(ValueError):
    """Bad input, found by one process or by all: see all_or_none. Its text is what fail prints."""


def option_number(kind, text, low, high, expected):
    """The number in `text`, an option's value. argparse turns the error into one line."""
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text}: give {expected}")
    return number


def positive_int(text):
    expected = "a whole number of at least 1, at most 2147483647"
    return option_number(int, text, low=1, high=2**31 - 1, expected=expected)


def count(text):
    return option_number(int, text, low=0, high=2**63, expected="a whole number from 0 to 9.2e+18")


def positive(text):
    expected = "a number above 0 (at least 1e-12)"
    return option_number(float, text, low=1e-12, high=1e300, expected=expected)


def nonnegative(text):
    return option_number(float, text, low=0, high=1e300, expected="a number of at least 0")


def fraction(text):
    return option_number(float, text, low=0, high=1, expected="a number from 0 to 1")


class FromTo(argparse.Action):
    """Two numbers, the smaller one first."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=2, **options)

    def __call__(self, parser, args, values, flag=None):
        start, end = values
        if start > end:
            parser.error(f"{flag} {start:g} {end:g}: give the smaller number first")
        setattr(args, self.dest, values)


def refuse_option(message):
    """argparse's complaint, as a line that begins with the option."""
    message = re.sub(r"^argument (\S+): ", r"\1 ", message)
    fail(message if "give" in message or "choose" in message else f"{message}: see --help")


def option_parser(doc, out, recipes):
    """A parser with the options that all scripts share; `doc` is the script's docstring."""
    p = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        epilog="Defaults are the paper's, for folders of images. --recipe replaces some of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.error = refuse_option
    g = p.add_argument_group("run")
    g.add_argument("--data", default="plates",
                   help="plates, cifar10, cifar100 or a folder with train/CLASS/IMAGE")  # fmt: skip
    g.add_argument("--recipe", choices=recipes, help="None: that of --data; folders: paper")
    g.add_argument("--k-classes", type=positive_int,
                   help="distinct classes in every batch; None: any; raises a recipe's batch "
                        "size that cannot hold them")  # fmt: skip
    g.add_argument("--long-tail", type=nonnegative, default=0.0,
                   help="exponent of a power law of class sizes; 0: as they are")  # fmt: skip
    g.add_argument("--steps", type=positive_int, help="updates in all; None: all of --epochs")
    g.add_argument("--out", default=out, help="folder of checkpoint, log and pictures")
    g.add_argument("--seed", type=count, default=0, help="of weights, batches and views")
    g.add_argument("--workers", type=count,
                   help="loader processes; None: a core each, 0 for data in memory")  # fmt: skip
    g.add_argument("--log-every", type=positive_int, default=50, help="updates; fewer at first")
    g.add_argument("--save-minutes", type=positive, default=5.0,
                   help="between checkpoints; 1 for data in memory")  # fmt: skip
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                   default=torch.cuda.is_available(), help="autocast to bfloat16")  # fmt: skip
    return p


def parse_with_recipe(parser, argv, recipes):
    """Parse twice: the recipe's values become the defaults of what the user leaves open."""
    first, _ = parser.parse_known_args(argv)
    name = first.recipe or (first.data if first.data in recipes else "paper")
    parser.set_defaults(recipe=name, **recipes[name])
    if first.data in IN_MEMORY:  # a run of minutes
        parser.set_defaults(save_minutes=1.0)
    batch_size = parser.get_default("batch_size")
    if (first.k_classes or 0) > batch_size:
        parser.set_defaults(batch_size=math.ceil(first.k_classes / 128) * 128)
    return parser.parse_args(argv)


def option_flag(name, value):
    """An option as one types it."""
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return f"no {flag}"
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-")
    if isinstance(value, list):
        return " ".join([flag, *map(str, value)])
    return f"{flag} {value}"


# ---- Data
def training_set(args):
    """The images, uint8 (N, C, H, W) or N paths, and their classes (N,), with --long-tail."""
    try:
        with one_process_first(needed=args.data.startswith("cifar")):  # it may have to download
            images, labels = open_data(args.data, "train", args.long_tail, args.seed)
    except ValueError as error:
        raise Refusal(f"--data {error}") from None
    if not torch.is_tensor(images):
        read_image(images[0])  # what cannot be read is refused now, not within the first epoch
    classes = next(iter(labels.values())).numpy()
    return images, classes


def batch_sampler(classes, args):
    """Batches of --k-classes classes, or of any."""
    try:
        return KClassBatchSampler(
            classes,
            args.batch_size,
            args.k_classes,
            rank=rank(),
            world_size=world_size(),
            seed=args.seed,
        )
    except ValueError as error:
        wanted = f"--batch-size {args.batch_size}"
        if args.k_classes:
            wanted += f", --k-classes {args.k_classes}"
        raise Refusal(f"{wanted}: {error}") from None


def batch_loader(dataset, sampler, run, args):
    """The batches of the run's updates that are left, by loader processes if data are files."""

    def items():
        start = run.step
        for epoch in range(start // len(sampler), math.ceil(run.last / len(sampler))):
            sampler.set_epoch(epoch)
            first = epoch * len(sampler)
            batches = enumerate(sampler, first)  # (step, indices)
            yield from itertools.islice(batches, max(start - first, 0), run.last - first)

    workers = args.workers
    if workers is None:
        workers = 0 if torch.is_tensor(dataset.images) else cores_of_process()
    if workers:
        gc.collect()  # an earlier run in this process: a forked process cannot end its threads
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=items(),
        num_workers=workers,
        collate_fn=share_memory,
        worker_init_fn=functools.partial(begin_loader, os.getpid()),
        pin_memory=torch.cuda.is_available(),
    )


def cores_of_process():
    """Those that this job may use on this machine, shared out among its processes."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_memory(item):
    """Put an item's tensors into shared memory, in the loader process, which can say if it is full.

    torch's own way is to do it later, in a thread whose failure nobody sees."""
    if get_worker_info() is None or isinstance(item, str):
        return item
    try:
        for x in item if isinstance(item, list) else [item]:
            x.share_memory_()
        return item
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return (
            f"--workers: shared memory, /dev/shm, is full ({reason}): give fewer, or 0, or a "
            "larger /dev/shm (docker run --shm-size=8g)"
        )


def begin_loader(main, worker):
    """A loader process goes on at Ctrl-C and at a first SIGTERM, while process `main` finishes its
    update; it ends with main."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, outlive_sigterm)
    if hasattr(os, "nice"):
        os.nice(10)  # where there are few cores, the threads of main go first
    if os.getppid() != main:  # forkserver: torch would not notice
        threading.Thread(target=end_with, args=(main,), daemon=True).start()


def outlive_sigterm(number, _):
    """Ignore SIGTERM, also its echo within a second; see Run.stop_soon."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, obey_sigterm)
    signal.alarm(1)


def obey_sigterm(number, _):
    """From now on SIGTERM ends this process, and five minutes do in any case."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(300)


def end_with(main):
    """End this process soon after another one."""
    while True:
        time.sleep(5)
        try:
            os.kill(main, 0)  # sends nothing
        except ProcessLookupError:
            os._exit(1)


class CroppedViews(Dataset):
    """Crops of this process's share of a global batch, flipped at random.

    Item (step, indices): for each (views, size, area) in `sizes` a uint8 (V, B, 3, size, size), in
    a list; or a message if a file cannot be read. area: fraction of the image, from to. Random
    numbers follow from seed, step and position in the batch of all processes."""

    def __init__(self, images, sizes, args):
        self.images = images
        self.sizes = sizes
        self.flip = args.flip
        self.seed = args.seed
        self.rank = rank()
        self.world_size = world_size()

    def __getitem__(self, item):
        step, indices = item
        first = self.rank * len(indices)  # of the batch of all processes
        if torch.is_tensor(self.images):
            return self.crop_tensors(step, indices, first)
        try:
            return self.crop_files(step, indices, first)
        except Refusal as refusal:
            return str(refusal)

    def crop_tensors(self, step, indices, first):
        """All images at once."""
        B = len(indices)
        images = self.images[indices]  # (B, C, H, H); grey ones have a single channel
        torch.default_generator.manual_seed(hash((self.seed, step, 0)))
        views = []
        for V, size, area in self.sizes:
            u = torch.rand(V, B * self.world_size, 10, 4)[:, first : first + B]
            crops = torch.stack([crop_batch(images, one, area, size, self.flip) for one in u])
            crops = crops.expand(-1, -1, 3, -1, -1)
            views.append(crops.contiguous())  # else memory cannot be pinned for a GPU
        return views

    def crop_files(self, step, indices, first):
        """One image after another: they differ in size."""
        images = []
        for position, index in enumerate(indices, first):
            image = read_image(self.images[index])
            torch.default_generator.manual_seed(hash((self.seed, step, 0, position)))
            images.append([self.crop_image(image, *size) for size in self.sizes])
        return [torch.stack(views, dim=1) for views in zip(*images)]

    def crop_image(self, image, V, size, area):
        """V crops of an image (3, H, W) -> (V, 3, size, size)."""
        crop = v2.RandomResizedCrop(size, area)
        flip = v2.RandomHorizontalFlip(self.flip)
        return torch.stack([flip(crop(image)) for _ in range(V)])


def crop_batch(images, u, area, size, flip):
    """RandomResizedCrop and flip of square images, all at once, by bilinear sampling.

    images (B, C, H, H) uint8, u (B, 10, 4) uniform: ten tries, as torchvision, for a box that
    fits, of `area` (fraction of the image) and aspect 3/4 to 4/3 -> (B, C, size, size) uint8."""
    share = area[0] + (area[1] - area[0]) * u[..., 0]  # (B, 10)
    aspect = (4 / 3) ** (2 * u[..., 1] - 1)
    widths = (share * aspect).sqrt()  # fractions of the image's side
    heights = (share / aspect).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)  # if none fits, the first, cut to the image
    width = widths.gather(1, first)[:, 0].clamp(max=1)  # (B,)
    height = heights.gather(1, first)[:, 0].clamp(max=1)
    x = (2 * u[:, 0, 2] - 1) * (1 - width)  # the box's centre, in [-1, 1]
    y = (2 * u[:, 0, 3] - 1) * (1 - height)
    width = torch.where(u[:, 1, 2] < flip, -width, width)
    pixel = (2 * torch.arange(size) + 1) / size - 1  # their centres, in [-1, 1]
    columns = x[:, None] + width[:, None] * pixel  # (B, size)
    rows = y[:, None] + height[:, None] * pixel
    columns = columns[:, None, :].expand(-1, size, -1)
    rows = rows[:, :, None].expand(-1, -1, size)
    grid = torch.stack([columns, rows], dim=3)  # (B, size, size, 2)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return crops.round().byte()


def read_image(path):
    """An image file -> (3, H, W) uint8, upright. Raises Refusal for a file that Pillow cannot read,
    and for 32-bit or floating-point pixels, of which nobody knows what is white.

    Of 16 bits of grey the upper 8 are used, as Pillow does with 16 bits of a colour."""
    try:
        with Image.open(path) as image:
            image.load()
            sixteen_bits = image.mode.startswith("I;16")
            if image.mode == "I" and image.format in ("PNG", "PPM"):  # these hold 16 bits at most
                sixteen_bits = True
            if image.mode in ("I", "F") and not sixteen_bits:
                raise ValueError(f"mode {image.mode} has no white: convert it to 8 or 16 bits")
            has_alpha = "transparency" in image.info
            turn = orientation(image)
            upright = image if turn is None else image.transpose(turn)
            if sixteen_bits:
                grey = torch.from_numpy(np.array(upright, dtype=np.int32) // 256)
                return grey.byte().expand(3, -1, -1)
            if has_alpha:
                upright = upright.convert("RGBA")
            if upright.mode != "RGB":  # convert would copy it all the same
                upright = upright.convert("RGB")
            return TF.pil_to_tensor(upright)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise Refusal(f"{path}: unreadable image ({error}): fix or remove it") from None


def orientation(image):
    """How to turn an image upright by its EXIF tag; None: not at all, or the tag is broken."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(0x0112))
    except Exception:  # many kinds; the picture itself is fine
        return None


# ---- Colours
def change_some(image, chosen, change, *numbers):
    """Replace the chosen images of (B, 3, H, W) by change(images, *numbers of these), in place.

    chosen (B,) and numbers (B, ...) are on the CPU, so that nobody waits for a GPU."""
    chosen = chosen.nonzero()[:, 0]
    if len(chosen) == 0:
        return
    numbers = [x[chosen].to(image.device, non_blocking=True) for x in numbers]
    chosen = chosen.to(image.device, non_blocking=True)
    image[chosen] = change(image.index_select(0, chosen), *numbers)


def jitter_colours(image, strengths, chosen, amounts, order):
    """Brightness, contrast, saturation, hue of `chosen` (B,) images, each in its own order.

    image (B, 3, H, W) in [0, 1], changed in place; strengths: of the four kinds; amounts (B, 4),
    uniform; order (B, 4): the kind that comes first, second, ..."""
    adjustments = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
    strengths = torch.tensor(strengths)
    amounts = strengths * (2 * amounts - 1)  # (B, 4)
    amounts[:, :3] = (1 + amounts[:, :3]).clamp(min=0)  # factors; the hue's is added

    used = strengths.nonzero()[:, 0]
    order = order[torch.isin(order, used)].view(len(order), len(used))
    for kinds in itertools.permutations(used.tolist()):

        def adjust(image, amounts, kinds=kinds):
            for kind in kinds:
                image = adjustments[kind](image, amounts[:, kind].view(-1, 1, 1, 1))
            return image

        in_this_order = (order == torch.tensor(kinds)).all(dim=1)
        change_some(image, chosen & in_this_order, adjust, amounts)
    return image


def adjust_brightness(image, factor):
    return (factor * image).clamp_(0, 1)


def adjust_contrast(image, factor):
    return blend(greyscale(image.mean(dim=(2, 3), keepdim=True)), image, factor)


def adjust_saturation(image, factor):
    return blend(greyscale(image), image, factor)


def blend(start, end, factor):
    """From start (factor 0) to end (factor 1) and beyond, cut to [0, 1]."""
    return (factor * end).add_((1 - factor) * start).clamp_(0, 1)


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


# ---- Processes
@contextlib.contextmanager
def process_group():
    """Join torchrun's processes, or be a group of one; leave it at the end, whatever happens.

    Yields this process's device. One process is a world of size one: there is no other path."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console without some letter of a path shows its code
            stream.reconfigure(errors="backslashreplace")
    reuse_memory()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    except ValueError as error:  # some of torchrun's variables are missing
        reason = str(error).splitlines()[0]
        fail(f"RANK is set, but: {reason}: start with torchrun, or unset RANK", everywhere=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield device
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fail("the disk is full: free some space; the last checkpoint is whole", everywhere=True)
    except RuntimeError as error:
        reason = str(error)
        if "allocate" in reason:
            reason = reason.splitlines()[0][-150:]
            fail(f"not enough memory ({reason}): lower --batch-size or the model's sizes", True)
        if "DataLoader worker" in reason:
            reason = reason.splitlines()[0]
            fail(f"--workers: {reason} Free memory, or give fewer, or 0", everywhere=True)
        if "by peer" in reason:  # gloo's words: connection closed, or reset
            sys.exit(name_process("another process has ended, and so does this one"))
        raise
    finally:
        if in_main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        dist.destroy_process_group()


def reuse_memory():
    """Let glibc keep the memory of freed tensors for new ones.

    Else it gives those of over 32 MB back to the system, which hands them out again page by page:
    of `python simclr.py` that took nearly half of the time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def in_main_thread():
    """Only there does Python let a program handle signals."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def all_or_none():
    """What one process refuses ends all of them, in one line, which names the process and its
    machine if not all of them say the same."""
    message = None
    try:
        yield
    except Refusal as refusal:
        message = str(refusal)
    messages = [None] * world_size()
    dist.all_gather_object(messages, message)
    if not any(messages):
        return
    if len(set(messages)) == 1:
        fail(message)
    if message:
        fail(name_process(message), everywhere=True)
    sys.exit(2)


def name_process(message):
    """The message, after the process and its machine if there are several."""
    if world_size() == 1:
        return message
    return f"process {rank()} on {socket.gethostname()}: {message}"


@contextlib.contextmanager
def one_process_first(needed):
    """If `needed`, the first process on each machine goes ahead, and the others wait for it."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if needed and not first:
        dist.barrier()
    try:
        yield
    finally:
        if needed and first:
            dist.barrier()


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

    run = Run("simclr", args, device)
    run.check_data(images, classes)
    run.restore(sampler, simclr=model, optimizer=optimizer)
    for step, batch in run.steps(loader):
        run.log(metrics, rates)
    """

    STOPS = (signal.SIGINT, signal.SIGTERM)
    MAY_CHANGE = ("out", "steps", "workers", "log_every", "save_minutes")  # when it continues
    FIRST_LINES = (1, 2, 5, 10, 20)  # steps that are logged besides every --log-every
    COLLAPSED = dict(information=0.02, embedding_std=0.02, target_std=0.02)  # below this

    def __init__(self, script, args, device):
        self.script = script
        self.args = args
        self.device = device
        self.out = Path(args.out)
        self.checkpoint = self.out / "checkpoint.pt"
        kept = {name: x for name, x in vars(args).items() if name not in self.MAY_CHANGE}
        self.options = {"script": script} | kept
        self.lock = None
        self.state = load_checkpoint(self.checkpoint, self.options)
        self.step = self.state.get("step", 0)  # updates made
        self.metrics = []  # of the updates since the last line of the log
        self.means = {}  # of these, at the last line or checkpoint
        self.received = 0  # the number of the signal that this process got
        self.received_time = 0.0
        self.stop_signal = 0  # of any process: all stop
        self.saving = False
        self.lines_collapsed = 0

    def check_data(self, images, classes):
        """Refuse images (a tensor or Paths) or classes (N,) that are not the checkpoint's.

        A folder may have moved; what counts is the names below it, and the classes."""
        content = hashlib.sha256(np.asarray(classes, dtype=np.int64).tobytes())
        self.skipped = 0
        if not torch.is_tensor(images):
            self.skipped = images.skipped
            root = str(Path(self.args.data))
            for path in images:
                name = path.removeprefix(root).lstrip(os.sep)
                content.update(os.fsencode(name) + b"\0")
        self.data = dict(images=len(images), content=content.hexdigest())
        there = self.state.get("data", self.data)
        if there != self.data:
            raise Refusal(
                f"--data {self.args.data}: {len(images):,} images, but {self.checkpoint} was made "
                f"with {there['images']:,} or with other names or classes: give the same, or "
                "another --out"
            )

    def restore(self, sampler, **parts):
        """Load the parts from the checkpoint, if there is one; print what the run will do.

        Later checkpoints hold the same parts. The first is the network."""
        self.parts = parts
        self.epoch_steps = len(sampler)
        self.horizon = self.args.epochs * self.epoch_steps
        self.last = min(self.args.steps or self.horizon, self.horizon)
        for name, part in parts.items():
            if name in self.state:
                part.load_state_dict(self.state[name])
        self.state = {}
        self.compare_processes()
        with all_or_none():
            if rank() == 0:
                self.open_folder()
        if rank() == 0:
            print(self.plan(sampler), flush=True)
            if self.args.warmup * self.epoch_steps >= self.horizon:
                print(f"warning: --warmup {self.args.warmup} epochs last as long as the run: the "
                      "rate never reaches its peak: give fewer, or more --epochs")  # fmt: skip

    def compare_processes(self):
        """All must see the same checkpoint and the same data."""
        seen = [None] * world_size()
        dist.all_gather_object(seen, (self.step, self.data))
        steps = sorted({step for step, _ in seen})
        sizes = sorted({data["images"] for _, data in seen})
        if len(steps) > 1:
            reason = f"not all processes see the same checkpoint (steps {steps})"
            fail(f"--out {self.out}: {reason}: share the folder")
        if any(data != self.data for _, data in seen):
            reason = f"not all processes see the same images ({sizes} of them)"
            fail(f"--data {self.args.data}: {reason}: make their folders equal")

    def open_folder(self):
        """Make the folder, lock it, cut off what a killed run logged after its last checkpoint."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / "options.json").open("a")
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
            self.lock.truncate(0)
            options = {"script": self.script} | vars(self.args)
            self.lock.write(json.dumps(options, indent=1) + "\n")
            self.lock.flush()
            log = self.out / "log.jsonl"
            log.touch()
            os.truncate(log, self.saved_log_size(log.read_bytes()))
        except BlockingIOError:
            raise Refusal(f"--out {self.out}: another run writes there: choose another") from None
        except OSError as error:
            raise Refusal(f"--out {self.out}: not writable ({error}): choose another") from None

    def saved_log_size(self, log):
        """Bytes of the lines, whole ones, of updates that the checkpoint has."""
        size = 0
        for line in log.splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > self.step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            size += len(line)
        return size

    def plan(self, sampler):
        """One line: what will happen."""
        args = self.args
        network = next(iter(self.parts.values()))
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        tail = f" (--long-tail {args.long_tail:g})" if args.long_tail else ""
        skipped = f" ({self.skipped:,} other files left out)" if self.skipped else ""
        steps = f"{self.horizon:,} steps"
        if self.last < self.horizon:
            steps += f", of which --steps {self.last}"
        start = f"continues after step {self.step:,}" if self.step else "new"
        processes = "1 process" if world_size() == 1 else f"{world_size()} processes"
        return (
            f"{self.script}: {args.data}{tail}{skipped}, {sampler.describe(self.horizon)}; "
            f"{args.epochs} epochs, {steps}; "
            f"{parameters:,} parameters; {self.device}, {processes}; {self.out}, {start}"
        )

    def steps(self, loader):
        """Yield (step, batch) of the updates that are left. Save on the way and at the end.

        Ctrl-C and SIGTERM end it after the present update, with exit status 130 or 143."""
        if in_main_thread():
            for number in self.STOPS:
                signal.signal(number, self.stop_soon)
        self.start_time = self.save_time = self.line_time = time.time()
        self.line_step = self.step
        hidden = None if rank() == 0 else True  # None: unless it is a terminal
        self.bar = tqdm(total=self.last, initial=self.step, unit="step", disable=hidden)
        try:
            for batch in loader:
                if isinstance(batch, str):  # what this process could not load
                    self.fail(name_process(batch), everywhere=True)
                torch.manual_seed(hash((self.args.seed, self.step, 1)))  # the same after a restart
                yield self.step, batch
                if self.saving:
                    self.save()
                if self.stop_signal:
                    break
        finally:
            self.bar.close()
            if self.lock:
                self.lock.close()
        if rank() == 0:
            print(self.outcome())
        if self.step < self.last:
            sys.exit(128 + self.stop_signal)

    def outcome(self):
        """What has been done, and the next command."""
        if self.step < self.last:
            return (
                f"stopped after step {self.step} of {self.last}, saved in {self.checkpoint}; "
                "the same command continues"
            )
        minutes, seconds = divmod(round(time.time() - self.start_time), 60)
        return (
            f"{self.step} of {self.horizon} steps, {minutes} min {seconds} s: {self.checkpoint}\n"
            f"next: python linear_eval.py {self.checkpoint}"
        )

    def stop_soon(self, number, _):
        """Stop after this update. A second signal stops at once, if it is not an echo of the first:
        `timeout` sends SIGTERM to the process, then to its whole group."""
        now = time.time()
        if self.received == 0:
            self.received = number
            self.received_time = now
        elif now - self.received_time > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def log(self, metrics, rates):
        """Count an update, and write a line of the log if it is time.

        metrics {name: tensor}: the line has their means over updates since the last line and over
        processes; of a vector it has the deciles. rates {name: number}: the line has the last."""
        self.step += 1
        self.bar.update()
        self.metrics.append({name: x.detach() for name, x in metrics.items()})
        self.agree()
        ends = self.step == self.last or self.stop_signal > 0
        self.saving = self.saving or ends
        early = self.step in self.FIRST_LINES and self.step < self.args.log_every
        due = ends or early or self.step % self.args.log_every == 0
        if not due and not self.saving:
            return  # not even .item(), which would wait for the GPU
        self.means = self.average_metrics()
        if due:
            self.write_line(rates)

    def agree(self):
        """A signal to one process stops all; the clock of process 0 says when to save."""
        elapsed = time.time() - self.save_time
        save = rank() == 0 and elapsed > 60 * self.args.save_minutes
        wishes = torch.tensor([self.received, int(save)])
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        self.stop_signal = wishes[0].item()
        self.saving = wishes[1].item() > 0

    def average_metrics(self):
        """{name: mean}; a value that is not finite ends the run before a checkpoint has it."""
        means = {}
        for name in self.metrics[0]:
            values = torch.stack([row[name] for row in self.metrics]).double()  # (updates, ...)
            dist.all_reduce(values)
            values = values.cpu() / world_size()
            finite = values.reshape(len(values), -1).isfinite().all(dim=1)
            if not finite.all():
                step = self.step - len(finite) + 1 + finite.int().argmin().item()
                lr = "base_lr" if "base_lr" in self.options else "lr"
                flag = option_flag(lr, self.options[lr])
                self.fail(f"{name} is not finite at step {step}: lower {flag}")
            means[name] = values.mean(dim=0)
        return means

    def write_line(self, rates):
        """Append to log.jsonl; show the loss in the bar, or the line if there is no terminal."""
        now = time.time()
        updates = self.step - self.line_step
        line = dict(step=self.step, epoch=(self.step - 1) // self.epoch_steps) | rates
        for name, mean in self.means.items():
            line[name] = mean.item() if mean.ndim == 0 else deciles(mean)
        line["images_per_second"] = updates * self.args.batch_size / (now - self.line_time)
        self.metrics = []
        self.line_step = self.step
        self.line_time = now
        if rank() > 0:
            return
        try:
            with (self.out / "log.jsonl").open("a") as file:
                print(json.dumps(line), file=file)
        except OSError as error:
            self.fail_to_write(error)
        numbers = {name: f"{x:.4g}" for name, x in line.items() if not isinstance(x, list)}
        self.bar.set_postfix(loss=numbers["loss"])
        if self.bar.disable:
            print(" ".join(f"{name} {x}" for name, x in numbers.items()), flush=True)
        self.warn_of_collapse(line)

    def warn_of_collapse(self, line):
        """After the warm-up, once, when all images have looked the same for five lines."""
        indicator = next((name for name in self.COLLAPSED if name in line), None)
        if indicator is None or line["step"] < self.args.warmup * self.epoch_steps:
            return
        collapsed = line[indicator] < self.COLLAPSED[indicator]
        self.lines_collapsed = self.lines_collapsed + 1 if collapsed else 0
        if self.lines_collapsed == 5:
            self.bar.write(
                f"warning: collapse: {indicator} is {line[indicator]:.2g}, so all images look "
                "the same to the network: lower the learning rate"
            )

    def save(self):
        """Write the checkpoint under another name, then rename it: a kill leaves no half file."""
        self.save_time = time.time()
        if rank() == 0:
            state = dict(options=self.options, step=self.step, data=self.data)
            for name, part in self.parts.items():
                state[name] = part.state_dict()
            partial = self.out / "checkpoint.partial"
            try:
                torch.save(state, partial)
                os.replace(partial, self.checkpoint)
            except (OSError, RuntimeError) as error:  # torch's zip writer raises the latter
                if "DataLoader worker" in str(error):
                    raise  # one died meanwhile
                partial.unlink(missing_ok=True)
                self.fail_to_write(error)

    def fail_to_write(self, error):
        """A full disk, most often. The last checkpoint is whole."""
        free = shutil.disk_usage(self.out).free / 2**20
        self.fail(
            f"--out {self.out}: cannot write at step {self.step} ({type(error).__name__}, "
            f"{free:.1f} MB are free): free some space; the same command then continues"
        )

    def fail(self, message, everywhere=False):
        self.bar.close()  # the message gets a line of its own
        fail(message, everywhere)


def deciles(values):
    """Eleven of the values (K,), at even ranks from the largest to the smallest, as numbers."""
    ranks = torch.linspace(0, len(values) - 1, 11).long()
    chosen = values.sort(descending=True).values[ranks]
    return [float(f"{x:.3g}") for x in chosen]


def load_checkpoint(path, options):
    """The state at `path`, {} if there is none; refuses what does not belong to this run."""
    try:
        if not path.exists():
            return {}
    except OSError as error:
        raise Refusal(f"--out {path.parent}: {error.strerror}: choose another") from None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not look at the check sums
                raise ValueError("a check sum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = {name: state["options"].get(name) for name in options}
    except Exception as error:  # torch raises many kinds for damaged files
        damage = f"{path} is damaged or foreign ({type(error).__name__})"
        raise Refusal(f"{damage}: move it or change --out") from None
    if there["script"] != options["script"]:
        raise Refusal(f"{path} is a checkpoint of {there['script']}.py: choose another --out")
    wrong = [name for name in options if there[name] != options[name]]
    if not {there["data"], options["data"]} & set(IN_MEMORY) and "data" in wrong:
        wrong.remove("data")  # a folder may move: Run.check_data looks at what is in it
    if wrong:
        given = ", ".join(option_flag(name, options[name]) for name in wrong)
        made = ", ".join(option_flag(name, there[name]) for name in wrong)
        raise Refusal(f"{given}: {path} was made with {made}: give that, or another --out")
    return state


# ---- Pictures
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
