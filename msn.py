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
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
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

from sampler import (
    IN_MEMORY,
    KClassBatchSampler,
    Unreadable,
    open_data,
    read_image,
)

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
    position_std=0.5,  # at 0.02 positions drown in what the stem puts out
    batch_size=1024, epochs=3, warmup=0.33, start_lr=5e-4, lr=4e-3, ema=0.95,
    clip=0.1,  # the first gradients are large, and AdamW would remember them for the whole run
)  # fmt: skip

# Options have the study's values as defaults (ViT-B/16), or else the official code's; a recipe
# replaces some.
RECIPES = {
    "paper": {},
    "vit-s16": dict(dim=384, heads=6, patch_drop=0.15, sinkhorn=True, epochs=800),
    "cifar10": SMALL | dict(focal_views=4),
    "cifar100": SMALL | dict(focal_views=4),
    "plates": PLATES,
    "plates-tail": PLATES | dict(long_tail=1.0),
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
    g.add_argument("--ema", type=fraction, default=0.996, help="of the target at first; rises")

    g = p.add_argument_group("views")
    g.add_argument("--image-size", type=positive_int, default=224, help="full-size views, pixels")
    g.add_argument("--focal-size", type=positive_int, default=96, help="focal views, pixels")
    g.add_argument("--rand-views", type=positive_int, default=1, help="full-size anchors per image")
    g.add_argument("--focal-views", type=count, default=10, help="focal anchors per image")
    g.add_argument("--patch-drop", type=fraction, default=0.3, help="of full-size anchors' patches")
    g.add_argument("--rand-crop", type=fraction, nargs=2, default=[0.3, 1.0], help="area")
    g.add_argument("--focal-crop", type=fraction, nargs=2, default=[0.05, 0.3], help="area")
    g.add_argument("--flip", type=fraction, default=0.5, help="probability")
    g.add_argument("--jitter", type=nonnegative, nargs=4, default=[0.4, 0.4, 0.4, 0.1],
                   help="strength: brightness, contrast, saturation, hue")  # fmt: skip
    g.add_argument("--grey", type=fraction, default=0.2, help="probability")
    g.add_argument("--blur", type=fraction, default=0.5, help="probability")
    g.add_argument("--blur-sigma", type=positive, nargs=2, default=[0.1, 2.0], help="pixels")
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
    g.add_argument("--position-std", type=nonnegative, default=0.02, help="of positions, at first")
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
    sizes = [args.image_size] + [args.focal_size] * (args.focal_views > 0)
    if any(size % args.patch_size for size in sizes):
        fail(f"--patch-size {args.patch_size} does not divide views of {sizes} pixels: change one")
    halvings = math.ceil(len(args.stem) / 2)
    if args.stem and 2**halvings != args.patch_size:
        stem = f"--stem of {len(args.stem)} layers"
        fail(f"{stem} halves {halvings} times, not down to --patch-size {args.patch_size}")
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
    anchors, targets, prototypes, temperature=0.1, sharpen=0.25, me_max_weight=1.0,
    sinkhorn=False,
):  # fmt: skip
    """Eq. 1 of MSN. anchors (V*B, D), view-major; targets (B, D); prototypes (K, D).

    Targets are labels, without gradient: sharpened and, with sinkhorn, balanced over prototypes.
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
class EncoderBlock(nn.Module):
    """Transformer block, pre-norm, with timm's parameter names: (B, N, D) -> (B, n, D).

    outputs: the first n tokens alone are put out; None: all."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, outputs=None):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        mixed = F.scaled_dot_product_attention(q[:, :, :outputs], k, v)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, n, D)
        x = x[:, :outputs] + self.attn["proj"](mixed)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, n, 4D)
        return x + self.mlp["fc2"](hidden)


class VisionTransformer(nn.Module):
    """ViT with timm's parameter names, without a classifier.

    images (B, 3, H, W) and keep, the indices of the patches to use (None: all)
    -> representations (B, D): the cls token after the final norm."""

    def __init__(
        self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, stem=(),
        position_std=0.02,
    ):  # fmt: skip
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=patch_projection(patch_size, dim, stem)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))
        self.blocks = nn.Sequential(*[EncoderBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=position_std)
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
        x = last(x, outputs=1)  # (B, 1, D): of its output only cls is used, so no more is computed
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

    With `stem`, channels of 3x3 convolutions with BatchNorm and ReLU: the first, third, ... of them
    have stride 2, and a 1x1 convolution to D comes last."""
    if not stem:
        return nn.Conv2d(3, dim, patch_size, patch_size)
    layers = []
    for i, (before, after) in enumerate(itertools.pairwise([3, *stem])):
        stride = 2 - i % 2
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
        layers.append(BatchNorm(after))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(stem[-1], dim, 1))


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

    As in the official code they last for 1.25 times the run, so that none reaches its end, and the
    first two are advanced before the update."""
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


# ---- 5. Views
def siamese_views(crops, args, device):
    """Colour and normalise crops, uint8 (V, B, 3, H, W), and add noise: the network's inputs."""
    V, B = crops.shape[:2]
    pixels = photometry(
        crops.to(device, non_blocking=True), args.jitter, args.grey, args.blur, args.blur_sigma,
        args.solarise, args.threshold,
    )  # fmt: skip
    pixels = normalise(pixels, args.standardise)
    if args.noise:  # grey, of the batch of all processes
        noise = torch.randn(V, B * world_size(), 1, *crops.shape[3:])[:, own_part(B)]
        pixels = pixels + args.noise * noise.flatten(0, 1).to(device, non_blocking=True)
    return pixels.unflatten(0, (V, B))


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


def photometry(crops, jitter, grey, blur, blur_sigma, solarise, threshold):
    """Random colours of V views of B images: uint8 (V, B, 3, H, W) -> float32 (V * B, 3, H, W) in
    [0, 1]. Four in five images are jittered, see jitter_colours; grey, blur and solarise are
    probabilities. Equal to torchvision's functions with the same parameters, image by image."""
    V, B = crops.shape[:2]
    image = crops.flatten(0, 1).float().div_(255)
    jitter_some(image, V, jitter, probability=0.8)
    change_some(image, uniform(V, B) < grey, greyscale)

    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * uniform(V, B)
    radius = min(math.ceil(3 * blur_sigma[1]), image.shape[-1] - 1)
    change_some(image, uniform(V, B) < blur, functools.partial(gaussian_blur, radius=radius), sigma)

    invert = functools.partial(invert_bright, threshold=threshold)
    change_some(image, uniform(V, B) < solarise, invert)
    return image


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


# ---- 6. Training
def patches_to_keep(args):
    """Random indices of the patches that full-size anchors keep, the same for all images."""
    order = torch.randperm((args.image_size // args.patch_size) ** 2)
    return order[: int(len(order) * (1 - args.patch_drop))]


def msn_step(model, target, optimizer, target_view, anchor_views, keep, rates, args):
    """One update in the official order: clip, step, move the target.

    target_view (B, 3, H, W); anchor_views: full-size and focal, (V*B, 3, H, W) each; keep: indices
    of the patches that full-size anchors keep; rates: see schedule.
    Returns metrics {name: scalar tensor of this process}."""
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
        p = log_assignment(anchors, prototypes, args.temperature).exp()  # (V*B, K)
        mean_p = all_reduce_mean(p.mean(dim=0))  # (K,)
        entropy = torch.special.entr(mean_p).sum()  # of the mean prediction
        own_entropy = torch.special.entr(p).sum(dim=1).mean()  # of a prediction

    optimizer.zero_grad()
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(decayed["params"] + vectors["params"], args.clip)
    optimizer.step()
    with torch.no_grad():  # parameters only: the target's BatchNorm has statistics of its own
        torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 1 - rates["ema"])

    return dict(
        loss=loss,
        cross_entropy=cross_entropy,
        me_max=me_max,
        entropy=entropy,
        information=entropy - own_entropy,  # between view and prototype; 0: collapse
        gradient_norm=gradient_norm,
    )


def train(args, device):
    """Run continues, logs, saves and stops; the method is one update, above."""
    images, sampler = training_data(args)
    torch.manual_seed(args.seed)  # the same initial weights on every process
    encoder = VisionTransformer(
        args.image_size, args.patch_size, args.dim, args.depth, args.heads, args.stem,
        args.position_std,
    )  # fmt: skip
    anchor = MSN(encoder, args.dim, args.hidden, args.output, args.num_prototypes)
    anchor = synchronise_batchnorm(anchor, device)
    anchor.to(device, memory_format=torch.channels_last)  # faster on CPUs and GPUs
    target = copy.deepcopy(anchor).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(anchor), fused=True)
    parts = dict(msn=anchor, target=target, encoder=target.encoder, optimizer=optimizer)
    run = Run("msn", parts, sampler, args)
    model = DistributedDataParallel(anchor, gradient_as_bucket_view=True)

    sizes = [(1 + args.rand_views, args.image_size, args.rand_crop)]  # the first is the target
    if args.focal_views:
        sizes.append((args.focal_views, args.focal_size, args.focal_crop))
    loader = batch_loader(CroppedViews(images, sizes, args), sampler, run, args)
    for step, crops in run.steps(loader):
        full, *focal = [siamese_views(size, args, device) for size in crops]  # (V, B, 3, H, W)
        target_view = full[0]
        anchor_views = [views.flatten(0, 1) for views in (full[1:], *focal)]
        keep = patches_to_keep(args).to(device, non_blocking=True)
        rates = schedule(step, len(sampler), args)
        metrics = msn_step(
            model, target, optimizer, target_view, anchor_views, keep, rates, args
        )  # fmt: skip
        if step == 0:
            draw_views([full, *focal], run.out, normalised=True)
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
two_or_more = number(int, 2)
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


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, D, ...) by the batch of all processes, on CPUs too, unlike SyncBatchNorm."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        x = x.to(self.weight)  # statistics of bfloat16 would be too coarse
        pixels = x.reshape(*x.shape[:2], -1)  # (B, D, pixels)
        count = pixels[:, 0].numel()
        # Sums, pixels first: the gradient of a mean over all takes twice the time.
        mean = pixels.sum(dim=2).sum(dim=0) / count  # (D,), of this process
        centred = pixels - mean.detach()[:, None]
        variance = centred.square().sum(dim=2).sum(dim=0) / count

        mean = mean.double()
        mean, square = all_reduce_mean(torch.stack([mean, mean.square() + variance]))
        variance = square - mean.square()  # of all processes
        count *= world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(x), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(x), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        zeros = torch.zeros_like(self.weight)  # x * scale + shift, by torch's kernel, which is fast
        return F.batch_norm(x, zeros, zeros + 1, scale.to(x), shift.to(x), eps=0.0)


def synchronise_batchnorm(model, device):
    """On GPUs torch's SyncBatchNorm takes BatchNorm's place: the same statistics, fused."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


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
