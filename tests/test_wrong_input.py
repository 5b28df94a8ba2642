"""Wrong input of many kinds: exit status 2, one line that names option, value and remedy, nothing
created, nothing overwritten. What only one method refuses is in test_runs.py, too."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from runs import SCRIPTS, TINY, each_script

import data2vec
import linear_eval
import mae
import msn
import pmsn
import sampler
import simclr
import vicreg

COMMON = "--recipe plates --batch-size 8 --workers 0 --steps 2".split()


@pytest.fixture(autouse=True)
def on_the_cpu(one_thread, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def draw_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(256, size=(20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixteen pictures of four classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(16):
        draw_picture(root / f"train/class{i % 4}/{i}.png")
        draw_picture(root / f"val/class{i % 4}/{i}.png")
    return root


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """script -> the folder of a run of two steps; it is only read."""
    folders = {}

    def folder_of(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("run")
            script.main(command_line(script, pictures, folders[script]))
        return folders[script]

    return folder_of


def command_line(script, data, out, options=()):
    views = ["--focal-views", 1] if script in (msn, pmsn) else []
    line = [*TINY[script], *COMMON, *views, "--data", data, "--out", out, *options]
    return [str(word) for word in line]


def hashes(*folders):
    """Of all files below, and of the names of all folders."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path)] = hashlib.sha256(content).hexdigest()
    return found


def assert_refused(main, line, capfd, folders, words):
    before = hashes(*folders)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"[\w.-]+: error: [^\n]+\n", printed.err), printed.err
    for word in words:
        assert str(word) in printed.err, f"{word} is not in {printed.err}"
    assert hashes(*folders) == before
    assert not dist.is_initialized()


# ---- 1. Options of training
# script, options, what the line has: option and value; a word of the remedy

WRONG = [
    # numbers that are none, or out of range
    ("simclr", "--temperature 0", "--temperature 0", "give a number above 0"),
    ("simclr", "--temperature warm", "--temperature warm", "give"),
    ("simclr", "--temperature inf", "--temperature inf", "give"),
    ("simclr", "--layers 0", "--layers 0", "at least 1"),
    ("simclr", "--layers two", "--layers two", "give a whole number"),
    ("simclr", "--hidden -16", "--hidden -16", "at least 1"),
    ("simclr", "--output 1.5", "--output 1.5", "give a whole number"),
    ("simclr", "--image-size 0", "--image-size 0", "at least 1"),
    ("simclr", "--blur 2", "--blur 2", "from 0 to 1"),
    ("simclr", "--grey -0.1", "--grey -0.1", "from 0 to 1"),
    ("simclr", "--momentum 1.1", "--momentum 1.1", "from 0 to 1"),
    ("simclr", "--trust 0", "--trust 0", "above 0"),
    ("simclr", "--warmup -1", "--warmup -1", "at least 0"),
    ("simclr", "--base-lr 0", "--base-lr 0", "above 0"),
    ("simclr", "--base-lr 1e400", "--base-lr 1e400", "above 0"),
    ("simclr", "--final-lr -0.5", "--final-lr -0.5", "at least 0"),
    ("simclr", "--weight-decay nan", "--weight-decay nan", "at least 0"),
    ("simclr", "--blur-sigma 0 1", "--blur-sigma 0", "above 0"),
    ("simclr", "--batch-size 1", "--batch-size 1", "at least 2"),
    ("simclr", "--batch-size 1e3", "--batch-size 1e3", "give a whole number"),
    ("simclr", "--epochs 0", "--epochs 0", "at least 1"),
    ("vicreg", "--sim-coeff -25", "--sim-coeff -25", "at least 0"),
    ("vicreg", "--std-coeff many", "--std-coeff many", "give a number"),
    ("vicreg", "--cov-coeff nan", "--cov-coeff nan", "at least 0"),
    ("vicreg", "--solarise 0 1.2", "--solarise 1.2", "from 0 to 1"),
    ("vicreg", "--threshold 2", "--threshold 2", "from 0 to 1"),
    ("vicreg", "--crop 0.5 1.01", "--crop 1.01", "from 0 to 1"),
    ("vicreg", "--jitter 0 0 0 -1", "--jitter -1", "at least 0"),
    ("msn", "--num-prototypes 0", "--num-prototypes 0", "at least 1"),
    ("msn", "--sharpen 0", "--sharpen 0", "above 0"),
    ("msn", "--me-max-weight -1", "--me-max-weight -1", "at least 0"),
    ("msn", "--ema 1.5", "--ema 1.5", "from 0 to 1"),
    ("msn", "--rand-views 0", "--rand-views 0", "at least 1"),
    ("msn", "--focal-views -1", "--focal-views -1", "from 0"),
    ("msn", "--noise -0.1", "--noise -0.1", "at least 0"),
    ("msn", "--clip 0", "--clip 0", "above 0"),
    ("msn", "--start-lr -1", "--start-lr -1", "at least 0"),
    ("msn", "--weight-decay 0.04 x", "--weight-decay x", "give a number"),
    ("pmsn", "--prior-weight -1", "--prior-weight -1", "at least 0"),
    ("pmsn", "--exponent -0.25", "--exponent -0.25", "at least 0"),
    ("mae", "--decoder-depth 0", "--decoder-depth 0", "at least 1"),
    ("mae", "--mask-ratio -0.5", "--mask-ratio -0.5", "from 0 to 1"),
    ("mae", "--batch-size 0", "--batch-size 0", "at least 1"),
    ("data2vec", "--beta 0", "--beta 0", "above 0"),
    ("data2vec", "--layer-scale 0", "--layer-scale 0", "above 0"),
    ("data2vec", "--ema-anneal -5", "--ema-anneal -5", "at least 0"),
    ("data2vec", "--min-block 0", "--min-block 0", "at least 1"),
    # shared options, each in some script
    ("vicreg", "--k-classes few", "--k-classes few", "give a whole number"),
    ("msn", "--long-tail -1", "--long-tail -1", "at least 0"),
    ("pmsn", "--steps 2.5", "--steps 2.5", "give a whole number"),
    ("mae", "--seed one", "--seed one", "give a whole number"),
    ("data2vec", "--workers 1.5", "--workers 1.5", "give a whole number"),
    ("vicreg", "--log-every -5", "--log-every -5", "at least 1"),
    ("msn", "--save-minutes nan", "--save-minutes nan", "above 0"),
    # too many values, too few, none, no such option
    ("simclr", "--jitter 0.8 0.8", "--jitter", "expected 4 arguments"),
    ("vicreg", "--blur 0.5", "--blur", "expected 2 arguments"),
    ("msn", "--rand-crop", "--rand-crop", "expected 2 arguments"),
    ("pmsn", "--exponent", "--exponent", "expected one argument"),
    ("simclr", "--seed 1 2", "unrecognized arguments: 2", "error"),
    ("mae", "--jitter 0.4 0.4 0.4 0.1", "unrecognized arguments: --jitter 0.4", "error"),
    ("data2vec", "--learning-rate 1", "unrecognized arguments: --learning-rate 1", "error"),
    ("mae", "--decoder 8", "ambiguous option: --decoder", "--decoder-dim, --decoder-depth"),
    ("simclr", "--bf16 yes", "unrecognized arguments: yes", "error"),
    # names
    ("simclr", "--arch vit", "--arch invalid choice: 'vit'", "choose from"),
    ("vicreg", "--recipe imagenet", "--recipe invalid choice: 'imagenet'", "choose from"),
    ("msn", "--recipe vit-b16", "--recipe invalid choice: 'vit-b16'", "choose from"),
    ("pmsn", "--prior zipf", "--prior zipf", "give power-law, uniform or file:PATH"),
    ("pmsn", "--prior file:/nowhere/prior.npy", "--prior file:/nowhere/prior.npy", "16 weights"),
    # sizes that do not fit
    ("msn", "--patch-size 5", "--patch-size 5", "choose multiples"),
    ("pmsn", "--heads 3", "--heads 3 does not divide --dim 16", "choose a divisor"),
    ("pmsn", "--stem 8", "--stem 8", "add layers"),
    ("mae", "--patch-size 64", "--patch-size 64 does not divide --image-size 32", "choose"),
    ("mae", "--decoder-heads 3", "--decoder-dim 8: --decoder-heads 3", "must divide it"),
    ("mae", "--dim 18 --heads 1", "--dim 18", "must divide it"),
    ("mae", "--mask-ratio 0.97", "--mask-ratio 0.97", "change it"),
    ("data2vec", "--top-k 9", "--top-k 9: there are --depth 2", "give at most that"),
    ("data2vec", "--num-masked 99", "--num-masked 99", "give a number from"),
    ("data2vec", "--min-block 12", "--num-masked 9", "give a number from --min-block 12"),
    ("data2vec", "--drop-path 1", "--drop-path 1", "give less"),
]  # fmt: skip
WRONG_FOR_DATA = [  # a run's folder would be refused for its other options
    ("simclr", "--batch-size 17", "--batch-size 17", "use at most 16"),
    ("vicreg", "--k-classes 5", "--k-classes 5", "choose 1 to 4"),
    ("msn", "--k-classes 3 --batch-size 2", "--k-classes 3", "choose 1 to 2"),
    ("pmsn", "--k-classes 960 --batch-size 16", "--k-classes 960", "choose 1 to 4"),
    ("mae", "--batch-size 9 --long-tail 1", "--batch-size 9", "use at most 8"),
    ("simclr", "--data /nowhere", "--data /nowhere", "needs /nowhere/train/CLASS/IMAGE"),
    ("msn", "--data plate", "--data plate", "needs plate/train/CLASS/IMAGE"),
    ("mae", "--data cifar-10", "--data cifar-10", "needs cifar-10/train/CLASS/IMAGE"),
    ("data2vec", "--data /dev/null", "--data /dev/null", "needs /dev/null/train/CLASS/IMAGE"),
    ("vicreg", "--out /dev/null/run", "--out /dev/null/run", "choose another"),
    ("pmsn", "--out /proc/run", "--out /proc/run", "choose another"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, said, remedy", WRONG)
def test_wrong_options(name, options, said, remedy, runs, pictures, tmp_path, capfd):
    """With a folder that is not there yet, and with that of a run."""
    script = SCRIPTS[name]
    for out in (tmp_path / "new", runs(script)):
        line = command_line(script, pictures, out, options.split())
        assert_refused(script.main, line, capfd, [tmp_path, runs(script), pictures], (said, remedy))


@pytest.mark.parametrize("name, options, said, remedy", WRONG_FOR_DATA)
def test_options_that_do_not_fit_the_data(name, options, said, remedy, pictures, tmp_path, capfd):
    line = command_line(SCRIPTS[name], pictures, tmp_path / "new", options.split())
    assert_refused(SCRIPTS[name].main, line, capfd, [tmp_path, pictures], (said, remedy))


RANGES = [
    ("simclr", "--crop 0.9 0.1", "--crop 0.9 0.1", "give"),
    ("msn", "--focal-crop 0.3 0.05", "--focal-crop 0.3 0.05", "give"),
    ("simclr", "--blur-sigma 2.0 0.1", "--blur-sigma 2 0.1", "give"),
    ("mae", "--dim 1000000000000", "--dim 1000000000000", "give"),
    ("simclr", f"--hidden {2**63}", f"--hidden {2**63}", "give"),
    ("vicreg", f"--out {'x' * 300}", "--out xxx", "choose another"),
    ("simclr", "--temperature 1e-300", "--temperature", "give"),
]


@pytest.mark.parametrize("name, options, said, remedy", RANGES)
def test_wrong_sizes_and_ranges_are_refused(
    name, options, said, remedy, pictures, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[name]
    line = command_line(script, pictures, tmp_path / "new", options.split())
    assert_refused(script.main, line, capfd, [tmp_path], (said, remedy))


# ---- 2. A checkpoint of other options

CONTRADICTIONS = [
    ("simclr", "--seed 1", "--seed 1", "--seed 0"),
    ("simclr", "--temperature 0.2", "--temperature 0.2", "--temperature 0.1"),
    ("simclr", "--layers 3", "--layers 3", "--layers 2"),
    ("vicreg", "--standardise", "--standardise", "--no-standardise"),
    ("vicreg", "--blur 0.1 0.2", "--blur 0.1 0.2", "--blur 0.0 0.0"),
    ("vicreg", "--k-classes 2", "--k-classes 2", "no --k-classes"),
    ("msn", "--num-prototypes 8", "--num-prototypes 8", "--num-prototypes 16"),
    ("msn", "--stem 8 4 8", "--stem 8 4 8", "--stem 8 8 8"),
    ("pmsn", "--prior uniform", "--prior uniform", "--prior power-law"),
    ("mae", "--epochs 3", "--epochs 3", "--epochs 10"),
    ("mae", "--no-norm-pix-loss", "--no-norm-pix-loss", "--norm-pix-loss"),
    ("data2vec", "--data plates", "--data plates", "--data /"),
]


@pytest.mark.parametrize("name, options, given, made", CONTRADICTIONS)
def test_options_that_contradict_the_checkpoint(
    name, options, given, made, runs, pictures, tmp_path, capfd
):
    script = SCRIPTS[name]
    out = runs(script)
    line = command_line(script, pictures, out, options.split())
    said = f"error: {given}: {out}/checkpoint.pt was made with {made}"
    assert_refused(script.main, line, capfd, [out], (said, "give that, or another --out"))


@each_script
def test_a_longer_tail_contradicts_the_checkpoint(script, runs, pictures, capfd):
    out = runs(script)
    line = command_line(script, pictures, out, ["--long-tail", 0.1])
    words = "--long-tail 0.1", "--long-tail 0.0", "give that, or another --out"
    assert_refused(script.main, line, capfd, [out, pictures], words)


# ---- 3. Folders of data


def listing(images, annotations):
    return json.dumps(dict(images=images, annotations=annotations))


ONE = dict(id=1, file_name="train/class0/0.png")
LISTINGS = {
    "no JSON": "images",
    "a list": "[]",
    "no images": '{"annotations": []}',
    "null": '{"images": null, "annotations": []}',
    "no class": listing([ONE], []),
    "no name": listing([dict(id=1)], [dict(image_id=1, category_id=2)]),
    "not text": b"\xff\xfe{}",
}
BAD_LISTINGS = {
    "none": listing([], []),
    "a class that is a word": listing([ONE], [dict(image_id=1, category_id="bird")]),
    "a class that is a fraction": listing([ONE], [dict(image_id=1, category_id=1.5)]),
    "deep": "[" * 100_000,
}


def check_listing(script, content, pictures, tmp_path, capfd):
    data = shutil.copytree(pictures, tmp_path / "data")
    content = content if isinstance(content, bytes) else content.encode()
    (data / "train2018.json").write_bytes(content)
    line = command_line(script, data, tmp_path / "out", ["--batch-size", 2])
    words = f"--data {data}", f"needs {data}/train/CLASS/IMAGE"
    assert_refused(script.main, line, capfd, [tmp_path], words)


@pytest.mark.parametrize("kind", LISTINGS)
def test_listings_of_images_that_are_broken(kind, pictures, tmp_path, capfd):
    check_listing(vicreg, LISTINGS[kind], pictures, tmp_path, capfd)


@pytest.mark.parametrize("kind", BAD_LISTINGS)
def test_odd_listings_are_refused(kind, pictures, tmp_path, capfd):
    check_listing(vicreg, BAD_LISTINGS[kind], pictures, tmp_path, capfd)


FOLDERS = {
    "nothing": lambda data: shutil.rmtree(data / "train"),
    "no classes": lambda data: [shutil.rmtree(path) for path in (data / "train").iterdir()],
    "only hidden classes": lambda data: hide_classes(data / "train"),
    "a link to nowhere": lambda data: link_to_nowhere(data / "train"),
    "an empty class": lambda data: (data / "train/class9").mkdir(),
    "a class of other files": lambda data: rename_to_text(data / "train/class2"),
}


def hide_classes(train):
    for path in train.iterdir():
        path.rename(train / f".{path.name}")


def link_to_nowhere(train):
    shutil.rmtree(train)
    train.symlink_to("/nowhere")


def rename_to_text(folder):
    for path in folder.iterdir():
        path.rename(path.with_suffix(".txt"))


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("script", [simclr, pmsn, data2vec])
def test_folders_that_are_not_as_needed(script, kind, pictures, tmp_path, capfd):
    data = shutil.copytree(pictures, tmp_path / "data")
    FOLDERS[kind](data)
    line = command_line(script, data, tmp_path / "out")
    words = [f"--data {data}", f"needs {data}/train/CLASS/IMAGE"]
    if "class" in kind and kind.startswith("a"):
        words += [f"{data}/train/class{9 if kind == 'an empty class' else 2}", "fill or remove it"]
    assert_refused(script.main, line, capfd, [tmp_path], words)


PICTURES = {
    "empty": b"",
    "text": b"<html>404</html>",
    "half": None,
    "bomb": b"P5 30000 30000 255\n",
}


@pytest.mark.parametrize("kind", PICTURES)
@each_script
def test_a_first_picture_that_cannot_be_read(script, kind, pictures, tmp_path, capfd):
    """It is found before anything is made."""
    data = shutil.copytree(pictures, tmp_path / "data")
    path = data / "train/class0/0.png"
    path.write_bytes(PICTURES[kind] if kind != "half" else path.read_bytes()[:300])
    line = command_line(script, data, tmp_path / "out")
    words = f"{path}: unreadable image", "fix or remove it"
    assert_refused(script.main, line, capfd, [tmp_path], words)


@each_script
def test_a_download_that_fails(script, tmp_path, capfd, monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("no network\nsecond line")

    monkeypatch.setattr(sampler, "CIFAR100", unreachable)
    line = command_line(script, "cifar100", tmp_path / "out")
    words = "--data cifar100: needs a download or ./data", "no network"
    assert_refused(script.main, line, capfd, [tmp_path], words)


# ---- 4. The folder of a run


def make_unwritable(kind, folder):
    """A path that cannot be a run's folder."""
    out = folder / "out"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "below a file":
        out.write_text("mine")
        return out / "run"
    elif kind == "options.json is a folder":
        (out / "options.json").mkdir(parents=True)
    elif kind == "log.jsonl is a folder":
        (out / "log.jsonl").mkdir(parents=True)
        (out / "options.json").touch()
    elif kind == "checkpoint.pt is a folder":
        (out / "checkpoint.pt").mkdir(parents=True)
    else:
        out.symlink_to("/nowhere/at/all")
    return out


KINDS = ["a file", "below a file", "options.json is a folder", "checkpoint.pt is a folder"]


@pytest.mark.parametrize("kind", [*KINDS, "a link to nowhere"])
@pytest.mark.parametrize("script", [vicreg, msn, mae])
def test_an_out_that_cannot_be_a_run(script, kind, pictures, tmp_path, capfd):
    out = make_unwritable(kind, tmp_path)
    line = command_line(script, pictures, out)
    remedy = "change --out" if "checkpoint" in kind else f"--out {out}: not writable"
    assert_refused(script.main, line, capfd, [tmp_path], (out, remedy))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_an_out_in_a_folder_that_one_may_not_enter(pictures, tmp_path, capfd):
    (tmp_path / "closed").mkdir(mode=0o700)
    line = command_line(simclr, pictures, tmp_path / "closed/run")
    for folder in (pictures, *pictures.parents[:1], tmp_path, tmp_path.parent):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(SystemExit) as stopped:
            simclr.main(line)
    finally:
        os.seteuid(0)
    assert stopped.value.code == 2
    assert f"--out {tmp_path}/closed/run" in capfd.readouterr().err


# ---- 5. Evaluation

EVALUATIONS = [
    ("--epochs 0", "--epochs 0", "at least 1"),
    ("--rates 0", "--rates 0", "above 0"),
    ("--rates", "--rates", "expected at least one argument"),
    ("--batch-size 1", "--batch-size 1", "at least 2"),
    ("--protocol best", "--protocol invalid choice: 'best'", "choose from"),
    ("--task mnist", "--task invalid choice: 'mnist'", "choose from"),
    ("--train-fraction 2", "--train-fraction 2", "give a share"),
    ("--train-fraction 0", "--train-fraction 0", "give a share"),
    ("--knn -1", "--knn -1", "from 0"),
    ("--seed -1", "--seed -1", "from 0"),
    ("--data /nowhere", "--data /nowhere", "needs /nowhere/train/CLASS/IMAGE"),
    ("--target colour", "--target colour", "choose"),
    ("--out /dev/null/x.json", "--out /dev/null/x.json", "choose another"),
]


@pytest.mark.parametrize("options, said, remedy", EVALUATIONS)
def test_wrong_options_of_evaluation(options, said, remedy, runs, pictures, capfd):
    out = runs(simclr)
    line = [str(out / "checkpoint.pt"), "--data", str(pictures), "--workers", "0", *options.split()]
    assert_refused(linear_eval.main, line, capfd, [out, pictures], (said, remedy))


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "half"])
def test_wrong_checkpoints_of_evaluation(kind, runs, pictures, tmp_path, capfd):
    path = tmp_path / "checkpoint.pt"
    whole = (runs(simclr) / "checkpoint.pt").read_bytes()
    if kind != "missing":
        path.write_bytes(dict(empty=b"", text=b"a text", half=whole[: len(whole) // 2])[kind])
    line = [str(path), "--data", str(pictures), "--workers", "0"]
    assert_refused(linear_eval.main, line, capfd, [tmp_path], (path, "give"))
