"""Helpers of the tests of runs: tiny networks of all six scripts, processes, comparisons."""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
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
NETWORK = {script: name for name, script in SCRIPTS.items()} | {pmsn: "msn", data2vec: "anchor"}

HEAD = "--hidden 16 --output 8 --batch-size 32".split()
VIT = "--dim 16 --depth 1 --heads 2".split()
MSN = [*VIT, *"--rand-views 2 --num-prototypes 16 --stem 8 8 8 8 8".split(), *HEAD]
TINY = {
    simclr: ["--arch", "small", *HEAD],
    vicreg: ["--arch", "small", *HEAD],
    msn: MSN,
    pmsn: MSN,
    mae: [*VIT, *"--decoder-dim 8 --decoder-heads 1 --patch-size 8 --batch-size 32".split()],
    data2vec: "--dim 16 --depth 2 --heads 2 --top-k 1 --patch-size 8 --num-masked 9 --min-block 2 "
    "--batch-size 32".split(),
}
# On the sixty pictures of conftest.py: three epochs of three updates, each of which is logged.
ON_PICTURES = "--recipe plates --batch-size 20 --epochs 3 --log-every 1 --workers 0".split()
OFTEN = "--save-minutes", 1e-9  # after every update

each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


# ---- Runs in this process


def command_line(script, out, *options):
    return [*TINY[script], "--out", str(out), *map(str, options)]


def on_pictures(script, data, out, *options):
    """The command line of a run on a folder, with loader processes' data type and focal views."""
    views = ["--focal-views", "1"] if script in SIAMESE else []
    return command_line(script, out, *ON_PICTURES, *views, "--data", data, *options)


def run(script, out, *options):
    """A run in this process -> its checkpoint and log."""
    script.main(command_line(script, out, *options))
    return results(out)


def results(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    state = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    return state, [json.loads(line) for line in lines]


def undisturbed(script, data, out):
    """Checkpoint, log and the number of calls and returns of functions; see conftest.py."""
    events = 0

    def count(*_):
        nonlocal events
        events += 1

    sys.setprofile(count)
    try:
        script.main(on_pictures(script, data, out))
    finally:
        sys.setprofile(None)
    state, log = results(out)
    assert state["step"] == 9 and steps_of(log) == [*range(1, 10)]
    return state, log, events


def steps_of(log):
    return [line["step"] for line in log]


def saved_step(out):
    path = Path(out) / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else None


def two_of_each_class():
    draw = functools.partial(sampler.draw_plates, 2)
    return mock.patch.object(sampler, "draw_plates", lambda per_class, seed: draw(seed))


# ---- Comparisons


def leaves(tree, name=""):
    """All that is in nested dicts and lists, by its path."""
    if not isinstance(tree, (dict, list, tuple)):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: x for key, value in items for path, x in leaves(value, f"{name}/{key}").items()}


def assert_same_state(mine, theirs):
    """Bit by bit, in all parts of a checkpoint but what may change when a run continues."""
    free = {f"/options/{name}" for name in simclr.Run.MAY_CHANGE} | {"/log_size"}
    ours = leaves(mine)
    others = leaves(theirs)
    assert ours.keys() == others.keys() and len(ours) > 50
    for name in ours.keys() - free:
        value = ours[name]
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name


def assert_same_log(mine, theirs):
    """Each step once, with the same numbers; only speeds differ."""
    free = dict(images_per_second=0)
    assert [line | free for line in mine] == [line | free for line in theirs]


def assert_as_undisturbed(out, whole):
    state, log = results(out)
    assert_same_state(state, whole[0])
    assert_same_log(log, whole[1])
    assert state["log_size"] == (out / "log.jsonl").stat().st_size
    assert not (out / "checkpoint.partial").exists()


def finish(script, data, out, whole):
    """Start again, in this process, and compare."""
    script.main(on_pictures(script, data, out))
    assert_as_undisturbed(out, whole)


def hashes(*paths):
    """Of all files below."""
    files = [file for path in paths for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_complaint(errors, *words):
    """One line, that of the error, progress bars apart -> what it says."""
    bar = r"\s*\d+%\|.*\d+/\d+ \[[^\]]*\]\s*"
    lines = [line for line in re.split(r"[\r\n]+", errors) if line.strip()]
    lines = [line for line in lines if not re.fullmatch(bar, line)]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert re.match(r"[\w.-]+: error: ", lines[0]), lines[0]  # not at the end of a progress bar
    for word in words:
        assert str(word) in lines[0], f"{word} not in {lines[0]}"
    return lines[0].partition(": error: ")[2]


def assert_refused(capfd, main, line, *words, folders=()):
    """main(line) says so in one line, leaves with status 2 and changes no file in the folders
    -> the line."""
    before = hashes(*folders)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2
    printed = capfd.readouterr()
    said = assert_complaint(printed.err, *words)
    assert printed.out == ""
    assert before.items() <= hashes(*folders).items()
    assert not dist.is_initialized()
    return said


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    def isatty(self):
        return True


# ---- Other processes


class Child:
    """script.main(line) in a process that has imported everything: it starts in a tenth of a
    second. It is the leader of its group.

    patch(script): a context in which it runs; the files OUTPUT.stdout and OUTPUT.stderr get what it
    prints; folder: where it works."""

    def __init__(self, script, line, output, patch=None, folder=None, environment=None):
        self.output = output
        arguments = (script.__name__, line, str(output), patch, folder, environment or {})
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=work, args=arguments)
        self.process.start()

    def wait(self, timeout=100):
        """Its exit status, or minus the number of the signal that ended it; None: it hangs."""
        self.process.join(timeout)
        status = self.process.exitcode
        with contextlib.suppress(ProcessLookupError):  # its loader processes, or itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return status

    @property
    def stdout(self):
        return Path(f"{self.output}.stdout").read_text()

    @property
    def stderr(self):
        return Path(f"{self.output}.stderr").read_text()


def work(name, line, output, patch, folder, environment):
    os.setsid()
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= environment
    os.chdir(folder or Path(output).parent)
    sys.argv = [f"{name}.py"]
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    status = 0
    with two_of_each_class(), patch(SCRIPTS[name]) if patch else contextlib.nullcontext():
        try:
            SCRIPTS[name].main(line)
        except SystemExit as stopped:
            status = stopped.code
    sys.exit(status)


def together(script, lines, output, nodes=1, folders=None, patches=None):
    """Processes that compute as one, each with its command line, as torchrun starts them on `nodes`
    machines -> Children that have ended, and their statuses. If one fails, the others are ended as
    torchrun would do it: their status is None."""
    n = len(lines)
    children = []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for rank in range(n):
        environment = dict(
            RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank % (n // nodes)),
            LOCAL_WORLD_SIZE=str(n // nodes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        patch = patches[rank] if patches else None
        folder = folders[rank] if folders else None
        children.append(Child(script, lines[rank], f"{output}{rank}", patch, folder, environment))
    limit = time.monotonic() + 100
    while time.monotonic() < limit:
        running = [child.process for child in children if child.process.is_alive()]
        failed = {child.process.exitcode for child in children} & {1, 2}
        if failed or not running:
            break
        connection.wait([process.sentinel for process in running], timeout=1)
    return children, [child.wait(timeout=0) for child in children]


def compute_jointly(work, folder, groups=(4, 2)):
    """work(rank, processes) by groups of so many processes, for functions that need no run
    -> {processes: what each of them returned}."""
    Path(folder).mkdir(exist_ok=True)
    arguments = (work, str(folder), groups)
    mp.start_processes(join_groups, arguments, max(groups), start_method="forkserver")
    return {n: [torch.load(f"{folder}/{n} {rank}") for rank in range(n)] for n in groups}


def join_groups(rank, work, folder, groups):
    torch.set_num_threads(1)
    for processes in groups:
        if rank < processes:
            store = dist.FileStore(f"{folder}/{processes}", processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
            torch.save(work(rank, processes), f"{folder}/{processes} {rank}")
            dist.destroy_process_group()


@contextlib.contextmanager
def signalled(step, signals, script):
    """While this process makes the update `step` (from 1) it gets the signals: (os.kill, number),
    or (os.killpg, number) for its whole group."""
    schedule = script.schedule

    def spied(now, *rest):
        if now + 1 == step:
            for send, number in signals:
                send(os.getpid(), number)
        return schedule(now, *rest)

    with mock.patch.object(script, "schedule", spied):
        yield
