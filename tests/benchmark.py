"""Speed and memory of the scripts, side by side with lightly, torchvision, Pillow and the machine.

    python tests/benchmark.py                   measure all rows, write docs/benchmarks.md
    python tests/benchmark.py --list            a line for each row
    python tests/benchmark.py --only mask bf16  these rows, or those whose names begin so
    python tests/benchmark.py --missing         the rows that docs/benchmarks.jsonl lacks

All rows take about two hours. Each is written to docs/benchmarks.jsonl as soon as it is measured,
and the tables of docs/benchmarks.md are made from that file.

A row has sides, which take turns: round 1 ours, lightly, round 2 ours, lightly, ... Each side is a
process of its own, with its own allocator and threads, that sleeps on a pipe while others measure.
The number of a side is its median over the rounds. Linux only: it reads /proc.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUTSIDE = dict(os.environ)  # before the scripts set anything: what users of other packages have

import data2vec  # noqa: E402
import mae  # noqa: E402
import msn  # noqa: E402
import pmsn  # noqa: E402
import sampler  # noqa: E402
import simclr  # noqa: E402
import vicreg  # noqa: E402

SCRIPTS = dict(simclr=simclr, vicreg=vicreg, msn=msn, pmsn=pmsn, mae=mae, data2vec=data2vec)
CORES = len(os.sched_getaffinity(0))
THREADS = 2  # OMP_NUM_THREADS of every side, unless the row says otherwise
MEMORY_WORKERS = 0  # loader processes of lightly's side for plates; see the row lightly-workers
FILE_WORKERS = CORES  # and for files; ours has as many by default
INSTALL = 'pip install -e ".[test,benchmark]"'

# The networks and batches of rows that do not measure a recipe as it is.
SIMCLR_224 = "--arch small --hidden 512 --batch-size 64"
MSN_64 = (
    "--recipe paper --image-size 64 --focal-size 32 --patch-size 8 --dim 192 --depth 6 --heads 3 "
    "--hidden 512 --output 128 --num-prototypes 256 --batch-size 32"
)
MAE_224 = (
    "--dim 384 --depth 12 --heads 6 --decoder-dim 256 --decoder-depth 4 --decoder-heads 8 "
    "--batch-size 16"
)
# Of a slice of a run in which N batches are discarded and 2 N measured: some seconds.
PLATES_BATCHES = 3  # of a timed part of a run on plates
HEAD = "--batch-size 16 --hidden 16 --output 8"
VIT = "--dim 16 --depth 1 --heads 2 --image-size 32"
SIAMESE = f"{HEAD} {VIT} --num-prototypes 16 --stem 8 8 8 --patch-size 8 --focal-size 16"
QUICK = dict(
    simclr=f"{HEAD} --arch small --image-size 32",
    vicreg=f"{HEAD} --arch small --image-size 32",
    msn=SIAMESE,
    pmsn=SIAMESE,
    mae=f"--batch-size 16 {VIT} --decoder-dim 8 --decoder-depth 1 --decoder-heads 1",
    data2vec="--batch-size 16 --dim 16 --depth 2 --heads 2 --top-k 1",
)


# ---- 1. Data
@functools.cache
def plates(quick):
    """The training plates of the scripts, or two of each class: draw_plates's result."""
    return sampler.draw_plates(2 if quick else 50, seed=0)


def pictures(stack, quick):
    """A folder with train/CLASS/IMAGE: 2,048 names of 256 smooth random JPEG files of natural
    size, 500 x 375 pixels and about 50 kB. Removed with the stack."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    rng = np.random.default_rng(0)
    width, height, number, names = (60, 50, 8, 8) if quick else (500, 375, 256, 8)
    for i in range(number):
        folder = root / f"train/class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"{i}-0.jpg"
        random_picture(width, height, rng).save(first, quality=90)
        for name in range(1, names):
            os.link(first, folder / f"{i}-{name}.jpg")
    return root


def random_picture(width, height, rng):
    """A Pillow image of octaves of noise, the coarser the stronger, as in photographs."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(9):
        size = (width // 2**octave + 1, height // 2**octave + 1)
        noise = rng.normal(size=(3, *size[::-1])).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[channel]).resize((width, height), Image.BICUBIC)
            total[..., channel] += 2 ** (0.4 * octave) * np.asarray(layer)
    total = 128 + 56 * (total - total.mean()) / total.std()
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def arguments(name, options, data, stack, quick):
    """The command line of a script, a list. options: text; data: "plates" or "pictures", of which
    a folder is made."""
    where = str(pictures(stack, quick)) if data == "pictures" else data
    return ["--data", where, *options.split(), *(QUICK[name].split() if quick else [])]


# ---- 2. Runs of the scripts
def run_in_process(script, options, quick):
    """Run a script's main(), whose plates are drawn before -> the lines of its log."""
    drawn = plates(quick)
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.object(sampler, "draw_plates", lambda per_class, seed: drawn),
        contextlib.redirect_stdout(None),
    ):
        script.main([*options, "--out", out])
        return read_log(out)


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def speed_after(batches, log, batch_size):
    """Images/s of the updates after the first `batches`, by the lines of a log."""
    images = 0
    seconds = 0.0
    for before, line in zip([dict(step=0), *log], log):
        if line["step"] > batches:
            shown = (line["step"] - before["step"]) * batch_size
            images += shown
            seconds += shown / line["images_per_second"]
    return images / seconds


def length(batches):
    """Options of a run of three times so many updates."""
    return ["--steps", str(3 * batches), "--log-every", str(batches)]


def our_run(name, options, data, batches, stack, quick):
    """A side: images/s of a script's run, after its first batches."""
    script = SCRIPTS[name]
    batches = 1 if quick else batches
    given = arguments(name, options, data, stack, quick)
    batch_size = script.parse_args(given).batch_size

    def take():
        log = run_in_process(script, [*given, *length(batches)], quick)
        return {"images/s": speed_after(batches, log, batch_size)}

    return take


def our_loader(name, options, batches, stack, quick):
    """A side: images/s of a script's loader and colours alone, on picture files."""
    script = SCRIPTS[name]
    batches = 1 if quick else batches
    args = script.parse_args(arguments(name, options, "pictures", stack, quick))
    stack.enter_context(script.process_group())
    paths, labels = sampler.open_data(args.data, "train")
    batch_sampler = script.batch_sampler(labels["class"].numpy(), args)
    if name == "simclr":
        colour = simclr.simclr_views
        sizes = [(2, args.image_size, args.crop)]
    else:
        colour = msn.siamese_views
        sizes = [(1 + args.rand_views, args.image_size, args.rand_crop)]
        sizes.append((args.focal_views, args.focal_size, args.focal_crop))
    dataset = script.CroppedViews(paths, sizes, args)

    def update(groups):
        if isinstance(groups, str):  # what could not be read
            raise RuntimeError(groups)
        for crops in groups:
            colour(crops, args, torch.device("cpu"))

    def take():
        run = types.SimpleNamespace(step=0, last=3 * batches + 2 * CORES)  # the last is not loaded
        loader = script.batch_loader(dataset, batch_sampler, run, args)
        return {"images/s": speed_of(iter(loader), update, args.batch_size, batches)}

    return take


def speed_of(loaded, update, batch_size, batches):
    """Images/s of an iterator of batches and the update with each. So many are discarded, twice as
    many measured. Loader processes end with the iterator, when this function returns."""
    for _ in range(batches):
        update(next(loaded))
    began = time.perf_counter()
    for _ in range(2 * batches):
        update(next(loaded))
    return 2 * batches * batch_size / (time.perf_counter() - began)


def our_step(name, options, stack, quick):
    """A side: milliseconds of a script's update on a batch of ready views. In a run of one update
    the step is made several times."""
    script = SCRIPTS[name]
    given = arguments(name, options, "plates", stack, quick)

    def take():
        step = getattr(script, f"{name}_step")
        milliseconds = []

        def several(*inputs):
            step(*inputs)
            call = functools.partial(step, *inputs)
            milliseconds.append(1000 * seconds_of(call, 0 if quick else 3))
            return step(*inputs)

        with mock.patch.object(script, f"{name}_step", several):
            run_in_process(script, [*given, "--steps", "1"], quick)
        return {"ms a step": milliseconds[0]}

    return take


def seconds_of(call, least=1.0):
    """Mean seconds of a call, of as many as take `least` seconds; one at least."""
    began = time.perf_counter()
    calls = 0
    while calls == 0 or time.perf_counter() - began < least:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls


# ---- 3. lightly's recipes
# As lightly's documentation shows its users, in the examples simclr.py, vicreg.py, msn.py, pmsn.py
# and mae.py: its transforms, losses, optimiser and the order of calls, torch's DataLoader. Sizes,
# colours, batch size and number of views are ours; so are SimCLR's and VICReg's networks and MSN's
# stem; focal views are not masked (in the example they are), so that both encode as many patches.
# The rest stays as the examples have it: each view goes through the network by itself, MAE's crops
# are bicubic and its targets not normalised, MSN does not train its prototypes; there is no
# schedule, no clipping, no noise and no log, which our runs have.
def colours_for_lightly(args):
    """Parameters of lightly's transforms for a script's colours."""
    brightness, contrast, saturation, hue = args.jitter
    return dict(
        cj_strength=1.0,
        cj_bright=brightness,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        random_gray_scale=args.grey,
        sigmas=tuple(args.blur_sigma),
        hf_prob=args.flip,
    )


def solarise(transform, args):
    """Where lightly's transform has no solarisation but our recipe has: lightly's own, put before
    the conversion to a tensor."""
    from lightly.transforms.solarize import RandomSolarization
    from lightly.transforms.torchvision_v2_compatibility import ToTensor

    if args.solarise == 0:
        return
    for view in set(transform.transforms):  # one object may make several views
        chain = view.transform.transforms
        place = [isinstance(part, ToTensor) for part in chain].index(True)
        chain.insert(place, RandomSolarization(args.solarise, int(255 * args.threshold)))


def lightly_simclr(args):
    """lightly's example simclr.py with our network -> its transform, and its update on views."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=args.image_size,
        min_scale=args.crop[0],
        gaussian_blur=args.blur,
        normalize=None,  # as ours
        **colours_for_lightly(args),
    )
    solarise(transform, args)
    encoder, dim = simclr.resnet(args.arch, args.image_size)
    model = simclr.SimCLR(encoder, dim, args.hidden, args.output, args.layers)
    return transform, contrastive_update(model, NTXentLoss(temperature=args.temperature), args)


def lightly_vicreg(args):
    """lightly's example vicreg.py with our network -> its transform, and its update on views."""
    from lightly.loss import VICRegLoss
    from lightly.transforms import VICRegTransform

    transform = VICRegTransform(  # one probability for both views
        input_size=args.image_size,
        min_scale=args.crop[0],
        gaussian_blur=statistics.mean(args.blur),
        solarize_prob=statistics.mean(args.solarise),
        **colours_for_lightly(args),
    )
    encoder, dim = vicreg.resnet(args.arch, args.image_size)
    network = vicreg.VICReg(encoder, dim, args.hidden, args.output)
    model = torch.nn.Sequential(network.encoder, network.expander)
    criterion = VICRegLoss(args.sim_coeff, args.std_coeff, args.cov_coeff)
    return transform, contrastive_update(model, criterion, args)


def contrastive_update(model, criterion, args):
    """The loop's body of lightly's examples, with lightly's LARS."""
    from lightly.utils.lars import LARS

    optimizer = LARS(
        model.parameters(), lr=0.1, momentum=args.momentum, weight_decay=args.weight_decay
    )

    def update(views):
        x0, x1 = views
        z0 = model(x0)
        z1 = model(x1)
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return update


def lightly_vit(args, stem=()):
    """lightly's masked ViT of timm's layers, with our sizes and stem."""
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=args.image_size,
        patch_size=args.patch_size,
        embed_dim=args.dim,
        depth=args.depth,
        num_heads=args.heads,
        num_classes=0,
        dynamic_img_size=True,  # focal views are smaller
    )
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    if stem:
        vit.patch_embed.proj = msn.patch_projection(args.patch_size, args.dim, stem)
    return backbone


def lightly_msn(args):
    """lightly's example msn.py -> the transform, and the update on views."""
    from lightly.loss import MSNLoss

    return siamese_recipe(args, MSNLoss(sinkhorn_iterations=3 if args.sinkhorn else 0))


def lightly_pmsn(args):
    """lightly's example pmsn.py -> the transform, and the update on views."""
    from lightly.loss import PMSNLoss

    rounds = 3 if args.sinkhorn else 0
    criterion = PMSNLoss(sinkhorn_iterations=rounds, power_law_exponent=args.exponent)
    return siamese_recipe(args, criterion)


def siamese_recipe(args, criterion):
    """What lightly's examples msn.py and pmsn.py share: all but the loss."""
    from lightly.models import utils
    from lightly.models.modules.heads import MSNProjectionHead
    from lightly.transforms import MSNTransform

    transform = MSNTransform(
        random_size=args.image_size,
        focal_size=args.focal_size,
        random_views=1 + args.rand_views,
        focal_views=args.focal_views,
        random_crop_scale=tuple(args.rand_crop),
        focal_crop_scale=tuple(args.focal_crop),
        gaussian_blur=args.blur,
        **colours_for_lightly(args),
    )
    solarise(transform, args)
    backbone = lightly_vit(args, args.stem)
    head = MSNProjectionHead(args.dim, args.hidden, args.output)
    anchor_backbone = copy.deepcopy(backbone)
    anchor_head = copy.deepcopy(head)
    utils.deactivate_requires_grad(backbone)
    utils.deactivate_requires_grad(head)
    prototypes = torch.nn.Linear(args.output, args.num_prototypes, bias=False).weight
    parameters = [*anchor_backbone.parameters(), *anchor_head.parameters(), prototypes]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-4)

    def masked(images):
        patches = (images.shape[-1] // args.patch_size) ** 2
        keep, _ = utils.random_token_mask((len(images), patches), mask_ratio=args.patch_drop)
        return anchor_head(anchor_backbone(images=images, idx_keep=keep))

    def update(views):
        utils.update_momentum(anchor_backbone, backbone, 0.996)
        utils.update_momentum(anchor_head, head, 0.996)
        targets = head(backbone(views[0]))
        full = 1 + args.rand_views
        anchors = [masked(torch.cat(views[1:full]))]
        if views[full:]:
            anchors.append(anchor_head(anchor_backbone(images=torch.cat(views[full:]))))
        loss = criterion(torch.cat(anchors), targets, prototypes.data)  # .data: as in the example
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return transform, update


def lightly_mae(args):
    """lightly's example mae.py -> the transform, and the update on views."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM
    from lightly.transforms import MAETransform

    transform = MAETransform(input_size=args.image_size, min_scale=args.crop[0])
    backbone = lightly_vit(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        decoder = MAEDecoderTIMM(
            num_patches=backbone.vit.patch_embed.num_patches,
            patch_size=args.patch_size,
            embed_dim=args.dim,
            decoder_embed_dim=args.decoder_dim,
            decoder_depth=args.decoder_depth,
            decoder_num_heads=args.decoder_heads,
        )
    model = torch.nn.ModuleList([backbone, decoder])
    criterion = torch.nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4)

    def predict(images):
        size = (len(images), backbone.sequence_length)
        keep, mask = utils.random_token_mask(size, mask_ratio=args.mask_ratio)
        encoded = decoder.embed(backbone.encode(images=images, idx_keep=keep))
        x = utils.repeat_token(decoder.mask_token, size)
        x = utils.set_at_index(x, keep, encoded.type_as(x))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(x), mask))
        patches = utils.patchify(images, args.patch_size)
        return predicted, utils.get_at_index(patches, mask - 1)  # without the class token

    def update(views):
        predicted, target = predict(views[0])
        loss = criterion(predicted, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return transform, update


LIGHTLY = dict(
    simclr=lightly_simclr,
    vicreg=lightly_vicreg,
    msn=lightly_msn,
    pmsn=lightly_pmsn,
    mae=lightly_mae,
)


class PillowPlates(Dataset):
    """Plates as torchvision offers CIFAR10: (transformed Pillow image, class)."""

    def __init__(self, images, transform):
        self.images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), 0


def lightly_run(name, options, data, batches, stack, quick, workers=None, network=True):
    """A side: images/s of lightly's recipe, after its first batches; without network: of its loader
    and transform alone. workers: loader processes, by default as set above."""
    from lightly.data import LightlyDataset

    batches = 1 if quick else batches
    args = SCRIPTS[name].parse_args(arguments(name, options, data, stack, quick))
    transform, update = LIGHTLY[name](args)
    if data == "plates":
        dataset = PillowPlates(plates(quick)[0], transform)
    else:
        dataset = LightlyDataset(str(Path(args.data) / "train"), transform=transform)
    if workers is None:
        workers = MEMORY_WORKERS if data == "plates" else FILE_WORKERS
    loader = DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=0 if quick else workers
    )

    def with_batch(batch):
        if network:
            update(batch[0])

    def take():
        return {"images/s": speed_of(iter(loader), with_batch, args.batch_size, batches)}

    return take


def lightly_loader(name, options, batches, stack, quick):
    """A side: images/s of lightly's loader and transform alone, on picture files."""
    return lightly_run(name, options, "pictures", batches, stack, quick, network=False)


def lightly_step(name, options, stack, quick):
    """A side: milliseconds of lightly's update on a batch of ready views."""
    args = SCRIPTS[name].parse_args(arguments(name, options, "plates", stack, quick))
    _, update = LIGHTLY[name](args)
    sizes = [args.image_size] * 2
    if name == "msn":
        sizes = [args.image_size] * (1 + args.rand_views) + [args.focal_size] * args.focal_views
    views = [torch.rand(args.batch_size, 3, size, size) for size in sizes]
    update(views)

    def take():
        call = functools.partial(update, views)
        return {"ms a step": 1000 * seconds_of(call, 0 if quick else 3)}

    return take


# ---- 4. Losses
OUR_LOSSES = {
    "nt-xent": simclr.nt_xent_loss,
    "vicreg": lambda z1, z2: vicreg.vicreg_loss(z1, z2)[0],
    "msn": lambda *inputs: msn.msn_loss(*inputs, sinkhorn=True)[0],
}


def lightly_losses():
    """lightly's losses with the parameters of ours."""
    from lightly.loss import MSNLoss, NTXentLoss, VICRegLoss

    return {"nt-xent": NTXentLoss(temperature=0.1), "vicreg": VICRegLoss(), "msn": MSNLoss()}


# kind, name, images, width of the embeddings
LOSS_SIZES = [
    ("nt-xent", "NT-Xent", 512, 128),
    ("nt-xent", "NT-Xent", 4096, 128),
    ("vicreg", "VICReg", 512, 512),
    ("vicreg", "VICReg", 512, 2048),
    ("vicreg", "VICReg", 2048, 512),
    ("vicreg", "VICReg", 2048, 2048),
    ("msn", "MSN, 11 anchors an image, 1,024 prototypes", 256, 256),
]


def loss_inputs(kind, N, D):
    """Random embeddings of N images, D wide; for msn 11 anchors an image and 1,024 prototypes."""
    if kind == "msn":
        anchors = torch.randn(11 * N, D, requires_grad=True)
        prototypes = torch.randn(1024, D, requires_grad=True)
        return [anchors, torch.randn(N, D), prototypes]
    return [torch.randn(N, D, requires_grad=True) for _ in range(2)]


def loss_call(kind, ours, stack):
    """A function of the loss's inputs: forward and backward. Ours in the scripts' process group."""
    if ours:
        stack.enter_context(simclr.process_group())
    loss = OUR_LOSSES[kind] if ours else lightly_losses()[kind]
    return lambda inputs: loss(*inputs).backward()


def loss_time(kind, N, D, ours, stack, quick):
    """A side: milliseconds of a loss, forward and backward."""
    call = loss_call(kind, ours, stack)
    inputs = loss_inputs(kind, 8 if quick else N, 8 if quick else D)
    call(inputs)

    def take():
        seconds = seconds_of(functools.partial(call, inputs), 0 if quick else 0.5)
        return {"ms": 1000 * seconds}

    return take


def loss_memory(kind, N, D, ours, stack, quick):
    """A side: MiB that one call of a loss, forward and backward, adds to resident memory; a page
    at least."""
    call = loss_call(kind, ours, stack)
    call(loss_inputs(kind, 8, 8))  # libraries allocate what they keep
    inputs = loss_inputs(kind, 8 if quick else N, 8 if quick else D)

    def take():
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
        call(inputs)
        return {"MiB": max(resident("VmHWM") - before, 4 / 1024)}

    return take


def resident(field):
    """Of this process's memory, MiB: VmRSS, now, or VmHWM, at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# ---- 5. Colours
STRENGTHS = [0.8, 0.8, 0.8, 0.2]
SIGMA = [0.1, 2.0]  # pixels
TAPS = 13  # of the blur: three times the widest sigma on either side


class PillowBlur:
    """Pillow's Gaussian blur of a random width."""

    def __call__(self, image):
        sigma = np.random.uniform(*SIGMA)
        return image.filter(ImageFilter.GaussianBlur(sigma))


def views_to_colour(size, number):
    """Smooth random uint8 views (number, 3, size, size)."""
    coarse = torch.rand(number, 3, size // 8, size // 8)
    return (255 * torch.nn.functional.interpolate(coarse, size=(size, size))).byte()


def our_colours(size, number, blur, stack, quick):
    """A side: images/s of photometry(). blur: probability."""
    stack.enter_context(simclr.process_group())
    number = 4 if quick else number
    views = views_to_colour(size, number)

    def call():
        u = torch.rand(number, 13)
        simclr.photometry(views, u, STRENGTHS, 0.2, blur, SIGMA, 0.2, 0.5)

    call()
    return lambda: {"images/s": number / seconds_of(call, 0 if quick else 1)}


def torchvision_colours(size, number, blur, stack, quick, pillow=False):
    """A side: images/s of torchvision's transforms, image by image, of the same tensors, or of
    Pillow images, the conversion to tensors included."""
    number = 4 if quick else number
    blurring = PillowBlur() if pillow else v2.GaussianBlur(TAPS, SIGMA)
    to_float = v2.ToDtype(torch.float32, scale=True)
    chain = [v2.RandomApply([v2.ColorJitter(*STRENGTHS)], 0.8), v2.RandomGrayscale(0.2)]
    if blur:
        chain.append(v2.RandomApply([blurring], blur))
    chain.append(v2.RandomSolarize(128 if pillow else 0.5, 0.2))
    images = list(views_to_colour(size, number))
    if pillow:
        images = [v2.functional.to_pil_image(image) for image in images]
        chain += [v2.PILToTensor(), to_float]
    else:
        chain.insert(0, to_float)
    transform = v2.Compose(chain)

    def call():
        torch.stack([transform(image) for image in images])

    call()
    return lambda: {"images/s": number / seconds_of(call, 0 if quick else 1)}


# ---- 6. Share of the machine's matrix rate
def matrix_rate(stack, quick):
    """A side: GFLOP/s of the best of several float32 matrix products."""
    size = 64 if quick else 2048
    x = torch.randn(size, size)
    torch.mm(x, x)

    def take():
        best = min(seconds_of(lambda: torch.mm(x, x), least=0) for _ in range(8))
        return {"GFLOP/s": 2 * size**3 / best / 1e9}

    return take


def count_flops(call):
    """Floating-point operations of a call: matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()  # by that backend because those of the fused attention are not counted on CPUs
    return counter.get_total_flops()


def network_rate(kind, stack, quick):
    """A side: GFLOP/s of a network's forward and backward pass, on 16 images of 224 pixels."""
    stack.enter_context(simclr.process_group())
    images = torch.randn(1 if quick else 16, 3, 224, 224)
    if kind == "vit-s16":
        network = msn.VisionTransformer(dim=384, depth=1 if quick else 12, heads=6)
    else:
        network = simclr.resnet("resnet18" if quick else "resnet50", 224)[0]
        network = network.to(memory_format=torch.channels_last)

    def call():
        network(images).square().mean().backward()

    flops = count_flops(call)
    call()
    return lambda: {"GFLOP/s": flops / seconds_of(call, 0 if quick else 5) / 1e9}


def run_rate(name, batches, stack, quick):
    """A side: GFLOP/s of a run on plates by default: operations of an update by the seconds from
    one to the next."""
    script = SCRIPTS[name]
    given = arguments(name, "", "plates", stack, quick)
    batch_size = script.parse_args(given).batch_size
    step = getattr(script, f"{name}_step")
    counted = []

    def count(*inputs):
        counted.append(count_flops(functools.partial(step, *inputs)))
        return step(*inputs)

    with mock.patch.object(script, f"{name}_step", count):
        run_in_process(script, [*given, "--steps", "1"], quick)
    run = our_run(name, "", "plates", batches, stack, quick)
    return lambda: {"GFLOP/s": counted[0] / batch_size * run()["images/s"] / 1e9}


# ---- 7. Sampler, folders
def sampler_time(times, stack, quick):
    """A side: milliseconds of a batch of 4,096 images of 960 classes, over an epoch of labels like
    ImageNet's: 895 classes of 1,300 images, the others of 732 or more; all of them `times` over."""
    sizes = np.concatenate([np.full(895, 1300), np.linspace(732, 1299, 105).astype(int)])
    if quick:
        sizes = sizes // 100
    labels = np.repeat(np.arange(1000), sizes * times)
    batches = sampler.KClassBatchSampler(labels, 1024 if quick else 4096, 960)

    def take():
        began = time.perf_counter()
        number = sum(1 for _ in batches)
        return {"ms a batch": 1000 * (time.perf_counter() - began) / number}

    return take


def many_files(stack, quick):
    """A folder of 200,000 empty files in 1,000 class folders."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for number in range(10 if quick else 1000):
        folder = root / f"train/n{number:08}"
        folder.mkdir(parents=True)
        for image in range(20 if quick else 200):
            (folder / f"n{number:08}_{image}.JPEG").touch()
    return root


def our_listing(stack, quick):
    """A side: seconds to list the images of a folder, and their classes."""
    root = many_files(stack, quick)
    sampler.open_data(root, "train")
    return lambda: {"s": seconds_of(lambda: sampler.open_data(root, "train"), least=0)}


def scandir_listing(stack, quick):
    """A side: seconds to walk a folder with os.scandir and nothing else."""
    root = many_files(stack, quick)

    def walk(folder):
        return sum(walk(entry.path) if entry.is_dir() else 1 for entry in os.scandir(folder))

    walk(root)
    return lambda: {"s": seconds_of(lambda: walk(root), least=0)}


# ---- 8. Whole programs
# Prints what the command of its arguments took; a small program, so that the peak is not its own.
WATCH = """
import json, os, subprocess, sys, time
began = time.time()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
status, usage = os.wait4(process.pid, 0)[1:]
used = dict(began=began, wall=time.time() - began, user=usage.ru_utime, system=usage.ru_stime)
print(json.dumps(used | dict(status=status, peak=usage.ru_maxrss / 1024)))
"""


def watch(command, threads=THREADS):
    """Run a command -> when it began, seconds of wall, user, system; peak resident memory, MiB."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *map(str, command)],
        env=OUTSIDE | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    used = json.loads(done.stdout)
    if used["status"]:
        raise RuntimeError(done.stderr[-1000:])
    return used


def script_command(name, options, stack, quick, launcher=()):
    """A script's command line and a new folder for it. Quick ones learn from a few files, since the
    drawing of all plates takes long."""
    out = stack.enter_context(tempfile.TemporaryDirectory())
    data = "pictures" if quick else "plates"
    given = arguments(name, "", data, stack, quick)
    if quick:
        given += ["--recipe", "plates", "--workers", "0"]
    command = [sys.executable, *launcher, ROOT / f"{name}.py", *given, *options, "--out", out]
    return command, Path(out)


def processes(name, number, batches, stack, quick):
    """A side: images/s of so many processes, which share two threads."""
    batches = 1 if quick else batches
    launcher = []
    if number > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    args = SCRIPTS[name].parse_args(arguments(name, "", "plates", stack, quick))

    def take():
        with contextlib.ExitStack() as own:
            command, out = script_command(name, length(batches), own, quick, launcher)
            watch(command, threads=2 // number)
            return {"images/s": speed_after(batches, read_log(out), args.batch_size)}

    return take


def first_step(stack, quick):
    """A side: seconds from the start of simclr.py to the end of its first step."""

    def take():
        with contextlib.ExitStack() as own:
            command, out = script_command("simclr", ["--steps", 1, "--epochs", 6], own, quick)
            began = watch(command)["began"]
            logged = (out / "log.jsonl").stat().st_mtime  # at the end of the step
            return {"s": logged - began}

    return take


def imports(stack, quick):
    """A side: seconds of a process that imports torch and torchvision."""
    command = [sys.executable, "-c", "import torch, torchvision"]
    return lambda: {"s": watch(command)["wall"]}


def drawing(stack, quick):
    """A side: seconds to draw the training plates."""
    per_class = 1 if quick else 50
    return lambda: {"s": seconds_of(lambda: sampler.draw_plates(per_class, 0), least=0)}


def whole_run(name, options, stack, quick):
    """A side: wall seconds, per cent of processor time in the kernel, peak memory of a script."""

    def take():
        with contextlib.ExitStack() as own:
            length = ["--steps", 2] if quick else options
            used = watch(script_command(name, length, own, quick)[0])
        kernel = 100 * used["system"] / (used["user"] + used["system"])
        return {"s": used["wall"], "% in the kernel": kernel, "MiB at most": used["peak"]}

    return take


def peak_memory(name, stack, quick):
    """A side: peak resident memory, MiB, of ten steps of a script."""
    run = whole_run(name, ["--steps", 10], stack, quick)
    return lambda: {"MiB at most": run()["MiB at most"]}


# ---- 9. Ratios within a script
def mask_step(
    ratio, stack=None, quick=False, batch_size=16, image_size=224, clock=time.perf_counter, **sizes
):
    """A side: seconds of a step of mae.py with ViT-B/16 (or of `sizes`) at a mask ratio. None: that
    at which all patches but one are encoded; of all of them no loss is left."""
    if quick:
        batch_size = 1
        sizes = dict(dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=1)
    model = mae.MAE(image_size, norm_pix_loss=True, **sizes)
    optimizer = torch.optim.AdamW(
        mae.parameter_groups(model), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
    )
    images = torch.randn(batch_size, 3, image_size, image_size)
    patches = model.pos_embed.shape[1] - 1
    args = types.SimpleNamespace(mask_ratio=ratio or 1 / patches, bf16=False)

    def take():
        noise = torch.rand(batch_size, patches)
        began = clock()
        mae.mae_step(model, optimizer, images, noise, 1e-4, args)
        return {"s a step": clock() - began}

    take()  # the first one warms up
    return take


# ---- 10. Rows
@dataclasses.dataclass
class Row:
    """What is measured. sides: {name: function (stack, quick) -> take}, and take() measures once
    -> {unit: number}. The ratios are of the first side by the others. What a side needs until the
    end, such as folders, is put on the stack."""

    group: str
    text: str
    sides: dict
    threads: int = THREADS
    rounds: int = 100  # at most
    fresh: bool = False  # a new process for each round


GROUPS = {
    "plates": "Training on plates, end to end: the recipe `plates` of each script, 32 pixels",
    "files": "Training with larger views, on JPEG files of 500 x 375 pixels or plates",
    "loaders": "Loader and colours alone, JPEG files of 500 x 375 pixels",
    "steps": "Steps alone, on a batch of ready views: forward, loss, backward, optimiser",
    "loss": "Losses alone, forward and backward",
    "memory": "Peak memory of a loss, forward and backward, above that before it",
    "colours": "Colours alone, one thread: `photometry()` and torchvision's transforms",
    "share": "Share of the machine's matrix rate: ours by a float32 product of 2,048 x 2,048",
    "data": "Sampler and folders",
    "processes": "Two processes of one thread and one process of two threads",
    "start": "Start-up of `python simclr.py`",
    "whole": "Whole programs",
    "ways": "Two ways of one program",
}
ROWS = {}


def against_lightly(ours, lightly, *given):
    """Sides with the same parameters."""
    return {
        "ours": functools.partial(ours, *given),
        "lightly": functools.partial(lightly, *given),
    }


def register_runs():
    for name in SCRIPTS:
        sides = against_lightly(our_run, lightly_run, name, "", "plates", PLATES_BATCHES)
        if name not in LIGHTLY:
            del sides["lightly"]
        ROWS[f"plates-{name}"] = Row("plates", f"{name}.py", sides)

    sides = against_lightly(our_run, lightly_run, "simclr", SIMCLR_224, "pictures", 6)
    ROWS["simclr-224"] = Row("files", "SimCLR on files, small network, 224 px", sides)
    sides = against_lightly(our_run, lightly_run, "mae", MAE_224, "pictures", 3)
    ROWS["mae-224"] = Row("files", "MAE on files, ViT-S/16, 224 px", sides)
    sides = against_lightly(our_run, lightly_run, "msn", MSN_64, "plates", 3)
    ROWS["msn-64"] = Row("files", "MSN on plates, 2 views of 64 px and 10 of 32", sides)


def register_parts_of_steps():
    loaders = dict(simclr="SimCLR, 2 views of 224 px", msn="MSN, 2 views of 224 px and 10 of 96")
    for name, text in loaders.items():
        given = (name, "--batch-size 32", 12)
        sides = against_lightly(our_loader, lightly_loader, *given)
        ROWS[f"loader-{name}"] = Row("loaders", text, sides)
        ROWS[f"loader-{name}-1"] = Row("loaders", f"{text}; one thread colours", sides, threads=1)

    steps = {
        "simclr": ("--batch-size 512", "SimCLR, small network, 512 images of 32 px"),
        "vicreg": ("--batch-size 512", "VICReg, small network, 512 images of 32 px"),
        "msn": (MSN_64, "MSN, 32 images, 2 views of 64 px and 10 of 32"),
    }
    for name, (options, text) in steps.items():
        sides = against_lightly(our_step, lightly_step, name, options)
        ROWS[f"step-{name}"] = Row("steps", text, sides)

    for kind, text, N, D in LOSS_SIZES:
        text = f"{text}, {N:,} images, width {D:,}"
        for what, measured in (("loss", loss_time), ("memory", loss_memory)):
            sides = {
                "ours": functools.partial(measured, kind, N, D, True),
                "lightly": functools.partial(measured, kind, N, D, False),
            }
            ROWS[f"{what}-{kind}-{N}-{D}"] = Row(what, text, sides)
        ROWS[f"memory-{kind}-{N}-{D}"].fresh = True
        ROWS[f"memory-{kind}-{N}-{D}"].rounds = 3

    for size, number in ((32, 1024), (224, 64)):
        for ending, blur in (("", 0.0), ("-blur", 0.5)):
            sides = {
                "ours": functools.partial(our_colours, size, number, blur),
                "torchvision": functools.partial(torchvision_colours, size, number, blur),
                "Pillow": functools.partial(torchvision_colours, size, number, blur, pillow=True),
            }
            text = f"{number:,} images of {size} px, {'with' if blur else 'no'} blur"
            ROWS[f"colours-{size}{ending}"] = Row("colours", text, sides, threads=1)


def register_shares():
    rates = {
        "ViT-S/16, 16 images of 224 px": functools.partial(network_rate, "vit-s16"),
        "ResNet-50, 16 images of 224 px": functools.partial(network_rate, "resnet50"),
    }
    names = ["share-vit-s16", "share-resnet50"]
    for name in ("simclr", "vicreg", "msn", "mae", "data2vec"):
        rate = functools.partial(run_rate, name, PLATES_BATCHES)
        rates[f"{name}.py on plates, end to end"] = rate
        names.append(f"share-{name}")
    for row, (text, rate) in zip(names, rates.items()):
        ROWS[row] = Row("share", text, {"ours": rate, "matrix product": matrix_rate})


def register_programs():
    for name, times in {"sampler": 1, "sampler-large": 10}.items():
        text = f"Batches of 4,096 images of 960 classes, {1.27 * times:.3g} million labels"
        ROWS[name] = Row("data", text, {"ours": functools.partial(sampler_time, times)})
    sides = {"ours": our_listing, "os.scandir": scandir_listing}
    ROWS["listing"] = Row("data", "Listing 200,000 files in 1,000 folders", sides)

    for name in ("simclr", "msn"):
        sides = {
            "two processes": functools.partial(processes, name, 2, 4),
            "one process": functools.partial(processes, name, 1, 4),
        }
        ROWS[f"processes-{name}"] = Row("processes", f"{name}.py on plates", sides)

    sides = {"ours": first_step, "import torch, torchvision": imports}
    ROWS["start-up"] = Row("start", "From the start to the end of the first step", sides)
    ROWS["start-plates"] = Row("start", "Of which drawing the plates", {"ours": drawing})

    sides = {"ours": functools.partial(whole_run, "simclr", [])}
    ROWS["whole-simclr"] = Row("whole", "python simclr.py", sides, rounds=1)
    for name in SCRIPTS:
        sides = {"ours": functools.partial(peak_memory, name)}
        ROWS[f"peak-{name}"] = Row("whole", f"Ten steps of python {name}.py", sides, rounds=1)


def register_ways():
    sides = {
        "the first": functools.partial(mask_step, 0.75),
        "the second": functools.partial(mask_step, None),
    }
    ROWS["mask"] = Row("ways", "mae.py, ViT-B/16, mask ratio 0.75 and 0", sides)
    for name in ("msn", "mae", "data2vec"):
        sides = {
            "the first": functools.partial(our_run, name, "--bf16", "plates", PLATES_BATCHES),
            "the second": functools.partial(our_run, name, "--no-bf16", "plates", PLATES_BATCHES),
        }
        ROWS[f"bf16-{name}"] = Row("ways", f"{name}.py on plates, --bf16 and --no-bf16", sides)

    run = functools.partial(lightly_run, "simclr", "", "plates", PLATES_BATCHES)
    sides = {
        "the first": functools.partial(run, workers=2),
        "the second": functools.partial(run, workers=0),
    }
    text = "lightly's SimCLR on plates, 2 loader processes and none"
    ROWS["lightly-workers"] = Row("ways", text, sides)


register_runs()
register_parts_of_steps()
register_shares()
register_programs()
register_ways()
TRAFFIC = "traffic"  # a row of its own kind: tests/traffic.py, if it is there, makes its table
TRAFFIC_TEXT = "Traffic between processes"


def needs_lightly(name):
    return name == "lightly-workers" or (name in ROWS and "lightly" in ROWS[name].sides)


# ---- 11. Measuring
def measure(name, rounds, quick=False):
    """{unit: {side: [the number of each round]}} of a row, whose sides take turns."""
    row = ROWS[name]
    open_side = in_this_process if quick else in_another_process
    values = {}
    with contextlib.ExitStack() as stack:
        takes = {}
        for side in row.sides:
            if row.fresh:
                takes[side] = functools.partial(take_once, open_side, name, side, quick)
            else:
                takes[side] = stack.enter_context(open_side(name, side, quick))
        for _ in range(min(rounds, row.rounds)):
            for side, take in takes.items():
                for unit, number in take().items():
                    values.setdefault(unit, {}).setdefault(side, []).append(number)
    return values


def take_once(open_side, name, side, quick):
    with open_side(name, side, quick) as take:
        return take()


@contextlib.contextmanager
def in_this_process(name, side, quick):
    with contextlib.ExitStack() as stack:
        yield ROWS[name].sides[side](stack, quick)


@contextlib.contextmanager
def in_another_process(name, side, quick):
    """Yields a function that has the process measure once. Idle, it waits for a line."""
    foreign = side in ("lightly", "torchvision", "Pillow") or name == "lightly-workers"
    environment = dict(OUTSIDE if foreign else os.environ)
    environment["OMP_NUM_THREADS"] = str(ROWS[name].threads)
    command = [sys.executable, __file__, "--serve", name, side, *(["--quick"] if quick else [])]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

        def answer(request):
            try:
                process.stdin.write(request)
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            except (BrokenPipeError, ValueError):  # it has ended
                process.wait()
                errors.seek(0)
                reason = errors.read().strip()[-2000:]
                raise RuntimeError(f"side {side} ended:\n{reason}") from None

        try:
            answer("")  # it has prepared
            yield functools.partial(answer, "go\n")
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def serve(name, side, quick):
    """Measure once for each line of stdin, and answer with a line of JSON; {} when prepared."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    with contextlib.ExitStack() as stack:
        take = ROWS[name].sides[side](stack, quick)
        print("{}", file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(take()), file=answers, flush=True)


def summarise(values):
    """Medians {unit: {side: number}}, and ratios {unit: {side: [ratio, lowest, highest]}} of the
    first side by each other one: of the medians, and of the rounds."""
    medians = {}
    ratios = {}
    for unit, sides in values.items():
        medians[unit] = {side: statistics.median(numbers) for side, numbers in sides.items()}
        first, *others = sides
        ratios[unit] = {}
        for other in others:
            each = [a / b for a, b in zip(sides[first], sides[other])]
            ratio = medians[unit][first] / medians[unit][other]
            ratios[unit][other] = [ratio, min(each), max(each)]
    return dict(median=medians, ratio=ratios)


def result(name, rounds, quick):
    """The line of a row: where, when and what."""
    line = dict(row=name, commit=commit(), date=time.strftime("%Y-%m-%d"), **machine())
    if name == TRAFFIC:
        import traffic

        return line | dict(table=traffic.table(), rows=traffic.rows())
    values = measure(name, rounds, quick)
    return line | summarise(values) | dict(rounds=values)


@functools.cache
def commit():
    """Of the checkout; with -dirty if its programs differ."""
    git = ["git", "-C", str(ROOT)]
    try:
        command = [*git, "rev-parse", "--short", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        differ = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if differ else head


@functools.cache
def machine():
    """Cores that this process may use, the processor's model, versions."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    versions = dict(torch=torch.__version__)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["lightly"] = importlib.metadata.version("lightly")
    return dict(cores=CORES, cpu=model) | versions


# ---- 12. Results
def read_results(path):
    """{row: line} of a results file; {} if there is none."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["row"]: line for line in lines}


def write_results(folder, results):
    """benchmarks.jsonl, in the order of the rows, and benchmarks.md. A kill leaves whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(results[name]) for name in [*ROWS, TRAFFIC] if name in results]
    texts = {"benchmarks.jsonl": "\n".join(lines) + "\n", "benchmarks.md": page(results)}
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, folder / name)


def page(results):
    """docs/benchmarks.md of the results {row: line}."""
    machines = []
    for line in results.values():
        cores = f"{line['cores']} core{'s' * (line['cores'] > 1)}"
        text = f"{cores} of {line['cpu']} with torch {line['torch']}"
        if "lightly" in line:
            text += f" and lightly {line['lightly']}"
        if text not in machines:
            machines.append(text)
    parts = [
        "# Benchmarks",
        "`python tests/benchmark.py` measures all rows and makes this page from "
        "[benchmarks.jsonl](benchmarks.jsonl), which has every round. "
        f"It was made on {'; '.join(machines)}.",
        "Numbers are medians of rounds in which the sides took turns. A ratio is the first number "
        "by the other; in brackets the lowest and the highest of a round.",
    ]
    for group, title in GROUPS.items():
        lines = [results[name] for name in ROWS if name in results and ROWS[name].group == group]
        if lines:
            parts += [f"## {title}", table(lines)]
    if TRAFFIC in results:
        parts += [f"## {TRAFFIC_TEXT}", results[TRAFFIC]["table"].strip()]
    return "\n\n".join(parts) + "\n"


def table(lines):
    """Markdown of the lines of a group, whose other sides get a column and one of ratios each."""
    medians = [sides for line in lines for sides in line["median"].values()]
    first, *others = max(medians, key=len)
    head = ["what", "unit", first]
    for other in others:
        head += [other, "ratio (min to max)"]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for line in lines:
        for unit, sides in line["median"].items():
            row = [ROWS[line["row"]].text, unit, number(sides[first])]
            for other in others:
                row += [number(sides[other]) if other in sides else ""]
                ratio = line["ratio"][unit].get(other)
                row += ["{:.3g} ({:.3g} to {:.3g})".format(*ratio) if ratio else ""]
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(x):
    """Three digits or more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


# ---- 13. Command line
def fail(message):
    print(f"benchmark.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def chosen_rows(only, missing, results):
    """Names of the rows to measure. only: names or beginnings of names; None: all."""
    there = importlib.util.find_spec(TRAFFIC) is not None
    names = [*ROWS, TRAFFIC] if there else [*ROWS]
    if only:
        chosen = set()
        for start in only:
            found = {start} & set(names) or {name for name in names if name.startswith(start)}
            if not found:
                fail(f"--only {start}: no row has such a name: see --list")
            chosen |= found
        names = [name for name in names if name in chosen]
    if missing:
        names = [name for name in names if name not in results]
    lacking = [name for name in names if needs_lightly(name)]
    if lacking and importlib.util.find_spec("lightly") is None:
        fail(f"{len(lacking)} rows, {lacking[0]} among them, need lightly: {INSTALL}")
    return names


def parse_args(argv):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", metavar="ROW", help="rows, or beginnings of their names")
    p.add_argument("--missing", action="store_true", help="rows that the results file lacks")
    p.add_argument("--list", action="store_true", help="print all rows")
    p.add_argument("--rounds", type=int, default=7, help="of each row, at most")
    p.add_argument("--quick", action="store_true",
                   help="a test of all rows: tiny sizes, one round, one process")  # fmt: skip
    p.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of both files")
    p.add_argument("--serve", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.quick and not args.serve and args.out.resolve() == (ROOT / "docs").resolve():
        fail("--quick: its numbers mean nothing: give another --out than docs")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.serve:
        serve(*args.serve, args.quick)
        return
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:24}{GROUPS[row.group].split(':')[0]}: {row.text}")
        print(f"{TRAFFIC:24}{TRAFFIC_TEXT}")
        return
    path = args.out / "benchmarks.jsonl"
    failed = []
    for name in chosen_rows(args.only, args.missing, read_results(path)):
        began = time.time()
        try:
            line = result(name, 1 if args.quick else args.rounds, args.quick)
        except RuntimeError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        write_results(args.out, read_results(path) | {name: line})
        print(f"{name}: {json.dumps(line.get('median'))} ({time.time() - began:.0f} s)", flush=True)
    if failed:
        sys.exit(f"benchmark.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
