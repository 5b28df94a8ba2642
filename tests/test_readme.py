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
import simclr
import vicreg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINES = [s for block in re.findall(r"```bash\n(.*?)```", README, re.S) for s in block.splitlines()]
TABLE = re.findall(r"^\| `(python [^`]*)`", README, re.M)
SCRIPTS = {f"{script.__name__}.py": script for script in (simclr, vicreg, msn, pmsn, mae, data2vec)}
COMMANDS = sorted({line for line in LINES + TABLE if SCRIPTS.keys() & set(shlex.split(line))})
HEAD, VIT = "--hidden 16 --output 8".split(), "--dim 16 --depth 1 --heads 2".split()
SIAMESE = [*HEAD, *VIT, "--num-prototypes", "16"]
SHORT = {simclr: [*HEAD, "--arch", "small"], vicreg: [*HEAD, "--arch", "small"]}
SHORT |= {data2vec: "--dim 16 --depth 2 --heads 2 --top-k 1".split()}
SHORT |= {msn: SIAMESE, pmsn: SIAMESE, mae: [*VIT, *"--decoder-dim 8 --decoder-heads 1".split()]}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A stand-in: as many classes as the commands ask for, two pictures each."""
    root = tmp_path_factory.mktemp("imagenet")
    picture = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    for i in range(1000):
        (root / f"train/n{i:04}").mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(np.roll(picture, i)).save(root / f"train/n{i:04}/{name}.JPEG")
    return root


def test_there_are_commands():
    assert len(COMMANDS) >= 10 and any(line.startswith("torchrun") for line in COMMANDS)
    assert all(any(name in line for line in COMMANDS) for name in SCRIPTS)
    assert any(line.startswith("python linear_eval.py") for line in LINES)


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands(command, imagenet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    name = next(word for word in words if word in SCRIPTS)
    script, options = SCRIPTS[name], words[words.index(name) + 1 :]
    assert "--steps" not in options
    short = ["--steps", "2", *SHORT[script]]
    if "IMAGENET" in options:  # the recipe's sizes are for GPUs: two images of each view suffice
        options[options.index("IMAGENET")] = str(imagenet)
        short += "--image-size 32 --workers 0".split()
        short += "--focal-size 16 --focal-views 1".split() if script in (msn, pmsn) else ()
        short += "--num-masked 3 --min-block 1".split() if script is data2vec else ()
        short += (
            [] if script in (msn, pmsn) or "--batch-size" in options else ["--batch-size", "960"]
        )
    if "cifar10" in options:  # nothing can be downloaded here: the data are drawn
        monkeypatch.setattr(script, "CIFAR10", Cifar)
    if "--help" in options:
        with pytest.raises(SystemExit, match="0"):
            script.main(options)
        return
    script.main([*options, *short])
    runs = f"runs/{script.__name__}"
    out = Path(options[options.index("--out") + 1] if "--out" in options else runs)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2
    assert (out / "log.jsonl").read_text().count("\n") == 1


class Cifar:
    data, targets = np.zeros((512, 32, 32, 3), np.uint8), list(range(10)) * 51 + [0] * 2

    def __init__(self, root, train, download):
        pass


def test_evaluation_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simclr.main([*SHORT[simclr], "--steps", "2", "--batch-size", "16"])
    images, labels = simclr.draw_plates(1, seed=0)
    monkeypatch.setattr(linear_eval, "draw_plates", lambda per_class, seed: (images, labels))
    lines = [line for line in LINES if line.startswith("python linear_eval.py")]
    assert len(lines) >= 3
    for line in lines:
        linear_eval.main([*shlex.split(line)[2:], "--epochs", "1"])
    assert {p.name for p in Path("runs/simclr").glob("*.json")} == {
        "linear_eval_plates_digits.json",
        "linear_eval_plates_count.json",
        "cached.json",
    }


def test_evaluation_commands_of_several_processes(tmp_path, imagenet, monkeypatch):
    """As one process: of a released file and of a run, on small data in the layouts they name."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1)
    torch.save(timm.models.VisionTransformer(**sizes).state_dict(), "vitb16.pth")
    small = ["--data", str(imagenet), "--image-size", "32", "--focal-views", "0", "--stem"]
    msn.main([*SHORT[msn], *small, "--steps", "1", "--batch-size", "4", "--workers", "0"])
    shutil.copytree(imagenet / "train", imagenet / "val")
    objects = [dict(pixel_coords=[0, 0, depth]) for depth in (8.2, 9.7, 12.0)]
    for split in ("train", "val"):
        scenes, images = Path("CLEVR_v1.0/scenes"), Path(f"CLEVR_v1.0/images/{split}")
        scenes.mkdir(parents=True, exist_ok=True)
        images.mkdir(parents=True)
        Image.new("RGB", (48, 32)).save(images / "0.png")
        both = dict(scenes=[dict(image_filename="0.png", objects=objects)] * 2)
        (scenes / f"CLEVR_{split}_scenes.json").write_text(json.dumps(both))
    lines = [line for line in LINES if line.startswith("torchrun") and "linear_eval.py" in line]
    assert len(lines) >= 2
    for number, line in enumerate(lines):
        words = [str(imagenet) if word == "IMAGENET" else word for word in shlex.split(line)]
        options = words[words.index("linear_eval.py") + 1 :]
        short = ["--epochs", "1", "--workers", "0", "--out", f"{number}.json"]
        linear_eval.main([*options, *short])
        assert json.loads(Path(f"{number}.json").read_text())["epochs"] == 1


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


def test_options_in_readme_exist():
    source = "".join(
        (ROOT / name).read_text() for name in (*SCRIPTS, "linear_eval.py", "tests/reproduce.py")
    )
    known = {f"--{name.replace('_', '-')}" for x in SCRIPTS.values() for name in x.PAPER}
    known |= set(re.findall(r'"(--[\w-]+)"', source)) | {"--help", "--nproc_per_node", "--from"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known
