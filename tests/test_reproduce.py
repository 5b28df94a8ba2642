"""tests/reproduce.py: what it runs, that it goes on where it was, the table it prints."""

import itertools
import json

import numpy as np
import pytest
import reproduce
import torch
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

import msn
import pmsn


@pytest.fixture
def few_drawings(monkeypatch):
    """Plates are drawn in a second, not in ten. Codes are the same, however many there are."""
    monkeypatch.setattr(reproduce, "DRAWINGS", 20)
    monkeypatch.setattr(reproduce, "TRAINING", (2, 3))
    monkeypatch.setattr(reproduce, "TEST", (2,))


def test_commands_are_those_of_the_scripts():
    modules = {"msn.py": msn, "pmsn.py": pmsn}
    for data, options in reproduce.DATA.items():
        for script, *rest in reproduce.METHODS.values():
            args = modules[script].parse_args([*options, *rest, "--seed", "2"])
            assert args.sinkhorn and args.long_tail == (data == "long-tailed")
            images = 1173 if args.long_tail else 50_000
            epoch = images // args.batch_size
            assert 770 <= epoch * args.epochs <= 780
            assert 170 <= epoch * args.warmup <= 200


def test_finished_runs_are_kept_and_the_table_is_of_what_is_there(tmp_path, monkeypatch, capsys):
    started = []

    def train_and_evaluate(command, **_):
        started.append(command)
        if "linear_eval.py" in command[1]:
            out = command[2].removesuffix("/checkpoint.pt")
            seed = float(out[-1])
            best = dict(
                targets=[50 + seed, 60, 70], frequent=[90, 90, 90], rare=[10, 10 + seed, 10]
            )
            with open(f"{out}/{reproduce.RESULT}", "w") as file:
                json.dump(dict(best=best), file)

    monkeypatch.setattr(reproduce.subprocess, "run", train_and_evaluate)
    reproduce.main(["--out", str(tmp_path), "--jobs", "1"])
    assert len(started) == 2 * 2 * 4 * 3
    printed = capsys.readouterr().out
    error = np.std([0, 1 / 3, 2 / 3], ddof=1) / 3**0.5
    row = f"| balanced | PMSN 0.5 | 3 | 60.3 ± {error:.1f} (51.0 60.0 70.0) | 90.0 ± 0.0 "
    assert row in printed and printed.count("\n") == 2 + 8
    gone = reproduce.folder(tmp_path, "balanced", "MSN", 1) / reproduce.RESULT
    gone.unlink()
    started.clear()
    reproduce.main(["--out", str(tmp_path), "--jobs", "1"])
    assert [command[-1] for command in started] == [
        str(gone.parent),
        f"{gone.parent}/checkpoint.pt",
    ]
    assert capsys.readouterr().out == printed


def test_what_prototypes_tell():
    rng = np.random.default_rng(0)
    digit = rng.integers(4, size=1000)
    noise = rng.integers(4, size=1000)
    mixed = np.where(rng.random(1000) < 0.3, noise, digit)
    share = mutual_info_score(mixed, digit) / entropy(np.bincount(digit))
    np.testing.assert_allclose(reproduce.told(mixed, digit), 100 * share)
    assert 30 < 100 * share < 60
    a = np.arange(400) // 100
    b = np.arange(400) % 4
    np.testing.assert_allclose(reproduce.told(7 - a, a), 100)
    np.testing.assert_allclose(reproduce.told(a // 2, a), 50)
    np.testing.assert_allclose(reproduce.told(a, b), 0, atol=1e-9)
    np.testing.assert_allclose(reproduce.told(0 * a, a), 0, atol=1e-9)


def test_toy_plates():
    for seed in (2, 3):
        images, a, b = reproduce.toy_plates(20, seed)
        assert len(images) == 10 * 10 * 20 and images.shape[1:] == (1, 32, 32)
        assert (10 * a + b).bincount().tolist() == [20] * 100
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), torch.zeros(2000), atol=1e-5, rtol=0)
    other, _, _ = reproduce.toy_plates(20, 2)
    assert not torch.equal(images, other)  # each seed has drawings of its own


def test_toy_draws_by_the_shares_and_in_its_form(few_drawings, monkeypatch):
    """Views are caught: a is balanced, b follows the power law, a view is of its cell's number, and
    both are of one drawing or of two."""
    images, a, b, _ = reproduce.toy_data(reproduce.TRAINING, codes=False)
    assert (2 * a + b).bincount().tolist() == [40] * 4
    flat = images.flatten(1)
    seen = []

    def step(model, target, optimizer, target_view, anchor_views, keep, prior, rates, args):
        assert args.sinkhorn and prior.shape == (2,) and len(anchor_views) == 1
        seen.append([target_view.flatten(1), anchor_views[0].flatten(1)])
        return dict(loss=torch.zeros(())), None

    monkeypatch.setattr(reproduce.pmsn, "pmsn_step", step)
    for drawings in (True, False):
        seen.clear()
        form = reproduce.PLATES | dict(drawings=drawings)
        reproduce.toy(2.0, 0, **form, steps=10)
        first, second = (torch.cat(views) for views in zip(*seen))
        found = [(view @ flat.T).abs().argmax(dim=1) for view in (first, second)]
        numbers = [2 * a[i] + b[i] for i in found]
        assert torch.equal(*numbers) and set(numbers[0].tolist()) == {0, 1, 2, 3}
        assert (a[found[0]].float().mean() - 0.5).abs() < 0.05
        assert (b[found[0]].float().mean() - 0.2).abs() < 0.05
        assert (found[0] == found[1]).float().mean() < 0.05 if drawings else torch.equal(*found)
    seen.clear()
    reproduce.toy(2.0, 0, **reproduce.CODES, noise=0.0, steps=3)
    for view, other in seen:
        assert torch.equal(view, other) and view.unique(dim=0).shape == (4, 4)
        assert (view[:, :2].sum(dim=1) == 1).all() and (view[:, 2:].sum(dim=1) == 1).all()


def test_priors_choose_the_digit(few_drawings):
    """The toy's point, in seconds: on codes the uniform prior keeps a, which the matching one
    discards, and discards b. After 300 steps every seed from 0 to 5 says so."""
    form = reproduce.CODES | dict(noise=0.5, steps=300)
    uniform = [reproduce.toy(0.0, seed, **form) for seed in (0, 1, 2)]
    matching = [reproduce.toy(reproduce.TAIL, seed, **form) for seed in (0, 1, 2)]
    assert min(a for a, _, _ in uniform) > 90 and max(b for _, b, _ in uniform) < 10
    assert max(a for a, _, _ in matching) < 50  # b is found by some seeds only: see the table


def test_toy_runs_are_kept_and_its_table_is_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "toy", lambda exponent, seed, **form: (exponent, seed, 5 - seed))
    forms = list(reproduce.FORMS)
    threads = torch.get_num_threads()
    for exponent, seed in itertools.product((0.0, 2.0), (0, 1, 2)):
        reproduce.toy_run((tmp_path, forms[1], exponent, seed))
    monkeypatch.setattr(reproduce, "toy", None)  # what is there is not run again
    reproduce.toy_run((tmp_path, forms[1], 2.0, 1))
    torch.set_num_threads(threads)
    rows = reproduce.toy_table(tmp_path).splitlines()
    assert rows[2:] == [
        f"| {forms[1]} | uniform | 3 | 0 ± 0 | 1 ± 1 | 0, 2 |",
        f"| {forms[1]} | matching | 3 | 2 ± 0 | 1 ± 1 | 2, 2 |",
    ]
