"""README and docs: every command runs, every quoted line of code is the code's, links resolve."""

import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path
from unittest import mock

import benchmark
import check_student
import curves
import numpy as np
import pictures
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
import sampler

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
README = PAGES["README.md"]
SCRIPTS = {f"{name}.py": script for name, script in METHODS.items()}
SIZES = dict(plates=(1000, 150), cifar10=(10, 5000), cifar100=(100, 500))  # classes, images each
SIZES |= dict(IMAGENET=(1000, 1200), INATURALIST=(8142, 54), EMOJI=(88, 106))
# test_linear_eval.py has CLEVR's own layout.
FOLDERS = ("IMAGENET", "INATURALIST", "EMOJI", "CLEVR_v1.0")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.S)


def commands_of(page):
    """The lines of a page's bash blocks, and the programs of ours that its sentences call."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    lines += re.findall(r"`((?:python \w|diff )[^`]*)`", prose(PAGES[page]))
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


COMMANDS = sorted({line for page in PAGES for line in commands_of(page)})


def program(command):
    """The script or tool of a command line, None: another program."""
    first, *words = shlex.split(command)
    if first not in ("python", "torchrun", "srun"):
        return None
    return next(word for word in words if word.endswith(".py"))


def options_of(command):
    words = shlex.split(command)
    return words[words.index(program(command)) + 1 :]


TRAINING = [line for line in COMMANDS if program(line) in SCRIPTS]
EVALUATION = [line for line in COMMANDS if program(line) == "linear_eval.py"]
OTHERS = [line for line in COMMANDS if line not in TRAINING + EVALUATION]


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """A stand-in for ImageNet and EMOJI: four classes, for training and validation."""
    root = tmp_path_factory.mktemp("folder")
    for split in ("train", "val"):
        shutil.copytree(pictures / "train", root / split)
    return root


@pytest.fixture
def small_data(few_plates, monkeypatch):
    """Two plates of each number; random pixels in place of CIFAR, which is a download."""
    images = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8)
    cifar = images, {"class": torch.arange(100) % 10}
    monkeypatch.setattr(sampler, "open_cifar", lambda data, split: cifar)


# ---- Training
def test_there_are_commands():
    assert {program(line) for line in TRAINING} == SCRIPTS.keys()
    assert len(TRAINING) >= 30 and len(EVALUATION) >= 8


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands(command, folder, small_data, tmp_path, monkeypatch):
    """The batches of the command as it is, then two updates of a small network."""
    script = SCRIPTS[program(command)]
    args = script.parse_args(options_of(command))
    with monkeypatch.context() as labels, script.process_group():
        labels.setattr(script, "open_data", labels_alone)
        _, batches = script.training_data(args)
    batch = next(iter(batches))
    assert len(batch) == args.batch_size
    if args.k_classes:
        assert len(set(batches.labels[batch])) == args.k_classes
    processes = re.search(r"--nproc_per_node=(\d+)", command)
    assert args.batch_size % int(processes[1] if processes else 1) == 0
    assert 0 <= args.warmup < args.epochs
    if args.data != "EMOJI":  # whose classes are small
        assert "warning" not in batches.describe(args.epochs * len(batches))

    monkeypatch.chdir(tmp_path)
    out = train_small(command, folder)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2
    log = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]


def labels_alone(data, split, tail, seed):
    """Real numbers of images and classes, without pixels."""
    classes, each = SIZES[data]
    if tail:
        assert data == "plates"
        each = sampler.long_tailed_sizes(tail, seed)
    return None, {"class": torch.arange(classes).repeat_interleave(torch.as_tensor(each))}


def train_small(command, folder):
    """The command's other options stay."""
    script = SCRIPTS[program(command)]
    options = options_of(command)
    short = ["--steps", "2", *TINY[script], "--batch-size", "8"]
    for number, word in enumerate(options):
        if word == "--k-classes":
            short += [word, "4"]
        if word == "--prior":
            np.savetxt(options[number + 1], np.arange(16))  # as PMSN's page says
        if word in FOLDERS:
            options[number] = str(folder)
            short += ["--image-size", "32", "--workers", "0"]
            if script.__name__ in ("msn", "pmsn"):
                short += ["--focal-size", "16", "--focal-views", "1", "--patch-size", "8"]
    script.main([*options, *short])
    return Path(script.parse_args(options).out)


# ---- Evaluation
@pytest.mark.parametrize("command", EVALUATION)
def test_evaluation_commands(command, folder, small_data, tmp_path, monkeypatch):
    """As one process: of a released file, or of a run that a page's command has made."""
    monkeypatch.chdir(tmp_path)
    options = options_of(command)
    checkpoint = Path(options[0])
    if checkpoint.name == "checkpoint.pt":
        assert checkpoint == train_small(maker_of(checkpoint), folder) / "checkpoint.pt"
    else:
        sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1)
        torch.save(timm.models.VisionTransformer(**sizes).state_dict(), checkpoint)
    options = [str(folder) if word in FOLDERS else word for word in options]
    options = ["class" if word == "dist" else word for word in options]
    linear_eval.main([*options, "--epochs", "1", "--workers", "0"])
    made = [json.loads(path.read_text()) for path in Path().rglob("*.json")]
    assert [report["epochs"] for report in made if "top1" in report] == [1]


def maker_of(checkpoint):
    """The training command of a page whose checkpoint this is."""
    for command in TRAINING:
        args = SCRIPTS[program(command)].parse_args(options_of(command))
        if Path(args.out) == checkpoint.parent and not args.steps:
            return command
    raise AssertionError(f"no command makes {checkpoint}")


# ---- Other commands
def assert_equal_pictures(made, there):
    """But for what another version of matplotlib draws elsewhere."""
    made, there = (np.asarray(Image.open(path).convert("L"), dtype=float) for path in (made, there))
    assert made.shape == there.shape and np.abs(made - there).mean() < 0.5


def run_curves(options):
    """Draws the picture that stands in docs, or, with --prior, one with a panel more."""
    picture = options[options.index("--out") + 1]
    if "--prior" not in options:
        curves.main(options)
        return assert_equal_pictures(picture, ROOT / picture)
    log = make_run(options[0])
    curves.main(options)
    panels = 1 + len(set(curves.TELLING) & curves.read_log(log).keys())
    assert panels >= 4 and Image.open(picture).width == 384 * panels


def run_prototypes(options):
    make_run(options[0])
    prototypes.main(options)
    assert json.loads(Path(options[0]).with_name("prototypes.json").read_text())["used"] >= 1


def make_run(file):
    """Train in the folder that is to have this file, runs/SCRIPT -> the log."""
    out = Path(file).parent
    METHODS[out.name].main([*TINY[METHODS[out.name]], "--steps", "2", "--out", str(out)])
    return out / "log.jsonl"


def run_pictures(options):
    """batches.png has a test of its own, with the sampler's."""
    pictures.draw().savefig("plates.png", metadata={"Software": None})
    assert_equal_pictures("plates.png", ROOT / "docs/plates.png")
    for method in METHODS:
        pictures.draw_idea(method).savefig("idea.png", metadata={"Software": None})
        pictures.plt.close()
        assert_equal_pictures("idea.png", ROOT / f"docs/{method}-idea.png")


def run_reproduce(options):
    """Its own tests run it; here only whether it knows the options."""
    with mock.patch.object(reproduce, "perform_all") as perform:
        with mock.patch.object(reproduce.tables, "make_all"):
            reproduce.main(options)
    assert list(perform.call_args[0][0])


def run_mixed(options):
    """The script's own options; that it runs is tested beside it."""
    name, *rest = options
    SCRIPTS[name].parse_args(rest)


def run_copies(options):
    """Copies are equal, so nothing is written."""
    before = [path.read_bytes() for path in sorted(ROOT.glob("*.py"))]
    os.chdir(ROOT)
    test_copies.main(options)
    assert [path.read_bytes() for path in sorted(ROOT.glob("*.py"))] == before


TOOLS = {  # programs in tests/ that pages call: what is done with a command's options
    "tests/benchmark.py": benchmark.parse_args,
    "tests/check_student.py": check_student.parse_args,
    "tests/curves.py": run_curves,
    "tests/endurance.py": list,  # nothing: it takes minutes
    "tests/mixed.py": run_mixed,
    "tests/pictures.py": run_pictures,
    "tests/prototypes.py": run_prototypes,
    "tests/reproduce.py": run_reproduce,
    "tests/test_copies.py": run_copies,
    "tests/toy.py": toy.parse_args,
}


def test_the_picture_of_views_is_of_the_default_run(tmp_path):
    METHODS["simclr"].main(["--steps", "1", "--out", str(tmp_path)])
    assert_equal_pictures(tmp_path / "views.png", ROOT / "docs/views.png")


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands(command, request, tmp_path, monkeypatch):
    if "pictures" not in command:  # which has all plates
        request.getfixturevalue("small_data")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    first, *words = shlex.split(command)
    if program(command):
        TOOLS[program(command)](options_of(command))
    elif first == "diff":
        found = subprocess.run([first, *words], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 1 and "prior" in found.stdout
    else:
        assert first in ("mkdir", "cp") or command in commands_of("README.md")  # see the next test
        if first in ("mkdir", "cp"):
            shutil.copy(ROOT / "linear_eval.py", ".")
            shutil.copytree(ROOT / "tests", "tests", ignore=shutil.ignore_patterns("__*"))
            Path(words[-1]).mkdir(parents=True, exist_ok=first == "cp")
            subprocess.run([first, *words], check=True)


def test_install_and_test_commands_are_those_of_ci():
    script = (ROOT / ".ci/run").read_text()
    lines = commands_of("README.md")
    install = next(line for line in lines if "[test]" in line)
    assert install in script and "pytest" in lines and re.search(r"^pytest$", script, re.M)
    dependencies = next(line for line in lines if line.startswith("pip install torch")).split()[2:]
    stated = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert dependencies == [re.match(r"\w+", d)[0] for d in re.findall(r'"([^"]+)"', stated[1])]


# ---- Code
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python example")])
def test_examples_run(page):
    for block in blocks(page, "python example"):
        exec(compile(block, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_quoted_code_is_the_code(page):
    """Consecutive lines of a script, at any indentation; a changed one is noticed."""
    scripts = [path.read_text() for path in ROOT.glob("*.py")]
    for block in blocks(page, "python"):
        assert any(holds(text, block) for text in scripts), block
        assert not any(holds(text, block.replace("=", "= 0 +", 1)) for text in scripts)


def holds(text, block):
    return any(f"\n{textwrap.indent(block, ' ' * indent)}" in text for indent in range(0, 24, 4))


def test_the_diff_of_the_losses_is_the_files():
    (diff,) = blocks("docs/pmsn.md", "diff")
    lines = {name: (ROOT / name).read_text().splitlines() for name in ("msn.py", "pmsn.py")}
    changed = diff.splitlines()
    assert len(changed) >= 8
    for line in changed:
        name, other = ("pmsn.py", "msn.py") if line[0] == "+" else ("msn.py", "pmsn.py")
        assert line[1:] in lines[name] and line[1:] not in lines[other], line


# ---- Names, links and words
FOREIGN = {
    "Beit",
    "PMSNLoss",
    "use_shared_rel_pos_bias",
    "np.savetxt",
    "batch_sampler",
}  # of other packages


@pytest.mark.parametrize("page", [f"docs/{name}.md" for name in (*METHODS, "sampler", "course")])
def test_names_in_pages_exist(page):
    """What a page writes as code and looks like a name is one in a script, or one of the official
    code and said to be so."""
    text = re.sub(r"(official|reference):\s+`\w+`", "", prose(PAGES[page]))
    named = set(re.findall(r"`([A-Za-z]\w{3,}(?:\.[A-Za-z_]\w*)*)(?:\([^`]*\))?`", text)) - FOREIGN
    named = {name for name in named if not re.search(r"\.(py|pt|json|jsonl|png|md|txt)$", name)}
    code = [path.read_text() for path in (*ROOT.glob("*.py"), ROOT / "tests/prototypes.py")]
    known = {*re.findall(r"\w+", "".join(code)), *METHODS}
    assert named and {name for name in named if not known.issuperset(name.split("."))} == set()


def anchors(text):
    """GitHub's anchors of the headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.append(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = prose(PAGES[page])
    base = (ROOT / page).parent
    for name, link in re.findall(r"\[`?([^]`]*)`?\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (base / path).resolve() if path else ROOT / page
        assert target.is_file() and ROOT in target.parents, link
        if anchor and target.suffix == ".py":  # the line that defines what the link names
            line = target.read_text().splitlines()[int(anchor.removeprefix("L")) - 1]
            assert line.startswith(f"def {name}("), link
        elif anchor:
            assert anchor in anchors(target.read_text()), link
    for name in re.findall(r"`((?:tests/)?\w+\.py)`", text):
        places = [ROOT / name, ROOT / "tests" / name]
        assert any(place.is_file() for place in places), name


def test_readme_leads_to_every_page():
    found = README
    for _ in range(2):
        links = set(re.findall(r"\]\((?:docs/)?(\w+\.md)", found))
        found += "".join(PAGES[f"docs/{link}"] for link in links)
    assert {f"docs/{link}" for link in links} == PAGES.keys() - {"README.md"}


def test_options_in_pages_exist(capsys):
    """Those of each script's --help, of the programs in tests/, of torchrun and Slurm."""
    known = options_in("--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --max-restarts")
    known |= {"--nodes", "--ntasks-per-node", "--gpus-per-node"}
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


def test_pages_are_short():
    """Words without blocks of code, README's lines too. Numbers, as in tables, are no words."""
    most = dict(README=750, sampler=700, linear_eval=800, course=900, results=1400, plan=600)
    most |= dict(imagenet=500, reliability=250, benchmarks=300)
    most |= dict(simclr=900, vicreg=850, msn=1000, pmsn=800, mae=850, data2vec=900, common=500)
    for page, text in PAGES.items():
        words = [word for word in prose(text).split() if re.search(r"[^\W\d]", word)]
        assert len(words) <= most.get(Path(page).stem, 700), page
    assert README.count("\n") <= 110
