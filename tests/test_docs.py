"""README and docs: every command runs, every quoted line of code is the code's, links resolve."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import benchmark
import check_student
import curves
import numpy as np
import pictures as plates_pictures
import prototypes
import pytest
import reproduce
import test_copies
import timm
import torch
import toy
from PIL import Image
from runs import SCRIPTS as METHODS
from runs import TINY

import linear_eval
import msn
import sampler

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README}
for path in sorted((ROOT / "docs").glob("*.md")):
    PAGES[f"docs/{path.name}"] = path.read_text()
SCRIPTS = {f"{name}.py": script for name, script in METHODS.items()}
TOOLS = {  # programs in tests/ that pages name
    "tests/benchmark.py": benchmark,
    "tests/check_student.py": check_student,
    "tests/curves.py": curves,
    "tests/pictures.py": plates_pictures,
    "tests/prototypes.py": prototypes,
    "tests/reproduce.py": reproduce,
    "tests/test_copies.py": test_copies,
    "tests/toy.py": toy,
}
SIZES = dict(plates=(1000, 50), cifar10=(10, 5000), cifar100=(100, 500))  # classes, images each
SIZES |= dict(IMAGENET=(1000, 1200), EMOJI=(88, 106))
CLASSES = 12  # of the stand-in for folders of pictures


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def commands_of(page):
    """The lines of a page's bash blocks, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


COMMANDS = sorted({line for page in PAGES for line in commands_of(page)})


def program(command):
    """The script or tool of a command line, None: another program."""
    known = [*SCRIPTS, *TOOLS, "linear_eval.py"]
    first, *words = shlex.split(command)
    if first in ("pip", "pytest", "mkdir", "cp"):
        return None
    return next((word for word in words if word in known), None)


def options_of(command):
    words = shlex.split(command)
    return words[words.index(program(command)) + 1 :]


TRAINING = [line for line in COMMANDS if program(line) in SCRIPTS and "diff" not in line]
EVALUATION = [line for line in COMMANDS if program(line) == "linear_eval.py"]
OTHERS = [line for line in COMMANDS if line not in TRAINING + EVALUATION]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stand-in for ImageNet: a few classes, two pictures each, for training and validation."""
    root = tmp_path_factory.mktemp("folder")
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
    monkeypatch.setattr(sampler, "CIFAR100", Cifar)


class Cifar:
    data = np.random.default_rng(0).integers(256, size=(100, 32, 32, 3), dtype=np.uint8)
    targets = list(range(10)) * 10

    def __init__(self, root, train, download):
        pass


# ---- Training
def test_there_are_commands():
    assert len(TRAINING) >= 30 and any(line.startswith("torchrun") for line in TRAINING)
    for name in SCRIPTS:
        assert any(program(line) == name for line in TRAINING), name
    assert len(EVALUATION) >= 8
    for page in PAGES:
        assert "PLACEHOLDER" not in PAGES[page], page


@pytest.mark.parametrize("command", TRAINING)
def test_options_fit_together_and_the_data(command):
    """Nothing is shortened here but the training: real numbers of images, classes, batches."""
    script = SCRIPTS[program(command)]
    options = options_of(command)
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
    assert 0 <= args.warmup < args.epochs


def train_small(command, folder):
    """Two steps of a small network on small data; the command's other options stay."""
    script = SCRIPTS[program(command)]
    options = options_of(command)
    short = ["--steps", "2", *TINY[script], "--batch-size", "8"]
    if "--k-classes" in options:
        fewer = min(int(options[options.index("--k-classes") + 1]), 6)
        short += ["--k-classes", str(fewer)]
    for number, word in enumerate(options):
        if word in ("IMAGENET", "EMOJI"):
            options[number] = str(folder)
            short += ["--image-size", "32", "--workers", "0"]
            if script in (METHODS["msn"], METHODS["pmsn"]):
                short += ["--focal-size", "16", "--focal-views", "1", "--patch-size", "8"]
        if word.startswith("file:"):
            Path(word.removeprefix("file:")).write_text("1 " * 16)
    script.main([*options, *short])
    return Path(script.parse_args(options).out)


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands(command, folder, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--help" in options_of(command):
        with pytest.raises(SystemExit, match="0"):
            SCRIPTS[program(command)].main(["--help"])
        return
    out = train_small(command, folder)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2
    log = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]


# ---- Evaluation
@pytest.mark.parametrize("command", EVALUATION)
def test_evaluation_commands(command, folder, small_data, tmp_path, monkeypatch):
    """As one process: of a released file, or of a run that a page's command has made."""
    monkeypatch.chdir(tmp_path)
    options = options_of(command)
    if "--help" in options:
        return
    checkpoint = Path(options[0])
    if checkpoint.name == "checkpoint.pt":
        assert checkpoint == train_small(maker_of(checkpoint), folder) / "checkpoint.pt"
    else:
        sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1)
        torch.save(timm.models.VisionTransformer(**sizes).state_dict(), checkpoint)
    draw_clevr(Path("CLEVR_v1.0"))
    options = [str(folder) if word in ("IMAGENET", "EMOJI") else word for word in options]
    if "--train-fraction" in options:
        options[options.index("--train-fraction") + 1] = "0.5"
    linear_eval.main([*options, "--epochs", "1", "--workers", "0"])
    made = [json.loads(path.read_text()) for path in Path().rglob("*.json")]
    assert [report["epochs"] for report in made if "top1" in report] == [1]


def maker_of(checkpoint):
    """The training command of a page whose checkpoint this is."""
    for command in TRAINING:
        if "--help" not in command:
            args = SCRIPTS[program(command)].parse_args(options_of(command))
            if Path(args.out) == checkpoint.parent:
                return command
    raise AssertionError(f"no command makes {checkpoint}")


def draw_clevr(root):
    """One scene, twice, for training and validation, in the published layout."""
    objects = [dict(pixel_coords=[0, 0, depth]) for depth in (8.2, 9.7, 12.0)]
    scenes = dict(scenes=[dict(image_filename="0.png", objects=objects)] * 2)
    (root / "scenes").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        Image.new("RGB", (48, 32)).save(root / "images" / split / "0.png")
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps(scenes))


# ---- Other commands
@pytest.mark.parametrize("command", OTHERS)
def test_other_commands(command, small_data, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    name = program(command)
    if name is None and command not in INSTALLING:  # of files
        words = shlex.split(command)
        assert words[0] in ("mkdir", "cp")
        shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__*"))
        if words[0] == "cp":
            Path(words[-1]).mkdir(parents=True)
        subprocess.run(words, check=True)
        assert Path(words[-1]).exists()
    elif command.startswith("diff"):
        found = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 1 and "prior" in found.stdout
    elif name:
        RUN_TOOL[name](options_of(command), monkeypatch)


def run_curves(options, monkeypatch):
    """Draws the picture that stands in docs."""
    picture = options[options.index("--out") + 1]
    there = np.asarray(Image.open(ROOT / picture).convert("L"), dtype=float)
    curves.main(options)
    made = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert made.shape == there.shape and np.abs(made - there).mean() < 0.5


def run_pictures(options, monkeypatch):
    assert options == []
    monkeypatch.undo()  # all plates
    there = np.asarray(Image.open(ROOT / "docs/plates.png").convert("L"), dtype=float)
    figure = plates_pictures.draw()
    figure.canvas.draw()
    made = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("L")
    assert np.abs(np.asarray(made, dtype=float) - there).mean() < 0.5


def run_prototypes(options, monkeypatch):
    msn.main([*TINY[msn], "--steps", "1", "--out", str(Path(options[0]).parent)])
    prototypes.main(options)
    assert json.loads(Path(options[0]).with_name("prototypes.json").read_text())["used"] >= 1


def run_reproduce(options, monkeypatch):
    """Its own tests run it; here only whether it knows the options."""
    asked = []
    monkeypatch.setattr(reproduce, "perform_all", lambda runs, *rest: asked.extend(runs))
    monkeypatch.setattr(reproduce.tables, "make_all", lambda lines: None)
    assert reproduce.main(options) == 0
    assert asked or "--draw" in options


def run_copies(options, monkeypatch):
    """Copies are equal, so nothing is written."""
    before = {path: path.read_bytes() for path in ROOT.glob("*.py")}
    monkeypatch.chdir(ROOT)
    test_copies.main(options)
    assert all(path.read_bytes() == text for path, text in before.items())


def run_toy(options, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(toy, "DRAWINGS", 10)
    toy.main([*options, "--steps", "3"])


RUN_TOOL = {
    "tests/benchmark.py": lambda options, monkeypatch: benchmark.parse_args(options),
    "tests/check_student.py": lambda options, monkeypatch: check_student.parse_args(options),
    "tests/curves.py": run_curves,
    "tests/pictures.py": run_pictures,
    "tests/prototypes.py": run_prototypes,
    "tests/reproduce.py": run_reproduce,
    "tests/test_copies.py": run_copies,
    "tests/toy.py": run_toy,
}
INSTALLING = {"pip install torch torchvision numpy tqdm", "pip install -e '.[test]'", "pytest"}


def test_install_and_test_commands_are_those_of_ci():
    script = (ROOT / ".ci/run").read_text()
    lines = commands_of("README.md")
    install = next(line for line in lines if "[test]" in line)
    assert install in script and "pytest" in lines and re.search(r"^pytest$", script, re.M)
    dependencies = next(line for line in lines if line.startswith("pip install torch")).split()[2:]
    stated = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert dependencies == [re.match(r"\w+", d)[0] for d in re.findall(r'"([^"]+)"', stated[1])]


# ---- Code
EXAMPLES = [(page, block) for page in PAGES for block in blocks(page, "python example")]
QUOTES = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize("page, block", EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_examples_run(page, block, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ast.parse(block)
    exec(compile(block, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page, block", QUOTES, ids=[page for page, _ in QUOTES])
def test_quoted_code_is_the_code(page, block):
    """Consecutive lines of the page's script, or of another, at any indentation."""
    code = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    assert any(holds(path.read_text(), block) for path in code), block
    assert 1 <= block.count("\n") <= 40


def holds(text, block):
    lines = block.rstrip("\n").split("\n")
    indents = {len(line) - len(line.lstrip()) for line in text.splitlines() if line.strip()}
    for indent in indents:
        wanted = "\n".join(" " * indent + line if line else "" for line in lines)
        if f"\n{wanted}\n" in f"\n{text}\n":
            return True
    return False


def test_a_changed_quote_is_noticed():
    page, block = QUOTES[0]
    assert not holds((ROOT / "msn.py").read_text(), block.replace("=", "= 0 +", 1))


def test_the_diff_of_the_losses_is_the_files():
    (diff,) = blocks("docs/pmsn.md", "diff")
    lines = {name: (ROOT / name).read_text().splitlines() for name in ("msn.py", "pmsn.py")}
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line.strip("+- ")]
    assert len(changed) >= 8
    for line in changed:
        name, other = ("pmsn.py", "msn.py") if line[0] == "+" else ("msn.py", "pmsn.py")
        assert line[1:] in lines[name] and line[1:] not in lines[other], line


# ---- Links and words
def anchors(text):
    """GitHub's anchors of the headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.append(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    base = (ROOT / page).parent
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (base / path).resolve() if path else ROOT / page
        assert target.is_file() and ROOT in target.parents, link
        if anchor:
            assert anchor in anchors(target.read_text()), link
    for name in re.findall(r"`((?:tests/)?\w+\.py)`", text):
        places = [ROOT / name, ROOT / "tests" / name]
        assert any(place.is_file() for place in places), name


def test_every_page_is_linked_from_readme_or_a_page_that_is():
    linked = {"README.md"}
    for _ in range(3):
        for page in linked & PAGES.keys():
            base = (ROOT / page).parent
            for link in re.findall(r"\]\((?!https?:)([^)#]+\.md)", PAGES[page]):
                linked.add(str((base / link).resolve().relative_to(ROOT)))
    assert linked >= PAGES.keys()


def test_readme_is_for_ten_minutes():
    assert README.count("\n") <= 150 and len(README.split()) <= 1200


def test_options_in_pages_exist(capsys):
    """Those of each script's --help, of the programs in tests/, of torchrun and Slurm."""
    known = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    known |= {"--max-restarts", "--nodes", "--ntasks-per-node"}
    for script in (*SCRIPTS.values(), linear_eval):
        with pytest.raises(SystemExit, match="0"):
            script.parse_args(["--help"])
        known |= options_in(capsys.readouterr().out)
    for name in TOOLS:
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / name).read_text()))
    assert {"--help", "--no-bf16", "--k-classes", "--from", "--table"} <= known
    for page, text in PAGES.items():
        assert options_in(text) <= known, page


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
