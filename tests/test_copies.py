"""Same name, same code: what two scripts both define is identical to the letter.

    python tests/test_copies.py --from msn.py VisionTransformer [more names]

writes these definitions of msn.py into the other scripts that have them. The tests below also check
the form of the scripts: their sections, long functions, crammed lines, unused definitions.
"""

import argparse
import ast
import contextlib
import dis
import io
import itertools
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["simclr", "vicreg", "msn", "pmsn", "mae", "data2vec"]
SCRIPTS = [*METHODS, "linear_eval"]
SOURCES = [*SCRIPTS, "sampler"]
EXEMPT = {"main", "parse_args", "train", "initialise", "parameter_groups", "schedule"}
WIDTH = 100
LONGEST = 60  # lines of a function
RUNTIME = {"torch", "torchvision", "numpy", "tqdm", "PIL", "sampler"}  # PIL: torchvision's
PUBLIC = {"load_encoder", "read_image", "clevr_count", "clevr_dist", "kitti_dist"}  # for notebooks

METHOD = [
    "# ---- 1. Recipe",
    "# ---- 2. Loss",
    "# ---- 3. Model",
    "# ---- 4. Optimiser and schedule",
    "# ---- 5. Training",
]
PLUMBING = [
    "# ======== Plumbing: the same, to the letter, in every script. "
    "Nothing below is about the method.",
    "# ---- Options",
    "# ---- Data",
    "# ---- Colours",
    "# ---- Processes",
    "# ---- A run in its folder",
    "# ---- Pictures",
]


def files(folder, names=SCRIPTS):
    """Those of the scripts that the folder has."""
    return [path for path in (folder / f"{name}.py" for name in names) if path.exists()]


def definitions(lines):
    """Top-level functions and classes -> {name: slice of the lines}, decorators included."""
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = slice(first_line(node) - 1, node.end_lineno)
    return found


def first_line(node):
    """Number of the line in which a function or class begins, decorators included."""
    return min(part.lineno for part in (node, *node.decorator_list))


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
    wanted = sources(source)
    if wrong := [name for name in names if name in EXEMPT]:
        raise ValueError(f"{' '.join(wrong)}: belongs to each script alone, so it is not copied")
    if wrong := [name for name in names if name not in wanted]:
        raise ValueError(f"{' '.join(wrong)}: no such definition at the top level of {source}")
    messages = []
    for path in files(source.parent):
        if path.resolve() == source.resolve():
            continue
        lines = path.read_text().split("\n")
        own = definitions(lines)
        changed = []
        for name in names:
            if name not in own:
                continue
            if lines[own[name]] == wanted[name]:
                messages.append(f"{path.name}: {name} is already equal")
            else:
                messages.append(f"{path.name}: {name} changed")
                changed.append(name)
        for name in sorted(changed, key=lambda name: own[name].start, reverse=True):
            lines[own[name]] = wanted[name]  # from the last one up: the other slices stay right
        if changed:
            path.write_text("\n".join(lines))
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


# ---- 1. Checks of a folder of scripts: each returns a list of what is wrong


def wide_lines(folder):
    """Lines wider than WIDTH."""
    found = []
    for path in files(folder, SOURCES):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > WIDTH:
                found.append(f"{path.name}:{number}: {len(line)} columns")
    return found


def banners(path):
    """The lines that begin a section, in the file's order."""
    return [line for line in path.read_text().splitlines() if line.startswith(("# --", "# =="))]


def wrong_banners(folder):
    """Scripts whose banners are not those above. linear_eval.py and sampler.py have numbered ones,
    and may have plumbing at the end, with fewer sections."""
    found = []
    for path in files(folder, METHODS):
        own = [re.sub("schedules$", "schedule", line) for line in banners(path)]
        for line, right in itertools.zip_longest(own, METHOD + PLUMBING, fillvalue="the end"):
            if line != right:
                found.append(f"{path.name}: {line} in place of {right}")
                break
    for path in files(folder, ["linear_eval", "sampler"]):
        own = banners(path)
        end = own.index(PLUMBING[0]) if PLUMBING[0] in own else len(own)
        numbered = [re.fullmatch(r"# ---- (\d+)\. \S.*", line) for line in own[:end]]
        if not all(numbered):
            found.append(f"{path.name}: {own[numbered.index(None)]}")
            continue
        numbers = [int(banner[1]) for banner in numbered]
        if not numbers or numbers != sorted(set(numbers)):
            found.append(f"{path.name}: numbers {numbers} do not ascend")
        if own[end:] != [line for line in PLUMBING if line in own[end:]]:
            found.append(f"{path.name}: other plumbing, or in another order: {own[end + 1 :]}")
    return found


def places(path):
    """{name of a definition: the nearest banner above it}, in the file's order."""
    lines = path.read_text().split("\n")
    found = {}
    for name, where in definitions(lines).items():
        above = [line for line in lines[: where.start] if line.startswith(("# --", "# =="))]
        found[name] = above[-1] if above else "no banner"
    return found


def misplaced(folder):
    """Definitions that are plumbing in one script, and in another stand under another banner or in
    another order."""
    found = []
    scripts = {path.name: places(path) for path in files(folder)}
    for first, second in itertools.combinations(scripts, 2):
        common = [name for name in scripts[first] if name in scripts[second]]
        plumbing = []
        for name in common:
            pair = [scripts[first][name], scripts[second][name]]
            if pair[0] == pair[1] and pair[0] in PLUMBING:
                plumbing.append(name)
            elif pair[0] in PLUMBING or pair[1] in PLUMBING:
                found.append(f"{name}: {pair[0]} in {first}, {pair[1]} in {second}")
        other = [name for name in scripts[second] if name in plumbing]
        for name, right in zip(plumbing, other):
            if name != right:
                found.append(f"{name}: in {first} before {right}, in {second} after it")
                break
    return found


def loose_plumbing(folder):
    """What stands below the plumbing banner and is no function, class or call of main."""
    found = []
    for path in files(folder):
        text = path.read_text()
        if PLUMBING[0] not in text.splitlines():
            continue
        banner = text.splitlines().index(PLUMBING[0]) + 1
        for node in ast.parse(text).body:
            expected = ast.FunctionDef | ast.ClassDef | ast.If
            if node.lineno > banner and not isinstance(node, expected):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def long_functions(folder):
    """Functions and methods, inner ones too, of more than LONGEST lines."""
    found = []
    for path in files(folder, SOURCES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - first_line(node) + 1
                if length > LONGEST:
                    found.append(f"{path.name}:{node.lineno}: {node.name} has {length} lines")
    return found


def crammed(folder):
    """Assignments of several values to several names at once, and names in strings."""
    found = []
    for path in files(folder, SOURCES):
        for node in ast.walk(ast.parse(path.read_text())):
            if assigns_several(node) or splits_text(node):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def assigns_several(node):
    """a, b = x, y; not a, b = x, which unpacks one value."""
    several = ast.Tuple | ast.List
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, several)
        and any(isinstance(target, several) for target in node.targets)
    )


def splits_text(node):
    """Whether a text is cut into words in the code itself: "a b".split(), f-strings too."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    text = node.func.value
    literal = isinstance(text, ast.JoinedStr) or (
        isinstance(text, ast.Constant) and isinstance(text.value, str)
    )
    return literal and node.func.attr in ("split", "rsplit", "splitlines")


def unused(folder):
    """Functions, classes and constants that the script itself needs nowhere, in what it runs or in
    public names. Those of sampler.py are for the scripts."""
    found = []
    imported = set()
    for path in files(folder):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module == "sampler":
                imported |= {alias.name for alias in node.names}
    for path in files(folder, SOURCES):
        uses, lines = uses_of_definitions(path)
        reached = set()
        waiting = uses[None] | PUBLIC | (imported if path.stem == "sampler" else set())
        while waiting:
            name = waiting.pop()
            if name in uses and name not in reached:
                reached.add(name)
                waiting |= uses[name]
        for name in lines:
            if name not in reached:
                found.append(f"{path.name}:{lines[name]}: {name} is unused")
    return found


def uses_of_definitions(path):
    """{name of a function, class or constant: global names that it uses} and {name: its line}.

    Only of the top level. Under None stand the names that other statements use."""
    uses = {None: set()}
    lines = {}
    for node in ast.parse(path.read_text()).body:
        used = global_names(compile(ast.Module([node], []), path, "exec"))
        for name in names_defined(node) or [None]:
            uses.setdefault(name, set())
            uses[name] |= used
            if name is not None:
                lines.setdefault(name, node.lineno)
    return uses, lines


def names_defined(node):
    """Names that a statement at the top level gives to a function, a class or constants."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        parts = [part for target in node.targets for part in ast.walk(target)]
        return [part.id for part in parts if isinstance(part, ast.Name)]
    return []


def global_names(code):
    """Names that the code, functions in it included, looks up outside its own functions."""
    names = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            names.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return names


def imports(text):
    """First names of all modules that the text imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return {name.split(".")[0] for name in names}  # "": relative


def foreign_imports(folder):
    """Modules besides RUNTIME and Python's own."""
    found = []
    for path in files(folder, SOURCES):
        other = imports(path.read_text()) - RUNTIME - set(sys.stdlib_module_names)
        found += [f"{path.name} imports {name}" for name in sorted(other)]
    return found


CHECKS = [
    differences,
    wide_lines,
    wrong_banners,
    misplaced,
    loose_plumbing,
    long_functions,
    crammed,
    unused,
    foreign_imports,
]


@pytest.mark.parametrize("check", CHECKS)
def test_scripts(check):
    assert files(ROOT, SOURCES) == [ROOT / f"{name}.py" for name in SOURCES]
    assert check(ROOT) == []


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
    """-> exit status, all that it wrote. An exception that is not caught fails the test."""
    status = 0
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code
    return status, output.getvalue()


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


def test_only_roles_are_exempt(tmp_path):
    functions = [f"def {name}():\n    return 0\n" for name in sorted(EXEMPT)]
    others = [function.replace("0", "1") for function in functions]
    write(tmp_path, msn=functions, mae=others)
    assert differences(tmp_path) == []
    assert EXEMPT == {"main", "parse_args", "train", "initialise", "parameter_groups", "schedule"}


def test_width_can_fail(tmp_path):
    write(tmp_path, sampler=["# " + 98 * "x", "# " + 99 * "x"])
    assert wide_lines(tmp_path) == ["sampler.py:6: 101 columns"]


def test_banners_can_fail(tmp_path):
    right = METHOD + PLUMBING
    write(tmp_path, msn=right, mae=[*right[:3], METHOD[3] + "s", *right[4:]])
    assert wrong_banners(tmp_path) == []
    for wrong, line, due in [
        (right[1:], METHOD[1], METHOD[0]),
        (right[:-1], "the end", PLUMBING[-1]),
        ([*right, PLUMBING[-1]], PLUMBING[-1], "the end"),
        ([*METHOD, *PLUMBING[1:]], PLUMBING[1], PLUMBING[0]),
        ([*METHOD, PLUMBING[0].lower(), *PLUMBING[1:]], PLUMBING[0].lower(), PLUMBING[0]),
        ([*METHOD, PLUMBING[0], PLUMBING[2], PLUMBING[1]], PLUMBING[2], PLUMBING[1]),
        (["# ---- 1. Recipes", *right[1:]], "# ---- 1. Recipes", METHOD[0]),
        (["# ---- 1. Recipe", "# ---- Loss"], "# ---- Loss", METHOD[1]),
    ]:
        write(tmp_path, mae=wrong)
        assert wrong_banners(tmp_path) == [f"mae.py: {line} in place of {due}"]


def test_numbered_banners_can_fail(tmp_path):
    right = [
        "# ---- 1. Tasks",
        "    # ---- 1. indented",
        "# ---- 3. Heads, part two",
        "# a comment",
    ]
    write(tmp_path, sampler=right, linear_eval=[*right, PLUMBING[0], PLUMBING[1], PLUMBING[4]])
    assert wrong_banners(tmp_path) == []
    for line in ("# --- 1. Data", "# ---- 1 Data", "# ---- Data", "# ---- 1. ", "# -----------"):
        write(tmp_path, sampler=[*right, line])
        assert wrong_banners(tmp_path) == [f"sampler.py: {line}"]
    for last, numbers in [("# ---- 3. Data", [1, 3, 3]), ("# ---- 2. Data", [1, 3, 2])]:
        write(tmp_path, sampler=[*right, last])
        assert wrong_banners(tmp_path) == [f"sampler.py: numbers {numbers} do not ascend"]
    write(tmp_path, sampler=right, linear_eval=[*right, PLUMBING[0], PLUMBING[4], PLUMBING[1]])
    assert "linear_eval.py: other plumbing, or in another order" in wrong_banners(tmp_path)[0]


def test_order_of_plumbing_can_fail(tmp_path):
    banner = PLUMBING[0]
    options = PLUMBING[1]
    data = PLUMBING[2]
    own = "class Own:\n    pass\n"
    write(tmp_path, msn=[MAIN, HEAD, banner, options, LOSS, data, own])
    write(tmp_path, mae=[HEAD, MAIN, banner, options, LOSS, data])
    assert misplaced(tmp_path) == []
    for parts, message in [
        ([LOSS, banner, options, data], f"loss: {options} in msn.py, no banner in mae.py"),
        ([METHOD[1], LOSS, banner], f"loss: {options} in msn.py, {METHOD[1]} in mae.py"),
        ([banner, options, data, LOSS], f"loss: {options} in msn.py, {data} in mae.py"),
        ([banner, options, HEAD], f"Head: no banner in msn.py, {options} in mae.py"),
    ]:
        write(tmp_path, mae=parts)
        assert misplaced(tmp_path) == [message]
    write(tmp_path, msn=[banner, options, LOSS, HEAD], mae=[banner, options, HEAD, LOSS])
    assert misplaced(tmp_path) == ["loss: in msn.py before Head, in mae.py after it"]


def test_loose_plumbing_can_fail(tmp_path):
    guard = 'if __name__ == "__main__":\n    main()\n'
    write(tmp_path, msn=["SIZE = 1\n", PLUMBING[0], LOSS, HEAD, guard], mae=["SIZE = 1\n"])
    assert loose_plumbing(tmp_path) == []
    write(tmp_path, msn=[PLUMBING[0], HEAD, "SIZE = 1\n"])
    assert loose_plumbing(tmp_path) == ["msn.py:10: SIZE = 1"]


def test_length_of_functions_can_fail(tmp_path):
    body = LONGEST * "    x = 0\n"
    longest = f"def short():\n{body[10:]}"
    long = f"def long():\n{body}"
    decorated = f"@staticmethod\n{longest.replace('short', 'long')}"
    write(tmp_path, msn=[longest], sampler=[longest])
    assert long_functions(tmp_path) == []
    for text, line in [(long, 4), (decorated, 5)]:
        write(tmp_path, msn=[text])
        assert long_functions(tmp_path) == [f"msn.py:{line}: long has 61 lines"]
        inner = "class Head:\n" + "".join(f"    {row}\n" for row in text.splitlines())
        write(tmp_path, msn=[inner])
        assert long_functions(tmp_path) == [f"msn.py:{line + 1}: long has 61 lines"]


def test_cramming_can_fail(tmp_path):
    for text in [
        "a, b = pair",
        "a, b = pair()",
        "a, (b, c) = pair()",
        "a = b = 1, 2",
        "for a, b in [(1, 2)]:\n    pass",
        "words = text.split()",
        "text = 'a b'.upper()",
        "text = ' '.join(words)",
    ]:
        write(tmp_path, msn=[text])
        assert crammed(tmp_path) == [], text
    for text in [
        "a, b = (1, 2)",
        "a, b = [1, 2]",
        "[a, b] = (b, a)",
        "a, *b = (1, 2, 3)",
        "c = a, b = (1, 2)",
        "self.a, self.b = (a, b)",
        "a, b = 'a b'.split()",
        "names = f'a {b}'.split(' ')",
        "names = 'a\\nb'.splitlines()",
        "names = 'a,b'.rsplit(',')",
    ]:
        write(tmp_path, msn=["", f"def f():\n    {text}\n"])
        assert len(crammed(tmp_path)) == 1 and crammed(tmp_path)[0].startswith("msn.py:7: "), text


def test_unused_definitions_can_fail(tmp_path):
    guard = 'if __name__ == "__main__":\n    main()\n'
    right = [
        "SIZE = 3\n",
        "from sampler import draw\n",
        "def wrap(function):\n    return function\n",
        "def size():\n    return SIZE\n",
        "def inner():\n    pass\n",
        "class Base:\n    pass\n",
        "class Head(Base):\n    def run(self):\n        return [inner() for _ in self]\n",
        "@wrap\ndef main(default=size()):\n    return Head\n",
        "def read_image(path):\n    pass\n",
        guard,
    ]
    write(tmp_path, msn=right, sampler=["def draw():\n    pass\n"])
    assert unused(tmp_path) == []
    for text, names in [
        ("def loss():\n    return loss()\n", ["loss"]),  # by itself alone
        ("def loss():\n    return Own\n\n\nclass Own:\n    x = loss\n", ["loss", "Own"]),
        ("def loss():\n    main = 0\n    return main\n", ["loss"]),
        ("LOSS = 1\n", ["LOSS"]),
    ]:
        write(tmp_path, msn=[*right, text])
        found = [line.split(": ")[1] for line in unused(tmp_path)]
        assert found == [f"{name} is unused" for name in names]
    shadowed = "def main(inner=1):\n    size = 2\n    return size + inner\n"
    write(tmp_path, msn=[right[0], right[3], right[4], shadowed, guard])
    assert unused(tmp_path) == [
        "msn.py:4: SIZE is unused",
        "msn.py:7: size is unused",
        "msn.py:11: inner is unused",
        "sampler.py:4: draw is unused",
    ]


def test_imports_can_fail(tmp_path):
    text = "import os.path, timm\nfrom torch.nn import F\ndef f():\n    from . import g\n"
    assert imports(text) == {"os", "timm", "torch", ""}
    write(tmp_path, mae=["import numpy, json\n"], msn=["def f():\n    import lightly.loss\n"])
    assert foreign_imports(tmp_path) == ["msn.py imports lightly"]


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


def test_program_runs_by_itself(tmp_path):
    write(tmp_path, msn=[LOSS], mae=[SHORT])
    command = [sys.executable, __file__, "--from", str(tmp_path / "msn.py"), "loss"]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    assert output.stdout == "mae.py: loss changed\n" and output.stderr == ""
    assert differences(tmp_path) == []


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
        assert status == 2 and text in output
    assert read(tmp_path) == before
    assert program("--from", tmp_path / "mae.py", "Head") == (0, "no other script has Head\n")


def test_program_repairs_every_definition_of_every_script(tmp_path):
    for path in files(ROOT):
        source = tmp_path / path.name
        twin = tmp_path / ("mae.py" if path.name != "mae.py" else "msn.py")
        lines = path.read_text().split("\n")
        own = definitions(lines)
        names = sorted(own.keys() - EXEMPT)
        source.write_text(path.read_text())
        for end in sorted((own[name].stop for name in names), reverse=True):
            lines.insert(end - 1, "    # changed")
        twin.write_text("\n".join(lines))
        assert len(differences(tmp_path)) == len(names) > 0
        status, output = program("--from", source, *names)
        assert status == 0 and output.count("changed\n") == len(names)
        assert twin.read_text() == path.read_text() and source.read_text() == path.read_text()
        source.unlink()
        twin.unlink()


if __name__ == "__main__":
    main()
