"""Every table and figure of README and docs/results.md, from one command.

    python tests/reproduce.py                        all of it; stopped, it goes on where it was
    python tests/reproduce.py --table priors         one of the studies
    python tests/reproduce.py --folder EMOJI         the rows of a folder of pictures
    python tests/reproduce.py --draw                 tables and figures alone, no runs
    python tests/reproduce.py --quick --results runs/quick.jsonl       afresh, in half an hour

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

import sampler

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EVALUATE = "linear_eval.py {out}/checkpoint.pt"
# What is measured after a run: name: (command, the file it leaves in the run's folder).
MEASURES = {
    "digits": (f"{EVALUATE} --no-untrained", "linear_eval_plates_digits.json"),
    "count": (f"{EVALUATE} --no-untrained --target count", "linear_eval_plates_count.json"),
    "size": (f"{EVALUATE} --no-untrained --target size", "linear_eval_plates_size.json"),
    "digits, untrained too": (EVALUATE, "linear_eval_plates_digits.json"),
    "count, untrained too": (f"{EVALUATE} --target count", "linear_eval_plates_count.json"),
    "size, untrained too": (f"{EVALUATE} --target size", "linear_eval_plates_size.json"),
    "class": (f"{EVALUATE} --out {{out}}/class.json", "class.json"),  # whatever folder it is
    "prototypes": ("tests/prototypes.py {out}/checkpoint.pt", "prototypes.json"),
    "toy": (None, "toy.json"),  # the run itself leaves it
}
UNTRAINED = tuple(f"{target}, untrained too" for target in tables.TARGETS)
# Minutes of a run on one core with its evaluations, until results tell: for the time that is left.
MINUTES = {"simclr": 5, "vicreg": 5, "msn": 12, "pmsn": 12, "mae": 5, "data2vec": 10, "toy": 0.15}


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
def study_k(quick):
    """Each method's default command; five methods by K = 8 and 960; SimCLR and MSN by more K."""
    if quick:  # all but the slowest
        for method, k in itertools.product(("simclr", "vicreg", "msn", "mae"), (8, 960)):
            yield plates_run(tables.k_command(method, k), 0, ("digits",))
        return
    for method in tables.DEFAULTS:
        yield plates_run(tables.k_command(method, None), 0, UNTRAINED)
    for seed in range(max(tables.PAIRS.values())):
        for method, k in itertools.product(tables.METHODS, (8, 960)):
            if seed < tables.PAIRS[method]:
                yield plates_run(tables.k_command(method, k), seed, tables.TARGETS)
    for seed in range(2):
        for method, k in itertools.product(("simclr", "msn"), tables.SWEEP):
            yield plates_run(tables.k_command(method, k), seed, tables.TARGETS)


def plates_run(command, seed, measures):
    if "msn.py" in command:
        measures = (*measures, "prototypes")
    return Run(command, seed, measures)


def study_priors(quick):
    """MSN, and PMSN at two exponents, on long-tailed and on balanced plates."""
    for data, seeds in (("long-tailed", 1 if quick else 16), ("balanced", 0 if quick else 8)):
        for seed, command in itertools.product(range(seeds), tables.priors(data).values()):
            yield plates_run(command, seed, ("digits",))


def study_toy(quick):
    for seed, command in itertools.product(range(3 if quick else 12), tables.toys().values()):
        yield Run(command, seed, ("toy",))


def study_recipe(quick):
    for seed, command in itertools.product(tables.TRIED_SEEDS, tables.TRIED.values()):
        if not quick:
            yield plates_run(command, seed, ("digits",))


def study_folder():
    """A folder of pictures: SimCLR by K, MSN against PMSN."""
    for seed, command in itertools.product(range(3), tables.FOLDER.values()):
        yield Run(command, seed, ("class",))


STUDIES = dict(k=study_k, priors=study_priors, toy=study_toy, recipe=study_recipe)


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
        numbers |= read_measure(name, json.loads((there / file).read_text()), there)
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


def read_measure(name, found, there):
    """What a line of results has of a measure's JSON file; there: the run's folder."""
    name, _, _ = name.partition(",")
    if "best" not in found:
        return {name: found}
    sizes = found["class_sizes"]  # of the data as they are
    options = json.loads((there / "options.json").read_text())
    if options["data"] == "plates" and options["long_tail"]:
        sizes = sampler.long_tailed_sizes(options["long_tail"], options["seed"])
    kept = {name: found["best"] | tables.groups(found["top1_per_class"], sizes)}
    if found["untrained_heads"]:
        kept[f"{name} untrained"] = found["untrained_heads"][0]
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
    return sum(minutes) / len(minutes) if minutes else MINUTES[Path(run.command.split()[0]).stem]


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
    p.add_argument("--table", choices=STUDIES, help="one study; default: all")
    p.add_argument("--quick", action="store_true", help="a few seeds, without data2vec")
    p.add_argument("--folder", help="the pictures that docs call EMOJI, in train/ and val/")
    p.add_argument("--draw", action="store_true", help="tables and figures from what is there")
    p.add_argument("--out", type=Path, default="runs/study", help="folder of all runs")
    p.add_argument("--results", type=Path, default=DOCS / "results.jsonl",
                   help="file of all numbers; if it is another, tables are printed")  # fmt: skip
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = p.parse_args(argv)
    if args.folder:
        runs = study_folder()
    else:
        chosen = [args.table] if args.table else STUDIES
        runs = itertools.chain(*(STUDIES[name](args.quick) for name in chosen))
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
