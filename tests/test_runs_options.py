"""Bad input, options, recipes and copies of all six training scripts."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from runs import (
    CONVOLUTIONAL,
    LR,
    PARTS,
    ROOT,
    SCRIPTS,
    SIAMESE,
    TINY,
    Terminal,
    assert_complaint,
    command_line,
    each_script,
    hashes,
    results,
    run,
    saved_step,
    start,
)

import data2vec
import mae
import msn
import pmsn
import simclr
import vicreg

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- 1. Bad input


def assert_refused(script, capfd, out, options, words):
    """Nothing is changed and nothing created."""
    folder = out if out.exists() else out.parent
    before = hashes(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(command_line(script, out, *options))
    assert stopped.value.code == 2
    printed = capfd.readouterr()
    assert_complaint(printed.err, words)
    assert printed.out == ""
    assert hashes(folder) == before
    assert not dist.is_initialized()


WRONG = {  # options -> what the message names
    "--k-classes 1001 --batch-size 2000": ("--k-classes", 1001, 1000, "choose"),
    "--k-classes 33": ("--k-classes", 33, 32, "choose"),
    "--k-classes 0": ("--k-classes 0: give a whole number of at least 1",),
    "--k-classes -3": ("--k-classes -3", "give"),
    "--batch-size 60000": ("--batch-size", 60000, 50000, "at most"),
    "--steps 0": ("--steps 0", "give"),
    "--seed -1": ("--seed -1", "from 0"),
    f"--seed {10**20}": ("--seed", 10**20, "9.2e+18"),
    "--log-every 0": ("--log-every 0", "at least 1"),
    "--save-minutes 0": ("--save-minutes 0", "above 0"),
    "--workers -1": ("--workers -1", "from 0"),
    "--flip 1.5": ("--flip 1.5: give a number from 0 to 1",),
    "--bogus 3": ("--bogus",),
    "--recipe best": ("--recipe", "best", "choose"),
    "--data /nowhere/at/all --recipe plates": (
        "--data /nowhere/at/all",
        "needs /nowhere/at/all/train/CLASS/IMAGE",
    ),
}
TWO_OR_MORE = {"--batch-size 1": ("--batch-size 1", "at least 2")}
WRONG_OF = {
    "convolutional": TWO_OR_MORE
    | {
        "--arch resnet51": ("--arch", "resnet51", "choose"),
        "--base-lr -1": ("--base-lr -1", "give"),
        "--base-lr nan": ("--base-lr nan", "give"),
        "--crop -1 0.5": ("--crop -1", "give"),
    },
    "siamese": TWO_OR_MORE
    | {
        "--patch-size 5": ("--patch-size 5", 32, "choose"),
        "--patch-size 8 --focal-views 2 --focal-size 12": ("--patch-size 8", 12, "choose"),
        "--heads 3": ("--heads 3", "--dim 16", "choose"),
        "--dim wide": ("--dim", "wide"),
        "--lr -1": ("--lr -1: give a number above 0",),
        "--lr nan": ("--lr nan", "give"),
        "--patch-drop 1.5": ("--patch-drop 1.5: give a number from 0 to 1",),
        "--rand-crop -1 0.5": ("--rand-crop -1", "give"),
        "--jitter nan 0 0 0": ("--jitter nan", "give"),
        "--stem 8": ("--stem 8", "--patch-size 8", "add"),
    },
    "mae": {
        "--patch-size 7": ("--patch-size 7", "--image-size 32", "divisor"),
        "--dim 18": ("--dim 18", "--heads 2", "divide"),
        "--heads 3": ("--dim 16", "--heads 3", "divide"),
        "--decoder-heads 3": ("--decoder-dim 8", "--decoder-heads 3", "divide"),
        "--mask-ratio 1.5": ("--mask-ratio 1.5", "from 0 to 1"),
        "--mask-ratio 1": ("--mask-ratio 1.0", "none or all"),
        "--mask-ratio 0": ("--mask-ratio 0.0", "none or all"),
        "--base-lr -1": ("--base-lr -1", "give"),
        "--base-lr nan": ("--base-lr nan", "give"),
        "--crop -1 0.5": ("--crop -1", "give"),
    },
    "data2vec": {
        "--patch-size 7": ("--patch-size 7", "--image-size 32", "divisor"),
        "--heads 3": ("--dim 16", "--heads 3", "divisor"),
        "--top-k 3": ("--top-k 3", "--depth 2", "at most"),
        "--num-masked 16": ("--num-masked 16", "from --min-block 2 to 15"),
        "--num-masked 1": ("--num-masked 1", "from --min-block 2 to 15"),
        "--drop-path 1": ("--drop-path 1", "less"),
        "--attention-dropout 1": ("--attention-dropout 1", "less"),
        "--attention-dropout -0.1": ("--attention-dropout -0.1", "from 0 to 1"),
        "--ema 0.9 1.1": ("--ema 1.1", "from 0 to 1"),
        "--clip 0": ("--clip 0", "above 0"),
        "--lr -1": ("--lr -1: give a number above 0",),
        "--lr nan": ("--lr nan", "give"),
        "--crop -1 0.5": ("--crop -1", "give"),
    },
}
KINDS = dict(simclr="convolutional", vicreg="convolutional", msn="siamese", pmsn="siamese")
CASES = [
    (name, options, words)
    for name in SCRIPTS
    for options, words in (WRONG | WRONG_OF[KINDS.get(name, name)]).items()
]


@pytest.mark.parametrize("name, options, words", CASES)
def test_wrong_options_are_refused(name, options, words, tmp_path, capfd):
    (tmp_path / "log.jsonl").write_text('{"step": 50}\n')
    for out in (tmp_path, tmp_path / "new"):
        assert_refused(SCRIPTS[name], capfd, out, options.split(), words)
    assert not (tmp_path / "new").exists()


def test_the_command_line_complains_in_one_line(tmp_path):
    process = start(msn, tmp_path / "out", "--k-classes", 1001, "--batch-size", 2000)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and not output
    assert errors.startswith("msn.py: error: ") and errors.count("\n") == 1
    assert_complaint(errors, ("--k-classes", 1001, 1000, "choose"))
    assert not (tmp_path / "out").exists()


@each_script
@pytest.mark.parametrize("kind", ["missing", "empty", "no classes", "empty classes", "a file"])
def test_folders_without_pictures_are_refused(script, kind, tmp_path, capfd):
    data = tmp_path / "data"
    if kind == "a file":
        data.touch()
    elif kind != "missing":
        (data / ("train/class0" if kind == "empty classes" else "train")).mkdir(parents=True)
    if kind == "no classes":
        Image.new("RGB", (8, 8)).save(data / "train/picture.png")
    words = f"--data {data}", f"needs {data}/train/CLASS/IMAGE"
    options = "--data", data, "--recipe", "plates"
    assert_refused(script, capfd, tmp_path / "out", options, words)
    assert not (tmp_path / "out").exists()


@each_script
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run_and_is_named(script, workers, tmp_path, pictures, capfd):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train/class2/broken.jpg"
    broken.write_bytes((data / "train/class2/2.jpg").read_bytes()[:300])
    options = "--data", data, "--recipe", "plates", "--workers", workers, "--batch-size", 61
    with pytest.raises(SystemExit) as stopped:
        run(script, tmp_path / "out", *options)
    assert stopped.value.code == 2
    words = (f"{broken}: unreadable image (", "): fix or remove it")
    assert_complaint(capfd.readouterr().err, words)
    assert not (tmp_path / "out/checkpoint.pt").exists()
    del stopped
    gc.collect()  # ends the loader processes


@each_script
def test_fewer_images_than_a_batch_are_refused(script, tmp_path, pictures, capfd):
    options = "--data", pictures, "--recipe", "plates", "--batch-size", 64
    words = ("--batch-size", 64, "60 images", "at most 60")
    assert_refused(script, capfd, tmp_path / "out", options, words)


@each_script
def test_an_out_that_is_a_file_is_refused(script, tmp_path, capfd):
    out = tmp_path / "file"
    out.write_text("mine")
    for path in (out, out / "below"):
        assert_refused(script, capfd, path, (), (f"--out {path}", "choose"))
    assert out.read_text() == "mine"


class Trap:
    """An object whose loading makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


WIDTH = {script: ("--hidden", 24, 16) for script in (simclr, vicreg, msn, pmsn)}
WIDTH |= {script: ("--dim", 24, 16) for script in (mae, data2vec)}
OTHER = {  # an option, another value, and that of the plates' recipe
    simclr: ("--base-lr", 0.7, 0.6),
    vicreg: ("--base-lr", 0.7, 0.25),
    msn: ("--clip", 0.5, 3.0),
    pmsn: ("--clip", 0.5, 3.0),
    mae: ("--mask-ratio", 0.25, 0.5),
    data2vec: ("--beta", 0.5, 2.0),
}


@each_script
def test_foreign_checkpoints_are_refused_and_kept(script, tmp_path, capfd):
    state, _ = run(script, tmp_path, "--steps", 2)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()

    def refuse(options, *words):
        assert_refused(script, capfd, tmp_path, options, words)

    remedy = "give that, or another --out"
    for option, value, there in (WIDTH[script], OTHER[script], ("--seed", 1, 0)):
        made = f"{path} was made with {option} {there}: {remedy}"
        refuse((option, value), f"{option} {value}: {made}")
    refuse(("--k-classes", 8), f"--k-classes 8: {path} was made with no --k-classes: {remedy}")
    refuse(("--data", "cifar10"), "--data cifar10", "--data plates", path, remedy)
    option, value, there = WIDTH[script]
    two = f"{path} was made with --seed 0, {option} {there}: {remedy}"
    refuse(("--seed", 1, option, value), f"--seed 1, {option} {value}: {two}")

    path.write_bytes(whole[: len(whole) // 2])
    refuse((), path, "damaged", "--out")
    path.write_text("not a checkpoint")
    refuse((), path, "damaged", "--out")
    torch.save([1, 2, 3], path)
    refuse((), path, "damaged", "--out")
    torch.save(Trap(tmp_path / "sprung"), path)
    refuse((), path, "damaged", "--out")
    assert not (tmp_path / "sprung").exists()  # what a file holds is never run
    torch.save(state | {"options": state["options"] | {"script": "other"}}, path)
    refuse((), f"{path} is a checkpoint of other.py: choose another --out")

    path.write_bytes(whole)
    assert run(script, tmp_path, "--steps", 3)[0]["step"] == 3


@each_script
@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    script, stderr, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", stderr())
    options = (LR[script], 1e38, "--warmup", 0.001, "--save-minutes", 1e-9, "--steps", 9)
    if script is msn:
        options = ("--lr", 1e30, "--save-minutes", 1e-9, "--steps", 9)
    with pytest.raises(SystemExit) as stopped:
        run(script, tmp_path, *options)
    assert stopped.value.code == 2
    errors = sys.stderr.getvalue()
    assert ("%|" in errors) == (stderr is Terminal)  # a progress bar
    number = saved_step(tmp_path) + 1
    assert number == 2 if script is msn else number > 1
    rate = "--lr 1e+30" if script is msn else f"{LR[script]} 1e+38"
    assert_complaint(errors, (f"not finite at step {number}: lower {rate}",))
    assert number - 1 == results(tmp_path)[0]["step"]


# ---- 2. Options and copies

TRANSFORMER = dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12)
RESNET = dict(arch="resnet50", image_size=224, epochs=300, warmup=10, weight_decay=1e-6)
RESNET |= dict(momentum=0.9, trust=0.001, blur_sigma=[0.1, 2.0], crop=[0.08, 1.0], flip=0.5)
STUDY = TRANSFORMER | dict(batch_size=1024, epochs=300, num_prototypes=1024, hidden=2048)
STUDY |= dict(output=256, temperature=0.1, sharpen=0.25, rand_views=1, focal_views=10)
STUDY |= dict(focal_size=96, lr=1e-3, weight_decay=[0.04, 0.4], ema=0.996, clip=3.0, stem=[])
STUDY |= dict(sinkhorn=False)
PAPER = {
    simclr: RESNET
    | dict(batch_size=4096, base_lr=0.3, temperature=0.1, output=128, final_lr=0.0)
    | dict(jitter=[0.8, 0.8, 0.8, 0.2], grey=0.2, blur=0.5, solarise=0.0),
    vicreg: RESNET
    | dict(batch_size=2048, base_lr=0.2, hidden=8192, output=8192, final_lr=0.001)
    | dict(sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, jitter=[0.4, 0.4, 0.2, 0.1])
    | dict(blur=[1.0, 0.1], solarise=[0.0, 0.2], threshold=0.5, grey=0.2),
    msn: STUDY | dict(me_max_weight=1.0),
    pmsn: STUDY | dict(prior_weight=1.0, prior="power-law", exponent=0.25),
    mae: TRANSFORMER
    | dict(decoder_dim=512, decoder_depth=8, decoder_heads=16, mask_ratio=0.75)
    | dict(norm_pix_loss=True, crop=[0.2, 1.0], flip=0.5, batch_size=4096, epochs=800, warmup=40)
    | dict(base_lr=1.5e-4, final_lr=0.0, weight_decay=0.05, standardise=False),
    data2vec: TRANSFORMER
    | dict(layer_scale=1e-4, drop_path=0.25, attention_dropout=0.05, num_masked=120, min_block=16)
    | dict(top_k=6, beta=2.0, crop=[0.08, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.4, 0.0], clip=3.0)
    | dict(batch_size=2048, epochs=800, warmup=10.0, lr=2e-3, final_lr=1e-5, weight_decay=0.05)
    | dict(ema=[0.999, 0.9998], ema_anneal=0.0, standardise=False),
}
PLATES_BATCH = {simclr: 1024, vicreg: 1024, msn: 1024, pmsn: 1024, mae: 960, data2vec: 960}


@each_script
def test_defaults_are_the_papers_and_recipes_replace_some(script):
    folder = vars(script.parse_args(["--data", "pictures"]))
    assert {name: folder[name] for name in PAPER[script]} == PAPER[script]
    assert folder["recipe"] == "paper" and folder["save_minutes"] == 5.0
    plates = vars(script.parse_args(["--recipe", "paper"]))
    assert plates == folder | dict(data="plates", save_minutes=1.0)
    for name, recipe in script.RECIPES.items():
        assert recipe.keys() <= folder.keys()
        found = vars(script.parse_args(["--recipe", name, "--data", "pictures"]))
        assert found == folder | recipe | dict(recipe=name)

    small = script.parse_args([])
    assert small.recipe == "plates" and small.image_size == 32
    assert small.batch_size == PLATES_BATCH[script]
    if script in CONVOLUTIONAL:
        assert small.arch == "small"


@each_script
def test_many_classes_raise_the_recipes_batch_and_never_the_given_one(script):
    def batch_size(options):
        return script.parse_args(options.split()).batch_size

    assert batch_size("--k-classes 8") == batch_size("") == PLATES_BATCH[script]
    assert batch_size("--data cifar100 --k-classes 600") == 640
    assert batch_size("--data cifar100 --k-classes 600 --batch-size 64") == 64
    assert batch_size("--k-classes 960 --batch-size 960") == 960
    assert batch_size("--k-classes 960 --batch-size 64") == 64
    assert batch_size("--k-classes 960 --data pictures") == PAPER[script]["batch_size"]
    if script in SIAMESE:
        assert batch_size("--k-classes 257 --recipe plates-tail") == 384


@each_script
def test_options_are_kept_with_the_run(script, tmp_path, capfd):
    options = [*TINY[script], "--k-classes", "960", "--steps", "1", "--out", str(tmp_path)]
    at = options.index("--batch-size")
    del options[at : at + 2]
    script.main(options)
    args = vars(script.parse_args(options))
    assert args["k_classes"] == 960
    assert args["batch_size"] == PLATES_BATCH[script]
    name = script.__name__
    assert json.loads((tmp_path / "options.json").read_text()) == {"script": name} | args
    assert f"batches of {args['batch_size']:,}, K = 960 classes each;" in capfd.readouterr().out

    state, _ = results(tmp_path)
    assert state.keys() == {"options", "step", "data"} | PARTS[script]
    for free in ("out", "steps", "workers", "log_every", "save_minutes"):
        del args[free]
    assert state["options"] == {"script": name} | args and state["step"] == 1


@each_script
def test_two_files_alone_suffice_and_import_does_nothing(script, tmp_path):
    name = script.__name__
    home = tmp_path / "home"
    home.mkdir()
    for file in (f"{name}.py", "sampler.py"):
        shutil.copy(ROOT / file, home)
    code = f"""
import os, random, runpy, sys, torch
before = torch.get_rng_state()
import {name}, sampler
assert torch.equal(torch.get_rng_state(), before)
assert not torch.distributed.is_initialized()
assert not {{"timm", "matplotlib", "sklearn"}} & sys.modules.keys()
assert {{*os.listdir()}} == {{"{name}.py", "sampler.py"}}
print("imported", flush=True)
draw = sampler.draw_plates
sampler.draw_plates = lambda per_class, seed: draw(2, seed)
runpy.run_path("{name}.py", run_name="__main__")
"""
    command = [sys.executable, "-B", "-c", code, *command_line(script, home / "out", "--steps", 2)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, *_ = done.stdout.splitlines()
    assert first == "imported" and second.startswith(f"{name}: plates, 2,000 images")
    assert results(home / "out")[0]["step"] == 2
