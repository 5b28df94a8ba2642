"""Same name, same code: what two scripts both define is identical to the letter.

    python tests/test_copies.py --from msn.py VisionTransformer [more names]

writes these definitions of msn.py into the other scripts that have them.
"""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "simclr vicreg msn pmsn mae data2vec linear_eval".split()
EXEMPT = {"main", "parse_args", "train"}  # each script's own outline
CAPS = dict(simclr=620, vicreg=630, msn=740, pmsn=760, mae=590, data2vec=660)  # lines
CAPS |= dict(linear_eval=945, sampler=120)
WIDTH = 100
RUNTIME = {"torch", "torchvision", "numpy", "tqdm", "PIL", "sampler"}  # PIL: torchvision's


def files(folder, names=SCRIPTS):
    """Those of the scripts that the folder has."""
    return [path for path in (folder / f"{name}.py" for name in names) if path.exists()]


def definitions(lines):
    """Top-level functions and classes -> {name: slice of the lines}, decorators included."""
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[node.name] = slice(first - 1, node.end_lineno)
    return found


def sources(path):
    """{name: the definition's lines as they stand in the file, comments included}."""
    lines = path.read_text().split("\n")
    return {name: lines[where] for name, where in definitions(lines).items()}


def differences(folder):
    """Definitions that two scripts have and that are not equal, with the scripts that differ."""
    found = []
    scripts = {path.name: sources(path) for path in files(folder)}
    for name in sorted({name for script in scripts.values() for name in script} - EXEMPT):
        owners = {script: own[name] for script, own in scripts.items() if name in own}
        if any(own != code for own in owners.values() for code in owners.values()):
            found.append(f"{name}: {' '.join(owners)}")
    return found


def copy_definitions(source, names):
    """Write definitions of the script `source` into its neighbours that have them -> messages."""
    wanted, messages = sources(source), []
    if wrong := [name for name in names if name in EXEMPT]:
        raise ValueError(f"{' '.join(wrong)}: belongs to each script alone, so it is not copied")
    if wrong := [name for name in names if name not in wanted]:
        raise ValueError(f"{' '.join(wrong)}: no such definition at the top level of {source}")
    for path in files(source.parent):
        if path.resolve() == source.resolve():
            continue
        own = sources(path)
        for name in names:
            if name not in own:
                continue
            if own[name] == wanted[name]:
                messages.append(f"{path.name}: {name} is already equal")
                continue
            lines = path.read_text().split("\n")
            lines[definitions(lines)[name]] = wanted[name]
            path.write_text("\n".join(lines))
            messages.append(f"{path.name}: {name} changed")
    return messages or [f"no other script has {' or '.join(names)}"]


def main(argv=None):
    """Copy definitions from one script to the others."""
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("--from", dest="source", type=Path, required=True, help="script to copy from")
    p.add_argument("names", nargs="+", help="its functions or classes")
    args = p.parse_args(argv)
    try:
        print(*copy_definitions(args.source, args.names), sep="\n")
    except (OSError, SyntaxError, ValueError) as error:
        p.error(str(error))


# ---- 1. The scripts


def test_same_name_same_code():
    assert differences(ROOT) == []


def test_line_caps_and_width():
    assert set(SCRIPTS) | {"sampler"} == set(CAPS) and files(ROOT, CAPS)
    for path in files(ROOT, CAPS):
        lines = path.read_text().splitlines()
        assert len(lines) <= CAPS[path.stem], f"{path.name} has {len(lines)} lines"
        wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH]
        assert not wide, f"{path.name} is wider than {WIDTH} in lines {wide}"


def banners(path):
    """Numbers of the section banners, `# ---- 1. Hyper-parameters`, in the file's order."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("# --")]
    found = [re.fullmatch(r"# ---- (\d+)\. \S.*", line) for line in lines]
    assert all(found), f"{path.name}: {lines[found.index(None)]}"
    return [int(banner[1]) for banner in found]


def test_banners_ascend():
    for path in files(ROOT):
        numbers = banners(path)
        assert numbers and numbers == sorted(set(numbers)), f"{path.name}: {numbers}"


def imports(text):
    """First names of all modules that the text imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        "." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)
    ]
    return {name.split(".")[0] for name in names}  # "": relative


def test_runtime_imports():
    for path in files(ROOT, CAPS):
        other = imports(path.read_text()) - RUNTIME - set(sys.stdlib_module_names)
        assert not other, f"{path.name} imports {other}"


# ---- 2. The checks and the program, on small scripts

LOSS = '''@torch.no_grad()
def loss(z):
    """Mean."""
    return z.mean()  # over images
'''
SHORT = "def loss(z):\n    return 0\n"
HEAD = "class Head:\n    size = 3\n"
MAIN = "def main():\n    pass\n"


def write(folder, **scripts):
    """Scripts of the given parts."""
    folder.mkdir(exist_ok=True)
    for name, parts in scripts.items():
        (folder / f"{name}.py").write_text("\n\n".join(["import torch\n", *parts]))


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def program(*arguments):
    """-> exit status, all that it wrote."""
    command = [sys.executable, __file__, *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.returncode, run.stdout


def test_differences_are_found_to_the_letter(tmp_path):
    other_main = MAIN.replace("pass", "return 1")  # exempt
    write(tmp_path, msn=[LOSS, HEAD, MAIN], mae=[HEAD, LOSS, other_main], sampler=[SHORT])
    assert differences(tmp_path) == []
    for old, new in [
        ("@torch.no_grad()\n", ""),
        ("no_grad()", "enable_grad()"),
        ("Mean.", "mean."),
        ("# over", "# Over"),
        ("  # over images", ""),
        ("return z", "return  z"),
        ("(z):", "(z, /):"),
    ]:
        assert old in LOSS
        write(tmp_path, mae=[LOSS.replace(old, new), HEAD])
        assert differences(tmp_path) == ["loss: msn.py mae.py"]
    write(tmp_path, mae=[LOSS, HEAD.replace("3", "4")], linear_eval=["class loss:\n    pass\n"])
    assert differences(tmp_path) == ["Head: msn.py mae.py", "loss: msn.py mae.py linear_eval.py"]


def test_other_checks_can_fail(tmp_path):
    for text, numbers in [
        ("# ---- 1. Data\n# a comment\n# ---- 3. Method, part two\n", [1, 3]),
        ("# ---- 2. Data\n    # ---- 1. indented\n# ---- 2. Data\n", [2, 2]),
    ]:
        (tmp_path / "msn.py").write_text(text)
        assert banners(tmp_path / "msn.py") == numbers
    for text in ("# --- 1. Data", "# ---- 1 Data", "# ---- Data", "# ---- 1. ", "# -----------"):
        (tmp_path / "msn.py").write_text(text)
        try:
            banners(tmp_path / "msn.py")
        except AssertionError as error:
            assert f"msn.py: {text}" in str(error)
        else:
            raise AssertionError(f"{text} is taken for a banner")
    text = "import os.path, timm\nfrom torch.nn import F\ndef f():\n    from . import g\n"
    assert imports(text) == {"os", "timm", "torch", ""}


def test_program_copies_and_says_what_it_changed(tmp_path):
    head = HEAD.replace("3", "4")
    before, after = tmp_path / "before", tmp_path / "after"
    write(before, msn=[HEAD, LOSS, MAIN], pmsn=[SHORT, head, MAIN], mae=[MAIN, LOSS])
    write(after, msn=[HEAD, LOSS, MAIN], pmsn=[LOSS, HEAD, MAIN], mae=[MAIN, LOSS])
    write(before, vicreg=[MAIN, SHORT], simclr=[MAIN], other=[SHORT])
    write(after, vicreg=[MAIN, LOSS], simclr=[MAIN], other=[SHORT])
    assert program("--from", before / "msn.py", "loss", "Head") == (
        0,
        "vicreg.py: loss changed\n"
        "pmsn.py: loss changed\n"
        "pmsn.py: Head changed\n"
        "mae.py: loss is already equal\n",
    )
    assert read(before) == read(after) and differences(before) == []


def test_program_refuses(tmp_path):
    write(tmp_path, msn=[LOSS, MAIN], mae=[SHORT, HEAD, MAIN])
    before = read(tmp_path)
    for script, names, text in [
        ("msn.py", ["loss", "Head"], "Head: no such definition at the top level of"),
        ("msn.py", ["loss", "main"], "main: belongs to each script alone"),
        ("msn.py", [], "required: names"),
        ("simclr.py", ["loss"], "simclr.py"),
    ]:
        status, output = program("--from", tmp_path / script, *names)
        assert status == 2 and text in output and "Traceback" not in output
    assert read(tmp_path) == before
    assert program("--from", tmp_path / "mae.py", "Head") == (0, "no other script has Head\n")


def test_program_repairs_every_definition_of_every_script(tmp_path):
    for path in files(ROOT):
        source = tmp_path / path.name
        twin = tmp_path / ("mae.py" if path.name != "mae.py" else "msn.py")
        lines = path.read_text().split("\n")
        names = sorted(definitions(lines).keys() - EXEMPT)
        source.write_text(path.read_text())
        for where in sorted((definitions(lines)[name].stop for name in names), reverse=True):
            lines.insert(where - 1, "    # changed")
        twin.write_text("\n".join(lines))
        assert len(differences(tmp_path)) == len(names) > 0
        status, output = program("--from", source, *names)
        assert status == 0 and output.count("changed\n") == len(names)
        assert twin.read_text() == path.read_text() and source.read_text() == path.read_text()
        source.unlink()
        twin.unlink()


if __name__ == "__main__":
    main()
