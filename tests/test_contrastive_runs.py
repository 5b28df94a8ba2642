"""Runs of simclr.py and vicreg.py: processes, kills and restarts, bad input, copies, networks."""

import functools
import gc
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torchvision import models

import simclr
import vicreg

ROOT = Path(simclr.__file__).parent
TINY = "--arch small --hidden 16 --output 8 --batch-size 32".split()
TERMS = {simclr: ["loss", "embedding_std"]}
TERMS[vicreg] = ["loss", "invariance", "variance", "covariance"]
plates = functools.cache(simclr.draw_plates)  # drawn once for all runs of this process
both = pytest.mark.parametrize("script", [simclr, vicreg], ids=["simclr", "vicreg"])


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for script in (simclr, vicreg):
        monkeypatch.setattr(script, "draw_plates", plates)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes started: small networks gain nothing
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)  # a run that failed left its own, and its group
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # else a later test's workers, which lack its threads, may free it and crash


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty pictures of four classes, in an ImageFolder's layout."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(60):
        (root / f"train/class{i % 4}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + i % 7, 48 - i % 5)).save(root / f"train/class{i % 4}/{i}.jpg")
    return root


def run(script, out, *options):
    """A run in this process -> its checkpoint and log."""
    script.main([*TINY, "--out", str(out), *map(str, options)])
    return results(out)


def results(out):
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True), log


def start(path, out, *options, launcher=()):
    command = [sys.executable, "-B", *launcher, str(path), *TINY, "--out", str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, options)], cwd=Path(out).parent, **pipes)


def leaves(tree, name=""):
    """All that is in nested dicts and lists, by its path."""
    if not isinstance(tree, (dict, list, tuple)):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: x for key, value in items for path, x in leaves(value, f"{name}/{key}").items()}


def assert_same_run(mine, theirs):
    """Bit by bit, but for the speed."""
    ours, others = leaves(mine[0]), leaves(theirs[0])
    assert ours.keys() == others.keys() and len(ours) > 50
    for name, value in ours.items():
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name
    for line, other in zip(mine[1], theirs[1], strict=True):
        assert line | dict(images_per_second=0) == other | dict(images_per_second=0)


def saved_step(out):
    path = out / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def hashes(out):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*.*")}


def assert_complaint(errors, words):
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert re.match(r"[\w.-]+: error: ", lines[0]), lines[0]
    for word in words:
        assert str(word) in lines[0], f"{word} not in {lines[0]}"


def assert_refused(script, capfd, out, options, words):
    before = hashes(out)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([*TINY, "--out", str(out), *map(str, options)])
    assert stopped.value.code == 2
    assert_complaint(capfd.readouterr().err, words)
    after = hashes(out)
    assert {name: after[name] for name in before} == before
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- 1. Processes, kills and restarts


@both
def test_torchrun_of_two_equals_one_process_and_may_go_on_as_one(script, tmp_path):
    options, path = ["--k-classes", 24, "--log-every", 1], ROOT / f"{script.__name__}.py"
    options += ["--warmup", 0, "--base-lr", 0.02, "--trust", 0.1]  # weights move, rounding stays
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    process = start(path, tmp_path / "two", *options, "--steps", 3, launcher=launcher)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count('"k_classes": 24') == 1  # one process speaks
    one = run(script, tmp_path / "one", "--steps", 3, *options)
    torch.manual_seed(0)
    encoder, dim = script.resnet("small", 32)
    heads = (16, 8, 2) if script is simclr else (16, 8)
    begun = (simclr.SimCLR if script is simclr else vicreg.VICReg)(encoder, dim, *heads)
    begun = begun.state_dict()
    for steps in (3, 5):
        two = results(tmp_path / "two")
        assert two[0]["step"] == one[0]["step"] == steps
        for name, weight in one[0][script.__name__].items():
            if weight.ndim > 1:
                apart = (two[0][script.__name__][name] - weight).norm()
                assert apart < 0.05 * (weight - begun[name]).norm(), name
        for name in TERMS[script]:
            losses = [[line[name] for line in log] for _, log in (one, two)]
            assert len(losses[0]) == steps
            np.testing.assert_allclose(losses[0][:1], losses[1][:1], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(*losses, rtol=1e-3, err_msg=name)  # rounding grows
        if steps == 3:
            one = run(script, tmp_path / "one", "--steps", 5, *options)
            run(script, tmp_path / "two", "--steps", 5, *options)


@both
def test_a_run_killed_then_terminated_ends_as_if_nothing_had_happened(script, tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 12, "--k-classes", 3
    options += "--epochs", 40, "--save-every", 3, "--log-every", 4
    whole = run(script, tmp_path / "whole", *options, "--workers", 0)
    assert whole[0]["step"] == 200 and len(whole[1]) == 50  # five steps an epoch
    out, steps = tmp_path / "killed", []
    for kind in (signal.SIGKILL, signal.SIGTERM):
        process = start(ROOT / f"{script.__name__}.py", out, *options, "--workers", 1)
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
    assert_same_run(run(script, out, *options, "--workers", 0), whole)


@both
def test_three_steps_then_six_are_six(script, tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 15, "--log-every", 2
    whole = run(script, tmp_path / "whole", *options, "--steps", 6, "--workers", 2)
    first = run(script, tmp_path / "parts", *options, "--steps", 3, "--workers", 0)
    assert first[0]["step"] == 3 and [line["step"] for line in first[1]] == [2, 3]
    assert_same_run(run(script, tmp_path / "parts", *options, "--steps", 6, "--workers", 0), whole)
    before = hashes(tmp_path)
    run(script, tmp_path / "whole", *options, "--steps", 6)  # finished: all stays as it is
    assert hashes(tmp_path) == before


# ---- 2. Bad input

WRONG = {  # options -> what the message names
    "--k-classes 1001 --batch-size 2000": ("--k-classes", 1001, 1000, "choose"),
    "--k-classes 33": ("--k-classes", 33, 32, "choose"),
    "--k-classes 0": ("--k-classes 0", "give"),
    "--batch-size 60000": ("--batch-size", 60000, 50000, "at most"),
    "--batch-size 1": ("--batch-size 1", "at least 2"),
    "--arch resnet51": ("--arch", "resnet51", "choose"),
    "--base-lr -1": ("--base-lr -1", "give"),
    "--base-lr nan": ("--base-lr nan", "give"),
    "--crop -1 0.5": ("--crop -1", "give"),
    "--flip 1.5": ("--flip 1.5", "from 0 to 1"),
    "--steps 0": ("--steps 0", "give"),
    "--seed -1": ("--seed -1", "from 0"),
    f"--seed {10**20}": ("--seed", 10**20, "9.2e+18"),
    "--bogus 3": ("--bogus",),
    "--data /nowhere/at/all --recipe plates": ("--data /nowhere/at/all", "train/CLASS/IMAGE"),
}


@both
@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused(script, options, tmp_path, capfd):
    (tmp_path / "log.jsonl").write_text('{"step": 50}\n')
    assert_refused(script, capfd, tmp_path, options.split(), WRONG[options])


@both
def test_an_unreadable_image_stops_the_run_and_is_named(script, tmp_path, folder):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder, data)
    broken = data / "train/class2/broken.jpg"
    broken.write_bytes((data / "train/class2/2.jpg").read_bytes()[:300])
    options = "--data", data, "--recipe", "plates", "--workers", 2, "--batch-size", 61
    process = start(ROOT / f"{script.__name__}.py", out, *options)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert_complaint(errors, (broken, "unreadable", "remove"))
    assert not (out / "checkpoint.pt").exists()


@both
def test_foreign_checkpoints_and_an_out_that_is_a_file_are_refused(script, tmp_path, capfd):
    out, path = tmp_path / "out", tmp_path / "out/checkpoint.pt"
    state, _ = run(script, out, "--steps", 2)
    whole = path.read_bytes()
    for option, value in (("--hidden", 24), ("--k-classes", 8), ("--seed", 1), ("--base-lr", 0.7)):
        words = option, value, path, "--out"
        assert_refused(script, capfd, out, (option, value), words)
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(script, capfd, out, (), (path, "damaged", "--out"))
    torch.save(state | {"options": state["options"] | {"script": "msn"}}, path)
    assert_refused(script, capfd, out, (), ("msn", path, "--out"))
    path.write_bytes(whole)
    assert run(script, out, "--steps", 3)[0]["step"] == 3
    with pytest.raises(SystemExit):
        script.main([*TINY, "--out", str(path)])
    assert_complaint(capfd.readouterr().err, (f"--out {path}", "choose"))


@both
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(script, tmp_path, capfd):
    options = "--base-lr", 1e38, "--warmup", 0.001, "--save-every", 1, "--steps", 9
    with pytest.raises(SystemExit) as stopped:
        run(script, tmp_path, *options)
    assert stopped.value.code == 2
    number = saved_step(tmp_path) + 1
    assert_complaint(capfd.readouterr().err, (f"not finite at step {number}", "lower --base-lr"))
    assert number > 1


# ---- 3. Recipes, copies, networks, outputs


@both
def test_defaults_follow_the_data_and_classes_raise_the_recipes_batch(script):
    paper = dict(arch="resnet50", image_size=224, epochs=300, warmup=10, weight_decay=1e-6)
    paper |= dict(momentum=0.9, trust=0.001, blur_sigma=[0.1, 2.0], crop=[0.08, 1.0], flip=0.5)
    if script is simclr:
        paper |= dict(batch_size=4096, base_lr=0.3, temperature=0.1, output=128, final_lr=0.0)
        paper |= dict(jitter=[0.8, 0.8, 0.8, 0.2], grey=0.2, blur=0.5, solarise=0.0)
    else:
        paper |= dict(batch_size=2048, base_lr=0.2, hidden=8192, output=8192, final_lr=0.001)
        paper |= dict(sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, jitter=[0.4, 0.4, 0.2, 0.1])
        paper |= dict(blur=[1.0, 0.1], solarise=[0.0, 0.2], threshold=0.5, grey=0.2)
    folder = script.parse_args(["--data", "pictures"])
    assert {name: getattr(folder, name) for name in paper} == paper
    assert script.parse_args([]).batch_size == 1024 and script.parse_args([]).arch == "small"
    many = "--data cifar100 --k-classes 600".split()
    assert script.parse_args(many).batch_size == 640
    assert script.parse_args([*many, "--batch-size", "64"]).batch_size == 64


@both
def test_two_files_alone_suffice_and_import_does_nothing(script, tmp_path):
    home, name = tmp_path / "home", script.__name__
    code = f"import torch; before = torch.get_rng_state(); import {name}; import sys;"
    code += "assert torch.equal(torch.get_rng_state(), before);"
    code += "assert not torch.distributed.is_initialized();"
    code += "assert not {'timm', 'matplotlib', 'sklearn'} & sys.modules.keys()"
    home.mkdir()
    for file in (f"{name}.py", "sampler.py"):
        shutil.copy(ROOT / file, home)
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    process = start(home / f"{name}.py", home / "out", "--steps", 2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert results(home / "out")[0]["step"] == 2


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_takes_the_encoder(arch, folder, tmp_path):
    options = "--data", folder, "--recipe", "paper", "--arch", arch, "--image-size", 48
    options += "--batch-size", 4, "--steps", 2, "--workers", 0
    state, _ = run(simclr, tmp_path, *options)
    theirs = getattr(models, arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state["encoder"])
    mine, dim = simclr.resnet(arch, 48)
    mine.load_state_dict(state["encoder"])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.shape == (2, dim) and expected.std() > 0.01
        torch.testing.assert_close(mine.eval()(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_residual_branches_start_at_zero_and_small_images_keep_their_size(arch):
    network, _ = simclr.resnet(arch, 32)
    blocks = [m for m in network.modules() if hasattr(m, "downsample")]
    assert len(blocks) == {"resnet18": 8, "resnet50": 16}[arch]
    for block in blocks:
        last = block.bn2 if arch == "resnet18" else block.bn3
        assert not last.weight.any() and block.bn1.weight.all()
    sizes = []
    network.layer1.register_forward_hook(lambda *x: sizes.append(tuple(x[1][0].shape[2:])))
    network(torch.rand(2, 3, 32, 32))
    assert sizes == [(32, 32)]
    names = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not names  # all are over the processes


@both
def test_log_and_pictures_of_a_run(script, tmp_path):
    state, log = run(script, tmp_path, "--steps", 7, "--log-every", 3)
    assert [line["step"] for line in log] == [3, 6, 7] and state["step"] == 7
    args, steps = script.parse_args([]), 50_000 // 32
    peak = args.base_lr * 32 / 256
    for line in log:
        names = ["step", "epoch", "lr", *TERMS[script], "images_per_second"]
        assert list(line) == names and line["images_per_second"] > 0
        rate = script.learning_rate(
            line["step"] - 1, int(args.warmup * steps), args.epochs * steps, peak, 0
        )
        assert line["lr"] == pytest.approx(rate)
        if script is vicreg:
            terms = (line[name] for name in TERMS[vicreg][1:])
            loss = sum(c * x for c, x in zip((25, 25, args.cov_coeff), terms))
            assert line["loss"] == pytest.approx(loss, rel=1e-5)
        else:
            assert 0.5 < line["embedding_std"] < 1.05
    files = {"checkpoint.pt", "log.jsonl", "views.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (2 + 8 * 34, 2 + 2 * 34) and np.asarray(picture).std() > 20


@both
def test_a_long_tail_shortens_the_epoch(script, tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 8, "--epochs", 1
    tail = run(script, tmp_path, *options, "--workers", 0, "--long-tail", 1.0)
    assert tail[0]["step"] == (15 + 8 + 5 + 4) // 8


@pytest.mark.parametrize("alike", [True, False])
def test_the_spread_of_simclr_is_0_if_embeddings_are_one_and_defined_for_one_image(alike):
    z = torch.ones(4, 2) if alike else torch.eye(2).repeat(2, 1)
    network = nn.Linear(2, 2, bias=False)
    nn.init.eye_(network.weight)
    optimizer = simclr.LARS(network.parameters(), 0.0, 0.0)
    _, spread = simclr.simclr_step(network, optimizer, z, 0.1, 0.1)
    assert spread.item() == pytest.approx(0 if alike else 0.5**0.5, abs=1e-3)
    _, spread = simclr.simclr_step(network, optimizer, z[::2], 0.1, 0.1)
    assert spread.isfinite()


def test_a_term_of_vicreg_can_be_switched_off(tmp_path):
    _, log = run(vicreg, tmp_path, "--steps", 2, "--sim-coeff", 0, "--std-coeff", 0)
    expected = vicreg.parse_args([]).cov_coeff * log[0]["covariance"]
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5) and log[0]["invariance"] > 0


def test_the_views_of_vicreg_have_probabilities_of_their_own(tmp_path, monkeypatch):
    seen, photometry = [], vicreg.photometry

    def spy(views, u, **options):
        seen.append((options["blur"], options["solarise"], options["threshold"]))
        return photometry(views, u, **options)

    monkeypatch.setattr(vicreg, "photometry", spy)
    options = "--blur", 1.0, 0.1, "--solarise", 0.0, 0.2, "--threshold", 0.5
    run(vicreg, tmp_path, *options, "--steps", 1)
    assert seen == [(1.0, 0.0, 0.5), (0.1, 0.2, 0.5)]
