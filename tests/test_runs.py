"""Runs of all six training scripts: several processes, continuing, what a run prints and leaves.

Faults are in test_faults.py, what only one method has in test_runs_methods.py."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    CONVOLUTIONAL,
    NETWORK,
    SCRIPTS,
    SIAMESE,
    Terminal,
    assert_as_undisturbed,
    assert_same_log,
    assert_same_state,
    command_line,
    each_script,
    hashes,
    on_pictures,
    results,
    run,
    steps_of,
    together,
)

import data2vec
import mae
import msn
import pmsn
import simclr
import vicreg

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")

RATES = {script: ["lr"] for script in SCRIPTS.values()} | {data2vec: ["lr", "ema"]}
TERMS = {
    simclr: ["loss", "embedding_std"],
    vicreg: ["loss", "invariance", "variance", "covariance"],
    mae: ["loss", "gradient_norm"],
    data2vec: ["loss", "target_std", "gradient_norm"],
}
for script, divergence in ((msn, "me_max"), (pmsn, "kl")):
    RATES[script] = ["lr", "weight_decay", "ema"]
    TERMS[script] = ["loss", "cross_entropy", divergence, "entropy", "information", "gradient_norm"]
PARTS = {script: {NETWORK[script], "encoder", "optimizer"} for script in SCRIPTS.values()}
for script in (msn, pmsn, data2vec):
    PARTS[script].add("target")


# ---- 1. Several processes

ENOUGH = {  # options with which three steps move weights much more than rounding does
    simclr: "--warmup 0 --base-lr 0.02 --trust 0.1",
    vicreg: "--warmup 0 --base-lr 0.02 --trust 0.1",
    msn: "--warmup 13 --start-lr 5e-5 --lr 2.5e-4 --clip 3 --position-std 0.02",
    pmsn: "--warmup 13 --start-lr 5e-5 --lr 2.5e-4 --clip 3 --position-std 0.02 --exponent 1",
    mae: "--warmup 0.05",
    data2vec: "--warmup 0.05 --ema-anneal 125 --drop-path 0.5 --jitter 0.4 0.4 0.4 0.1",
}


@each_script
def test_two_processes_equal_one_and_continue_as_one(script, few_plates, tmp_path):
    options = "--k-classes", 24, "--log-every", 1, *ENOUGH[script].split()
    line = command_line(script, tmp_path / "two", *options, "--steps", 3)
    children, statuses = together(script, [line] * 2, tmp_path / "process")
    assert statuses == [0, 0], children[0].stderr
    first = children[0].stdout.splitlines()
    assert "K = 24: a class is in " in first[0] and "cpu, processes: 2" in first[0]
    assert first[-2].startswith("3 steps, ") and children[1].stdout == ""  # one process speaks

    for steps in (3, 5):
        one = run(script, tmp_path / "one", *options, "--steps", steps)
        if steps == 5:
            run(script, tmp_path / "two", *options, "--steps", 5)
        two = results(tmp_path / "two")
        assert two[0]["step"] == one[0]["step"] == steps
        assert_same_weights_up_to_rounding(script, two[0], one[0])
        assert steps_of(two[1]) == steps_of(one[1]) == [*range(1, steps + 1)]
        assert_same_losses_up_to_rounding(script, two[1], one[1])


def test_two_processes_equal_one_on_files(pictures, tmp_path):
    """Their crops are drawn image by image."""
    options = "--steps", 3, "--warmup", 400, "--start-lr", 5e-5
    line = on_pictures(msn, pictures, tmp_path / "two", *options)
    assert together(msn, [line] * 2, tmp_path / "process")[1] == [0, 0]
    msn.main(on_pictures(msn, pictures, tmp_path / "one", *options))
    two = results(tmp_path / "two")
    one = results(tmp_path / "one")
    assert_same_weights_up_to_rounding(msn, two[0], one[0])
    assert_same_losses_up_to_rounding(msn, two[1], one[1])


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
                    assert (other - weight).norm() < 2.5e-5 * weight.norm(), name
                else:  # where gradients are rounding, AdamW makes steps of them
                    atol = 2 * two["step"] * 5.3e-5
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
            rtol = 1e-4
        elif name == "target_std":
            rtol = 0.01  # the mean of each process's own
        np.testing.assert_allclose(*values, rtol=rtol, atol=1e-6, err_msg=name)


# ---- 2. Continuing


@each_script
def test_four_steps_then_all_are_all(script, undisturbed, pictures, tmp_path):
    """It stops and continues in the middle of an epoch, at the rates of the whole run."""
    out = tmp_path / "out"
    script.main(on_pictures(script, pictures, out, "--steps", 4))
    assert steps_of(results(out)[1]) == [1, 2, 3, 4]
    script.main(on_pictures(script, pictures, out))
    assert_as_undisturbed(out, undisturbed(script))
    before = hashes(out)
    script.main(on_pictures(script, pictures, out))
    assert hashes(out) == before  # a finished run started again stays as it is


def test_three_plates_steps_then_six_are_six(few_plates, tmp_path):
    whole = run(pmsn, tmp_path / "whole", "--log-every", 2, "--steps", 6)
    assert steps_of(whole[1]) == [1, 2, 4, 5, 6]
    run(pmsn, tmp_path / "parts", "--log-every", 2, "--steps", 3)
    state, log = run(pmsn, tmp_path / "parts", "--log-every", 2, "--steps", 6)
    assert_same_state(state, whole[0])
    assert steps_of(log) == [1, 2, 3, 4, 5, 6]
    assert_same_log([log[0], log[1], *log[4:]], [whole[1][0], whole[1][1], *whole[1][3:]])


@pytest.mark.parametrize("script", [msn, data2vec])
def test_loader_processes_change_nothing(script, undisturbed, pictures, tmp_path):
    script.main(on_pictures(script, pictures, tmp_path / "out", "--workers", 2))
    assert_as_undisturbed(tmp_path / "out", undisturbed(script))


def test_data_that_moved_continue(undisturbed, pictures, tmp_path, monkeypatch):
    """Spelled otherwise, by a link, and in another place."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "pictures")
    (tmp_path / "link").symlink_to("pictures")
    for step, data in enumerate(["pictures", "./pictures/", tmp_path / "pictures", "link"], 2):
        mae.main(on_pictures(mae, data, "out", "--steps", step))
    shutil.move("pictures", "elsewhere")
    mae.main(on_pictures(mae, "elsewhere", "out"))
    assert_as_undisturbed(tmp_path / "out", undisturbed(mae))


# ---- 3. What a run prints and leaves


@each_script
def test_log_pictures_and_checkpoint_of_a_run(script, few_plates, tmp_path, capfd):
    options = "--steps", 7, "--log-every", 3
    state, log = run(script, tmp_path, *options)
    assert steps_of(log) == [1, 2, 3, 5, 6, 7]
    args = script.parse_args(command_line(script, tmp_path, *options))
    for line in log:
        assert list(line) == ["step", "epoch", *RATES[script], *TERMS[script], "images_per_second"]
        assert line["epoch"] == 0 and line["images_per_second"] > 0
        expected = script.schedule(line["step"] - 1, 2000 // 32, args)
        assert {name: line[name] for name in RATES[script]} == expected
        assert_terms_add_up(script, line, args)

    files = {"checkpoint.pt", "log.jsonl", "views.png", "options.json"}
    files |= {"reconstruction.png"} if script is mae else set()
    assert {path.name for path in tmp_path.iterdir()} == files
    rows = {simclr: 2, vicreg: 2, msn: 3, pmsn: 3, mae: 1, data2vec: 1}
    heights = {"views.png": rows[script], "reconstruction.png": 3}
    for name in files & heights.keys():
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (2 + 8 * 34, 2 + heights[name] * 34)
            assert np.asarray(picture).std() > 20

    assert state.keys() == {"options", "step", "log_size"} | PARTS[script]
    made = dict(script=script.__name__, images=2000) | vars(args)
    assert state["options"] == made and state["step"] == 7
    assert json.loads((tmp_path / "options.json").read_text()) == made
    assert_encoder_is_the_targets(script, state)
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
        np.testing.assert_allclose(line["loss"], line["cross_entropy"] + divergence, rtol=1e-5)
        assert 0 < line["information"] < line["entropy"]
        if script is msn:
            np.testing.assert_allclose(line["entropy"], np.log(16) - divergence, rtol=1e-5)


def assert_encoder_is_the_targets(script, state):
    """Or, without a target, the network's: what is evaluated."""
    network = state.get("target", state[NETWORK[script]])
    prefix = "" if script is mae else "encoder."
    for name, weight in state["encoder"].items():
        assert torch.equal(weight, network[prefix + name]), name
    if "target" in state:
        anchor = state[NETWORK[script]]["encoder.norm.weight"]
        assert not torch.equal(state["encoder"]["norm.weight"], anchor)


def assert_printed(script, printed, args, state, log):
    first, *lines, last, hint = printed.out.splitlines()
    averages = state["optimizer"]["state"].values()
    buffer = "momentum_buffer" if script in CONVOLUTIONAL else "exp_avg"
    parameters = sum(average[buffer].numel() for average in averages)
    assert first == (
        f"{script.__name__}: plates, 2,000 images of 1,000 classes; batches of 32, any classes; "
        f"{args.epochs} epochs, {args.epochs * (2000 // 32):,} steps; {parameters:,} parameters; "
        f"cpu, processes: 1; {args.out}, new"
    )
    for line, record in zip(lines, log, strict=True):
        assert line == " ".join(f"{key} {x:.4g}" for key, x in record.items())
    where = f"{args.out}/checkpoint.pt"
    assert re.fullmatch(rf"7 steps, \d+\.\d minutes: {re.escape(where)}", last)
    assert hint == f"next: python linear_eval.py {where}"
    assert printed.err == ""


def test_in_a_terminal_a_bar_shows_the_loss(few_plates, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", Terminal())
    _, log = run(simclr, tmp_path, "--steps", 2)
    bar = sys.stderr.getvalue()
    for line in log:
        assert f"loss={line['loss']:.4g}]" in bar
    assert "2/2 [" in bar
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].endswith(", new")


def test_lines_are_averages_since_the_line_before_and_closest_at_first(few_plates, tmp_path):
    _, log = run(msn, tmp_path / "some", "--steps", 22, "--log-every", 21)
    _, every = run(msn, tmp_path / "every", "--steps", 22, "--log-every", 1)
    assert steps_of(log) == [1, 2, 5, 10, 20, 21, 22] and len(every) == 22
    for before, line in zip([0, 1, 2, 5, 10, 20, 21], log):
        for name in RATES[msn]:
            assert line[name] == every[line["step"] - 1][name]
        for name in TERMS[msn]:
            values = [one[name] for one in every[before : line["step"]]]
            np.testing.assert_allclose(line[name], np.mean(values), rtol=1e-6)


def test_a_long_tail_shortens_the_epoch(pictures, tmp_path, capfd):
    options = "--batch-size", 8, "--epochs", 1, "--long-tail", 1.0
    simclr.main(on_pictures(simclr, pictures, tmp_path, *options))
    assert results(tmp_path)[0]["step"] == (15 + 8 + 5 + 4) // 8
    assert f"simclr: {pictures}, 32 images of 4 classes, 15 to 4 each" in capfd.readouterr().out


def test_a_collapse_is_told_at_the_end_of_a_whole_run(pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(simclr, "embedding_std", lambda z: torch.tensor(0.01))
    for steps, warned in ((8, False), (9, True)):
        simclr.main(on_pictures(simclr, pictures, tmp_path, "--steps", steps))
        warning = "warning: collapse: embedding_std is 0.01: lower the rate\n"
        assert (warning in capfd.readouterr().out) == warned
