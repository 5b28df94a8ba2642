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
import toy
from PIL import Image
from runs import SCRIPTS
from scipy import stats

import sampler

RESULTS = tables.read_results(reproduce.DOCS / "results.jsonl")


def all_runs():
    chosen = itertools.chain(*(study() for study in reproduce.STUDIES.values()))
    runs = [*chosen, *reproduce.study_folder()]
    return {run.full_command: run for run in runs}


def parse(command):
    """A command of the study -> its options, by its script's own parser."""
    script, *options = shlex.split(command.removeprefix("python ").removeprefix("tests/mixed.py "))
    if script == "tests/toy.py":
        return toy.parse_args(options)
    return SCRIPTS[Path(script).stem].parse_args(options)


def test_commands_are_those_of_the_scripts():
    runs = all_runs()
    arms = 8 * (5 * 3 + 1)
    sweep = 4 * 2 * 4 - 4  # SimCLR at K = 24 is in the arms
    doses = 3 * 3 * 2 * 2
    longer = 5 * 2 * 2
    priors = 8 * 2 * 7
    folder = 3 * 5
    assert len(runs) == arms + sweep + doses + longer + priors + 12 * 8 + folder
    for command, run in runs.items():
        assert parse(command).seed == run.seed
    quick = {run.full_command for run in reproduce.study_quick()}
    assert len(quick) == 4 * 3 - 1 and quick <= runs.keys()


def test_the_page_of_results_shows_commands_of_the_study():
    page = (reproduce.DOCS / "results.md").read_text()
    shown = re.findall(r"^python (?!tests/reproduce.py|tests/pictures.py).*$", page, re.M)
    assert len(shown) >= 10
    for line in shown:
        assert re.sub(r" --out \S+$", "", line) in all_runs(), line


def test_arms_differ_in_k_alone_and_doses_in_their_option_alone():
    for method in tables.METHODS:
        many, few, mixed = (vars(parse(tables.arm_command(method, arm))) for arm in tables.ARMS)
        assert {name for name in many if many[name] != few[name]} == {"k_classes"}
        assert few == mixed and few["batch_size"] >= 960
    for method, (option, values) in tables.DOSES.items():
        name = option.removeprefix("--").replace("-", "_")
        plain = vars(parse(tables.arm_command(method, "K = 8")))
        assert plain[name] == values[0]
        for value in values[1:]:
            dose = vars(parse(tables.dose_command(method, value, "K = 8")))
            assert {key for key in dose if dose[key] != plain[key]} == {name}
            assert dose[name] == value


def test_longer_runs_differ_in_their_length_alone():
    for method, arm in itertools.product(tables.CONTROLS, tables.ARMS[:2]):
        commands = (tables.arm_command(method, arm), tables.longer_command(method, arm))
        plain, longer = (vars(parse(command)) for command in commands)
        changed = {name for name in plain if plain[name] != longer[name]}
        assert changed == {"epochs", "warmup"} | {"ema_anneal"} & plain.keys()
        times = [longer[name] / plain[name] for name in changed]
        np.testing.assert_allclose(times, times[0])


def test_runs_with_and_without_a_tail_differ_in_the_tail_alone():
    """And have the same number of images."""
    for name in tables.PRIORS:
        balanced, tail = (vars(parse(tables.prior_command(name, data))) for data in tables.DATA)
        assert {key for key in tail if balanced[key] != tail[key]} == {"long_tail", "recipe"}
    assert sum(sampler.long_tailed_sizes(1.0, seed=0)) == 150_000
    prior = sampler.power_law_prior(parse("msn.py").num_prototypes, 1)
    assert round(np.exp(stats.entropy(prior))) == tables.FEWER


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
            words = ["linear_eval_plates", target, *["20-per-class"] * ("20-per-class" in options)]
            file = log / f"{'_'.join(words)}.json"
            if "--out" in options:
                file = Path(options[options.index("--out") + 1])
            head = dict(top1=60.0, targets=[50.0, 60.0, 70.0], feature="patches")
            heads = [head, head | dict(top1=58.0, feature="cls"), head | dict(top1=57.0)]
            found = dict(best=head, heads=heads, untrained_heads=None)
            if "--knn" in options:
                found["knn"] = 33.0
            if "--no-untrained" not in options:
                found["untrained_heads"] = [head | dict(top1=40.0), head]
            file.write_text(json.dumps(found))
        elif script == "tests/distances.py":
            (log / "distances.json").write_text(json.dumps(dict(embedding=dict(image=0.5))))
        else:
            (log / "checkpoint.pt").touch()
            (log / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(reproduce, "call", Calls())
    return reproduce.call


def test_finished_runs_are_skipped_and_failed_ones_are_told(tmp_path, calls, capsys):
    results = tmp_path / "results.jsonl"
    options = ["--quick", "--results", str(results), "--out", str(tmp_path)]
    calls.fails = "mae.py --k-classes 960"
    assert reproduce.main([*options, "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    assert "python mae.py --k-classes 960 --seed 0: it failed" in printed.err + printed.out
    lines = tables.read_results(results)
    assert len(lines) == 10
    assert not any("mae.py --k-classes 960 " in line["command"] for line in lines)
    calls.commands.clear()
    calls.fails = "nothing"
    with results.open("a") as file:
        file.write('{"command": "python half a li')  # a kill
    assert reproduce.main([*options, "--jobs", "1"]) == 0
    out = tmp_path / "mae.py_--k-classes_960_--seed_0"
    evaluation = f"linear_eval.py {out}/checkpoint.pt"
    assert calls.commands == [f"mae.py --k-classes 960 --seed 0 --out {out}", evaluation]
    assert len(tables.read_results(results)) == 11
    assert "| SimCLR | 1 | 40.0 | 60.0 | 60.0 | 60.0 | 0 |" in capsys.readouterr().out


def test_only_one_study_can_be_chosen(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.main(["--quick", "--table", "toy", "--results", str(tmp_path / "results.jsonl")])
    assert error.value.code == 2
    assert "--table: not allowed with argument --quick" in capsys.readouterr().err


def test_a_line_that_lacks_a_measure_does_not_count():
    run = reproduce.Run("msn.py", 0, ("digits", "size, untrained too"))
    line = dict(command="python msn.py --seed 0", digits={}, size={})
    assert not reproduce.is_done(run, [line])
    assert reproduce.is_done(run, [line, line | {"size untrained": {}}])


def test_a_line_has_all_numbers(tmp_path, calls):
    results = tmp_path / "results.jsonl"
    secondary = ("count", "size", "number")
    run = reproduce.arm_run("msn", "K = 960", 3, secondary)
    reproduce.perform(run, tmp_path, results, threads=1, pictures=None)
    run = reproduce.arm_run("simclr", "K = 8, mixed", 3, secondary)
    reproduce.perform(run, tmp_path, results, threads=1, pictures=None)
    run = reproduce.Run("simclr.py --data EMOJI", 0, ("class",))
    reproduce.perform(run, tmp_path, results, threads=1, pictures="/folder/of/pictures")
    assert calls.commands[-2].startswith("simclr.py --data /folder/of/pictures --seed 0 --out")
    line, mixed, emoji = tables.read_results(results)
    assert line["command"] == "python msn.py --k-classes 960 --seed 3" and line["seed"] == 3
    assert line["commit"] == reproduce.git("rev-parse", "--short", "HEAD") != ""
    assert line["threads"] == 1 and line["seconds"] >= 0 and not line["continued"]
    assert line["last_log_line"] == dict(step=2, loss=0.5)
    assert line["digits"]["top1"] == 60 and line["digits untrained"]["top1"] == 40
    assert line["digits"]["features"] == dict(patches=60, cls=58)
    assert line["size"]["targets"] == [50, 60, 70]
    assert line["number"]["top1"] == 60 and line["neighbours"]["top1"] == 33
    assert line["prototypes"]["used"] == 3 and line["distances"]["embedding"]["image"] == 0.5
    assert mixed["command"] == "python tests/mixed.py simclr.py --k-classes 8 --seed 3"
    assert "distances" in mixed and "digits untrained" not in mixed
    assert emoji["command"] == "python simclr.py --data EMOJI --seed 0"
    assert emoji["class"]["top1"] == 60 and emoji["class untrained"]["top1"] == 40


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
    mixed = reproduce.Run("tests/mixed.py msn.py --k-classes 8", 1, ())
    assert reproduce.expected_minutes(mixed, [line]) == reproduce.MINUTES["msn"]


# ---- Statistics
def test_intervals_and_pairs():
    numbers = [1.0, 4.0, 2.0, 7.0]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(numbers), scale=stats.sem(numbers))
    mean, half = tables.interval(numbers)
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert tables.cell(numbers) == f"3.5 ± {half:.1f}"
    assert tables.cell([3.25], sign=True) == "+3.2" and tables.cell([]) == ""
    assert tables.paired({0: 1, 1: 5, 3: 2}, {1: 7, 0: 4, 2: 9}) == [3, 2]


def test_holm_and_collapses():
    np.testing.assert_allclose(tables.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(tables.holm([0.5, 0.001, 0.9]), [1, 0.003, 1])
    for numbers, said in {
        (9, 20, 5, 0.001): "supported",
        (-1, 20, 5, 0.001): "undecided",  # the controls gained
        (9, 4, 5, 0.1): "refuted",
        (9, 8, 9, 0.06): "undecided",
        (9, -20, 5, 0.001): "refuted",
    }.items():
        assert tables.verdict(*numbers) == said
    assert tables.verdict_of_controls(-3, 5) == "hardly affected"
    assert tables.verdict_of_controls(-3, 8) == "undecided"
    assert tables.verdict_of_controls(-25, 4) == "affected"
    assert tables.has_collapsed(dict(last_log_line=dict(information=0.01)))
    assert not tables.has_collapsed(dict(last_log_line=dict(information=2.0)))
    assert not tables.has_collapsed(dict(last_log_line=dict(loss=0.0)))


def planted():
    """Results of which all is known. Untrained 40, K = 960 learns 50; at K = 8 SimCLR loses 20 to
    27 percent of it, the controls 0 to 7, mixed nobody anything."""
    lines = []
    for method, arm, seed in itertools.product(tables.METHODS, tables.ARMS, range(8)):
        lost = 0.01 * seed + 0.2 * (method == "simclr") if arm == "K = 8" else 0
        command = f"python {tables.arm_command(method, arm)} --seed {seed}"
        line = dict(command=command, seed=seed, last_log_line={})
        line["digits"] = dict(top1=40 + 50 * (1 - lost))
        if arm == "K = 960":
            line["digits untrained"] = dict(top1=40.0)
        lines.append(line | dict(seconds=3600.0, seconds_evaluating=360.0))
    return lines


def test_the_primary_outcome_of_planted_numbers():
    results = tables.Results(planted())
    lost = tables.shares_lost(results, "simclr")
    assert lost == pytest.approx({seed: 20.0 + seed for seed in range(8)})
    controls = 2 * [*range(8)]
    found = tables.primary(results)
    assert set(found) == {"simclr", "vicreg", "msn"}
    assert found["simclr"]["difference"] == pytest.approx(20)
    # Welch by hand.
    errors = np.var(range(8), ddof=1) / 8, np.var(controls, ddof=1) / 16
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 7 + errors[1] ** 2 / 15)
    half = stats.t.ppf(0.975, freedom) * sum(errors) ** 0.5
    assert found["simclr"]["half"] == pytest.approx(half)
    p = 2 * stats.t.sf(20 / sum(errors) ** 0.5, freedom)
    assert found["simclr"]["p"] == pytest.approx(p)
    assert found["simclr"]["adjusted"] == pytest.approx(3 * p)
    assert found["msn"]["p"] == pytest.approx(1) and found["msn"]["adjusted"] == 1
    table = tables.primary_table(results)
    supported = "< 0.001 | supported"
    assert f"| SimCLR | 8 | 23.5 ± 2.0 | +20.0 ± {half:.1f} | {supported} | +23.5 ± 2.0 |" in table
    assert "| MAE | 8 | 3.5 ± 2.0 |  |  |  | +3.5 ± 2.0 |" in table
    assert "| both, 90 % | 16 | 3.5 ± 1.0 |  |  | hardly affected |" in table
    assert "running" in tables.primary_table(tables.Results(planted()[:-1]))
    paper = tables.paper_table(results)
    assert "| SimCLR: digits | much lower | 8 | -11.8 ± 1.0 | agrees |" in paper
    assert "| MAE: digits | hardly moved | 8 | -1.8 ± 1.0 |  |" in paper
    arms = tables.arms_table(results)
    assert "| SimCLR | 8 | 40.0 ± 0.0 | 90.0 ± 0.0 | 78.2 ± 1.0 | 90.0 ± 0.0 | 24 ± 2 |" in arms
    assert "| all | 120 | 120.0 | 12.0 |" in tables.time_table(results)


def test_collapses_are_counted_and_told_apart():
    """Of MSN's eight long-tailed runs four collapse and are 30 points lower; of PMSN's none."""
    lines = []
    for name, seed in itertools.product(("MSN", "MSN, 75 prototypes", "PMSN, 1"), range(8)):
        collapsed = name == "MSN" and seed < 4
        digits = dict(top1=70.0 - 30 * collapsed, features=dict(cls=60.0 + 2 * (name == "PMSN, 1")))
        lines.append(
            dict(
                command=f"python {tables.prior_command(name, 'long-tailed')} --seed {seed}",
                seed=seed,
                last_log_line=dict(information=0.0 if collapsed else 2.0),
                digits=digits,
            )
        )
    results = tables.Results(lines)
    assert "| long-tailed | MSN | 4 of 8 |" in tables.priors_table(results)
    p = stats.fisher_exact([[4, 4], [0, 8]]).pvalue
    table = tables.priors_change_table(results)
    equal = "+0.0 ± 0.0"
    digits = f"+15.0 ± 13.4; without collapsed pairs {equal}"
    cls = "+2.0 ± 0.0; without collapsed pairs +2.0 ± 0.0"
    assert f"| PMSN, 1 | MSN |  |  |  | {digits} | {cls} | {p:.3f} |" in table
    assert f"| PMSN, 1 | MSN, 75 prototypes |  |  |  | {equal} | +2.0 ± 0.0 | 1.000 |" in table


def test_longer_controls_have_a_claim_when_all_seeds_are_there():
    """Both learn 50 points beyond 40; MAE loses 0 to 4 percent of them, data2vec 20 more."""
    lines = []
    for method, arm, seed in itertools.product(tables.CONTROLS, tables.ARMS[:2], range(5)):
        lost = seed + 20 * (method == "data2vec") if arm == "K = 8" else 0
        command = f"python {tables.longer_command(method, arm)} --seed {seed}"
        line = dict(command=command, seed=seed, last_log_line={}, digits=dict(top1=90 - lost / 2))
        lines.append(line | {"digits untrained": dict(top1=40.0)})
    table = tables.longer_table(tables.Results(lines))
    same = "40.0 ± 0.0 | 90.0 ± 0.0"
    assert f"| MAE | 5 | {same} | 89.0 ± 1.0 | -1.0 ± 1.0 | 2.0 ± 2.0 |  |" in table
    assert f"| data2vec | 5 | {same} | 79.0 ± 1.0 | -11.0 ± 1.0 | 22.0 ± 2.0 |  |" in table
    shares = [*range(5), *range(20, 25)]
    half = stats.t.ppf(0.95, 9) * stats.sem(shares)
    assert f"| both, 90 % | 10 |  |  |  |  | 12.0 ± {half:.1f} | undecided |" in table
    assert "running" in tables.longer_table(tables.Results(lines[:-1]))


def test_doses_are_compared_seed_by_seed():
    """The recipe loses 20 points at each seed, the second dose 10, 11 and 12."""
    lines = []
    for seed in range(3):
        for value, many, few in ((0.1, 90 + seed, 70 + seed), (0.2, 80, 70 - seed)):
            for arm, top1 in (("K = 960", many), ("K = 8", few)):
                command = f"python {tables.dose_command('simclr', value, arm)} --seed {seed}"
                lines.append(dict(command=command, seed=seed, digits=dict(top1=top1)))
    table = tables.doses_table(tables.Results(lines))
    assert "| `--temperature 0.1` | 3 | 91.0 ± 2.5 | 71.0 ± 2.5 | -20.0 ± 0.0 |  |" in table
    assert "| 80.0 ± 0.0 | 69.0 ± 2.5 | -11.0 ± 2.5 | +9.0 ± 2.5 |" in table


# ---- The pages
@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_of_the_pages_are_those_of_the_results(page):
    """A changed number is noticed."""
    text = (reproduce.ROOT / page).read_text()
    assert tables.fill(text, tables.Results(RESULTS)) == text
    more = [line | {"digits": dict(top1=99.0)} for line in RESULTS]
    assert tables.fill(text, tables.Results(more)) != text


def test_findings_quote_rows_of_the_tables_that_they_link_to():
    page = (reproduce.DOCS / "results.md").read_text()
    sections = {}
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        heading = re.sub(r"[^\w ]", "", section.partition("\n")[0].lower())
        rows = re.findall(r"^\|.*", section, re.M)
        sections[heading.replace(" ", "-")] = "\n".join(rows)
    findings = re.findall(r"^\d\. (.*?)(?=^\d\. |^\n)", page, re.M | re.S)
    assert len(findings) == 5
    for finding in findings:
        tables_of_it = [sections[anchor] for anchor in re.findall(r"\(#([\w-]+)\)", finding)]
        numbers = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", " ".join(finding.split()))
        assert numbers
        for number in numbers:
            assert any(f" {number} " in rows for rows in tables_of_it), number


def test_readme_shows_the_evaluation_of_the_default_run():
    line = tables.Results(RESULTS).lines["simclr.py"][0]
    digits = " ".join(f"{x:.1f}" for x in line["digits"]["targets"])
    shown = f"plates digits: {line['digits']['top1']:.1f} ({digits})"
    shown += f", untrained {line['digits untrained']['top1']:.1f} ->"
    assert shown in (reproduce.ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", tables.FIGURES)
def test_figures_are_those_of_the_results(name, tmp_path):
    """Pixel by pixel, but for what another version of matplotlib draws elsewhere."""
    tables.FIGURES[name](tables.Results(RESULTS)).savefig(tmp_path / name)
    made = np.asarray(Image.open(tmp_path / name).convert("L"), dtype=float)
    there = np.asarray(Image.open(reproduce.DOCS / name).convert("L"), dtype=float)
    assert made.shape == there.shape
    assert np.abs(made - there).mean() < 0.5
