"""Helpers of the tests of runs: tiny networks of all six scripts, processes, comparisons."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp

import data2vec
import mae
import msn
import pmsn
import sampler
import simclr
import vicreg

ROOT = Path(msn.__file__).parent
SCRIPTS = {script.__name__: script for script in (simclr, vicreg, msn, pmsn, mae, data2vec)}
CONVOLUTIONAL = [simclr, vicreg]
SIAMESE = [msn, pmsn]

HEAD = "--hidden 16 --output 8 --batch-size 32".split()
VIT = "--dim 16 --depth 1 --heads 2".split()
TINY = {
    simclr: ["--arch", "small", *HEAD],
    vicreg: ["--arch", "small", *HEAD],
    msn: [*VIT, *"--rand-views 2 --num-prototypes 16 --stem 8 8 8".split(), *HEAD],
    pmsn: [*VIT, *"--rand-views 2 --num-prototypes 16 --stem 8 8 8".split(), *HEAD],
    mae: [*VIT, *"--decoder-dim 8 --decoder-heads 1 --patch-size 8 --batch-size 32".split()],
    data2vec: "--dim 16 --depth 2 --heads 2 --top-k 1 --patch-size 8 --num-masked 9 --min-block 2 "
    "--batch-size 32".split(),
}
NETWORK = {script: name for name, script in SCRIPTS.items()}
NETWORK |= {pmsn: "msn", data2vec: "anchor"}
PARTS = {script: {NETWORK[script], "encoder", "optimizer"} for script in SCRIPTS.values()}
for script in (msn, pmsn, data2vec):
    PARTS[script].add("target")
RATES = {script: ["lr"] for script in SCRIPTS.values()} | {data2vec: ["lr", "ema"]}
TERMS = {
    simclr: ["loss", "embedding_std"],
    vicreg: ["loss", "invariance", "variance", "covariance"],
    mae: ["loss", "gradient_norm"],
    data2vec: ["loss", "target_std", "gradient_norm"],
}
for script, divergence in ((msn, "me_max"), (pmsn, "kl")):
    RATES[script] = ["lr", "weight_decay", "ema"]
    TERMS[script] = ["loss", "cross_entropy", divergence, "entropy", "information"]
    TERMS[script] += ["gradient_norm", "usage", "prior"]
LR = {script: "--lr" if script in (*SIAMESE, data2vec) else "--base-lr" for script in TINY}

each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def command_line(script, out, *options):
    return [*TINY[script], "--out", str(out), *map(str, options)]


def run(script, out, *options):
    """A run in this process -> its checkpoint and log."""
    script.main(command_line(script, out, *options))
    return results(out)


def results(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    state = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    return state, [json.loads(line) for line in lines]


def steps_of(log):
    return [line["step"] for line in log]


def saved_step(out):
    path = out / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def start(script, out, *options):
    """The command line of a script, in a process and a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-B", script.__file__, *command_line(script, out, *options)],
        cwd=Path(out).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fork(script, out, *options, output, signals=None):
    """The same as `start` in a tenth of a second: a process that has imported everything. What it
    prints goes to the files OUTPUT.stdout and OUTPUT.stderr."""
    options = command_line(script, out, *options)
    loaders = mp.get_start_method()
    arguments = (script.__name__, str(output), options, signals or {}, loaders)
    process = mp.get_context("forkserver").Process(target=work_alone, args=arguments)
    process.start()
    return process


def work_alone(name, output, options, signals, loaders):
    """loaders: how loader processes start. signals: see signals_in."""
    os.setsid()
    mp.set_start_method(loaders, force=True)  # else as this process did
    for number, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv = [f"{name}.py"]
    torch.set_num_threads(1)
    status = 0
    with two_of_each_class(), signals_in(SCRIPTS[name], signals):
        try:
            SCRIPTS[name].main(options)
        except SystemExit as stopped:
            status = stopped.code
    sys.exit(status)  # not within the handler, whose exception keeps loader processes alive


def fork_group(work, folder, processes):
    """Run work(rank, folder) in so many processes, and wait for them, but not for ever."""
    group = mp.start_processes(
        work, (folder,), nprocs=processes, join=False, start_method="forkserver"
    )
    deadline = time.time() + 400
    while not group.join(timeout=10):
        if time.time() > deadline:
            for process in group.processes:
                process.kill()
            pytest.fail(f"{work.__name__} hangs")


def two_of_each_class():
    draw = functools.partial(sampler.draw_plates, 2)
    return mock.patch.object(sampler, "draw_plates", lambda per_class, seed: draw(seed))


@contextlib.contextmanager
def signals_in(script, signals):
    """signals: {step, from 1: the signals that this process gets while it makes this update}."""
    schedule = script.schedule

    def spied(step, *rest):
        for number in signals.get(step + 1, ()):
            os.kill(os.getpid(), number)
            time.sleep(1.1 if len(signals[step + 1]) > 1 else 0)  # sooner it would be an echo
        return schedule(step, *rest)

    with mock.patch.object(script, "schedule", spied):
        yield


def leaves(tree, name=""):
    """All that is in nested dicts and lists, by its path."""
    if not isinstance(tree, (dict, list, tuple)):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: x for key, value in items for path, x in leaves(value, f"{name}/{key}").items()}


def assert_same_state(mine, theirs):
    """Bit by bit, in all parts of a checkpoint."""
    ours = leaves(mine)
    others = leaves(theirs)
    assert ours.keys() == others.keys() and len(ours) > 50
    for name, value in ours.items():
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name


def without_times(line):
    return line | dict(images_per_second=0)


def assert_same_log(mine, theirs):
    for line, other in zip(mine, theirs, strict=True):
        assert without_times(line) == without_times(other)


def assert_same_log_but_for_restarts(log, whole, restarts):
    """Its steps ascend, and all lines but those that a restart cut short are as undisturbed."""
    steps = [0, *steps_of(log)]
    assert steps == sorted(set(steps))
    expected = dict(zip(steps_of(whole), whole))
    before = dict(zip(steps_of(whole), [0, *steps_of(whole)]))
    same = 0
    for previous, line in zip(steps, log):
        cut = any(previous < step < line["step"] for step in restarts)
        if line["step"] in expected and before[line["step"]] == previous and not cut:
            assert without_times(line) == without_times(expected[line["step"]])
            same += 1
    assert expected.keys() <= set(steps)
    assert same >= len(whole) - 2 * len(restarts)


def hashes(out):
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_complaint(errors, words):
    """One line, that of the error; progress bars apart."""
    bar = r"\s*\d+%\|.*\d+/\d+ \[[^\]]*\]\s*"
    lines = [line for line in re.split(r"[\r\n]+", errors) if line.strip()]
    lines = [line for line in lines if not re.fullmatch(bar, line)]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert re.match(r"[\w.-]+: error: ", lines[0]), lines[0]  # not at the end of a progress bar
    for word in words:
        assert str(word) in lines[0], f"{word} not in {lines[0]}"


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    def isatty(self):
        return True
