"""Training on a real GPU: its numbers beside the CPU's, whole runs, and what nobody waits for.

    pytest --gpu tests/test_gpu.py

Without --gpu no test sees a GPU, and these are skipped; so they are on a machine that has none.
"""

import contextlib
import json
from unittest import mock

import pytest
import torch
from runs import SIAMESE, each_script, run, steps_of
from test_devices import CPU, CUDA, STEPS, VIEWS, rehearse, tensors

import data2vec
import linear_eval
import simclr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and --gpu")


@pytest.mark.usefixtures("few_plates")
@each_script
def test_numbers_are_the_cpus(script):
    """All that the first update returns, to 1e-4, without TensorFloat-32 (and cuDNN)."""
    options = ["--no-bf16"]
    if script is data2vec:
        options += ["--attention-dropout", "0"]  # each device draws its own
    cpu = rehearse(script, CPU, options=options)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gpu = rehearse(script, CUDA, options=options)
    assert cpu.keys() == gpu.keys()
    for name in cpu:
        for mine, other in zip(tensors(cpu[name][0]), tensors(gpu[name][0]), strict=True):
            assert other.device == CUDA
            torch.testing.assert_close(other.cpu(), mine, rtol=1e-4, atol=1e-4, msg=name)


@contextlib.contextmanager
def no_waiting():
    """torch raises where the program would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("few_plates")
@each_script
def test_no_update_waits_for_the_gpu(script):
    """Neither views nor update. data2vec's update does: it counts the masked patches."""

    def hurried(name):
        function = no_waiting()(getattr(script, name))
        return mock.patch.object(script, name, function)

    names = [VIEWS[script]] if script is data2vec else [VIEWS[script], STEPS[script]]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(hurried(name))
        rehearse(script, CUDA)


@pytest.mark.parametrize("data", ["plates", "files"])
@each_script
def test_a_run_continues(script, data, pictures, tmp_path):
    """Six updates, and three and three: the same log, as far as a GPU does the same twice."""
    options = ["--no-bf16", "--log-every", "1"]
    if data == "files":
        options += ["--data", pictures, "--recipe", "plates", "--workers", "2", "--epochs", "6"]
    if script in SIAMESE:  # at the recipe's rate differences grow tenfold with each update
        options += ["--lr", "5e-4"]
    _, whole_log = run(script, tmp_path / "whole", *options, "--steps", "6")
    run(script, tmp_path / "parts", *options, "--steps", "3")
    _, log = run(script, tmp_path / "parts", *options, "--steps", "6")
    assert steps_of(log) == steps_of(whole_log) == [1, 2, 3, 4, 5, 6]
    for line, other in zip(log, whole_log):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


@each_script
def test_bf16_is_near_float32(script, tmp_path):
    """The first loss, of the same weights and views, to a hundredth."""
    losses = []
    for flag in ("--bf16", "--no-bf16"):
        _, log = run(script, tmp_path / flag, flag, "--steps", "1")
        losses.append(log[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("few_plates")
def test_evaluations_agree(tmp_path):
    """Of one checkpoint, on the GPU and on the CPU: all heads to a point or two of 100."""
    run(simclr, tmp_path, "--steps", "2")
    reports = {}
    for device in ("gpu", "cpu"):
        out = tmp_path / f"{device}.json"
        there = mock.patch.object(torch.cuda, "is_available", lambda device=device: device == "gpu")
        with there:
            linear_eval.main([str(tmp_path / "checkpoint.pt"), "--epochs", "2", "--out", str(out)])
        heads = json.loads(out.read_text())["heads"]
        reports[device] = {(h["feature"], h["norm"], h["lr"]): h["top1"] for h in heads}
    assert reports["gpu"] == pytest.approx(reports["cpu"], abs=2)
