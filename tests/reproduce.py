"""README's two tables on priors: MSN's uniform one against PMSN's power laws.

    python tests/reproduce.py --out runs/priors --jobs 2
    python tests/reproduce.py --table toy --out runs/toy --jobs 2

trains and evaluates every run whose result is not there yet (stopped, it goes on where it was), one
thread each, and prints the table, of means over seeds and standard errors.

priors: long-tailed and balanced plates. Per cent right of each digit (first middle last) on all
test images, on the tenth of the classes seen most and the rarer half.

toy: numbers a b b, of which a is balanced and b follows a power law; as many prototypes as a has
values, and b. Which of them do prototypes hold under which prior, and which the encoder?
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import linear_eval
import msn
import pmsn

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

FIRST = LAST = 0, 1, 2, 3  # digits a and b of the toy, b from the most frequent on
TAIL = 1.5  # b is its k-th digit with a share proportional to k**-TAIL
TOY = "--num-prototypes 4 --rand-views 1 --rand-crop 0.85 1 --patch-drop 0".split()
TOY += "--epochs 16 --warmup 2".split()  # 832 steps of 128 images
TOY_METHODS = {"MSN": [msn]}
TOY_METHODS |= {f"PMSN {e}": [pmsn, "--exponent", e] for e in ("0.75", "1.5")}


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


def draw_toy(seeds, exponent=0.0):
    """Plates of the numbers a b b: in each of len(seeds) drawings 50 k**-exponent of each number
    whose b is the k-th of LAST -> images (N, 1, 32, 32) uint8, labels, as msn.draw_plates."""
    parts = []
    for seed in seeds:
        images, labels = msn.draw_plates(50, seed)
        for a, (k, b) in itertools.product(FIRST, enumerate(LAST, 1)):
            chosen = (labels["number"] == 100 * a + 11 * b).nonzero()[: round(50 * k**-exponent), 0]
            parts.append((images[chosen], {name: x[chosen] for name, x in labels.items()}))
    images, labels = zip(*parts)
    return torch.cat(images), {name: torch.cat([x[name] for x in labels]) for name in labels[0]}


def told(prototype, digit):
    """Per cent of the entropy of N digits that their images' prototypes tell: mutual information
    of two arrays (N,) of integers, by the second's entropy."""
    joint = np.zeros((prototype.max() + 1, digit.max() + 1))
    np.add.at(joint, (prototype, digit), 1 / len(digit))
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    return 100 * (entropy(rows) + entropy(columns) - entropy(joint)) / entropy(columns)


@torch.no_grad()
def nearest_prototypes(path, images):
    """The most likely prototype of N whole images (N, 1, H, W) by a checkpoint's target: (N,)."""
    state = torch.load(path, weights_only=True)
    options = state["options"]

    def pick(names):
        return {name: options[name] for name in names.split()}

    encoder = msn.VisionTransformer(**pick("image_size patch_size dim depth heads stem"))
    network = msn.MSN(encoder, **pick("dim hidden output num_prototypes"))
    network.load_state_dict(state["target"])
    pixels = images.expand(-1, 3, -1, -1).float() / 255
    z, prototypes = network.eval()([msn.normalise(pixels, options["standardise"])])
    return msn.log_assignment(z, prototypes, options["temperature"]).argmax(dim=1).numpy()


def run_toy(out, method, seed):
    """Train and evaluate, unless the result is there. In a process of its own: the scripts' plates
    are replaced by the toy's, a long-tailed set to train on, balanced ones to evaluate with."""
    there = folder(out, "toy", method, seed)
    if (there / RESULT).exists():
        return
    there.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    script, *options = TOY_METHODS[method]
    tail, train, test = torch.load(out / "plates.pt")
    script.draw_plates = lambda *_, **__: tail
    linear_eval.draw_plates = lambda per_class, seed: (train, test)[seed]
    with (
        (there / "output.txt").open("a") as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        script.main([*TOY, *options, "--seed", str(seed), "--out", str(there)])
        prototype = nearest_prototypes(there / "checkpoint.pt", test[0])
        digits = test[1]["digits"].numpy()
        told_of = [told(prototype, digits[:, i]) for i in (0, 2)]
        (there / "prototypes.json").write_text(json.dumps(told_of))
        linear_eval.main([str(there / "checkpoint.pt")])


def toy_table(out):
    """Markdown rows of what is there, and of encoders before training."""
    lines = ["| prior | seeds | prototypes: a, b | encoder, cls: a, b | encoder, best: a, b |"]
    lines.append("|---|---|---|---|---|")
    rows, untrained = {}, {}  # (seeds, 3, 2)

    def linear(heads):
        cls = next(head for head in heads if head["feature"] == "cls")
        return [cls["targets"][::2], heads[0]["targets"][::2]]

    for method, seed in itertools.product(TOY_METHODS, SEEDS):
        there = folder(out, "toy", method, seed)
        if not (there / RESULT).exists():
            continue
        result = json.loads((there / RESULT).read_text())
        held = json.loads((there / "prototypes.json").read_text())
        rows.setdefault(method, []).append([held, *linear(result["heads"])])
        untrained[seed] = [[np.nan, np.nan], *linear(result["untrained_heads"])]
    if untrained:
        rows["untrained"] = list(untrained.values())
    for method, found in rows.items():
        found = np.array(found)
        mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / len(found) ** 0.5
        cells = [
            ", ".join(f"{m:.1f} ± {e:.1f}" for m, e in zip(*pair)) for pair in zip(mean, error)
        ]
        lines.append(f"| {method} | {len(found)} | {' | '.join(cells)} |".replace("nan ± nan", "-"))
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
        return
    if not (out / "plates.pt").exists():
        out.mkdir(parents=True, exist_ok=True)
        sets = draw_toy(range(2, 22), TAIL), draw_toy(range(22, 26)), draw_toy(range(26, 28))
        torch.save(sets, out / "plates.partial")
        os.replace(out / "plates.partial", out / "plates.pt")
    runs = [(m, s) for s, m in itertools.product(SEEDS, TOY_METHODS)]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context) as pool:
        list(pool.map(run_toy, *zip(*[(out, *x) for x in runs])))
    print(toy_table(out))


if __name__ == "__main__":
    main()
