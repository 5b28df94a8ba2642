"""tests/reproduce.py: what it runs, that it goes on where it was, the table it prints."""

import json

import numpy as np
import reproduce

import msn
import pmsn


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
