# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""VICReg (Bardes et al., ICLR 2022, arXiv 2105.04906), in one file.

The embeddings of two views of an image shall be close (invariance), while in the batch every
dimension keeps a standard deviation of at least 1 (variance) and no two dimensions correlate
(covariance). The last two prevent collapse; they spread a batch out, which is a hidden prior that
clusters are of equal size (arXiv 2210.07277).

    loss = 25 s(Z, Z') + 25 (v(Z) + v(Z')) / 2 + c(Z) + c(Z')                           (Eq. 6)
    s: mean squared distance; v: mean of max(0, 1 - deviation) over dimensions;
    c: sum of squared covariances of different dimensions / D

    python vicreg.py                                                    plates, minutes on a laptop
    torchrun --nproc_per_node=8 vicreg.py --data IMAGENET --k-classes 960    (or 8: imbalanced)

Read vicreg_loss, then VICReg and vicreg_step, then train; sampler.py says what --k-classes does.
In shapes: B images a process, N of all W processes, D width.
"""

import argparse
import itertools
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
from torchvision import models
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from sampler import KClassBatchSampler, long_tail

# ---- 1. Hyper-parameters

# Every entry is an option of its name. These are the official code's, and the study's 300 epochs.
PAPER = dict(
    arch="resnet50", image_size=224, hidden=8192, output=8192,  # of the expander
    sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0,
    crop=[0.08, 1.0],  # fraction of the image's area
    flip=0.5, grey=0.2, blur=[1.0, 0.1], solarise=[0.0, 0.2],  # probabilities, in pairs a view
    jitter=[0.4, 0.4, 0.2, 0.1],  # brightness, contrast, saturation, hue; with probability 0.8
    blur_sigma=[0.1, 2.0], threshold=0.5,  # pixels; from which value on solarise inverts
    standardise=False,  # normalise by each view's own mean and deviation, not by ImageNet's
    batch_size=2048, epochs=300, warmup=10.0,  # of all processes; warm-up in epochs
    base_lr=0.2, final_lr=0.001,  # for a batch of 256; fraction of the peak
    weight_decay=1e-6, momentum=0.9, trust=0.001,
)  # fmt: skip
CIFAR = PAPER | dict(
    arch="resnet18", image_size=32, hidden=512, output=512, blur=[0.0, 0.0], batch_size=512,
    epochs=100, base_lr=0.3,
)  # fmt: skip
RECIPES = {
    "paper": PAPER,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "plates": PAPER | dict(
        arch="small", image_size=32, hidden=512, output=512, crop=[0.6, 1.0], flip=0.0, grey=0.0,
        blur=[0.0, 0.0], solarise=[0.5, 0.5], threshold=0.0, jitter=[0.8, 0.8, 0.0, 0.0],
        cov_coeff=4.0, batch_size=1024, epochs=7, warmup=0.3, base_lr=0.25, trust=0.01,
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
    p.add_argument("--out", default="runs/vicreg", help="folder of checkpoint.pt, log.jsonl, views")
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
        if name == "arch":
            kind = dict(choices=ARCHITECTURES)
        p.add_argument(f"--{name.replace('_', '-')}", help=f"paper: {value}", **kind)
    args = p.parse_args(argv)
    args.recipe = args.recipe or (args.data if args.data in RECIPES else "paper")
    recipe = dict(RECIPES[args.recipe])
    if (args.k_classes or 0) > recipe["batch_size"]:  # a batch that the user gave stays as it is
        recipe["batch_size"] = -(-args.k_classes // 128) * 128
        if args.batch_size is None and os.environ.get("RANK", "0") == "0":
            print(f"batch size raised to {recipe['batch_size']} to hold {args.k_classes} classes")
    vars(args).update({k: v for k, v in recipe.items() if getattr(args, k) is None})
    shares = "flip grey blur solarise threshold momentum crop".split()
    may_be_0 = "seed workers long_tail jitter warmup final_lr weight_decay sim_coeff std_coeff"
    may_be_0 = f"{may_be_0} cov_coeff".split() + shares
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            limit = 1 if name in shares else 2**63 if name == "seed" else sys.float_info.max
            number, low = type(x) in (int, float), "from" if name in may_be_0 else "above"
            if number and not (0 < x <= limit or x == 0 and name in may_be_0):
                fail(f"--{name.replace('_', '-')} {x}: give a number {low} 0 to {limit:.2g}")
    if args.batch_size < 2:
        fail(f"--batch-size {args.batch_size}: BatchNorm needs at least 2")
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


# ---- 4. Method
def vicreg_loss(z1, z2, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0):
    """Eq. 6, of the two views' embeddings z1, z2 (B, D) -> (loss, invariance, variance,
    covariance), the terms before their coefficients. Invariance is this process's mean, which DDP
    averages, and over dimensions too (official code); the others are of all processes."""
    dtype, N = torch.promote_types(z1.dtype, torch.float32), len(z1) * world_size()
    z1, z2 = z1.to(dtype), z2.to(dtype)
    invariance, variance, covariance = F.mse_loss(z1, z2), 0.0, 0.0
    for z in (z1, z2):
        z = z - all_reduce_mean(z.mean(dim=0))
        var = all_reduce_mean(z.square().mean(dim=0)) * N / (N - 1)  # (D,)
        variance = variance + F.relu(1 - (var + 1e-4).sqrt()).mean() / 2  # 1e-4: finite gradient
        # The sum of squares of Z'Z (D, D) is that of ZZ' (N, N), of which a process needs its rows.
        squares = all_reduce_mean((z @ gather(z).T).square().sum() * world_size()) / (N - 1) ** 2
        covariance = covariance + (squares - var.square().sum()) / z.shape[1]  # less the diagonal
    loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return loss, invariance, variance, covariance


class VICReg(nn.Module):
    """Encoder and expander: Linear, BatchNorm, ReLU, twice, then Linear without bias."""

    def __init__(self, encoder, dim, hidden, output):
        super().__init__()
        self.encoder, self.expander = encoder, nn.Sequential()
        for before in (dim, hidden):
            self.expander.extend([nn.Linear(before, hidden), BatchNorm(hidden), nn.ReLU()])
        self.expander.append(nn.Linear(hidden, output, bias=False))

    def forward(self, x1, x2):
        """Two views (B, 3, H, W), each a batch of its own for BatchNorm -> embeddings (B, D)."""
        return self.expander(self.encoder(x1)), self.expander(self.encoder(x2))


def vicreg_step(model, optimizer, x1, x2, lr, bf16=False, **coefficients):
    """One step on two views (B, 3, H, W) -> (4,): the loss and its three terms."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(x1.device.type, torch.bfloat16, enabled=bf16):
        z1, z2 = model(x1, x2)
    terms = vicreg_loss(z1, z2, **coefficients)
    optimizer.zero_grad()
    terms[0].backward()
    optimizer.step()
    return torch.stack(terms).detach()


# ---- 5. Optimiser and schedules
class LARS(torch.optim.Optimizer):
    """SGD with momentum in which the step of a weight tensor w, gradient g, is scaled by trust
    |w| / |g + weight_decay w|; biases and norms (one dimension) are neither scaled nor decayed.
    lr_in_buffer: momentum sums lr x gradient (SimCLR), else gradients (VICReg): they differ
    while the rate changes."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001, lr_in_buffer=False):
        options = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, options | dict(lr_in_buffer=lr_in_buffer))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.ndim <= 1]
            weights = [p for p in group["params"] if p.grad is not None and p.ndim > 1]
            steps = [p.grad for p in params]
            if weights:
                decay, gradients = group["weight_decay"], [p.grad for p in weights]
                gradients = torch._foreach_add(gradients, weights, alpha=decay)
                sizes = torch.stack(torch._foreach_norm(weights))
                ratios = group["trust"] * sizes / torch.stack(torch._foreach_norm(gradients))
                ratios = torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)  # a norm is 0
                params += weights
                steps += torch._foreach_mul(gradients, [*ratios])
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            inside, outside = (group["lr"], 1) if group["lr_in_buffer"] else (1, group["lr"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps, alpha=inside)
            torch._foreach_add_(params, buffers, alpha=-outside)


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


def gather(z):
    """(B, ...) of each process -> (W * B, ...), by rank. Backward: every process's gradient,
    summed; after DDP's mean over processes that is the full batch's gradient."""
    padded = z.new_zeros(world_size(), *z.shape)
    padded[rank()] = z
    return all_reduce_mean(world_size() * padded).flatten(0, 1)


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
    free = ("out", "steps", "workers", "log_every", "save_every")  # may change between starts
    options = {"script": "vicreg"} | {k: v for k, v in vars(args).items() if k not in free}
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
    steps, peak = args.epochs * epoch_steps, args.base_lr * args.batch_size / 256
    stop = min(args.steps or steps, steps)

    def stream():
        for epoch in range(start // epoch_steps, -(-stop // epoch_steps)):
            sampler.set_epoch(epoch)
            batches = enumerate(sampler, epoch * epoch_steps)
            yield from ((step, indices) for step, indices in batches if start <= step < stop)

    groups = [(2, args.image_size, args.crop)]
    views = CroppedViews(images, groups, args.flip, args.seed, rank(), W)
    workers = 0 if torch.is_tensor(images) else os.cpu_count() // W
    workers = workers if args.workers is None else args.workers
    pin = device.type == "cuda"
    loader = DataLoader(views, None, sampler=stream(), num_workers=workers, pin_memory=pin)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    encoder, dim = resnet(args.arch, args.image_size)
    vicreg = VICReg(encoder, dim, args.hidden, args.output)
    vicreg.to(device, memory_format=torch.channels_last)  # faster on either device
    optimizer = LARS(vicreg.parameters(), 0, **pick("weight_decay momentum trust"))
    parts = dict(vicreg=vicreg, encoder=encoder, optimizer=optimizer)
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    if device.type == "cuda":  # the same statistics, in one kernel
        vicreg = nn.SyncBatchNorm.convert_sync_batchnorm(vicreg)
    model = DistributedDataParallel(vicreg)

    log, bar = out / "log.jsonl", tqdm(total=stop, initial=start, disable=rank() > 0 or None)
    if rank() == 0 and start < stop:
        print(json.dumps(options), flush=True)
        lines = log.read_bytes().splitlines(keepends=True)[:logged]
        os.truncate(log, sum(map(len, lines)))  # drop what a killed run logged after its last save
    terminated, clock, mark, now = [], time.time(), start, start
    handler = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    for step, crops in zip(range(start, stop), loader):
        if isinstance(crops, str):
            bar.close()
            fail(crops, everywhere=True)
        B = crops[0].shape[1]  # (2, B, 3, H, W)
        torch.manual_seed(hash((args.seed, step, 1)))
        u = torch.rand(2, B * W, 13)[:, rank() * B :][:, :B]  # drawn for all processes, then cut
        inputs = []
        for view, numbers, blur, solarise in zip(crops[0].to(device), u, args.blur, args.solarise):
            colours = pick("jitter grey blur_sigma threshold") | dict(blur=blur, solarise=solarise)
            inputs.append(normalise(photometry(view, numbers, **colours), args.standardise))
        lr = learning_rate(step, int(args.warmup * epoch_steps), steps, peak, args.final_lr * peak)
        coefficients = pick("sim_coeff std_coeff cov_coeff")
        terms = vicreg_step(model, optimizer, *inputs, lr, args.bf16, **coefficients)
        recent.append(terms)
        now, _ = step + 1, bar.update()
        flag = torch.tensor(float(bool(terminated)))
        dist.all_reduce(flag)
        last = now == stop or flag > 0
        if step == 0 and rank() == 0:
            rows = torch.cat([view[:8] for view in inputs])
            save_image(rows, out / "views.png", nrow=8, normalize=True, scale_each=True)
        if not last and now % args.log_every and now % args.save_every:
            continue
        recent = list(all_reduce_mean(torch.stack([x.to(device) for x in recent])).cpu())
        for number, values in enumerate(recent, now - len(recent) + 1):
            if not values.isfinite().all():
                bar.close()
                fail(f"the loss is not finite at step {number}: lower --base-lr {args.base_lr}")
        logs, saves = last or now % args.log_every == 0, last or now % args.save_every == 0
        if rank() == 0 and logs:
            terms = torch.stack(recent).mean(dim=0).tolist()
            line = dict(step=now, epoch=step // epoch_steps, lr=lr)
            line |= zip(("loss", "invariance", "variance", "covariance"), terms)
            line |= dict(images_per_second=(now - mark) * args.batch_size / (time.time() - clock))
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            bar.set_postfix({name: f"{line[name]:.3g}" for name in list(line)[3:]})
        if now % args.log_every == 0:
            recent, logged, clock, mark = [], logged + 1, time.time(), now
        if rank() == 0 and saves:
            saved = dict(options=options, step=now, recent=recent, logged=logged)
            saved |= {name: part.state_dict() for name, part in parts.items()}
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
