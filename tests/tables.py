"""Tables and figures of README and docs/results.md, from docs/results.jsonl alone.

reproduce.py calls make_all after its runs. A table stands in a page between <!-- NAME --> and
<!-- /NAME -->; what is between them is replaced. An interval is of 95 per cent, by Student's t; the
difference of two commands is of runs with the same seeds, pair by pair.
"""

import collections
import functools
import json
import operator
import re
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sampler

ROOT = Path(sampler.__file__).parent
METHODS = {
    "simclr": "SimCLR",
    "vicreg": "VICReg",
    "msn": "MSN",
    "mae": "MAE",
    "data2vec": "data2vec",
}
DEFAULTS = (*METHODS, "pmsn")
# Pairs of runs at K = 8 and 960. MSN's runs differ most: of four pairs its interval was twice as
# wide as the others'.
PAIRS = {"simclr": 4, "vicreg": 4, "msn": 8, "mae": 4, "data2vec": 4}
TARGETS = ("digits", "count", "size")
SWEEP = (2, 8, 32, 128, 512, 960)
# 600 steps on either when plates had 50 images a class; the balanced ones make three times as many
# now.
DATA = {
    "long-tailed": "--recipe plates-tail",
    "balanced": "--batch-size 256 --epochs 3 --warmup 0.3",
}
EXPONENTS = ("0.25", "1")
SHOWN = ("first digit", "count", "size")  # labels that a prototype's nearest pictures may share
TRIED = {  # to find MSN's recipe for plates
    "the recipe": "msn.py",
    "embeddings of width 128": "msn.py --output 128",
    "rate 1e-3": "msn.py --lr 1e-3",
    "rate 3e-3, width 128": "msn.py --lr 3e-3 --output 128",
    "two anchor views, 6 epochs, rate 3e-3, width 128": "msn.py --rand-views 2 --epochs 6 "
    "--warmup 0.6 --lr 3e-3 --output 128",
    "two anchor views, batches of 128, width 128": "msn.py --rand-views 2 --batch-size 128 "
    "--epochs 7 --warmup 0.5 --start-lr 2e-4 --lr 1e-3 --ema 0.98 --output 128",
}
TRIED_SEEDS = (11, 12)
FORMS = {  # of the toy
    "codes, noise 0.3": "--noise 0.3",
    "codes, noise 0.5": "--noise 0.5",
    "plates, views of two drawings": "--plates --noise 0.1",
    "plates, views of one drawing": "--plates --noise 0.1 --drawings 1",
}
PRIORS = {"uniform": 0, "matching": 2}  # exponents
# Small networks on a folder of 9,411 pictures of 32 pixels: EMOJI.
SIMCLR_FOLDER = "simclr.py --data EMOJI --arch small --image-size 32 --hidden 512 --blur 0 " + (
    "--batch-size 512 --epochs 30 --warmup 2 --base-lr 0.6 --trust 0.003"
)
MSN_FOLDER = "--data EMOJI --recipe cifar10 --focal-views 0 --rand-views 1 --batch-size 512 " + (
    "--epochs 30 --warmup 3 --start-lr 5e-4 --lr 3e-3 --ema 0.95"
)
FOLDER = {  # a method, then what is compared with it
    "SimCLR, K = 80": f"{SIMCLR_FOLDER} --k-classes 80",
    "SimCLR, K = 4": f"{SIMCLR_FOLDER} --k-classes 4",
    "MSN": f"msn.py {MSN_FOLDER}",
    "PMSN, exponent 0.25": f"pmsn.py {MSN_FOLDER} --exponent 0.25",
}


def k_command(method, k):
    return f"{method}.py --k-classes {k}" if k else f"{method}.py"


def priors(data):
    """Commands by name: MSN, then PMSN by exponents, on plates of this kind."""
    commands = {"MSN": f"msn.py {DATA[data]}"}
    for exponent in EXPONENTS:
        commands[f"PMSN, exponent {exponent}"] = f"pmsn.py --exponent {exponent} {DATA[data]}"
    return commands


def toys():
    """Commands by (form, prior)."""
    return {
        (form, prior): f"tests/toy.py --exponent {exponent} {options}"
        for form, options in FORMS.items()
        for prior, exponent in PRIORS.items()
    }


# ---- Results and statistics
def read_results(path):
    """The lines of results.jsonl as dicts. One that a kill has cut is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class Results:
    """Numbers of the lines by command and seed."""

    def __init__(self, lines):
        self.lines = collections.defaultdict(dict)
        for line in lines:
            command = line["command"].removeprefix("python ").rsplit(" --seed", 1)[0]
            self.lines[command][line["seed"]] = line

    def numbers(self, command, read):
        """{seed: number}; read: line -> a number, KeyError if the line has none."""
        found = {}
        for seed, line in sorted(self.lines[command].items()):
            try:
                found[seed] = read(line)
            except KeyError:
                continue
        return found


def top1(target, group="top1"):
    """Reads the per cent right of a target; group: frequent or rare classes, all by default."""
    return lambda line: float(np.mean(line[target][group]))


def groups(per_class, sizes):
    """Accuracy of the most frequent tenth of the classes and of the rarer half: per_class (C,), by
    the number of training images of each, sizes (C,)."""
    order = np.argsort(-np.asarray(sizes), kind="stable")
    place = np.arange(len(order)) / len(order)
    sorted_by_size = np.asarray(per_class)[order]
    return dict(
        frequent=float(sorted_by_size[place < 0.1].mean()),
        rare=float(sorted_by_size[place >= 0.5].mean()),
    )


def at(*keys):
    """Reads line[key][key]..."""
    return lambda line: functools.reduce(operator.getitem, keys, line)


def interval(numbers):
    """Mean and half-width of its 95 per cent interval, nan for a single number."""
    numbers = np.asarray(list(numbers), dtype=float)
    n = len(numbers)
    if n < 2:
        return numbers.mean(), np.nan
    return numbers.mean(), stats.t.ppf(0.975, n - 1) * numbers.std(ddof=1) / n**0.5


def paired(first, second):
    """Differences second - first of the seeds that both have."""
    return [second[seed] - first[seed] for seed in first if seed in second]


def cell(numbers, digits=1, sign=False):
    """ "mean ± half-width", or the number alone, or nothing."""
    numbers = list(numbers)
    if not numbers:
        return ""
    mean, half = interval(numbers)
    shape = f"{'+' if sign else ''}.{digits}f"
    text = format(mean, shape)
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def markdown(header, rows):
    if not rows:
        return "*No runs yet.*"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- Tables
def k_numbers(results, method, target):
    """{seed: per cent} at K = 960, the same at K = 8, and the changes from one to the other, of the
    seeds that both have."""
    many = results.numbers(k_command(method, 960), top1(target))
    few = results.numbers(k_command(method, 8), top1(target))
    both = many.keys() & few.keys()
    many = {seed: many[seed] for seed in sorted(both)}
    few = {seed: few[seed] for seed in sorted(both)}
    return many, few, paired(many, few)


def k_table(results):
    rows = []
    for target in TARGETS:
        for method, name in METHODS.items():
            many, few, change = k_numbers(results, method, target)
            if change:
                row = [target, name, len(change), cell(many.values()), cell(few.values())]
                rows.append([*row, cell(change, sign=True)])
    return markdown(["target", "method", "seeds", "K = 960", "K = 8", "change"], rows)


def k_digits_table(results):
    """README's: digits alone. They are void: see the head of docs/results.md."""
    rows = []
    for method, name in METHODS.items():
        many, few, change = k_numbers(results, method, "digits")
        if change:
            row = [name, len(change), cell(many.values()), cell(few.values())]
            rows.append([*row, cell(change, sign=True)])
    header = ["method", "seeds", "K = 960 (void)", "K = 8 (void)", "change (void)"]
    return markdown(header, rows)


def defaults_table(results):
    """Seed 0, the default's; others are tries of the recipe, without an untrained network."""
    rows = []
    for method in DEFAULTS:
        command = k_command(method, None)
        line = results.lines[command].get(0)
        if line is None:
            continue
        row = [f"`python {command}`", f"{line['seconds'] / 60:.1f}"]
        for target in TARGETS:
            row += [f"{line[target]['top1']:.1f}", f"{line[f'{target} untrained']['top1']:.1f}"]
        rows.append(row)
    header = ["command", "minutes, one thread"]
    for target in TARGETS:
        header += [target, "untrained"]
    return markdown(header, rows)


def sweep_table(results):
    rows = []
    for k in SWEEP:
        row = [k]
        for method in ("simclr", "msn"):
            found = results.numbers(k_command(method, k), top1("digits"))
            row.append(" ".join(f"{found[seed]:.1f}" for seed in (0, 1) if seed in found))
        if any(row[1:]):
            rows.append(row)
    return markdown(["K", "SimCLR: digits, seeds 0 and 1", "MSN"], rows)


def prototypes_table(results):
    columns = {
        "prototypes in use": at("prototypes", "used"),
        "effective number": at("prototypes", "effective"),
    }
    for name in SHOWN:
        columns[f"same {name}"] = at("prototypes", "shares", name)
    rows = []
    for k in (8, 960):
        command = k_command("msn", k)
        found = [results.numbers(command, read).values() for read in columns.values()]
        if found[0]:
            seeds = len(found[0])
            rows.append([f"K = {k}", seeds, *(cell(numbers, digits=0) for numbers in found)])
    for chance in [*results.numbers(command, at("prototypes", "chance")).values()][:1]:
        rows.append(["random pictures", "", "", "", *(f"{chance[name]:.0f}" for name in SHOWN)])
    return markdown(["MSN", "seeds", *columns], rows)


PRIOR_COLUMNS = {
    "digits": top1("digits"),
    "of the most frequent 10%": top1("digits", "frequent"),
    "of the rarest 50%": top1("digits", "rare"),
    "information: class": at("prototypes", "information", "class"),
    "first digit": at("prototypes", "information", "first digit"),
    "prototypes in use": at("prototypes", "used"),
    "effective number": at("prototypes", "effective"),
}


def tried_table(results):
    rows = []
    for name, command in TRIED.items():
        found = results.numbers(command, top1("digits"))
        tried = {seed: found[seed] for seed in TRIED_SEEDS if seed in found}
        if tried:
            rows.append([name, f"`python {command}`", " ".join(f"{x:.1f}" for x in tried.values())])
    return markdown(["what", "command", "digits, seeds 11 and 12"], rows)


def priors_table(results):
    rows = []
    for data in DATA:
        commands = priors(data)
        base = {
            column: results.numbers(commands["MSN"], read) for column, read in PRIOR_COLUMNS.items()
        }
        for name, command in commands.items():
            if not results.lines[command]:
                continue
            row = [data, name, len(results.lines[command])]
            change = ["", "less MSN", ""]
            for column, read in PRIOR_COLUMNS.items():
                found = results.numbers(command, read)
                row.append(cell(found.values()))
                change.append(cell(paired(base[column], found), sign=True))
            rows.append(row)
            if name != "MSN":
                rows.append(change)
    return markdown(["plates", "method", "seeds", *PRIOR_COLUMNS], rows)


def toy_table(results):
    rows = []
    for (form, prior), command in toys().items():
        lines = results.lines[command].values()
        if lines:
            found = [line["toy"] for line in lines]
            best = min(found, key=lambda run: run["loss"])
            row = [form, prior, len(found)]
            row += [cell((run[digit] for run in found), digits=0) for digit in "ab"]
            rows.append([*row, f"{best['a']:.0f}, {best['b']:.0f}"])
    header = ["form", "prior", "seeds", "of a", "of b", "run of the lowest loss: a, b"]
    return markdown(header, rows)


def folder_table(results):
    rows = []
    commands = list(FOLDER.items())
    for pair in zip(commands[::2], commands[1::2]):
        before = {}
        for name, command in pair:
            found = results.numbers(command, top1("class"))
            untrained = results.numbers(command, top1("class untrained"))
            if found:
                row = [name, len(found), cell(found.values()), cell(untrained.values())]
                rows.append([*row, cell(paired(before, found), sign=True)])
            before = found
    return markdown(["method", "seeds", "class", "untrained", "less the row above"], rows)


def time_table(results):
    """How long the runs took, on one thread each unless their lines say otherwise."""
    groups = collections.defaultdict(list)
    for lines in results.lines.values():
        for line in lines.values():
            script = line["command"].split()[1]
            groups[script].append(line)
    rows = []
    for script, lines in groups.items():
        hours = sum(line["seconds"] for line in lines) / 3600
        evaluating = sum(line["seconds_evaluating"] for line in lines) / 3600
        rows.append([f"`{script}`", len(lines), f"{hours:.1f}", f"{evaluating:.1f}"])
    rows.append(
        [
            "all",
            sum(row[1] for row in rows),
            *(f"{sum(float(row[i]) for row in rows):.1f}" for i in (2, 3)),
        ]
    )
    return markdown(["script", "runs", "hours training", "hours evaluating"], rows)


# ---- Figures
def in_style(draw):
    """The figure in this style, which no other figure gets."""

    @functools.wraps(draw)
    def styled(results):
        import matplotlib

        style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
        with matplotlib.rc_context(style):
            return draw(results)

    return styled


def new_figure(columns, width, height):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = dict(figsize=(width, height), dpi=120, layout="constrained")
    return plt.subplots(1, columns, sharex=True, **size)


@in_style
def draw_k(results):
    """Change from K = 960 to 8, by target and method, with intervals."""
    figure, axes = new_figure(len(TARGETS), 9, 2.6)
    for axis, target in zip(axes, TARGETS):
        for place, method in enumerate(METHODS):
            _, _, change = k_numbers(results, method, target)
            if change:
                mean, half = interval(change)
                control = method in ("mae", "data2vec")
                axis.errorbar(mean, place, xerr=half, fmt="o", capsize=3,
                              color="tab:grey" if control else "tab:red")  # fmt: skip
                axis.plot(change, [place + 0.25] * len(change), ".", color="silver", markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(METHODS)), METHODS.values() if target == TARGETS[0] else [])
        axis.set_ylim(len(METHODS) - 0.5, -0.5)
        axis.set_title(target)
        axis.set_xlabel("K = 8 less K = 960, points")
    return figure


@in_style
def draw_sweep(results):
    """Digits against K."""
    figure, axis = new_figure(1, 5, 3)
    for method, colour in (("simclr", "tab:blue"), ("msn", "tab:red")):
        by_k = {}
        for k in SWEEP:
            found = results.numbers(k_command(method, k), top1("digits"))
            by_k[k] = [found[seed] for seed in (0, 1) if seed in found]
        by_k = {k: found for k, found in by_k.items() if found}
        axis.plot(list(by_k), [np.mean(found) for found in by_k.values()], color=colour,
                  label=METHODS[method])  # fmt: skip
        for k, found in by_k.items():
            axis.plot([k] * len(found), found, "o", color=colour, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(SWEEP, SWEEP)
    axis.minorticks_off()
    axis.set_xlabel("K, distinct classes in a batch of 1,024")
    axis.set_ylabel("digits, per cent")
    axis.legend(frameon=False)
    return figure


@in_style
def draw_prototypes(results):
    """The pictures nearest to twelve prototypes of MSN, at K = 8 and 960, seed 0."""
    images, _ = sampler.open_data("plates", "val")
    figure, axes = new_figure(2, 8, 5.1)
    for axis, k in zip(axes, (8, 960)):
        axis.axis("off")
        axis.set_title(f"K = {k}")
        line = results.lines[k_command("msn", k)].get(0)
        if line:
            pictures = images[np.array(line["prototypes"]["shown"]), 0]  # (12, 10, 32, 32)
            rows, columns = pictures.shape[:2]
            sheet = np.full((34 * rows, 34 * columns), 255, dtype=np.uint8)
            for row in range(rows):
                for column in range(columns):
                    place = slice(34 * row, 34 * row + 32), slice(34 * column, 34 * column + 32)
                    sheet[place] = pictures[row, column]
            axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    return figure


TABLES = {
    "defaults": defaults_table,
    "k": k_table,
    "k digits": k_digits_table,
    "sweep": sweep_table,
    "prototypes": prototypes_table,
    "tried": tried_table,
    "priors": priors_table,
    "toy": toy_table,
    "folder": folder_table,
    "time": time_table,
}
FIGURES = {"k.png": draw_k, "sweep.png": draw_sweep, "prototypes.png": draw_prototypes}
PAGES = ("README.md", "docs/results.md")


def fill(text, results):
    """A page's text with its tables made anew."""
    for name, table in TABLES.items():
        block = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if block.search(text):
            rows = table(results)
            text = block.sub(lambda match, rows=rows: f"{match[1]}{rows}\n{match[2]}", text)
    return text


def make_all(lines, root=ROOT):
    """Write the tables into README and docs/results.md, and the figures into docs/."""
    results = Results(lines)
    for page in PAGES:
        path = root / page
        path.write_text(fill(path.read_text(), results))
    for name, draw in FIGURES.items():
        draw(results).savefig(root / "docs" / name, metadata={"Software": None})
