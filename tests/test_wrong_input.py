"""Wrong input: exit status 2, one line that names option, value and remedy; nothing is made, and
nothing that is there is changed.

What sampler.py finds in folders, labels and K is in test_sampler.py, damaged files are in
test_faults.py, checkpoints for an evaluation in test_linear_eval.py and test_released_files.py."""

import argparse
from unittest import mock

import pytest
from runs import (
    SCRIPTS,
    assert_refused,
    each_script,
    hashes,
    on_pictures,
    saved_step,
)

import linear_eval
import sampler
import simclr

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")


# ---- 1. Each option's range

# Options of any script, by the kind of their numbers and by the range that a refusal names.
WHOLE = {
    "at least 0": "seed workers focal_views",
    "at least 1": "k_classes steps log_every epochs image_size focal_size patch_size dim depth "
    "heads hidden output layers stem num_prototypes rand_views decoder_dim decoder_depth "
    "decoder_heads num_masked min_block top_k",
    "at least 2": "batch_size",
}
REAL = {
    "at least 0": "long_tail warmup start_lr final_lr weight_decay jitter noise me_max_weight "
    "prior_weight exponent sim_coeff std_coeff cov_coeff ema_anneal position_std",
    "at least 1e-12": "save_minutes lr base_lr temperature sharpen clip trust blur_sigma beta "
    "layer_scale",
    "from 0 to 1": "crop rand_crop focal_crop flip grey blur solarise threshold patch_drop ema "
    "momentum mask_ratio drop_path attention_dropout",
}
EDGES = {  # the first and last number of each range, and numbers beyond
    "at least 0": ("0", "-1"),
    "at least 1": ("1", "0 -3"),
    "at least 2": ("2", "1"),
    "at least 1e-12": ("1e-12", "0 -1 1e-300"),
    "from 0 to 1": ("0 1", "-0.1 1.01"),
}


def limits_of(name, script):
    """Kind of an option's numbers, and how their range is said."""
    if name == "batch_size" and script.__name__ in ("mae", "data2vec"):
        return "int", "at least 1"  # the others compare images with each other
    for kind, table in (("int", WHOLE), ("float", REAL)):
        for limits, names in table.items():
            if name in names.split():
                return kind, limits
    raise KeyError(f"the tables above lack {name}")


def actions_of(script):
    """The options of a script, as argparse has them."""
    parse_args = argparse.ArgumentParser.parse_args
    parsers = []

    def spied(parser, *rest):
        parsers.append(parser)
        return parse_args(parser, *rest)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", spied):
        script.parse_args([])
    return parsers[-1]._actions


@each_script
def test_numbers_out_of_range_and_words_are_refused(script, capfd):
    tried = 0
    for action in actions_of(script):
        if action.nargs == 0 or action.dest in ("data", "recipe", "out", "arch", "prior"):
            continue
        kind, limits = limits_of(action.dest, script)
        inside, outside = (numbers.split() for numbers in EDGES[limits])
        for value in inside:
            assert action.type(value) == float(value)
        outside += ["nan", "inf"] if kind == "float" else []
        wrong = {value: f"{value}: give a number {limits}" for value in outside}
        words = ["many"] if kind == "float" else ["many", "1.5"]
        wrong |= {value: f"invalid {kind} value: '{value}'" for value in words}
        flag = action.option_strings[0]
        before = inside[:1] * (action.nargs - 1 if isinstance(action.nargs, int) else 0)
        for value, said in wrong.items():
            line = [flag, *before, value]
            assert assert_refused(capfd, script.parse_args, line) == f"argument {flag}: {said}"
            tried += 1
    assert tried > 60


# ---- 2. What does not fit together

WRONG = [
    # too many values, too few, none; no such option; names
    ("simclr", "--jitter 0.8 0.8", "argument --jitter: expected 4 arguments"),
    ("vicreg", "--blur 0.5", "argument --blur: expected 2 arguments"),
    ("pmsn", "--exponent", "argument --exponent: expected one argument"),
    ("simclr", "--seed 1 2", "unrecognized arguments: 2"),
    ("msn", "--bf16 yes", "unrecognized arguments: yes"),
    ("mae", "--jitter 0.4 0.4 0.4 0.1", "unrecognized arguments: --jitter 0.4 0.4 0.4 0.1"),
    ("mae", "--decoder 8", "ambiguous option: --decoder could match --decoder-dim, --decoder-dep"),
    ("simclr", "--arch vit", "argument --arch: invalid choice: 'vit' (choose from "),
    ("vicreg", "--recipe imagenet", "argument --recipe: invalid choice: 'imagenet' (choose from "),
    # sizes
    ("msn", "--patch-size 5", "--patch-size 5 does not divide views of [32, 16] pixels: change"),
    ("pmsn", "--focal-size 12", "--patch-size 8 does not divide views of [32, 12] pixels: change"),
    ("pmsn", "--heads 3", "--heads 3 does not divide --dim 16: choose a divisor"),
    ("msn", "--stem 8 8", "--stem of 2 layers halves 1 times, not down to --patch-size 8"),
    ("mae", "--patch-size 7", "--patch-size 7 does not divide --image-size 32: choose a divisor"),
    ("mae", "--heads 3", "--dim 16: --heads 3 and 4 (of positions) must divide it"),
    ("mae", "--dim 18", "--dim 18: --heads 2 and 4 (of positions) must divide it"),
    ("mae", "--decoder-heads 3", "--decoder-dim 8: --decoder-heads 3 and 4 (of positions) must"),
    ("mae", "--decoder-dim 6", "--decoder-dim 6: --decoder-heads 1 and 4 (of positions) must"),
    ("mae", "--mask-ratio 0.97", "--mask-ratio 0.97 of 16 patches keeps none or all: change it"),
    ("mae", "--mask-ratio 0", "--mask-ratio 0.0 of 16 patches keeps none or all: change it"),
    ("data2vec", "--patch-size 64", "--patch-size 64 does not divide --image-size 32: choose a"),
    ("data2vec", "--heads 3", "--heads 3 does not divide --dim 16: choose a divisor"),
    ("data2vec", "--top-k 9", "--top-k 9: there are --depth 2 blocks: give at most that"),
    ("data2vec", "--num-masked 16", "--num-masked 16: give a number from --min-block 2 to 15, of"),
    ("data2vec", "--num-masked 1", "--num-masked 1: give a number from --min-block 2 to 15, of 16"),
    ("data2vec", "--drop-path 1", "--drop-path 1: nothing would be left: give less"),
    ("data2vec", "--attention-dropout 1", "--attention-dropout 1: nothing would be left: give"),
    # the data: 60 pictures of 4 classes
    ("simclr", "--batch-size 61", "--batch-size 61 --k-classes None: 60 images are fewer than a "
     "batch of 61: use at most 60"),
    ("mae", "--batch-size 33 --long-tail 1", "32 images are fewer than a batch of 33: use at most"),
    ("vicreg", "--k-classes 5", "--batch-size 20 --k-classes 5: 5 classes in every batch (4 "
     "classes, batches of 20): choose 1 to 4"),
    ("pmsn", "--k-classes 3 --batch-size 2", "(4 classes, batches of 2): choose 1 to 2"),
    ("data2vec", "--data /nowhere", "--data /nowhere --batch-size 20 --k-classes None: /nowhere: "
     "needs /nowhere/train/CLASS/IMAGE (FileNotFoundError: "),
    ("msn", "--data cifar100", "cifar100: needs a download or ./data (RuntimeError: no network)"),
    # the folder of the run
    ("simclr", "--out /dev/null/run", "--out /dev/null/run: not writable ([Errno 20] Not a dir"),
    ("msn", "--out /proc/run", "--out /proc/run: not writable ("),
    ("vicreg", f"--out {'x' * 300}", "xxx: not writable ([Errno 36] File name too long"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, said", WRONG)
def test_what_does_not_fit_is_refused(name, options, said, pictures, tmp_path, monkeypatch, capfd):
    def unreachable(*_, **__):
        raise RuntimeError("no network\nsecond line")

    monkeypatch.setattr(sampler, "CIFAR100", unreachable)
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[name]
    line = [*on_pictures(script, pictures, tmp_path / "new"), *options.split()]
    assert_refused(capfd, script.main, line, said, folders=[pictures])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a file", "below a file", "a link to nowhere", "no options"])
def test_an_out_that_cannot_be_a_run(kind, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    if kind == "a link to nowhere":
        out.symlink_to("/nowhere/at/all")
    elif kind == "no options":
        (out / "options.json").mkdir(parents=True)
    else:
        out.write_text("mine")
    out = out / "run" if kind == "below a file" else out
    before = hashes(tmp_path)
    said = assert_refused(capfd, simclr.main, on_pictures(simclr, pictures, out))
    assert said.startswith(f"--out {out}: not writable (") and said.endswith("): choose another")
    assert hashes(tmp_path) == before


# ---- 3. Options that contradict a run

MADE = [  # other options, and those that the run was made with
    ("simclr", "--seed 1", "seed 0"),
    ("simclr", "--temperature 0.2 --layers 3", "temperature 0.1, layers 2"),
    ("vicreg", "--standardise", "standardise False"),
    ("vicreg", "--blur 0.1 0.2", "blur [0.0, 0.0]"),
    ("msn", "--stem 8 4 8 8 8", "stem [8, 8, 8, 8, 8]"),
    ("msn", "--k-classes 2", "k_classes None"),
    ("pmsn", "--prior prior.txt", "prior None"),
    ("mae", "--epochs 4", "epochs 3"),
    ("mae", "--no-norm-pix-loss", "norm_pix_loss True"),
    ("data2vec", "--long-tail 0.1", "images 60, long_tail 0.0"),
]


@each_script
def test_options_that_contradict_the_checkpoint(script, pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prior.txt").write_text("1 " * 16)
    line = on_pictures(script, pictures, "out")
    script.main([*line, "--steps", "1"])
    before = hashes(tmp_path)
    for name, options, made in MADE:
        if name == script.__name__:
            said = assert_refused(capfd, script.main, [*line, *options.split()])
            assert said == f"--out out: its run has {made}: give that or another --out"
            assert hashes(tmp_path) == before
    script.main([*line, "--steps", "2", "--log-every", "7", "--save-minutes", "3"])  # may change
    assert saved_step(tmp_path / "out") == 2


# ---- 4. Evaluation

EVALUATIONS = [  # that test_linear_eval.py lacks
    ("--rates", "argument --rates: expected at least one argument"),
    ("--rates 0.1 nan", "argument --rates: nan: give a number at least 1e-12"),
    ("--heads 0", "argument --heads: 0: give a number at least 1"),
    ("--seed -1", "argument --seed: -1: give a number at least 0"),
    ("--workers 1.5", "argument --workers: invalid int value: '1.5'"),
    ("--task mnist", "argument --task: invalid choice: 'mnist' (choose from "),
    ("--untrained no", "unrecognized arguments: no"),
]


@pytest.mark.parametrize("options, said", EVALUATIONS)
def test_wrong_options_of_evaluation(options, said, tmp_path, capfd):
    line = [str(tmp_path / "checkpoint.pt"), *options.split()]
    assert assert_refused(capfd, linear_eval.main, line).startswith(said)
    assert not list(tmp_path.iterdir())
