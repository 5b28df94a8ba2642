"""Same name, same code: what two scripts both define is identical to the letter.

    python tests/test_copies.py --from msn.py VisionTransformer [more names]

writes these definitions of msn.py into the other scripts that have them. The tests below also check
the form of the scripts: their sections, long functions, crammed lines, unused definitions.
"""

import argparse
import ast
import dis
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
CHANGES = 40  # lines of msn.py that are others in pmsn.py, and of pmsn.py
RUNTIME = {"torch", "torchvision", "numpy", "tqdm", "PIL", "sampler"}  # PIL: torchvision's
PUBLIC = {"load_encoder", "read_image", "clevr_count", "clevr_dist", "kitti_dist"}  # for notebooks

TITLES = ["Recipe", "Loss", "Model", "Optimiser and schedule", "Views", "Training"]
METHOD = [f"# ---- {number}. {title}" for number, title in enumerate(TITLES, 1)]
BANNER = "# ======== Plumbing. Nothing below is about the method; scripts share it to the letter."
EVALUATION = [BANNER, "# ---- Options", "# ---- Data", "# ---- Processes"]  # linear_eval.py's
PLUMBING = [*EVALUATION, "# ---- A run in its folder"]


def files(folder, names=SCRIPTS):
    """Those of the scripts that the folder has."""
    return [path for path in (folder / f"{name}.py" for name in names) if path.exists()]


def definitions(lines):
    """Functions, classes and types of options of the top level -> {name: slice of the lines}."""
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = slice(first_line(node) - 1, node.end_lineno)
        if is_type(node):
            found[node.targets[0].id] = slice(node.lineno - 1, node.end_lineno)
    return found


def is_type(node):
    """x = number(...): a type of options."""
    return isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("number(")


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
        for name in own.keys() & set(names):
            if lines[own[name]] == wanted[name]:
                messages.append(f"{path.name}: {name} is already equal")
            else:
                messages.append(f"{path.name}: {name} changed")
                changed.append(name)
        for name in sorted(changed, key=lambda name: own[name].start, reverse=True):
            lines[own[name]] = wanted[name]  # from the last one up: the other slices stay right
        if changed:
            path.write_text("\n".join(lines))
    return sorted(messages) or [f"no other script has {' or '.join(names)}"]


def main(argv=None):
    """Copy definitions from one script to the others."""
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("--from", dest="source", type=Path, required=True, help="script to copy from")
    p.add_argument("names", nargs="+", help="its functions, classes or types of options")
    args = p.parse_args(argv)
    try:
        print(*copy_definitions(args.source, args.names), sep="\n")
    except (OSError, SyntaxError, ValueError) as error:
        p.error(str(error))


# ---- 1. Checks of a folder of scripts: each returns a list of what is wrong


def nodes(folder, names=SOURCES):
    """All parts of all scripts, with the script's path."""
    for path in files(folder, names):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def wide_lines(folder):
    """Lines wider than WIDTH."""
    found = []
    for path in files(folder, SOURCES):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > WIDTH:
                found.append(f"{path.name}:{number}: {len(line)} columns")
    return found


def is_banner(line):
    return line.startswith(("# --", "# =="))


def wrong_banners(folder):
    """Scripts whose sections are not those above. linear_eval.py and sampler.py have titles of
    their own; the first has three sections of plumbing, the second none."""
    found = []
    for path in files(folder, SOURCES):
        own = [line for line in path.read_text().splitlines() if is_banner(line)]
        own = [re.sub("schedules$", "schedule", line) for line in own]
        due = METHOD + PLUMBING
        if path.stem not in METHODS:
            above = itertools.takewhile(lambda line: line != BANNER, own)
            due = [title(number, line) for number, line in enumerate(above, 1)] or [title(1, "")]
            due += EVALUATION if path.stem == "linear_eval" else []
        for line, right in itertools.zip_longest(own, due, fillvalue="the end"):
            if line != right:
                found.append(f"{path.name}: {line} in place of {right}")
                break
    return found


def title(number, line):
    """The line, if it is the banner of that section, or what it should be."""
    return line if re.fullmatch(rf"# ---- {number}\. \S.*", line) else f"# ---- {number}. Title"


def places(path):
    """{name of a definition: the nearest banner above it}, in the file's order."""
    lines = path.read_text().split("\n")
    found = {}
    for name, where in definitions(lines).items():
        above = [line for line in lines[: where.start] if is_banner(line)]
        found[name] = above[-1] if above else "no banner"
    return found


def misplaced(folder):
    """Definitions that are plumbing in one script, and in another stand under another banner or in
    another order: the first of two scripts."""
    found = []
    scripts = {path.name: places(path) for path in files(folder)}
    for first, second in itertools.combinations(scripts, 2):
        ours, theirs = scripts[first], scripts[second]
        common = ours.keys() & theirs.keys()
        common = {name for name in common if {ours[name], theirs[name]} & set(PLUMBING)}
        ours, theirs = ([x for x in own.items() if x[0] in common] for own in (ours, theirs))
        for (mine, place), (other, its) in zip(ours, theirs):
            if (mine, place) != (other, its):
                found.append(f"{first}: {mine}, {place}; {second}: {other}, {its}")
                break
    return found


def loose_plumbing(folder):
    """What stands below the plumbing banner and is no definition or call of main."""
    found = []
    for path in files(folder):
        text, _, plumbing = path.read_text().partition(BANNER + "\n")
        for node in ast.parse(plumbing).body:
            expected = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If) or is_type(node)
            if not expected:
                line = text.count("\n") + 1 + node.lineno
                found.append(f"{path.name}:{line}: {ast.unparse(node)}")
    return found


def many_changes(folder):
    """Whether more than CHANGES lines of msn.py are others in pmsn.py, or the reverse."""
    done = subprocess.run(["diff", "msn.py", "pmsn.py"], cwd=folder, capture_output=True, text=True)
    starts = [line[:1] for line in done.stdout.splitlines()]
    counts = {name: starts.count(sign) for name, sign in (("msn.py", "<"), ("pmsn.py", ">"))}
    return [f"{name}: {number} lines" for name, number in counts.items() if number > CHANGES]


def long_functions(folder):
    """Functions and methods, inner ones too, of more than LONGEST lines."""
    found = []
    for path, node in nodes(folder):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - first_line(node) + 1
            if length > LONGEST:
                found.append(f"{path.name}:{node.lineno}: {node.name} has {length} lines")
    return found


def crammed(folder):
    """Assignments of several values to several names at once, and names in strings."""
    return [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path, node in nodes(folder)
        if assigns_several(node) or splits_text(node)
    ]


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
    for _, node in nodes(folder, SCRIPTS):
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
        found += [f"{path.name}:{lines[name]}: {name}" for name in lines if name not in reached]
    return found


def uses_of_definitions(path):
    """{name of a function, class or constant: global names that it uses} and {name: its line}.

    Only of the top level. Under None stand the names that other statements use."""
    uses = {None: set()}
    lines = {}
    for node in ast.parse(path.read_text()).body:
        used = global_names(compile(ast.Module([node], []), path, "exec"))
        for name in names_defined(node) or [None]:
            uses[name] = uses.get(name, set()) | used
            if name is not None:
                lines.setdefault(name, node.lineno)
    return uses, lines


def names_defined(node):
    """Names that a statement at the top level gives to a function, a class or constants."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    names = [part.id for part in names if isinstance(part.ctx, ast.Store)]
    return names if isinstance(node, ast.Assign) else []


def global_names(code):
    """Names that the code, functions in it included, looks up outside its own functions."""
    lookups = ("LOAD_NAME", "LOAD_GLOBAL")
    names = {x.argval for x in dis.get_instructions(code) if x.opname in lookups}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(global_names, inner))


def foreign_imports(folder):
    """Modules besides RUNTIME and Python's own, wherever they are imported."""
    found = []
    for path, node in nodes(folder):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.split(".")[0] not in RUNTIME | set(sys.stdlib_module_names):
                found.append(f"{path.name}:{node.lineno}: {name}")
    return found


CHECKS = [differences, wide_lines, wrong_banners, misplaced, loose_plumbing]
CHECKS += [many_changes, long_functions, crammed, unused, foreign_imports]


@pytest.mark.parametrize("check", CHECKS)
def test_scripts(check):
    assert files(ROOT, SOURCES) == [ROOT / f"{name}.py" for name in SOURCES]
    assert check(ROOT) == []


# ---- 2. The checks and the program, on small scripts: {name: the text's parts}

LOSS = '''@torch.no_grad()
def loss(z):
    """Mean."""
    return z.mean()  # over images
'''
SHORT = "def loss(z):\n    return 0\n"
HEAD = "class Head:\n    size = 3\n"
MAIN = "def main():\n    pass\n"
TYPE = "positive = number(int, 1)\n"
GUARD = 'if __name__ == "__main__":\n    main()\n'


def write(folder, **scripts):
    folder.mkdir(exist_ok=True)
    for name, parts in scripts.items():
        (folder / f"{name}.py").write_text("\n".join(parts))


def assert_finds(check, folder, expected, **scripts):
    """The check finds this in the scripts, and in those of earlier calls in the folder."""
    write(folder, **scripts)
    assert check(folder) == expected, scripts


def test_differences_are_found_to_the_letter(tmp_path):
    own = [f"def {name}():\n    return 0\n" for name in sorted(EXEMPT)]
    other = [text.replace("0", "1") for text in own]
    assert_finds(
        differences, tmp_path, [],
        msn=[LOSS, HEAD, TYPE, *own], mae=[HEAD, LOSS, TYPE, *other], sampler=[SHORT],
    )  # fmt: skip
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
        assert_finds(differences, tmp_path, ["loss: msn.py mae.py"], mae=[LOSS.replace(old, new)])
    lines = ["Head: msn.py mae.py", "loss: msn.py linear_eval.py", "positive: msn.py mae.py"]
    changed = [HEAD.replace("3", "4"), TYPE.replace("1", "2")]
    assert_finds(differences, tmp_path, lines, mae=changed, linear_eval=["class loss:\n    x = 0"])
    assert EXEMPT == {"main", "parse_args", "train", "initialise", "parameter_groups", "schedule"}


def test_width_length_and_changes_can_fail(tmp_path):
    wide = ["# " + 98 * "x", "# " + 99 * "x"]
    assert_finds(wide_lines, tmp_path, ["sampler.py:2: 101 columns"], sampler=wide)

    body = LONGEST * "    x = 0\n"
    decorated = f"@staticmethod\ndef long():\n{body[10:]}"
    for text, lines in [
        (decorated[14:], []),
        (f"def long():\n{body}", ["msn.py:1: long has 61 lines"]),
        (decorated, ["msn.py:2: long has 61 lines"]),
        (
            f"class Head:\n    def long():\n{body.replace(' ', '  ')}",
            ["msn.py:2: long has 61 lines"],
        ),
    ]:
        assert_finds(long_functions, tmp_path, lines, msn=[text])

    old = 50 * "x = 0\n"
    new = 40 * "y = 0\n" + 10 * "x = 0\n"
    assert_finds(many_changes, tmp_path, [], msn=[old], pmsn=[new])
    assert_finds(many_changes, tmp_path, ["pmsn.py: 41 lines"], pmsn=["y = 0", new])
    assert_finds(many_changes, tmp_path, ["msn.py: 41 lines"], msn=["x = 0", old], pmsn=[new])


def test_banners_can_fail(tmp_path):
    options, data = PLUMBING[1:3]
    right = METHOD + PLUMBING
    own = ["# ---- 1. Tasks", "    # ---- 1. indented", "# ---- 2. Heads, part two", "# a comment"]
    plural = [*right[:3], METHOD[3] + "s", *right[4:]]
    evaluation = [*own, *EVALUATION]
    assert_finds(
        wrong_banners, tmp_path, [], msn=right, mae=plural, linear_eval=evaluation, sampler=own
    )
    for name, wrong, line, due in [
        ("mae", right[1:], METHOD[1], METHOD[0]),
        ("mae", right[:-1], "the end", PLUMBING[-1]),
        ("mae", [*right, "# ---- More"], "# ---- More", "the end"),
        ("mae", [*METHOD, *PLUMBING[1:]], options, BANNER),
        ("mae", [*METHOD, BANNER.lower(), *PLUMBING[1:]], BANNER.lower(), BANNER),
        ("mae", [*METHOD, BANNER, data, options], data, options),
        ("mae", ["# ---- 1. Recipes", *right[1:]], "# ---- 1. Recipes", METHOD[0]),
        ("linear_eval", own, "the end", BANNER),
        ("linear_eval", [*own, *PLUMBING[:3]], "the end", PLUMBING[3]),
        ("linear_eval", [*own, *PLUMBING], PLUMBING[4], "the end"),
        ("linear_eval", [*own, BANNER, data, options], data, options),
        ("sampler", [], "the end", "# ---- 1. Title"),
        ("sampler", [*own, BANNER], BANNER, "the end"),
        ("sampler", [*own, "# --- 3. Data"], "# --- 3. Data", "# ---- 3. Title"),
        ("sampler", [*own, "# ---- 3 Data"], "# ---- 3 Data", "# ---- 3. Title"),
        ("sampler", [*own, "# ---- 3. "], "# ---- 3. ", "# ---- 3. Title"),
        ("sampler", [*own, "# ---- 4. Data"], "# ---- 4. Data", "# ---- 3. Title"),
    ]:
        folder = tmp_path / "wrong"
        assert_finds(
            wrong_banners, folder, [f"{name}.py: {line} in place of {due}"], **{name: wrong}
        )
        (folder / f"{name}.py").unlink()


def test_plumbing_can_fail(tmp_path):
    options, data = PLUMBING[1:3]
    own = "class Own:\n    x = 0\n"
    right = [MAIN, HEAD, BANNER, options, LOSS, data, TYPE, own, GUARD]
    write(tmp_path, msn=["SIZE = 1", *right], mae=[HEAD, MAIN, *right[2:7]])
    assert misplaced(tmp_path) == loose_plumbing(tmp_path) == []
    for wrong, mine, other in [
        ([LOSS, BANNER, options], f"loss, {options}", "loss, no banner"),
        ([METHOD[1], LOSS, BANNER], f"loss, {options}", f"loss, {METHOD[1]}"),
        ([BANNER, data, LOSS], f"loss, {options}", f"loss, {data}"),
        ([BANNER, options, HEAD], "Head, no banner", f"Head, {options}"),
        ([BANNER, data, TYPE, options, LOSS], f"loss, {options}", f"positive, {data}"),
    ]:
        assert_finds(misplaced, tmp_path, [f"msn.py: {mine}; mae.py: {other}"], mae=wrong)
    for line in ("SIZE = 1", "SIZE = numbers(int, 1)", "number(int, 1)"):
        wrong = ["SIZE = 1", BANNER, HEAD, line]
        assert_finds(loose_plumbing, tmp_path, [f"mae.py:6: {line}"], mae=wrong)


def test_cramming_can_fail(tmp_path):
    for text in [
        "a, b = pair",
        "a, (b, c) = pair()",
        "a = b = 1, 2",
        "for a, b in [(1, 2)]:\n    pass",
        "words = text.split()",
        "text = 'a b'.upper()",
        "text = ' '.join(words)",
    ]:
        assert_finds(crammed, tmp_path, [], msn=[text])
    for text in [
        "a, b = (1, 2)",
        "[a, b] = (b, a)",
        "a, *b = [1, 2, 3]",
        "c = a, b = (1, 2)",
        "self.a, self.b = (a, b)",
        "'a b'.split()",
        "f'a {b}'.split(' ')",
        "'a\\nb'.splitlines()",
        "'a,b'.rsplit(',')",
    ]:
        assert_finds(crammed, tmp_path, [f"msn.py:2: {text}"], msn=[f"def f():\n    {text}\n"])


def test_unused_definitions_can_fail(tmp_path):
    right = [
        "SIZE = 3\n",
        "def size():\n    return SIZE\n",
        "def inner():\n    pass\n",
        "from sampler import draw\n",
        "torch.limit = 3\n",  # defines no name
        "def wrap(function):\n    return function\n",
        "class Base:\n    pass\n",
        "class Head(Base):\n    def run(self):\n        return [inner() for _ in self]\n",
        "@wrap\ndef main(default=size()):\n    return Head\n",
        "def read_image(path):\n    pass\n",
        GUARD,
    ]
    assert_finds(unused, tmp_path, [], msn=right, sampler=["def draw():\n    pass\n"])
    for text, names in [
        ("def loss():\n    return loss()\n", ["loss"]),  # by itself alone
        ("def loss():\n    return Own\nclass Own:\n    x = loss\n", ["loss", "Own"]),
        ("def loss():\n    main = 0\n    return main\n", ["loss"]),
        ("LOSS, SIZES = 1, 2\n", ["LOSS", "SIZES"]),
    ]:
        write(tmp_path, msn=[*right, text])
        assert [line.split(": ")[1] for line in unused(tmp_path)] == names
    shadowed = "def main(inner=1):\n    size = 2\n    return size + inner\n"
    lines = ["msn.py:1: SIZE", "msn.py:3: size", "msn.py:6: inner", "sampler.py:1: draw"]
    assert_finds(unused, tmp_path, lines, msn=[*right[:3], shadowed, GUARD])


def test_imports_can_fail(tmp_path):
    text = "import os.path, timm\nfrom torch.nn import F\ndef f():\n    from . import g\n"
    lines = ["msn.py:1: timm", "msn.py:4: .", "sampler.py:1: lightly.loss"]
    assert_finds(foreign_imports, tmp_path, lines, msn=[text], sampler=["import lightly.loss"])


def test_program_copies_and_says_what_it_changed(tmp_path):
    head, other = HEAD.replace("3", "4"), TYPE.replace("1", "2")
    before, after = tmp_path / "before", tmp_path / "after"
    write(before, msn=[HEAD, LOSS, MAIN, TYPE], pmsn=[SHORT, head, MAIN], mae=[MAIN, LOSS])
    write(after, msn=[HEAD, LOSS, MAIN, TYPE], pmsn=[LOSS, HEAD, MAIN], mae=[MAIN, LOSS])
    write(before, vicreg=[other, MAIN, SHORT], simclr=[MAIN], other=[SHORT])
    write(after, vicreg=[TYPE, MAIN, LOSS], simclr=[MAIN], other=[SHORT])
    command = [sys.executable, __file__, "--from", str(before / "msn.py")]
    done = subprocess.run([*command, "loss", "Head", "positive"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "mae.py: loss is already equal",
        "pmsn.py: Head changed",
        "pmsn.py: loss changed",
        "vicreg.py: loss changed",
        "vicreg.py: positive changed",
    ]
    texts = [[path.read_text() for path in sorted(x.iterdir())] for x in (before, after)]
    assert texts[0] == texts[1] and differences(before) == []


def test_program_refuses(tmp_path, capsys):
    write(tmp_path, msn=[LOSS, MAIN], mae=[SHORT, HEAD, MAIN])
    for script, names, text in [
        ("msn.py", ["loss", "Head"], "Head: no such definition at the top level of"),
        ("msn.py", ["loss", "main"], "main: belongs to each script alone"),
        ("msn.py", [], "required: names"),
        ("simclr.py", ["loss"], "simclr.py"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(["--from", str(tmp_path / script), *names])
        assert text in capsys.readouterr().err
    assert differences(tmp_path) == ["loss: msn.py mae.py"]
    main(["--from", str(tmp_path / "mae.py"), "Head"])
    assert capsys.readouterr().out == "no other script has Head\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_program_repairs_every_definition(name, tmp_path):
    text = (ROOT / f"{name}.py").read_text()
    twin = tmp_path / ("mae.py" if name != "mae" else "msn.py")
    (tmp_path / f"{name}.py").write_text(text)
    lines = text.split("\n")
    own = definitions(lines)
    names = own.keys() - EXEMPT
    for changed in names:
        lines[own[changed].stop - 1] += "  # changed"
    twin.write_text("\n".join(lines))
    assert len(differences(tmp_path)) == len(names) > 0
    assert len(copy_definitions(tmp_path / f"{name}.py", names)) == len(names)
    assert twin.read_text() == (tmp_path / f"{name}.py").read_text() == text


if __name__ == "__main__":
    main()
