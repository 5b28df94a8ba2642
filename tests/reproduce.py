"""README's two tables on priors: MSN's uniform one against PMSN's power laws.

    python tests/reproduce.py --out runs/priors --jobs 2
    python tests/reproduce.py --table toy --out runs/toy --jobs 2

trains and evaluates every run whose result is not there yet (stopped, it goes on where it was), one
thread each, and prints the table, of means over seeds and standard errors.

priors: long-tailed and balanced plates. Per cent right of each digit (first middle last) on all
test images, on the tenth of the classes seen most and the rarer half.

toy: numbers a 0 b, two values each, of which a is balanced and b follows a power law, and two
prototypes. Which of the two digits do prototypes tell, and under which prior? Both digits are given
as codes, so equally easy; or the numbers are plates, and a view's pair another drawing or the same.
"""

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import msn
import pmsn
import sampler

ROOT = Path(msn.__file__).parent
# About 780 steps of 128 images on either, the warm-up a quarter of them.
DATA = {
    "long-tailed": ["--long-tail", "1", "--epochs", "86", "--warmup", "20"],
    "balanced": ["--epochs", "2", "--warmup", "0.5"],
}
METHODS = {"MSN": ["msn.py"]}
for exponent in ("0.25", "0.5", "1.0"):
    METHODS[f"PMSN {exponent}"] = ["pmsn.py", "--exponent", exponent]
SEEDS = (0, 1, 2)
RESULT = "linear_eval_plates_digits.json"

VALUES = (2, 4)  # of the toy's digits
TAIL = 2.0  # b's k-th value has a share proportional to k**-TAIL
PRIORS = {"uniform": 0.0, "matching": TAIL}
TOY_SEEDS = range(12)
TRAINING = (2, 3, 4, 5, 6, 7)  # seeds of the toy's plates
TEST = (8, 9)
DRAWINGS = 50  # of each number, by each seed
PLATES = dict(hidden=256, output=32, lr=3e-3, noise=0.1)
CODES = dict(hidden=64, output=16, lr=1e-2, codes=True)
FORMS = {
    "codes, noise 0.5": CODES | dict(noise=0.5),
    "codes, noise 0.3": CODES | dict(noise=0.3),
    "plates, views of two drawings": PLATES,
    "plates, views of one drawing": PLATES | dict(drawings=False),
}


def folder(out, data, method, seed):
    return out / f"{data} {method} {seed}".replace(" ", "_")


def run(out, data, method, seed):
    """Train and evaluate, unless the result is there."""
    there = folder(out, data, method, seed)
    if (there / RESULT).exists():
        return
    there.mkdir(parents=True, exist_ok=True)
    train = [*METHODS[method], *DATA[data], "--seed", str(seed), "--out", str(there)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in (train, ["linear_eval.py", str(there / "checkpoint.pt")]):
        command = [sys.executable, str(ROOT / command[0]), *command[1:]]
        with (there / "output.txt").open("a") as output:
            subprocess.run(command, check=True, env=environment, stdout=output, stderr=output)


def table(out):
    """Markdown rows of what is there."""
    lines = ["| training set | method | seeds | all classes | most frequent 10% | rarest 50% |"]
    lines.append("|---|---|---|---|---|---|")
    for data, method in itertools.product(DATA, METHODS):
        paths = [folder(out, data, method, seed) / RESULT for seed in SEEDS]
        found = [json.loads(path.read_text())["best"] for path in paths if path.exists()]
        if found:
            cells = []
            for group in ("targets", "frequent", "rare"):
                digits = np.array([best[group] for best in found])  # (seeds, 3)
                mean = digits.mean(axis=1)
                error = mean.std(ddof=1) / len(mean) ** 0.5 if len(mean) > 1 else np.nan
                each = " ".join(f"{x:.1f}" for x in digits.mean(axis=0))
                cells.append(f"{mean.mean():.1f} ± {error:.1f} ({each})")
            lines.append(f"| {data} | {method} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told(prototype, digit):
    """Per cent of the entropy of N digits that their images' prototypes tell: mutual information
    of two arrays (N,) of integers, by the second's entropy."""
    joint = np.zeros((prototype.max() + 1, digit.max() + 1))
    np.add.at(joint, (prototype, digit), 1 / len(digit))
    rows = joint.sum(axis=1)
    columns = joint.sum(axis=0)

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    return 100 * (entropy(rows) + entropy(columns) - entropy(joint)) / entropy(columns)


class NoEncoder(nn.Module):
    """images (B, ...) -> (B, D): projector and prototypes learn on the numbers of the images."""

    def forward(self, images, keep=None):
        return images.flatten(1)


@functools.cache
def toy_plates(drawings, seed):
    """Plates a 0 b: standardised images (N, 1, 32, 32), a and b (N,) each, N = 100 drawings."""
    images, labels = sampler.draw_plates(drawings, seed)
    chosen = labels["digits"][:, 1] == 0
    digits = labels["digits"][chosen]
    images = msn.normalise(images[chosen].float() / 255, standardise=True)
    return images, digits[:, 0], digits[:, 2]


def toy_data(seeds, codes):
    """Plates whose a and b are of VALUES: images, or codes (N, 4), one-hot for a, then for b; which
    values they have, (N,) each, and N for each of the four numbers."""
    values = torch.tensor(VALUES)
    kept = []
    for seed in seeds:
        images, a, b = toy_plates(DRAWINGS, seed)
        chosen = torch.isin(a, values) & torch.isin(b, values)
        kept.append([images[chosen], a[chosen], b[chosen]])
    images, a, b = (torch.cat(parts) for parts in zip(*kept))
    a = (a == VALUES[1]).long()
    b = (b == VALUES[1]).long()
    if codes:
        images = torch.cat([F.one_hot(a), F.one_hot(b)], dim=1).float()
    cells = torch.stack([(2 * a + b == cell).nonzero()[:, 0] for cell in range(4)])
    return images, a, b, cells


def toy(exponent, seed, hidden, output, lr, noise, codes=False, drawings=True, steps=500):
    """MSN's projector and two prototypes learn by pmsn.py's own step; exponent: of the prior, 0:
    MSN's. -> what prototypes tell of a and of b, per cent, on balanced new data; the mean loss of
    the last tenth of the steps. drawings: whether the two views are of two drawings of a number."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    images, _, _, cells = toy_data(TRAINING, codes)
    model = msn.MSN(NoEncoder(), images[0].numel(), hidden, output, num_prototypes=2)
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(msn.parameter_groups(model))
    prior = sampler.power_law_prior(2, exponent)
    tail = sampler.power_law_prior(2, TAIL)
    rates = dict(lr=lr, weight_decay=0.01, ema=0.99)
    args = types.SimpleNamespace(
        bf16=False, temperature=0.1, sharpen=0.25, prior_weight=1.0, sinkhorn=True, clip=3.0
    )
    losses = []
    for _ in range(steps):
        cell = 2 * torch.randint(2, (128,), generator=rng)  # a is balanced
        cell += torch.multinomial(tail, 128, replacement=True, generator=rng)  # b is not
        which = torch.randint(cells.shape[1], (2, 128), generator=rng)
        views = []
        for number in which if drawings else which[:1].expand(2, -1):
            view = images[cells[cell, number]]
            if not codes:  # light on dark or dark on light
                view = view * (torch.randint(2, (128, 1, 1, 1), generator=rng) * 2 - 1)
            views.append(view + noise * torch.randn(view.shape, generator=rng))
        target_view, anchor_view = views
        metrics, _ = pmsn.pmsn_step(
            model, target, optimizer, target_view, [anchor_view], None, prior, rates, args
        )
        losses.append(metrics["loss"].detach())
    images, a, b, _ = toy_data(TEST, codes)
    with torch.no_grad():
        z, prototypes = target.eval()([images])
    prototype = msn.log_assignment(z, prototypes, 0.1).argmax(dim=1).numpy()
    of_a, of_b = (max(told(prototype, digit.numpy()), 0.0) for digit in (a, b))
    return of_a, of_b, torch.stack(losses[-steps // 10 :]).mean().item()


def toy_path(out, form, exponent, seed):
    return Path(f"{folder(out, form, exponent, seed)}.json")


def toy_run(job):
    """A run of the toy (out, form, exponent, seed), unless its result is there."""
    out, form, exponent, seed = job
    path = toy_path(*job)
    if not path.exists():
        torch.set_num_threads(1)
        result = json.dumps(toy(exponent, seed, **FORMS[form]))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{path}.partial")
        partial.write_text(result)
        os.replace(partial, path)


def toy_table(out):
    """Markdown rows of what is there."""
    lines = ["| form | prior | seeds | of a | of b | run of the lowest loss: a, b |"]
    lines.append("|---|---|---|---|---|---|")
    for form, (prior, exponent) in itertools.product(FORMS, PRIORS.items()):
        paths = [toy_path(out, form, exponent, seed) for seed in TOY_SEEDS]
        found = np.array([json.loads(path.read_text()) for path in paths if path.exists()])
        if len(found) > 1:
            mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / len(found) ** 0.5
            cells = [f"{m:.0f} ± {e:.0f}" for m, e in zip(mean[:2], error[:2])]
            best = ", ".join(f"{x:.0f}" for x in found[found[:, 2].argmin(), :2])
            lines.append(f"| {form} | {prior} | {len(found)} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--table", choices=("priors", "toy"), default="priors")
    p.add_argument("--out", type=Path, help="folder of all runs (default: runs/TABLE)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = p.parse_args(argv)
    out = args.out or Path("runs") / args.table
    if args.table == "priors":
        runs = [(d, m, s) for d, s, m in itertools.product(DATA, SEEDS, METHODS)]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda x: run(out, *x), runs))
        print(table(out))
    else:
        runs = list(itertools.product([out], FORMS, PRIORS.values(), TOY_SEEDS))
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(toy_run, runs))
        print(toy_table(out))


if __name__ == "__main__":
    main()
