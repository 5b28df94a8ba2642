"""pmsn.py: loss against recorded numbers, also of several processes, and priors."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import DTYPES, assert_recorded, load, tensors
from runs import compute_jointly, run

import msn
import pmsn
from sampler import power_law_prior

GOLDEN = load("pmsn_loss")
EXPONENTS = pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
SINKHORN = pytest.mark.parametrize("sinkhorn", [False, True])


def inputs(dtype):
    names = ("anchors", "targets", "prototypes")
    return [x.requires_grad_() for x in tensors(GOLDEN, dtype, *names)]


def recorded(exponent, name):
    return GOLDEN[f"e{round(100 * exponent):03}_{name}"]


# ---- 1. Loss


@DTYPES
@EXPONENTS
def test_loss_and_gradients_are_the_recorded_ones(exponent, dtype):
    anchors, targets, prototypes = inputs(dtype)
    prior = power_law_prior(40, exponent)
    loss, cross_entropy, kl = pmsn.pmsn_loss(anchors, targets, prototypes, prior)
    for value, name in ((loss, "loss"), (cross_entropy, "cross_entropy"), (kl, "kl")):
        assert_recorded(value, recorded(exponent, name), dtype)
    for value, name in ((loss, "grad"), (kl, "kl_grad")):
        gradients = torch.autograd.grad(value, [anchors, prototypes], retain_graph=True)
        for gradient, of in zip(gradients, ("anchors", "prototypes")):
            assert_recorded(gradient, recorded(exponent, f"{name}_{of}"), dtype)
    loss.backward()
    assert targets.grad is None  # labels, not something to learn
    weighted, _, _ = pmsn.pmsn_loss(anchors, targets, prototypes, prior, prior_weight=3.0)
    torch.testing.assert_close(weighted, cross_entropy + 3 * kl)


@DTYPES
@EXPONENTS
def test_the_reversed_divergence_is_another(exponent, dtype):
    """KL(prior || mean prediction), which another library computes under the same name."""
    anchors, targets, prototypes = inputs(dtype)
    prior = power_law_prior(40, exponent)
    _, _, kl = pmsn.pmsn_loss(anchors, targets, prototypes, prior)
    p_bar = pmsn.log_assignment(anchors, prototypes, 0.1).exp().mean(dim=0)
    reversed_kl = (prior * (prior.log() - p_bar.log())).sum()
    wrong = recorded(exponent, "wrong_reversed_kl")
    assert abs(reversed_kl.item() / wrong - 1) < 1e-5  # that is what was recorded
    assert abs(kl.item() / wrong - 1) > 0.01
    (gradient,) = torch.autograd.grad(kl, anchors)
    wrong = recorded(exponent, "wrong_reversed_kl_grad_anchors")
    assert np.linalg.norm(gradient.numpy() - wrong) > 0.1 * np.linalg.norm(wrong)


@DTYPES
@EXPONENTS
def test_sinkhorns_marginals_follow_the_prior(exponent, dtype):
    anchors, targets, prototypes = inputs(dtype)
    prior = power_law_prior(40, exponent)
    _, cross_entropy, _ = pmsn.pmsn_loss(anchors, targets, prototypes, prior, sinkhorn=True)
    assert_recorded(cross_entropy, recorded(exponent, "sinkhorn_cross_entropy"), dtype)
    # Assignments, seen through other anchors' gradients: each row shows one assignment.
    rng = torch.Generator().manual_seed(0)
    others = torch.randn(2 * len(targets), anchors.shape[1], dtype=torch.float64, generator=rng)
    others = others.to(dtype).requires_grad_()
    _, cross_entropy, _ = pmsn.pmsn_loss(others, targets, prototypes, prior, sinkhorn=True)
    t = torch.from_numpy(recorded(exponent, "sinkhorn_assignments")).to(dtype).repeat(2, 1)
    expected = -(t * pmsn.log_assignment(others, prototypes, 0.1)).sum(dim=1).mean()
    (expected,) = torch.autograd.grad(expected, others)
    assert_recorded(torch.autograd.grad(cross_entropy, others)[0], expected, dtype)


@DTYPES
@SINKHORN
def test_a_uniform_prior_is_msn_bit_for_bit(sinkhorn, dtype):
    results = []
    for loss, extra in ((msn.msn_loss, ()), (pmsn.pmsn_loss, (power_law_prior(40, 0.0),))):
        anchors, targets, prototypes = inputs(dtype)
        terms = loss(anchors, targets, prototypes, *extra, sinkhorn=sinkhorn)
        terms[0].backward()
        results.append([*terms, anchors.grad, prototypes.grad])
    assert all(map(torch.equal, *results))


@DTYPES
@SINKHORN
def test_a_prior_of_zero_empties_its_prototype(sinkhorn, dtype):
    used = {}
    for weight in (0.0, 1.0):
        anchors, targets, prototypes = inputs(dtype)
        prior = torch.ones(40, dtype=torch.float64)
        prior[7] = weight
        prior /= prior.sum()
        with torch.no_grad():  # at the start it is the favourite
            prototypes[7] = F.normalize(anchors).sum(dim=0)
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


def joint_loss(rank, processes, sinkhorn):
    """Terms and gradients by this process's share of the recorded batch, of each view a part."""
    anchors, targets, prototypes = (x.detach() for x in inputs(torch.float64))
    targets = targets.chunk(processes)[rank]
    anchors = anchors.unflatten(0, (3, 16)).chunk(processes, dim=1)[rank].requires_grad_()
    prototypes.requires_grad_()
    terms = pmsn.pmsn_loss(
        anchors.flatten(0, 1), targets, prototypes, power_law_prior(40, 1.0), prior_weight=5.0,
        sinkhorn=sinkhorn,
    )  # fmt: skip
    terms[0].backward()
    return torch.stack(terms).detach(), anchors.grad, prototypes.grad


@SINKHORN
def test_2_and_4_processes_equal_one(sinkhorn, tmp_path):
    """Means over processes, which DDP takes of gradients; each has its own images' anchors."""
    alone = joint_loss(0, 1, sinkhorn)
    for R, workers in compute_jointly(partial(joint_loss, sinkhorn=sinkhorn), tmp_path).items():
        terms, of_anchors, of_prototypes = zip(*workers)
        joined = [sum(terms) / R, torch.cat(of_anchors, dim=1) / R, sum(of_prototypes) / R]
        for mine, expected in zip(joined, alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-14)


# ---- 2. Priors


def prior_of(*options, prototypes=16):
    return pmsn.prior_of(pmsn.parse_args([*options, f"--num-prototypes={prototypes}"]))


def test_the_prior_is_the_power_law_or_that_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "prior.txt").write_text("0 3\n1e0\t4.0\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    prior = prior_of("--prior=~/prior.txt", "--exponent=1", prototypes=4)
    assert prior.dtype == torch.float64 and prior.tolist() == [0, 0.375, 0.125, 0.5]
    assert torch.equal(prior_of(), power_law_prior(16, 0.25))
    assert torch.equal(prior_of("--exponent=1"), power_law_prior(16, 1.0))


BAD = {
    "fewer": b"1 " * 15,
    "more": b"1 " * 17,
    "empty": b"",
    "text": b"1 " * 15 + b"one",
    "negative": b"1 " * 15 + b"-1",
    "not a number": b"1 " * 15 + b"nan",
    "infinite": b"1 " * 15 + b"inf",
    "all 0": b"0 " * 16,
    "no text": b"\xff\xfe\x00",
    "missing": None,
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_priors_are_refused(kind, tmp_path, capsys):
    path = tmp_path / "prior.txt"
    if kind != "missing":
        path.write_bytes(BAD[kind])
    with pytest.raises(SystemExit) as stopped:
        prior_of(f"--prior={path}")
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1
    assert f"--prior {path}: " in errors and "give 16 weights of at least 0" in errors


def test_defaults():
    paper = pmsn.parse_args(["--data", "pictures"])
    small = pmsn.parse_args([])
    for args in (paper, small, pmsn.parse_args(["--recipe", "vit-s16"])):
        assert (args.prior, args.exponent, args.prior_weight) == (None, 0.25, 1.0)
        assert args.sinkhorn == (args is small)  # uniform targets would fight the prior
    theirs = vars(msn.parse_args(["--data", "pictures"])).items()
    others = {name for name, value in vars(paper).items() if (name, value) not in theirs}
    assert others == {"prior", "exponent", "prior_weight", "out"}


def test_a_run_follows_its_prior(few_plates, tmp_path):
    """The loss is that of the file's prior, and eight updates lead towards it."""
    path = tmp_path / "prior.txt"
    path.write_text("0\n3\n" + "1\n" * 14)
    options = [f"--prior={path}", "--log-every=1", "--prior-weight=2", "--lr=0.01"]
    _, log = run(pmsn, tmp_path / "out", *options, "--steps=8")
    for line in log:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 2 * line["kl"], rel=1e-6)
        assert line["kl"] > 0 and 0 < line["information"] < line["entropy"] < math.log(16)
    kl = [line["kl"] for line in log]
    assert len(kl) == 8 and sum(kl[:4]) > sum(kl[4:])


def test_a_run_with_a_uniform_prior_is_msns(few_plates, tmp_path):
    """To the bit, weights and log."""
    options = ["--steps=3", "--log-every=1"]
    state, log = run(pmsn, tmp_path / "pmsn", "--exponent=0", *options)
    msn_state, msn_log = run(msn, tmp_path / "msn", *options)
    for name, weight in state["encoder"].items():
        assert torch.equal(weight, msn_state["encoder"][name]), name
    assert len(log) == len(msn_log) == 3
    for line, msn_line in zip(log, msn_log):
        for name in ("loss", "cross_entropy", "entropy", "information", "gradient_norm"):
            assert line[name] == msn_line[name], name
        assert line["kl"] == msn_line["me_max"]
