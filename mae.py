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

Read MAE in section 4, then train; sampler.py says what --k-classes does.
In shapes: B images a process, N patches, D width, p pixels a patch's side.
"""

import argparse
import json
import math
import os
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

# Every entry is an option of its name. These are the paper's and the official code's: ViT-B/16.
PAPER = dict(
    image_size=224, patch_size=16, dim=768, depth=12, heads=12,
    decoder_dim=512, decoder_depth=8, decoder_heads=16,
    mask_ratio=0.75, norm_pix_loss=True,  # predict each patch less its mean, by its deviation
    crop=[0.2, 1.0],  # fraction of the image's area
    flip=0.5,  # probability
    standardise=False,  # normalise by each view's own mean and deviation, not by ImageNet's
    batch_size=4096, epochs=800, warmup=40.0,  # of all processes; warm-up in epochs
    base_lr=1.5e-4, final_lr=0.0,  # for a batch of 256; fraction of the peak
    weight_decay=0.05,
)  # fmt: skip
SMALL = PAPER | dict(
    image_size=32, patch_size=4, dim=128, depth=4, heads=4, decoder_dim=64, decoder_depth=1,
    decoder_heads=2, batch_size=256, epochs=100, warmup=5.0, base_lr=2e-3,
)  # fmt: skip
RECIPES = {
    "paper": PAPER,
    "cifar10": SMALL,
    "cifar100": SMALL,
    "plates": SMALL | dict(
        patch_size=16, decoder_dim=128, mask_ratio=0.5, crop=[0.8, 1.0], flip=0.0,
        standardise=True, batch_size=960, base_lr=8e-4, epochs=10, warmup=1.0,
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
    p.add_argument("--out", default="runs/mae", help="folder of checkpoint, log, pictures")
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
    shares = "flip mask_ratio crop".split()
    may_be_0 = "seed workers long_tail warmup final_lr weight_decay".split() + shares
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            limit = 1 if name in shares else 2**63 if name == "seed" else sys.float_info.max
            number, low = type(x) in (int, float), "from" if name in may_be_0 else "above"
            if number and not (0 < x <= limit or x == 0 and name in may_be_0):
                fail(f"--{name.replace('_', '-')} {x}: give a number {low} 0 to {limit:.2g}")
    if args.image_size % args.patch_size:
        size = f"--image-size {args.image_size}"
        fail(f"--patch-size {args.patch_size} does not divide {size}: choose a divisor")
    for part in ("", "decoder_"):
        dim, heads = getattr(args, f"{part}dim"), getattr(args, f"{part}heads")
        flag = f"--{part}".replace("_", "-")
        if dim % heads or dim % 4:
            fail(f"{flag}dim {dim}: {flag}heads {heads} and 4 (of positions) must divide it")
    patches = (args.image_size // args.patch_size) ** 2
    if not 0 < int(patches * (1 - args.mask_ratio)) < patches:
        fail(f"--mask-ratio {args.mask_ratio} of {patches} patches keeps none or all: change it")
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


# ---- 4. Method
def patchify(images, patch_size):
    """(B, 3, H, W) -> (B, N, 3 * p * p), row after row; in a patch row, column, channel."""
    p, g = patch_size, images.shape[2] // patch_size
    grid = images.unflatten(2, (g, p)).unflatten(4, (g, p))  # (B, 3, g, p, g, p)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, patch_size):
    """The reverse: (B, N, 3 * p * p) -> (B, 3, H, W)."""
    p, g = patch_size, math.isqrt(patches.shape[1])
    grid = patches.unflatten(2, (p, p, 3)).unflatten(1, (g, g))  # (B, g, g, p, p, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches):
    """Mean and deviation of each patch over pixels and channels: (B, N, 1) each."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)  # unbiased, as official
    return mean, (variance + 1e-6).sqrt()


def mae_loss(pred, patches, mask, norm_pix_loss=False):
    """Mean squared error of the removed patches. pred, patches (B, N, 3 * p * p); mask (B, N), 1:
    removed. With norm_pix_loss patches are normalised one by one. In float32 (or 64)."""
    if norm_pix_loss:
        mean, deviation = patch_statistics(patches)
        patches = (patches - mean) / deviation
    error = (pred.to(patches) - patches).square().mean(dim=2)  # (B, N)
    return (error * mask).sum() / mask.sum()


class MAE(nn.Module):
    """Encoder and decoder, under the official names: a released checkpoint loads strictly, and all
    but mask_token and decoder* is a ViT of timm's, without classifier."""

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, decoder_dim=512,
                 decoder_depth=8, decoder_heads=16, norm_pix_loss=False):  # fmt: skip
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, grid).float()[None], False)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        positions = sincos_position_embedding(decoder_dim, grid).float()[None]
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        blocks = [Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, 1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        self.apply(initialise_mae)

    def encode(self, images, keep):
        """images (B, 3, H, W), keep (B, n): patches to see, in this order -> (B, 1 + n, D)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + self.pos_embed[:, 1:]
        x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, x], dim=1)))

    def decode(self, latent, inverse):
        """latent (B, 1 + n, D), inverse (B, N): where each patch stands in the sequence of those
        kept and those removed -> pixels of all patches (B, N, 3 * p * p)."""
        cls, x = self.decoder_embed(latent).split([1, latent.shape[1] - 1], dim=1)
        missing = self.mask_token.to(x).expand(len(x), inverse.shape[1] - x.shape[1], -1)
        x = torch.cat([x, missing], dim=1)  # (B, N, decoder_dim)
        x = x.gather(1, inverse[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def forward(self, images, mask_ratio=0.75, noise=None):
        """images (B, 3, H, W), normalised; noise (B, N): the patches of the smallest are kept;
        None: uniform -> loss; pred (B, N, 3 * p * p); mask (B, N), 1: removed."""
        N = self.pos_embed.shape[1] - 1
        noise = torch.rand(len(images), N, device=images.device) if noise is None else noise
        order = noise.argsort(dim=1)
        inverse, keep = order.argsort(dim=1), int(N * (1 - mask_ratio))
        mask = (inverse >= keep).to(images.dtype)
        pred = self.decode(self.encode(images, order[:, :keep]), inverse)
        patches = patchify(images, self.patch_size)
        return mae_loss(pred, patches, mask, self.norm_pix_loss), pred, mask


def encoder_state(mae):
    """The encoder's part of the state dict: timm's names."""
    decoder = ("mask_token", "decoder")
    return {name: x for name, x in mae.state_dict().items() if not name.startswith(decoder)}


def mae_step(model, optimizer, images, noise, lr, mask_ratio=0.75, bf16=False):
    """One step on images (B, 3, H, W) with the noise (B, N) of their masks -> gradient norm and
    loss, of this process; the prediction; the mask."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss, pred, mask = model(images, mask_ratio, noise)
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()  # not clipped, as official
    optimizer.step()
    return torch.stack([norm, loss]).detach(), pred.detach(), mask


def draw_reconstruction(images, pred, mask, patch_size, norm_pix_loss, path):
    """Picture of images (B, 3, H, W), of what the encoder sees, and of that with the prediction in
    the gaps, a row each; each patch's own mean and deviation are given back to it."""
    patches, mask = patchify(images, patch_size), mask[:, :, None]
    if norm_pix_loss:
        mean, deviation = patch_statistics(patches)
        pred = pred.to(patches) * deviation + mean
    rows = [patches, patches * (1 - mask), torch.where(mask > 0, pred.to(patches), patches)]
    rows = torch.cat([unpatchify(x, patch_size) for x in rows])
    low, high = images.min().item(), images.max().item()
    save_image(rows, path, nrow=len(images), normalize=True, value_range=(low, high))


# ---- 5. Optimiser and schedule
def decay_groups(model):
    """For AdamW: matrices, cls and mask token, which decay; biases, norms. Positions are fixed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [dict(params=weights), dict(params=others, weight_decay=0.0)]


def optimizer_of(model, weight_decay):
    """AdamW as in the official code; the rate is set at every step."""
    groups = decay_groups(model)
    return torch.optim.AdamW(groups, 0.0, (0.9, 0.95), weight_decay=weight_decay, fused=True)


def learning_rate(step, warmup, steps, peak, final):
    """Rate of update `step` (from 0, where it is 0): linear for `warmup` steps, then a cosine from
    peak to final at `steps`."""
    if step < warmup:
        return peak * step / warmup
    share = min((step - warmup) / max(steps - warmup, 1), 1)
    return final + (peak - final) * (1 + math.cos(math.pi * share)) / 2


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
    device, out = init_distributed(), Path(args.out)
    R, W = dist.get_rank(), dist.get_world_size()  # this process's number, of how many
    free = ("out", "steps", "workers", "log_every", "save_every")  # may change between starts
    options = {"script": "mae"} | {k: v for k, v in vars(args).items() if k not in free}
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
    steps, peak = args.epochs * epoch_steps, args.base_lr * args.batch_size / 256
    stop = min(args.steps or steps, steps)

    def stream():
        for epoch in range(start // epoch_steps, -(-stop // epoch_steps)):
            sampler.set_epoch(epoch)
            batches = enumerate(sampler, epoch * epoch_steps)
            yield from ((step, indices) for step, indices in batches if start <= step < stop)

    groups = [(1, args.image_size, args.crop)]
    views = CroppedViews(images, groups, args.flip, args.seed, R, W)
    workers = 0 if torch.is_tensor(images) else os.cpu_count() // W
    workers = workers if args.workers is None else args.workers
    pin = device.type == "cuda"
    loader = DataLoader(views, None, sampler=stream(), num_workers=workers, pin_memory=pin)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    sizes = "image_size patch_size dim depth heads decoder_dim decoder_depth decoder_heads"
    sizes = {name: getattr(args, name) for name in f"{sizes} norm_pix_loss".split()}
    mae = MAE(**sizes).to(device)
    optimizer = optimizer_of(mae, args.weight_decay)
    parts = dict(mae=mae, optimizer=optimizer)
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    model = DistributedDataParallel(mae)

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
        images = normalise(crops[0][0].to(device).float() / 255, args.standardise)  # (B, 3, H, W)
        B, N = len(images), (args.image_size // args.patch_size) ** 2
        torch.manual_seed(hash((args.seed, step, 1)))
        noise = torch.rand(B * W, N)[R * B :][:B].to(device)  # of the global batch, then cut
        lr = learning_rate(step, int(args.warmup * epoch_steps), steps, peak, args.final_lr * peak)
        inputs = model, optimizer, images, noise, lr
        terms, pred, mask = mae_step(*inputs, args.mask_ratio, args.bf16)
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
                fail(f"the loss is not finite at step {number}: lower --base-lr {args.base_lr}")
        logs, saves = last or now % args.log_every == 0, last or now % args.save_every == 0
        if R == 0 and logs:
            norm, loss = torch.stack(recent).mean(dim=0).tolist()
            line = dict(step=now, epoch=step // epoch_steps, lr=lr, loss=loss, gradient_norm=norm)
            line |= dict(images_per_second=(now - mark) * args.batch_size / (time.time() - clock))
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            bar.set_postfix({name: f"{line[name]:.3g}" for name in list(line)[3:]})
        if now % args.log_every == 0:
            recent, logged, clock, mark = [], logged + 1, time.time(), now
        if R == 0 and saves:
            saved = dict(options=options, step=now, recent=recent, logged=logged)
            saved |= {name: part.state_dict() for name, part in parts.items()}
            saved["encoder"] = encoder_state(mae)
            torch.save(saved, out / "checkpoint.partial")  # renamed: a kill leaves no half file
            os.replace(out / "checkpoint.partial", out / "checkpoint.pt")
            shown = *(x[:8] for x in (images, pred, mask)), args.patch_size, args.norm_pix_loss
            draw_reconstruction(*shown, out / "reconstruction.png")
        if last:
            break
    bar.close()
    signal.signal(signal.SIGTERM, handler)
    dist.destroy_process_group()


def main(argv=None):
    train(parse_args(argv))


if __name__ == "__main__":
    main()
