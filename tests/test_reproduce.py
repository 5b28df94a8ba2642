"""tests/reproduce.py and tables.py: what is run, that it goes on where it was, the numbers."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import reproduce
import tables
import torch
import toy
from PIL import Image
from scipy import stats

import data2vec
import mae
import msn
import pmsn
import sampler
import simclr
import vicreg

SCRIPTS = {f"{script.__name__}.py": script for script in (simclr, vicreg, msn, pmsn, mae, data2vec)}
RESULTS = tables.read_results(reproduce.DOCS / "results.jsonl")


def all_runs(quick=False):
    chosen = itertools.chain(*(study(quick) for study in reproduce.STUDIES.values()))
    runs = [*chosen, *reproduce.study_folder()]
    return {run.full_command: run for run in runs}


def parse(command):
    """A command of the study -> its options, by its script's own parser."""
    _, script, *options = shlex.split(command)
    if script == "tests/toy.py":
        return toy.parse_args(options)
    return SCRIPTS[script].parse_args(options)


def test_commands_are_those_of_the_scripts():
    runs = all_runs()
    pairs = 4 * 4 + 8  # MSN's are eight
    priors = 3 * (16 + 8)
    tried = 2 * len(tables.TRIED)
    folder = 3 * len(tables.FOLDER)
    assert len(runs) == 2 * pairs + 6 + 2 * 2 * 4 + priors + 12 * 8 + tried + folder
    for command, run in runs.items():
        assert parse(command).seed == run.seed
    quick = all_runs(quick=True)
    assert len(quick) == 4 * 2 + 3 + 8 * 3 + folder and quick.keys() <= runs.keys()


def test_the_page_of_results_shows_commands_of_the_study():
    page = (reproduce.DOCS / "results.md").read_text()
    shown = re.findall(r"^python (?!tests/reproduce.py|tests/pictures.py).*$", page, re.M)
    assert len(shown) >= 15
    for line in shown:
        assert re.sub(r" --out \S+$", "", line) in all_runs(), line


def test_both_k_have_the_same_batches_but_for_k():
    for method in tables.METHODS:
        many = vars(parse(f"python {tables.k_command(method, 960)}"))
        few = vars(parse(f"python {tables.k_command(method, 8)}"))
        assert {name for name in many if many[name] != few[name]} == {"k_classes"}
        assert many["batch_size"] >= 960


def test_both_kinds_of_plates_get_as_many_steps():
    for data in tables.DATA:
        for command in tables.priors(data).values():
            args = parse(f"python {command}")
            assert args.sinkhorn and args.long_tail == (data == "long-tailed")
            images = 1173 if args.long_tail else 50_000
            epoch = images // args.batch_size
            assert 580 <= epoch * args.epochs <= 600
            assert 0.09 <= args.warmup / args.epochs <= 0.11


# ---- Running
class Calls:
    """Stands for the scripts: leaves the files that they leave. One command can be made to fail."""

    def __init__(self):
        self.commands = []
        self.fails = "nothing"

    def __call__(self, script, *options, log, threads):
        line = " ".join([script, *map(str, options)])
        self.commands.append(line)
        if self.fails in line:
            raise ValueError("it failed")
        if script == "tests/toy.py":
            options[-1].write_text(json.dumps(dict(a=1.0, b=2.0, loss=3.0)))
        elif script == "tests/prototypes.py":
            found = dict(used=3, shown=[[0] * 10] * 12)
            (log / "prototypes.json").write_text(json.dumps(found))
        elif script == "linear_eval.py":
            target = options[options.index("--target") + 1] if "--target" in options else "digits"
            file = log / f"linear_eval_plates_{target}.json"
            if "--out" in options:
                file = Path(options[options.index("--out") + 1])
            head = dict(top1=60.0, targets=[50.0, 60.0, 70.0], frequent=[61.0], rare=[59.0])
            found = dict(best=head, untrained_heads=None)
            if "--no-untrained" not in options:
                found["untrained_heads"] = [head | dict(top1=40.0), head]
            file.write_text(json.dumps(found))
        else:
            (log / "checkpoint.pt").touch()
            (log / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(reproduce, "call", Calls())
    return reproduce.call


def test_finished_runs_are_skipped_and_failed_ones_are_told(tmp_path, calls, capsys, monkeypatch):
    results = tmp_path / "results.jsonl"
    options = ["--table", "k", "--quick", "--results", str(results), "--out", str(tmp_path)]
    monkeypatch.setattr(
        reproduce,
        "plates_run",
        lambda command, seed, measures: reproduce.Run(command, seed, tables.TARGETS),
    )
    calls.fails = "mae.py --k-classes 8"
    assert reproduce.main([*options, "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    assert "python mae.py --k-classes 8 --seed 0: it failed" in printed.err + printed.out
    lines = tables.read_results(results)
    assert len(lines) == 7 and not any("mae.py --k-classes 8 " in line["command"] for line in lines)
    calls.commands.clear()
    calls.fails = "nothing"
    with results.open("a") as file:
        file.write('{"command": "python half a li')  # a kill
    assert reproduce.main([*options, "--jobs", "1"]) == 0
    out = tmp_path / "mae.py_--k-classes_8_--seed_0"
    checkpoint = f"linear_eval.py {out}/checkpoint.pt --no-untrained"
    assert calls.commands == [
        f"mae.py --k-classes 8 --seed 0 --out {out}",
        checkpoint,
        f"{checkpoint} --target count",
        f"{checkpoint} --target size",
    ]
    assert len(tables.read_results(results)) == 8
    assert "| digits | SimCLR | 1 | 60.0 | 60.0 | +0.0 |" in capsys.readouterr().out


def test_a_line_that_lacks_a_measure_does_not_count():
    run = reproduce.Run("msn.py", 0, ("digits", "size, untrained too"))
    line = dict(command="python msn.py --seed 0", digits={}, size={})
    assert not reproduce.is_done(run, [line])
    assert reproduce.is_done(run, [line, line | {"size untrained": {}}])


def test_a_line_has_all_numbers(tmp_path, calls):
    results = tmp_path / "results.jsonl"
    run = reproduce.plates_run("msn.py", 3, reproduce.UNTRAINED)
    reproduce.perform(run, tmp_path, results, threads=1, pictures=None)
    run = reproduce.Run("simclr.py --data EMOJI", 0, ("class",))
    reproduce.perform(run, tmp_path, results, threads=1, pictures="/folder/of/pictures")
    assert calls.commands[-2].startswith("simclr.py --data /folder/of/pictures --seed 0 --out")
    line, emoji = tables.read_results(results)
    assert line["command"] == "python msn.py --seed 3" and line["seed"] == 3
    assert line["commit"] == reproduce.git("rev-parse", "--short", "HEAD") != ""
    assert line["threads"] == 1 and line["seconds"] >= 0 and not line["continued"]
    assert line["last_log_line"] == dict(step=2, loss=0.5)
    assert line["digits"]["top1"] == 60 and line["digits untrained"]["top1"] == 40
    assert line["size untrained"]["targets"] == [50, 60, 70]
    assert line["prototypes"]["used"] == 3
    assert emoji["command"] == "python simclr.py --data EMOJI --seed 0"
    assert emoji["class"]["top1"] == 60 and emoji["class untrained"]["top1"] == 40


def test_a_run_in_earnest(tmp_path, few_plates):
    """The command really trains and is really evaluated, by the names that tables read."""
    results = tmp_path / "results.jsonl"
    small = "--depth 1 --dim 16 --heads 2 --hidden 16 --output 8 --num-prototypes 16 --steps 2"
    run = reproduce.Run(f"msn.py {small}", 0, ("count", "prototypes"))
    reproduce.perform(run, tmp_path, results, threads=1, pictures=None)
    (line,) = tables.read_results(results)
    assert 0 < tables.top1("count")(line) < 100
    assert line["prototypes"]["used"] <= 16 and line["last_log_line"]["step"] == 2
    assert "msn: plates" in (reproduce.run_folder(tmp_path, run) / "output.txt").read_text()


def test_a_run_on_a_folder_in_earnest(tmp_path, pictures):
    results = tmp_path / "results.jsonl"
    folder = tmp_path / "any name"
    for split in ("train", "val"):
        shutil.copytree(pictures / "train", folder / split)
    small = "--arch small --image-size 32 --hidden 16 --output 8 --batch-size 8 --steps 2"
    run = reproduce.Run(f"simclr.py --data EMOJI {small}", 0, ("class",))
    reproduce.perform(run, tmp_path, results, threads=1, pictures=str(folder))
    (line,) = tables.read_results(results)
    assert line["command"].startswith("python simclr.py --data EMOJI")
    assert 0 < tables.top1("class")(line) <= 100
    assert 0 < tables.top1("class untrained")(line) <= 100


def test_time_left_is_by_earlier_runs_of_the_command():
    run = reproduce.Run("msn.py --k-classes 8", 1, ())
    line = dict(command="python msn.py --k-classes 8 --seed 0", seconds=100, continued=False)
    line["seconds_evaluating"] = 20
    stopped = line | dict(seconds=10, continued=True)
    other = line | dict(command="python msn.py --k-classes 80 --seed 0", seconds=900)
    assert reproduce.expected_minutes(run, [line, stopped, other]) == 2
    assert reproduce.expected_minutes(run, [other]) == reproduce.MINUTES["msn"]


# ---- Statistics
def test_intervals_and_pairs():
    numbers = [1.0, 4.0, 2.0, 7.0]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(numbers), scale=stats.sem(numbers))
    mean, half = tables.interval(numbers)
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert tables.cell(numbers) == f"3.5 ± {half:.1f}"
    assert tables.cell([3.25], sign=True) == "+3.2" and tables.cell([]) == ""
    assert tables.paired({0: 1, 1: 5, 3: 2}, {1: 7, 0: 4, 2: 9}) == [3, 2]


def planted():
    """Results whose change from K = 960 to 8 is known: SimCLR -10, -12, others 0."""
    lines = []
    for method, k, seed in itertools.product(tables.METHODS, (8, 960), (0, 1)):
        drop = 10 + 2 * seed if method == "simclr" and k == 8 else 0
        line = dict(command=f"python {method}.py --k-classes {k} --seed {seed}", seed=seed)
        for target in tables.TARGETS:
            line[target] = dict(top1=90.0 + 5 * seed - drop)
        lines.append(line | dict(seconds=3600.0, seconds_evaluating=360.0))
    return lines


def test_the_table_of_planted_numbers():
    table = tables.k_table(tables.Results(planted()))
    half = stats.t.ppf(0.975, 1) * 1.0
    assert f"| digits | SimCLR | 2 | 92.5 ± {half * 2.5:.1f} | 81.5 ± " in table
    assert f"| -11.0 ± {half:.1f} |" in table
    assert table.count("| +0.0 ± 0.0 |") == 3 * 4
    assert len(table.splitlines()) == 2 + 15
    assert "| all | 20 | 20.0 | 2.0 |" in tables.time_table(tables.Results(planted()))


# ---- The pages
@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_of_the_pages_are_those_of_the_results(page):
    text = (reproduce.ROOT / page).read_text()
    assert tables.fill(text, tables.Results(RESULTS)) == text
    assert "<!-- k" in text


def test_a_changed_number_is_noticed():
    changed = json.loads(json.dumps(RESULTS))
    for line in changed:
        if "digits" in line:
            line["digits"]["top1"] += 1
    text = (reproduce.DOCS / "results.md").read_text()
    assert tables.fill(text, tables.Results(changed)) != text


@pytest.mark.parametrize("name", tables.FIGURES)
def test_figures_are_those_of_the_results(name, tmp_path):
    """Pixel by pixel, but for what another version of matplotlib draws elsewhere."""
    tables.FIGURES[name](tables.Results(RESULTS)).savefig(tmp_path / name)
    made = np.asarray(Image.open(tmp_path / name).convert("L"), dtype=float)
    there = np.asarray(Image.open(reproduce.DOCS / name).convert("L"), dtype=float)
    assert made.shape == there.shape
    assert np.abs(made - there).mean() < 0.5


def test_the_picture_of_prototypes_has_the_nearest_pictures():
    images, _ = sampler.open_data("plates", "val")
    line = next(
        line for line in RESULTS if line["command"] == "python msn.py --k-classes 8 --seed 0"
    )
    shown = np.array(line["prototypes"]["shown"])
    assert shown.shape == (12, 10) and 0 <= shown.min() and shown.max() < len(images)
    assert torch.is_tensor(images)


def test_what_the_page_says_of_k_is_in_the_results():
    page = (reproduce.DOCS / "results.md").read_text()
    results = tables.Results(RESULTS)
    _, few_digits, change = tables.k_numbers(results, "msn", "digits")
    assert f"first four pairs gave\n{tables.cell(change[:4], sign=True)}," in page
    _, few_size, _ = tables.k_numbers(results, "msn", "size")
    for method in ("simclr", "vicreg", "msn"):
        assert max(tables.k_numbers(results, method, "digits")[2]) < 0  # all pairs lose
    correlation = np.corrcoef(list(few_digits.values()), list(few_size.values()))[0, 1]
    assert correlation > 0.8  # seeds that learn few digits at K = 8 learn little size


def test_what_the_page_says_of_the_sweep_is_in_the_results():
    results = tables.Results(RESULTS)

    def digits(method, k):
        found = results.numbers(tables.k_command(method, k), tables.top1("digits"))
        return np.array([found[seed] for seed in (0, 1)])

    simclr = {k: digits("simclr", k).mean() for k in tables.SWEEP}
    assert list(simclr.values()) == sorted(simclr.values())
    assert 0.5 < simclr[2] / simclr[960] < 0.6
    assert simclr[32] - simclr[2] > 0.75 * (simclr[960] - simclr[2])
    assert simclr[960] - simclr[32] == pytest.approx(9, abs=0.5)
    by_k = np.array([digits("msn", k) for k in tables.SWEEP])  # (K, seeds)
    assert (by_k[0] == by_k.min(axis=0)).all() and (by_k[-1] == by_k.max(axis=0)).all()
    for k in tables.SWEEP:
        information = results.numbers(
            tables.k_command("msn", k), tables.at("last_log_line", "information")
        )
        for seed in (0, 1):
            collapsed = (k, seed) in [(2, 0), (128, 0)]
            assert (information[seed] < 0.02) == collapsed
            assert (digits("msn", k)[seed] < 42) == collapsed


def test_what_the_page_says_of_the_recipe_is_in_the_results():
    results = tables.Results(RESULTS)
    found = [results.numbers(command, tables.top1("digits")) for command in tables.TRIED.values()]
    for seed in tables.TRIED_SEEDS:
        recipe, *others = [digits[seed] for digits in found]
        assert len(others) == 5 and recipe > max(others)


def test_what_the_pages_say_of_priors_is_in_the_results():
    results = tables.Results(RESULTS)

    def numbers(data, name, column="digits"):
        return results.numbers(tables.priors(data)[name], tables.PRIOR_COLUMNS[column])

    gains = {}
    for exponent in ("0.25", "1"):
        name = f"PMSN, exponent {exponent}"
        gains[exponent] = tables.paired(numbers("long-tailed", "MSN"), numbers("long-tailed", name))
        balanced = tables.paired(numbers("balanced", "MSN"), numbers("balanced", name))
        mean, half = tables.interval(balanced)
        assert len(gains[exponent]) == 16 and len(balanced) == 8
        assert abs(mean) < half  # neither gains nor loses
        for column in ("of the most frequent 10%", "of the rarest 50%"):
            found = [numbers("long-tailed", other, column) for other in ("MSN", name)]
            mean, half = tables.interval(tables.paired(*found))
            assert mean > half  # both gain
        assert gains[exponent][0] < 0 < np.mean(gains[exponent])  # seed 0 alone would mislead
    page = (reproduce.DOCS / "results.md").read_text()
    assert f"\n{tables.cell(gains['1'])} points, and exponent 0.25 " in page
    assert f"exponent 0.25 {tables.cell(gains['0.25'])}. " in page
    readme = (reproduce.ROOT / "README.md").read_text()
    assert f"PMSN (exponent 1) gains {tables.cell(gains['1'])}\npoints on MSN" in readme
    deviations = [
        np.std(list(numbers("long-tailed", name).values()), ddof=1)
        for name in tables.priors("long-tailed")
    ]
    assert np.mean(deviations) == pytest.approx(10, abs=0.5)
    for data in tables.DATA:
        told = [
            np.mean(list(numbers(data, name, "information: class").values()))
            for name in tables.priors(data)
        ]
        assert told[0] > told[1] > told[2]  # prototypes tell less of the class


def test_what_the_page_says_of_real_pictures_is_in_the_results():
    results = tables.Results(RESULTS)
    found = [results.numbers(command, tables.top1("class")) for command in tables.FOLDER.values()]
    few_classes = tables.paired(found[0], found[1])
    assert len(few_classes) == 3 and max(few_classes) < 0
    for change in (few_classes, tables.paired(found[2], found[3])):
        mean, half = tables.interval(change)
        assert abs(mean) < half
