"""Speed and memory of the scripts, side by side with lightly, torchvision and the machine.

    python tests/benchmark.py                   measure all rows, write docs/benchmarks.md
    python tests/benchmark.py --list            a line for each row
    python tests/benchmark.py --only mask crop  these rows, or those whose names begin so
    python tests/benchmark.py --missing         the rows that docs/benchmarks.jsonl lacks

All rows take about an hour. Each is written to docs/benchmarks.jsonl as soon as it is measured,
and the tables of docs/benchmarks.md are made from that file.

A row has sides, which take turns: round 1 ours, lightly, round 2 ours, lightly, ... Each side is a
process of its own, with its own allocator and threads, that sleeps on a pipe while others measure.
The number of a side is its median over the rounds. Linux only: it reads /proc.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
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
INSTALL = 'pip install -e ".[test,benchmark]"'

# The networks and batches of rows that do not measure a recipe as it is.
SIMCLR_224 = "--arch small --hidden 512 --batch-size 64"
MSN_64 = (
    "--recipe paper --image-size 64 --focal-size 32 --patch-size 8 --dim 192 --depth 6 --heads 3 "
    "--hidden 512 --output 128 --num-prototypes 256 --batch-size 32"
)
MAE_224 = (
    "--recipe paper --dim 384 --depth 12 --heads 6 --decoder-dim 256 --decoder-depth 4 "
    "--decoder-heads 8 --batch-size 16"
)
# Sizes of --quick, which override a row's.
HEAD = "--batch-size 16 --hidden 16 --output 8"
VIT = "--dim 16 --depth 1 --heads 2 --image-size 32"
SIAMESE = f"{HEAD} {VIT} --num-prototypes 16 --stem 8 8 8 8 8 --patch-size 8 --focal-size 16"
QUICK = dict(
    simclr=f"{HEAD} --arch small --image-size 32",
    vicreg=f"{HEAD} --arch small --image-size 32",
    msn=SIAMESE,
    pmsn=SIAMESE,
    mae=f"--batch-size 16 {VIT} --decoder-dim 8 --decoder-depth 1 --decoder-heads 1",
    data2vec="--batch-size 16 --dim 16 --depth 2 --heads 2 --top-k 1",
)


# ---- 1. Data
@cache
def plates(quick):
    """The training plates of the scripts, or two of each class: draw_plates's result."""
    return sampler.draw_plates(2 if quick else 150, seed=0)


def pictures(stack, quick):
    """A folder with train/CLASS/IMAGE: 2,048 names of 256 smooth random JPEG files of natural
    size, 500 x 375 pixels and about 50 kB. Removed with the stack."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    torch.manual_seed(0)
    width, height, number, names = (60, 50, 8, 8) if quick else (500, 375, 256, 8)
    for i in range(number):
        folder = root / f"train/class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"{i}-0.jpg"
        random_picture(width, height).save(first, quality=90)
        for name in range(1, names):
            os.link(first, folder / f"{i}-{name}.jpg")
    return root


def random_picture(width, height):
    """A Pillow image of octaves of noise, the coarser the stronger, as in photographs."""
    total = torch.zeros(1, 3, height, width)
    for octave in range(9):
        coarse = torch.randn(1, 3, height // 2**octave + 1, width // 2**octave + 1)
        layer = F.interpolate(coarse, (height, width), mode="bicubic")
        total += 2 ** (0.4 * octave) * layer
    total = 128 + 56 * (total - total.mean()) / total.std()
    return v2.functional.to_pil_image(total[0].clamp(0, 255).byte())


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


def speed_after(batches, log):
    """Images/s of the updates after the first `batches`, by the lines of a log."""
    pairs = [(before, line) for before, line in pairwise(log) if line["step"] > batches]
    updates = [line["step"] - before["step"] for before, line in pairs]
    speeds = [line["images_per_second"] for _, line in pairs]
    return statistics.harmonic_mean(speeds, updates)


def length(batches):
    """Options of a run of three times so many updates."""
    return ["--steps", str(3 * batches), "--log-every", str(batches)]


def our_run(name, options, data, batches, stack, quick):
    """A side: images/s of a script's run, after its first batches."""
    batches = 1 if quick else batches
    given = arguments(name, options, data, stack, quick)

    def take():
        log = run_in_process(SCRIPTS[name], [*given, *length(batches)], quick)
        return {"images/s": speed_after(batches, log)}

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

    for view in set(transform.transforms) if args.solarise else ():  # one may make several views
        chain = view.transform.transforms
        place = [isinstance(part, ToTensor) for part in chain].index(True)
        chain.insert(place, RandomSolarization(args.solarise, int(255 * args.threshold)))


def descend(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def lightly_contrastive(args):
    """lightly's examples simclr.py and vicreg.py with our networks and lightly's LARS -> the
    transform, and the update on views."""
    from lightly.loss import NTXentLoss, VICRegLoss
    from lightly.transforms import SimCLRTransform, VICRegTransform
    from lightly.utils.lars import LARS

    encoder, dim = simclr.resnet(args.arch, args.image_size)
    given = dict(input_size=args.image_size, min_scale=args.crop[0]) | colours_for_lightly(args)
    if "temperature" in args:
        transform = SimCLRTransform(gaussian_blur=args.blur, normalize=None, **given)  # as ours
        solarise(transform, args)
        model = simclr.SimCLR(encoder, dim, args.hidden, args.output, args.layers)
        criterion = NTXentLoss(args.temperature)
    else:
        blur = statistics.mean(args.blur)  # one probability for both views
        solarised = statistics.mean(args.solarise)
        transform = VICRegTransform(gaussian_blur=blur, solarize_prob=solarised, **given)
        network = vicreg.VICReg(encoder, dim, args.hidden, args.output)
        model = torch.nn.Sequential(network.encoder, network.expander)
        criterion = VICRegLoss(args.sim_coeff, args.std_coeff, args.cov_coeff)
    optimizer = LARS(
        model.parameters(), lr=0.1, momentum=args.momentum, weight_decay=args.weight_decay
    )

    def update(views):
        x0, x1 = views
        z0 = model(x0)
        z1 = model(x1)
        descend(criterion(z0, z1), optimizer)

    return transform, update


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


def lightly_siamese(args):
    """lightly's examples msn.py and pmsn.py -> the transform, and the update on views."""
    from lightly.loss import MSNLoss, PMSNLoss
    from lightly.models import utils
    from lightly.models.modules.heads import MSNProjectionHead
    from lightly.transforms import MSNTransform

    criterion = MSNLoss(sinkhorn_iterations=3 if args.sinkhorn else 0)
    if "exponent" in args:
        criterion = PMSNLoss(criterion.temperature, criterion.sinkhorn_iterations,
                             power_law_exponent=args.exponent)  # fmt: skip
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
        # .data: as in the example
        descend(criterion(torch.cat(anchors), targets, prototypes.data), optimizer)

    return transform, update


def lightly_mae(args):
    """lightly's example mae.py -> the transform, and the update on views."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM
    from lightly.transforms import MAETransform

    transform = MAETransform(input_size=args.image_size, min_scale=args.crop[0])
    backbone = lightly_vit(args)
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

    def update(views):
        (images,) = views
        size = (len(images), backbone.sequence_length)
        keep, mask = utils.random_token_mask(size, mask_ratio=args.mask_ratio)
        encoded = decoder.embed(backbone.encode(images=images, idx_keep=keep))
        x = utils.repeat_token(decoder.mask_token, size)
        x = utils.set_at_index(x, keep, encoded.type_as(x))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(x), mask))
        patches = utils.patchify(images, args.patch_size)
        target = utils.get_at_index(patches, mask - 1)  # without the class token
        descend(criterion(predicted, target), optimizer)

    return transform, update


LIGHTLY = dict(
    simclr=lightly_contrastive,
    vicreg=lightly_contrastive,
    msn=lightly_siamese,
    pmsn=lightly_siamese,
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


def lightly_run(name, options, data, batches, stack, quick):
    """A side: images/s of lightly's recipe, after its first batches. Files are read by as many
    loader processes as ours; plates by none, which is as fast as two."""
    from lightly.data import LightlyDataset

    batches = 1 if quick else batches
    args = SCRIPTS[name].parse_args(arguments(name, options, data, stack, quick))
    transform, update = LIGHTLY[name](args)
    workers = 0
    if data == "plates":
        dataset = PillowPlates(plates(quick)[0], transform)
    else:
        dataset = LightlyDataset(str(Path(args.data) / "train"), transform=transform)
        workers = 0 if quick else CORES
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=workers)

    def take():
        loaded = iter(loader)
        for _ in range(batches):
            update(next(loaded)[0])
        began = time.perf_counter()
        for _ in range(2 * batches):
            update(next(loaded)[0])
        return {"images/s": 2 * batches * args.batch_size / (time.perf_counter() - began)}

    return take


# ---- 4. Crops and colours
def our_crops(stack, quick):
    """A side: milliseconds of SimCLR's crops of a batch of plates."""
    args = simclr.parse_args(arguments("simclr", "", "plates", stack, quick))
    stack.enter_context(simclr.process_group())
    images = plates(quick)[0]
    dataset = simclr.CroppedViews(images, [(1, args.image_size, args.crop)], args)
    indices = list(range(args.batch_size))
    return milliseconds(lambda: dataset[0, indices], quick)


def torchvision_crops(stack, quick):
    """A side: milliseconds of torchvision's crops of these plates, one after another."""
    args = simclr.parse_args(arguments("simclr", "", "plates", stack, quick))
    images = plates(quick)[0][: args.batch_size].expand(-1, 3, -1, -1).contiguous()
    crop = v2.RandomResizedCrop(args.image_size, args.crop)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(args.flip)])
    return milliseconds(lambda: torch.stack([transform(image) for image in images]), quick)


def milliseconds(call, quick):
    """How a side measures the time of a call."""
    call()
    return lambda: {"ms": 1000 * seconds_of(call, 0 if quick else 1)}


def random_views(size, number, quick):
    """Smooth random uint8 views (number, 3, size, size)."""
    coarse = torch.rand(4 if quick else number, 3, size // 8, size // 8)
    return (255 * F.interpolate(coarse, size=(size, size))).byte()


def our_colours(size, number, options, stack, quick):
    """A side: milliseconds of SimCLR's colours, for one view of each image."""
    args = simclr.parse_args(options.split())
    device = stack.enter_context(simclr.process_group())
    views = random_views(size, number, quick)[None]  # (1, B, 3, H, W)
    return milliseconds(lambda: simclr.simclr_views(views, args, device), quick)


def torchvision_colours(size, number, options, stack, quick):
    """A side: milliseconds of torchvision's transforms of these views, one after another."""
    args = simclr.parse_args(options.split())
    chain = [
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.ColorJitter(*args.jitter)], 0.8),
        v2.RandomGrayscale(args.grey),
        v2.RandomApply([v2.GaussianBlur(13, args.blur_sigma)], args.blur),  # taps as ours
        v2.RandomSolarize(args.threshold, args.solarise),
    ]
    transform = v2.Compose(chain)
    views = random_views(size, number, quick)
    return milliseconds(lambda: torch.stack([transform(view) for view in views]), quick)


# ---- 5. Sampler, data
def sampler_time(stack, quick):
    """A side: seconds until the sampler has made batch 93,600, the first of epoch 300 of labels as
    many as ImageNet's, and milliseconds of each one after it."""
    images, batch_size, k_classes, epoch = 1_281_167, 4096, 960, 300
    if quick:
        images, batch_size, epoch = 20_000, 1024, 2
    labels = np.random.default_rng(0).integers(1000, size=images)

    def take():
        began = time.perf_counter()
        batches = sampler.KClassBatchSampler(labels, batch_size, k_classes)
        batches.set_epoch(epoch)
        following = iter(batches)
        next(following)
        started = time.perf_counter()
        number = sum(1 for _ in following)
        each = (time.perf_counter() - started) / number
        return {"s until batch 93,600": started - began, "ms a batch": 1000 * each}

    return take


def drawing(stack, quick):
    """A side: seconds to draw the training plates."""
    per_class = 1 if quick else 150
    return lambda: {"s": seconds_of(lambda: sampler.draw_plates(per_class, 0), least=0)}


def listing(stack, quick):
    """A side: seconds to list the images of a folder of 1,000 classes, and their classes."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for number in range(10 if quick else 1000):
        folder = root / f"train/n{number:08}"
        folder.mkdir(parents=True)
        for image in range(20 if quick else 200):
            (folder / f"n{number:08}_{image}.JPEG").touch()
    return lambda: {"s": seconds_of(lambda: sampler.open_data(root, "train"), least=0)}


# ---- 6. Whole programs
# Prints what the command of its arguments took; a small program, so that the peak is not its own.
WATCH = """
import json, os, subprocess, sys, time
began = time.time()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
status, usage = os.wait4(process.pid, 0)[1:]
used = dict(status=status, began=began, wall=time.time() - began, peak=usage.ru_maxrss / 1024)
print(json.dumps(used))
"""


def run_program(name, options, quick, processes=1):
    """Run a script on plates; its processes share the threads -> a dict: when it began, its wall
    seconds, its peak resident memory (MiB), when it wrote the last line of its log, and its log."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    given = QUICK[name].split() if quick else []
    with tempfile.TemporaryDirectory() as out:
        command += [str(ROOT / f"{name}.py"), *given, *options, "--out", out]
        done = subprocess.run(
            [sys.executable, "-c", WATCH, *command],
            env=OUTSIDE | {"OMP_NUM_THREADS": str(THREADS // processes)},
            capture_output=True,
            text=True,
        )
        used = json.loads(done.stdout)
        if used["status"]:
            raise RuntimeError(done.stderr[-1000:])
        logged = (Path(out) / "log.jsonl").stat().st_mtime
        return used | dict(logged=logged, log=read_log(out))


def speed_of_processes(name, processes, stack, quick):
    """A side: images/s of so many processes, after four batches."""
    batches = 1 if quick else 4

    def take():
        log = run_program(name, length(batches), quick, processes)["log"]
        return {"images/s": speed_after(batches, log)}

    return take


def first_step(stack, quick):
    """A side: seconds from the start of simclr.py to the end of its first step."""

    def take():
        used = run_program("simclr", ["--steps", "1"], quick)
        return {"s": used["logged"] - used["began"]}

    return take


def imports(stack, quick):
    """A side: seconds of a process that imports torch and torchvision."""
    command = [sys.executable, "-c", "import torch, torchvision"]
    call = partial(subprocess.run, command, env=OUTSIDE, check=True)
    return lambda: {"s": seconds_of(call, least=0)}


def whole_run(name, options, stack, quick):
    """A side: wall seconds and peak memory of a script."""

    def take():
        used = run_program(name, ["--steps", "2"] if quick else options, quick)
        return {"s": used["wall"], "MiB at most": used["peak"]}

    return take


# ---- 7. Rows
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


GROUPS = {
    "plates": "Training on plates, end to end",
    "files": "Larger views, of JPEG files (500 x 375 pixels) or plates",
    "views": "Crops and colours alone, one thread: by the batch, or by the image",
    "data": "Sampler and data",
    "processes": "Two processes of one thread, or one of two",
    "start": "Start-up of `python simclr.py`",
    "whole": "Whole programs",
    "ways": "Two ways of one program",
}
ROWS = {}


def against_lightly(*given):
    """Sides with the same parameters."""
    sides = {"ours": partial(our_run, *given)}
    if given[0] in LIGHTLY:
        sides["lightly"] = partial(lightly_run, *given)
    return sides


def register_rows():
    for name in SCRIPTS:
        ROWS[f"plates-{name}"] = Row("plates", f"{name}.py", against_lightly(name, "", "plates", 3))

    sides = against_lightly("simclr", SIMCLR_224, "pictures", 6)
    ROWS["simclr-224"] = Row("files", "SimCLR, files, small network, 224 px", sides)
    sides = against_lightly("mae", MAE_224, "pictures", 3)
    ROWS["mae-224"] = Row("files", "MAE, files, ViT-S/16, 224 px", sides)
    sides = against_lightly("msn", MSN_64, "plates", 3)
    ROWS["msn-64"] = Row("files", "MSN, plates, 64 px, focal 32", sides)

    sides = {"ours": our_crops, "torchvision": torchvision_crops}
    ROWS["crops-plates"] = Row("views", "crops of 1,024 plates", sides, threads=1)
    colours = {
        "colours-plates": (32, 1024, "", "colours of 1,024 plates"),
        "colours-all": (224, 64, "--recipe paper --solarise 0.2", "all colours of 64 x 224 px"),
    }
    for row, (size, number, options, text) in colours.items():
        sides = {
            "ours": partial(our_colours, size, number, options),
            "torchvision": partial(torchvision_colours, size, number, options),
        }
        ROWS[row] = Row("views", text, sides, threads=1)

    text = "Sampler at ImageNet's size, K = 960"
    ROWS["sampler-late"] = Row("data", text, {"ours": sampler_time}, rounds=3)
    ROWS["drawing"] = Row("data", "Drawing 150,000 plates", {"ours": drawing})
    ROWS["listing"] = Row("data", "Listing 200,000 files in 1,000 folders", {"ours": listing})

    for name in ("simclr", "msn"):
        sides = {
            "two processes": partial(speed_of_processes, name, 2),
            "one process": partial(speed_of_processes, name, 1),
        }
        ROWS[f"processes-{name}"] = Row("processes", f"{name}.py on plates", sides)

    sides = {"ours": first_step, "import torch, torchvision": imports}
    ROWS["start-up"] = Row("start", "From the start to the end of the first step", sides)

    sides = {"ours": partial(whole_run, "simclr", [])}
    ROWS["whole-simclr"] = Row("whole", "python simclr.py", sides, rounds=1)
    for name in SCRIPTS:
        sides = {"ours": partial(whole_run, name, ["--steps", "10"])}
        ROWS[f"ten-{name}"] = Row("whole", f"Ten steps of python {name}.py", sides, rounds=1)

    sides = {}
    for side, ratio in {"the first": 0.75, "the second": 0.01}.items():
        options = f"{MAE_224} --mask-ratio {ratio}"
        sides[side] = partial(our_run, "mae", options, "plates", 1)
    ROWS["mask"] = Row("ways", "MAE on plates, ViT-S/16, 224 px, mask ratio 0.75 and 0.01", sides)


register_rows()


# ---- 8. Measuring
def measure(name, rounds, quick=False):
    """{unit: {side: [the number of each round]}} of a row, whose sides take turns."""
    open_side = in_this_process if quick else in_another_process
    values = {}
    with contextlib.ExitStack() as stack:
        sides = {s: stack.enter_context(open_side(name, s, quick)) for s in ROWS[name].sides}
        for _ in range(min(rounds, ROWS[name].rounds)):
            for side, take in sides.items():
                for unit, number in take().items():
                    values.setdefault(unit, {}).setdefault(side, []).append(number)
    return values


@contextlib.contextmanager
def in_this_process(name, side, quick):
    with contextlib.ExitStack() as stack:
        yield ROWS[name].sides[side](stack, quick)


@contextlib.contextmanager
def in_another_process(name, side, quick):
    """Yields a function that has the process measure once. Idle, it waits for the next call."""
    foreign = side in ("lightly", "torchvision")
    environment = dict(OUTSIDE if foreign else os.environ)
    environment["OMP_NUM_THREADS"] = str(ROWS[name].threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with mock.patch.dict(os.environ, environment, clear=True):
            process.submit(prepare, name, side, quick).result()
        yield lambda: process.submit(take_once).result()


# In the process of a side: what it keeps open to its end, and the function that measures.
OPEN = contextlib.ExitStack()
TAKE = []


def prepare(name, side, quick):
    atexit.register(OPEN.close)
    TAKE.append(ROWS[name].sides[side](OPEN, quick))


def take_once():
    return TAKE[0]()


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
    values = measure(name, rounds, quick)
    line = dict(row=name, commit=commit(), date=time.strftime("%Y-%m-%d"), **machine())
    return line | summarise(values) | dict(rounds=values)


@cache
def commit():
    """Of the checkout, with -dirty if its programs differ; "unknown" without git or a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        command = [*git, "rev-parse", "--short", "HEAD"]
        head = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    differ = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return f"{head}-dirty" if differ else head


@cache
def machine():
    """Cores that this process may use, the processor's model, versions."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = dict(torch=torch.__version__)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["lightly"] = importlib.metadata.version("lightly")
    return dict(cores=CORES, cpu=model[1] if model else platform.machine()) | versions


# ---- 9. Results
def read_results(path):
    """{row: line} of a results file; {} if there is none."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["row"]: line for line in lines}


def write_results(folder, results):
    """benchmarks.jsonl, in the order of the rows, and benchmarks.md. A kill leaves whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(results[name]) for name in ROWS if name in results]
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
        "`python tests/benchmark.py` makes this page from [benchmarks.jsonl](benchmarks.jsonl), "
        f"which has every round. Machine: {'; '.join(machines)}.",
        "Medians of rounds in which the sides took turns, and their ratio (lowest to highest).",
    ]
    for group, title in GROUPS.items():
        lines = [results[name] for name in ROWS if name in results and ROWS[name].group == group]
        if lines:
            parts += [f"## {title}", table(lines)]
    return "\n\n".join(parts) + "\n"


def table(lines):
    """Markdown of the lines of a group, whose other sides get a column and one of ratios each."""
    medians = [sides for line in lines for sides in line["median"].values()]
    first, *others = max(medians, key=len)
    head = ["what", "unit", first]
    for other in others:
        head += [other, "ratio"]
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


# ---- 10. Command line
def fail(message):
    print(f"benchmark.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def chosen_rows(only, missing, results):
    """Names of the rows to measure. only: names or beginnings of names; None: all."""
    for start in only or ():
        if not any(name.startswith(start) for name in ROWS):
            fail(f"--only {start}: no row has such a name: see --list")
    names = [name for name in ROWS if name.startswith(tuple(only or [""]))]
    if missing:
        names = [name for name in names if name not in results]
    lacking = [name for name in names if "lightly" in ROWS[name].sides]
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
    args = p.parse_args(argv)
    if args.quick and args.out.resolve() == (ROOT / "docs").resolve():
        fail("--quick: its numbers mean nothing: give another --out than docs")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:20}{GROUPS[row.group].split(':')[0]}: {row.text}")
        return
    path = args.out / "benchmarks.jsonl"
    failed = []
    for name in chosen_rows(args.only, args.missing, read_results(path)):
        began = time.time()
        try:
            line = result(name, 1 if args.quick else args.rounds, args.quick)
        except (Exception, SystemExit) as error:  # the other rows can still be measured
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        write_results(args.out, read_results(path) | {name: line})
        print(f"{name}: {json.dumps(line['median'])} ({time.time() - began:.0f} s)", flush=True)
    if failed:
        sys.exit(f"benchmark.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
