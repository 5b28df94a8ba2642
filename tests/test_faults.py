"""Faults: kills, signals, full disks, damaged files, processes that differ, folders as people have
them. After each fault the next start ends with the weights of an undisturbed run, bit by bit in all
parts of the checkpoint, and the log has every step once.

Processes are forked from a server that has imported everything (conftest.py). On a GPU sums have no
fixed order, so all runs here are on the CPU."""

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from runs import ROOT, SCRIPTS, TINY, each_script, leaves, results, saved_step, steps_of

import mae
import msn
import pmsn
import sampler
import simclr
import vicreg

STEPS = 9  # 3 epochs of 24 pictures, 8 in a batch; each step is logged and saved
COMMON = "--recipe plates --batch-size 8 --epochs 3 --log-every 1 --save-minutes 1e-9".split()

one_of_each_kind = pytest.mark.parametrize("script", [simclr, msn, mae])


def namespaces():
    """Whether this user may mount a file system that nobody else sees."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0
    )


needs_mounts = pytest.mark.skipif(
    not namespaces(), reason="needs root, and unshare -m: mounts a small file system of its own"
)


# ---- Runs


@pytest.fixture(autouse=True)
def quiet_cpu(one_thread, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def draw_pictures(root):
    rng = np.random.default_rng(0)
    for i in range(24):
        (root / f"train/class{i % 4}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
        coarse.resize((36 + i % 3, 40 - i % 5)).save(root / f"train/class{i % 4}/{i}.jpg")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "pictures"
    draw_pictures(root)
    return root


@pytest.fixture
def copied(pictures, tmp_path):
    """A folder of pictures that a test may change."""
    return shutil.copytree(pictures, tmp_path / "pictures")


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """script -> the checkpoint and log of a run that nothing befalls, and the number of events in
    it: calls and returns of functions."""

    @functools.cache
    def run_once(script):
        events = 0

        def count(*_):
            nonlocal events
            events += 1

        out = tmp_path_factory.mktemp(script.__name__)
        sys.setprofile(count)
        try:
            script.main(command_line(script, pictures, out))
        finally:
            sys.setprofile(None)
        state, log = results(out)
        assert state["step"] == STEPS and steps_of(log) == [*range(1, STEPS + 1)]
        return state, log, events

    return run_once


def command_line(script, data, out, *options):
    views = ["--focal-views", 1] if script in (msn, pmsn) else []
    line = [*TINY[script], *COMMON, *views, "--workers", 0, "--data", data, "--out", out, *options]
    return [str(word) for word in line]


def assert_as_undisturbed(out, whole, lost=()):
    """Bit by bit; `lost`: steps whose lines the fault took from the log."""
    state, log = results(out)
    mine = leaves(state)
    theirs = leaves(whole[0])
    for found in (mine, theirs):
        found.pop("/options/data")  # it may have moved
    assert mine.keys() == theirs.keys() and len(mine) > 50
    for name, value in theirs.items():
        same = torch.equal(value, mine[name]) if torch.is_tensor(value) else value == mine[name]
        assert same, name
    expected = [line for line in whole[1] if line["step"] not in lost]
    times = dict(images_per_second=0)
    assert [line | times for line in log] == [line | times for line in expected]
    assert not (Path(out) / "checkpoint.partial").exists()


def finish(script, data, out, whole, lost=()):
    """Start again, in this process, and compare."""
    script.main(command_line(script, data, out))
    assert_as_undisturbed(out, whole, lost)


def hashes(*paths):
    files = [file for path in paths for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_one_line(errors, *words):
    assert errors.count("\n") == 1 and ": error: " in errors and "Traceback" not in errors, errors
    for word in words:
        assert str(word) in errors, f"{word} is not in {errors}"


def assert_refused(script, capfd, line, *words):
    """In this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(line)
    assert stopped.value.code == 2
    printed = capfd.readouterr()
    assert_one_line(printed.err, *words)
    assert printed.out == ""
    assert not dist.is_initialized()


# ---- Processes


class Child:
    """script.main(line) in a process of its own, the leader of its group.

    patch(script): a context in which it runs; files {output}.stdout and .stderr get what it
    prints. loaders: how it starts loader processes."""

    def __init__(
        self, script, line, output, patch=None, folder=None, environment=None, loaders=None
    ):
        self.output = output
        loaders = loaders or multiprocessing.get_start_method()
        arguments = (script.__name__, line, str(output), patch, folder, environment or {}, loaders)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=work, args=arguments)
        self.process.start()

    def wait(self, timeout=60):
        """Its exit status, or minus the number of the signal that ended it; "hangs" if neither."""
        self.process.join(timeout)
        status = self.process.exitcode
        with contextlib.suppress(ProcessLookupError):  # its loader processes, or itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return "hangs" if status is None else status

    @property
    def stdout(self):
        return Path(f"{self.output}.stdout").read_text()

    @property
    def stderr(self):
        return Path(f"{self.output}.stderr").read_text()


def work(name, line, output, patch, folder, environment, loaders):
    os.setsid()
    multiprocessing.set_start_method(loaders, force=True)  # else as this process did
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= environment
    os.chdir(folder or Path(output).parent)
    sys.argv = [f"{name}.py"]
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    with patch(SCRIPTS[name]) if patch else contextlib.nullcontext():
        status = status_of(SCRIPTS[name], line)
    sys.exit(status)  # not within the handler, whose exception keeps loader processes alive


def status_of(script, line):
    try:
        script.main(line)
    except SystemExit as stopped:
        return stopped.code
    return 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_torchrun_says(processes, nodes=1):
    """The environment of each of the processes, all of which torchrun starts on `nodes` nodes."""
    port = str(free_port())
    each = processes // nodes
    for rank in range(processes):
        yield dict(
            RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank % each),
            LOCAL_WORLD_SIZE=str(each), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip


def together(script, lines, output, nodes=1, folders=None, patches=None, timeout=60):
    """Processes that compute as one, each with its command line -> Children that have ended, and
    their exit statuses."""
    n = len(lines)
    children = []
    settings = as_torchrun_says(n, nodes)
    for rank, environment in enumerate(settings):
        patch = (patches or [None] * n)[rank]
        folder = (folders or [None] * n)[rank]
        output_of_rank = f"{output}{rank}"
        children.append(Child(script, lines[rank], output_of_rank, patch, folder, environment))
    limit = time.monotonic() + timeout
    statuses = [child.wait(max(limit - time.monotonic(), 0)) for child in children]
    return children, statuses


# ---- 1. Kills


@contextlib.contextmanager
def killed_at_event(number, script):
    """SIGKILL at the number-th call or return of any function, those of loader processes apart."""
    left = number
    process = os.getpid()

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0 and os.getpid() == process:
            os.kill(process, signal.SIGKILL)

    sys.setprofile(count)
    yield
    sys.setprofile(None)


@contextlib.contextmanager
def killed_in_save(number, share, script):
    """SIGKILL within the number-th torch.save, which has written `share` of the file."""
    save = torch.save
    saves = 0

    def cut_short(state, path):
        nonlocal saves
        saves += 1
        save(state, path)
        if saves == number:
            os.truncate(path, int(share * path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(torch, "save", cut_short):
        yield


@contextlib.contextmanager
def killed_before_save(number, script):
    """SIGKILL when the log has the number-th line, but there is no checkpoint of it."""
    lines = 0
    write_line = script.Run.write_line

    def write_and_die(run, rates):
        nonlocal lines
        lines += 1
        write_line(run, rates)
        if lines == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(script.Run, "write_line", write_and_die):
        yield


@each_script
def test_kills_at_random_moments(script, undisturbed, pictures, tmp_path):
    """The same run is killed three times: while it starts, computes, logs or saves."""
    whole = undisturbed(script)
    rng = random.Random(f"{script.__name__} 1")
    out = tmp_path / "out"
    workers = 1 if script is vicreg else 0
    line = command_line(script, pictures, out, "--workers", workers)
    most = whole[2] // (8 if workers else 4)  # three kills leave something to do
    for kill in range(3):
        moment = functools.partial(killed_at_event, rng.randint(1, most))
        child = Child(script, line, tmp_path / str(kill), moment)
        assert child.wait() == -signal.SIGKILL and child.stderr == ""
    assert saved_step(out) < STEPS
    finish(script, pictures, out, whole)


@each_script
def test_a_kill_while_a_checkpoint_is_written(script, undisturbed, pictures, tmp_path):
    whole = undisturbed(script)
    rng = random.Random(f"{script.__name__} 2")
    out = tmp_path / "out"
    number = rng.randint(1, STEPS)
    patch = functools.partial(killed_in_save, number, rng.random())
    child = Child(script, command_line(script, pictures, out), tmp_path / "killed", patch)
    assert child.wait() == -signal.SIGKILL
    assert (out / "checkpoint.partial").exists() and saved_step(out) == number - 1
    finish(script, pictures, out, whole)


@each_script
@pytest.mark.parametrize("saves", [False, True])
def test_a_kill_between_a_line_and_its_checkpoint(script, saves, undisturbed, pictures, tmp_path):
    """Without saves the first start is killed before there is any checkpoint."""
    out = tmp_path / "out"
    number = random.Random(f"{script.__name__} {saves}").randint(2, STEPS - 1)
    line = command_line(script, pictures, out)
    patch = functools.partial(killed_before_save, number)
    child = Child(script, line + ([] if saves else ["--save-minutes", "60"]), tmp_path / "x", patch)
    assert child.wait() == -signal.SIGKILL
    assert saved_step(out) == (number - 1 if saves else 0)
    assert len((out / "log.jsonl").read_text().splitlines()) == number
    finish(script, pictures, out, undisturbed(script))


@each_script
def test_a_kill_between_two_lines_of_the_log(script, undisturbed, pictures, tmp_path):
    """Lines are averages of five steps; that of a restart has fewer. No step comes twice."""
    out = tmp_path / "out"
    line = command_line(script, pictures, out, "--log-every", 5)
    patch = functools.partial(killed_in_save, 7, 0.5)
    assert Child(script, line, tmp_path / "killed", patch).wait() == -signal.SIGKILL
    log = (out / "log.jsonl").read_text()
    assert [json.loads(row)["step"] for row in log.splitlines()] == [1, 2, 5]
    script.main(line)
    state, lines = results(out)
    assert steps_of(lines) == [1, 2, 5, 9]
    assert (out / "log.jsonl").read_text().startswith(log)
    whole = undisturbed(script)
    last = [row["loss"] for row in whole[1]][6:]  # since the restart
    assert lines[-1]["loss"] == pytest.approx(np.mean(last), rel=1e-6)
    for name, value in leaves(whole[0]).items():
        if torch.is_tensor(value):
            assert torch.equal(value, leaves(state)[name])


# ---- 2. Signals


@contextlib.contextmanager
def signalled(step, signals, pause, script):
    """While this process makes the update `step` it gets the signals: (os.kill, number), or
    (os.killpg, number) for its whole group."""
    schedule = script.schedule

    def spied(now, *rest):
        if now + 1 == step:
            for i, (send, number) in enumerate(signals):
                time.sleep(pause if i else 0)
                send(os.getpid(), number)
        return schedule(now, *rest)

    with mock.patch.object(script, "schedule", spied):
        yield


TERM, INT = (os.kill, signal.SIGTERM), (os.kill, signal.SIGINT)
TERM_ALL, INT_ALL = (os.killpg, signal.SIGTERM), (os.killpg, signal.SIGINT)
SIGNALS = {  # timeout(1) sends SIGTERM to the process, then to its group: an echo of the first
    "SIGTERM": [TERM],
    "SIGTERM to all": [TERM_ALL],
    "timeout": [TERM, TERM_ALL],
    "SIGINT to all": [INT_ALL],
}


@each_script
@pytest.mark.parametrize("case", SIGNALS)
def test_signals(script, case, undisturbed, pictures, tmp_path):
    """To the process or to its group, which has loader processes."""
    check_signals(script, SIGNALS[case], undisturbed, pictures, tmp_path)


def test_a_signal_to_loader_processes_of_a_forkserver(undisturbed, pictures, tmp_path):
    """As Python 3.14 starts them; the server is in the group, too."""
    check_signals(simclr, [TERM_ALL], undisturbed, pictures, tmp_path, loaders="forkserver")


def check_signals(script, signals, undisturbed, pictures, tmp_path, loaders=None):
    number = signals[0][1]
    patch = functools.partial(signalled, 3, signals, 0.1)
    out = tmp_path / "out"
    line = command_line(script, pictures, out, "--workers", 2, "--save-minutes", 60)
    child = Child(script, line, tmp_path / "stopped", patch, loaders=loaders)
    assert child.wait() == 128 + number
    assert child.stderr == ""
    said = f"stopped after step 3 of 9, saved in {out}/checkpoint.pt; the same command continues"
    assert child.stdout.splitlines()[-1] == said
    assert saved_step(out) == 3
    finish(script, pictures, out, undisturbed(script))


def test_an_echo_of_sigterm_to_all(undisturbed, pictures, tmp_path):
    """Loader processes ignore it as the run does."""
    check_signals(simclr, [TERM_ALL, TERM_ALL], undisturbed, pictures, tmp_path)


@pytest.mark.parametrize("script, signals", [(simclr, [TERM, TERM]), (msn, [INT, INT])])
def test_a_second_signal_stops_at_once(script, signals, undisturbed, pictures, tmp_path):
    patch = functools.partial(signalled, 3, signals, 1.1)
    out = tmp_path / "out"
    child = Child(script, command_line(script, pictures, out), tmp_path / "stopped", patch)
    assert child.wait() == -signals[0][1]
    assert saved_step(out) == 2 and child.stderr == ""
    finish(script, pictures, out, undisturbed(script))


@pytest.mark.parametrize("script", [simclr])
def test_a_signal_to_one_of_two_processes(script, pictures, tmp_path):
    """Two processes' sums are not those of one: their undisturbed run has two, too."""
    outs = [tmp_path / "whole", tmp_path / "out"]
    lines = [command_line(script, pictures, out, "--save-minutes", 60) for out in outs]
    assert together(script, [lines[0]] * 2, tmp_path / "whole ")[1] == [0, 0]
    stops = [None, functools.partial(signalled, 3, [TERM], 0)]
    children, statuses = together(script, [lines[1]] * 2, tmp_path / "stopped ", patches=stops)
    assert statuses == [143, 143]
    assert [child.stderr for child in children] == ["", ""]
    assert saved_step(outs[1]) == 3
    assert together(script, [lines[1]] * 2, tmp_path / "again ")[1] == [0, 0]
    assert_as_undisturbed(outs[1], results(outs[0]))


def test_sigterm_to_the_group_of_torchrun(pictures, tmp_path):
    """The processes get two signals: one of the group, one that torchrun passes on."""
    out = tmp_path / "out"
    longer = "--epochs", 1000, "--save-minutes", 60, "--workers", 1
    command = [sys.executable, "-B", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / "simclr.py")]
    process = subprocess.Popen(
        [*command, *command_line(simclr, pictures, out, *longer)],
        env=os.environ | dict(CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (out / "views.png").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "simclr.py: error" not in errors and "DataLoader" not in errors, errors
    step = saved_step(out)
    assert 1 <= step < 3000, errors
    assert f"\nstopped after step {step} of 3000, saved in {out}/checkpoint.pt" in output
    goal = "--steps", step + 2
    for folder in (out, tmp_path / "whole"):
        line = command_line(simclr, pictures, folder, *longer, *goal)
        assert together(simclr, [line] * 2, f"{folder} ")[1] == [0, 0]
    assert_as_undisturbed(out, results(tmp_path / "whole"))


# ---- 3. Disks and memory that are full


def own_mount(path, size):
    """A file system of `size` bytes, which this process and its children alone see."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)


def fill(path, left):
    """A file that takes all of its disk but `left` bytes."""
    with path.open("wb") as file:
        file.write(bytes(shutil.disk_usage(path.parent).free - left))


def said_by(script, line):
    """Exit status and stderr of a run in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = status_of(script, line)
    return status, errors.getvalue()


@contextlib.contextmanager
def on_a_full_disk(folder, pictures, size, left, before, script):
    """In the child: a run of `before` steps, one that finds the disk full, and one after space has
    been freed. report.json has what they said; out what they left."""
    disk = folder / "disk"
    disk.mkdir()
    own_mount(disk, 3 * size + 2**20)
    out = disk / "out"
    line = command_line(script, pictures, out)
    report = {}
    if before:
        report["begun"] = said_by(script, [*line, "--steps", str(before)])
    fill(disk / "filler", left)
    report["full"] = said_by(script, line)
    report["saved"] = saved_step(out)
    report["files"] = [path.name for path in out.iterdir()] if out.exists() else []
    (disk / "filler").unlink()
    report["freed"] = said_by(script, line)
    shutil.copytree(out, folder / "out")
    (folder / "report.json").write_text(json.dumps(report))
    yield


@needs_mounts
@one_of_each_kind
@pytest.mark.parametrize("left, before", [(0, 0), (12_000, 0), (12_000, 5)])
def test_a_full_disk(script, left, before, undisturbed, pictures, tmp_path):
    """It may be full at the start, by the first picture, or by a checkpoint or line."""
    whole = undisturbed(script)
    size = sum(x.nbytes for x in leaves(whole[0]).values() if torch.is_tensor(x))
    patch = functools.partial(on_a_full_disk, tmp_path, pictures, size, left, before)
    Child(script, ["--steps", "0"], tmp_path / "child", patch).wait()
    report = json.loads((tmp_path / "report.json").read_text())
    if before:
        assert report["begun"] == [0, ""]
    status, errors = report["full"]
    assert status == 2
    assert_one_line(errors, "free" if before or left else "--out")
    # msn.py's old prototypes.png makes room for one more checkpoint
    assert report["saved"] in ((before, before + 1) if script is msn and before else (before,))
    assert "checkpoint.partial" not in report["files"]
    assert report["freed"] == [0, ""]
    assert_as_undisturbed(tmp_path / "out", whole)


@contextlib.contextmanager
def in_a_small_shm(size, script):
    own_mount("/dev/shm", size)
    yield


@needs_mounts
@one_of_each_kind
def test_shared_memory_that_is_full(script, pictures, tmp_path):
    """As in a container: loader processes cannot hand over their batches of 24 images' crops."""
    patch = functools.partial(in_a_small_shm, 120_000)  # some 40 kB for locks, 74 or more a batch
    whole, out = tmp_path / "whole", tmp_path / "out"
    script.main(command_line(script, pictures, whole, "--batch-size", 24))
    line = command_line(script, pictures, out, "--batch-size", 24)
    child = Child(script, [*line, "--workers", "2"], tmp_path / "full", patch)
    assert child.wait() == 2
    assert_one_line(child.stderr, "--workers", "/dev/shm", "give fewer, or 0")
    assert Child(script, line, tmp_path / "without", patch).wait() == 0
    assert_as_undisturbed(out, results(whole))


@contextlib.contextmanager
def loader_is_killed(while_saving, script):
    """As Linux does when memory is short: one of the loader processes, with the second picture that
    it reads, or while the run writes its first checkpoint."""
    read_image = script.read_image
    save = torch.save
    reads = 0

    def read_or_die(path):
        nonlocal reads
        reads += torch.utils.data.get_worker_info() is not None
        if reads == 2 and not while_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(path)

    def save_and_kill(*arguments):
        for loader in multiprocessing.active_children():
            loader.kill()
        time.sleep(1)
        save(*arguments)

    patches = dict(read_image=read_or_die)
    with mock.patch.multiple(script, **patches):
        with mock.patch.object(torch, "save", save_and_kill if while_saving else save):
            yield


def check_killed_loader(script, while_saving, undisturbed, pictures, tmp_path):
    out = tmp_path / "out"
    line = command_line(script, pictures, out, "--workers", 1)
    patch = functools.partial(loader_is_killed, while_saving)
    child = Child(script, line, tmp_path / "killed", patch)
    assert child.wait() == 2
    assert_one_line(child.stderr, "--workers: DataLoader worker (pid", "Free memory, or give fewer")
    finish(script, pictures, out, undisturbed(script))


@one_of_each_kind
def test_a_loader_process_that_is_killed(script, undisturbed, pictures, tmp_path):
    check_killed_loader(script, False, undisturbed, pictures, tmp_path)


def test_a_loader_process_that_is_killed_while_the_run_saves(undisturbed, pictures, tmp_path):
    check_killed_loader(simclr, True, undisturbed, pictures, tmp_path)


# ---- 4. Damaged files


class Trap:
    """An object whose loading makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@each_script
def test_damaged_checkpoints_are_refused_and_kept(script, undisturbed, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    script.main(command_line(script, pictures, out, "--steps", 4))
    path = out / "checkpoint.pt"
    whole = path.read_bytes()
    other = {"options": {"script": "linear"}, "step": 3}
    rng = random.Random(f"{script.__name__} 3")
    cuts = [0, 1, len(whole) // 2, len(whole) - 1, *rng.choices(range(len(whole)), k=4)]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [b"not a checkpoint\n", bytes(len(whole)), whole[100:], whole[:100] + whole[200:]]
    for thing in (Trap(tmp_path / "sprung"), [1, 2, 3], torch.ones(3), {"step": 3}, other):
        file = io.BytesIO()
        torch.save(thing, file)
        damaged.append(file.getvalue())
    with zipfile.ZipFile(path) as archive:  # a bit of a tensor flips
        tensors = [x for x in archive.infolist() if "/data/" in x.filename and x.file_size]
    for tensor in rng.sample(tensors, 3):
        name = len(tensor.filename) + struct.unpack_from("<H", whole, tensor.header_offset + 28)[0]
        flipped = bytearray(whole)
        flipped[tensor.header_offset + 30 + name] ^= 1
        damaged.insert(0, bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        before = hashes(tmp_path)
        words = ("checkpoint of linear.py",) if content is damaged[-1] else ("damaged or foreign",)
        words = (path, *words, "another --out" if content is damaged[-1] else "change --out")
        assert_refused(script, capfd, command_line(script, pictures, out), *words)
        assert hashes(tmp_path) == before
    assert not (tmp_path / "sprung").exists()  # what a file holds is never run
    path.write_bytes(whole)
    finish(script, pictures, out, undisturbed(script))


@each_script
def test_the_checkpoint_of_another_script_is_refused_and_kept(script, pictures, tmp_path, capfd):
    others = [*SCRIPTS.values()]
    other = others[others.index(script) - 1]
    out = tmp_path / "out"
    other.main(command_line(other, pictures, out, "--steps", 1))
    before = hashes(tmp_path)
    words = out / "checkpoint.pt", f"checkpoint of {other.__name__}.py", "another --out"
    assert_refused(script, capfd, command_line(script, pictures, out), *words)
    assert hashes(tmp_path) == before


LINE = b'{"step": 7, "epoch": 2, "loss": 1.0}\n'
DAMAGED_LOGS = {  # the log of 6 steps -> damaged; the steps of which it has lost the lines
    "half a line": (lambda log: log[: log.rindex(b"epoch")], [6]),
    "half a line before it": (lambda log: cut_line(log, 4, 5), [4, 5, 6]),
    "lines beyond the checkpoint": (lambda log: log + LINE + LINE.replace(b"7", b"8"), []),
    "binary garbage": (lambda log: log + bytes(range(256)), []),
    "zeros": (lambda log: log + bytes(4096), []),
    "only zeros": (lambda log: bytes(len(log)), range(1, 7)),
    "numbers": (lambda log: log + b"7\n[7]\nnull\n", []),
    "empty": (lambda log: b"", range(1, 7)),
}


def cut_line(log, number, length):
    """All but this line, of which only some bytes are left."""
    lines = log.splitlines(keepends=True)
    lines[number - 1] = lines[number - 1][:length]
    return b"".join(lines)


@each_script
def test_damaged_logs_are_mended(script, undisturbed, pictures, tmp_path):
    begun = tmp_path / "begun"
    script.main(command_line(script, pictures, begun, "--steps", 6))
    kinds = {simclr: [*DAMAGED_LOGS], msn: [*DAMAGED_LOGS][:4]}.get(script, [*DAMAGED_LOGS][:2])
    for kind in kinds:
        damage, lost = DAMAGED_LOGS[kind]
        out = shutil.copytree(begun, tmp_path / kind)
        log = out / "log.jsonl"
        log.write_bytes(damage(log.read_bytes()))
        finish(script, pictures, out, undisturbed(script), lost)
    (begun / "log.jsonl").unlink()
    finish(script, pictures, begun, undisturbed(script), range(1, 7))


def test_a_last_line_without_its_end(undisturbed, pictures, tmp_path):
    out = tmp_path / "out"
    simclr.main(command_line(simclr, pictures, out, "--steps", 6))
    log = out / "log.jsonl"
    log.write_bytes(log.read_bytes().rstrip())
    simclr.main(command_line(simclr, pictures, out))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


# ---- 5. Two runs at once, notebooks


@one_of_each_kind
def test_two_runs_with_one_out(script, undisturbed, pictures, tmp_path, capfd):
    """The second is refused while the first lives, and accepted at once after it was killed,
    though its loader processes may still live."""
    out = tmp_path / "out"
    line = command_line(script, pictures, out)
    for_a_minute = functools.partial(signalled, 4, [(os.kill, 0)] * 2, 60)  # in its update 4
    first = Child(script, [*line, "--workers", "2"], tmp_path / "first", for_a_minute)
    while first.process.is_alive() and saved_step(out) < 3:
        time.sleep(0.05)
    before = hashes(out)
    assert_refused(script, capfd, line, f"--out {out}: another run writes there", "choose another")
    assert hashes(out) == before
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    finish(script, pictures, out, undisturbed(script))
    first.wait()


def test_two_runs_with_one_out_started_together(undisturbed, pictures, tmp_path):
    out = tmp_path / "out"
    line = command_line(simclr, pictures, out)
    children = [Child(simclr, line, tmp_path / str(i)) for i in range(3)]
    statuses = [child.wait() for child in children]
    assert {*statuses} <= {0, 2} and 0 in statuses
    for child, status in zip(children, statuses):
        if status == 2:
            assert_one_line(child.stderr, f"--out {out}: another run writes there")
    assert_as_undisturbed(out, undisturbed(simclr))


@each_script
def test_a_notebook(script, undisturbed, pictures, tmp_path, capfd):
    """One process: refused, interrupted, interrupted and continued in a thread."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    out = tmp_path / "out"
    line = command_line(script, pictures, out)
    assert_refused(script, capfd, [*line, "--batch-size", "1000000"], "--batch-size 1000000")
    assert not out.exists()
    for step in (3, 5):
        with signalled(step, [INT], 0, script):
            with pytest.raises(SystemExit) as stopped:
                script.main(line)
        assert stopped.value.code == 130 and saved_step(out) == step
        assert not dist.is_initialized()
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=script.main, args=(line,))
    thread.start()
    thread.join()
    assert_as_undisturbed(out, undisturbed(script))
    assert not dist.is_initialized()


# ---- 6. Several processes that differ


@one_of_each_kind
def test_a_second_node_without_data(script, pictures, tmp_path):
    """Nodes with their own working folders, of which the second has no pictures."""
    folders = [pictures.parent, tmp_path / "second"]
    folders[1].mkdir()
    line = command_line(script, "pictures", tmp_path / "out")
    children, statuses = together(script, [line] * 2, tmp_path / "node", nodes=2, folders=folders)
    assert statuses == [2, 2]
    assert children[0].stderr == "" and [child.stdout for child in children] == ["", ""]
    who = f"process 1 on {socket.gethostname()}: --data pictures: needs pictures/train/CLASS/IMAGE"
    assert_one_line(children[1].stderr, who)
    assert not (tmp_path / "out").exists()


def test_nodes_with_different_images(pictures, copied, tmp_path):
    """One more on one node, or another name."""
    line = command_line(simclr, "pictures", tmp_path / "out")
    folders = [pictures.parent, tmp_path]
    picture = copied / "train/class0/0.jpg"
    extra = copied / "train/class1/extra.jpg"
    for sizes in ("[24, 25]", "[24]"):
        if sizes == "[24]":
            extra.unlink()
            picture.rename(copied / "train/class0/00.jpg")
        else:
            shutil.copy(picture, extra)
        children, statuses = together(simclr, [line] * 2, tmp_path / "node", 2, folders)
        assert statuses == [2, 2]
        said = f"--data pictures: not all processes see the same images ({sizes} of them)"
        assert_one_line(children[0].stderr, said)
        assert children[1].stderr == "" and not (tmp_path / "out").exists()


def test_nodes_that_do_not_see_the_same_checkpoint(pictures, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    simclr.main(command_line(simclr, pictures, folders[0] / "out", "--steps", 3))
    before = hashes(tmp_path)
    line = command_line(simclr, pictures, "out")
    children, statuses = together(simclr, [line] * 2, tmp_path / "node", 2, folders)
    assert statuses == [2, 2]
    seen = "--out out: not all processes see the same checkpoint (steps [0, 3]): share the folder"
    assert_one_line(children[0].stderr, seen)
    assert children[1].stderr == "" and not (folders[1] / "out").exists()
    assert before.items() <= hashes(tmp_path).items()


def test_nodes_of_which_one_sees_a_damaged_checkpoint(pictures, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "out").mkdir(parents=True)
    (folders[1] / "out/checkpoint.pt").write_text("torn")
    line = command_line(simclr, pictures, "out")
    children, statuses = together(simclr, [line] * 2, tmp_path / "node", 2, folders)
    assert statuses == [2, 2] and children[0].stderr == ""
    who = f"process 1 on {socket.gethostname()}: out/checkpoint.pt is damaged"
    assert_one_line(children[1].stderr, who)


@pytest.mark.parametrize("script", [simclr, msn])
def test_a_picture_that_one_of_two_processes_cannot_read(script, copied, tmp_path):
    """It is named once, with its process, and the other process does not wait."""
    for path in (copied / "train/class3").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "out"
    line = command_line(script, copied, out, "--batch-size", 2, "--save-minutes", 60)
    children, statuses = together(script, [line] * 2, tmp_path / "process")
    errors = [child.stderr for child in children]
    assert 2 in statuses and "hangs" not in statuses and 0 not in statuses
    named = [error for error in errors if "unreadable image" in error]
    assert named
    for error in named:
        rank = errors.index(error)
        who = f"process {rank} on {socket.gethostname()}: {copied}/train/class3/"
        assert_one_line(error, who, "fix or remove it")
    assert not any("Traceback" in error for error in errors)
    assert not (out / "checkpoint.pt").exists()


class Downloaded:
    """In place of CIFAR10: the processes of a node must not download at once, nor twice."""

    def __init__(self, root, train, download):
        Path(root).mkdir(exist_ok=True)
        if not Path(root, "complete").exists():
            Path(root, "partial").mkdir()  # fails if another does the same
            with Path(root, "downloads").open("a") as file:
                print("once", file=file)
            time.sleep(0.3)
            Path(root, "complete").touch()
        self.data = np.random.default_rng(0).integers(256, size=(24, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 4 for i in range(24)]


class Unreachable:
    def __init__(self, *_, **__):
        raise RuntimeError("no network")


@contextlib.contextmanager
def downloads_by(kind, script):
    with mock.patch.object(sampler, "CIFAR10", kind):
        yield


def test_a_download_is_made_once_on_each_node(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    line = command_line(simclr, "cifar10", tmp_path / "out", "--steps", 1)
    patches = [functools.partial(downloads_by, Downloaded)] * 4
    where = [folder for folder in folders for _ in range(2)]
    children, statuses = together(simclr, [line] * 4, tmp_path / "x", 2, where, patches)
    assert statuses == [0] * 4, [child.stderr for child in children]
    for folder in folders:
        assert (folder / "data/downloads").read_text() == "once\n"
    assert saved_step(tmp_path / "out") == 1


def test_a_download_that_fails_ends_all_processes(tmp_path):
    line = command_line(simclr, "cifar10", tmp_path / "out")
    patches = [functools.partial(downloads_by, Unreachable)] * 2
    children, statuses = together(simclr, [line] * 2, tmp_path / "x", patches=patches, timeout=3)
    assert statuses == [2, 2]
    assert_one_line(children[0].stderr, "--data cifar10: needs a download")


@each_script
def test_a_rank_without_the_rest(script, pictures, tmp_path, capfd, monkeypatch):
    """As a scheduler may set it."""
    line = command_line(script, pictures, tmp_path / "out")
    monkeypatch.setenv("RANK", "3")
    assert_refused(script, capfd, line, "RANK is set", "WORLD_SIZE", "start with torchrun")
    assert not (tmp_path / "out").exists()


# ---- 7. Loader processes


@each_script
@pytest.mark.parametrize("method, workers", [("fork", 4), ("forkserver", 1)])
def test_loader_processes_change_nothing(
    script, method, workers, undisturbed, pictures, tmp_path, monkeypatch
):
    check_loaders(script, method, workers, undisturbed, pictures, tmp_path, monkeypatch)


def test_spawned_loader_processes_change_nothing(undisturbed, pictures, tmp_path, monkeypatch):
    """These import everything anew, which takes seconds."""
    check_loaders(msn, "spawn", 1, undisturbed, pictures, tmp_path, monkeypatch)


def check_loaders(script, method, workers, undisturbed, pictures, tmp_path, monkeypatch):
    context = multiprocessing.get_context(method)
    loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context=context)
    monkeypatch.setattr(script, "DataLoader", loader)
    script.main(command_line(script, pictures, tmp_path / "out", "--workers", workers))
    assert_as_undisturbed(tmp_path / "out", undisturbed(script))


TWO_RUNS = """
import gc, multiprocessing, sys
import mae
multiprocessing.set_start_method("fork")
gc.disable()  # so that the first run's network is still there, as garbage
*options, out = sys.argv[1:]
mae_step = mae.mae_step

def fail(*inputs):
    mae_step(*inputs)
    raise ArithmeticError

mae.mae_step = fail
try:
    mae.main([*options, "--out", out + "/first"])
except ArithmeticError as error:
    error.itself = error  # a cycle that holds the frames of train, and so the network
mae.mae_step = mae_step

def read_image(path, read=mae.read_image):
    networks = [x for x in gc.get_objects() if isinstance(x, mae.DistributedDataParallel)]
    assert len(networks) == 1, len(networks)  # in the loader process: this run's
    return read(path)

mae.read_image = read_image
mae.main([*options, "--workers", "1", "--out", out + "/second"])
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_loader_processes_of_a_second_run_do_not_inherit_the_first_ones_network(pictures, tmp_path):
    """Their garbage collector would wait for its threads, which a forked process does not have."""
    options = command_line(mae, pictures, tmp_path)
    command = [sys.executable, "-B", "-c", TWO_RUNS, *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- 8. Folders as people have them


@one_of_each_kind
def test_data_that_moved_continue(script, undisturbed, copied, tmp_path, monkeypatch):
    """Spelled otherwise, by a link, and in another place."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to("pictures")
    for step, data in enumerate(["pictures", "pictures/", "./pictures", copied, "link"], 2):
        script.main(command_line(script, data, out, "--steps", step))
        assert saved_step(out) == step
    copied.rename(tmp_path / "elsewhere")
    finish(script, "elsewhere", out, undisturbed(script))


def test_data_in_the_working_folder_may_be_spelled_in_full(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(copied)
    simclr.main(command_line(simclr, ".", tmp_path / "out", "--steps", 1))
    simclr.main(command_line(simclr, copied, tmp_path / "out", "--steps", 2))
    assert saved_step(tmp_path / "out") == 2


@one_of_each_kind
def test_data_that_changed_are_refused(script, undisturbed, copied, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    script.main(command_line(script, copied, out, "--steps", 2))
    before = hashes(out)
    line = command_line(script, copied, out)
    picture = copied / "train/class0/0.jpg"
    added = copied / "train/class3/new.jpg"
    renamed = copied / "train/class0/new.jpg"
    other_class = copied / "train/class1/0.jpg"

    def refuse(images):
        said = f"--data {copied}: {images} images, but {out}/checkpoint.pt was made with 24"
        assert_refused(script, capfd, line, said, "give the same, or another --out")

    shutil.copy(picture, added)
    refuse(25)
    added.unlink()
    for place in (renamed, other_class):
        picture.rename(place)
        refuse(24)
        place.rename(picture)
    picture.unlink()
    refuse(23)
    assert hashes(out) == before
    shutil.copy(pictures / "train/class0/0.jpg", picture)
    finish(script, copied, out, undisturbed(script))


@one_of_each_kind
def test_hidden_files_are_skipped_and_counted(script, undisturbed, copied, tmp_path, capfd):
    train = copied / "train"
    picture = (train / "class0/0.jpg").read_bytes()
    for name in (  # five folders or files that count, and what is in the folders does not
        "class0/._0.jpg", "class1/.DS_Store", "class2/.ipynb_checkpoints/8-checkpoint.jpg",
        ".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/class0/0.jpg", "__MACOSX/class0/._0.jpg",
    ):  # fmt: skip
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        (train / name).write_bytes(b"\0\5\26\7Mac OS X" if "._" in name else picture)
    (train / ".DS_Store").write_text("beside the classes, where files are not looked at")
    (train / "class3/notes.txt").write_text("not a picture, not hidden")
    out = tmp_path / "out"
    script.main(command_line(script, copied, out))
    line = capfd.readouterr().out.splitlines()[0]
    said = f"{copied}, 24 images of 4 classes (6 hidden files or folders skipped); batches"
    assert line.startswith(f"{script.__name__}: {said}")
    assert_as_undisturbed(out, undisturbed(script))


@each_script
def test_a_class_without_pictures_is_named(script, copied, tmp_path, capfd):
    (copied / "train/class5").mkdir()
    (copied / "train/class5/.DS_Store").touch()
    line = command_line(script, copied, tmp_path / "out")
    words = f"--data {copied}", f"no images in {copied}/train/class5", "fill or remove it"
    assert_refused(script, capfd, line, *words)
    assert not (tmp_path / "out").exists()


@each_script
def test_a_warm_up_longer_than_the_run_is_warned_of(script, pictures, tmp_path, capfd):
    options = "--warmup", 3, "--steps", 1, "--save-minutes", 60
    script.main(command_line(script, pictures, tmp_path / "long", *options))
    first, second, *_ = capfd.readouterr().out.splitlines()
    assert second.startswith("warning: --warmup 3.0 epochs last as long as the run: ")
    assert second.endswith("give fewer, or more --epochs")
    script.main(command_line(script, pictures, tmp_path / "short", *options, "--warmup", 2.9))
    assert "warning" not in capfd.readouterr().out


# ---- 9. Pictures as people have them


@each_script
def test_sixteen_bits_equal_their_upper_eight(script, tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(2**16, size=(31, 17), dtype=np.uint16)
    grey[0, :6] = [0, 1, 255, 256, 65279, 65535]
    upper = torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, -1, -1)
    swapped = Image.frombytes("I;16B", (17, 31), grey.astype(">u2").tobytes())
    for image, name in (
        (Image.fromarray(grey), "a.png"),
        (Image.fromarray(grey), "a.tif"),
        (swapped, "b.tif"),
    ):
        image.save(tmp_path / name)
        found = script.read_image(tmp_path / name)
        assert found.dtype == torch.uint8 and torch.equal(found, upper), name


@each_script
@pytest.mark.parametrize("mode, kind", [("I", np.int32), ("F", np.float32)])
def test_pictures_without_a_white_are_refused(script, mode, kind, tmp_path, capfd):
    pixels = np.random.default_rng(0).integers(256, size=(24, 20)).astype(kind)
    for i in range(8):
        (tmp_path / f"data/train/class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"data/train/class{i % 2}/{i}.tif")
    line = command_line(script, tmp_path / "data", tmp_path / "out")
    words = "class0/0.tif: unreadable image", f"mode {mode} has no white", "fix or remove it"
    assert_refused(script, capfd, line, *words)
    assert not (tmp_path / "out").exists()


def entry(tag, kind, count, value):
    """Of an EXIF directory; value: the four bytes, or an offset."""
    return struct.pack("<HHI", tag, kind, count) + (
        value if isinstance(value, bytes) else struct.pack("<I", value)
    )


def exif_segment(*entries, rest=b""):
    """A JPEG's segment of EXIF."""
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + rest
    return b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block


MAKER, ORIENTATION, RESOLUTION = 0x010F, 0x0112, 0x011A
ASCII, SHORT, RATIONAL = 2, 3, 5
TURNED = entry(ORIENTATION, SHORT, 1, 6)
BEHIND = entry(MAKER, ASCII, 900, 60_000)  # its text would be behind the end of the file
BROKEN_EXIF = {  # segments, and whether the picture is to be turned
    "whole": ([exif_segment(TURNED)], True),
    "offset behind the end": ([exif_segment(BEHIND, TURNED)], True),
    "offset behind the end, after": ([exif_segment(TURNED, BEHIND)], True),
    "two rationals": (
        [
            exif_segment(
                TURNED, entry(RESOLUTION, RATIONAL, 2, 38), rest=struct.pack("<4I", 7, 1, 7, 0)
            )
        ],
        True,
    ),
    "twice": ([exif_segment(TURNED), exif_segment(TURNED)], True),
    "two orientations": ([exif_segment(entry(ORIENTATION, SHORT, 2, b"\6\0\1\0"))], True),
    "a text": ([exif_segment(entry(ORIENTATION, ASCII, 2, b"6\0\0\0"))], False),
    "no such turn": ([exif_segment(entry(ORIENTATION, SHORT, 1, 77))], False),
    "no such type": ([exif_segment(entry(ORIENTATION, 99, 1, 6))], False),
    "cut short": ([exif_segment(TURNED)[:-9]], False),
    "empty": ([b"\xff\xe1\0\x08Exif\0\0"], False),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_pictures_with_broken_exif_are_read(name, tmp_path):
    segments, turned = BROKEN_EXIF[name]
    if name == "cut short":
        block = segments[0][4:]
        segments = [b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block]
    pixels = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((36, 24)).save(file, "JPEG")
    plain = file.getvalue()
    (tmp_path / "plain.jpg").write_bytes(plain)
    (tmp_path / "broken.jpg").write_bytes(plain[:2] + b"".join(segments) + plain[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the tags
        for script in SCRIPTS.values():
            upright = script.read_image(tmp_path / "plain.jpg")
            if turned:
                upright = upright.rot90(-1, dims=(1, 2))
            assert torch.equal(script.read_image(tmp_path / "broken.jpg"), upright)


def small_files():
    """A picture in many formats: {suffix: bytes}."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(256, size=(24, 28, 3), dtype=np.uint8)
    )
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[MAKER] = "maker"
    exif[RESOLUTION] = 72.0
    files = {}
    for suffix, kind, mode, options in (
        ("jpg", "JPEG", "RGB", dict(exif=exif)),
        ("png", "PNG", "RGB", dict(exif=exif)),
        ("p.png", "PNG", "P", dict(transparency=3)),
        ("tif", "TIFF", "RGB", {}),
        ("webp", "WEBP", "RGB", dict(exif=exif)),
        ("bmp", "BMP", "RGB", {}),
        ("pgm", "PPM", "L", {}),
        ("gif", "GIF", "P", {}),
    ):
        file = io.BytesIO()
        image.convert(mode).save(file, kind, **options)
        files[suffix] = file.getvalue()
    return files


def damage(content, rng):
    """Some bytes changed, most often in the head; some files cut short."""
    broken = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        within = min(len(broken), 400) if rng.random() < 0.8 else len(broken)
        broken[rng.randrange(within)] = rng.randrange(256)
    return broken[: rng.randrange(1, len(broken))] if rng.random() < 0.15 else broken


@pytest.mark.parametrize("suffix, content", small_files().items(), ids=small_files())
def test_damaged_pictures_are_read_or_refused(suffix, content, tmp_path, capfd):
    """50 of each format: nothing but Refusal leaves read_image, in one line, and no other picture
    than uint8 (3, H, W) is returned."""
    rng = random.Random(suffix)
    path = tmp_path / f"damaged.{suffix}"
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(50):
            path.write_bytes(damage(content, rng))
            try:
                image = simclr.read_image(path)
                assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
            except simclr.Refusal as refusal:
                refused += 1
                assert str(refusal).startswith(f"{path}: unreadable image (")
                assert str(refusal).endswith("): fix or remove it")
                assert "\n" not in str(refusal)
    assert 0 < refused
