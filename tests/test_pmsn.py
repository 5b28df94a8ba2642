"""pmsn.py: loss against recorded numbers, priors, processes, kills and restarts, bad input."""

import copy
import gc
import json
import multiprocessing
import shutil
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
from test_sampler import BAD_PRIORS, write_bad_prior
from torch.nn.parallel import DistributedDataParallel

import linear_eval
import msn
import pmsn
from sampler import open_prior, power_law_prior

ROOT = Path(pmsn.__file__).parent
GOLDEN = np.load(Path(__file__).parent / "golden/pmsn_loss.npz")
INPUTS = ["anchors", "targets", "prototypes"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
EXPONENTS = pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
TINY = [
    "--dim=16", "--depth=1", "--heads=2", "--hidden=16", "--output=8", "--num-prototypes=16",
    "--stem", "8", "8", "8", "--batch-size=32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Small tensors gain nothing from more threads, and lose much beside other programs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes started
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def collect_garbage():
    """Networks of past runs have threads. If a loader process of a later test frees one, which it
    has without its threads, it crashes."""
    yield
    gc.collect()


def inputs(dtype):
    return [torch.from_numpy(GOLDEN[name]).to(dtype).requires_grad_() for name in INPUTS]


def assert_golden(value, golden, dtype):
    value = value.detach().double().numpy()
    golden = np.asarray(golden)
    if dtype == torch.float64:
        np.testing.assert_allclose(value, golden, rtol=1e-9, atol=1e-12)
    elif golden.ndim == 0:
        np.testing.assert_allclose(value, golden, rtol=1e-5, atol=1e-7)
    else:
        np.testing.assert_allclose(value, golden, rtol=0, atol=1e-5 * np.abs(golden).max())


# ---- 1. Loss


@DTYPES
@EXPONENTS
def test_loss_and_gradients_are_the_recorded_ones(exponent, dtype):
    anchors, targets, prototypes = tensors = inputs(dtype)
    case = f"e{round(100 * exponent):03}"
    prior = power_law_prior(len(prototypes), exponent)
    loss, cross_entropy, kl = pmsn.pmsn_loss(*tensors, prior)
    for value, name in ((loss, "loss"), (cross_entropy, "cross_entropy"), (kl, "kl")):
        assert value.dtype == dtype
        assert_golden(value, GOLDEN[f"{case}_{name}"], dtype)
    for value, name in ((loss, "grad"), (kl, "kl_grad")):
        gradients = torch.autograd.grad(value, [anchors, prototypes], retain_graph=True)
        for gradient, of in zip(gradients, ("anchors", "prototypes")):
            assert_golden(gradient, GOLDEN[f"{case}_{name}_{of}"], dtype)
    loss.backward()
    assert targets.grad is None  # labels, not something to learn
    weighted, _, _ = pmsn.pmsn_loss(*tensors, prior, prior_weight=3.0)
    torch.testing.assert_close(weighted, cross_entropy + 3 * kl)


@DTYPES
@EXPONENTS
def test_the_reversed_divergence_is_another(exponent, dtype):
    """KL(prior || mean prediction), which another library computes under the same name."""
    anchors, targets, prototypes = tensors = inputs(dtype)
    case = f"e{round(100 * exponent):03}"
    prior = power_law_prior(len(prototypes), exponent)
    _, _, kl = pmsn.pmsn_loss(*tensors, prior)
    p_bar = pmsn.log_assignment(anchors, prototypes, 0.1).exp().mean(dim=0)
    reversed_kl = (prior * (prior.log() - p_bar.log())).sum()
    wrong = GOLDEN[f"{case}_wrong_reversed_kl"]
    assert abs(reversed_kl.item() / wrong - 1) < 1e-5  # that is what was recorded
    assert abs(kl.item() / wrong - 1) > 0.01
    (gradient,) = torch.autograd.grad(kl, anchors)
    wrong = GOLDEN[f"{case}_wrong_reversed_kl_grad_anchors"]
    assert np.linalg.norm(gradient.numpy() - wrong) > 0.1 * np.linalg.norm(wrong)


@DTYPES
@EXPONENTS
def test_sinkhorns_marginals_follow_the_prior(exponent, dtype):
    anchors, targets, prototypes = tensors = inputs(dtype)
    case = f"e{round(100 * exponent):03}"
    prior = power_law_prior(len(prototypes), exponent)
    _, cross_entropy, _ = pmsn.pmsn_loss(*tensors, prior, sinkhorn=True)
    assert_golden(cross_entropy, GOLDEN[f"{case}_sinkhorn_cross_entropy"], dtype)
    # Assignments, seen through other anchors' gradients: each row shows one assignment.
    rng = torch.Generator().manual_seed(0)
    others = torch.randn(2 * len(targets), anchors.shape[1], dtype=torch.float64, generator=rng)
    others = others.to(dtype).requires_grad_()
    _, cross_entropy, _ = pmsn.pmsn_loss(others, targets, prototypes, prior, sinkhorn=True)
    t = torch.from_numpy(GOLDEN[f"{case}_sinkhorn_assignments"]).to(dtype).repeat(2, 1)
    expected = -(t * pmsn.log_assignment(others, prototypes, 0.1)).sum(dim=1).mean()
    (expected,) = torch.autograd.grad(expected, others)
    assert_golden(torch.autograd.grad(cross_entropy, others)[0], expected.double(), dtype)


@DTYPES
@pytest.mark.parametrize("sinkhorn", [False, True])
def test_a_uniform_prior_is_msn_bit_for_bit(sinkhorn, dtype):
    for uniform in (power_law_prior(40, 0.0), open_prior("uniform", 0.25, 40)):
        results = []
        for loss, extra in ((msn.msn_loss, ()), (pmsn.pmsn_loss, (uniform,))):
            anchors, targets, prototypes = inputs(dtype)
            terms = loss(anchors, targets, prototypes, *extra, sinkhorn=sinkhorn)
            terms[0].backward()
            results.append([*terms, anchors.grad, prototypes.grad])
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine, theirs)


@DTYPES
@pytest.mark.parametrize("sinkhorn", [False, True])
def test_a_prior_of_zero_empties_its_prototype(sinkhorn, dtype):
    used = {}
    for weight in (0.0, 1.0):
        anchors, targets, prototypes = inputs(dtype)
        prior = torch.ones(40, dtype=torch.float64)
        prior[7] = weight
        prior /= prior.sum()
        with torch.no_grad():  # at the start it is the favourite
            prototypes[7] = torch.nn.functional.normalize(anchors).sum(dim=0)
        optimizer = torch.optim.Adam([anchors, prototypes], 0.01)
        used[weight] = []
        for _ in range(100):
            p_bar = pmsn.log_assignment(anchors, prototypes, 0.1).exp().mean(dim=0)
            used[weight].append(p_bar[7].item())
            loss, _, kl = pmsn.pmsn_loss(anchors, targets, prototypes, prior, sinkhorn=sinkhorn)
            optimizer.zero_grad()
            loss.backward()
            assert loss.isfinite() and anchors.grad.isfinite().all() and kl >= 0
            optimizer.step()
    assert used[0][0] == used[1][0] > 0.06
    assert used[0][-1] < 0.002 < 0.01 < used[1][-1]


# ---- 2. Options


@pytest.mark.parametrize("ending", ["txt", "npy"])
@pytest.mark.parametrize("kind", BAD_PRIORS)
def test_bad_priors_are_refused(kind, ending, tmp_path, capfd):
    path = tmp_path / f"prior.{ending}"
    write_bad_prior(kind, path)
    words = ("--prior", path, "weights")
    assert_refused(capfd, tmp_path / "out", ["--prior", f"file:{path}"], *words)


def assert_refused(capfd, out, options, *words):
    with pytest.raises(SystemExit) as stopped:
        pmsn.main([*TINY, "--out", str(out), *options])
    errors = capfd.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1, errors
    assert all(str(word) in errors for word in words), errors
    assert not (out / "checkpoint.pt").exists()


def test_wrong_options_are_refused(tmp_path, capfd):
    for options, word in (
        ("--prior zipf", "uniform"),
        ("--exponent -1", "at least 0"),
        ("--exponent nan", "at least 0"),
        ("--prior-weight -1", "at least 0"),
        ("--k-classes 1001 --batch-size 2000", "1000"),
        ("--k-classes 33", "choose"),
        ("--patch-size 5", "choose"),
        ("--data /nowhere --recipe plates", "/nowhere/train/CLASS/IMAGE"),
    ):
        option, value = options.split()[:2]
        assert_refused(capfd, tmp_path, options.split(), option, value, word)
        assert not dist.is_initialized()


def test_defaults():
    paper = pmsn.parse_args(["--data", "pictures"])
    small = pmsn.parse_args([])
    for args in (paper, pmsn.parse_args(["--recipe", "vit-s16"])):
        assert (args.prior, args.exponent, args.prior_weight) == ("power-law", 0.25, 1.0)
        assert args.sinkhorn is False  # uniform targets would fight the prior
    assert (small.prior, small.exponent) == ("power-law", 0.25)
    theirs = vars(msn.parse_args(["--data", "pictures"]))
    same = {name for name in vars(paper) if vars(paper)[name] == theirs.get(name)}
    assert vars(paper).keys() - same == {"prior", "exponent", "prior_weight", "out"}


# ---- 3. Processes


def joint_step(rank, processes):
    """Loss terms, means over processes, and gradients by this process's share of 8 images."""
    torch.manual_seed(0)
    encoder = pmsn.VisionTransformer(16, 8, 16, 1, 2, stem=[8, 8, 8])
    model = pmsn.MSN(encoder, 16, 24, 8, 12).double()
    target = copy.deepcopy(model).requires_grad_(False)
    views = [torch.rand(V, 8, 3, size, size) for V, size in ((1, 16), (2, 16), (3, 8))]
    share = slice(8 // processes * rank, 8 // processes * (rank + 1))
    target_view, *anchor_views = (x[:, share].flatten(0, 1).double() for x in views)
    parallel = DistributedDataParallel(model) if processes > 1 else model
    targets, _ = target([target_view])
    anchors, prototypes = parallel(anchor_views, torch.tensor([2, 0, 3]))
    prior = power_law_prior(12, 1.0)
    terms = pmsn.pmsn_loss(anchors, targets, prototypes, prior, prior_weight=5.0, sinkhorn=True)
    terms[0].backward()
    terms = pmsn.all_reduce_mean(torch.stack(terms).detach())
    return terms, {name: p.grad for name, p in model.named_parameters()}


def joint_steps(rank, folder):
    torch.set_num_threads(1)
    for processes in (4, 2):
        if rank < processes:
            store = dist.FileStore(f"{folder}/{processes}", processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
            torch.save(joint_step(rank, processes), f"{folder}/{processes} {rank}")
            dist.destroy_process_group()


def test_2_and_4_processes_equal_one(tmp_path):
    mp.start_processes(joint_steps, (str(tmp_path),), nprocs=4, start_method="forkserver")
    terms, gradients = joint_step(0, 1)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for processes in (2, 4):
        for rank in range(processes):
            others, theirs = torch.load(tmp_path / f"{processes} {rank}")
            torch.testing.assert_close(others, terms, rtol=1e-9, atol=0)
            for name, gradient in gradients.items():
                error = (theirs[name] - gradient).abs().max()
                assert error < 1e-9 * largest, name


# ---- 4. Runs


def results(out):
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.load(out / "checkpoint.pt", weights_only=True), log


def run(out, *options):
    pmsn.main([*TINY, f"--out={out}", *options])
    return results(out)


def assert_same_run(mine, theirs):
    """Bit by bit, but for the speed."""
    assert (mine[0]["options"], mine[0]["step"]) == (theirs[0]["options"], theirs[0]["step"])
    for part in ("pmsn", "target", "encoder"):
        for name, weight in mine[0].get(part, {}).items():
            assert torch.equal(weight, theirs[0][part][name]), name
    for line, other in zip(mine[1], theirs[1], strict=True):
        assert line | dict(images_per_second=0) == other | dict(images_per_second=0)


def test_a_run_in_three_parts_one_of_them_killed_is_the_whole_run(tmp_path):
    options = ["--long-tail=1", "--exponent=1", "--epochs=2", "--sinkhorn", "--log-every=1"]
    whole = run(tmp_path / "whole", *options)
    steps = whole[0]["step"]
    assert steps == 2 * (1000 // 32 + 5)  # 50/k images of class k: 36 batches an epoch
    out = tmp_path / "parts"
    assert run(out, *options, "--steps=3")[0]["step"] == 3
    forked = multiprocessing.get_context("forkserver")
    options_of_killed = [*options, "--save-minutes=0.00001"]  # a checkpoint after every update
    process = forked.Process(target=run, args=(out, *options_of_killed))
    process.start()
    while process.is_alive() and results(out)[0]["step"] < 9:
        time.sleep(0.02)
    process.kill()
    process.join(timeout=100)
    assert process.exitcode == -9
    assert 9 <= results(out)[0]["step"] < steps
    assert_same_run(run(out, *options), whole)


TWO = ["--k-classes=24", "--log-every=1", "--steps=3", "--exponent=1", "--lr=0.001"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which torchrun has run pmsn.py in two processes, beside sampler.py alone."""
    home = tmp_path_factory.mktemp("home")
    for name in ("pmsn.py", "sampler.py"):
        shutil.copy(ROOT / name, home)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*torchrun, "pmsn.py", *TINY, "--out=out", *TWO]
    done = subprocess.run(line, cwd=home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return home


def test_two_files_alone_suffice(home):
    assert results(home / "out")[0]["step"] == 3


def test_torchrun_of_two_equals_one_process(home, tmp_path):
    one = run(tmp_path / "one", *TWO)
    for mine, theirs in zip(results(home / "out")[1], one[1], strict=True):
        for name in ("loss", "cross_entropy", "kl", "entropy", "gradient_norm"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(mine["usage"], theirs["usage"], rtol=0.01)


def test_log_and_picture_show_use_against_prior(tmp_path):
    path = tmp_path / "prior.txt"
    path.write_text("0\n3\n" + "1\n" * 14)
    options = [f"--prior=file:{path}", "--log-every=4", "--prior-weight=2", "--lr=0.01"]
    _, log = run(tmp_path, "--steps=8", *options)
    prior = open_prior(f"file:{path}", 0.0, 16)
    for line in log:
        expected = line["cross_entropy"] + 2 * line["kl"]
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)
        assert line["kl"] > 0 and 0 < line["entropy"] < np.log(16)
        assert line["usage"] == sorted(line["usage"], reverse=True) and len(line["usage"]) == 11
        assert line["prior"][0] == float(f"{prior.max():.3g}") and line["prior"][-1] == 0
    assert [line["step"] for line in log] == [1, 2, 4, 8]  # the first lines come early
    of_steps_1_to_4 = (log[0]["kl"] + log[1]["kl"] + 2 * log[2]["kl"]) / 4
    assert of_steps_1_to_4 > log[3]["kl"]
    with Image.open(tmp_path / "prior.png") as picture:
        pixels = np.asarray(picture).reshape(-1, 3)
    assert {(255, 255, 255), (0, 0, 0), (255, 0, 0)} <= set(map(tuple, pixels))
    assert linear_eval.load_encoder(tmp_path / "checkpoint.pt").step == 8


def test_the_logged_entropy_is_that_of_the_mean_prediction(tmp_path, monkeypatch):
    """The step computes it from kl and the prior; here it is computed directly."""
    rows = []
    average = pmsn.Run.average_metrics

    def spy(run):
        rows.append(run.metrics[-1])
        return average(run)

    monkeypatch.setattr(pmsn.Run, "average_metrics", spy)
    _, log = run(tmp_path, "--steps=3", "--log-every=1", "--exponent=1")
    assert len(log) == len(rows) == 3
    for line, metrics in zip(log, rows):
        assert not any(x.requires_grad for x in metrics.values())  # no graph is kept
        usage = metrics["usage"]
        entropy = -(usage * usage.log()).sum().item()
        np.testing.assert_allclose(line["entropy"], entropy, rtol=1e-5)
        information = entropy - line["cross_entropy"]
        np.testing.assert_allclose(line["information"], information, rtol=1e-4, atol=1e-5)


def test_the_difference_to_msn_is_small():
    done = subprocess.run(["diff", "msn.py", "pmsn.py"], cwd=ROOT, capture_output=True, text=True)
    changed = done.stdout.splitlines()
    assert 0 < sum(line.startswith("<") for line in changed) <= 40
    assert 0 < sum(line.startswith(">") for line in changed) <= 40
