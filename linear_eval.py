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
import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn import BatchNorm2d as BatchNorm  # a frozen one has nothing to synchronise
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from sampler import open_data

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
    p.error = lambda message: fail(re.sub(r"^argument (\S+): ", r"\1 ", message))
    p.add_argument("checkpoint", help="checkpoint.pt of a run, or a released file")

    g = p.add_argument_group("task")
    g.add_argument("--data", help="plates, cifar10, cifar100 or a folder; None: the run's")
    g.add_argument("--task", choices=TASKS, help="whose recipe; None: that of the data")
    g.add_argument("--target",
                   help="plates: digits, number, count or size; CLEVR: count or dist; KITTI: dist; "
                        "others: class; None: the first of these")  # fmt: skip
    g.add_argument("--train-fraction", type=share_or_list, default="1",
                   help="training images: a share of each class, N-per-class, or a file of image "
                        "names")  # fmt: skip
    g.add_argument("--plain-pixels", action="store_true",
                   help="a released network takes pixels in [0, 1], as SimCLR's does")  # fmt: skip

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
    encoder = load_encoder(args.checkpoint, args.plain_pixels)
    task = open_task(choose_data(args, encoder), args.target, args.task)
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
    with join_processes() as device:
        evaluate(args, device)


def choose_data(args, encoder):
    """The name of the data set: --data, or else that of the run."""
    data = args.data or encoder.options["data"]
    if data is None:
        fail("--data: needed, since a released checkpoint does not name its own: give one")
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
        fail(f"--out {out}: not writable ({error}): choose another file")
    return out


class FeatureSource:
    """The encoders' features of a task's images. Those of whole images are computed once and are
    in `train` and `test`; those of augmented images are computed anew in every epoch."""

    def __init__(self, encoders, task, recipe, parts, args):
        options = dict(
            size=encoders["trained"].options["image_size"],
            squash=recipe["squash"],
            seed=args.seed,
        )
        self.images = Images(task.train.images, augment=recipe["augment"], **options)
        self.test_images = Images(task.test.images, augment="none", **options)
        workers = os.cpu_count() // world_size() if args.workers is None else args.workers
        self.encode = functools.partial(
            encode, encoders, wanted=recipe["features"], workers=workers
        )
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
            saved = dict(
                train=collect(self.encode(self.images, parts.whole, 2000)),
                test=collect(self.encode(self.test_images, parts.test, 2000)),
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
    blank = torch.zeros(1, 3, images.size, images.size, dtype=torch.uint8, device=device)
    widths = {name: x.shape[1] for name, x in all_features(encoders, blank, wanted).items()}
    batches = order.split(batch_size)
    piece = math.ceil(batch_size / 8)
    own = slice(rank(), None, world_size())  # this process's pieces of every batch
    items = []
    for batch in batches:
        for indices in batch.split(piece)[own]:
            items.append((epoch, indices.tolist()))
    workers = 0 if torch.is_tensor(images.images) else workers
    pieces = iter(DataLoader(images, batch_size=None, sampler=items, num_workers=workers))
    for batch in batches:
        joined = torch.zeros(len(batch), sum(widths.values()), device=device)
        for rows in torch.arange(len(batch)).split(piece)[own]:
            pixels = next(pieces)
            if isinstance(pixels, str):  # what could not be read
                fail(pixels, everywhere=True)
            found = all_features(encoders, pixels.to(device), wanted)
            joined[rows] = torch.cat([*found.values()], dim=1)
        dist.all_reduce(joined)  # a sum: the rows of other processes are 0 here
        yield batch, dict(zip(widths, joined.split([*widths.values()], dim=1)))


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
    `patches`, the mean of the patches' tokens."""
    x = images.float() / 255
    if "standardise" in encoder.options:  # SimCLR takes pixels as they are
        x = normalise(x, encoder.options["standardise"])
    if not isinstance(encoder, AnyViT):
        return dict(pooled=encoder(x))
    outputs = encoder.tokens(x)
    normed = [encoder.norm(tokens) for tokens in outputs]
    return dict(
        cls=normed[-1][:, 0],
        raw=outputs[-1][:, 0],
        cls4=torch.cat([tokens[:, 0] for tokens in normed], dim=1),
        patches=normed[-1][:, 1:].mean(dim=1),
    )


def collect(batches):
    """All features that `encode` yields, in its order: {name: (N, D)}. Refuses a diverged run's."""
    hidden = None if rank() == 0 else True
    parts = [found for _, found in tqdm(batches, "features", disable=hidden)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(x.isfinite().all() for x in joined.values()):
        fail("the encoder's features are not finite: the run has diverged; give another checkpoint")
    return joined


# ---- 5. Encoders
def load_encoder(path, plain_pixels=False):
    """The encoder of a checkpoint of ours or of a released file, frozen, in evaluation mode; its
    .options are the run's, its .step the number of updates, None in a released file.

    plain_pixels: a released network takes pixels in [0, 1] as they are."""
    if not Path(path).is_file():
        fail(f"{path}: no such file; give a run's checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "options" not in state:
            state = released_checkpoint(state, plain_pixels)
        for name in ("data", "image_size"):  # the others are read below
            if name not in state["options"]:
                raise KeyError(name)
        encoder = new_encoder(state["options"])
        encoder.load_state_dict(state["encoder"])
        encoder.step = state["step"]
    except Exception as error:  # torch raises many kinds for damaged files
        words = str(error).split()  # without the line breaks that torch's errors have
        reason = f"{type(error).__name__}: {' '.join(words)}"[:400]
        fail(f"{path}: damaged or foreign checkpoint ({reason}): give another")
    return encoder


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


# Names in released files begin with these; what they hold is around the encoder or not part of it.
WRAPPERS = ("target_encoder", "teacher", "model", "state_dict")
PREFIXES = ("backbone.", "encoder.")
NOT_ENCODER = (
    "head", "fc.", "decoder", "lm_head", "mask_token", "projector",
    "rel_pos_bias.relative_position_index",
)  # fmt: skip


def released_checkpoint(state, plain_pixels):
    """A file of the official MSN, MAE, data2vec, VICReg or DINO, a converted SimCLR, timm or
    torchvision, in the form of our checkpoints. Which one it is follows from its names."""
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    found = {}
    for name, x in state.items():
        if torch.is_tensor(x):
            found[name.removeprefix("module.")] = x
    for prefix in PREFIXES:
        inner = {}
        for name, x in found.items():
            if name.startswith(prefix):
                inner[name.removeprefix(prefix)] = x
        found = inner or found
    weights = {}
    for name, x in found.items():
        if name.startswith("fc_norm."):  # the final norm of a network that averages its tokens
            name = name.removeprefix("fc_")
        if not name.startswith(NOT_ENCODER):
            weights[name] = x
    options = dict(script="mae" if "mask_token" in found else "msn", seed=0, data=None)
    options |= released_sizes(weights)
    if not plain_pixels:
        options["standardise"] = False
    return dict(options=options, encoder=weights, step=None)


def released_sizes(weights):
    """The options of a network that has these weights. Sizes follow from shapes, the number of a
    ViT's heads from a width of 64 each (ViT-H: 80)."""
    if "conv1.weight" in weights:
        return dict(
            arch="resnet50" if "layer1.0.conv3.weight" in weights else "resnet18",
            image_size=224 if weights["conv1.weight"].shape[2] == 7 else 32,
        )
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    options = dict(dim=dim, patch_size=patch_size)
    options["depth"] = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    table = weights.get("rel_pos_bias.relative_position_bias_table")
    if table is None:
        grid = math.isqrt(weights["pos_embed"].shape[1])
        options["heads"] = max(dim // 64, 1)
    else:
        grid = (math.isqrt(len(table) - 3) + 1) // 2
        options["heads"] = table.shape[1]
        options["script"] = "data2vec"
        options["layer_scale"] = 1e-4
    if dim == 1280:
        options["heads"] = 16
    options["image_size"] = grid * patch_size
    return options


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

    stem: channels of convolutions; empty: none. layer_scale: None, with absolute positions, or a
    number, with BEiT's one relative position bias for all blocks. images (B, 3, H, W) ->
    representations (B, D): the cls token after the final norm."""

    def __init__(self, image_size, patch_size, dim, depth, heads, stem=(), layer_scale=None):
        super().__init__()
        grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=patch_projection(patch_size, dim, stem)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(AnyBlock(dim, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if layer_scale is None:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid**2, dim))
            return
        self.pos_embed = None
        self.rel_pos_bias = nn.Module()
        table = torch.zeros((2 * grid - 1) ** 2 + 3, heads)
        self.rel_pos_bias.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("index", bias_index(grid), persistent=False)

    def tokens(self, images):
        """-> outputs (B, 1 + N, D) of the last four blocks, before the final norm."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        bias = None
        if self.pos_embed is None:
            table = self.rel_pos_bias.relative_position_bias_table
            bias = table[self.index].permute(2, 0, 1)  # (heads, 1 + N, 1 + N)
        else:
            x = x + self.pos_embed
        outputs = []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs[-4:]

    def forward(self, images):
        return self.norm(self.tokens(images)[-1][:, 0])


class AnyBlock(nn.Module):
    """Transformer block, pre-norm, with timm's names; with a layer_scale as in BEiT: no bias of
    keys, branches scaled by gamma. x (B, 1 + N, D); bias (heads, 1 + N, 1 + N) of the logits."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        qkv = nn.Linear(dim, 3 * dim, bias=layer_scale is None)
        self.attn = nn.ModuleDict(dict(qkv=qkv, proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        if layer_scale is None:
            self.gamma_1 = 1.0
            self.gamma_2 = 1.0
        else:
            self.attn.q_bias = nn.Parameter(torch.zeros(dim))
            self.attn.v_bias = nn.Parameter(torch.zeros(dim))
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
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, 1 + N, 4D)
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
IN_MEMORY = ("plates", "cifar10", "cifar100")
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
        needed, target = STUDY_TASKS[task]
        if layout != needed:
            contents = LAYOUTS[needed].contents
            fail(f"--data {data}: --task {task} needs {contents}: give their folder")
    if data not in IN_MEMORY and not layout:
        check_classes(data)
    splits = []
    for split in ("train", "val"):
        images, labels = open_images(data, layout, split)
        if not target:
            target = "digits" if "digits" in labels else next(iter(labels))
        if target not in labels:
            fail(f"--target {target}: {data} has {', '.join(labels)}: choose one of these")
        classes = next(iter(labels.values()))
        splits.append(Split(images, labels[target].reshape(len(images), -1), classes))
    train, test = splits
    if len(train.images) < 2:
        fail(f"--data {data}: one training image: BatchNorm needs at least two: add some")
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
    """Refuse a folder whose train and val have different classes, and so different labels."""
    train = {path.name for path in Path(data).glob("train/*") if path.is_dir()}
    test = {path.name for path in Path(data).glob("val/*") if path.is_dir()}
    odd = sorted(train ^ test)
    if train and test and odd:
        fail(f"--data {data}: class {odd[0]} is not in both train and val: make them agree")


def open_images(data, layout, split):
    """Images, uint8 (N, C, H, W) or N paths, and labels, {target: (N, ...)}, the class first."""
    if layout == "" or LAYOUTS[layout].read is None:
        try:
            return open_data(data, split)
        except ValueError as error:
            fail(f"--data {error}")
    contents = LAYOUTS[layout].contents
    try:
        paths, labels = LAYOUTS[layout].read(Path(data), split)
        if not paths:
            raise ValueError(f"no images of {split}")
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        fail(f"--data {data}: not {layout} as published ({reason}): it needs {contents}")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        fail(f"--data {data}: {missing[0]} is missing: unpack {contents} there")
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

    choice: a share of each class or `N-per-class`, both drawn by the seed, or a file of image
    names, one a line. images: N paths, or a tensor; classes: theirs (N,)."""
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
    """Indices of the images that a file names, sorted."""
    names = set(Path(file).read_text().split())
    index = {}
    if not torch.is_tensor(images):
        index = {Path(path).name: i for i, path in enumerate(images)}
    unknown = sorted(names - index.keys())
    if unknown:
        fail(f"--train-fraction {file}: {unknown[0]} is no training image: fix the list")
    if not names:
        fail(f"--train-fraction {file}: it names no image: fix the list")
    return torch.tensor(sorted(index[name] for name in names))


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
    cropped to the centre, or squashed to a square."""

    def __init__(self, images, size, augment, squash, seed):
        self.images = images
        self.size = size
        self.seed = seed
        resize = v2.Resize(size * 8 // 7)
        if squash or torch.is_tensor(images):  # tensors are square
            resize = v2.Resize((size, size))
        self.whole = v2.Compose([resize, v2.CenterCrop(size)])
        crop = v2.RandomResizedCrop(size) if augment == "crop" else self.whole
        self.augmented = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __getitem__(self, item):
        epoch, indices = item
        if epoch is None and torch.is_tensor(self.images):
            return self.whole(self.images[indices].expand(-1, 3, -1, -1))  # all at once
        try:
            return torch.stack([self.prepare(epoch, index) for index in indices])
        except UnreadableImage as error:
            return str(error)

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
        return state if state["key"] == key else {}
    except Exception:  # none, or damaged: all that it would save is time
        return {}


@contextlib.contextmanager
def join_processes():
    """Join torchrun's processes, or be a group of one; leave it at the end, whatever happens.

    Yields this process's device. Unlike training, an evaluation lets signals end it at once."""
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    try:
        yield device
    finally:
        dist.destroy_process_group()


# ======== Plumbing: the same, to the letter, in every script. Nothing below is about the method.
# ---- Options
def fail(message, everywhere=False):
    """Bad input: one line on stderr and exit status 2. Process 0 speaks for all, or `everywhere`
    each for itself."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


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
    return option_number(int, text, low=1, high=2**63, expected="a whole number of at least 1")


def two_or_more(text):
    return option_number(int, text, low=2, high=2**63, expected="a whole number of at least 2")


def count(text):
    return option_number(int, text, low=0, high=2**63, expected="a whole number from 0 to 9.2e+18")


def positive(text):
    least = sys.float_info.min
    return option_number(float, text, low=least, high=1e300, expected="a number above 0")


# ---- Data
class UnreadableImage(Exception):
    """Its text names the file, the reason and the remedy."""


def read_image(path):
    """An image file of any mode and orientation -> (3, H, W) uint8. Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if "transparency" in image.info:
                upright = upright.convert("RGBA")
            return TF.pil_to_tensor(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: unreadable image ({error}): fix or remove it") from None


# ---- Colours
def normalise(image, standardise):
    """(B, 3, H, W) in [0, 1] -> the network's input, by each image's own numbers or ImageNet's."""
    if standardise:
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (deviation + 1e-3)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# ---- Processes
def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    main()
