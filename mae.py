# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""MAE, masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377), in one file.

Three quarters of an image's patches are removed; a ViT encodes the rest, and only the rest; a small
decoder sees its output, and a mask token for each patch that is missing, and predicts their pixels.
No term compares images with each other, so there is no prior over clusters: in the study
(arXiv 2210.07277) MAE is the control, which hardly cares how many classes a mini-batch has.

    loss = mean over removed patches of the mean squared error of their pixels

    python mae.py                                                    plates, minutes on a laptop
    torchrun --nproc_per_node=8 mae.py --data IMAGENET --k-classes 960    (or 8: imbalanced batches)

Read on as far as the line "Plumbing": that is the whole method. sampler.py has the data and
--k-classes. In shapes: B images in a process, N patches, D width, p pixels a patch's side.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import itertools
import json
import math
import os
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
    decoder_dim=64, decoder_depth=1, decoder_heads=2,
    batch_size=256, epochs=100, warmup=5.0, base_lr=2e-3,
)  # fmt: skip

# Options have the paper's and the official code's values as defaults (ViT-B/16); a recipe
# replaces some.
RECIPES = {
    "paper": {},
    "cifar10": SMALL,
    "cifar100": SMALL,
    "plates": SMALL | dict(
        patch_size=16, decoder_dim=128,
        mask_ratio=0.5,
        crop=[0.8, 1.0], flip=0.0, standardise=True,
        batch_size=960, epochs=3, warmup=0.33, base_lr=8e-4,
    ),
}  # fmt: skip


def parse_args(argv=None):
    p = option_parser(__doc__, out="runs/mae", recipes=RECIPES)

    g = p.add_argument_group("method")
    g.add_argument("--mask-ratio", type=fraction, default=0.75, help="of patches, removed")
    g.add_argument("--norm-pix-loss", action=argparse.BooleanOptionalAction, default=True,
                   help="predict each patch less its mean, by its deviation")  # fmt: skip

    g = p.add_argument_group("views")
    g.add_argument("--image-size", type=positive_int, default=224, help="pixels")
    g.add_argument("--crop", type=fraction, action=FromTo, default=[0.2, 1.0], help="of the area")
    g.add_argument("--flip", type=fraction, default=0.5, help="probability")
    g.add_argument("--standardise", action=argparse.BooleanOptionalAction, default=False,
                   help="normalise by each view's own mean and deviation")  # fmt: skip

    g = p.add_argument_group("model")
    g.add_argument("--patch-size", type=positive_int, default=16, help="pixels")
    g.add_argument("--dim", type=positive_int, default=768, help="width")
    g.add_argument("--depth", type=positive_int, default=12, help="blocks")
    g.add_argument("--heads", type=positive_int, default=12, help="of attention")
    g.add_argument("--decoder-dim", type=positive_int, default=512, help="width")
    g.add_argument("--decoder-depth", type=positive_int, default=8, help="blocks")
    g.add_argument("--decoder-heads", type=positive_int, default=16, help="of attention")

    g = p.add_argument_group("optimiser: AdamW")
    g.add_argument("--batch-size", type=positive_int, default=4096, help="images, all processes")
    g.add_argument("--epochs", type=positive_int, default=800, help="until the rate is --final-lr")
    g.add_argument("--warmup", type=nonnegative, default=40.0, help="epochs")
    g.add_argument("--base-lr", type=positive, default=1.5e-4, help="peak rate for a batch of 256")
    g.add_argument("--final-lr", type=nonnegative, default=0.0, help="fraction of the peak rate")
    g.add_argument("--weight-decay", type=nonnegative, default=0.05, help="of weights")

    args = parse_with_recipe(p, argv, RECIPES)
    check_sizes_of_mae(args)
    return args


def check_sizes_of_mae(args):
    """Patches must tile the image, heads must share the width, the mask must leave some."""
    if args.image_size % args.patch_size:
        size = f"--image-size {args.image_size}"
        fail(f"--patch-size {args.patch_size} does not divide {size}: choose a divisor")
    if args.dim % args.heads or args.dim % 4:
        fail(f"--dim {args.dim}: --heads {args.heads} and 4 (of positions) must divide it")
    if args.decoder_dim % args.decoder_heads or args.decoder_dim % 4:
        heads = f"--decoder-heads {args.decoder_heads}"
        fail(f"--decoder-dim {args.decoder_dim}: {heads} and 4 (of positions) must divide it")
    patches = (args.image_size // args.patch_size) ** 2
    if not 0 < int(patches * (1 - args.mask_ratio)) < patches:
        fail(f"--mask-ratio {args.mask_ratio} of {patches} patches keeps none or all: change it")


# ---- 2. Loss
def mae_loss(pred, patches, mask, norm_pix_loss=False):
    """Mean squared error of the removed patches. pred, patches (B, N, 3 * p * p); mask (B, N), 1:
    removed. With norm_pix_loss patches are normalised one by one. In float32 (or 64)."""
    if norm_pix_loss:
        mean, deviation = patch_statistics(patches)
        patches = (patches - mean) / deviation
    error = (pred.to(patches) - patches).square().mean(dim=2)  # (B, N)
    return (error * mask).sum() / mask.sum()


def patch_statistics(patches):
    """Mean and deviation of each patch over pixels and channels: (B, N, 1) each."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)  # unbiased, as official
    return mean, (variance + 1e-6).sqrt()


def patchify(images, patch_size):
    """(B, 3, H, W) -> (B, N, 3 * p * p), row after row; in a patch row, column, channel."""
    p = patch_size
    g = images.shape[2] // p  # patches a side
    grid = images.unflatten(2, (g, p)).unflatten(4, (g, p))  # (B, 3, g, p, g, p)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, patch_size):
    """The reverse: (B, N, 3 * p * p) -> (B, 3, H, W)."""
    p = patch_size
    g = math.isqrt(patches.shape[1])
    grid = patches.unflatten(2, (p, p, 3)).unflatten(1, (g, g))  # (B, g, g, p, p, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# ---- 3. Model
class MAE(nn.Module):
    """Encoder and decoder, under the official names: a released checkpoint loads strictly, and all
    but mask_token and decoder* is a ViT of timm's, without classifier."""

    def __init__(
        self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, decoder_dim=512,
        decoder_depth=8, decoder_heads=16, norm_pix_loss=False,
    ):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss
        grid = image_size // patch_size

        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        positions = sincos_position_embedding(dim, grid).float()[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        positions = sincos_position_embedding(decoder_dim, grid).float()[None]
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        blocks = [Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        self.apply(initialise)

    def forward(self, images, mask_ratio=0.75, noise=None):
        """images (B, 3, H, W), normalised; noise (B, N): the patches of the smallest are kept;
        None: uniform. Returns the loss; pred (B, N, 3 * p * p); mask (B, N), 1: removed."""
        N = self.pos_embed.shape[1] - 1
        if noise is None:
            noise = torch.rand(len(images), N, device=images.device)
        order = noise.argsort(dim=1)  # (B, N): kept patches, then removed ones
        inverse = order.argsort(dim=1)  # (B, N): the place of each patch in that order
        kept = int(N * (1 - mask_ratio))
        mask = (inverse >= kept).to(images.dtype)
        pred = self.decode(self.encode(images, order[:, :kept]), inverse)
        patches = patchify(images, self.patch_size)
        return mae_loss(pred, patches, mask, self.norm_pix_loss), pred, mask

    def encode(self, images, keep):
        """images (B, 3, H, W), keep (B, n): patches to see, in this order -> (B, 1 + n, D)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + self.pos_embed[:, 1:]
        x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))  # (B, n, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, x], dim=1)))

    def decode(self, latent, inverse):
        """latent (B, 1 + n, D), inverse (B, N): where each patch stands in the sequence of those
        kept and those removed -> pixels of all patches (B, N, 3 * p * p)."""
        cls, x = self.decoder_embed(latent).split([1, latent.shape[1] - 1], dim=1)
        missing = self.mask_token.to(x).expand(len(x), inverse.shape[1] - x.shape[1], -1)
        x = torch.cat([x, missing], dim=1)  # (B, N, decoder_dim)
        x = x.gather(1, inverse[:, :, None].expand(-1, -1, x.shape[2]))  # in the image's order
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]


def sincos_position_embedding(dim, grid_size, cls_token=True):
    """Fixed 2-D embedding -> (1 + N, dim) float64, N = grid_size**2; the first row, 0, is cls's.

    Of the patch in row r, column c: [sin(c w), cos(c w), sin(r w), cos(r w)], w_j = 10000^(-4j/dim)
    for j from 0; the first half is the column's, as in the official code (util/pos_embed)."""
    w = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = torch.arange(grid_size)[:, None] * w  # (g, D / 4)
    wave = torch.cat([place.sin(), place.cos()], dim=1)  # (g, D / 2)
    columns = wave.repeat(grid_size, 1)  # (N, D / 2)
    rows = wave.repeat_interleave(grid_size, dim=0)
    patches = torch.cat([columns, rows], dim=1)  # (N, D)
    return F.pad(patches, (0, 0, 1, 0)) if cls_token else patches


class Block(nn.Module):
    """Transformer block, pre-norm, with timm's parameter names: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, wanted=None):
        """wanted: put out the first so many tokens alone; None: all."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        mixed = F.scaled_dot_product_attention(q[:, :, :wanted], k, v)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, N, D)
        x = x[:, :wanted] + self.attn["proj"](mixed)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, N, 4D)
        return x + self.mlp["fc2"](hidden)


def initialise(module):
    """The official initial weights: linear Xavier uniform, over the three of qkv at once; bias 0.
    The patches' convolution as a linear map, its bias as torch has it."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class EncoderOf:
    """The encoder among MAE's weights, for the checkpoint: under timm's names, to be evaluated."""

    def __init__(self, mae):
        self.mae = mae

    def state_dict(self):
        state = self.mae.state_dict()
        return {name: state[name] for name in state if not name.startswith(("mask_", "decoder_"))}

    def load_state_dict(self, state):
        """Nothing to do: the whole MAE is loaded."""


# ---- 4. Optimiser and schedule
def parameter_groups(model):
    """For AdamW: matrices, cls and mask token, which decay; biases, norms. Positions are fixed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    return [dict(params=weights), dict(params=vectors, weight_decay=0.0)]


def schedule(step, epoch_steps, args):
    """Learning rate of update `step` (from 0): a peak in proportion to the batch size."""
    peak = args.base_lr * args.batch_size / 256
    lr = warmup_cosine(
        step,
        warmup=int(args.warmup * epoch_steps),
        steps=args.epochs * epoch_steps,
        peak=peak,
        final=args.final_lr * peak,
    )
    return dict(lr=lr)


def warmup_cosine(step, warmup, steps, peak, final):
    """From 0 at step 0 straight up to `peak` at `warmup`, then half a cosine wave to `final`."""
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


# ---- 5. Training
def mae_inputs(crops, args, device):
    """Normalised images (B, 3, H, W), and the noise (B, N) that says which patches to remove.

    crops (1, B, 3, H, W) uint8. Random numbers are drawn for the batch of all processes, of which
    each takes its own part: the result does not depend on the number of processes."""
    images = crops[0].to(device, non_blocking=True).float() / 255
    images = normalise(images, args.standardise)
    B = len(images)
    patches = (args.image_size // args.patch_size) ** 2
    noise = torch.rand(B * world_size(), patches)[own_part(B)]
    return images, noise.to(device, non_blocking=True)


def mae_step(model, optimizer, images, noise, lr, args):
    """One update on images (B, 3, H, W), with the noise (B, N) of their masks.

    Returns metrics {name: scalar tensor of this process}, the prediction and the mask."""
    for group in optimizer.param_groups:
        group["lr"] = lr

    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
        loss, pred, mask = model(images, args.mask_ratio, noise)

    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradient_norm = nn.utils.get_total_norm(gradients)  # not clipped, as official
    optimizer.step()
    return dict(loss=loss, gradient_norm=gradient_norm), pred.detach(), mask


def train(args, device):
    """Train MAE. Run continues, logs, saves and stops; the method is mae_step."""
    with all_or_none():
        run = Run("mae", args, device)
        images, classes = training_set(args)
        run.check_data(images, classes)
        sampler = batch_sampler(classes, args)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    mae = MAE(
        args.image_size, args.patch_size, args.dim, args.depth, args.heads, args.decoder_dim,
        args.decoder_depth, args.decoder_heads, args.norm_pix_loss,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(
        parameter_groups(mae),
        lr=0.0,  # set at every update
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    run.restore(sampler, mae=mae, encoder=EncoderOf(mae), optimizer=optimizer)
    model = DistributedDataParallel(mae, gradient_as_bucket_view=True)

    dataset = CroppedViews(images, [(1, args.image_size, args.crop)], args)
    for step, (crops,) in run.steps(batch_loader(dataset, sampler, run, args)):
        images, noise = mae_inputs(crops, args, device)
        rates = schedule(step, len(sampler), args)
        metrics, pred, mask = mae_step(model, optimizer, images, noise, rates["lr"], args)
        if step == 0:
            draw_views([images[None]], run.out, normalised=True)
        run.log(metrics, rates)
        if run.saving:
            draw_reconstruction(images[:8], pred[:8], mask[:8], mae, run.out)


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


def draw_reconstruction(images, pred, mask, mae, out):
    """reconstruction.png: images (B, 3, H, W); what the encoder sees of them; and that with the
    prediction (B, N, 3 * p * p) where the mask (B, N) is 1, a row each.

    Where the loss normalises patches, each gets its own mean and deviation back."""
    if rank() > 0:
        return
    patches = patchify(images, mae.patch_size)
    pred = pred.to(patches)
    mask = mask[:, :, None]
    if mae.norm_pix_loss:
        mean, deviation = patch_statistics(patches)
        pred = pred * deviation + mean
    rows = [patches, patches * (1 - mask), torch.where(mask > 0, pred, patches)]
    pictures = torch.cat([unpatchify(row, mae.patch_size) for row in rows])
    limits = (images.min().item(), images.max().item())
    path = out / "reconstruction.png"
    save_image(pictures, path, nrow=len(images), normalize=True, value_range=limits)


if __name__ == "__main__":
    main()
