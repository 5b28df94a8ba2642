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

Processes share the images, not the heads: each encodes its share of every batch, and then all
train the same heads on the features of all. sampler.py opens plates, CIFAR, folders and
iNaturalist; CLEVR, KITTI and Places205 are read here. In shapes: N images, B a batch, D features,
T targets per image, C classes of each.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # idle threads sleep soon: 5x on a busy machine

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn import BatchNorm2d as BatchNorm  # a frozen one has nothing to synchronise
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2
from tqdm import tqdm

from sampler import IN_MEMORY, Unreadable, open_data, read_image

# ---- 1. Tasks and options
VISSL = dict(  # its defaults: configs/config/benchmark/linear_image_classification
    rates=[0.01, 0.1, 0.5],  # of learning, for a batch of 256; the first is VISSL's
    batch_size=256,
    epochs=28,
    cosine=False,  # or else a tenth of the rate after 2/7, 4/7 and 6/7 of the epochs each
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
    "plates": VISSL | dict(augment="none", batch_size=512, epochs=10),  # a flip changes a digit
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Defaults of None follow from the task's recipe or from the checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.error = fail
    path = os.path.expanduser  # a shell leaves --out=~/x as it is
    p.add_argument("checkpoint", type=path, help="checkpoint.pt of a run, or a released file")

    g = p.add_argument_group("task")
    g.add_argument("--data", type=path,
                   help="plates, cifar10, cifar100 or a folder; None: the run's")  # fmt: skip
    g.add_argument("--task", choices=TASKS, help="whose recipe; None: that of the data")
    g.add_argument("--target",
                   help="plates: digits, number, count or size; CLEVR: count or dist; KITTI: dist; "
                        "others: class; None: the first of these")  # fmt: skip
    g.add_argument("--train-fraction", type=share, default="1",
                   help="training images: a share of each class, or N-per-class")  # fmt: skip
    g.add_argument("--plain-pixels", action="store_true",
                   help="a released network takes pixels in [0, 1], as SimCLR's does")  # fmt: skip
    g.add_argument("--heads", type=positive_int,
                   help="attention heads of a released ViT; None: one for 64 channels")  # fmt: skip

    g = p.add_argument_group("heads")
    g.add_argument("--cached", action="store_true",
                   help="compute features once, of images that are not augmented")  # fmt: skip
    g.add_argument("--rates", type=positive, nargs="+", help="learning rates for a batch of 256")
    g.add_argument("--epochs", type=positive_int, help="passes over the training images")
    g.add_argument("--batch-size", type=two_or_more,
                   help="images, all processes; rates are scaled with it")  # fmt: skip
    g.add_argument("--seed", type=count, default=0, help="of held-out images, heads and order")

    g = p.add_argument_group("run and report")
    g.add_argument("--out", type=path, help="JSON file; None: one beside CHECKPOINT")
    g.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True,
                   help="evaluate the network with random weights too")  # fmt: skip
    g.add_argument("--knn", type=count, default=0, help="neighbours that classify, too; 0: none")
    g.add_argument("--workers", type=count, help="loader processes; None: a core each")
    return p.parse_args(argv)


def share(text):
    """The value of --train-fraction, as it is."""
    if not re.fullmatch(r"[1-9]\d*-per-class|1(\.0*)?|0?\.\d*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: give a share such as 0.01, or 5-per-class")
    return text


# ---- 2. Evaluation
def evaluate(args, device):
    """Train the heads of a task on the frozen encoder's features, score them, write the report."""
    encoder = load_encoder(args.checkpoint, args.plain_pixels, args.heads)
    task = task_of(args, encoder)
    recipe = choose_recipe(task, args)
    out = report_file(task, args)

    encoders = dict(trained=encoder.to(device))
    if args.untrained:
        encoders["untrained"] = untrained(encoder).to(device)
    source = FeatureSource(encoders, task, recipe, args)

    torch.manual_seed(args.seed)
    heads = new_heads(source.test, task.num_classes, recipe["rates"]).to(device)
    train_heads(
        heads,
        source.batches,
        steps=math.ceil(len(source.kept) / recipe["batch_size"]),
        recipe=recipe,
        file=f"{out}.heads",
        key=evaluation_key(recipe, args),
    )

    report = make_report(heads, source, task, recipe, args)
    report["step"] = encoder.step
    if rank() == 0:
        write_report(report, out)
        print_report(report, out)


def main(argv=None):
    args = parse_args(argv)
    with process_group() as device:
        evaluate(args, device)


def task_of(args, encoder):
    """The task that the options name. The first process of a machine opens it before the others,
    since it may have to download."""
    data = args.data or encoder.options["data"]
    if data is None:
        fail("--data: needed, since a released checkpoint does not name its own: give one")
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    try:
        task = open_task(data, args.target, args.task)
    except ValueError as error:
        fail(f"--data {error}")
    if first:
        dist.barrier()
    return task


def choose_recipe(task, args):
    """The task's recipe, changed by the options that are given."""
    recipe = dict(TASKS[task.name])
    for name in ("rates", "epochs", "batch_size"):
        given = vars(args)[name]
        if given is not None:
            recipe[name] = given
    if args.cached:
        recipe["augment"] = "none"
    return recipe


def report_file(task, args):
    """The path of the report: --out, or linear_eval_DATA_TARGET.json beside the checkpoint, with
    the file's name, if it is not checkpoint.pt, and a --train-fraction. What cannot be written is
    refused now, not after hours."""
    checkpoint = Path(args.checkpoint)
    words = ["linear_eval", checkpoint.stem, Path(task.data).name, task.target, args.train_fraction]
    if checkpoint.name == "checkpoint.pt":
        words.remove("checkpoint")
    if args.train_fraction == "1":
        words.pop()
    out = Path(args.out or checkpoint.parent / f"{'_'.join(words)}.json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: not writable ({error}): choose another file")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        fail(f"--out {out}: a folder, or in one that is not writable: choose another file")
    return out


def evaluation_key(recipe, args):
    """What must be the same for an evaluation to continue another's work."""
    free = ("checkpoint", "out", "workers", "knn")
    key = {name: value for name, value in vars(args).items() if name not in free}
    return key | dict(recipe=recipe, checkpoint_time=os.stat(args.checkpoint).st_mtime_ns)


@dataclass
class Examples:
    """Images as the heads get them."""

    features: dict  # {(encoder, feature): (N, D)}, such as ("trained", "cls")
    labels: torch.Tensor  # (N, T)

    def rows(self, rows):
        """Some of them. rows: indices or a slice."""
        features = {name: x[rows] for name, x in self.features.items()}
        return Examples(features, self.labels[rows])


class FeatureSource:
    """The features of a task's images, in the forms that the heads need.

    kept: indices of the training images in use, without the tenth that is held out, drawn by the
    seed. held_out, test: Examples of the images that choose the best head and that score it.
    train: Examples of all training images in use, if they are needed without augmentation."""

    def __init__(self, encoders, task, recipe, args):
        options = dict(size=encoders["trained"].options["image_size"], seed=args.seed)
        options |= dict(augment=recipe["augment"], squash=recipe["squash"])
        self.images = Images(task.train.images, **options)
        self.labels = task.train.labels
        self.augmented = recipe["augment"] != "none"
        self.batch_size = recipe["batch_size"]
        self.seed = args.seed
        self.device = next(encoders["trained"].parameters()).device
        workers = cores_of_process() if args.workers is None else args.workers
        self.encode = functools.partial(encode, encoders, workers=workers)

        used = subset(args.train_fraction, task.train.classes, args.seed)
        order = shuffled(used, args.seed)
        self.tenth = len(order) // 10
        self.kept = order[self.tenth :]
        held_out = order[: self.tenth] if self.tenth else order  # none of fewer than ten is spared
        whole = held_out if self.augmented and not args.knn else order
        self.train = self.examples(self.images, whole, self.labels)
        self.held_out = self.train.rows(slice(len(held_out)))
        test_images = Images(task.test.images, **options)
        every = torch.arange(len(task.test.labels))
        self.test = self.examples(test_images, every, task.test.labels)

    def examples(self, images, indices, labels):
        """Examples of images without augmentation. Refuses an encoder that has diverged."""
        N = len(indices)
        size = 256  # of a batch
        joined = {}
        hidden = None if rank() == 0 else True  # None: unless it is a terminal
        batches = tqdm(self.encode(images, indices, size), "features", disable=hidden)
        for found, start in zip(batches, range(0, N, size)):
            for name, x in found.items():
                if not x.isfinite().all():
                    fail("the encoder's features are not finite: the run has diverged; give "
                         "another checkpoint")  # fmt: skip
                if name not in joined:
                    joined[name] = x.new_empty(N, x.shape[1])  # once: they may fill half the memory
                joined[name][start : start + size] = x
        return Examples(joined, labels[indices].to(self.device))

    def batches(self, epoch):
        """Yield Examples of the kept images, in random order."""
        rows = shuffled(torch.arange(len(self.kept)), hash((self.seed, epoch)) % 2**63)
        if not self.augmented:
            for part in rows.split(self.batch_size):
                yield self.train.rows(self.tenth + part)
            return
        indices = self.kept[rows]
        found = self.encode(self.images, indices, self.batch_size, epoch=epoch)
        for features, part in zip(found, indices.split(self.batch_size)):
            yield Examples(features, self.labels[part].to(self.device))


def shuffled(indices, seed):
    """The indices in an order that follows from the seed alone."""
    rng = torch.Generator().manual_seed(seed)
    return indices[torch.randperm(len(indices), generator=rng)]


def make_report(heads, source, task, recipe, args):
    """What the JSON file has, in percent correct; of all heads the best are first."""
    classes = task.test.classes
    class_sizes = task.train.classes.bincount(minlength=int(classes.max()) + 1)
    trained = scores(heads, "trained", source.held_out, source.test)
    control = scores(heads, "untrained", source.held_out, source.test)
    best = trained[0]
    hits = best["hits"]
    for result in trained + control:
        del result["hits"]
    report = dict(
        task=f"{task.data} {task.target}",
        top1=best["top1"],
        untrained_top1=control[0]["top1"] if control else None,
        best=best,
        heads=trained,
        untrained_heads=control or None,
        top1_per_class=percent_per_class(hits, classes, len(class_sizes)),
        class_sizes=class_sizes.tolist(),  # training images
        checkpoint=args.checkpoint,
        recipe=task.name,
        training_images=len(source.kept),
        seed=args.seed,
        augment=recipe["augment"],
        epochs=recipe["epochs"],
        batch_size=recipe["batch_size"],
    )
    if args.knn:
        feature = ("trained", best["feature"])
        report["knn"] = knn_accuracy(
            source.train, source.test, feature, k=args.knn, num_classes=task.num_classes
        )
    return report


def scores(heads, who, held_out, test):
    """Results of the heads on the features of the encoder `who`, in percent correct, the best on
    the held-out images first. top1 is the mean over targets; hits (N, T) are the right ones among
    the test images. held_out, test: Examples."""
    results = []
    for head in heads:
        encoder, feature = head.reads
        if encoder != who:
            continue
        hits = correct(head, test)
        targets = percent(hits)
        result = dict(
            feature=feature,
            norm=head.norm_name,
            lr=head.rate,
            held_out=percent(correct(head, held_out)).mean().item(),
            top1=targets.mean().item(),
            targets=targets.tolist(),
            hits=hits,
        )
        results.append(result)
    return sorted(results, key=lambda result: -result["held_out"])


@torch.no_grad()
def correct(head, examples):
    """Whether a head predicts each label: bool (N, T)."""
    parts = examples.features[head.reads].split(2000)  # all logits at once may be gigabytes
    return torch.cat([head(x).argmax(dim=2) for x in parts]) == examples.labels


def percent(hits):
    """bool (N, T) -> (T,)."""
    return 100 * hits.sum(dim=0) / len(hits)


def percent_per_class(hits, classes, many):
    """hits (N, T), classes (N,) -> a list of so many; 0 for a class without images."""
    sums = classes.bincount(hits.float().mean(dim=1).cpu(), minlength=many)
    return (100 * sums / classes.bincount(minlength=many).clamp(min=1)).tolist()


def knn_accuracy(train, test, feature, k, num_classes):
    """Percent correct, over all targets, when the k training images nearest by cosine vote, each
    with weight exp(cosine / 0.07), as in DINO. train, test: Examples."""
    x = F.normalize(train.features[feature])
    test_x = F.normalize(test.features[feature])
    hits = []
    for part, labels in zip(test_x.split(200), test.labels.split(200)):
        cosine, index = (part @ x.T).topk(min(k, len(x)), dim=1)  # (200, k)
        weights = (cosine / 0.07).exp()[:, :, None, None]
        votes = F.one_hot(train.labels[index], num_classes) * weights  # (200, k, T, C)
        hits.append(votes.sum(dim=1).argmax(dim=2) == labels)
    return percent(torch.cat(hits)).mean().item()


def write_report(report, out):
    """Write the JSON file, and remove what would have served a restart."""
    Path(f"{out}.partial").write_text(json.dumps(report, indent=1))
    os.replace(f"{out}.partial", out)
    Path(f"{out}.heads").unlink()


def print_report(report, out):
    """Print all heads, the result, and a row for a table: checkpoint, task, top1, untrained."""
    print(f"{'feature':10}{'norm':10}{'lr':>6}{'held-out':>10}{'test':>7}")
    for head in report["heads"]:
        options = f"{head['feature']:10}{head['norm']:10}{head['lr']:>6}"
        print(f"{options}{head['held_out']:>10.1f}{head['top1']:>7.1f}")
    task = report["task"]
    top1 = f"{report['top1']:.1f}"
    targets = report["best"]["targets"]
    if len(targets) > 1:
        top1 += f" ({' '.join(f'{x:.1f}' for x in targets)})"
    control = "not evaluated"
    if report["untrained_heads"]:
        control = f"{report['untrained_top1']:.1f}"
    print(f"{task}: {top1}, untrained {control} -> {out}")
    knn = f" {report['knn']:.1f} |" if "knn" in report else ""
    print(f"| `{report['checkpoint']}` | {task} | {top1} | {control} |{knn}")


# ---- 3. Heads
def new_heads(examples, num_classes, rates):
    """A head for every feature, normalisation and rate, with random weights."""
    targets = examples.labels.shape[1]
    heads = nn.ModuleList()
    for (reads, x), norm in itertools.product(examples.features.items(), ("batch", "none")):
        heads.extend(Head(reads, norm, rate, x.shape[1], targets, num_classes) for rate in rates)
    return heads


class Head(nn.Module):
    """A linear classifier of one feature: x (B, D) -> logits (B, T, C).

    reads: the feature, such as ("trained", "cls"). norm, before the linear map: "batch", BatchNorm
    with scale and shift, or "none". rate: of learning, for a batch of 256."""

    def __init__(self, reads, norm, rate, dim, targets, classes):
        super().__init__()
        self.reads = reads
        self.norm_name = norm
        self.rate = rate
        self.shape = (targets, classes)
        self.norm = nn.BatchNorm1d(dim) if norm == "batch" else nn.Identity()
        self.linear = nn.Linear(dim, targets * classes)

    def forward(self, x):
        return self.linear(self.norm(x)).unflatten(1, self.shape)

    def groups(self, batch_size):
        """The optimiser's groups: the rate is in proportion to the batch size; scale and shift do
        not decay."""
        peak = self.rate * batch_size / 256
        options = dict(lr=peak, peak=peak)
        linear = dict(params=self.linear.parameters(), weight_decay=5e-4)
        affine = dict(params=self.norm.parameters(), weight_decay=0.0)
        return [linear | options, affine | options]


def train_heads(heads, batches, steps, recipe, file=None, key=None):
    """Train a list of heads, all at once, each as it would learn alone.

    batches(epoch) yields `steps` Examples. Saves each epoch in the file, and continues from what
    is there, if it has the same key."""
    groups = []
    for head in heads:
        groups.extend(head.groups(recipe["batch_size"]))
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    parts = dict(heads=heads, optimizer=optimizer)
    first = restore(parts, file, key) if file else 0

    heads.train()
    hidden = None if rank() == 0 else True
    total = steps * recipe["epochs"]
    bar = tqdm(total=total, initial=steps * first, desc="heads", disable=hidden)
    for epoch in range(first, recipe["epochs"]):
        factor = rate_factor(epoch, recipe["epochs"], recipe["cosine"])
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        for examples in batches(epoch):
            bar.update()
            if len(examples.labels) == 1:
                continue  # BatchNorm needs two
            loss = heads_loss(heads, examples)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if file and rank() == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | dict(epoch=epoch + 1, key=key), f"{file}.new")
            os.replace(f"{file}.new", file)  # in one step: a kill leaves no half file
    bar.close()
    heads.eval()


def restore(parts, file, key):
    """Load what process 0 finds of a stopped evaluation with the same key -> the next epoch."""
    found = [None]
    if rank() == 0 and Path(file).exists():
        found[0] = torch.load(file, map_location="cpu", weights_only=True)
    dist.broadcast_object_list(found)
    state = found[0]
    if state is None or state["key"] != key:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"]


def heads_loss(heads, examples):
    """Cross-entropy, summed over heads so that each learns as it would alone, and its mean over
    images and targets -> scalar."""
    loss = 0.0
    for head in heads:
        logits = head(examples.features[head.reads])  # (B, T, C)
        loss = loss + F.cross_entropy(logits.flatten(0, 1), examples.labels.flatten())
    return loss


def rate_factor(epoch, epochs, cosine):
    """Of the learning rate: a cosine to 0.01, which the last epoch does not reach, or a tenth after
    2/7, 4/7 and 6/7 of the epochs each."""
    if cosine:
        wave = math.cos(math.pi * epoch / epochs)
        return 0.01 + 0.99 * (1 + wave) / 2
    drops = [round(epochs * part / 7) for part in (2, 4, 6)]
    return 0.1 ** sum(epoch >= drop for drop in drops)


# ---- 4. Features
@torch.no_grad()
def encode(encoders, images, order, batch_size, epoch=None, workers=0):
    """Yield the features of images in this order, batch by batch: {(encoder, feature): (B, D)}.

    encoders: {name: network}; images: an Images; epoch: whose augmentation, None: none. Of every
    batch each process encodes its share; then all have all."""
    device = next(encoders["trained"].parameters()).device
    batches = order.split(batch_size)
    items = [(epoch, own_share(batch).tolist()) for batch in batches]
    workers = 0 if torch.is_tensor(images.images) else workers
    loader = DataLoader(images, batch_size=None, sampler=items, num_workers=workers)
    for pixels, batch in zip(loader, batches):
        pixels = pixels.to(device)
        found = {}
        for who, encoder in encoders.items():
            for name, x in features(encoder, pixels).items():
                found[who, name] = gather_rows(x.contiguous())[: len(batch)]
        yield found


def own_share(batch):
    """This process's share of a batch, a contiguous one. The last image is repeated until all
    processes have equally many."""
    many = math.ceil(len(batch) / world_size())
    rows = torch.arange(rank() * many, (rank() + 1) * many)
    return batch[rows.clamp(max=len(batch) - 1)]


def gather_rows(x):
    """Rows of this process (B, D) -> those of all processes, in their order (W * B, D)."""
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def features(encoder, images):
    """uint8 (B, 3, size, size) -> {name: (B, D)}. Of a ResNet `pooled`. Of a ViT `cls`, after the
    final norm; `cls4`, of the last four blocks, each after the final norm; `patches`, the mean of
    the patches' tokens."""
    x = images.float() / 255
    if "standardise" in encoder.options:  # SimCLR takes pixels as they are
        x = normalise(x, encoder.options["standardise"])
    if not isinstance(encoder, AnyViT):
        return dict(pooled=encoder(x))
    outputs = [encoder.norm(tokens) for tokens in encoder.tokens(x)]
    return dict(
        cls=outputs[-1][:, 0],
        cls4=torch.cat([tokens[:, 0] for tokens in outputs], dim=1),
        patches=outputs[-1][:, 1:].mean(dim=1),
    )


def normalise(image, standardise):
    """(B, 3, H, W) in [0, 1] -> the network's input, by each image's own numbers or ImageNet's."""
    if standardise:
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (deviation + 1e-3)
    # Not by TF.normalize, which waits for the GPU.
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    mean, deviation = imagenet.to(image.device, non_blocking=True).view(2, 3, 1, 1)
    return (image - mean).div_(deviation)


class Images(Dataset):
    """Item (epoch, indices): uint8 (B, 3, size, size), augmented by random numbers that follow from
    (seed, epoch, index), or whole if epoch is None.

    augment: "crop" and flip, or flip. Whole files are resized to 8/7 of size (256 for 224) and
    cropped to the centre, or squashed to a square."""

    def __init__(self, images, size, augment, squash, seed):
        self.images = images
        self.seed = seed
        steps = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
        if squash or torch.is_tensor(images):  # tensors are square
            steps = [v2.Resize((size, size))]
        self.whole = v2.Compose(steps)
        crop = v2.RandomResizedCrop(size) if augment == "crop" else self.whole
        self.augmented = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __getitem__(self, item):
        epoch, indices = item
        if epoch is None and torch.is_tensor(self.images):
            return self.whole(self.images[indices].expand(-1, 3, -1, -1))  # all at once
        return torch.stack([self.prepare(epoch, index) for index in indices])

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


# ---- 5. Encoders
def load_encoder(path, plain_pixels=False, heads=None):
    """The encoder of a checkpoint of ours or of a released file, frozen, in evaluation mode; its
    .options are the run's, its .step the number of updates, None in a released file.

    plain_pixels: a released network takes pixels in [0, 1] as they are. heads: of a released ViT,
    whose weights do not tell; None: one for 64 channels. Nothing in a file is run."""
    if not Path(path).is_file():
        fail(f"{path}: no such file; give a run's checkpoint.pt")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # beside MAE's weights
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        fail(f"{path}: damaged, or holds more than weights ({type(error).__name__}): copy it "
             "again, or give what torch.save(model.state_dict(), FILE) writes")  # fmt: skip
    try:
        released = "options" not in state
        if released:
            state = released_checkpoint(state, plain_pixels, heads)
        encoder = new_encoder(state["options"])
        encoder.load_state_dict(state["encoder"])
        encoder.step = state["step"]
    except Exception as error:  # of many kinds, if a part is missing or of another shape
        reason = " ".join(str(error).split())[:300]
        fail(f"{path}: no encoder that is built here ({type(error).__name__}: {reason}): give "
             "another")  # fmt: skip
    if released and rank() == 0:
        words = [f"{name} {value}" for name, value in encoder.options.items()]
        print(f"{path}: read as {', '.join(words)}", flush=True)
    return encoder


# Of several networks in a file the one to evaluate: the targets of MSN and DINO, moving averages.
PARTS = ("target_encoder", "teacher", "state_dict_ema", "model_ema", "model", "state_dict")
WRAPPERS = r"\b(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
MARKS = ("patch_embed.proj.weight", "layer1.0.conv1.weight")  # of a ViT, and of a ResNet
NOT_ENCODER = (
    "head", "fc.", "decoder", "lm_head", "mask_token", "n_averaged",
    "rel_pos_bias.relative_position_index",
)  # fmt: skip


def released_checkpoint(state, plain_pixels, heads):
    """A file of the official MSN, MAE, data2vec, VICReg or DINO, of timm or torchvision, in the
    form of our checkpoints. Names may begin with any prefix, such as `backbone.`."""
    for part in PARTS:
        if isinstance(state.get(part), dict):
            state = state[part]
            break
    tensors = {re.sub(WRAPPERS, "", key): x for key, x in state.items() if torch.is_tensor(x)}
    prefixes = []
    for key in tensors:
        prefixes += [key.removesuffix(mark) for mark in MARKS if key.endswith(mark)]
    if len(prefixes) != 1:
        names = ", ".join(prefixes or list(tensors)[:4])
        raise ValueError(f"{len(prefixes)} of its weights are named {' or '.join(MARKS)}, but one "
                         f"network is needed; it has {names}")  # fmt: skip
    weights = {}
    for key, x in tensors.items():
        own = key.removeprefix(prefixes[0])
        if key.startswith(prefixes[0]) and not own.startswith(NOT_ENCODER):
            own = own.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")  # timm's
            weights[own] = x
    if "conv1.weight" in weights:
        options = dict(arch="resnet50" if "layer1.0.conv3.weight" in weights else "resnet18")
        options["image_size"] = 224 if weights["conv1.weight"].shape[2] == 7 else 32
    else:
        options = vit_options(weights, heads)
        if any(key.startswith(f"{prefixes[0]}decoder") for key in tensors):
            options["script"] = "mae"
    options |= dict(seed=0, data=None)
    if not plain_pixels:
        options["standardise"] = False
    return dict(options=options, encoder=weights, step=None)


def vit_options(weights, heads):
    """The options of a ViT that has these weights. Sizes follow from shapes, but for the number of
    heads."""
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    options = dict(script="msn", dim=dim, patch_size=patch_size, depth=depth)
    table = weights.get("rel_pos_bias.relative_position_bias_table")
    if table is not None:
        grid = (math.isqrt(len(table) - 3) + 1) // 2
        options |= dict(script="data2vec", heads=table.shape[1])
    else:
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
        if dim % (heads or 64):
            raise ValueError(f"its width, {dim}, is no multiple of {heads or 64}: give its --heads")
        options["heads"] = heads or (16 if dim == 1280 else dim // 64)  # 1280: ViT-H
    if "blocks.0.gamma_1" in weights:
        options["layer_scale"] = 1e-4
    return options | dict(image_size=grid * patch_size)


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
            position_std=options.get("position_std", 0.02),
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
    positions, of deviation position_std at first. images (B, 3, H, W) -> representations (B, D):
    the cls token after the final norm."""

    def __init__(
        self,
        image_size,
        patch_size,
        dim,
        depth,
        heads,
        stem=(),
        layer_scale=None,
        relative=False,
        position_std=0.02,
    ):
        super().__init__()
        grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=patch_projection(patch_size, dim, stem)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(
            AnyBlock(dim, heads, layer_scale, relative) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.relative = relative
        if relative:
            self.rel_pos_bias = nn.Module()
            table = torch.zeros((2 * grid - 1) ** 2 + 3, heads)
            self.rel_pos_bias.relative_position_bias_table = nn.Parameter(table)
            self.register_buffer("index", bias_index(grid), persistent=False)
        else:
            self.pos_embed = nn.Parameter(position_std * torch.randn(1, 1 + grid**2, dim))

    def tokens(self, images):
        """-> outputs (B, 1 + N, D) of the last four blocks, before the final norm."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias = None
        if self.relative:
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
    """Transformer block, pre-norm, with timm's names; branches are scaled by gamma if there is a
    layer_scale; if relative, as in BEiT, keys have no bias. x (B, 1 + N, D); bias (heads, 1 + N,
    1 + N) of the logits."""

    def __init__(self, dim, heads, layer_scale, relative):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        qkv = nn.Linear(dim, 3 * dim, bias=not relative)
        self.attn = nn.ModuleDict(dict(qkv=qkv, proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        if relative:
            self.attn.q_bias = nn.Parameter(torch.zeros(dim))
            self.attn.v_bias = nn.Parameter(torch.zeros(dim))
        self.gamma_1 = 1.0
        self.gamma_2 = 1.0
        if layer_scale is not None:
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
@dataclass
class Split:
    """The training set or the test set of a task."""

    images: torch.Tensor | list  # uint8 (N, C, H, W), or N paths
    labels: torch.Tensor  # (N, T), the targets that heads learn
    classes: torch.Tensor  # (N,), by which subsets are drawn


@dataclass
class Task:
    data: str
    target: str
    name: str  # of the recipe in TASKS
    train: Split
    test: Split
    num_classes: int  # C, of each target


def open_task(data, target=None, task=None):
    """The data set with the labels of one target -> Task. Without a target that of `task`, such as
    clevr-dist, the digits of plates, or else the data set's first; without a task the data's own.
    ValueError says what is missing."""
    layout = layout_of(data)
    target = target or (task or "").partition("-")[2]
    splits = []
    for split in ("train", "val"):
        images, labels = open_images(data, layout, split)
        if not target:
            target = "digits" if "digits" in labels else next(iter(labels))
        if target not in labels:
            own = ", ".join(labels)
            raise ValueError(f"{data}: --target {target} is not among its own: choose one of {own}")
        classes = next(iter(labels.values()))
        splits.append(Split(images, labels[target].reshape(len(images), -1), classes))
    train, test = splits
    if layout == "folder":
        check_classes(data, train, test)
    if not task:
        own = [name for name in (f"{layout}-{target}", layout, data) if name in TASKS]
        task = [*own, "imagenet"][0]
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    return Task(data, target, task, train, test, num_classes)


MARKERS = dict(  # a file or folder that only this data set has, as published
    clevr="scenes",
    kitti="training/label_2",
    places205="trainvalsplit_places205",
    inat18="train2018.json",
)


def layout_of(data):
    """The name of a data set: one of MARKERS, or "folder" for any other one of files."""
    if data in IN_MEMORY:
        return data
    found = [name for name, marker in MARKERS.items() if (Path(data) / marker).exists()]
    return found[0] if found else "folder"


def check_classes(data, train, test):
    """Refuse a folder whose train and val have different classes, and so different labels."""
    names = []
    for split, part in (("train", train), ("val", test)):
        own = {}
        for path, label in zip(part.images, part.classes.tolist()):
            folder = path.removeprefix(f"{Path(data) / split}/").split("/")[0]
            own[label] = unicodedata.normalize("NFC", folder)  # Macs write letters in another form
        names.append(own.items())
    odd = sorted(names[0] ^ names[1])
    if odd:
        raise ValueError(f"{data}: val is not sorted into the classes of train: {odd[0][1]} is not "
                         "in both: make them agree")  # fmt: skip


def open_images(data, layout, split):
    """Images, uint8 (N, C, H, W) or N paths, and labels, {target: (N, ...)}, the class first."""
    readers = dict(clevr=read_clevr, kitti=read_kitti, places205=read_places205)
    if layout not in readers:
        return open_data(data, split)
    try:
        paths, labels = readers[layout](Path(data), split)
        if not paths:
            raise ValueError(f"no images of {split}")
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{data}: not {layout} as published ({reason}): unpack it anew") from None
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
    for line in text.splitlines():
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


def subset(choice, classes, seed):
    """Which of N training images to use, drawn by the seed, as sorted indices.

    choice: a share of each class, at least one image, or `N-per-class`; classes: theirs (N,)."""
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


# ---- Data
def cores_of_process():
    """Those that this job may use on this machine, shared out among its processes."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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


if __name__ == "__main__":
    main()
