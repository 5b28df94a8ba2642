# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""MSN, Masked Siamese Networks (Assran et al., ECCV 2022, arXiv 2204.07141), in one file.

Several anchor views of an image, some with patches dropped, predict the soft assignment of one
target view to K prototypes. The target network is a moving average of the anchor's and gets no
gradient. Collapse is prevented by matching the mean prediction to a prior over prototypes, hence
over sizes of clusters: the uniform one, hidden in its entropy (arXiv 2210.07277; see pmsn.py).

    p = softmax(cos(anchor, prototypes) / temperature)     t = sharpened softmax(cos(target, ...))
    loss = mean over anchors of H(t, p)  +  weight * KL(mean over anchors of p || prior)   (Eq. 1)

    python msn.py                                                    plates, minutes on a laptop
    torchrun --nproc_per_node=8 msn.py --data IMAGENET --k-classes 960    (or 8: imbalanced batches)

Read on as far as the line "Plumbing": that is the whole method. sampler.py has the data, the prior
and --k-classes. In shapes: B images in a process, V views, N patches, D width, K prototypes.
"""

import argparse
import collections
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
from PIL import Image, ImageDraw
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
    image_size=32, focal_size=16, patch_size=8, stem=[16, 32, 64, 64, 96],
    dim=96, depth=2, heads=3, hidden=512, output=128,
    num_prototypes=256, sinkhorn=True,
    rand_views=2, focal_views=0, patch_drop=0.15, rand_crop=[0.35, 1.0], focal_crop=[0.1, 0.35],
    blur_sigma=[0.1, 0.7],
    batch_size=128, epochs=100, warmup=5.0, ema=0.99,
)  # fmt: skip

# MSN can solve plates by brightness, polarity or position, and does unless views hide them.
PLATES = SMALL | dict(
    rand_crop=[0.6, 1.0], flip=0.0, jitter=[0.8, 0.8, 0.0, 0.0], grey=0.0, blur=0.0,
    solarise=0.5, threshold=0.0, noise=0.2, standardise=True,
    rand_views=1, output=32,
    batch_size=1024, epochs=3, warmup=0.33, start_lr=5e-4, lr=2e-3, ema=0.95,
)  # fmt: skip

# Options have the study's values as defaults (ViT-B/16), or else the official code's; a recipe
# replaces some.
RECIPES = {
    "paper": {},
    "vit-s16": dict(dim=384, heads=6, patch_drop=0.15, sinkhorn=True, epochs=800),
    "cifar10": SMALL | dict(focal_views=4),
    "cifar100": SMALL | dict(focal_views=4),
    "plates": PLATES,
    "plates-tail": PLATES | dict(long_tail=1.0, batch_size=256, epochs=1, warmup=0.1),
}  # fmt: skip


def parse_args(argv=None):
    p = option_parser(__doc__, out="runs/msn", recipes=RECIPES)

    g = p.add_argument_group("method")
    g.add_argument("--num-prototypes", type=positive_int, default=1024, help="K")
    g.add_argument("--temperature", type=positive, default=0.1, help="of the anchors' softmax")
    g.add_argument("--sharpen", type=positive, default=0.25, help="targets: temperature times this")
    g.add_argument("--me-max-weight", type=nonnegative, default=1.0, help="of the entropy term")
    g.add_argument("--sinkhorn", action=argparse.BooleanOptionalAction, default=False,
                   help="balance the targets over prototypes")  # fmt: skip
    g.add_argument("--ema", type=fraction, default=0.996, help="of the target at first; rises to 1")

    g = p.add_argument_group("views")
    g.add_argument("--image-size", type=positive_int, default=224, help="full-size views, pixels")
    g.add_argument("--focal-size", type=positive_int, default=96, help="focal views, pixels")
    g.add_argument("--rand-views", type=positive_int, default=1, help="full-size anchors per image")
    g.add_argument("--focal-views", type=count, default=10, help="focal anchors per image")
    g.add_argument("--patch-drop", type=fraction, default=0.3, help="of full-size anchors' patches")
    g.add_argument("--rand-crop", type=fraction, action=FromTo, default=[0.3, 1.0], help="area")
    g.add_argument("--focal-crop", type=fraction, action=FromTo, default=[0.05, 0.3], help="area")
    g.add_argument("--flip", type=fraction, default=0.5, help="probability")
    g.add_argument("--jitter", type=nonnegative, nargs=4, default=[0.4, 0.4, 0.4, 0.1],
                   help="strength: brightness, contrast, saturation, hue")  # fmt: skip
    g.add_argument("--grey", type=fraction, default=0.2, help="probability")
    g.add_argument("--blur", type=fraction, default=0.5, help="probability")
    g.add_argument("--blur-sigma", type=positive, action=FromTo, default=[0.1, 2.0], help="pixels")
    g.add_argument("--solarise", type=fraction, default=0.0, help="probability")
    g.add_argument("--threshold", type=fraction, default=0.5, help="solarise inverts from here")
    g.add_argument("--noise", type=nonnegative, default=0.0, help="deviation, after normalising")
    g.add_argument("--standardise", action=argparse.BooleanOptionalAction, default=False,
                   help="normalise by each view's own mean and deviation")  # fmt: skip

    g = p.add_argument_group("model")
    g.add_argument("--patch-size", type=positive_int, default=16, help="pixels")
    g.add_argument("--stem", type=positive_int, nargs="*", default=[],
                   help="channels of 3x3 convolutions that cut patches; none: ViT's")  # fmt: skip
    g.add_argument("--dim", type=positive_int, default=768, help="width")
    g.add_argument("--depth", type=positive_int, default=12, help="blocks")
    g.add_argument("--heads", type=positive_int, default=12, help="of attention")
    g.add_argument("--hidden", type=positive_int, default=2048, help="width of the projector")
    g.add_argument("--output", type=positive_int, default=256, help="width of embeddings")

    g = p.add_argument_group("optimiser: AdamW")
    g.add_argument("--batch-size", type=two_or_more, default=1024, help="images, all processes")
    g.add_argument("--epochs", type=positive_int, default=300, help="of the whole run")
    g.add_argument("--warmup", type=nonnegative, default=15.0, help="epochs")
    g.add_argument("--start-lr", type=nonnegative, default=2e-4, help="rate before the warm-up")
    g.add_argument("--lr", type=positive, default=1e-3, help="rate after the warm-up")
    g.add_argument("--final-lr", type=nonnegative, default=1e-6, help="rate at the horizon")
    g.add_argument("--weight-decay", type=nonnegative, nargs=2, default=[0.04, 0.4], help="from to")
    g.add_argument("--clip", type=positive, default=3.0, help="norm of the gradient")

    args = parse_with_recipe(p, argv, RECIPES)
    check_sizes(args)
    return args


def check_sizes(args):
    """Patches must tile the views, the stem must cut patches, heads must share the width."""
    sizes = f"--image-size {args.image_size}, --focal-size {args.focal_size}"
    used = [args.image_size] + [args.focal_size] * (args.focal_views > 0)
    if any(size % args.patch_size for size in used):
        fail(f"--patch-size {args.patch_size} does not divide {sizes}: choose multiples of it")
    halvings = min(int(math.log2(args.patch_size)), len(args.stem))
    if args.stem and 2**halvings != args.patch_size:
        stem = option_flag("stem", args.stem)
        fail(f"{stem}: cannot halve down to --patch-size {args.patch_size}: add layers")
    if args.dim % args.heads:
        fail(f"--heads {args.heads} does not divide --dim {args.dim}: choose a divisor")


# ---- 2. Loss
def log_assignment(z, prototypes, temperature):
    """log softmax(cos(z, prototypes) / temperature): z (B, D), prototypes (K, D) -> (B, K).

    Neither needs unit length. Computed in float32 (or 64), whatever autocast made of z."""
    prototypes = F.normalize(prototypes)
    cosine = F.normalize(z.to(prototypes)) @ prototypes.T
    return (cosine / temperature).log_softmax(dim=1)


def sinkhorn_balance(assignment, prior, rounds=3):
    """Rescale soft assignments (B, K) so that every prototype has nearly its share of the prior
    (K,) in the batch of all processes, and every image exactly mass 1. Rounds as official."""
    for _ in range(rounds):
        mass = all_reduce_mean(assignment.mean(dim=0))  # (K,), of each prototype
        mass = mass.clamp(min=torch.finfo(mass.dtype).tiny)
        assignment = assignment * (prior / mass).to(assignment)
        assignment = assignment / assignment.sum(dim=1, keepdim=True)
    return assignment


def msn_loss(
    anchors, targets, prototypes, temperature=0.1, sharpen=0.25, me_max_weight=1.0, sinkhorn=False
):
    """Eq. 1 of MSN. anchors (V*B, D), view-major; targets (B, D); prototypes (K, D).

    Returns (loss, cross_entropy, me_max), in nats. cross_entropy is this process's mean, which DDP
    averages; me_max = KL(mean prediction || uniform) >= 0 is over the anchors of all processes."""
    tiny = torch.finfo(prototypes.dtype).tiny
    prior = torch.full_like(prototypes[:, 0], 1 / len(prototypes), dtype=torch.float64)  # uniform
    log_p = log_assignment(anchors, prototypes, temperature)  # (V*B, K)

    with torch.no_grad():  # targets are labels; if they learnt, all would become the same
        t = log_assignment(targets, prototypes, temperature * sharpen).exp()  # (B, K)
        if sinkhorn:
            t = sinkhorn_balance(t, prior)

    log_p_views = log_p.unflatten(0, (-1, len(t)))  # (V, B, K)
    cross_entropy = -(t * log_p_views).sum(dim=2).mean()  # one target for an image's V anchors

    mean_p = all_reduce_mean(log_p.exp().mean(dim=0))  # (K,)
    log_ratio = mean_p.clamp(min=tiny).log() - prior.log().to(mean_p)  # clamp: 0 log 0 = 0
    me_max = (mean_p * log_ratio).sum()
    return cross_entropy + me_max_weight * me_max, cross_entropy, me_max


# ---- 3. Model
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


class VisionTransformer(nn.Module):
    """ViT with timm's parameter names, without a classifier.

    images (B, 3, H, W) and keep, the indices of the patches to use (None: all)
    -> representations (B, D): the cls token after the final norm."""

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, stem=()):
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=patch_projection(patch_size, dim, stem)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)

    def forward(self, images, keep=None):
        x = self.patch_embed["proj"](images)  # (B, D, g, g), g: patches a side
        cls_position, positions = self.positions(x.shape[-1])
        x = x.flatten(2).transpose(1, 2) + positions  # (B, N, D), N = g * g
        if keep is not None:
            x = x[:, keep]
        cls = (self.cls_token + cls_position).expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last(x, wanted=1)  # (B, 1, D): of its output only cls is used, so no more is computed
        return self.norm(x[:, 0])

    def positions(self, grid):
        """Of the cls token (1, 1, D), and of patches (1, N, D), interpolated for focal views."""
        cls, patches = self.pos_embed.split([1, self.grid**2], dim=1)
        if grid != self.grid:
            patches = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            patches = F.interpolate(patches, size=(grid, grid), mode="bicubic")
            patches = patches.flatten(2).transpose(1, 2)
        return cls, patches


def patch_projection(patch_size, dim, stem):
    """Images (B, 3, H, W) -> patches (B, D, g, g): one convolution that cuts them, as in ViT.

    With `stem`, channels of 3x3 convolutions with BatchNorm and ReLU: log2(patch_size) of them,
    evenly spread, have stride 2, and a 1x1 convolution to D comes last."""
    if not stem:
        return nn.Conv2d(3, dim, patch_size, patch_size)
    halvings = patch_size.bit_length() - 1
    layers = []
    before = 3
    for i, channels in enumerate(stem):
        halves = i * halvings // len(stem) > (i - 1) * halvings // len(stem)
        stride = 2 if halves else 1
        layers.append(nn.Conv2d(before, channels, 3, stride, padding=1, bias=False))
        layers.append(BatchNorm(channels))
        layers.append(nn.ReLU())
        before = channels
    return nn.Sequential(*layers, nn.Conv2d(before, dim, 1))


def initialise(module):
    """The official initial weights: linear truncated normal 0.02, convolution Kaiming, bias 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MSN(nn.Module):
    """Encoder and projector, which anchor and target have alike, and the prototypes, whose gradient
    DDP averages over processes like any other (the official code sums it)."""

    def __init__(self, encoder, dim, hidden, output, num_prototypes):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential()
        for before in (dim, hidden):
            self.projector.extend([nn.Linear(before, hidden), BatchNorm(hidden), nn.GELU()])
        self.projector.append(nn.Linear(hidden, output))
        self.projector.apply(initialise)
        bound = output**-0.5
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, output).uniform_(-bound, bound))

    def forward(self, views, keep=None):
        """views: full-size and, if any, focal ones, each (V*B, 3, H, W), view-major, one batch for
        BatchNorm; keep: patches of the full-size ones, None: all.

        Returns embeddings (all V*B, E) and prototypes (K, E)."""
        full, *focal = views
        z = [self.projector(self.encoder(full, keep))]
        z += [self.projector(self.encoder(view)) for view in focal]
        return torch.cat(z), self.prototypes


# ---- 4. Optimiser and schedules
def parameter_groups(model):
    """For AdamW: weights (also cls token and positions), which decay; biases, norms; prototypes."""
    network = [*model.encoder.parameters(), *model.projector.parameters()]
    weights = [p for p in network if p.ndim > 1]
    vectors = [p for p in network if p.ndim <= 1]
    return [dict(params=p, weight_decay=0.0) for p in (weights, vectors, [model.prototypes])]


def schedule(step, epoch_steps, args):
    """Learning rate, weight decay and EMA of update `step` (from 0).

    As in the official code all are stretched to 1.25 times the run, so that none reaches its end,
    and the first two are advanced before the update."""
    run_steps = args.epochs * epoch_steps
    horizon = int(1.25 * run_steps)
    warmup = int(args.warmup * epoch_steps)
    now = step + 1
    if now < warmup:
        lr = args.start_lr + (args.lr - args.start_lr) * now / warmup
    else:
        lr = cosine(args.lr, args.final_lr, now - warmup, max(horizon - warmup, 1))
    return dict(
        lr=lr,
        weight_decay=cosine(*args.weight_decay, now, horizon),
        ema=args.ema + (1 - args.ema) * step / (1.25 * run_steps),
    )


def cosine(start, end, step, steps):
    """Half a cosine wave from start (step 0) to end (step `steps`)."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


# ---- 5. Training
def siamese_views(crops, args, device):
    """Colour and normalise crops, uint8 (V, B, 3, H, W), and add noise: the network's inputs.

    Random numbers are drawn for the batch of all processes, of which each takes its own part: the
    result does not depend on the number of processes."""
    V, B = crops.shape[:2]
    u = torch.rand(V, B * world_size(), 13)[:, own_part(B)]
    images = crops.flatten(0, 1).to(device, non_blocking=True)
    pixels = photometry(
        images, u.flatten(0, 1), args.jitter, args.grey, args.blur, args.blur_sigma, args.solarise,
        args.threshold,
    )  # fmt: skip
    pixels = normalise(pixels, args.standardise)
    if args.noise:
        noise = torch.randn(V, B * world_size(), 1, *crops.shape[3:])[:, own_part(B)]
        pixels = pixels + args.noise * noise.flatten(0, 1).to(device, non_blocking=True)
    return pixels.unflatten(0, (V, B))


def patches_to_keep(args):
    """Random indices of the patches that full-size anchors keep, the same for all images."""
    order = torch.randperm((args.image_size // args.patch_size) ** 2)
    return order[: int(len(order) * (1 - args.patch_drop))]


def msn_step(model, target, optimizer, target_view, anchor_views, keep, rates, args):
    """One update in the official order: clip, step, move the target.

    target_view (B, 3, H, W); anchor_views: full-size and focal, (V*B, 3, H, W) each; keep: indices
    of the patches that full-size anchors keep; rates: see schedule.
    Returns metrics {name: tensor of this process} and the target's embeddings (B, E)."""
    decayed, vectors, _ = optimizer.param_groups  # the third: prototypes
    decayed["weight_decay"] = rates["weight_decay"]
    for group in optimizer.param_groups:
        group["lr"] = rates["lr"]

    with torch.autocast(target_view.device.type, torch.bfloat16, enabled=args.bf16):
        with torch.no_grad():
            targets, _ = target([target_view])  # in training mode: BatchNorm by the batch
        anchors, prototypes = model(anchor_views, keep)
    loss, cross_entropy, me_max = msn_loss(
        anchors, targets, prototypes, args.temperature, args.sharpen, args.me_max_weight,
        args.sinkhorn,
    )  # fmt: skip
    with torch.no_grad():  # before the update, for the log
        usage = log_assignment(anchors, prototypes, args.temperature).exp().mean(dim=0)  # (K,)

    optimizer.zero_grad()
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(decayed["params"] + vectors["params"], args.clip)
    optimizer.step()
    with torch.no_grad():  # parameters only: the target's BatchNorm has statistics of its own
        torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 1 - rates["ema"])

    prior = torch.full_like(usage, 1 / len(usage))
    entropy = math.log(len(usage)) - me_max  # of the mean prediction
    metrics = dict(
        loss=loss,
        cross_entropy=cross_entropy,
        me_max=me_max,
        entropy=entropy,
        information=entropy - cross_entropy,  # of a prediction about its image; 0: collapse
        gradient_norm=gradient_norm,
        usage=usage,
        prior=prior,
    )
    return metrics, targets


def train(args, device):
    """Train MSN. Run continues, logs, saves and stops; the method is msn_step."""
    with all_or_none():
        run = Run("msn", args, device)
        images, classes = training_set(args)
        run.check_data(images, classes)
        sampler = batch_sampler(classes, args)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    encoder = VisionTransformer(
        args.image_size, args.patch_size, args.dim, args.depth, args.heads, args.stem
    )
    anchor = MSN(encoder, args.dim, args.hidden, args.output, args.num_prototypes).to(device)
    anchor = synchronise_batchnorm(anchor, device)
    target = copy.deepcopy(anchor).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(anchor), fused=True)
    run.restore(sampler, msn=anchor, target=target, encoder=target.encoder, optimizer=optimizer)
    model = DistributedDataParallel(anchor, gradient_as_bucket_view=True)

    sizes = [(1 + args.rand_views, args.image_size, args.rand_crop)]  # the first is the target
    if args.focal_views:
        sizes.append((args.focal_views, args.focal_size, args.focal_crop))
    dataset = CroppedViews(images, sizes, args)
    shown = collections.deque(maxlen=1000 // (args.batch_size // world_size()) + 1)
    for step, crops in run.steps(batch_loader(dataset, sampler, run, args)):
        full, *focal = [siamese_views(size, args, device) for size in crops]  # (V, B, 3, H, W)
        target_view = full[0]
        anchor_views = [views.flatten(0, 1) for views in (full[1:], *focal)]
        keep = patches_to_keep(args).to(device, non_blocking=True)
        rates = schedule(step, len(sampler), args)
        metrics, targets = msn_step(
            model, target, optimizer, target_view, anchor_views, keep, rates, args
        )
        if step == 0:
            draw_views([full, *focal], run.out, normalised=True)
        shown.append((crops[0][0], targets))
        run.log(metrics, rates)
        if run.saving:
            draw_prototypes(anchor.prototypes.detach(), shown, run.out)
            draw_prior(run.means["usage"], run.means["prior"], "me_max", run.out)


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


def two_or_more(text):
    expected = "a whole number of at least 2, at most 2147483647"
    return option_number(int, text, low=2, high=2**31 - 1, expected=expected)


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
def photometry(views, u, jitter, grey, blur, blur_sigma, solarise, threshold):
    """Random colours of a batch of views: uint8 (B, 3, H, W) -> float32 in [0, 1].

    u (B, 13), uniform, on the CPU: 0 whether to jitter, 1 to 4 by how much, 5 whether grey, 6
    whether blurred, 7 how much, 8 whether solarised, 9 to 12 the order of the four jitters. Equal
    to torchvision's functions with the same parameters, image by image."""
    image = views.float().div_(255)
    jitter_colours(
        image,
        strengths=jitter,
        chosen=u[:, 0] < 0.8,
        amounts=u[:, 1:5],
        order=u[:, 9:].argsort(dim=1),
    )
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * u[:, 7]
    radius = min(math.ceil(3 * blur_sigma[1]), image.shape[-1] - 1)
    change_some(image, u[:, 5] < grey, greyscale)
    change_some(image, u[:, 6] < blur, functools.partial(gaussian_blur, radius=radius), sigma)
    change_some(image, u[:, 8] < solarise, functools.partial(invert_bright, threshold=threshold))
    return image


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


def gaussian_blur(image, sigma, radius):
    """Blur each of (B, C, H, W) by its own sigma (B,), pixels; 2 radius + 1 taps, reflected."""
    B, C, H, W = image.shape
    taps = torch.arange(-radius, radius + 1, device=image.device)
    weights = (-0.5 * (taps / sigma[:, None]).square()).softmax(dim=1)
    weights = weights.repeat_interleave(C, dim=0)[:, None, :, None]  # (BC, 1, taps, 1)
    planes = image.reshape(1, B * C, H, W)  # a plane has a convolution of its own
    planes = F.pad(planes, [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, weights, groups=B * C)
    planes = F.conv2d(planes, weights.transpose(2, 3), groups=B * C)
    return planes.view(B, C, H, W)


def invert_bright(image, threshold):
    """Solarise: invert pixels from the threshold on. By lerp: where takes several times as long."""
    return image.lerp(1 - image, (image >= threshold).float())


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


def all_reduce_mean(x):
    """Mean over processes, with a gradient."""
    return AllReduceMean.apply(x)


class AllGather(torch.autograd.Function):
    """See gather. Each process sends its part to the others, and back each one's gradient."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        of_all = torch.empty_like(gradient)  # of our part, by each process
        dist.all_to_all_single(of_all, gradient)
        return of_all.unflatten(0, (world_size(), -1)).sum(dim=0)


def gather(z):
    """(B, ...) of each process -> (W * B, ...), by rank. Backward: every process's gradient,
    summed; after DDP's mean over processes that is the full batch's gradient."""
    return AllGather.apply(z.contiguous()) if dist.is_initialized() else z


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, D, ...) by the batch of all processes, on CPUs too, unlike SyncBatchNorm."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        x = x.to(self.weight)  # statistics of bfloat16 would be too coarse
        with torch.no_grad():
            own = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))
            means, variances = gather(own[None]).unbind(1)  # (W, D) each
            mean = means.mean(dim=0)
            variance = (variances + (means - mean).square()).mean(dim=0)
            count = x.numel() // x.shape[1] * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return NormaliseByAll.apply(x, self.weight, self.bias, mean, variance, self.eps)


class NormaliseByAll(torch.autograd.Function):
    """weight (x - mean) / sqrt(variance + eps) + bias, where mean and variance (D,) are those of
    x (B, D, ...) of all processes. torch's fused kernels do the work: autograd takes four times
    as long."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, scale = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, [True, True, True]
        )
        # of_x has this process's sums over images where it needs the mean of all processes' sums.
        sums = torch.stack([of_weight, of_bias])
        excess = (sums - all_reduce_mean(sums)) * x.shape[1] / x.numel()  # (2, D)
        slope = weight * scale.square() * excess[0]
        offset = weight * scale * excess[1] - slope * mean
        shape = [1, -1] + [1] * (x.ndim - 2)
        of_x = of_x.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
        return of_x, of_weight, of_bias, None, None, None


def synchronise_batchnorm(model, device):
    """On GPUs torch's SyncBatchNorm takes BatchNorm's place: the same statistics, fused."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


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


def draw_prototypes(prototypes, shown, out, rows=12, columns=10):
    """prototypes.png: a row for each of `rows` prototypes (K, E), from the most used to the least,
    with the nearest of the images lately shown, whose embeddings the target has made.

    shown: pairs of crops (B, 3, H, W) uint8 and embeddings (B, E)."""
    if rank() > 0:
        return
    crops = torch.cat([crop for crop, _ in shown])  # (M, 3, H, W)
    embeddings = torch.cat([embedding for _, embedding in shown]).to(prototypes)  # (M, E)
    similarity = F.normalize(prototypes) @ F.normalize(embeddings).T  # (K, M)
    images_each = similarity.argmax(dim=0).bincount(minlength=len(prototypes))
    by_use = images_each.argsort(descending=True)
    chosen = by_use[torch.linspace(0, len(by_use) - 1, rows).long()]
    nearest = similarity[chosen].topk(min(columns, len(crops))).indices.cpu()
    pictures = crops[nearest.flatten()].float() / 255
    save_image(pictures, out / "prototypes.png", nrow=nearest.shape[1])


def draw_prior(usage, prior, divergence, out):
    """prior.png. Left: log10 of the shares of prototypes, sorted, of the mean prediction `usage`
    (K,), red, and of the prior (K,), black. Right: the log's `divergence` of the two over time."""
    if rank() > 0:
        return
    lines = (out / "log.jsonl").read_text().splitlines()
    history = torch.tensor([json.loads(line)[divergence] for line in lines])
    shares = [x.sort(descending=True).values for x in (prior, usage)]
    shares = [x.clamp(min=0.01 / len(prior)).log10() for x in shares]
    picture = Image.new("RGB", (840, 340), "white")
    pen = ImageDraw.Draw(picture)
    draw_curves(pen, 10, "log10 of prototypes' shares, sorted: prior black, use red", shares)
    draw_curves(pen, 430, "KL(use || prior) over the run, nats", [history])
    picture.save(out / "prior.png")


def draw_curves(pen, left, title, curves):
    """One or two curves, 400 pixels wide, on one scale, the first black, the second red."""
    low = min(y.min() for y in curves)
    high = max(y.max() for y in curves)
    pen.text((left, 5), f"{title}; {low:.2f} to {high:.2f}", "black")
    for y, colour in zip(curves, ("black", "red")):
        y = 330 - 300 * (y - low) / (high - low).clamp(min=1e-9)
        x = torch.linspace(left, left + 400, len(y))
        pen.line(torch.stack([x, y], dim=1).flatten().tolist(), colour, 2)


if __name__ == "__main__":
    main()
