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

from sampler import IN_MEMORY, KClassBatchSampler, Unreadable, open_data, read_image

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
        patch_size=16, dim=64,
        mask_ratio=0.5,
        crop=[0.8, 1.0], flip=0.0, standardise=True,
        batch_size=960, epochs=10, warmup=1.0, base_lr=2.5e-3,
    ),
}  # fmt: skip


def parse_args(argv=None):
    p = option_parser(__doc__, out="runs/mae", recipes=RECIPES)

    g = p.add_argument_group("method")
    g.add_argument("--mask-ratio", type=fraction, default=0.75, help="of patches, removed")
    g.add_argument("--norm-pix-loss", action=argparse.BooleanOptionalAction, default=True,
                   help="predict patches normalised by their own mean and deviation")  # fmt: skip

    g = p.add_argument_group("views")
    g.add_argument("--image-size", type=positive_int, default=224, help="pixels")
    g.add_argument("--crop", type=fraction, nargs=2, default=[0.2, 1.0], help="of the area")
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
        """images (B, 3, H, W), normalised; noise (B, N): patches of the smallest are kept, as many
        as the ratio leaves, rounded down; None: uniform. Returns the loss; pred (B, N, 3 * p * p);
        mask (B, N), 1: removed."""
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

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + self.attn["proj"](mixed)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, N, 4D)
        return x + self.mlp["fc2"](hidden)


def initialise(module):
    """The official initial weights: linear Xavier uniform, over the three of qkv at once; bias 0.
    The patches' convolution as a linear map, its bias as torch has it."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def encoder_of(mae):
    """The same modules without the decoder, under timm's names: what is evaluated."""
    encoder = nn.Module()
    encoder.cls_token = mae.cls_token
    encoder.pos_embed = mae.pos_embed
    encoder.patch_embed = mae.patch_embed
    encoder.blocks = mae.blocks
    encoder.norm = mae.norm
    return encoder


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


# ---- 5. Views
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
    images, sampler = training_data(args)
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
    parts = dict(mae=mae, encoder=encoder_of(mae), optimizer=optimizer)
    run = Run("mae", parts, sampler, args)
    model = DistributedDataParallel(mae, gradient_as_bucket_view=True)

    dataset = CroppedViews(images, [(1, args.image_size, args.crop)], args)
    for step, (crops,) in run.steps(batch_loader(dataset, sampler, run, args)):
        images, noise = mae_inputs(crops, args, device)
        rates = schedule(step, len(sampler), args)
        metrics, pred, mask = mae_step(model, optimizer, images, noise, rates["lr"], args)
        if step == 0:
            draw_views([images[None]], run.out, normalised=True)
        run.log(metrics, rates)
        if run.step % args.log_every == 0 or run.step == run.last:
            draw_reconstruction(images[:8], pred[:8], mask[:8], mae, run.out)


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
