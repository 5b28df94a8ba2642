"""Runs of msn.py: processes, kills and restarts, bad input, copies, folders of images, outputs."""

import copy
import functools
import gc
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import msn

ROOT = Path(msn.__file__).parent
TINY = "--dim 16 --depth 1 --heads 2 --hidden 16 --output 8 --num-prototypes 16".split()
STEM = "--stem 8 8 8 --batch-size 32".split()
plates = functools.cache(msn.draw_plates)  # drawn once for all runs of this process


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(msn, "draw_plates", plates)
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


def run(out, *options, stem=STEM):
    """A run in this process -> its checkpoint and log."""
    msn.main([*TINY, *stem, "--out", str(out), *map(str, options)])
    return results(out)


def results(out):
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True), log


def start(script, out, *options, **environment):
    command = [
        sys.executable,
        "-B",
        str(script),
        *TINY,
        *STEM,
        "--out",
        str(out),
        *map(str, options),
    ]
    environment = os.environ | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, cwd=Path(out).parent, **pipes)


def leaves(tree, name=""):
    """All that is in nested dicts and lists, by its path."""
    if not isinstance(tree, (dict, list, tuple)):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: x for key, value in items for path, x in leaves(value, f"{name}/{key}").items()}


def assert_same_run(mine, theirs):
    """Bit by bit, but for the speed."""
    for part in ("step", "encoder", "msn", "target", "optimizer", "options", "recent", "logged"):
        ours, others = leaves(mine[0][part]), leaves(theirs[0][part])
        assert ours.keys() == others.keys(), part
        for name, value in ours.items():
            if torch.is_tensor(value):
                assert torch.equal(value, others[name]), f"{part}{name}"
            else:
                assert value == others[name], f"{part}{name}"
    logs = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in log]
        for log in (mine[1], theirs[1])
    ]
    assert logs[0] == logs[1]


# ---- 1. Processes


FAULTS = "none", "none, float64", "local BatchNorm", "local p_bar", "bfloat16"


def joint_step(rank, processes, fault):
    """One step on this process's share of a fixed batch -> loss terms, gradients and buffers."""
    torch.manual_seed(0)
    dtype = torch.float64 if "float64" in fault else torch.float32
    encoder = msn.VisionTransformer(16, 8, 16, 1, 2, stem=[8, 8, 8])
    model = msn.MSN(encoder, 16, 24, 8, 12)
    for weight in encoder.blocks.parameters():  # at the start representations are so alike that
        weight.data *= 3 if weight.ndim > 1 else 1  # BatchNorm would magnify rounding
    model = model.to(dtype)
    target = copy.deepcopy(model).requires_grad_(False)
    groups = [torch.rand(V, 8, 3, size, size) for V, size in ((1, 16), (2, 16), (3, 8))]
    share = slice(8 // processes * rank, 8 // processes * (rank + 1))
    first, *groups = (views[:, share].flatten(0, 1).to(dtype) for views in groups)
    parallel = DistributedDataParallel(model) if processes > 1 else model
    all_reduce_mean, forward = msn.all_reduce_mean, msn.BatchNorm.forward
    if fault == "local BatchNorm":
        msn.BatchNorm.forward = nn.BatchNorm1d.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=fault == "bfloat16"):
        targets, _ = target([first])
        anchors, prototypes = parallel(groups, torch.tensor([2, 0, 3]))
    if fault == "local p_bar":
        msn.all_reduce_mean = lambda x: x
    terms = msn.msn_loss(anchors, targets, prototypes, me_max_weight=5.0, sinkhorn=True)
    terms[0].backward()
    msn.all_reduce_mean, msn.BatchNorm.forward = all_reduce_mean, forward
    result = {"terms": msn.all_reduce_mean(torch.stack(terms).detach())}
    result["gradients"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for network, name in ((model, "anchor"), (target, "target")):
        result |= {f"{name} {key}": buffer for key, buffer in network.named_buffers()}
    return result


def joint_steps(rank, folder):
    for processes in (4, 2):
        if rank < processes:
            store = dist.FileStore(f"{folder}/{processes}", processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
            for fault in FAULTS:
                result = joint_step(rank, processes, fault)
                torch.save(result, f"{folder}/{processes} {fault} {rank}")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def joint_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(joint_steps, (str(folder),), nprocs=4)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_what_one_computes(processes, joint_results):
    for fault, low, high in (
        ("none", 0, 1e-5),
        ("none, float64", 0, 1e-12),
        ("local BatchNorm", 0.1, 10),  # the distance would show what is not joined
        ("local p_bar", 0.1, 10),
        ("bfloat16", 0, 0.1),  # mixed precision, as on GPUs
    ):
        alone = joint_step(0, 1, "none" if fault.startswith("local") else fault)
        assert len(alone) == 2 + 2 * 5 * 3  # BatchNorms: three in the stem, two in the projector
        for rank in range(processes):
            joint = torch.load(joint_results / f"{processes} {fault} {rank}")
            distances = {
                name: ((joint[name] - x).double().norm() / x.double().norm()).item()
                for name, x in alone.items()
            }
            assert low <= max(distances.values()) < high, (fault, distances)


def test_torchrun_of_two_equals_one_process_and_may_go_on_as_one(tmp_path):
    options = "--k-classes", 24, "--log-every", 1
    command = [sys.executable, "-B", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / "msn.py"), *TINY, *STEM, "--steps", "3"]
    command += ["--out", str(tmp_path / "two"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"k_classes": 24') == 1  # one process speaks
    one = run(tmp_path / "one", "--steps", 3, *options)
    for steps in (3, 5):
        two = results(tmp_path / "two")
        assert two[0]["step"] == one[0]["step"] == steps
        for name, weight in one[0]["msn"].items():
            other = two[0]["msn"][name]
            if weight.ndim > 1 or "running_var" in name:
                assert (other - weight).norm() < 1e-4 * weight.norm(), name
            else:  # where gradients are rounding, AdamW makes steps of them
                torch.testing.assert_close(other, weight, rtol=0, atol=2 * steps * 2.1e-4)
        for name in ("loss", "cross_entropy", "me_max", "gradient_norm"):
            losses = [[line[name] for line in log] for _, log in (one, two)]
            assert len(losses[0]) == steps
            np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6, err_msg=name)
        if steps == 3:
            one = run(tmp_path / "one", "--steps", 5, *options)
            run(tmp_path / "two", "--steps", 5, *options)


# ---- 2. Kills and restarts


def test_a_run_killed_then_terminated_ends_as_if_nothing_had_happened(tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 12, "--k-classes", 3
    options += "--epochs", 40, "--save-every", 3, "--log-every", 4, "--focal-views", 1
    whole = run(tmp_path / "whole", *options, "--workers", 0)
    assert whole[0]["step"] == 200 and len(whole[1]) == 50  # five steps an epoch
    out, steps = tmp_path / "killed", []
    for kind in (signal.SIGKILL, signal.SIGTERM):
        process = start(ROOT / "msn.py", out, *options, "--workers", 1)
        before = steps[-1] if steps else 0
        while process.poll() is None and saved_step(out) <= before:
            time.sleep(0.02)
        time.sleep(random.random() / 2)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 0), errors
        if kind == signal.SIGTERM:  # after SIGKILL a loader worker may complain that it is alone
            assert "Traceback" not in errors
        steps.append(saved_step(out))
        assert before < steps[-1] < 200
        if kind == signal.SIGKILL:
            assert steps[-1] % 3 == 0
    assert_same_run(run(out, *options, "--workers", 1), whole)


def saved_step(out):
    path = out / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def test_three_steps_then_six_are_six(tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 15, "--log-every", 2
    whole = run(tmp_path / "whole", *options, "--steps", 6, "--workers", 0)
    first = run(tmp_path / "parts", *options, "--steps", 3, "--workers", 0)
    assert first[0]["step"] == 3 and [line["step"] for line in first[1]] == [2, 3]
    assert_same_run(run(tmp_path / "parts", *options, "--steps", 6, "--workers", 2), whole)
    assert [line["step"] for line in whole[1]] == [2, 4, 6]


def test_a_finished_run_started_again_stays_as_it_is(tmp_path):
    run(tmp_path, "--steps", 3)
    before = hashes(tmp_path)
    run(tmp_path, "--steps", 3)
    assert hashes(tmp_path) == before


# ---- 3. Bad input


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


def assert_refused(capfd, out, options, words, stem=STEM):
    before = hashes(out)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        msn.main([*TINY, *stem, "--out", str(out), *map(str, options)])
    assert stopped.value.code == 2
    assert_complaint(capfd.readouterr().err, words)
    after = hashes(out)
    assert {name: after[name] for name in before} == before
    return after.keys() - before.keys()


WRONG = {  # options -> what the message names
    "--k-classes 1001 --batch-size 2000": ("--k-classes", 1001, 1000, "choose"),
    "--k-classes 33": ("--k-classes", 33, 32, "choose"),
    "--k-classes 0": ("--k-classes 0", "give"),
    "--k-classes -3": ("--k-classes -3", "give"),
    "--batch-size 60000": ("--batch-size", 60000, 50000, "at most"),
    "--patch-size 5": ("--patch-size 5", 32, "choose"),
    "--patch-size 8 --focal-views 2 --focal-size 12": ("--patch-size 8", 12, "choose"),
    "--heads 3": ("--heads 3", "--dim 16", "choose"),
    "--lr -1": ("--lr -1", "give"),
    "--lr nan": ("--lr nan", "give"),
    "--steps 0": ("--steps 0", "give"),
    f"--seed {10**20}": ("--seed", 10**20, "9.2e+18"),
    "--batch-size 1": ("--batch-size 1", "at least 2"),
    "--patch-drop 1.5": ("--patch-drop 1.5", "from 0 to 1"),
    "--rand-crop -1 0.5": ("--rand-crop -1", "give"),
    "--jitter nan 0 0 0": ("--jitter nan", "give"),
    "--stem 8": ("--stem [8]", "--patch-size 8", "add"),
    "--bogus 3": ("--bogus",),
    "--dim wide": ("--dim", "wide"),
    "--recipe best": ("--recipe", "best", "choose"),
    "--data /nowhere/at/all --recipe plates": (
        "--data /nowhere/at/all",
        "needs /nowhere/at/all/train/CLASS/IMAGE",
    ),
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused(options, tmp_path, capfd):
    (tmp_path / "log.jsonl").write_text('{"step": 50}\n')
    assert not assert_refused(capfd, tmp_path, options.split(), WRONG[options])


def test_the_command_line_tells_of_wrong_options_in_one_line(tmp_path):
    process = start(ROOT / "msn.py", tmp_path / "out", "--k-classes", 1001, "--batch-size", 2000)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and not output
    assert errors.startswith("msn.py: error: ") and errors.count("\n") == 1
    assert_complaint(errors, ("--k-classes", 1001, 1000, "choose"))


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    options = "--data", folder, "--recipe", "plates", "--batch-size", 31
    processes = [
        start(
            ROOT / "msn.py",
            tmp_path / "out",
            *options,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **world,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert_complaint(errors[0], ("--batch-size 31", "2 processes"))
    assert not errors[1]  # process 0 speaks for all


@pytest.mark.parametrize("kind", ["missing", "empty", "no classes", "empty classes", "a file"])
def test_folders_without_pictures_are_refused(kind, tmp_path, capfd):
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    if kind == "a file":
        data.touch()
    elif kind != "missing":
        (data / ("train/class0" if kind == "empty classes" else "train")).mkdir(parents=True)
    if kind == "no classes":
        Image.new("RGB", (8, 8)).save(data / "train/picture.png")
    words = f"--data {data}", f"needs {data}/train/CLASS/IMAGE"
    assert assert_refused(capfd, out, ("--data", data, "--recipe", "plates"), words) <= {
        str(out / "log.jsonl")
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run_and_is_named(workers, tmp_path, folder):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder, data)
    broken = data / "train/class2/broken.jpg"
    broken.write_bytes((data / "train/class2/2.jpg").read_bytes()[:300])
    options = "--data", data, "--recipe", "plates", "--workers", workers, "--batch-size", 61
    # A process of its own: workers forked from one in which a run has failed before may free that
    # run's process group, whose threads they do not have, and crash.
    process = start(ROOT / "msn.py", out, *options)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert_complaint(errors, (broken, "unreadable", "remove"))
    assert not (out / "checkpoint.pt").exists()


def test_fewer_images_than_a_batch_are_refused(tmp_path, folder, capfd):
    options = "--data", folder, "--recipe", "plates", "--batch-size", 64
    assert_refused(capfd, tmp_path, options, ("--batch-size", 64, "60 images", "at most 60"))


def test_an_out_that_is_a_file_is_refused(tmp_path, capfd):
    out = tmp_path / "file"
    out.write_text("mine")
    for path in (out, out / "below"):
        with pytest.raises(SystemExit):
            msn.main([*TINY, *STEM, "--out", str(path)])
        assert_complaint(capfd.readouterr().err, (f"--out {path}", "choose"))
        dist.destroy_process_group()
    assert out.read_text() == "mine"


class Trap:
    """An object whose loading makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_foreign_checkpoints_are_refused_and_kept(tmp_path, capfd):
    state, _ = run(tmp_path, "--steps", 2)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()

    def refuse(options, *words):
        assert not assert_refused(capfd, tmp_path, options, words)
        dist.destroy_process_group()

    for option, value, there in (
        ("--hidden", 24, 16),
        ("--k-classes", 8, None),
        ("--lr", 0.5, 0.001),
        ("--seed", 1, 0),
        ("--data", "cifar10", "plates"),
    ):
        refuse((option, value), option, value, there, path, "--out")
    path.write_bytes(whole[: len(whole) // 2])
    refuse((), path, "damaged", "--out")
    path.write_text("not a checkpoint")
    refuse((), path, "damaged", "--out")
    torch.save([1, 2, 3], path)
    refuse((), path, "damaged", "--out")
    torch.save(Trap(tmp_path / "sprung"), path)
    refuse((), path, "damaged", "--out")
    assert not (tmp_path / "sprung").exists()  # what a file holds is never run
    torch.save(state | {"options": state["options"] | {"script": "simclr"}}, path)
    refuse((), "simclr", path, "--out")
    path.write_bytes(whole)
    assert run(tmp_path, "--steps", 3)[0]["step"] == 3


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    stderr, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", stderr())
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--lr", 1e30, "--save-every", 1, "--steps", 9)
    assert stopped.value.code == 2
    errors = sys.stderr.getvalue()
    assert ("%|" in errors) == (stderr is Terminal)  # a progress bar
    assert_complaint(errors, ("not finite at step 2", "lower --lr", "1e+30"))
    assert saved_step(tmp_path) == 1


# ---- 4. Recipes, copies, data


def test_many_classes_raise_the_recipes_batch_and_never_the_given_one(tmp_path, capfd):
    args = msn.parse_args(["--k-classes", "960"])
    assert args.batch_size == 1024
    assert msn.parse_args([]).batch_size == msn.parse_args(["--k-classes", "8"]).batch_size < 129
    assert msn.parse_args(["--k-classes", "129"]).batch_size == 256
    assert msn.parse_args("--k-classes 960 --batch-size 960".split()).batch_size == 960
    assert msn.parse_args("--k-classes 960 --batch-size 64".split()).batch_size == 64
    assert msn.parse_args("--k-classes 960 --data pictures".split()).batch_size == 1024
    msn.main([*TINY, "--k-classes", "960", "--steps", "1", "--out", str(tmp_path), *STEM[:4]])
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert printed["batch_size"] == 1024 and printed["k_classes"] == 960
    state, _ = results(tmp_path)
    assert state["options"] == printed and state["step"] == 1


def test_defaults_follow_the_data_and_options_override_them():
    folder, small = msn.parse_args(["--data", "pictures"]), msn.parse_args([])
    paper = dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12, batch_size=1024)
    paper |= dict(epochs=300, num_prototypes=1024, hidden=2048, output=256, temperature=0.1)
    paper |= dict(sharpen=0.25, me_max_weight=1.0, rand_views=1, focal_views=10, focal_size=96)
    paper |= dict(lr=1e-3, weight_decay=[0.04, 0.4], ema=0.996, clip=3.0, stem=[], sinkhorn=False)
    assert {name: getattr(folder, name) for name in paper} == paper
    assert folder.recipe == "paper" and small.recipe == "plates"
    assert small.image_size == 32
    args = msn.parse_args("--data pictures --lr 0.5 --sinkhorn --jitter 1 2 3 0.5".split())
    assert args.lr == 0.5 and args.sinkhorn is True and args.jitter == [1, 2, 3, 0.5]
    assert not msn.parse_args(["--no-sinkhorn"]).sinkhorn and small.sinkhorn
    assert msn.parse_args(["--stem"]).stem == []


def test_two_files_alone_suffice_and_import_does_nothing(tmp_path):
    home, script = tmp_path / "home", "import random, sys, torch; before = torch.get_rng_state();"
    script += "import msn; assert torch.equal(torch.get_rng_state(), before);"
    script += "assert not torch.distributed.is_initialized(); "
    script += "assert not {'timm', 'matplotlib', 'sklearn'} & sys.modules.keys()"
    home.mkdir()
    for name in ("msn.py", "sampler.py"):
        shutil.copy(ROOT / name, home)
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=home, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in home.iterdir()} == {"msn.py", "sampler.py"}
    process = start(home / "msn.py", home / "out", "--steps", 2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert results(home / "out")[0]["step"] == 2


def test_a_folder_of_images_with_workers_and_focal_views(tmp_path, folder):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 16, "--epochs", 2
    options += "--focal-views", 3, "--k-classes", 4, "--flip", 0.5, "--blur", 0.5, "--grey", 0.2
    state, log = run(tmp_path / "two", *options, "--workers", 2)
    assert state["step"] == 6 and log[-1]["epoch"] == 1
    assert_same_run(run(tmp_path / "none", *options, "--workers", 0), (state, log))
    with Image.open(tmp_path / "two/views.png") as views:
        assert views.size == (2 + 8 * 34, 2 + (1 + 2 + 3) * 34)  # a row a view
    with Image.open(tmp_path / "two/prototypes.png") as prototypes:
        assert prototypes.width == 2 + 10 * 34
    without = run(tmp_path / "plain", *options, "--workers", 0, "--focal-views", 0)
    assert without[1][-1]["loss"] != log[-1]["loss"]


def test_a_long_tail_shortens_the_epoch(tmp_path, folder, capfd):
    options = "--recipe", "plates", "--data", folder, "--batch-size", 8, "--epochs", 1
    assert run(tmp_path / "all", *options)[0]["step"] == 60 // 8
    tail = run(tmp_path / "tail", *options, "--long-tail", 1.0)
    assert tail[0]["step"] == (15 + 8 + 5 + 4) // 8
    assert "--long-tail 1.0: 32 images are kept" in capfd.readouterr().out


# ---- 5. What a run leaves


def test_log_and_pictures_of_a_run(tmp_path):
    state, log = run(tmp_path, "--steps", 7, "--log-every", 3)
    assert [line["step"] for line in log] == [3, 6, 7]
    rates = {"lr", "weight_decay", "ema"}
    names = "epochs", "warmup", "start_lr", "lr", "final_lr", "weight_decay", "ema"
    recipe = {name: getattr(msn.parse_args([]), name) for name in names}
    terms = {"loss", "cross_entropy", "me_max", "entropy", "information", "gradient_norm"}
    for line in log:
        shares = {"usage", "prior"}
        assert line.keys() == {"step", "epoch", "images_per_second"} | rates | terms | shares
        assert line["prior"] == [1 / 16] * 11 and len(line["usage"]) == 11
        assert line["usage"] == sorted(line["usage"], reverse=True)
        assert min(line["usage"]) < 1 / 16 < max(line["usage"])
        assert line["epoch"] == 0 and line["images_per_second"] > 0
        loss = line["cross_entropy"] + line["me_max"]
        np.testing.assert_allclose(line["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(line["entropy"], np.log(16) - line["me_max"], rtol=1e-5)
        information = line["entropy"] - line["cross_entropy"]
        np.testing.assert_allclose(line["information"], information, rtol=1e-5)
        expected = msn.schedules(line["step"] - 1, 50_000 // 32, **recipe)
        assert {name: line[name] for name in rates} == expected
    files = {"checkpoint.pt", "log.jsonl", "views.png", "prototypes.png", "prior.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name, rows in (("views", 3), ("prototypes", 12)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.height == 2 + rows * 34
            assert np.asarray(picture).std() > 20
    for name, weight in state["encoder"].items():  # the target, which is what one evaluates
        assert torch.equal(weight, state["target"][f"encoder.{name}"])
    different = [
        not torch.equal(w, state["msn"][f"encoder.{n}"]) for n, w in state["encoder"].items()
    ]
    assert sum(different) > 20


def test_timm_takes_the_encoder_of_a_checkpoint(tmp_path):
    import timm  # slow, and of these two tests only

    state, _ = run(tmp_path, "--steps", 2, stem=["--stem", "--batch-size", "16"])
    options = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    theirs = timm.create_model("vit_tiny_patch16_224", **options)
    theirs.load_state_dict(state["encoder"])
    mine = msn.VisionTransformer(32, 8, 16, 1, 2)
    mine.load_state_dict(state["encoder"])
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(mine.eval()(images), expected, rtol=0, atol=1e-5)


def test_the_papers_encoder_has_timms_names_and_shapes():
    import timm  # slow, and of these two tests only

    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0)
        mine = msn.VisionTransformer(224, 16, 768, 12, 12)
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (mine, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 150
