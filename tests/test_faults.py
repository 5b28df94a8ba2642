"""Faults: kills, signals, full disks, damaged files, processes that differ, unreadable pictures.
After a fault the next start ends with the weights of an undisturbed run, bit by bit in all parts of
the checkpoint, and the log has every step once.

Plumbing is the same in all scripts (test_copies.py), so most faults meet only one of them."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from runs import (
    OFTEN,
    ROOT,
    SCRIPTS,
    Child,
    Terminal,
    assert_as_undisturbed,
    assert_complaint,
    assert_refused,
    assert_same_state,
    each_script,
    finish,
    hashes,
    leaves,
    on_pictures,
    results,
    saved_step,
    signalled,
    together,
)

import data2vec
import mae
import msn
import pmsn
import sampler
import simclr
import vicreg

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")


def namespaces():
    """Whether this user may mount a file system that nobody else sees."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0
    )


needs_mounts = pytest.mark.skipif(
    not namespaces(), reason="needs root, and unshare -m: mounts a small file system of its own"
)


@pytest.fixture
def copied(pictures, tmp_path):
    """A folder of pictures that a test may change."""
    return shutil.copytree(pictures, tmp_path / "pictures")


def wait_until(condition, child):
    """Poll, as long as the process lives."""
    while child.process.is_alive() and not condition():
        time.sleep(0.02)


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

    def cut_short(state, file):
        nonlocal saves
        saves += 1
        save(state, file)
        if saves == number:
            file.truncate(int(share * file.tell()))
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(torch, "save", cut_short):
        yield


@contextlib.contextmanager
def killed_after_line(number, script):
    """SIGKILL when the log has got the number-th line, but there is no checkpoint of it."""
    write_line = script.Run.write_line
    lines = 0

    def write_and_die(run):
        nonlocal lines
        lines += 1
        write_line(run)
        if lines == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(script.Run, "write_line", write_and_die):
        yield


@pytest.mark.parametrize("script", [vicreg, msn, data2vec])
def test_kills(script, undisturbed, pictures, tmp_path):
    """Five in a row: before there is a checkpoint, while one is written, between a line of the log
    and its checkpoint, and twice at a random moment: at the start, in an update, in a save."""
    whole = undisturbed(script)
    rng = random.Random(script.__name__)
    out = tmp_path / "out"

    def kill(patch, *options):
        workers = 1 if script is vicreg else 0
        line = on_pictures(script, pictures, out, "--workers", workers, *options)
        child = Child(script, line, tmp_path / "killed", patch)
        assert child.wait() == -signal.SIGKILL and child.stderr == ""

    kill(functools.partial(killed_after_line, 2), "--save-minutes", 60)
    assert saved_step(out) is None
    kill(functools.partial(killed_in_save, 3, rng.random()), *OFTEN)
    assert saved_step(out) == 1 and (out / "checkpoint.partial").exists()
    kill(functools.partial(killed_after_line, 2), *OFTEN)
    assert saved_step(out) == 2 and len((out / "log.jsonl").read_text().splitlines()) == 3
    for _ in range(2):
        kill(functools.partial(killed_at_event, rng.randint(1, whole[2] // 4)), *OFTEN)
    assert saved_step(out) < 9
    finish(script, pictures, out, whole)


# ---- 2. Signals
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


def assert_stopped(child, number, step, out, last=9):
    assert child.wait() == 128 + number, child.stderr
    assert child.stderr == ""
    said = f"stopped after step {step} of {last}, saved in {out}/checkpoint.pt; the same command"
    assert child.stdout.splitlines()[-1] == f"{said} continues"
    assert saved_step(out) == step


@pytest.mark.parametrize("name, signalled_number", [*zip(SCRIPTS, SIGNALS)], ids=SIGNALS)
def test_signals_that_warn(name, signalled_number, undisturbed, pictures, tmp_path):
    """To the whole group, with a loader process, after it has reached the run alone, as
    timeout(1) and torchrun do it: the update is finished, and saved."""
    script = SCRIPTS[name]
    number = signal.Signals[signalled_number]
    signals = [(os.killpg, number)]
    if number != signal.SIGINT:  # the second of which is meant
        signals.insert(0, (os.kill, number))
    out = tmp_path / "out"
    line = on_pictures(script, pictures, out, "--workers", 1)
    child = Child(script, line, tmp_path / "stopped", functools.partial(signalled, 3, signals))
    assert_stopped(child, number, 3, out)
    finish(script, pictures, out, undisturbed(script))


def test_a_second_ctrl_c_stops_at_once(undisturbed, pictures, tmp_path):
    patch = functools.partial(signalled, 3, [(os.kill, signal.SIGINT)] * 2)
    out = tmp_path / "out"
    child = Child(msn, on_pictures(msn, pictures, out, *OFTEN), tmp_path / "stopped", patch)
    assert child.wait() == -signal.SIGINT
    assert saved_step(out) == 2 and child.stderr == ""
    finish(msn, pictures, out, undisturbed(msn))


def test_nohup_is_respected(undisturbed, pictures, tmp_path):
    out = tmp_path / "out"
    patch = functools.partial(ignoring_hangups, [(os.killpg, signal.SIGHUP)])
    child = Child(simclr, on_pictures(simclr, pictures, out), tmp_path / "nohup", patch)
    assert child.wait() == 0
    assert_as_undisturbed(out, undisturbed(simclr))


@contextlib.contextmanager
def ignoring_hangups(signals, script):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signalled(3, signals, script):
        yield


def test_a_signal_to_one_of_two_processes(pictures, tmp_path):
    """Two processes' sums are not those of one: their undisturbed run has two, too."""
    outs = [tmp_path / "whole", tmp_path / "out"]
    lines = [on_pictures(simclr, pictures, out) for out in outs]
    assert together(simclr, [lines[0]] * 2, tmp_path / "whole ")[1] == [0, 0]
    patches = [None, functools.partial(signalled, 3, [(os.kill, signal.SIGTERM)])]
    children, statuses = together(simclr, [lines[1]] * 2, tmp_path / "x ", patches=patches)
    assert statuses == [143, 143] and [child.stderr for child in children] == ["", ""]
    assert saved_step(outs[1]) == 3
    assert together(simclr, [lines[1]] * 2, tmp_path / "again ")[1] == [0, 0]
    assert_as_undisturbed(outs[1], results(outs[0]))


def test_sigterm_to_the_group_of_torchrun(pictures, tmp_path):
    """Each process gets two signals, one of the group and one that torchrun passes on; its loader
    process gets the first."""
    out = tmp_path / "out"
    options = "--epochs", 1000, "--workers", 1
    command = [sys.executable, "-B", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / "simclr.py")]
    process = subprocess.Popen(
        [*command, *on_pictures(simclr, pictures, out, *options)],
        env=os.environ | dict(CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (out / "views.png").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "simclr.py: error" not in errors and "DataLoader" not in errors, errors
    step = saved_step(out)
    assert 1 <= step < 3000, errors
    assert f"\nstopped after step {step} of 3000, saved in {out}/checkpoint.pt" in output
    for folder in (out, tmp_path / "whole"):
        line = on_pictures(simclr, pictures, folder, *options, "--steps", step + 2)
        assert together(simclr, [line] * 2, f"{folder} ")[1] == [0, 0]
    assert_as_undisturbed(out, results(tmp_path / "whole"))


@contextlib.contextmanager
def output_is_gone(signals, script):
    """After update 2 nobody reads what the process prints."""
    reader, writer = os.pipe()
    for number in (1, 2):
        os.dup2(writer, number)
    os.set_blocking(reader, False)
    log = script.Run.log

    def log_and_close(run, *rest):
        log(run, *rest)
        if run.step == 2:
            os.close(reader)

    with mock.patch.object(script.Run, "log", log_and_close), signalled(4, signals, script):
        yield


@pytest.mark.parametrize("signals", [[], [(os.kill, signal.SIGTERM)]], ids=["end", "signal"])
def test_output_that_is_gone_does_not_prevent_a_save(signals, undisturbed, pictures, tmp_path):
    """A terminal is closed, or `| head` has enough."""
    out = tmp_path / "out"
    patch = functools.partial(output_is_gone, signals)
    assert Child(simclr, on_pictures(simclr, pictures, out), tmp_path / "x", patch).wait() != 0
    assert saved_step(out) == (4 if signals else 9)
    finish(simclr, pictures, out, undisturbed(simclr))


# ---- 3. What a system has too little of


def own_mount(path, size):
    """A file system of `size` bytes, which this process and its children alone see."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)


def said_by(script, line):
    """How a run in this process ends: "" or its traceback."""
    try:
        script.main(line)
    except Exception:
        return traceback.format_exc()
    return ""


@contextlib.contextmanager
def on_a_full_disk(folder, pictures, size, left, before, script):
    """In the child: a run of `before` steps, one that finds the disk full, and one after space has
    been freed. report.json has what they said; out what they left."""
    disk = folder / "disk"
    disk.mkdir()
    own_mount(disk, 3 * size + 2**20)
    out = disk / "out"
    line = on_pictures(script, pictures, out, *OFTEN)
    report = {}
    if before:
        report["begun"] = said_by(script, [*line, "--steps", str(before)])
    with (disk / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))
    report["full"] = said_by(script, line)
    report["saved"] = saved_step(out)
    (disk / "filler").unlink()
    report["freed"] = said_by(script, line)
    shutil.copytree(out, folder / "out")
    (folder / "report.json").write_text(json.dumps(report))
    yield


@needs_mounts
@pytest.mark.parametrize("left, before", [(0, 0), (12_000, 0), (12_000, 5)])
def test_a_full_disk(left, before, undisturbed, pictures, tmp_path):
    """It may be full at the start, or by a picture, a line or a checkpoint: the run ends with an
    error that says so, and the last checkpoint is whole."""
    whole = undisturbed(mae)
    size = sum(x.nbytes for x in leaves(whole[0]).values() if torch.is_tensor(x))
    patch = functools.partial(on_a_full_disk, tmp_path, pictures, size, left, before)
    Child(mae, ["--steps", "0"], tmp_path / "child", patch).wait()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.get("begun", "") == ""
    assert "No space left on device" in report["full"]
    assert report["saved"] == (before or None)
    assert report["freed"] == ""
    assert_as_undisturbed(tmp_path / "out", whole)


@contextlib.contextmanager
def in_a_small_shm(size, script):
    own_mount("/dev/shm", size)
    yield


@needs_mounts
def test_shared_memory_that_is_full(undisturbed, pictures, tmp_path):
    """As in a container: loader processes cannot hand over their batches. They say so, and the run
    does not hang."""
    patch = functools.partial(in_a_small_shm, 120_000)  # some 40 kB for locks, 120 a batch
    out = tmp_path / "out"
    line = on_pictures(simclr, pictures, out)
    child = Child(simclr, [*line, "--workers", "2"], tmp_path / "full", patch)
    assert child.wait() == 1
    assert "No space left on device" in child.stderr and saved_step(out) == 0
    finish(simclr, pictures, out, undisturbed(simclr))


@contextlib.contextmanager
def with_temporary_files_in(folder, script):
    tempfile.tempdir = str(folder)
    yield
    assert tempfile.gettempdir() == "/tmp"


def test_a_long_tmpdir(undisturbed, pictures, tmp_path):
    """Sockets of loader processes have at most 107 letters; with longer names torch hangs, so they
    are made elsewhere."""
    long = tmp_path / ("job-" * 25)
    long.mkdir()
    line = on_pictures(simclr, pictures, tmp_path / "out", "--workers", 1)
    patch = functools.partial(with_temporary_files_in, long)
    child = Child(simclr, line, tmp_path / "x", patch)
    assert child.wait() == 0, child.stderr
    assert_as_undisturbed(tmp_path / "out", undisturbed(simclr))


@contextlib.contextmanager
def loader_is_killed(folder, script):
    """As Linux does when memory is short: the loader process, with a picture of the third batch,
    while the run waits for that."""
    next_batch = script.Run.next_batch
    read_image = script.read_image
    waits = folder / "waits"
    reads = 0

    def wait(run, items):
        if run.step == 2:
            waits.touch()
        return next_batch(run, items)

    def read_or_die(path):
        nonlocal reads
        reads += 1
        if reads == 50:
            while not waits.exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(path)

    with (
        mock.patch.object(script.Run, "next_batch", wait),
        mock.patch.object(script, "read_image", read_or_die),
    ):
        yield


def test_a_loader_process_that_is_killed(undisturbed, pictures, tmp_path):
    out = tmp_path / "out"
    line = on_pictures(msn, pictures, out, "--workers", 1)
    child = Child(msn, line, tmp_path / "x", functools.partial(loader_is_killed, tmp_path))
    assert child.wait() == 1
    assert "is killed by signal: Killed" in child.stderr
    assert saved_step(out) == 2  # first of all
    finish(msn, pictures, out, undisturbed(msn))


# ---- 4. Damaged files


class Trap:
    """An object whose loading makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_checkpoints_are_refused_and_kept(undisturbed, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    line = on_pictures(simclr, pictures, out)
    simclr.main([*line, "--steps", "4"])
    path = out / "checkpoint.pt"
    whole = path.read_bytes()
    cuts = [0, 1, len(whole) // 2, len(whole) - 1, *random.Random(3).sample(range(len(whole)), 4)]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [b"not a checkpoint\n", bytes(len(whole)), whole[100:], whole[:100] + whole[200:]]
    for thing in (Trap(tmp_path / "sprung"), [1, 2, 3], {"step": 3}):
        file = io.BytesIO()
        torch.save(thing, file)
        damaged.append(file.getvalue())
    for content in damaged:
        path.write_bytes(content)
        words = f"{path}: damaged or foreign (", "change --out"
        assert_refused(capfd, simclr.main, line, *words, folders=[tmp_path])
    assert not (tmp_path / "sprung").exists()  # what a file holds is never run
    path.write_bytes(whole)
    finish(simclr, pictures, out, undisturbed(simclr))


def test_the_checkpoint_of_another_script_is_refused_and_kept(pictures, tmp_path, capfd):
    mae.main(on_pictures(mae, pictures, tmp_path, "--steps", 1))
    for script in SCRIPTS.values():
        if script is not mae:
            line = on_pictures(script, pictures, tmp_path)
            words = f"--out {tmp_path}: its run has script mae", "another --out"
            assert_refused(capfd, script.main, line, *words, folders=[tmp_path])


LINE = b'{"step": 7, "epoch": 2, "loss": 1.0}\n'


@pytest.mark.parametrize("end", [LINE + LINE, LINE[:9], bytes(4096), b"7\nnull\n"])
def test_what_the_log_has_beyond_the_checkpoint_is_cut(end, undisturbed, pictures, tmp_path):
    simclr.main(on_pictures(simclr, pictures, tmp_path, "--steps", 6))
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(end)
    finish(simclr, pictures, tmp_path, undisturbed(simclr))


# ---- 5. A loss that is not finite


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
@pytest.mark.parametrize("options, saved", [((), None), (OFTEN, 3)])
def test_a_loss_that_is_not_finite_is_not_saved(
    options, saved, stderr, undisturbed, pictures, tmp_path, monkeypatch
):
    """The message names its step, though it may be found by a later line of the log."""
    log = vicreg.Run.log

    def spoil(run, metrics, rates):
        if run.step == 3:
            metrics = metrics | dict(loss=metrics["loss"] * math.inf)
        log(run, metrics, rates)

    line = on_pictures(vicreg, pictures, tmp_path, "--log-every", 50, *options)
    with monkeypatch.context() as patch:
        patch.setattr(vicreg.Run, "log", spoil)
        patch.setattr(sys, "stderr", stderr())
        with pytest.raises(SystemExit) as stopped:
            vicreg.main(line)
        errors = sys.stderr.getvalue()
    assert stopped.value.code == 2
    said = "the loss is not finite at step 4: lower the learning rate"
    assert assert_complaint(errors) == said and ("%|" in errors) == (stderr is Terminal)
    assert saved_step(tmp_path) == saved
    vicreg.main(line)
    assert_same_state(results(tmp_path)[0], undisturbed(vicreg)[0])


@each_script
def test_a_rate_that_is_too_high(script, pictures, tmp_path, capfd):
    rate = "--lr" if script in (msn, pmsn, data2vec) else "--base-lr"
    line = on_pictures(script, pictures, tmp_path, rate, 1e38, "--warmup", 0, *OFTEN)
    with pytest.raises(SystemExit) as stopped:
        script.main(line)
    assert stopped.value.code == 2
    step = saved_step(tmp_path) + 1
    said = f"the loss is not finite at step {step}: lower the learning rate"
    assert assert_complaint(capfd.readouterr().err) == said


# ---- 6. Two runs at once, notebooks


def test_two_runs_with_one_out(undisturbed, pictures, tmp_path, capfd):
    """The second is refused while the first lives, and accepted at once after it was killed,
    though its loader processes may still live."""
    out = tmp_path / "out"
    line = on_pictures(simclr, pictures, out, "--epochs", 1000, *OFTEN)
    first = Child(simclr, [*line, "--workers", "2"], tmp_path / "first")
    wait_until(lambda: (saved_step(out) or 0) >= 3, first)
    words = f"--out {out}: another run writes there", "choose another"
    assert_refused(capfd, simclr.main, line, *words)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    step = saved_step(out)
    assert 3 <= step < 3000
    for folder in (out, tmp_path / "whole"):
        where = "--out", str(folder), "--steps", str(step + 1)
        simclr.main([*line, *where])
    assert_as_undisturbed(out, results(tmp_path / "whole"))
    first.wait()


def test_two_runs_with_one_out_started_together(undisturbed, pictures, tmp_path):
    out = tmp_path / "out"
    line = on_pictures(simclr, pictures, out)
    children = [Child(simclr, line, tmp_path / str(i)) for i in range(3)]
    statuses = [child.wait() for child in children]
    assert {*statuses} <= {0, 2} and 0 in statuses
    for child, status in zip(children, statuses):
        if status == 2:
            assert_complaint(child.stderr, f"--out {out}: another run writes there")
    assert_as_undisturbed(out, undisturbed(simclr))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks(number, pictures, tmp_path, monkeypatch, capfd):
    """As file systems of clusters may be: a line says so, and the run goes on."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    simclr.main(on_pictures(simclr, pictures, tmp_path, "--steps", 1))
    said = capfd.readouterr().out.splitlines()[0]
    assert said.startswith(f"--out {tmp_path}: its disk has no locks (")
    assert saved_step(tmp_path) == 1


def test_a_notebook(undisturbed, pictures, tmp_path, capfd):
    """One process: refused, interrupted twice, continued; its handlers of signals are its own."""
    numbers = [signal.Signals[name] for name in SIGNALS]
    handlers = [signal.getsignal(number) for number in numbers]
    line = on_pictures(data2vec, pictures, tmp_path / "out")
    assert_refused(capfd, data2vec.main, [*line, "--batch-size", "61"], "use at most 60")
    assert not (tmp_path / "out").exists()
    for step in (3, 5):
        with signalled(step, [(os.kill, signal.SIGINT)], data2vec):
            with pytest.raises(SystemExit) as stopped:
                data2vec.main(line)
        assert stopped.value.code == 130 and saved_step(tmp_path / "out") == step
        assert handlers == [signal.getsignal(number) for number in numbers]
    finish(data2vec, pictures, tmp_path / "out", undisturbed(data2vec))


@contextlib.contextmanager
def after_a_failed_run(line, script):
    """A run of this process has left garbage; loader processes collect what they find."""
    gc.disable()

    def unreadable(path):
        raise sampler.Unreadable(f"{path}: unreadable image")

    with mock.patch.object(script, "read_image", unreadable), contextlib.suppress(SystemExit):
        script.main([*line, "--workers", "0"])
    crop_files = script.CroppedViews.crop_files

    def collect_first(*args):
        gc.collect()
        return crop_files(*args)

    with mock.patch.object(script.CroppedViews, "crop_files", collect_first):
        yield


def test_loader_processes_do_not_free_what_a_failed_run_left(undisturbed, pictures, tmp_path):
    """Its process group waits for threads, which a forked process has not."""
    line = on_pictures(mae, pictures, tmp_path / "out", "--workers", 1)
    child = Child(mae, line, tmp_path / "x", functools.partial(after_a_failed_run, line))
    assert child.wait(timeout=30) == 0, child.stderr
    assert_as_undisturbed(tmp_path / "out", undisturbed(mae))


# ---- 7. Several processes that differ


@pytest.fixture
def machines(tmp_path):
    """The folders of two machines that share nothing."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    return folders


def on_two_machines(machines, data, tmp_path):
    """What the processes say that find something wrong. The others end, with gloo's error, or
    because torchrun ends them."""
    line = on_pictures(simclr, data, "out")
    children, statuses = together(simclr, [line] * 2, tmp_path / "node", 2, machines)
    assert {*statuses} <= {1, 2, None} and {*statuses} != {None}
    said = [child.stderr for child in children]
    return {assert_complaint(errors) for errors in said if ".py: error: " in errors}


def test_machines_of_which_one_lacks_something(machines, pictures, tmp_path):
    """Data, an image, a checkpoint; or has a damaged one."""
    data = shutil.copytree(pictures, machines[0] / "pictures")
    (said,) = on_two_machines(machines, "pictures", tmp_path)
    assert "--data pictures" in said and "needs pictures/train/CLASS/IMAGE" in said

    seen = "--out out, --data {}: processes see different steps and numbers of images, {}: share"
    data = shutil.copytree(pictures, machines[1] / "pictures")
    (data / "train/class0/0.jpg").unlink()
    said = on_two_machines(machines, "pictures", tmp_path)
    assert said == {seen.format("pictures", "[(0, 59), (0, 60)]") + " the folders"}
    for machine in machines:
        assert not (machine / "out/checkpoint.pt").exists()

    simclr.main(on_pictures(simclr, pictures, machines[0] / "out", "--steps", 3))
    before = hashes(machines[0] / "out")
    said = on_two_machines(machines, pictures, tmp_path)
    assert said == {seen.format(pictures, "[(0, 60), (3, 60)]") + " the folders"}
    (machines[1] / "out").mkdir(exist_ok=True)
    (machines[1] / "out/checkpoint.pt").write_text("torn")
    (said,) = on_two_machines(machines, pictures, tmp_path)
    assert said.startswith("out/checkpoint.pt: damaged or foreign (")
    assert hashes(machines[0] / "out") == before


def test_a_batch_that_two_processes_cannot_share(pictures, tmp_path):
    line = on_pictures(simclr, pictures, tmp_path / "out", "--batch-size", 19)
    children, statuses = together(simclr, [line] * 2, tmp_path / "process")
    assert statuses[0] == 2
    assert_complaint(children[0].stderr, "--batch-size 19", "no multiple of 2 processes: use 18")
    assert not (tmp_path / "out").exists()


class Downloaded:
    """In place of CIFAR10: the processes of a machine must not download at once, nor twice."""

    def __init__(self, root, train, download):
        Path(root).mkdir(exist_ok=True)
        if not Path(root, "complete").exists():
            Path(root, "partial").mkdir()  # fails if another does the same
            time.sleep(0.3)  # a download takes a while
            Path(root, "complete").touch()
        self.data = np.random.default_rng(0).integers(256, size=(60, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 4 for i in range(60)]


@contextlib.contextmanager
def downloads_counted(script):
    with mock.patch.object(sampler, "CIFAR10", Downloaded):
        yield


def test_a_download_is_made_once_on_each_machine(machines, tmp_path):
    line = on_pictures(simclr, "cifar10", tmp_path / "out", "--steps", 1)
    where = [machine for machine in machines for _ in range(2)]
    patches = [downloads_counted] * 4
    children, statuses = together(simclr, [line] * 4, tmp_path / "x", 2, where, patches)
    assert statuses == [0] * 4, [child.stderr for child in children]
    assert all((machine / "data/complete").exists() for machine in machines)


# ---- 8. Pictures that cannot be read


def picture_of(step):
    """The number of a picture in the batch of this step of a run on the pictures."""
    labels = [int(name) % 4 for name in sorted_names()]
    batches = list(sampler.KClassBatchSampler(labels, 20))
    return sorted_names()[batches[step][15]]  # of two processes the second gets it


def sorted_names():
    """Of the pictures in conftest.py, as a folder lists them: class after class."""
    return [name for k in range(4) for name in sorted(str(i) for i in range(k, 60, 4))]


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", None], ids=["empty", "text", "half"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_named_when_all_is_saved(
    content, workers, undisturbed, copied, tmp_path, capfd
):
    name = picture_of(step=2)
    path = copied / f"train/class{int(name) % 4}/{name}.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:300] if content is None else content)
    line = on_pictures(vicreg, copied, tmp_path / "out", "--workers", workers)
    with pytest.raises(SystemExit) as stopped:
        vicreg.main(line)
    assert stopped.value.code == 2
    assert_complaint(capfd.readouterr().err, f"{path}: unreadable image (", "): replace it")
    assert saved_step(tmp_path / "out") == 2
    path.write_bytes(whole)
    finish(vicreg, copied, tmp_path / "out", undisturbed(vicreg))


def test_a_picture_that_one_of_two_processes_cannot_read(copied, tmp_path):
    outs = [tmp_path / "whole", tmp_path / "out"]
    lines = [on_pictures(simclr, copied, out, "--workers", 1) for out in outs]
    assert together(simclr, [lines[0]] * 2, tmp_path / "whole ")[1] == [0, 0]
    name = picture_of(step=2)
    path = copied / f"train/class{int(name) % 4}/{name}.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    children, statuses = together(simclr, [lines[1]] * 2, tmp_path / "x ")
    assert statuses == [None, 2]  # torchrun ends the other
    assert_complaint(children[1].stderr, f"{path}: unreadable image (", "): replace it")
    assert saved_step(outs[1]) == 2
    path.write_bytes(whole)
    assert together(simclr, [lines[1]] * 2, tmp_path / "again ")[1] == [0, 0]
    assert_as_undisturbed(outs[1], results(outs[0]))
