"""Every table and figure of README and docs/results.md, from one command.

    python tests/reproduce.py                        all of it; stopped, it goes on where it was
    python tests/reproduce.py --table priors         one of the studies
    python tests/reproduce.py --folder EMOJI         the rows of a folder of pictures
    python tests/reproduce.py --draw                 tables and figures alone, no runs
    python tests/reproduce.py --quick --results runs/quick.jsonl       seed 0 alone, afresh

A run is a command that docs show, then its evaluations. Each appends a line to docs/results.jsonl:
command, commit, seed, seconds, threads, all numbers. What has a line is not run again: to see for
yourself, give another file. Tables and figures are made from that file alone, by tests/tables.py.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tables
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EVALUATE = "linear_eval.py {out}/checkpoint.pt"
# Fewer training images, in less time: for what is secondary.
QUICKLY = f"{EVALUATE} --no-untrained --train-fraction 20-per-class"
# What is measured after a run: name: (command, the file it leaves in the run's folder).
MEASURES = {
    "digits": (f"{EVALUATE} --no-untrained", "linear_eval_plates_digits.json"),
    "digits, untrained too": (EVALUATE, "linear_eval_plates_digits.json"),
    "count": (f"{QUICKLY} --target count", "linear_eval_plates_count_20-per-class.json"),
    "size": (f"{QUICKLY} --target size", "linear_eval_plates_size_20-per-class.json"),
    "number": (
        f"{QUICKLY} --target number --knn 20",
        "linear_eval_plates_number_20-per-class.json",
    ),
    "class": (f"{EVALUATE} --out {{out}}/class.json", "class.json"),  # whatever folder it is
    "prototypes": ("tests/prototypes.py {out}/checkpoint.pt", "prototypes.json"),
    "distances": ("tests/distances.py {out}/checkpoint.pt", "distances.json"),
    "toy": (None, "toy.json"),  # the run itself leaves it
}
# Minutes of a run on one core with its evaluations, until results tell: for the time that is left.
MINUTES = {"simclr": 5, "vicreg": 5, "msn": 7, "pmsn": 7, "mae": 4, "data2vec": 8, "toy": 0.15}


@dataclasses.dataclass(frozen=True)
class Run:
    """A command without seed and folder, a seed, and names of MEASURES."""

    command: str
    seed: int
    measures: tuple

    @property
    def full_command(self):
        return f"python {self.command} --seed {self.seed}"


# ---- The studies: which runs. Seeds come first, so that what is there is always paired.
def study_arms():
    """Five methods in three arms."""
    for seed in range(tables.SEEDS):
        for method, arm in itertools.product(tables.METHODS, tables.ARMS):
            yield arm_run(method, arm, seed, secondary=("count", "size", "number"))
        yield arm_run("simclr", "K = 24", seed, secondary=())


def arm_run(method, arm, seed, secondary):
    """The untrained network is the same in all arms: it is evaluated in one."""
    measures = ["digits, untrained too" if arm == "K = 960" else "digits", *secondary]
    if secondary and method in tables.WITH_PRIOR:
        measures.append("distances")
    if secondary and method == "msn":
        measures.append("prototypes")
    return Run(tables.arm_command(method, arm), seed, tuple(measures))


def study_sweep():
    for seed in range(tables.SWEEP_SEEDS):
        for method, k in itertools.product(("simclr", "msn"), tables.SWEEP):
            if k not in (8, 960):  # which are arms
                yield arm_run(method, f"K = {k}", seed, secondary=())


def study_doses():
    for seed in range(tables.DOSE_SEEDS):
        for method, (_, values) in tables.DOSES.items():
            for value, arm in itertools.product(values[1:], tables.ARMS[:2]):
                yield Run(tables.dose_command(method, value, arm), seed, ("digits",))


def study_longer():
    """The controls, trained four and five times as long."""
    for seed in range(tables.LONGER_SEEDS):
        for method, arm in itertools.product(tables.CONTROLS, tables.ARMS[:2]):
            measures = ("digits, untrained too" if arm == "K = 960" else "digits",)
            yield Run(tables.longer_command(method, arm), seed, measures)


def study_priors():
    """MSN and PMSN, on balanced and on long-tailed plates."""
    for seed in range(tables.SEEDS):
        for data, name in itertools.product(tables.DATA, tables.PRIORS):
            yield Run(tables.prior_command(name, data), seed, ("digits", "prototypes"))


def study_toy():
    for seed, command in itertools.product(range(12), tables.toys().values()):
        yield Run(command, seed, ("toy",))


def study_quick():
    """Seed 0 of the arms, the longest runs first: without data2vec, the slowest, without what is
    secondary, and without MAE's mixed arm, which the primary outcome does not read."""
    for method, arm in itertools.product(("msn", "mae", "vicreg", "simclr"), tables.ARMS):
        if (method, arm) != ("mae", "K = 8, mixed"):
            yield arm_run(method, arm, 0, secondary=())


def study_folder():
    """A folder of pictures: SimCLR in three arms."""
    for seed, command in itertools.product(range(tables.FOLDER_SEEDS), tables.FOLDER.values()):
        yield Run(command, seed, ("class",))


STUDIES = dict(
    arms=study_arms,
    sweep=study_sweep,
    doses=study_doses,
    longer=study_longer,
    priors=study_priors,
    toy=study_toy,
)


# ---- Running them
def run_folder(out, run):
    name = run.full_command.removeprefix("python ").replace("tests/", "")
    return out / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def perform(run, out, results, threads, pictures):
    """Train, evaluate, append the line. A run that was stopped continues from its checkpoint.
    pictures: the folder that stands for EMOJI in the command."""
    there = run_folder(out, run)
    there.mkdir(parents=True, exist_ok=True)
    continues = (there / "checkpoint.pt").exists()
    start = time.time()
    script, *options = [pictures if word == "EMOJI" else word for word in run.command.split()]
    target = there / "toy.json" if run.measures == ("toy",) else there
    call(script, *options, "--seed", run.seed, "--out", target, log=there, threads=threads)
    trained = time.time()
    numbers = {}
    for name in run.measures:
        command, file = MEASURES[name]
        if command and not (there / file).exists():
            call(*command.format(out=there).split(), log=there, threads=threads)
        numbers |= read_measure(name, json.loads((there / file).read_text()))
    line = dict(
        command=run.full_command,
        seed=run.seed,
        commit=git("rev-parse", "--short", "HEAD"),
        seconds=round(trained - start, 1),
        seconds_evaluating=round(time.time() - trained, 1),
        continued=continues,
        threads=threads,
        cores=os.cpu_count(),
        torch=torch.__version__,
    )
    log = there / "log.jsonl"
    if log.exists():
        line["last_log_line"] = json.loads(log.read_text().splitlines()[-1])
    append(results, line | numbers)


def is_done(run, lines):
    """Whether a line has all of its measures."""
    needed = {name.replace(", untrained too", " untrained") for name in run.measures}
    return any(line["command"] == run.full_command and needed <= line.keys() for line in lines)


def call(script, *options, log, threads):
    """Run a script of the repository; what it prints is added to output.txt."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (log / "output.txt").open("a") as output:
        subprocess.run(command, check=True, env=environment, stdout=output, stderr=output)


def read_measure(name, found):
    """What a line of results has of a measure's JSON file."""
    name, _, _ = name.partition(",")
    if "best" not in found:
        return {name: found}
    features = {}
    for head in found["heads"]:  # the best on held-out images is first
        features.setdefault(head["feature"], head["top1"])
    kept = {name: found["best"] | dict(features=features)}
    if found["untrained_heads"]:
        kept[f"{name} untrained"] = found["untrained_heads"][0]
    if "knn" in found:
        kept["neighbours"] = dict(top1=found["knn"])
    return kept


APPENDING = threading.Lock()


def append(results, line):
    results.touch()
    with APPENDING, results.open("r+b") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):  # a kill has cut the last line
            file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def expected_minutes(run, known):
    """Of the same command with another seed, else of the script."""
    minutes = [
        (line["seconds"] + line["seconds_evaluating"]) / 60
        for line in known
        if line["command"].startswith(f"python {run.command} --seed") and not line["continued"]
    ]
    script = run.command.removeprefix("tests/mixed.py ").split()[0]
    return sum(minutes) / len(minutes) if minutes else MINUTES[Path(script).stem]


def perform_all(runs, out, results, jobs, pictures):
    """Those without a line in the results, `jobs` side by side, one thread each or more; returns
    how many failed."""
    known = tables.read_results(results)
    runs = list({run.full_command: run for run in runs}.values())  # studies share some
    left = [run for run in runs if not is_done(run, known)]
    minutes = {run: expected_minutes(run, known) for run in left}
    threads = max(os.cpu_count() // jobs, 1)
    failed = 0
    shape = "{desc}{percentage:.0f}% |{bar}| {elapsed}, left {remaining}"
    with (
        tqdm(total=sum(minutes.values()), bar_format=shape) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        pending = {pool.submit(perform, run, out, results, threads, pictures): run for run in left}
        bar.set_description(f"{len(left)} of {len(runs)} runs")
        try:
            for future in as_completed(pending):
                run = pending[future]
                error = future.exception()
                failed += error is not None
                bar.write(f"{run.full_command}: {error or 'done'}")
                bar.update(minutes[run])
        except BaseException:  # Ctrl-C stops the present runs too, which save
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument("--table", choices=STUDIES, help="one study; default: all")
    which.add_argument("--quick", action="store_true",
                       help="seed 0 of the arms, without data2vec and MAE's mixed arm")  # fmt: skip
    which.add_argument("--folder", help="the pictures that docs call EMOJI, in train/ and val/")
    p.add_argument("--draw", action="store_true", help="tables and figures from what is there")
    p.add_argument("--out", type=Path, default="runs/study", help="folder of all runs")
    p.add_argument("--results", type=Path, default=DOCS / "results.jsonl",
                   help="file of all numbers; if it is another, tables are printed")  # fmt: skip
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = p.parse_args(argv)
    if args.folder:
        runs = study_folder()
    elif args.quick:
        runs = study_quick()
    else:
        chosen = [args.table] if args.table else STUDIES
        runs = itertools.chain(*(STUDIES[name]() for name in chosen))
    failed = 0
    if not args.draw:
        failed = perform_all(runs, args.out, args.results, args.jobs, args.folder)
    lines = tables.read_results(args.results)
    if args.results == DOCS / "results.jsonl":
        tables.make_all(lines)
    else:
        for table in tables.TABLES.values():
            print(table(tables.Results(lines)), end="\n\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
