"""Runs of data2vec.py: processes, kills and restarts, bad input, copies, outputs, evaluation."""

import functools
import gc
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from test_contrastive_runs import assert_complaint, assert_same_run, hashes, results, saved_step
from test_contrastive_runs import folder as folder

import data2vec
import linear_eval

ROOT = Path(data2vec.__file__).parent
TINY = "--dim 16 --depth 2 --heads 2 --top-k 1 --patch-size 8 --num-masked 9 --min-block 2".split()
TINY += "--batch-size 32".split()
plates = functools.cache(data2vec.draw_plates)  # drawn once for all runs of this process


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(data2vec, "draw_plates", plates)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes started: small networks gain nothing
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)  # a run that failed left its own, and its group
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def run(out, *options):
    """A run in this process -> its checkpoint and log."""
    data2vec.main([*TINY, "--out", str(out), *map(str, options)])
    return results(out)


def start(path, out, *options, launcher=()):
    command = [sys.executable, "-B", *launcher, str(path), *TINY, "--out", str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, options)], cwd=Path(out).parent, **pipes)


def assert_refused(capfd, out, options, words):
    before = hashes(out)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        data2vec.main([*TINY, "--out", str(out), *map(str, options)])
    assert stopped.value.code == 2
    assert_complaint(capfd.readouterr().err, words)
    after = hashes(out)
    assert {name: after[name] for name in before} == before
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- 1. Processes, kills and restarts


def test_torchrun_of_two_equals_one_process_and_may_go_on_as_one(tmp_path):
    options = ["--k-classes", 24, "--log-every", 1, "--warmup", 0.002, "--drop-path", 0.5]
    options += "--jitter", 0.4, 0.4, 0.4, 0.1
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    process = start(
        ROOT / "data2vec.py", tmp_path / "two", *options, "--steps", 3, launcher=launcher
    )
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count('"k_classes": 24') == 1  # one process speaks
    one = run(tmp_path / "one", "--steps", 3, *options)
    for steps in (3, 5):
        two = results(tmp_path / "two")
        assert two[0]["step"] == one[0]["step"] == steps
        for part in ("anchor", "target"):
            for name, weight in one[0][part].items():
                torch.testing.assert_close(two[0][part][name], weight, rtol=0, atol=1e-5)
        for name in ("loss", "gradient_norm", "lr", "ema"):
            losses = [[line[name] for line in log] for _, log in (one, two)]
            rtol = 0.5 if name == "gradient_norm" else 1e-5  # of all processes' mean gradient
            np.testing.assert_allclose(*losses, rtol=rtol)
        if steps == 3:
            one = run(tmp_path / "one", "--steps", 5, *options)
            run(tmp_path / "two", "--steps", 5, *options)


def test_a_run_killed_then_terminated_ends_as_if_nothing_had_happened(tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 12, "--k-classes", 3
    options += "--epochs", 40, "--save-every", 3, "--log-every", 4
    whole = run(tmp_path / "whole", *options, "--workers", 0)
    assert whole[0]["step"] == 200 and len(whole[1]) == 50  # five steps an epoch
    out, steps = tmp_path / "killed", []
    for kind in (signal.SIGKILL, signal.SIGTERM):
        process = start(ROOT / "data2vec.py", out, *options, "--workers", 1)
        before = steps[-1] if steps else 0
        while process.poll() is None and saved_step(out) <= before:
            time.sleep(0.02)
        time.sleep(random.random() / 4)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 0), errors
        if kind == signal.SIGTERM:  # after SIGKILL a loader worker may complain that it is alone
            assert "Traceback" not in errors
        steps.append(saved_step(out))
        assert before < steps[-1] < 200
    assert_same_run(run(out, *options, "--workers", 0), whole)


def test_three_steps_then_six_are_six(tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 15, "--log-every", 2
    whole = run(tmp_path / "whole", *options, "--steps", 6, "--workers", 2)
    first = run(tmp_path / "parts", *options, "--steps", 3, "--workers", 0)
    assert first[0]["step"] == 3 and [line["step"] for line in first[1]] == [2, 3]
    assert_same_run(run(tmp_path / "parts", *options, "--steps", 6, "--workers", 0), whole)
    before = hashes(tmp_path)
    run(tmp_path / "whole", *options, "--steps", 6)  # finished: all stays as it is
    assert hashes(tmp_path) == before


# ---- 2. Bad input

WRONG = {  # options -> what the message names
    "--k-classes 1001 --batch-size 2000": ("--k-classes", 1001, 1000, "choose"),
    "--k-classes 33": ("--k-classes", 33, 32, "choose"),
    "--k-classes 0": ("--k-classes 0", "give"),
    "--batch-size 60000": ("--batch-size", 60000, 50000, "at most"),
    "--patch-size 7": ("--patch-size 7", "--image-size 32", "divisor"),
    "--heads 3": ("--dim 16", "--heads 3", "divisor"),
    "--top-k 3": ("--top-k 3", "--depth 2", "at most"),
    "--num-masked 16": ("--num-masked 16", "from --min-block 2 to 15"),
    "--num-masked 1": ("--num-masked 1", "from --min-block 2 to 15"),
    "--drop-path 1": ("--drop-path 1", "less"),
    "--attention-dropout 1": ("--attention-dropout 1", "less"),
    "--attention-dropout -0.1": ("--attention-dropout -0.1", "from 0 to 1"),
    "--ema 0.9 1.1": ("--ema 1.1", "from 0 to 1"),
    "--clip 0": ("--clip 0", "above 0"),
    "--lr -1": ("--lr -1", "give"),
    "--lr nan": ("--lr nan", "give"),
    "--crop -1 0.5": ("--crop -1", "give"),
    "--steps 0": ("--steps 0", "give"),
    "--seed -1": ("--seed -1", "from 0"),
    "--bogus 3": ("--bogus",),
    "--data /nowhere/at/all --recipe plates": ("--data /nowhere/at/all", "train/CLASS/IMAGE"),
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused(options, tmp_path, capfd):
    (tmp_path / "log.jsonl").write_text('{"step": 50}\n')
    assert_refused(capfd, tmp_path, options.split(), WRONG[options])


def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, folder):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder, data)
    broken = data / "train/class2/broken.jpg"
    broken.write_bytes((data / "train/class2/2.jpg").read_bytes()[:300])
    options = "--data", data, "--recipe", "plates", "--workers", 2, "--batch-size", 61
    process = start(ROOT / "data2vec.py", out, *options)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert_complaint(errors, (broken, "unreadable", "remove"))
    assert not (out / "checkpoint.pt").exists()


def test_foreign_checkpoints_and_an_out_that_is_a_file_are_refused(tmp_path, capfd):
    out, path = tmp_path / "out", tmp_path / "out/checkpoint.pt"
    state, _ = run(out, "--steps", 2)
    whole = path.read_bytes()
    for option, value in (("--dim", 24), ("--k-classes", 8), ("--seed", 1), ("--beta", 0.5)):
        assert_refused(capfd, out, (option, value), (option, value, path, "--out"))
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(capfd, out, (), (path, "damaged", "--out"))
    torch.save(state | {"options": state["options"] | {"script": "msn"}}, path)
    assert_refused(capfd, out, (), ("msn", path, "--out"))
    path.write_bytes(whole)
    assert run(out, "--steps", 3)[0]["step"] == 3
    with pytest.raises(SystemExit):
        data2vec.main([*TINY, "--out", str(path)])
    assert_complaint(capfd.readouterr().err, (f"--out {path}", "choose"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capfd):
    options = "--lr", 1e38, "--warmup", 0.001, "--save-every", 1, "--steps", 9
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *options)
    assert stopped.value.code == 2
    number = saved_step(tmp_path) + 1
    assert_complaint(capfd.readouterr().err, (f"not finite at step {number}", "lower --lr"))
    assert number > 1


# ---- 3. Recipes, copies, outputs, evaluation


def test_defaults_follow_the_data_and_classes_raise_the_recipes_batch():
    paper = dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12, layer_scale=1e-4)
    paper |= dict(drop_path=0.25, attention_dropout=0.05, num_masked=120, min_block=16, top_k=6)
    paper |= dict(beta=2.0, crop=[0.08, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.4, 0.0], clip=3.0)
    paper |= dict(batch_size=2048, epochs=800, warmup=10.0, lr=2e-3, final_lr=1e-5)
    paper |= dict(weight_decay=0.05, ema=[0.999, 0.9998], ema_anneal=0.0, standardise=False)
    found = data2vec.parse_args(["--data", "pictures"])
    assert {name: getattr(found, name) for name in paper} == paper
    assert data2vec.parse_args([]).image_size == 32 and data2vec.parse_args([]).batch_size == 960
    many = "--data cifar100 --k-classes 600".split()
    assert data2vec.parse_args(many).batch_size == 640
    assert data2vec.parse_args([*many, "--batch-size", "64"]).batch_size == 64


def test_two_files_alone_suffice_and_import_does_nothing(tmp_path):
    home = tmp_path / "home"
    code = "import torch; before = torch.get_rng_state(); import data2vec; import sys;"
    code += "assert torch.equal(torch.get_rng_state(), before);"
    code += "assert not torch.distributed.is_initialized();"
    code += "assert not {'timm', 'matplotlib', 'sklearn'} & sys.modules.keys()"
    home.mkdir()
    for file in ("data2vec.py", "sampler.py"):
        shutil.copy(ROOT / file, home)
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    process = start(home / "data2vec.py", home / "out", "--steps", 2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert results(home / "out")[0]["step"] == 2


def test_log_and_picture_of_a_run(tmp_path):
    state, log = run(tmp_path, "--steps", 7, "--log-every", 3)
    assert [line["step"] for line in log] == [3, 6, 7] and state["step"] == 7
    args, steps = data2vec.parse_args([]), 50_000 // 32
    for line in log:
        names = "step epoch lr ema loss target_std gradient_norm images_per_second".split()
        assert list(line) == names and line["images_per_second"] > 0 and line["target_std"] > 0
        warmup, anneal = int(args.warmup * steps), int(args.ema_anneal * steps)
        horizon = warmup, args.epochs * steps, args.lr, args.final_lr, args.ema, anneal
        rates = data2vec.schedules_of(line["step"] - 1, *horizon)
        assert {name: line[name] for name in rates} == pytest.approx(rates)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "log.jsonl", "views.png"}
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (2 + 8 * 34, 36) and np.asarray(picture).std() > 20


def test_the_target_is_evaluated_and_moves_slower_than_the_anchor(tmp_path):
    options = "--warmup", 0.001, "--ema", 0.9, 0.9, "--lr", 0.01
    first, _ = run(tmp_path, "--steps", 1, *options)  # the rate of the first update is 0
    last, _ = run(tmp_path, "--steps", 2, *options)
    for name, before in first["target"].items():
        moved = last["anchor"][name] - first["anchor"][name]
        expected = before + 0.1 * moved
        torch.testing.assert_close(last["target"][name], expected, rtol=1e-5, atol=1e-6)
    moved = last["encoder"]["norm.weight"], last["target"]["encoder.norm.weight"]
    assert torch.equal(*moved) and not torch.equal(moved[0], last["anchor"]["encoder.norm.weight"])


def test_checkpoints_evaluate_and_load_in_timm(tmp_path, monkeypatch):
    state, _ = run(tmp_path, "--steps", 2)
    options = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    options |= dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    theirs = timm.models.beit.Beit(**options, global_pool="token").eval()
    theirs.load_state_dict(state["encoder"])
    encoder, images = linear_eval.load_encoder(tmp_path / "checkpoint.pt"), torch.rand(3, 3, 32, 32)
    pixels = (images * 255).round().byte()
    found = linear_eval.features(encoder, pixels)
    with torch.no_grad():
        x = data2vec.normalise(pixels.float() / 255, standardise=True)
        tokens = theirs.forward_features(x)
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
    small = data2vec.draw_plates(1, seed=0)
    monkeypatch.setattr(linear_eval, "draw_plates", lambda per_class, seed: small)
    linear_eval.main([str(tmp_path / "checkpoint.pt"), "--epochs", "1"])
    report = json.loads((tmp_path / "linear_eval_plates_digits.json").read_text())
    assert 0 < report["top1"] < 100 and report["best"]["feature"] in ("cls", "cls4", "patches")
