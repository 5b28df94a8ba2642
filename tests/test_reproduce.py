"""tests/reproduce.py: what it runs, that it goes on where it was, the table it prints."""

import itertools
import json

import numpy as np
import reproduce
import torch
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

import linear_eval
import msn
import pmsn
import sampler


def test_commands_are_those_of_the_scripts():
    for data, options in reproduce.DATA.items():
        for script, *rest in reproduce.METHODS.values():
            module = dict(zip(("msn.py", "pmsn.py"), (msn, pmsn)))[script]
            args = module.parse_args([*options, *rest, "--seed", "2"])
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


def test_toy_numbers():
    images, labels = reproduce.draw_toy([3], exponent=1.5)
    first, middle, last = labels["digits"].T
    assert len(images) == len(first) == 4 * (50 + 18 + 10 + 6) and (middle == last).all()
    joint = np.zeros((4, 4))
    np.add.at(joint, (first, last), 1)
    assert (joint == joint[0]).all()  # a is balanced, whatever b is
    power_law = sampler.power_law_prior(4, 1.5).numpy()
    np.testing.assert_allclose(joint.sum(axis=0) / joint.sum(), power_law, atol=0.006)
    _, labels = reproduce.draw_toy([3])
    assert (labels["number"].bincount()[[0, 11, 122, 333]] == 50).all()


def test_what_prototypes_tell():
    rng = np.random.default_rng(0)
    digit, noise = rng.integers(4, size=1000), rng.integers(4, size=1000)
    mixed = np.where(rng.random(1000) < 0.3, noise, digit)
    share = mutual_info_score(mixed, digit) / entropy(np.bincount(digit))
    np.testing.assert_allclose(reproduce.told(mixed, digit), 100 * share)
    assert 30 < 100 * share < 60
    a, b = np.arange(400) // 100, np.arange(400) % 4
    np.testing.assert_allclose(reproduce.told(7 - a, a), 100)
    np.testing.assert_allclose(reproduce.told(a // 2, a), 50)
    np.testing.assert_allclose(reproduce.told(a, b), 0, atol=1e-9)
    np.testing.assert_allclose(reproduce.told(0 * a, a), 0, atol=1e-9)


def test_toy_runs_are_kept_and_its_table_is_of_what_is_there(tmp_path, monkeypatch):
    sets = [reproduce.draw_toy([seed]) for seed in range(3)]
    torch.save(sets, tmp_path / "plates.pt")
    small = "--steps 2 --hidden 16 --output 8 --dim 16 --depth 1 --heads 2".split()
    monkeypatch.setattr(reproduce, "TOY", [*reproduce.TOY, *small])
    for script in (msn, pmsn, linear_eval):  # they are put back afterwards
        monkeypatch.setattr(script, "draw_plates", script.draw_plates)
    threads = torch.get_num_threads()
    reproduce.run_toy(tmp_path, "PMSN 1.5", 1)
    torch.set_num_threads(threads)
    there = reproduce.folder(tmp_path, "toy", "PMSN 1.5", 1)
    options = torch.load(there / "checkpoint.pt")["options"]
    assert options["exponent"] == 1.5 and options["num_prototypes"] == 4 and options["seed"] == 1
    found = reproduce.nearest_prototypes(there / "checkpoint.pt", sets[2][0])
    held = [reproduce.told(found, sets[2][1]["digits"][:, i].numpy()) for i in (0, 2)]
    assert json.loads((there / "prototypes.json").read_text()) == held
    best = json.loads((there / reproduce.RESULT).read_text())["heads"][0]["targets"]
    assert 15 < min(best) and max(best) <= 100
    before = (there / "checkpoint.pt").stat().st_mtime
    reproduce.run_toy(tmp_path, "PMSN 1.5", 1)
    assert (there / "checkpoint.pt").stat().st_mtime == before


def test_toy_table(tmp_path):
    for seed, method in itertools.product((0, 2), ("MSN", "PMSN 1.5")):
        there = reproduce.folder(tmp_path, "toy", method, seed)
        there.mkdir()
        heads = [dict(feature="cls4", targets=[90, 0, 80 + seed])]
        heads += [dict(feature="cls", targets=[70, 0, 60])]
        result = dict(heads=heads, untrained_heads=[dict(feature="cls", targets=[30, 0, 20])])
        (there / reproduce.RESULT).write_text(json.dumps(result))
        (there / "prototypes.json").write_text("[41.0, 2.25]")
    rows = reproduce.toy_table(tmp_path).splitlines()
    right = "70.0 ± 0.0, 60.0 ± 0.0 | 90.0 ± 0.0, 81.0 ± 1.0 |"
    assert rows[2] == f"| MSN | 2 | 41.0 ± 0.0, 2.2 ± 0.0 | {right}"
    assert rows[3] == rows[2].replace("MSN", "PMSN 1.5")
    assert rows[4].startswith("| untrained | ") and "| -, - | 30.0 ± 0.0, 20.0" in rows[4]
