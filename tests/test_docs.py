"""README: every command in it runs, every file it names exists, no placeholder is left."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import data2vec
import linear_eval
import mae
import msn
import pmsn
import sampler
import simclr
import vicreg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
TABLE = re.findall(r"^\| `(python [^`]*)`", README, re.M)
SCRIPTS = {f"{script.__name__}.py": script for script in (simclr, vicreg, msn, pmsn, mae, data2vec)}
COMMANDS = sorted({line for line in LINES + TABLE if SCRIPTS.keys() & set(shlex.split(line))})
EVALUATIONS = [line for line in LINES if "linear_eval.py" in shlex.split(line)]
SIZES = dict(plates=(1000, 50), cifar10=(10, 5000), IMAGENET=(1000, 1200))  # classes, images each
CLASSES = 12  # of the stand-in for ImageNet

VIT = ["--dim", "16", "--depth", "1", "--heads", "2"]
HEAD = ["--hidden", "16", "--output", "8"]
SHORT = {  # small networks
    simclr: [*HEAD, "--arch", "small"],
    vicreg: [*HEAD, "--arch", "small"],
    msn: [*HEAD, *VIT, "--num-prototypes", "16"],
    pmsn: [*HEAD, *VIT, "--num-prototypes", "16"],
    mae: [*VIT, "--decoder-dim", "8", "--decoder-heads", "1"],
    data2vec: ["--dim", "16", "--depth", "2", "--heads", "2", "--top-k", "1"],
}
SMALL_VIEWS = {msn: ["--focal-size", "16", "--focal-views", "1"]}  # of pictures
SMALL_VIEWS |= {pmsn: SMALL_VIEWS[msn], data2vec: ["--num-masked", "3", "--min-block", "1"]}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A stand-in: a few classes, two pictures each, for training and validation."""
    root = tmp_path_factory.mktemp("imagenet")
    picture = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    for i in range(CLASSES):
        (root / f"train/n{i:04}").mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(np.roll(picture, i)).save(root / f"train/n{i:04}/{name}.JPEG")
    shutil.copytree(root / "train", root / "val")
    return root


@pytest.fixture
def small_data(monkeypatch):
    """One plate of every fourth number; random pixels in place of CIFAR, which is a download."""
    images, labels = sampler.draw_plates(1, seed=0)
    images = images[::4]
    labels = {name: of_all[::4] for name, of_all in labels.items()}
    monkeypatch.setattr(sampler, "draw_plates", lambda per_class, seed: (images, labels))
    monkeypatch.setattr(sampler, "CIFAR10", Cifar)


class Cifar:
    data = np.random.default_rng(0).integers(256, size=(100, 32, 32, 3), dtype=np.uint8)
    targets = list(range(10)) * 10

    def __init__(self, root, train, download):
        pass


def test_there_are_commands():
    assert len(COMMANDS) >= 10 and any(line.startswith("torchrun") for line in COMMANDS)
    assert all(any(name in line for line in COMMANDS) for name in SCRIPTS)
    assert any(line.startswith("python linear_eval.py") for line in LINES)


def words_of(command):
    """-> the script, its options."""
    words = shlex.split(command)
    name = next(word for word in words if word in SCRIPTS)
    return SCRIPTS[name], words[words.index(name) + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_fit_together_and_the_data(command):
    """Nothing is shortened here but the training: real numbers of images, classes, batches."""
    script, options = words_of(command)
    if "--help" in options:
        return
    args = script.parse_args(options)
    classes, images_each = SIZES[args.data]
    labels = np.arange(classes).repeat(images_each)
    if args.long_tail:
        labels = labels[sampler.long_tail(labels, args.long_tail, args.seed)]
    batches = script.batch_sampler(labels, args)
    batch = next(iter(batches))
    assert len(batch) == args.batch_size
    if args.k_classes:
        assert len(set(labels[batch])) == args.k_classes
    processes = re.search(r"--nproc_per_node=(\d+)", command)
    assert args.batch_size % int(processes[1] if processes else 1) == 0
    assert "--steps" not in options and 0 <= args.warmup < args.epochs


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands(command, imagenet, small_data, tmp_path, monkeypatch):
    """Two steps of a small network on small data: the recipes' sizes take minutes, or GPUs."""
    monkeypatch.chdir(tmp_path)
    script, options = words_of(command)
    if "--help" in options:
        with pytest.raises(SystemExit, match="0"):
            script.main(options)
        return
    short = ["--steps", "2", *SHORT[script], "--batch-size", "8"]
    if "--k-classes" in options:
        fewer = min(int(options[options.index("--k-classes") + 1]), 6)
        short += ["--k-classes", str(fewer)]
    if "IMAGENET" in options:
        options[options.index("IMAGENET")] = str(imagenet)
        short += ["--image-size", "32", "--workers", "0", *SMALL_VIEWS.get(script, [])]
    script.main([*options, *short])
    folder = f"runs/{script.__name__}"
    if "--out" in options:
        folder = options[options.index("--out") + 1]
    assert torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["step"] == 2
    log = (Path(folder) / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]


def test_evaluation_commands(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simclr.main([*SHORT[simclr], "--steps", "2", "--batch-size", "16"])
    lines = [line for line in EVALUATIONS if line.startswith("python")]
    assert len(lines) >= 3
    for line in lines:
        linear_eval.main([*shlex.split(line)[2:], "--epochs", "1"])
    assert {p.name for p in Path("runs/simclr").glob("*.json")} == {
        "linear_eval_plates_digits.json",
        "linear_eval_plates_count.json",
        "cached.json",
        "options.json",
    }


def test_evaluation_commands_of_several_processes(tmp_path, imagenet, monkeypatch):
    """As one process: of a released file and of a run, on small data in the layouts they name."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1)
    torch.save(timm.models.VisionTransformer(**sizes).state_dict(), "vitb16.pth")
    small = ["--data", str(imagenet), "--image-size", "32", "--focal-views", "0", "--stem"]
    msn.main([*SHORT[msn], *small, "--steps", "1", "--batch-size", "4", "--workers", "0"])
    draw_clevr(Path("CLEVR_v1.0"))
    lines = [line for line in EVALUATIONS if line.startswith("torchrun")]
    assert len(lines) >= 2
    for number, line in enumerate(lines):
        words = [str(imagenet) if word == "IMAGENET" else word for word in shlex.split(line)]
        options = words[words.index("linear_eval.py") + 1 :]
        short = ["--epochs", "1", "--workers", "0", "--out", f"{number}.json"]
        linear_eval.main([*options, *short])
        assert json.loads(Path(f"{number}.json").read_text())["epochs"] == 1


def draw_clevr(root):
    """One scene, twice, for training and validation, in the published layout."""
    objects = [dict(pixel_coords=[0, 0, depth]) for depth in (8.2, 9.7, 12.0)]
    scenes = dict(scenes=[dict(image_filename="0.png", objects=objects)] * 2)
    (root / "scenes").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        Image.new("RGB", (48, 32)).save(root / "images" / split / "0.png")
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps(scenes))


def test_install_and_test_commands_are_those_of_ci():
    script = (ROOT / ".ci/run").read_text()
    install = next(line for line in LINES if "[test]" in line)
    assert install in script and "pytest" in LINES and re.search(r"^pytest$", script, re.M)
    dependencies = next(line for line in LINES if line.startswith("pip install torch")).split()[2:]
    stated = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert dependencies == [re.match(r"\w+", d)[0] for d in re.findall(r'"([^"]+)"', stated[1])]


def test_no_placeholder_no_dead_link_and_short():
    assert "PLACEHOLDER" not in README and README.count("\n") <= 200
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / name).is_file(), name


def test_options_in_readme_exist(capsys):
    """Those of each script's --help, of the programs in tests/, of torchrun and of pip."""
    known = {"--nproc_per_node"}
    for script in (*SCRIPTS.values(), linear_eval):
        with pytest.raises(SystemExit, match="0"):
            script.parse_args(["--help"])
        known |= options_in(capsys.readouterr().out)
    for name in ("tests/reproduce.py", "tests/benchmark.py", "tests/test_copies.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / name).read_text()))
    assert {"--help", "--no-bf16", "--k-classes", "--from", "--table"} <= known
    assert options_in(README) <= known


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
