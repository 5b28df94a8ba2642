# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "tqdm"]
# ///
"""Linear evaluation: how much of a target can a linear classifier read from a frozen encoder?

    python linear_eval.py runs/msn/checkpoint.pt                       the run's own data
    python linear_eval.py vitb16.pth --data IMAGENET --cached          a released file
    torchrun --nproc_per_node=8 linear_eval.py runs/msn/checkpoint.pt --task clevr-dist --data CLEVR

The encoder never learns. Many linear classifiers on its features do, all at once: the heads. Each
has its own feature, normalisation and learning rate. All are reported. The best is chosen on a
tenth of the training set that is held out from all of them, and the test set is used once. The
control is the same network with random weights.

The recipe is the study's: VISSL's default for each task. Images are augmented anew in every epoch
(--cached: the features of whole images are computed once). SGD has Nesterov momentum and the rate
0.01 for a batch of 256; larger rates are tried too, since small features need them.

Processes share the images, not the heads: every process sees all features, so that all train the
same heads and count the same test images, each image once. sampler.py opens plates, CIFAR, folders
and iNaturalist; CLEVR, KITTI and Places205 are read here. In shapes: N images, B a batch, D
features, L heads that share a feature and a normalisation, T targets per image, C classes of each.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import gc
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn import BatchNorm2d as BatchNorm  # a frozen one has nothing to synchronise
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision import models
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from sampler import IN_MEMORY, is_hidden, open_data

# ---- 1. Tasks, protocols and options
VISSL = dict(  # its defaults: configs/config/benchmark/linear_image_classification
    features=["pooled", "cls", "cls4", "patches"],  # those that the encoder has: see `features`
    norms=["batch", "none"],  # before the linear map: see Heads
    rates=[0.01, 0.1, 0.5],  # of learning, for a batch of 256
    batch_size=256,
    epochs=28,
    warmup=0,  # epochs
    cosine=False,  # or else a tenth of the rate after 2/7, 4/7 and 6/7 of the epochs each
    final=0.01,  # fraction of the rate to which the cosine falls
    by_step=False,  # the rate changes at every step, or else at every epoch
    std=None,  # of the initial weights; None: torch's own
    weight_decay=5e-4,
    nesterov=True,
    lars=False,  # or else SGD
    augment="crop",  # training images: "crop" and flip, "flip" only, or "none"
    squash=False,  # images to a square, or else the centre is cut out
)
CLEVR = VISSL | dict(cosine=True, augment="flip", squash=True)  # to a square: no object is lost
TASKS = {
    "imagenet": VISSL,  # and any folder
    "inat18": VISSL | dict(epochs=84),
    "places205": VISSL | dict(epochs=14),
    "cifar10": VISSL | dict(augment="flip"),
    "cifar100": VISSL | dict(augment="flip"),
    "clevr-count": CLEVR | dict(epochs=50),
    "clevr-dist": CLEVR | dict(epochs=100),
    "kitti-dist": VISSL,
    "plates": VISSL | dict(augment="none", batch_size=512),  # a flipped digit is another sign
}
# What the methods' own repositories do instead: one head.
OWN = dict(norms=["none"], epochs=100, cosine=True, final=0.0, by_step=True, std=0.01)
PROTOCOLS = {
    "vissl": {},
    "msn": OWN | dict(features=["raw", "pooled"], norms=["layer"], rates=[0.2], weight_decay=0.0),
    "mae": OWN | dict(
        features=["cls", "pooled"], norms=["standard"], rates=[0.1], weight_decay=0.0, lars=True,
        epochs=90, warmup=10,
    ),
    "vicreg": OWN | dict(
        features=["pooled", "cls"], rates=[0.3], weight_decay=1e-6, nesterov=False, by_step=False,
    ),
}  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Defaults of None follow from the task's recipe or from the checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.error = refuse_option
    p.add_argument("checkpoint", help="checkpoint.pt of a run, or a released file")

    g = p.add_argument_group("task")
    g.add_argument("--data", help="plates, cifar10, cifar100 or a folder; None: the run's")
    g.add_argument("--task", choices=TASKS, help="whose recipe; None: that of the data")
    g.add_argument("--target",
                   help="plates: digits, number, count or size; CLEVR: count or dist; KITTI: dist; "
                        "others: class; None: the first of these")  # fmt: skip
    g.add_argument("--train-fraction", type=share_or_list, default="1",
                   help="training images: a share of each class, N-per-class, or a file of NAME or "
                        "CLASS/NAME, one a line")  # fmt: skip
    g.add_argument("--plain-pixels", action="store_true",
                   help="a released network takes pixels in [0, 1], as SimCLR's does")  # fmt: skip
    g.add_argument("--heads", type=positive_int,
                   help="attention heads of a released ViT; None: one for 64 channels")  # fmt: skip

    g = p.add_argument_group("heads")
    g.add_argument("--protocol", choices=PROTOCOLS, default="vissl",
                   help="vissl: the study's; the others: the methods' own")  # fmt: skip
    g.add_argument("--cached", action="store_true",
                   help="compute features once, of images that are not augmented")  # fmt: skip
    g.add_argument("--rates", type=positive, nargs="+", help="learning rates for a batch of 256")
    g.add_argument("--epochs", type=positive_int, help="passes over the training images")
    g.add_argument("--batch-size", type=two_or_more,
                   help="images, all processes; rates are scaled with it")  # fmt: skip
    g.add_argument("--seed", type=count, default=0, help="of held-out images, heads and order")

    g = p.add_argument_group("run and report")
    g.add_argument("--out", help="JSON file; None: linear_eval_DATA_TARGET.json beside CHECKPOINT")
    g.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True,
                   help="evaluate the network with random weights too")  # fmt: skip
    g.add_argument("--knn", type=count, default=0, help="neighbours that classify, too; 0: none")
    g.add_argument("--nearest", type=count, default=0,
                   help="test images in a picture of their nearest training images")  # fmt: skip
    g.add_argument("--workers", type=count, help="loader processes; None: a core each")
    return p.parse_args(argv)


def share_or_list(text):
    """The value of --train-fraction, as it is."""
    share = re.fullmatch(r"[1-9]\d*-per-class|1(\.0*)?|0?\.\d*[1-9]\d*", text)
    if not share and not Path(text).is_file():
        expected = "a share (0.01), 5-per-class or a file of names"
        raise argparse.ArgumentTypeError(f"{text}: give {expected}")
    return text


# ---- 2. Evaluation
def evaluate(args, device):
    """Train the heads of a task on the frozen encoder's features, score them, write the report."""
    with all_or_none():
        encoder = load_encoder(args.checkpoint, args.plain_pixels, args.heads)
        data = choose_data(args, encoder)
        with one_process_first(needed=data.startswith("cifar")):  # it may have to download
            task = open_task(data, args.target, args.task)
        recipe = choose_recipe(task, args)
        parts = divide(task, recipe, args)
        out = report_file(task, args)
    key = evaluation_key(args, recipe, data=task.data, whole=len(parts.whole))

    encoders = dict(trained=encoder.to(device))
    if args.untrained:
        encoders["untrained"] = untrained(encoder).to(device)
    source = FeatureSource(encoders, task, recipe, parts=parts, args=args)
    source.encode_whole_images(f"{out}.features", key, device)

    torch.manual_seed(args.seed)
    banks = new_banks(source.test, task.num_classes, recipe).to(device)
    train_heads(
        banks,
        source.batches,
        steps=math.ceil(len(parts.kept) / recipe["batch_size"]),
        labels=task.train.labels.to(device),
        recipe=recipe,
        file=f"{out}.heads" if source.augmented else None,  # else it takes seconds
        key=key,
    )

    tail = encoder.options.get("long_tail", 0.0) if task.data == encoder.options["data"] else 0.0
    groups = frequency_groups(task.train.classes, task.test.classes, tail)
    held_out = source.train.select(parts.held_out)
    heads = scores(banks, "trained", held_out=held_out, test=source.test, groups=groups)
    control = scores(banks, "untrained", held_out=held_out, test=source.test, groups=groups)
    report = make_report(
        task, recipe, args, step=encoder.step, parts=parts, heads=heads, control=control
    )
    feature = ("trained", heads[0]["feature"])
    if args.knn:
        percent = knn_accuracy(
            source.train, source.test, feature, k=args.knn, num_classes=task.num_classes
        )
        report["knn"] = percent.mean().item()
    if rank() == 0:
        if args.nearest:
            draw_nearest(source, feature, rows=args.nearest, path=out.with_suffix(".png"))
        write_report(report, out)
        print_report(report, tail, out)


def main(argv=None):
    args = parse_args(argv)
    with process_group() as device:
        evaluate(args, device)


def choose_data(args, encoder):
    """The name of the data set: --data, or else that of the run."""
    data = args.data or encoder.options["data"]
    if data is None:
        raise Refusal("--data: needed, since a released checkpoint does not name its own: give one")
    return data


def choose_recipe(task, args):
    """The task's recipe, changed by the protocol and by the options that are given."""
    recipe = TASKS[task.name] | PROTOCOLS[args.protocol]
    if args.rates is not None:
        recipe["rates"] = args.rates
    if args.epochs is not None:
        recipe["epochs"] = args.epochs
    if args.batch_size is not None:
        recipe["batch_size"] = args.batch_size
    if args.cached:
        recipe["augment"] = "none"
    return recipe


@dataclass
class Parts:
    """Indices of images, by what the images are used for."""

    kept: torch.Tensor  # training images that the heads learn from
    held_out: torch.Tensor  # training images that choose the best head
    whole: torch.Tensor  # training images whose features are needed without augmentation
    test: torch.Tensor


def divide(task, recipe, args):
    """Hold out a tenth of the training images in use, drawn by the seed -> Parts."""
    used = subset(args.train_fraction, task.train.images, task.train.classes, seed=args.seed)
    order = shuffled(used, args.seed)
    tenth = len(order) // 10
    kept = order[tenth:]
    held_out = order[:tenth]
    if tenth == 0:  # fewer than ten images: none can be spared
        held_out = order
    whole = used
    if recipe["augment"] != "none" and not args.knn and not args.nearest:
        whole = held_out
    return Parts(kept, held_out, whole, test=torch.arange(len(task.test.classes)))


def shuffled(indices, seed):
    """The indices in an order that follows from the seed alone."""
    rng = torch.Generator().manual_seed(seed)
    return indices[torch.randperm(len(indices), generator=rng)]


def report_file(task, args):
    """The path of the report. What cannot be written is refused now, not after hours."""
    name = f"linear_eval_{Path(task.data).name}_{task.target}.json"
    out = Path(args.out or Path(args.checkpoint).parent / name)
    trial = Path(f"{out}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink(missing_ok=True)  # another process may have removed it
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise Refusal(f"--out {out}: not writable ({error}): choose another file") from None
    return out


class FeatureSource:
    """The encoders' features of a task's images. Those of whole images are computed once and are
    in `train` and `test`; those of augmented images are computed anew in every epoch."""

    def __init__(self, encoders, task, recipe, parts, args):
        size = encoders["trained"].options["image_size"]
        options = dict(size=size, squash=recipe["squash"], seed=args.seed)
        self.images = Images(task.train.images, augment=recipe["augment"], **options)
        self.test_images = Images(task.test.images, augment="none", **options)
        workers = cores_of_process() if args.workers is None else args.workers
        self.encode = functools.partial(
            encode, encoders, wanted=recipe["features"], workers=workers
        )
        self.dim = sum(feature_widths(encoders, size, recipe["features"]).values())
        self.task = task
        self.parts = parts
        self.augmented = recipe["augment"] != "none"
        self.batch_size = recipe["batch_size"]
        self.seed = args.seed

    def encode_whole_images(self, file, key, device):
        """Fill `train` and `test`: from the file, if it has the same key, or with the encoders."""
        parts = self.parts
        saved = load_partial(file, key)
        if not saved:
            warn_of_size(len(parts.whole) + len(parts.test), self.dim, device)
            saved = dict(
                train=collect(self.encode(self.images, parts.whole, 2000), len(parts.whole)),
                test=collect(self.encode(self.test_images, parts.test, 2000), len(parts.test)),
            )
            save_partial(file, key, saved)
        labels = self.task.train.labels[parts.whole]
        self.train = Examples(parts.whole, saved["train"], labels).to(device)
        self.test = Examples(parts.test, saved["test"], self.task.test.labels).to(device)

    def batches(self, epoch):
        """Yield the training images in random order: indices (B,) and {name: (B, D)}."""
        order = shuffled(self.parts.kept, hash((self.seed, epoch)) % 2**63)
        if self.augmented:
            yield from self.encode(self.images, order, self.batch_size, epoch=epoch)
            return
        for indices in order.split(self.batch_size):
            yield indices, self.train.select(indices).features


@dataclass
class Examples:
    """Images as the heads get them."""

    indices: torch.Tensor  # (N,) of the images in their data set
    features: dict  # {(encoder, feature): (N, D)}, such as ("trained", "cls")
    labels: torch.Tensor  # (N, T)

    def to(self, device):
        features = {name: x.to(device) for name, x in self.features.items()}
        return Examples(self.indices, features, self.labels.to(device))

    def select(self, indices):
        """The examples with these indices, in this order."""
        rows = self.row_of_index[indices]
        features = {name: x[rows] for name, x in self.features.items()}
        return Examples(indices, features, self.labels[rows])

    @functools.cached_property
    def row_of_index(self):
        rows = torch.zeros(self.indices.max() + 1, dtype=torch.long)
        rows[self.indices] = torch.arange(len(self.indices))
        return rows


def scores(banks, who, held_out, test, groups):
    """Results of the heads on the features of the encoder `who`, in percent correct, the best on
    the held-out images first: options, held_out, top1, and the top1 of each target, of all test
    images and of each of the groups, {name: (N,) bool}. held_out, test: Examples."""
    results = []
    for bank in banks:
        encoder, feature = bank.reads
        if encoder != who:
            continue
        x = test.features[bank.reads]
        held_out_percent = accuracy(bank, held_out.features[bank.reads], held_out.labels)
        percent = accuracy(bank, x, test.labels)
        group_percent = {}
        for group, chosen in groups.items():
            group_percent[group] = accuracy(bank, x[chosen], test.labels[chosen])
        for i, rate in enumerate(bank.rates):
            head = dict(
                feature=feature,
                norm=bank.norm_name,
                lr=rate,
                held_out=held_out_percent[i].mean().item(),
                top1=percent[i].mean().item(),
                targets=percent[i].tolist(),
            )
            for group in groups:
                head[group] = group_percent[group][i].tolist()
            results.append(head)
    return sorted(results, key=lambda head: -head["held_out"])


def accuracy(heads, x, labels):
    """Percent correct of each head and target. x (N, D), labels (N, T) -> (L, T)."""
    correct = 0
    with torch.no_grad():
        for part, label in zip(x.split(2000), labels.split(2000)):
            correct = correct + (heads(part).argmax(dim=3) == label).sum(dim=1)
    return 100 * correct / len(x)


def knn_accuracy(train, test, feature, k, num_classes):
    """Percent correct of each target when the k training images nearest by cosine vote, each with
    weight exp(cosine / 0.07), as in DINO. train, test: Examples -> (T,)."""
    x = F.normalize(train.features[feature])
    test_x = F.normalize(test.features[feature])
    correct = 0
    for part, label in zip(test_x.split(200), test.labels.split(200)):
        cosine, index = (part @ x.T).topk(min(k, len(x)), dim=1)  # (200, k)
        weights = (cosine / 0.07).exp()[:, :, None, None]
        votes = F.one_hot(train.labels[index], num_classes) * weights  # (200, k, T, C)
        correct = correct + (votes.sum(dim=1).argmax(dim=2) == label).sum(dim=0)
    return 100 * correct / len(test_x)


def make_report(task, recipe, args, step, parts, heads, control):
    """What the JSON file has. heads, control: scores of the trained and the untrained encoder."""
    return dict(
        task=f"{task.data} {task.target}",
        top1=heads[0]["top1"],
        best=heads[0],
        untrained_top1=control[0]["top1"] if control else None,
        heads=heads,
        untrained_heads=control,
        checkpoint=args.checkpoint,
        step=step,
        recipe=task.name,
        protocol=args.protocol,
        training_images=len(parts.kept),
        seed=args.seed,
        augment=recipe["augment"],
        epochs=recipe["epochs"],
        batch_size=recipe["batch_size"],
    )


def write_report(report, out):
    """Write the JSON file, and remove what would have served a restart."""
    Path(f"{out}.partial").write_text(json.dumps(report, indent=1))
    os.replace(f"{out}.partial", out)
    Path(f"{out}.features").unlink(missing_ok=True)
    Path(f"{out}.heads").unlink(missing_ok=True)


def print_report(report, tail, out):
    """Print all heads, the result, and a row for a table: checkpoint, task, top1, untrained."""
    print(f"{'feature':10}{'norm':10}{'lr':>6}{'held-out':>10}{'test':>7}")
    for head in report["heads"]:
        options = f"{head['feature']:10}{head['norm']:10}{head['lr']:>6}"
        print(f"{options}{head['held_out']:>10.1f}{head['top1']:>7.1f}")
    task = report["task"]
    best = report["best"]
    top1 = f"{best['top1']:.1f}"
    if len(best["targets"]) > 1:
        top1 += f" ({' '.join(f'{percent:.1f}' for percent in best['targets'])})"
    control = "not evaluated"
    if report["untrained_heads"]:
        control = f"{report['untrained_top1']:.1f}"
    print(f"{task}: {top1}, untrained {control} -> {out}")
    knn = f" {report['knn']:.1f} |" if "knn" in report else ""
    print(f"| `{report['checkpoint']}` | {task} | {top1} | {control} |{knn}")
    if tail:
        frequent = sum(best["frequent"]) / len(best["frequent"])
        rare = sum(best["rare"]) / len(best["rare"])
        print(f"the tenth of the classes seen most: {frequent:.1f}, the rarer half: {rare:.1f}")


def draw_nearest(source, feature, rows, path):
    """Picture: test images, evenly spaced, a row each, with the training images nearest by cosine
    of the feature."""
    x = F.normalize(source.train.features[feature])
    test_x = source.test.features[feature]
    chosen = torch.linspace(0, len(test_x) - 1, rows).long()
    nearest = (F.normalize(test_x[chosen]) @ x.T).topk(min(9, len(x))).indices.cpu()
    pictures = []
    for test_index, near in zip(chosen.tolist(), nearest):
        pictures.append(source.test_images[None, [test_index]])  # (1, 3, size, size)
        pictures.append(source.images[None, source.train.indices[near].tolist()])
    save_image(torch.cat(pictures) / 255, path, nrow=1 + nearest.shape[1])


# ---- 3. Heads
def new_banks(examples, num_classes, recipe):
    """Heads for every feature and every normalisation, with random weights."""
    banks = nn.ModuleList()
    for (name, x), norm in itertools.product(examples.features.items(), recipe["norms"]):
        heads = Heads(
            dim=x.shape[1],
            targets=examples.labels.shape[1],
            classes=num_classes,
            rates=recipe["rates"],
            norm=norm,
            std=recipe["std"],
            reads=name,
        )
        banks.append(heads)
    return banks


class Heads(nn.Module):
    """L linear classifiers of one feature, alike but for their learning rates: x (B, D) -> logits
    (L, B, T, C).

    norm, before the linear map: "batch", BatchNorm with each head's own scale and shift (VISSL);
    "standard", BatchNorm without these (MAE); "layer", LayerNorm with these, then unit length
    (MSN); or "none". std: of the initial weights; None: torch's own. reads: the feature's name."""

    def __init__(self, dim, targets, classes, rates, norm="batch", std=None, reads=None):
        super().__init__()
        self.shape = (targets, classes)
        self.rates = rates
        self.norm_name = norm
        self.reads = reads
        self.norm = nn.Identity()
        if norm == "batch":
            self.norm = nn.BatchNorm1d(dim, eps=1e-5, affine=False)
        elif norm == "standard":
            self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        elif norm == "layer":
            self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        affine = rates if norm in ("batch", "layer") else []
        self.scales = nn.ParameterList(torch.ones(dim) for _ in affine)
        self.shifts = nn.ParameterList(torch.zeros(dim) for _ in affine)
        self.linears = nn.ModuleList(nn.Linear(dim, targets * classes) for _ in rates)
        if std is not None:
            for linear in self.linears:
                nn.init.trunc_normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, x):
        x = self.norm(x).expand(len(self.rates), -1, -1)  # (L, B, D)
        if len(self.scales) > 0:
            scales = torch.stack([*self.scales])[:, None]  # (L, 1, D)
            shifts = torch.stack([*self.shifts])[:, None]
            x = x * scales + shifts
        if self.norm_name == "layer":
            x = F.normalize(x, dim=2)
        weights = torch.stack([linear.weight for linear in self.linears])  # (L, T * C, D)
        biases = torch.stack([linear.bias for linear in self.linears])[:, None]
        return torch.baddbmm(biases, x, weights.transpose(1, 2)).unflatten(2, self.shape)

    def groups(self, batch_size, weight_decay):
        """Yield the optimiser's groups: each head has its rate, in proportion to the batch size;
        scales and shifts do not decay."""
        for i, (rate, linear) in enumerate(zip(self.rates, self.linears)):
            peak = rate * batch_size / 256
            weights = list(linear.parameters())
            yield dict(params=weights, weight_decay=weight_decay, lr=peak, peak=peak)
            if len(self.scales) > 0:
                affine = [self.scales[i], self.shifts[i]]
                yield dict(params=affine, weight_decay=0.0, lr=peak, peak=peak)


def train_heads(banks, batches, steps, labels, recipe, file=None, key=None):
    """Train a list of Heads, all at once, each as it would learn alone.

    batches(epoch) yields `steps` times indices (B,) into labels (N, T) and features, {name:
    (B, D)}. Continues from the file, if it has the same key, and saves each epoch there."""
    optimizer = head_optimizer(banks, recipe)
    parts = dict(banks=banks, optimizer=optimizer)
    saved = load_partial(file, key) if file else {}
    for name, part in parts.items():
        if name in saved:
            part.load_state_dict(saved[name])
    first = saved.get("epoch", 0)

    banks.train()
    hidden = None if rank() == 0 else True  # None: unless it is a terminal
    total = steps * recipe["epochs"]
    bar = tqdm(total=total, initial=steps * first, desc="heads", disable=hidden)
    for epoch in range(first, recipe["epochs"]):
        for step, (indices, features) in enumerate(batches(epoch)):
            bar.update()
            if len(indices) == 1:
                continue  # BatchNorm needs two
            now = epoch + step / steps if recipe["by_step"] else epoch
            set_rates(optimizer, now, recipe)
            loss = heads_loss(banks, features, labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if file:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_partial(file, key, state | dict(epoch=epoch + 1))
    bar.close()
    banks.eval()


def heads_loss(banks, features, labels):
    """Cross-entropy, summed over heads so that each learns as it would alone, and its mean over
    images and targets. features {name: (B, D)}, labels (B, T) -> scalar."""
    loss = 0.0
    for bank in banks:
        logits = bank(features[bank.reads])  # (L, B, T, C)
        target = labels.expand(len(logits), -1, -1).flatten()
        loss = loss + len(logits) * F.cross_entropy(logits.flatten(0, 2), target)
    return loss


def head_optimizer(banks, recipe):
    """LARS, or SGD with momentum."""
    groups = []
    for bank in banks:
        groups.extend(bank.groups(recipe["batch_size"], recipe["weight_decay"]))
    if recipe["lars"]:
        return LARS(groups, lr=0.0, weight_decay=0.0)  # the groups have their own
    return torch.optim.SGD(groups, momentum=0.9, nesterov=recipe["nesterov"])


def set_rates(optimizer, epoch, recipe):
    """Set all learning rates for this time, in epochs."""
    factor = rate_factor(
        epoch,
        epochs=recipe["epochs"],
        cosine=recipe["cosine"],
        final=recipe["final"],
        warmup=recipe["warmup"],
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def rate_factor(epoch, epochs, cosine, final, warmup):
    """Of the learning rate: straight up for `warmup` epochs; then a cosine to `final`, which the
    last epoch does not reach, or a tenth after 2/7, 4/7 and 6/7 of the epochs each."""
    if epoch < warmup:
        return epoch / warmup
    if cosine:
        wave = math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1))
        return final + (1 - final) * (1 + wave) / 2
    drops = [round(epochs * part / 7) for part in (2, 4, 6)]
    return 0.1 ** sum(epoch >= drop for drop in drops)


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which the step of a weight tensor w, of gradient g, is scaled by
    trust |w| / |g + weight_decay w|. Biases and norms (one dimension) are not scaled or decayed.

    lr_in_buffer: momentum sums lr x gradient (SimCLR), else gradients (VICReg): they differ while
    the rate changes."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001, lr_in_buffer=False):
        options = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, options | dict(lr_in_buffer=lr_in_buffer))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            vectors = [p for p in params if p.ndim <= 1]
            weights = [p for p in params if p.ndim > 1]
            steps = [p.grad for p in vectors]
            if weights:
                steps += self.scaled_gradients(weights, group["weight_decay"], group["trust"])
            params = vectors + weights
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]

            torch._foreach_mul_(buffers, group["momentum"])
            if group["lr_in_buffer"]:
                torch._foreach_add_(buffers, steps, alpha=group["lr"])
                torch._foreach_sub_(params, buffers)
            else:
                torch._foreach_add_(buffers, steps)
                torch._foreach_add_(params, buffers, alpha=-group["lr"])

    @staticmethod
    def scaled_gradients(weights, weight_decay, trust):
        """Gradients with decay, times trust |w| / |gradient|; unscaled where either norm is 0."""
        gradients = torch._foreach_add([p.grad for p in weights], weights, alpha=weight_decay)
        weight_norms = torch.stack(torch._foreach_norm(weights))
        gradient_norms = torch.stack(torch._foreach_norm(gradients))
        ratios = trust * weight_norms / gradient_norms
        ratios = torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)
        return torch._foreach_mul(gradients, [*ratios])


# ---- 4. Features
@torch.no_grad()
def encode(encoders, images, order, batch_size, epoch=None, wanted=(), workers=0):
    """Yield the features of images in this order, batch by batch: indices (B,) and {(encoder,
    feature): (B, D)}.

    encoders: {name: network}; images: an Images; epoch: whose augmentation, None: none; wanted:
    which features. A batch is cut into eight pieces, which the processes share: their number
    changes no bit."""
    device = next(encoders["trained"].parameters()).device
    widths = feature_widths(encoders, images.size, wanted)
    batches = order.split(batch_size)
    piece = math.ceil(batch_size / 8)
    own = slice(rank(), None, world_size())  # this process's pieces of every batch
    items = []
    for batch in batches:
        for indices in batch.split(piece)[own]:
            items.append((epoch, indices.tolist()))
    workers = 0 if torch.is_tensor(images.images) else workers
    if workers:
        gc.collect()  # an earlier run in this process: a forked process cannot end its threads
    pieces = iter(
        DataLoader(
            images, batch_size=None, sampler=items, num_workers=workers, collate_fn=share_memory
        )
    )
    for batch in batches:
        joined = torch.zeros(len(batch), sum(widths.values()), device=device)
        for rows in torch.arange(len(batch)).split(piece)[own]:
            pixels = next(pieces)
            if isinstance(pixels, str):  # what could not be read
                fail(name_process(pixels), everywhere=True)
            found = all_features(encoders, pixels.to(device), wanted)
            joined[rows] = torch.cat([*found.values()], dim=1)
        dist.all_reduce(joined)  # a sum: the rows of other processes are 0 here
        yield batch, dict(zip(widths, joined.split([*widths.values()], dim=1)))


def feature_widths(encoders, size, wanted):
    """The numbers that each of the wanted features has: {(encoder, feature): D}."""
    device = next(encoders["trained"].parameters()).device
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
    found = all_features(encoders, blank, wanted)
    if not found:
        own = ", ".join(features(encoders["trained"], blank))
        fail(f"--protocol: it reads {' or '.join(wanted)}, this network has {own}: choose another")
    return {name: x.shape[1] for name, x in found.items()}


def all_features(encoders, pixels, wanted):
    """The wanted features of all encoders: uint8 (B, 3, size, size) -> {(encoder, feature):
    (B, D)}."""
    found = {}
    for who, encoder in encoders.items():
        for name, x in features(encoder, pixels).items():
            if name in wanted:
                found[who, name] = x
    return found


def features(encoder, images):
    """uint8 (B, 3, size, size) -> {name: (B, D)}. Of a ResNet `pooled`. Of a ViT `cls`, after the
    final norm; `raw`, before it; `cls4`, of the last four blocks, each after the final norm;
    `patches`, the mean of the patches' tokens.

    A released ViT with fc_norm has this after the mean, and mostly no norm of its tokens, as in
    timm. One without a cls token has `patches` alone."""
    x = images.float() / 255
    if "standardise" in encoder.options:  # SimCLR takes pixels as they are
        x = normalise(x, encoder.options["standardise"])
    if not isinstance(encoder, AnyViT):
        return dict(pooled=encoder(x))
    outputs = encoder.tokens(x)
    normed = [encoder.norm(tokens) for tokens in outputs]
    patches = encoder.fc_norm(normed[-1][:, encoder.front :].mean(dim=1))
    if encoder.cls_token is None:
        return dict(patches=patches)
    return dict(
        cls=normed[-1][:, 0],
        raw=outputs[-1][:, 0],
        cls4=torch.cat([tokens[:, 0] for tokens in normed], dim=1),
        patches=patches,
    )


def collect(batches, N):
    """All features that `encode` yields, in its order: {name: (N, D)}. Refuses a diverged run's."""
    hidden = None if rank() == 0 else True
    joined = {}
    end = 0
    for indices, found in tqdm(batches, "features", disable=hidden):
        start = end
        end += len(indices)
        for name, x in found.items():
            if not x.isfinite().all():
                fail("the encoder's features are not finite: the run has diverged; give another "
                     "checkpoint")  # fmt: skip
            if name not in joined:
                joined[name] = x.new_empty(N, x.shape[1])  # once: they may fill half the memory
            joined[name][start:end] = x
    return joined


def warn_of_size(images, dim, device):
    """Say so, before hours of work, if features of so many images take much of the memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        processes = 1
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = 4 * images * dim * processes
    if size > memory / 4 and rank() == 0:
        print(f"warning: the features of {images:,} images will take {size / 1e9:.1f} GB of "
              f"{memory / 1e9:.1f} GB of memory: --no-untrained halves that, --train-fraction or "
              "leaving out --cached, --knn and --nearest saves more", flush=True)  # fmt: skip


# ---- 5. Encoders
def load_encoder(path, plain_pixels=False, heads=None):
    """The encoder of a checkpoint of ours or of a released file, frozen, in evaluation mode; its
    .options are the run's, its .step the number of updates, None in a released file.

    plain_pixels: a released network takes pixels in [0, 1] as they are. heads: of a released ViT,
    whose weights do not tell; None: one for 64 channels. Prints how a released file was read."""
    try:
        return open_encoder(path, plain_pixels, heads)
    except Refusal as refusal:
        if dist.is_initialized():
            raise  # all_or_none prints it, once for all processes
        fail(str(refusal))


def open_encoder(path, plain_pixels, heads):
    """load_encoder's work. Refusal: a file without an encoder like those that are built here."""
    if not Path(path).is_file():
        raise Refusal(f"{path}: no such file; give a run's checkpoint.pt")
    state = read_checkpoint(path)
    own = isinstance(state, dict) and isinstance(state.get("options"), dict)
    if own and heads:
        raise Refusal(f"--heads {heads}: {path} has its own: leave the option out")
    foreign = "damaged or foreign checkpoint"
    try:
        if not own:
            state = released_checkpoint(state, plain_pixels, heads)
        for name in ("data", "image_size"):  # the others are read below
            if name not in state["options"]:
                raise KeyError(name)
        encoder = new_encoder(state["options"])
        unlike = differences(encoder.state_dict(), state["encoder"])
        if unlike:
            what = describe(state["options"])
            raise Refusal(
                f"{foreign}, unlike the {what} that is built here: {unlike}: give another"
            )
        encoder.load_state_dict(state["encoder"])
        encoder.step = state["step"]
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from None
    except Exception as error:  # of many kinds, if an option is missing or is no number
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise Refusal(f"{path}: {foreign} ({reason}): give another") from None
    if not own and rank() == 0:
        print(f"{path}: read as {state['found']}", flush=True)
    return encoder


class Ignored:
    """Whatever else a trainer saved, as an empty object."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class PlainDict:
    """A dictionary of some library, as one of Python's own."""

    def __new__(cls, *args):
        return OrderedDict()


# What trainers save beside the weights, by module. Reading a file runs none of it and needs none
# of these libraries: Ignored and PlainDict take their places. Everything else is refused.
BESIDE_WEIGHTS = {
    "argparse": ["Namespace"],
    "types": ["SimpleNamespace"],
    "pathlib": ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"],
    "pathlib._local": ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"],
    "datetime": ["datetime", "date", "timedelta"],
    "typing": ["Any"],
    "builtins": ["dict", "list", "tuple", "frozenset", "int", "float", "str", "bool"],
    "numpy": ["dtype", "ndarray", "bool_", "float16", "float32", "float64", "int32", "int64"],
    "numpy.core.multiarray": ["scalar", "_reconstruct"],
    "numpy._core.multiarray": ["scalar", "_reconstruct"],
    "torch.torch_version": ["TorchVersion"],
    "omegaconf.dictconfig": ["DictConfig"],
    "omegaconf.listconfig": ["ListConfig"],
    "omegaconf.base": ["ContainerMetadata", "Metadata"],
    "omegaconf.nodes": ["AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"],
    "pytorch_lightning.callbacks.model_checkpoint": ["ModelCheckpoint"],
}
DICTIONARIES = {
    "collections": ["defaultdict"],
    "easydict": ["EasyDict"],
    "yacs.config": ["CfgNode"],
    "addict.addict": ["Dict"],
    "mmengine.config.config": ["ConfigDict"],
    "pytorch_lightning.utilities.parsing": ["AttributeDict"],
    "lightning.pytorch.utilities.parsing": ["AttributeDict"],
    "lightning_fabric.utilities.data": ["AttributeDict"],
    "lightning.fabric.utilities.data": ["AttributeDict"],
}


def stand_ins():
    """Classes of ours with these names, which torch then takes for the trainers'."""
    classes = []
    for kind, modules in ((Ignored, BESIDE_WEIGHTS), (PlainDict, DICTIONARIES)):
        for module, names in modules.items():
            for name in names:
                classes.append(type(name, (kind,), dict(__module__=module)))
    return classes


def read_checkpoint(path):
    """What a file holds. Nothing in it is run. Refusal: it holds more than weights, or is none."""
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        with torch.serialization.safe_globals(stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        reason = f"damaged or foreign checkpoint ({type(error).__name__})"
        remedy = "copy it again, or give another"
        more = re.search(r"GLOBAL ([\w.]+)|TorchScript", str(error))
        if more:
            reason = f"holds more than weights ({more[1] or 'TorchScript'})"
            remedy = "save its state dict (torch.save(model.state_dict(), FILE)) and give that"
        raise Refusal(f"{path}: {reason}: {remedy}") from None


SAFETENSORS_TYPES = dict(
    F64=torch.float64,
    F32=torch.float32,
    F16=torch.float16,
    BF16=torch.bfloat16,
    I64=torch.int64,
    I32=torch.int32,
    U8=torch.uint8,
    BOOL=torch.bool,
)


def read_safetensors(path):
    """{name: tensor} of a SafeTensors file: the header's size (8 bytes), the header, the data."""
    content = bytearray(Path(path).read_bytes())
    first = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:first])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        numbers = content[first + start : first + end]
        x = torch.frombuffer(numbers, dtype=SAFETENSORS_TYPES[entry["dtype"]])
        tensors[name] = x.view(entry["shape"])
    return tensors


def released_checkpoint(state, plain_pixels, heads):
    """A file of the official MSN, MAE, data2vec, VICReg, DINO or MoCo, of timm or torchvision, or
    a converted SimCLR, in the form of our checkpoints. Which one it is follows from its names."""
    tensors = flatten(state)
    part = best_part(tensors)
    weights = {}
    for name, x in tensors.items():
        own = name.removeprefix(part)
        if name.startswith(part) and not own.startswith(NOT_ENCODER):
            for theirs, ours in RENAMED:
                own = own.replace(theirs, ours)
            weights[own] = x
    if "conv1.weight" in weights:
        if heads:
            raise Refusal(f"--heads {heads}: this is a ResNet: leave the option out")
        options = resnet_sizes(weights)
    else:
        options = vit_sizes(weights, part, heads)
    if "script" not in options:
        decoder = [name for name in tensors if name.startswith(f"{part}decoder")]
        options["script"] = "mae" if decoder else "msn"
    options |= dict(seed=0, data=None)
    pixels = "as they are"
    if not plain_pixels:
        options["standardise"] = False
        pixels = "with ImageNet's mean and deviation (--plain-pixels: as they are)"
    found = f"a {describe(options)}, pixels {pixels}"
    if part:
        found += f", from {part.removesuffix('.')}"
    if options.get("heads") and not heads and options["script"] != "data2vec":
        found += "; the number of heads is a guess from the width: --heads overrides it"
        if options["dim"] == 384:
            found += " (MoCo v3's ViT-S has 12)"
    return dict(options=options, encoder=weights, step=None, found=found)


def flatten(state, prefix=""):
    """All tensors in nested dictionaries, by their names, joined with dots."""
    tensors = {}
    if not isinstance(state, dict):
        return tensors
    for key, x in state.items():
        if isinstance(x, dict):
            tensors |= flatten(x, f"{prefix}{key}.")
        elif torch.is_tensor(x):
            tensors[f"{prefix}{key}"] = x
    return tensors


# Of several networks in one file the moving average or the teacher is the one to evaluate, and the
# student the last. MoCo's own evaluations take encoder_q or base_encoder, not the momentum's.
PREFERRED = {"ema", "teacher", "target"}
LAST = {"student", "online", "momentum", "k"}
NOT_ENCODER = (
    "head", "fc.", "decoder", "lm_head", "mask_token", "classifier", "linear", "pred", "proj",
    "prototypes", "rel_pos_bias.relative_position_index",
)  # fmt: skip
RENAMED = [  # their names and ours
    ("ls1.gamma", "gamma_1"),
    ("ls2.gamma", "gamma_2"),
    ("register_tokens", "reg_token"),
]


def best_part(tensors):
    """What the names of the encoder begin with, such as "teacher.backbone."."""
    parts = []
    for name in tensors:
        part = re.sub(r"(^|\.)(patch_embed\.proj|conv1)\.weight$", r"\1", name)
        is_vit = f"{part}patch_embed.proj.weight" == name
        is_resnet = f"{part}conv1.weight" == name and f"{part}layer1.0.conv1.weight" in tensors
        if is_vit or is_resnet:
            parts.append(part)
    if not parts:
        names = ", ".join(list(tensors)[:4]) or "no tensors"
        raise Refusal(
            "damaged or foreign checkpoint: no encoder found, which has, after any prefix, "
            "patch_embed.proj.weight (ViT) or conv1.weight and layer1.0.conv1.weight (ResNet); "
            f"it has {names}: give another"
        )
    ranks = [part_rank(part) for part in parts]
    best = [part for part, rank in zip(parts, ranks) if rank == min(ranks)]
    if len(best) > 1:
        raise Refusal(f"holds several networks ({', '.join(best)}): save the state dict of one")
    return best[0]


def part_rank(part):
    """0 for the part of a file to take if there are several, 2 for the last."""
    words = set(re.split(r"[._]", part))
    if words & PREFERRED:
        return 0
    return 2 if words & LAST else 1


def resnet_sizes(weights):
    """The options of a ResNet that has these weights."""
    blocks = {".".join(name.split(".")[:2]) for name in weights if name.startswith("layer")}
    counts = [sum(block.startswith(f"layer{i}") for block in blocks) for i in (1, 2, 3, 4)]
    arch = "resnet50" if "layer1.0.conv3.weight" in weights else "resnet18"
    if counts != ([3, 4, 6, 3] if arch == "resnet50" else [2, 2, 2, 2]):
        kind = "three" if arch == "resnet50" else "two"
        raise Refusal(f"a ResNet of {counts} blocks with {kind} convolutions: only ResNet-18 and "
                      "ResNet-50 are built here: give another")  # fmt: skip
    return dict(arch=arch, image_size=224 if weights["conv1.weight"].shape[2] == 7 else 32)


def vit_sizes(weights, part, heads):
    """The options of a ViT that has these weights. Sizes follow from shapes, but for the number of
    heads."""
    shape = weights["patch_embed.proj.weight"].shape
    if len(shape) != 4:
        raise Refusal(f"a network whose patches have the shape {[*shape]}: give a ViT of images")
    dim = shape[0]
    patch_size = shape[2]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    options = dict(dim=dim, patch_size=patch_size, depth=depth)
    variant = dict(
        cls_token="cls_token" in weights,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        norm="norm.weight" in weights or "fc_norm.weight" not in weights,
        fc_norm="fc_norm.weight" in weights,
        registers=0,
    )
    if "reg_token" in weights:
        variant["registers"] = weights["reg_token"].shape[1]
    if "blocks.0.mlp.fc1.weight" in weights:
        variant["hidden"] = len(weights["blocks.0.mlp.fc1.weight"])
    if "blocks.0.gamma_1" in weights:
        options["layer_scale"] = 1e-4
    table = weights.get("rel_pos_bias.relative_position_bias_table")
    if table is not None:
        grid = (math.isqrt(len(table) - 3) + 1) // 2
        options |= dict(script="data2vec", heads=table.shape[1])
    else:
        grid, variant["placed"] = grid_of(weights, variant)
        options["heads"] = heads or likely_heads(dim, part)
    if heads and heads != options["heads"]:
        own = table.shape[1]
        raise Refusal(f"--heads {heads}: its table of relative positions has {own}: leave it out")
    if dim % options["heads"]:
        raise Refusal(f"--heads {heads}: no divisor of its width {dim}: give another")
    return options | dict(image_size=grid * patch_size, variant=variant)


def grid_of(weights, variant):
    """The square grid's side, and how many of the tokens before the patches have positions: all,
    none (timm's no_embed_class) or cls alone (DINOv2)."""
    if "pos_embed" not in weights or weights["pos_embed"].ndim != 3:
        raise Refusal(
            "a ViT without pos_embed, (1, N, D), or one table of relative positions: give another"
        )
    tokens = weights["pos_embed"].shape[1]
    cls_tokens = int(variant["cls_token"])
    found = []
    for placed in {cls_tokens + variant["registers"], cls_tokens, 0}:
        patches = tokens - placed
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            found.append((math.isqrt(patches), placed))
    if len(found) != 1:
        names = " or ".join(name for name in weights if name.endswith("_token")) or "cls_token"
        raise Refusal(f"pos_embed has {tokens} rows, no square of patches with or without {names}: "
                      "only square images are taken: give another")  # fmt: skip
    return found[0]


WIDE_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # so400m, H, g and G: their heads are wider


def likely_heads(dim, part):
    """Heads of 64 channels, but for the largest ViTs and MoCo v3's ViT-S, which has 12."""
    if dim == 384 and ("base_encoder" in part or "momentum_encoder" in part):
        return 12
    if dim in WIDE_HEADS:
        return WIDE_HEADS[dim]
    if dim % 64:
        raise Refusal(f"its width {dim} is no multiple of 64, which leaves its heads open: give "
                      "--heads")  # fmt: skip
    return dim // 64


def describe(options):
    """An encoder's options in words."""
    size = options["image_size"]
    if "arch" in options:
        return f"{options['arch']}: images of {size} x {size}"
    words = (
        f"ViT: images of {size} x {size}, patches of {options['patch_size']}, width "
        f"{options['dim']}, depth {options['depth']}, heads {options['heads']}"
    )
    variant = options.get("variant", {})
    if variant.get("registers"):
        words += f", registers {variant['registers']}"
    if variant.get("fc_norm") or not variant.get("cls_token", True):
        words += ", its classifier reads the mean of the patches"
    return words


def differences(own, weights):
    """In what the names and shapes of weights differ from a network's own; "" if they do not."""
    missing = [name for name in own if name not in weights and "num_batches" not in name]
    found = []
    if missing:
        found.append(f"{some(missing)} missing")
    more = [name for name in weights if name not in own]
    if more:
        found.append(f"{some(more)} more")
    for name in own:
        if name in weights and own[name].shape != weights[name].shape:
            found.append(f"{name} {[*weights[name].shape]} in place of {[*own[name].shape]}")
            break
    return ", ".join(found)


def some(names):
    """The first names of a list."""
    more = f" and {len(names) - 2} others" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def new_encoder(options):
    """A run's options -> an untrained encoder: its architecture, its initial distribution."""
    torch.manual_seed(options["seed"])
    if "arch" in options:
        encoder, _ = resnet(options["arch"], options["image_size"])
    else:
        encoder = AnyViT(
            image_size=options["image_size"],
            patch_size=options["patch_size"],
            dim=options["dim"],
            depth=options["depth"],
            heads=options["heads"],
            stem=options.get("stem", ()),
            layer_scale=options.get("layer_scale"),
            relative=options["script"] == "data2vec",
            **options.get("variant", {}),
        )
        encoder.apply(functools.partial(initialise_as, options["script"]))
    encoder.options = options
    return encoder.eval().requires_grad_(False)


def untrained(encoder):
    """The control: its network with initial weights; MAE's positions, which never learn, stay."""
    control = new_encoder(encoder.options)
    if encoder.options["script"] == "mae":
        control.pos_embed.data.copy_(encoder.pos_embed)
    return control


ARCHITECTURES = dict(resnet50=models.resnet50, resnet18=models.resnet18)


def resnet(arch, image_size):
    """torchvision's ResNet without its classifier: images (B, 3, H, W) -> representations (B, D).

    Returns the network and D. The last scale of every residual block is 0 at first. For images of
    up to 32 pixels the stem neither strides nor pools, as in SimCLR's official code."""
    if arch == "small":
        return small_network([3, 16, 32, 64, 64, 128]), 128
    network = ARCHITECTURES[arch](zero_init_residual=True, norm_layer=BatchNorm)
    dim = network.fc.in_features
    network.fc = nn.Identity()
    if image_size <= 32:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network, dim


def small_network(widths):
    """Convolutions of these widths, every other one with stride 2, and their mean over pixels."""
    layers = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        stride = 2 - i % 2
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
        layers.append(BatchNorm(after))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class AnyViT(nn.Module):
    """The ViT of msn.py, mae.py and data2vec.py, to evaluate only, with their (timm's) names.

    stem: channels of convolutions; empty: none. layer_scale: a number by which branches are scaled
    at first, or None. relative: BEiT's one relative position bias for all blocks, or else absolute
    positions. images (B, 3, H, W) -> representations (B, D): the cls token after the final norm.

    Released files may have no cls_token, but registers (DINOv2), of all of which the first
    `placed` have positions, None: all; another width `hidden` in the blocks, no qkv_bias; fc_norm
    after the mean of the patches, and no norm before it."""

    def __init__(
        self, image_size, patch_size, dim, depth, heads, stem=(), layer_scale=None, relative=False,
        cls_token=True, registers=0, placed=None, hidden=None, qkv_bias=True, norm=True,
        fc_norm=False,
    ):  # fmt: skip
        super().__init__()
        grid = image_size // patch_size
        self.front = cls_token + registers  # tokens before the patches
        self.placed = self.front if placed is None else placed
        self.patch_embed = nn.ModuleDict(dict(proj=patch_projection(patch_size, dim, stem)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if cls_token else None
        block = dict(heads=heads, hidden=hidden or 4 * dim, layer_scale=layer_scale)
        block |= dict(qkv_bias=qkv_bias, relative=relative)
        self.blocks = nn.ModuleList(AnyBlock(dim, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if fc_norm else nn.Identity()
        self.reg_token = nn.Parameter(0.02 * torch.randn(1, registers, dim)) if registers else None
        if not relative:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.placed + grid**2, dim))
            return
        self.pos_embed = None
        self.rel_pos_bias = nn.Module()
        table = torch.zeros((2 * grid - 1) ** 2 + 3, heads)
        self.rel_pos_bias.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("index", bias_index(grid), persistent=False)

    def tokens(self, images):
        """-> outputs (B, front + N, D) of the last four blocks, before the final norm."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        front = [token for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in front), x], dim=1)
        bias = None
        if self.pos_embed is None:
            table = self.rel_pos_bias.relative_position_bias_table
            bias = table[self.index].permute(2, 0, 1)  # (heads, 1 + N, 1 + N)
        else:
            placed, patches = self.pos_embed.tensor_split([self.placed], dim=1)
            none = F.pad(placed, (0, 0, 0, self.front - self.placed))  # 0 for the other tokens
            x = x + torch.cat([none, patches], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs[-4:]

    def forward(self, images):
        return self.norm(self.tokens(images)[-1][:, 0])


class AnyBlock(nn.Module):
    """Transformer block, pre-norm, with timm's names; branches are scaled by gamma if there is a
    layer_scale; if relative, as in BEiT, keys have no bias. x (B, 1 + N, D); bias (heads, 1 + N,
    1 + N) of the logits."""

    def __init__(self, dim, heads, hidden, layer_scale, qkv_bias, relative):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and not relative)
        self.attn = nn.ModuleDict(dict(qkv=qkv, proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))
        if relative:
            self.attn.q_bias = nn.Parameter(torch.zeros(dim))
            self.attn.v_bias = nn.Parameter(torch.zeros(dim))
        if layer_scale is None:
            self.gamma_1 = 1.0
            self.gamma_2 = 1.0
        else:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, bias):
        qkv = self.attn["qkv"](self.norm1(x))
        if bias is not None:
            q_bias = self.attn.q_bias
            qkv = qkv + torch.cat([q_bias, torch.zeros_like(q_bias), self.attn.v_bias])
        qkv = qkv.unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, 1 + N, D / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + self.gamma_1 * self.attn["proj"](mixed)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, 1 + N, hidden)
        return x + self.gamma_2 * self.mlp["fc2"](hidden)


def bias_index(grid):
    """The row of BEiT's table of biases for each pair of tokens, query by key, cls first: (1 + N,
    1 + N) for N = grid**2. A row for each shift of patches; three more for pairs with cls."""
    row = torch.arange(grid).repeat_interleave(grid)  # of each patch, (N,)
    column = torch.arange(grid).repeat(grid)
    down = row[:, None] - row + grid - 1  # (N, N), from 0
    right = column[:, None] - column + grid - 1
    index = F.pad(down * (2 * grid - 1) + right, (1, 0, 1, 0))
    shifts = (2 * grid - 1) ** 2
    index[0] = shifts  # cls looks at a patch
    index[:, 0] = shifts + 1  # a patch looks at cls
    index[0, 0] = shifts + 2
    return index


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


def initialise_as(script, module):
    """The official initial weights of each script's ViT; biases 0, but the convolution's of MAE."""
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return
    convolution = isinstance(module, nn.Conv2d)
    weight = module.weight.data.flatten(1)
    if script == "mae":
        nn.init.xavier_uniform_(weight)
    elif script == "data2vec":
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
    elif convolution:
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    else:
        nn.init.trunc_normal_(weight, std=0.02)
    if module.bias is not None and not (script == "mae" and convolution):
        nn.init.zeros_(module.bias)


# ---- 6. Data sets
STUDY_TASKS = {  # the layout and the target of a task, where a data set has several or its own
    "clevr-count": ("clevr", "count"),
    "clevr-dist": ("clevr", "dist"),
    "kitti-dist": ("kitti", "dist"),
}


@dataclass
class Split:
    """The training set or the test set of a task."""

    images: torch.Tensor | list  # uint8 (N, C, H, W), or N paths
    labels: torch.Tensor  # (N, T), the targets that heads learn
    classes: torch.Tensor  # (N,), by which subsets are drawn and frequencies counted


@dataclass
class Task:
    data: str
    target: str
    name: str  # of the recipe in TASKS
    train: Split
    test: Split
    num_classes: int  # C, of each target


def open_task(data, target=None, task=None):
    """The data set with the labels of one target -> Task. Without a target that of `task`, the
    digits of plates, or else the data set's first; without a task the data's own."""
    layout = layout_of(data)
    if task in STUDY_TASKS:
        needed, of_task = STUDY_TASKS[task]
        if layout != needed:
            contents = LAYOUTS[needed].contents
            raise Refusal(f"--data {data}: --task {task} needs {contents}: give their folder")
        if target not in (None, of_task):
            raise Refusal(f"--target {target}: --task {task} has {of_task}: leave one out")
        target = of_task
    if data not in IN_MEMORY and not layout:
        check_classes(data)
    splits = []
    for split in ("train", "val"):
        images, labels = open_images(data, layout, split)
        if not target:
            target = "digits" if "digits" in labels else next(iter(labels))
        if target not in labels:
            own = ", ".join(labels)
            raise Refusal(f"--target {target}: {data} has {own}: choose one of these")
        classes = next(iter(labels.values()))
        splits.append(Split(images, labels[target].reshape(len(images), -1), classes))
    train, test = splits
    if len(train.images) < 2:
        raise Refusal(f"--data {data}: one training image: BatchNorm needs two: add some")
    return Task(
        data=data,
        target=target,
        name=task or own_task(data, layout, target),
        train=train,
        test=test,
        num_classes=int(max(train.labels.max(), test.labels.max())) + 1,
    )


def own_task(data, layout, target):
    """The name in TASKS of the recipe that the study has for these data, or of ImageNet's."""
    for name, own in STUDY_TASKS.items():
        if own == (layout, target):
            return name
    name = layout or data
    return name if name in TASKS else "imagenet"


def layout_of(data):
    """Which of LAYOUTS a folder has, or "" for any other."""
    if data not in IN_MEMORY:
        for name, layout in LAYOUTS.items():
            if (Path(data) / layout.marker).exists():
                return name
    return ""


def check_classes(data):
    """Refuse a folder without train or val, or without classes in them, or whose train and val have
    different classes, and so different labels."""
    root = Path(data)
    names = subfolders(root)
    if not names:
        return  # open_data says what it needs
    for split in ("train", "val"):
        needed = f"it needs {split}/CLASS/IMAGE"
        if split not in names:
            found = ", ".join(names[:5])
            raise Refusal(f"--data {data}: no folder {split}, but {found}: {needed}: rename or "
                          "link what you mean")  # fmt: skip
        if any((root / split).iterdir()) and not subfolders(root / split):
            raise Refusal(f"--data {data}: {root / split} has no class folders: {needed}: sort its "
                          "images into them")  # fmt: skip
    odd = sorted(set(subfolders(root / "train")) ^ set(subfolders(root / "val")))
    if odd:
        raise Refusal(
            f"--data {data}: class {odd[0]} is not in both train and val: make them agree"
        )


def subfolders(root):
    """The names of a folder's folders, sorted, without those that sampler.py skips."""
    if not root.is_dir():
        return []
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return [name for name in names if not is_hidden(name)]


def open_images(data, layout, split):
    """Images, uint8 (N, C, H, W) or N paths, and labels, {target: (N, ...)}, the class first."""
    if layout == "" or LAYOUTS[layout].read is None:
        try:
            return open_data(data, split)
        except ValueError as error:
            raise Refusal(f"--data {error}") from None
    contents = LAYOUTS[layout].contents
    try:
        paths, labels = LAYOUTS[layout].read(Path(data), split)
        if not paths:
            raise ValueError(f"no images of {split}")
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Refusal(
            f"--data {data}: not {layout} as published ({reason}): it needs {contents}"
        ) from None
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise Refusal(f"--data {data}: {missing[0]} is missing: unpack {contents} there")
    labels = {target: torch.tensor(label) for target, label in labels.items()}
    return [str(path) for path in paths], labels


def read_clevr(root, split):
    """scenes/CLEVR_{train,val}_scenes.json and images/{train,val}."""
    scenes = json.loads((root / f"scenes/CLEVR_{split}_scenes.json").read_text())["scenes"]
    paths = [root / f"images/{split}" / scene["image_filename"] for scene in scenes]
    labels = dict(
        count=[clevr_count(scene) for scene in scenes],
        dist=[clevr_dist(scene) for scene in scenes],
    )
    return paths, labels


def read_kitti(root, split):
    """training/{image_2,label_2}. The objects have no such split, so a fifth of the images, drawn
    with seed 0, is the test set (VISSL does the same without a seed)."""
    files = sorted((root / "training/label_2").glob("*.txt"))
    order = shuffled(torch.arange(len(files)), seed=0).tolist()
    fifth = len(files) // 5
    chosen = order[fifth:] if split == "train" else order[:fifth]
    files = [files[i] for i in chosen]
    paths = [root / f"training/image_2/{file.stem}.png" for file in files]
    return paths, dict(dist=[kitti_dist(file.read_text().splitlines()) for file in files])


def read_places205(root, split):
    """trainvalsplit_places205/{train,val}_places205.csv, with lines `path label`, and the images
    below data/vision/torralba/deeplearning/images256."""
    text = (root / f"trainvalsplit_places205/{split}_places205.csv").read_text()
    images = root / "data/vision/torralba/deeplearning/images256"
    paths = []
    classes = []
    for line in text.split("\n"):
        if line.strip():
            path, label = line.rsplit(maxsplit=1)
            paths.append(images / path)
            classes.append(int(label))
    return paths, {"class": classes}


def clevr_count(scene):
    """Class 0..7 of a CLEVR scene with 3 to 10 objects. VTAB count_all. ValueError: others."""
    number = len(scene["objects"])
    if not 3 <= number <= 10:
        raise ValueError(f"{number} objects: a CLEVR scene has 3 to 10")
    return number - 3


def clevr_dist(scene):
    """Class 0..5 of the depth of the closest object: the third pixel coordinate, as float32, in
    (0, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100]. VTAB closest_object_distance.
    ValueError: a depth outside of these."""
    depth = min(torch.tensor(item["pixel_coords"][2]).item() for item in scene["objects"])
    if not 0 < depth <= 100:
        raise ValueError(f"closest depth {depth} is not in (0, 100]")
    return sum(depth > edge for edge in (8, 8.5, 9, 9.5, 10))


def kitti_dist(label_lines):
    """Class 0..3 of the nearest car, van or truck: z in metres <= 8, <= 20, beyond, none. VTAB
    closest_vehicle_distance: a vehicle beside or behind the camera is class 0. ValueError: z not
    above -100 metres."""
    rows = [line.split() for line in label_lines if line.strip()]
    vehicles = [row for row in rows if row[0] in ("Car", "Van", "Truck")]
    z = min((float(row[13]) for row in vehicles), default=1000.0)
    if z <= -100:
        raise ValueError(f"vehicle at z {z}: not above -100 metres")
    return sum(z > edge for edge in (8, 20, 999))


@dataclass
class Layout:
    """A data set that is not a folder of classes, as published."""

    marker: str  # a file or folder that only this one has
    contents: str  # what must be unpacked, and where it is from
    read: Callable | None = None  # (folder, split) -> N paths, {target: N labels}; None: open_data


LAYOUTS = dict(
    clevr=Layout(
        marker="scenes",
        contents="scenes/ and images/ of CLEVR_v1.0.zip (cs.stanford.edu/people/jcjohns)",
        read=read_clevr,
    ),
    kitti=Layout(
        marker="training/label_2",
        contents="training/{image_2,label_2} of KITTI's objects (cvlibs.net)",
        read=read_kitti,
    ),
    places205=Layout(
        marker="trainvalsplit_places205",
        contents="its lists and images256 (places.csail.mit.edu)",
        read=read_places205,
    ),
    inat18=Layout(
        marker="train2018.json",
        contents="{train,val}2018.json, train_val2018/ (github.com/visipedia)",
    ),
)


def subset(choice, images, classes, seed):
    """Which of N training images to use, as sorted indices.

    choice: a share of each class or `N-per-class`, both drawn by the seed, or a file of images,
    one a line: see `listed`. images: N paths, or a tensor; classes: theirs (N,)."""
    if Path(choice).is_file():
        return listed(choice, images)
    order = shuffled(torch.arange(len(classes)), seed)
    order = order[classes[order].argsort(stable=True)]  # class after class, each shuffled
    sizes = classes.bincount()
    first = sizes.cumsum(0) - sizes  # place of each class's first image in this order
    place = torch.arange(len(classes)) - first[classes[order]]  # of an image within its class
    if choice.endswith("-per-class"):
        number = torch.full_like(sizes, int(choice.removesuffix("-per-class")))
    else:
        number = (sizes * float(choice)).round().clamp(min=1)
    return order[place < number[classes[order]]].sort().values


def listed(file, images):
    """Indices of the images that a file lists, sorted. Each line is the end of a path: NAME, or
    CLASS/NAME where two classes have the name."""
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise Refusal(f"--train-fraction {file}: not a text file ({error}): fix it") from None
    entries = sorted({line.strip() for line in lines} - {""})
    if not entries:
        raise Refusal(f"--train-fraction {file}: it names no image: fix the list")
    indices_of = {}  # of the images with each file name
    if not torch.is_tensor(images):
        for index, path in enumerate(images):
            indices_of.setdefault(Path(path).name, []).append(index)
    chosen = set()
    for entry in entries:
        same_name = indices_of.get(Path(entry).name, [])
        found = [i for i in same_name if f"/{images[i]}".endswith(f"/{entry}")]
        if not found:
            raise Refusal(f"--train-fraction {file}: {entry} is no training image: fix the list")
        if len(found) > 1:
            both = f"{images[found[0]]} and {images[found[1]]}"
            raise Refusal(f"--train-fraction {file}: {entry} is {both}: write CLASS/NAME")
        chosen.update(found)
    return torch.tensor(sorted(chosen))


def frequency_groups(classes, test_classes, long_tail):
    """Which of N test images are of the tenth of the classes that the encoder saw most often, and
    which of the rarer half: {name: (N,) bool}.

    classes, test_classes: of all training images and of the test images. In pretraining class k,
    from 1, was cut to a share k**-long_tail."""
    seen = classes.bincount()
    seen = seen * (torch.arange(len(seen)) + 1.0) ** -long_tail
    place = seen.argsort(descending=True, stable=True).argsort()  # 0: the most frequent
    share = place[test_classes] / len(seen)
    return dict(frequent=share < 0.1, rare=share >= 0.5)


class Images(Dataset):
    """Item (epoch, indices): uint8 (B, 3, size, size), augmented by random numbers that follow from
    (seed, epoch, index), or whole if epoch is None; or a message if a file cannot be read.

    augment: "crop" and flip, or flip. Whole files are resized to 8/7 of size (256 for 224) and
    cropped to the centre, or squashed to a square. Of a file that is more than 4 times as long as
    wide only the middle is resized: its ends are not seen, but would take gigabytes."""

    def __init__(self, images, size, augment, squash, seed):
        self.images = images
        self.size = size
        self.seed = seed
        steps = [middle, v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
        if squash or torch.is_tensor(images):  # tensors are square
            steps = [v2.Resize((size, size))]
        self.whole = v2.Compose(steps)
        crop = v2.RandomResizedCrop(size) if augment == "crop" else self.whole
        self.augmented = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __getitem__(self, item):
        epoch, indices = item
        if epoch is None and torch.is_tensor(self.images):
            return self.whole(self.images[indices].expand(-1, 3, -1, -1))  # all at once
        try:
            return torch.stack([self.prepare(epoch, index) for index in indices])
        except Refusal as refusal:
            return str(refusal)

    def prepare(self, epoch, index):
        """One image -> (3, size, size)."""
        image = self.images[index]
        if torch.is_tensor(image):
            image = image.expand(3, -1, -1)
        else:
            image = read_image(image)
        if epoch is None:
            return self.whole(image)
        # CPU only: torch.manual_seed takes 25 times as long.
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)))
        return self.augmented(image)


def middle(image):
    """The middle of an image (..., H, W), at most 4 times as long as wide."""
    H, W = image.shape[-2:]
    return TF.center_crop(image, [min(H, 4 * W), min(W, 4 * H)])


# ---- 7. Stopped evaluations, processes
MAY_CHANGE = ("checkpoint", "out", "workers", "knn", "nearest")  # between two starts


def evaluation_key(args, recipe, data, whole):
    """What must be the same for an evaluation to continue another's work. whole: the number of
    training images whose features are needed without augmentation."""
    key = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    file = os.stat(args.checkpoint)
    version = [file.st_size, file.st_mtime_ns]
    return key | dict(recipe=recipe, data=data, whole=whole, checkpoint_version=version)


def save_partial(path, key, state):
    """Save what an evaluation has so far; under another name first: a kill leaves no half file."""
    if rank() == 0:
        torch.save(state | dict(key=key), f"{path}.new")
        os.replace(f"{path}.new", path)


def load_partial(path, key):
    """What an evaluation with the same key saved before it was stopped, or {}."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        same = state["key"] == key
    except Exception:  # none, or damaged: all that it would save is time
        same = False
    seen = [None] * world_size()
    dist.all_gather_object(seen, same)
    return state if all(seen) else {}  # on another machine it may be missing


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


def refuse_option(message):
    """argparse's complaint, as a line that begins with the option."""
    message = re.sub(r"^argument (\S+): ", r"\1 ", message)
    fail(message if "give" in message or "choose" in message else f"{message}: see --help")


# ---- Data
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


if __name__ == "__main__":
    main()
