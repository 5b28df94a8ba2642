"""tests/benchmark.py: every row can be measured, and its page follows from its results."""

import json
import statistics
import time
from pathlib import Path

import benchmark
import pytest

DOCS = Path(benchmark.__file__).parent.parent / "docs"
PROGRAMS = [  # sides that start processes; the others of these rows do the same
    ("processes-msn", "two processes"),
    ("start-up", "ours"),
    ("whole-simclr", "ours"),
]
SLOW = [name for name in benchmark.ROWS if name.startswith(("processes", "peak", "start-up"))]
SLOW += ["whole-simclr"]
ALONE = [name for name in benchmark.ROWS if not benchmark.needs_lightly(name) and name not in SLOW]
WITH_LIGHTLY = [name for name in benchmark.ROWS if benchmark.needs_lightly(name)]


def assert_measured(name):
    values = benchmark.measure(name, 1, quick=True)
    for sides in values.values():
        assert sides.keys() == benchmark.ROWS[name].sides.keys()
        assert all(len(numbers) == 1 and numbers[0] > 0 for numbers in sides.values())


@pytest.mark.parametrize("name", ALONE)
def test_a_row_is_measured(name):
    assert_measured(name)


@pytest.mark.parametrize("name, side", PROGRAMS)
def test_a_program_is_measured(name, side):
    numbers = benchmark.take_once(benchmark.in_this_process, name, side, quick=True)
    assert numbers and all(number > 0 for number in numbers.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_LIGHTLY)
def test_a_row_is_measured_with_lightly(name):
    pytest.importorskip("lightly")
    assert_measured(name)


def test_a_side_in_a_process_of_its_own_measures_as_often_as_it_is_asked():
    with benchmark.in_another_process("memory-nt-xent-512-128", "ours", quick=True) as take:
        assert all(take()["MiB"] > 0 for _ in range(2))


def test_a_side_that_ends_is_told_with_its_reason():
    with pytest.raises(RuntimeError, match="KeyError: 'theirs'"):
        with benchmark.in_another_process("sampler", "theirs", quick=True):
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
        dict(step=6, images_per_second=5.0),  # 20 images in 4 s
    ]
    assert benchmark.speed_after(2, log, batch_size=10) == 8.0


def test_a_row_measured_again_replaces_its_line_and_the_page_follows(tmp_path):
    def measured(*rows):
        benchmark.main(["--quick", "--out", str(tmp_path), "--only", *rows])
        lines = (tmp_path / "benchmarks.jsonl").read_text().splitlines()
        return {line["row"]: line for line in map(json.loads, lines)}

    first = measured("mask", "sampler")
    second = measured("mas")  # the beginning of a name
    assert list(first) == list(second) == ["sampler", "mask"]  # in the order of the rows
    assert second["sampler"] == first["sampler"]
    assert second["mask"]["rounds"] != first["mask"]["rounds"]
    assert_page_follows(tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    [(unit, sides)] = first["sampler"]["median"].items()
    assert f"| {unit} | {benchmark.number(sides['ours'])} |" in page


def assert_page_follows(folder):
    results = benchmark.read_results(folder / "benchmarks.jsonl")
    assert (folder / "benchmarks.md").read_text() == benchmark.page(results)


def test_the_page_in_docs_follows_from_its_results():
    assert_page_follows(DOCS)


def test_missing_chooses_rows_without_a_result():
    chosen = benchmark.chosen_rows(["sampler-large", "mask"], True, {"mask": {}})
    assert chosen == ["sampler-large"]


def test_a_name_chooses_its_row_and_a_beginning_all_that_have_it():
    assert benchmark.chosen_rows(["sampler"], False, {}) == ["sampler"]
    assert benchmark.chosen_rows(["sampl"], False, {}) == ["sampler", "sampler-large"]


@pytest.mark.parametrize("options", [["--only", "speed"], ["--quick"]])
def test_wrong_options_are_refused_in_a_line(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(options)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_lightly_its_rows_say_what_to_install(monkeypatch, capsys):
    find = benchmark.importlib.util.find_spec
    monkeypatch.setattr(
        benchmark.importlib.util,
        "find_spec",
        lambda name: None if name == "lightly" else find(name),
    )
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--only", "plates"])
    assert stopped.value.code == 2
    assert benchmark.INSTALL in capsys.readouterr().err
    assert benchmark.chosen_rows(["mask", "plates-data2vec"], False, {})


def test_list_has_a_line_for_each_row(capsys):
    benchmark.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*benchmark.ROWS, benchmark.TRAFFIC]


def test_a_step_that_encodes_fewer_patches_is_faster():
    sizes = dict(image_size=64, patch_size=4, dim=64, depth=3, heads=2)
    decoder = dict(decoder_dim=16, decoder_depth=1, decoder_heads=1)
    given = dict(batch_size=8, clock=time.process_time, **sizes, **decoder)
    takes = {ratio: benchmark.mask_step(ratio, **given) for ratio in (0.75, None)}
    seconds = {ratio: [] for ratio in takes}
    for _ in range(5):
        for ratio, take in takes.items():
            seconds[ratio].append(take()["s a step"])
    some, all_ = map(statistics.median, seconds.values())
    assert 0 < some < 0.7 * all_  # 65 of 257 tokens are encoded


def test_bf16_is_measured_on_short_runs():
    sides = benchmark.measure("bf16-mae", 1, quick=True)["images/s"]
    assert all(speed > 0 for [speed] in sides.values())
