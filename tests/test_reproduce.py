"""tests/reproduce.py and tables.py: what is run, that it goes on where it was, the numbers."""

import functools
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
import toy
from PIL import Image
from runs import SCRIPTS
from scipy import stats

import sampler

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
    return SCRIPTS[Path(script).stem].parse_args(options)


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
            head = dict(top1=60.0, targets=[50.0, 60.0, 70.0])
            found = dict(best=head, untrained_heads=None)
            found |= dict(top1_per_class=[*range(1000)], class_sizes=[150] * 1000)
            if "--no-untrained" not in options:
                found["untrained_heads"] = [head | dict(top1=40.0), head]
            file.write_text(json.dumps(found))
        else:
            (log / "checkpoint.pt").touch()
            options = dict(data="plates", long_tail=float("--recipe" in options), seed=3)
            (log / "options.json").write_text(json.dumps(options))
            (log / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(reproduce, "call", Calls())
    return reproduce.call


def test_finished_runs_are_skipped_and_failed_ones_are_told(tmp_path, calls, capsys, monkeypatch):
    results = tmp_path / "results.jsonl"
    options = ["--table", "k", "--quick", "--results", str(results), "--out", str(tmp_path)]
    plain = functools.partial(reproduce.Run, measures=tables.TARGETS)
    monkeypatch.setattr(reproduce, "plates_run", lambda command, seed, _: plain(command, seed))
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
    evaluation = f"linear_eval.py {out}/checkpoint.pt --no-untrained"
    evaluations = [evaluation, f"{evaluation} --target count", f"{evaluation} --target size"]
    assert calls.commands == [f"mae.py --k-classes 8 --seed 0 --out {out}", *evaluations]
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
    assert line["digits"]["frequent"] == np.arange(100).mean()  # equal sizes: by number
    assert line["digits"]["rare"] == np.arange(500, 1000).mean()
    assert line["prototypes"]["used"] == 3
    assert emoji["command"] == "python simclr.py --data EMOJI --seed 0"
    assert emoji["class"]["top1"] == 60 and emoji["class untrained"]["top1"] == 40


def test_frequent_and_rare_classes_are_those_of_the_run(tmp_path, calls):
    """Of a long-tailed run, whose evaluation has as many images of every class."""
    assert tables.groups([10, 20, 30, 40], [5, 1, 9, 1]) == dict(frequent=30, rare=30)
    run = reproduce.Run("msn.py --recipe plates-tail", 3, ("digits",))
    reproduce.perform(run, tmp_path, tmp_path / "results.jsonl", threads=1, pictures=None)
    (line,) = tables.read_results(tmp_path / "results.jsonl")
    sizes = sampler.long_tailed_sizes(1.0, seed=3)
    frequent = [k for k in range(1000) if sizes[k] >= np.sort(sizes)[-100]]
    assert len(frequent) == 100 and line["digits"]["frequent"] == pytest.approx(np.mean(frequent))


def test_a_run_in_earnest(tmp_path, pictures):
    """The command really trains and is really evaluated, by the names that tables read. On a folder
    of few pictures, since plates take minutes."""
    results = tmp_path / "results.jsonl"
    folder = tmp_path / "any name"
    for split in ("train", "val"):
        shutil.copytree(pictures / "train", folder / split)
    small = "--dim 16 --depth 1 --heads 2 --hidden 16 --output 8 --num-prototypes 16 --steps 2 "
    small += "--image-size 32 --focal-views 0 --batch-size 8 --workers 0"
    run = reproduce.Run(f"msn.py --data EMOJI {small}", 0, ("class", "prototypes"))
    reproduce.perform(run, tmp_path, results, threads=1, pictures=str(folder))
    (line,) = tables.read_results(results)
    assert line["command"].startswith("python msn.py --data EMOJI")
    assert 0 < tables.top1("class")(line) <= 100
    assert 0 < tables.top1("class untrained")(line) <= 100
    assert 0 <= tables.top1("class", "frequent")(line) <= 100
    assert line["prototypes"]["used"] <= 16 and line["last_log_line"]["step"] == 2
    assert f"msn: {folder}" in (reproduce.run_folder(tmp_path, run) / "output.txt").read_text()


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
    """A changed number is noticed."""
    text = (reproduce.ROOT / page).read_text()
    assert tables.fill(text, tables.Results(RESULTS)) == text
    more = [line | {"digits": dict(top1=99, rare=99, frequent=99)} for line in RESULTS]
    assert tables.fill(text, tables.Results(more)) != text


def test_old_results_are_said_to_be_void():
    readme = (reproduce.ROOT / "README.md").read_text()
    _, _, table = readme.partition("<!-- k digits -->\n")
    assert table.split("\n")[0].count("(void)") == 3 and "**These\nnumbers are void**" in readme
    top = (reproduce.DOCS / "results.md").read_text().split("\n\n")[1]
    assert top.startswith("**All numbers of this page") and "void." in top and top.endswith(".**")


@pytest.mark.parametrize("name", tables.FIGURES)
def test_figures_are_those_of_the_results(name, tmp_path):
    """Pixel by pixel, but for what another version of matplotlib draws elsewhere."""
    tables.FIGURES[name](tables.Results(RESULTS)).savefig(tmp_path / name)
    made = np.asarray(Image.open(tmp_path / name).convert("L"), dtype=float)
    there = np.asarray(Image.open(reproduce.DOCS / name).convert("L"), dtype=float)
    assert made.shape == there.shape
    assert np.abs(made - there).mean() < 0.5
