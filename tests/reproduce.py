"""README's table of priors: MSN against PMSN on long-tailed and on balanced plates.

    python tests/reproduce.py --out runs/priors --jobs 2

trains and evaluates every run whose result is not there yet (stopped, it goes on where it was), one
thread each, and prints the table: per cent right of each digit (first middle last), mean over seeds
and standard error, on all test images, on the tenth of the classes seen most and the rarer half.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# About 780 steps of 128 images on either, the warm-up a quarter of them.
DATA = {
    "long-tailed": "--long-tail 1 --epochs 86 --warmup 20".split(),
    "balanced": "--epochs 2 --warmup 0.5".split(),
}
METHODS = {"MSN": ["msn.py"]}
METHODS |= {f"PMSN {e}": ["pmsn.py", "--exponent", e] for e in ("0.25", "0.5", "1.0")}
SEEDS = 0, 1, 2
RESULT = "linear_eval_plates_digits.json"


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


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs/priors"), help="folder of all runs")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = p.parse_args(argv)
    runs = [(d, m, s) for d, s, m in itertools.product(DATA, SEEDS, METHODS)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda x: run(args.out, *x), runs))
    print(table(args.out))


if __name__ == "__main__":
    main()
