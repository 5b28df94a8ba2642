"""Runs of all six training scripts: several processes, kills and restarts, what a run leaves.

Refused options are in test_runs_options.py; what only one method has is in test_runs_methods.py."""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from runs import (
    CONVOLUTIONAL,
    LR,
    NETWORK,
    RATES,
    ROOT,
    SCRIPTS,
    SIAMESE,
    TERMS,
    Terminal,
    assert_complaint,
    assert_same_log,
    assert_same_log_but_for_restarts,
    assert_same_state,
    command_line,
    each_script,
    fork,
    fork_group,
    hashes,
    results,
    run,
    saved_step,
    signals_in,
    start,
    steps_of,
    two_of_each_class,
)

import data2vec
import mae
import msn
import pmsn
import simclr
import vicreg

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- 1. Several processes
# Two processes do all scripts' work in a row, because to start them takes longer than to run.

ENOUGH = {  # options with which three steps move weights much more than rounding does
    simclr: "--warmup 0 --base-lr 0.02 --trust 0.1",
    vicreg: "--warmup 0 --base-lr 0.02 --trust 0.1",
    msn: "--warmup 13 --start-lr 2e-4 --lr 1e-3",
    pmsn: "--warmup 13 --start-lr 2e-4 --lr 1e-3 --exponent 1",
    mae: "--warmup 0.05",
    data2vec: "--warmup 0.05 --ema-anneal 125 --drop-path 0.5 --jitter 0.4 0.4 0.4 0.1",
}


def joint_options(script):
    return "--k-classes", 24, "--log-every", 1, *ENOUGH[script].split()


def work_of_two(rank, folder):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    with two_of_each_class():
        for name, script in SCRIPTS.items():
            joint_run(rank, folder / name, "two", *joint_options(script), "--steps", 3)
            joint_run(rank, folder / name, "odd", "--batch-size", 31)
            if rank == 1:
                shutil.copytree(folder / name / "two", folder / name / "apart1")
            joint_run(rank, folder / name, "apart", *joint_options(script), out=f"apart{rank}")
            signals = {2: [signal.SIGTERM]} if rank == 1 else {}
            with signals_in(script, signals):
                joint_run(rank, folder / name, "stopped", "--log-every", 3)
            joint_run(rank, folder / name, "diverged", LR[script], 1e38, "--warmup", 0.02)


def joint_run(rank, folder, case, *options, out=None):
    """This process's part in a run; {case} {rank}.json gets its exit status and what it printed."""
    script = SCRIPTS[folder.name]
    store = dist.FileStore(str(folder / f"{case} store"), 2)
    joined = functools.partial(dist.init_process_group, store=store, rank=rank, world_size=2)
    stdout = io.StringIO()
    stderr = io.StringIO()
    status = 0
    with (
        mock.patch.object(dist, "init_process_group", joined),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            script.main(command_line(script, folder / (out or case), *options))
        except SystemExit as stopped:
            status = stopped.code
    report = dict(status=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())
    (folder / f"{case} {rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in SCRIPTS:
        (folder / name).mkdir()
    fork_group(work_of_two, folder, processes=2)
    return folder


def reports(folder, case):
    return [json.loads((folder / f"{case} {rank}.json").read_text()) for rank in range(2)]


@each_script
def test_two_processes_equal_one_and_continue_as_one(script, two_processes, few_plates, tmp_path):
    two_out = two_processes / script.__name__ / "two"
    shutil.copytree(two_out, tmp_path / "two")
    first, second = reports(two_out.parent, "two")
    assert (first["status"], second["status"]) == (0, 0)
    assert "K = 24 classes each" in first["stdout"] and "cpu, 2 processes" in first["stdout"]
    assert first["stdout"].splitlines()[-2].startswith("3 of ") and not second["stdout"]

    one = run(script, tmp_path / "one", *joint_options(script), "--steps", 3)
    for steps in (3, 5):
        two = results(tmp_path / "two")
        assert two[0]["step"] == one[0]["step"] == steps
        assert_same_weights_up_to_rounding(script, two[0], one[0])
        assert steps_of(two[1]) == steps_of(one[1]) == [*range(1, steps + 1)]
        assert_same_losses_up_to_rounding(script, two[1], one[1])
        if steps == 3:
            one = run(script, tmp_path / "one", *joint_options(script), "--steps", 5)
            run(script, tmp_path / "two", *joint_options(script), "--steps", 5)


def assert_same_weights_up_to_rounding(script, two, one):
    if script in CONVOLUTIONAL:
        begun = initial_weights(script)
    for part in ("anchor", "target") if script is data2vec else (NETWORK[script],):
        for name, weight in one[part].items():
            other = two[part][name]
            if script in CONVOLUTIONAL:
                if weight.ndim > 1:
                    assert (other - weight).norm() < 0.05 * (weight - begun[name]).norm(), name
            elif script in SIAMESE:
                if weight.ndim > 1 or "running_var" in name:
                    assert (other - weight).norm() < 1e-4 * weight.norm(), name
                else:  # where gradients are rounding, AdamW makes steps of them
                    atol = 2 * two["step"] * 2.1e-4
                    torch.testing.assert_close(other, weight, rtol=0, atol=atol)
            elif script is data2vec or not name.endswith("qkv.bias"):  # the keys' is rounding
                torch.testing.assert_close(other, weight, rtol=0, atol=1e-5)


def initial_weights(script):
    torch.manual_seed(0)
    encoder, dim = script.resnet("small", 32)
    if script is simclr:
        return simclr.SimCLR(encoder, dim, 16, 8, 2).state_dict()
    return vicreg.VICReg(encoder, dim, 16, 8).state_dict()


def assert_same_losses_up_to_rounding(script, two, one):
    for name in [*RATES[script], *TERMS[script]]:
        values = [[line[name] for line in log] for log in (two, one)]
        rtol = 1e-5
        if script in CONVOLUTIONAL:
            np.testing.assert_allclose(values[0][:1], values[1][:1], rtol=1e-5, err_msg=name)
            rtol = 1e-3  # rounding grows
        elif script in SIAMESE:
            rtol = 0.01 if name == "usage" else 1e-4
        elif name == "target_std":
            rtol = 0.01  # the mean of each process's own
        np.testing.assert_allclose(*values, rtol=rtol, atol=1e-6, err_msg=name)


@each_script
def test_a_batch_that_two_processes_cannot_share_is_refused(script, two_processes):
    folder = two_processes / script.__name__
    first, second = reports(folder, "odd")
    assert (first["status"], second["status"]) == (2, 2)
    assert_complaint(first["stderr"], ("--batch-size 31", "2 processes"))
    assert not second["stderr"]  # process 0 speaks for all
    assert not first["stdout"] and not (folder / "odd").exists()


@each_script
def test_two_processes_that_see_different_checkpoints_are_refused(script, two_processes):
    folder = two_processes / script.__name__
    first, second = reports(folder, "apart")
    assert (first["status"], second["status"]) == (2, 2)
    words = (f"--out {folder / 'apart0'}", "same checkpoint", "share the folder")
    assert_complaint(first["stderr"], words)
    assert not second["stderr"]
    assert not (folder / "apart0").exists()


@each_script
def test_a_signal_to_one_of_two_processes_stops_both(script, two_processes):
    folder = two_processes / script.__name__
    first, second = reports(folder, "stopped")
    assert (first["status"], second["status"]) == (143, 143)
    assert "\nstopped after step 2 of " in first["stdout"]
    assert not first["stderr"] and not second["stderr"] and not second["stdout"]
    state, log = results(folder / "stopped")
    assert state["step"] == 2 and steps_of(log) == [1, 2]


@each_script
def test_a_loss_that_is_not_finite_stops_two_processes(script, two_processes):
    folder = two_processes / script.__name__
    first, second = reports(folder, "diverged")
    assert (first["status"], second["status"]) == (2, 2)
    assert_complaint(first["stderr"], ("not finite at step", f"lower {LR[script]} 1e+38"))
    assert not second["stderr"]
    assert not (folder / "diverged/checkpoint.pt").exists()


def test_torchrun_of_two_equals_one_process(pictures, tmp_path):
    """Also on files, whose crops are drawn image by image."""
    options = "--data", pictures, "--recipe", "plates", "--log-every", 1, "--steps", 3
    options += "--workers", 0, "--warmup", 400, "--start-lr", 2e-4
    command = [sys.executable, "-B", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / "msn.py")]
    command += command_line(msn, tmp_path / "two", *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("msn: ") == 1 and "2 processes" in done.stdout  # one process speaks
    one = run(msn, tmp_path / "one", *options)
    two = results(tmp_path / "two")
    assert_same_weights_up_to_rounding(msn, two[0], one[0])
    assert_same_losses_up_to_rounding(msn, two[1], one[1])


# ---- 2. Kills, signals and restarts


@each_script
def test_a_run_killed_and_stopped_ends_as_an_undisturbed_one(script, pictures, tmp_path):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 12, "--k-classes", 3
    options += "--epochs", 20, "--log-every", 4
    if script in SIAMESE:
        options += "--focal-views", 1
    whole = run(script, tmp_path / "whole", *options, "--workers", 0)
    assert whole[0]["step"] == 100  # five steps an epoch
    assert steps_of(whole[1]) == [1, 2, *range(4, 101, 4)]

    out = tmp_path / "killed"
    saved = [0]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        output = tmp_path / number.name
        often = "--workers", 2, "--save-minutes", 1e-9
        process = fork(script, out, *options, *often, output=output)
        while process.is_alive() and saved_step(out) <= saved[-1]:
            time.sleep(0.02)
        time.sleep(random.random() / 4)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # Ctrl-C reaches the loader processes too
        else:
            os.kill(process.pid, number)
        process.join(timeout=100)
        step = saved_step(out)
        assert saved[-1] < step < 100
        lines = output.with_suffix(".stdout").read_text().splitlines()
        start = f"continues after step {saved[-1]}" if saved[-1] else "new"
        assert lines[0].endswith(f"; {out}, {start}")
        if number == signal.SIGKILL:
            assert process.exitcode == -signal.SIGKILL
        else:
            assert process.exitcode == 128 + number
            assert output.with_suffix(".stderr").read_text() == ""
            where = f"saved in {out}/checkpoint.pt; the same command continues"
            assert lines[-1] == f"stopped after step {step} of 100, {where}"
        saved.append(step)
    state, log = run(script, out, *options, "--workers", 1)
    assert_same_state(state, whole[0])
    assert_same_log_but_for_restarts(log, whole[1], saved[1:])


def test_ctrl_c_stops_the_command_line(pictures, tmp_path):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 12, "--workers", 2
    options += "--epochs", 200, "--save-minutes", 1e-9
    process = start(msn, tmp_path / "out", *options)
    while process.poll() is None and not saved_step(tmp_path / "out"):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors == ""
    step = saved_step(tmp_path / "out")
    assert 0 < step < 1000
    assert output.splitlines()[-1].startswith(f"stopped after step {step} of 1000, saved in ")


@each_script
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(script, number, tmp_path, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    options = "--steps", 9, "--log-every", 4
    with signals_in(script, {3: [number]}), pytest.raises(SystemExit) as stopped:
        run(script, tmp_path, *options)
    assert stopped.value.code == 128 + number
    state, log = results(tmp_path)
    assert state["step"] == 3 and steps_of(log) == [1, 2, 3]
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1].startswith("stopped after step 3 of 9, saved in ")
    assert printed.err == ""
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert not dist.is_initialized()
    with signals_in(script, {9: [number]}):  # in the last step it changes nothing
        state, log = run(script, tmp_path, *options)
    assert state["step"] == 9 and steps_of(log) == [1, 2, 3, 4, 8, 9]


@each_script
def test_a_second_signal_ends_the_process_at_once(script, pictures, tmp_path):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 12, "--workers", 0
    options += "--save-minutes", 1e-9
    signals = {3: [signal.SIGINT, signal.SIGINT]}
    process = fork(script, tmp_path / "out", *options, output=tmp_path / "out", signals=signals)
    process.join(timeout=100)
    assert process.exitcode == -signal.SIGINT
    assert saved_step(tmp_path / "out") == 2
    assert (tmp_path / "out.stderr").read_text() == ""


@each_script
def test_only_a_whole_checkpoint_replaces_the_last_one(script, tmp_path, monkeypatch):
    options = "--steps", 6, "--log-every", 1, "--save-minutes", 1e-9
    save = torch.save

    def cut_short(state, path):
        if state["step"] == 3:
            path.write_bytes(b"half a file")
            raise ArithmeticError
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(torch, "save", cut_short)
        run(script, tmp_path / "cut", *options)
    state, log = results(tmp_path / "cut")
    assert state["step"] == 2 and steps_of(log) == [1, 2, 3]
    state, log = run(script, tmp_path / "cut", *options)
    whole = run(script, tmp_path / "whole", *options)
    assert_same_state(state, whole[0])
    assert_same_log(log, whole[1])


@each_script
def test_three_steps_then_six_are_six(script, pictures, tmp_path):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 15, "--log-every", 2
    whole = run(script, tmp_path / "whole", *options, "--steps", 6, "--workers", 0)
    assert steps_of(whole[1]) == [1, 2, 4, 6]
    first = run(script, tmp_path / "parts", *options, "--steps", 3, "--workers", 0)
    assert first[0]["step"] == 3 and steps_of(first[1]) == [1, 2, 3]
    state, log = run(script, tmp_path / "parts", *options, "--steps", 6, "--workers", 2)
    assert_same_state(state, whole[0])
    assert steps_of(log) == [1, 2, 3, 4, 6]
    assert_same_log([log[0], log[1], log[4]], [whole[1][0], whole[1][1], whole[1][3]])

    before = hashes(tmp_path)
    run(script, tmp_path / "whole", *options, "--steps", 6, "--workers", 0)
    assert hashes(tmp_path) == before  # a finished run started again stays as it is


# ---- 3. What a run prints and leaves


@each_script
def test_log_and_pictures_of_a_run(script, tmp_path, capfd):
    options = "--steps", 7, "--log-every", 3
    state, log = run(script, tmp_path, *options)
    assert steps_of(log) == [1, 2, 3, 6, 7] and state["step"] == 7
    args = script.parse_args(command_line(script, tmp_path, *options))
    names = ["step", "epoch", *RATES[script], *TERMS[script], "images_per_second"]
    for line in log:
        assert list(line) == names
        assert line["epoch"] == 0 and line["images_per_second"] > 0
        expected = script.schedule(line["step"] - 1, 50_000 // 32, args)
        assert {name: line[name] for name in RATES[script]} == expected
        assert_terms_add_up(script, line, args)

    more = {mae: {"reconstruction.png"}}
    more |= {script: {"prototypes.png", "prior.png"} for script in SIAMESE}
    files = {"checkpoint.pt", "log.jsonl", "views.png", "options.json"} | more.get(script, set())
    assert {path.name for path in tmp_path.iterdir()} == files
    rows = {simclr: 2, vicreg: 2, msn: 3, pmsn: 3, mae: 1, data2vec: 1}
    heights = {"views.png": rows[script], "reconstruction.png": 3, "prototypes.png": 12}
    for name in files & heights.keys():
        with Image.open(tmp_path / name) as picture:
            width = 10 if name == "prototypes.png" else 8
            assert picture.size == (2 + width * 34, 2 + heights[name] * 34)
            assert np.asarray(picture).std() > 20
    assert_printed(script, capfd.readouterr(), args, state, log)


def assert_terms_add_up(script, line, args):
    if script is simclr:
        assert 0.5 < line["embedding_std"] < 1.05
    elif script is vicreg:
        terms = [line["invariance"], line["variance"], line["covariance"]]
        loss = sum(c * x for c, x in zip((25, 25, args.cov_coeff), terms))
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
    elif script is data2vec:
        assert line["target_std"] > 0
    elif script in SIAMESE:
        divergence = line["me_max" if script is msn else "kl"]
        assert len(line["usage"]) == len(line["prior"]) == 11
        assert line["usage"] == sorted(line["usage"], reverse=True)
        assert min(line["usage"]) < 1 / 16 < max(line["usage"])
        loss = line["cross_entropy"] + divergence
        np.testing.assert_allclose(line["loss"], loss, rtol=1e-5)
        information = line["entropy"] - line["cross_entropy"]
        np.testing.assert_allclose(line["information"], information, rtol=1e-5)
        if script is msn:
            assert line["prior"] == [1 / 16] * 11
            np.testing.assert_allclose(line["entropy"], np.log(16) - divergence, rtol=1e-5)


def assert_printed(script, printed, args, state, log):
    first, *lines, last, hint = printed.out.splitlines()
    name = script.__name__
    averages = state["optimizer"]["state"].values()
    buffer = "momentum_buffer" if script in CONVOLUTIONAL else "exp_avg"
    parameters = sum(average[buffer].numel() for average in averages)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    horizon = args.epochs * (50_000 // 32)
    assert first == (
        f"{name}: plates, 50,000 images of 1,000 classes; batches of 32, any classes; "
        f"{args.epochs} epochs, {horizon:,} steps, of which --steps 7; {parameters:,} parameters; "
        f"{device}, 1 process; "
        f"{args.out}, new"
    )
    for line, record in zip(lines, log, strict=True):
        numbers = {key: x for key, x in record.items() if not isinstance(x, list)}
        assert line == " ".join(f"{key} {x:.4g}" for key, x in numbers.items())
        assert line.startswith(f"step {record['step']} epoch 0 lr ") and " loss " in line
    where = f"{args.out}/checkpoint.pt"
    assert re.fullmatch(rf"7 of {horizon} steps, 0 min \d+ s: {re.escape(where)}", last)
    assert hint == f"next: python linear_eval.py {where}"
    assert printed.err == ""


@each_script
def test_in_a_terminal_a_bar_shows_the_loss(script, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", Terminal())
    _, log = run(script, tmp_path, "--steps", 2)
    bar = sys.stderr.getvalue()
    for line in log:
        assert f"loss={line['loss']:.4g}]" in bar
    assert "2/2 [" in bar
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].endswith(", new")


@each_script
def test_lines_are_averages_since_the_line_before_and_closest_at_first(script, tmp_path):
    _, log = run(script, tmp_path / "some", "--steps", 22, "--log-every", 21)
    _, every = run(script, tmp_path / "every", "--steps", 22, "--log-every", 1)
    assert steps_of(log) == [1, 2, 5, 10, 20, 21, 22] and len(every) == 22
    for before, line in zip([0, 1, 2, 5, 10, 20, 21], log):
        assert {name: line[name] for name in RATES[script]} == {
            name: every[line["step"] - 1][name] for name in RATES[script]
        }
        for name in TERMS[script]:
            if name not in ("usage", "prior"):
                values = [one[name] for one in every[before : line["step"]]]
                np.testing.assert_allclose(line[name], np.mean(values), rtol=1e-6)


@each_script
def test_loader_processes_change_nothing(script, pictures, tmp_path):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 16, "--epochs", 2
    options += "--k-classes", 4, "--flip", 0.5
    state, log = run(script, tmp_path / "two", *options, "--workers", 2)
    assert state["step"] == 6 and log[-1]["epoch"] == 1
    none = run(script, tmp_path / "none", *options, "--workers", 0)
    assert_same_state(none[0], state)
    assert_same_log(none[1], log)


@each_script
def test_a_long_tail_shortens_the_epoch(script, tmp_path, pictures, capfd):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 8, "--epochs", 1
    options += "--workers", 0
    assert run(script, tmp_path / "all", *options)[0]["step"] == 60 // 8
    capfd.readouterr()
    tail = run(script, tmp_path / "tail", *options, "--long-tail", 1.0)
    assert tail[0]["step"] == (15 + 8 + 5 + 4) // 8
    expected = f"{script.__name__}: {pictures} (--long-tail 1.0), 32 images of 4 classes; "
    assert capfd.readouterr().out.startswith(expected)


@each_script
def test_a_collapse_is_reported_once(script, tmp_path, capsys):
    args = script.parse_args(command_line(script, tmp_path / "out", "--warmup", 0))
    run = script.Run(script.__name__, args, torch.device("cpu"))
    run.epoch_steps = 10
    run.bar = mock.Mock()
    lines = [dict.fromkeys(TERMS[script], x) | dict(step=1) for x in (0.1, *[0.01] * 7)]
    for line in lines:
        run.warn_of_collapse(line)
    indicators = {"embedding_std", "information", "target_std"} & {*TERMS[script]}
    assert run.bar.write.call_count == len(indicators)
    for indicator in indicators:
        assert f"{indicator} is 0.01" in run.bar.write.call_args.args[0]
