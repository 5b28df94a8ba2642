"""tests/benchmark.py: every row can be measured, and its page follows from its results."""

import json
from pathlib import Path

import benchmark
import pytest

DOCS = Path(benchmark.__file__).parent.parent / "docs"
PROGRAMS = [  # sides that start processes; the others of these rows do the same
    ("processes-simclr", "two processes"),
    ("start-up", "ours"),
    ("ten-msn", "ours"),
]
SLOW = ("processes", "start-up", "whole", "ten")
QUICKLY = [name for name in benchmark.ROWS if not name.startswith(SLOW)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICKLY)
def test_a_row_is_measured(name):
    if "lightly" in benchmark.ROWS[name].sides:
        pytest.importorskip("lightly")
    for sides in benchmark.measure(name, 1, quick=True).values():
        assert sides.keys() == benchmark.ROWS[name].sides.keys()
        assert all(len(numbers) == 1 and numbers[0] > 0 for numbers in sides.values())


@pytest.mark.parametrize("name, side", PROGRAMS)
def test_a_program_is_measured(name, side):
    with benchmark.in_this_process(name, side, quick=True) as take:
        numbers = take()
    assert numbers and all(number > 0 for number in numbers.values())


def test_a_side_in_a_process_of_its_own_measures_as_often_as_it_is_asked():
    with benchmark.in_another_process("colours-plates", "ours", quick=True) as take:
        assert all(take()["ms"] > 0 for _ in range(2))


def test_why_a_side_failed_is_told():
    with pytest.raises(KeyError, match="theirs"):
        with benchmark.in_another_process("sampler-late", "theirs", quick=True):
            pass


def test_a_ratio_is_that_of_the_medians_with_the_extremes_of_the_rounds():
    values = {"images/s": {"ours": [2.0, 6.0, 4.0], "lightly": [1.0, 2.0, 8.0]}}
    summary = benchmark.summarise(values)
    assert summary["median"] == {"images/s": {"ours": 4.0, "lightly": 2.0}}
    assert summary["ratio"] == {"images/s": {"lightly": [2.0, 0.5, 3.0]}}


def test_speed_is_that_of_the_updates_after_the_discarded_ones():
    log = [
        dict(step=1, images_per_second=1.0),
        dict(step=2, images_per_second=1.0),
        dict(step=4, images_per_second=20.0),  # 20 images in 1 s
        dict(step=7, images_per_second=5.0),  # 30 images in 6 s
    ]
    assert benchmark.speed_after(2, log) == pytest.approx(50 / 7)


def test_a_row_measured_again_replaces_its_line_and_the_page_follows(tmp_path):
    def measured(*rows):
        benchmark.main(["--quick", "--out", str(tmp_path), "--only", *rows])
        lines = (tmp_path / "benchmarks.jsonl").read_text().splitlines()
        return {line["row"]: line for line in map(json.loads, lines)}

    first = measured("mask", "colours-p")
    second = measured("mas")  # the beginning of a name
    assert list(first) == list(second) == ["colours-plates", "mask"]  # in the order of the rows
    assert second["colours-plates"] == first["colours-plates"]
    assert second["mask"]["rounds"] != first["mask"]["rounds"]
    assert_page_follows(tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert f"| ms | {benchmark.number(first['colours-plates']['median']['ms']['ours'])} |" in page


def assert_page_follows(folder):
    results = benchmark.read_results(folder / "benchmarks.jsonl")
    assert (folder / "benchmarks.md").read_text() == benchmark.page(results)


def test_the_page_in_docs_follows_from_its_results():
    assert_page_follows(DOCS)


def test_rows_are_chosen_by_the_beginnings_of_their_names_and_by_what_is_missing():
    assert benchmark.chosen_rows(["colours", "mask"], True, {"colours-all": {}}) == [
        "colours-plates",
        "mask",
    ]
    assert benchmark.chosen_rows(["mask"], False, {"mask": {}}) == ["mask"]


@pytest.mark.parametrize("options", [["--only", "mask", "speed"], ["--quick"]])
def test_wrong_options_are_refused_in_a_line(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(options)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_lightly_its_rows_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--only", "plates"])
    assert stopped.value.code == 2
    assert benchmark.INSTALL in capsys.readouterr().err
    assert benchmark.chosen_rows(["mask", "plates-data2vec"], False, {})


def test_list_has_a_line_for_each_row(capsys):
    benchmark.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*benchmark.ROWS]
