"""Options and recipes of all six training scripts; copies of a script in a folder of their own."""

import contextlib
import importlib
import os
import shutil
import sys
from unittest import mock

import pytest
import torch
from runs import ROOT, SCRIPTS, Child, each_script, on_pictures, saved_step

import data2vec
import mae
import msn
import pmsn
import simclr
import vicreg

TRANSFORMER = dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12)
RESNET = dict(
    arch="resnet50", image_size=224, crop=[0.08, 1.0], flip=0.5, grey=0.2, blur_sigma=[0.1, 2.0],
    threshold=0.5, epochs=300, warmup=10.0, weight_decay=1e-6, momentum=0.9, trust=0.001,
)  # fmt: skip
STUDY = TRANSFORMER | dict(
    num_prototypes=1024, hidden=2048, output=256, temperature=0.1, sharpen=0.25, sinkhorn=False,
    rand_views=1, focal_views=10, focal_size=96, patch_drop=0.3, rand_crop=[0.3, 1.0],
    focal_crop=[0.05, 0.3], flip=0.5, jitter=[0.4, 0.4, 0.4, 0.1], grey=0.2, blur=0.5,
    blur_sigma=[0.1, 2.0], solarise=0.0, threshold=0.5, noise=0.0, standardise=False, stem=[],
    batch_size=1024, epochs=300, warmup=15.0, start_lr=2e-4, lr=1e-3, final_lr=1e-6,
    weight_decay=[0.04, 0.4], ema=0.996, clip=3.0, position_std=0.02,
)  # fmt: skip
PAPER = {
    simclr: RESNET | dict(
        temperature=0.1, hidden=2048, output=128, layers=2, jitter=[0.8, 0.8, 0.8, 0.2], blur=0.5,
        solarise=0.0, batch_size=4096, base_lr=0.3, final_lr=0.0,
    ),
    vicreg: RESNET | dict(
        sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, hidden=8192, output=8192,
        jitter=[0.4, 0.4, 0.2, 0.1], blur=[1.0, 0.1], solarise=[0.0, 0.2], standardise=False,
        batch_size=2048, base_lr=0.2, final_lr=0.001,
    ),
    msn: STUDY | dict(me_max_weight=1.0),
    pmsn: STUDY | dict(prior=None, prior_weight=1.0, exponent=0.25),
    mae: TRANSFORMER | dict(
        decoder_dim=512, decoder_depth=8, decoder_heads=16, mask_ratio=0.75, norm_pix_loss=True,
        crop=[0.2, 1.0], flip=0.5, standardise=False, batch_size=4096, epochs=800, warmup=40.0,
        base_lr=1.5e-4, final_lr=0.0, weight_decay=0.05,
    ),
    data2vec: TRANSFORMER | dict(
        layer_scale=1e-4, drop_path=0.25, attention_dropout=0.05, num_masked=120, min_block=16,
        top_k=6, beta=2.0, crop=[0.08, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.4, 0.0], clip=3.0,
        batch_size=2048, epochs=800, warmup=10.0, lr=2e-3, final_lr=1e-5, weight_decay=0.05,
        ema=[0.999, 0.9998], ema_anneal=0.0, standardise=False,
    ),
}  # fmt: skip
BATCHES = {mae: 960, data2vec: 960}  # of plates


@each_script
def test_defaults_are_the_papers_and_recipes_replace_some(script):
    name = script.__name__
    folder = vars(script.parse_args(["--data", "pictures"]))
    run = dict(data="pictures", recipe="paper", k_classes=None, long_tail=0.0, steps=None, seed=0)
    run |= dict(out=f"runs/{name}", workers=None, log_every=50, save_minutes=2.0, bf16=False)
    assert folder == run | PAPER[script]
    for name, recipe in script.RECIPES.items():
        assert recipe.keys() <= folder.keys()
        found = vars(script.parse_args(["--recipe", name, "--data", "pictures"]))
        assert found == folder | recipe | dict(recipe=name)
        if name in ("plates", "cifar10", "cifar100"):  # data that have a recipe of their name
            found = vars(script.parse_args(["--data", name]))
            assert found == folder | recipe | dict(recipe=name, data=name)
    small = script.parse_args([])
    assert (small.data, small.recipe, small.image_size) == ("plates", "plates", 32)
    assert small.batch_size == BATCHES.get(script, 1024)


@pytest.mark.parametrize("script", [msn, pmsn], ids=["msn", "pmsn"])
def test_options_override_the_recipe(script):
    """Wherever they stand; --no-X and options without a value too."""
    args = script.parse_args("--lr 0.5 --no-sinkhorn --jitter 1 2 3 0.5 --recipe plates".split())
    assert (args.lr, args.sinkhorn, args.jitter) == (0.5, False, [1, 2, 3, 0.5])
    plates = vars(script.parse_args([]))
    assert vars(args) == plates | dict(lr=0.5, sinkhorn=False, jitter=[1, 2, 3, 0.5])
    assert script.parse_args(["--stem", "--recipe=cifar10"]).stem == [] != plates["stem"]
    assert script.parse_args(["--recipe=plates-tail", "--long-tail=0.5"]).long_tail == 0.5


def test_main_takes_a_line_and_paths_a_home(monkeypatch, capsys):
    """An empty line is a line, in a notebook too, where sys.argv has something else."""
    monkeypatch.setattr(sys, "argv", ["notebook", "-f", "kernel.json"])
    monkeypatch.setenv("HOME", "/home/me")
    seen = []
    monkeypatch.setattr(simclr, "train", lambda args, device: seen.append(vars(args)))
    simclr.main([])
    simclr.main(["--out=~/run", "--data=~/pictures"])
    assert seen[0] == vars(simclr.parse_args([]))
    assert (seen[1]["out"], seen[1]["data"]) == ("/home/me/run", "/home/me/pictures")
    with pytest.raises(SystemExit):
        simclr.main()
    assert capsys.readouterr().err == "notebook: error: unrecognized arguments: -f kernel.json\n"


@contextlib.contextmanager
def as_program(script):
    """The script of the present folder instead of the repository's, as `python -OO` runs it."""
    name = script.__name__

    def main(line):
        for module in (*SCRIPTS, "sampler", "linear_eval"):
            sys.modules.pop(module, None)
        elsewhere = [path for path in sys.path if not path.startswith(str(ROOT))]
        sys.path[:] = [os.getcwd(), *elsewhere]
        sys.dont_write_bytecode = True
        before = torch.manual_seed(7).get_state()
        assert importlib.import_module(name).__file__ == f"{os.getcwd()}/{name}.py"
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.distributed.is_initialized()
        assert not {"timm", "matplotlib", "sklearn"} & sys.modules.keys()
        assert {*os.listdir()} == {f"{name}.py", "sampler.py"}
        sys.argv[1:] = line
        with open(f"{name}.py") as file:
            program = compile(file.read(), f"{name}.py", "exec", optimize=2)
        exec(program, dict(__name__="__main__", __doc__=None))

    with mock.patch.object(script, "main", main):
        yield


@each_script
def test_two_files_alone_suffice_and_import_does_nothing(script, pictures, tmp_path):
    (tmp_path / "home").mkdir()
    for file in (f"{script.__name__}.py", "sampler.py"):
        shutil.copy(ROOT / file, tmp_path / "home")
    line = on_pictures(script, pictures, "run", "--steps", 2)
    child = Child(script, line, tmp_path / "x", as_program, tmp_path / "home")
    assert child.wait() == 0, child.stderr
    assert child.stderr == "" and child.stdout.startswith(f"{script.__name__}: {pictures}, 60")
    assert saved_step(tmp_path / "home/run") == 2


def test_the_command_line_complains_in_one_line(tmp_path):
    child = Child(msn, ["--lr", "-1"], tmp_path / "x", folder=tmp_path)
    assert child.wait() == 2 and child.stdout == ""
    assert child.stderr == "msn.py: error: argument --lr: -1: give a number at least 1e-12\n"
    assert {path.name for path in tmp_path.iterdir()} == {"x.stdout", "x.stderr"}
