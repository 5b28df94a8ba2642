"""README's two tables on priors: MSN's uniform one against PMSN's power laws.

    python tests/reproduce.py --out runs/priors --jobs 2
    python tests/reproduce.py --table toy --out runs/toy --jobs 2

trains and evaluates every run whose result is not there yet (stopped, it goes on where it was), one
thread each, and prints the table, of means over seeds and standard errors.

priors: long-tailed and balanced plates. Per cent right of each digit (first middle last) on all
test images, on the tenth of the classes seen most and the rarer half.

toy: plates a 0 b, of which a is balanced and b follows a power law, and as many prototypes as a has
values, and b. Which of the two do prototypes tell, and under which prior? Both views have the same
number; in some forms it is drawn anew, so that nothing else is common to them.
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import msn
import pmsn
from sampler import power_law_prior

ROOT = Path(msn.__file__).parent
# About 780 steps of 128 images on either, the warm-up a quarter of them.
DATA = {
    "long-tailed": "--long-tail 1 --epochs 86 --warmup 20".split(),
    "balanced": "--epochs 2 --warmup 0.5".split(),
}
METHODS = {"MSN": ["msn.py"]}
METHODS |= {f"PMSN {e}": ["pmsn.py", "--exponent", e] for e in ("0.25", "0.5", "1.0")}
SEEDS = 0, 1, 2
RESULT = "linear_eval_plates_digits.json"

TAIL = 2.0  # the toy's last digit has its k-th value with a share proportional to k**-TAIL
PRIORS = {"uniform": 0.0, "matching": TAIL}
TOY_SEEDS = range(12)
FORMS = {
    "two values, views of two drawings": dict(values=(2, 4), drawings=True),
    "two values, views of one drawing": dict(values=(2, 4), drawings=False),
    "four values, views of two drawings": dict(values=(1, 2, 4, 7), drawings=True),
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
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    return 100 * (entropy(rows) + entropy(columns) - entropy(joint)) / entropy(columns)


class Pixels(nn.Module):
    """In place of an encoder: images (B, 1, 32, 32) -> (B, 1024)."""

    def forward(self, images, keep=None):
        return images.flatten(1)


@functools.cache
def toy_plates(seeds):
    """Plates a 0 b of some drawings: standardised images (N, 1, 32, 32), a and b (N,) each."""
    drawn = [msn.draw_plates(50, seed) for seed in seeds]
    images, digits = (torch.cat(x) for x in zip(*[(x, labels["digits"]) for x, labels in drawn]))
    chosen = digits[:, 1] == 0
    pixels = msn.normalise(images[chosen].float() / 255, standardise=True)
    return pixels, digits[chosen, 0], digits[chosen, 2]


def toy(exponent, seed, values, drawings, steps=500):
    """MSN's projector and prototypes learn on pixels alone, by pmsn.py's own step; exponent: of the
    prior, 0: MSN's. -> what prototypes tell of a and of b (per cent), on balanced new pictures; the
    mean loss of the last tenth of the steps."""
    rng, K = torch.Generator().manual_seed(seed), len(values)
    torch.manual_seed(seed)
    images, *digits = toy_plates((2, 3, 4, 5, 6, 7))
    a, b = ([(x == v) for v in values] for x in digits)
    cells = torch.stack([(a[i] & b[j]).nonzero()[:, 0] for i in range(K) for j in range(K)])
    model = msn.MSN(Pixels(), dim=1024, hidden=256, output=32, num_prototypes=K)
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(msn.parameter_groups(model))
    prior, tail = power_law_prior(K, exponent), power_law_prior(K, TAIL)
    losses = []
    for step in range(steps):
        cell = torch.randint(K, (128,), generator=rng) * K  # a is balanced
        cell += torch.multinomial(tail, 128, replacement=True, generator=rng)  # b is not
        which, views = torch.randint(cells.shape[1], (2, 128), generator=rng), []
        for number in which if drawings else which[:1].expand(2, -1):
            polarity = torch.randint(2, (128, 1, 1, 1), generator=rng) * 2 - 1
            noise = 0.1 * torch.randn(128, 1, 32, 32, generator=rng)
            views.append(polarity * images[cells[cell, number]] + noise)
        options = dict(lr=3e-3 * min(1, (step + 1) / 50), weight_decay=0.05, ema=0.99, clip=3.0)
        options |= dict(temperature=0.1, sharpen=0.25, prior=prior, prior_weight=1.0, sinkhorn=True)
        terms, *_ = pmsn.pmsn_step(model, target, optimizer, views, None, **options)
        losses.append(terms[1])
    images, *digits = toy_plates((8, 9))
    a, b = (torch.stack([x == v for v in values]) for x in digits)
    kept = a.any(dim=0) & b.any(dim=0)
    with torch.no_grad():
        z, prototypes = target.eval()([images[kept]])
    prototype = msn.log_assignment(z, prototypes, 0.1).argmax(dim=1).numpy()
    held = [told(prototype, x[:, kept].int().argmax(dim=0).numpy()) for x in (a, b)]
    return *held, torch.stack(losses[-steps // 10 :]).mean().item()


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
