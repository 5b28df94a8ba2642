"""Tables and figures of README and docs/results.md, from docs/results.jsonl alone.

reproduce.py calls make_all after its runs. A table stands in a page between <!-- NAME --> and
<!-- /NAME -->; what is between them is replaced. An interval is of 95 percent, by Student's t; the
difference of two commands is of runs with the same seeds, pair by pair. docs/plan.md says what the
study compares, by which tests.
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
WITH_PRIOR = ("simclr", "vicreg", "msn")
CONTROLS = ("mae", "data2vec")
ARMS = ("K = 960", "K = 8", "K = 8, mixed")
SEEDS = 8
MARGIN = 10  # percent of what is learnt: a smaller loss of the controls counts as none
TARGETS = ("digits", "count", "size", "number", "neighbours")
SWEEP = (2, 8, 24, 96, 384, 960)
SWEEP_SEEDS = 4
DOSES = {  # at K = 8 and 960; the first value is the recipe's
    "simclr": ("--temperature", (0.1, 0.2, 0.5)),
    "vicreg": ("--cov-coeff", (4, 1, 0.25)),
    "msn": ("--me-max-weight", (1, 0.3, 0.1)),
}
DOSE_SEEDS = 3
LONGER = {  # the controls', with everything that is in epochs
    "mae": "--epochs 40 --warmup 4",
    "data2vec": "--epochs 15 --warmup 1.65 --ema-anneal 8.5",
}
LONGER_SEEDS = 5
DATA = {"balanced": "", "long-tailed": " --recipe plates-tail"}
FEWER = 75  # prototypes: about the effective number of 256 by the power law of exponent 1
PRIORS = {
    "MSN": "msn.py",
    "PMSN, 0.25": "pmsn.py --exponent 0.25",
    "PMSN, 0.5": "pmsn.py --exponent 0.5",
    "PMSN, 1": "pmsn.py --exponent 1",
    f"MSN, {FEWER} prototypes": f"msn.py --num-prototypes {FEWER}",
    "MSN, no Sinkhorn": "msn.py --no-sinkhorn",
    "PMSN, 1, no Sinkhorn": "pmsn.py --exponent 1 --no-sinkhorn",
}
# What is compared: all with MSN; exponent 1 with as few prototypes, and both without Sinkhorn.
PAIRS = [
    *(("MSN", name) for name in [*PRIORS][1:]),
    (f"MSN, {FEWER} prototypes", "PMSN, 1"),
    ("MSN, no Sinkhorn", "PMSN, 1, no Sinkhorn"),
]
FORMS = {  # of the toy
    "codes, noise 0.3": "--noise 0.3",
    "codes, noise 0.5": "--noise 0.5",
    "plates, views of two drawings": "--plates --noise 0.1",
    "plates, views of one drawing": "--plates --noise 0.1 --drawings 1",
}
TOY_PRIORS = {"uniform": 0, "matching": 2}  # exponents
# A small network on a folder of 9,411 pictures of 32 pixels: EMOJI.
SIMCLR_FOLDER = "simclr.py --data EMOJI --arch small --image-size 32 --hidden 512 --blur 0 " + (
    "--batch-size 512 --epochs 30 --warmup 2 --base-lr 0.6 --trust 0.003"
)
FOLDER = {
    "K = 80": f"{SIMCLR_FOLDER} --k-classes 80",
    "K = 4": f"{SIMCLR_FOLDER} --k-classes 4",
    "K = 4, mixed": f"tests/mixed.py {SIMCLR_FOLDER} --k-classes 4",
}
FOLDER_SEEDS = 5


# ---- Commands
def arm_command(method, arm):
    """The command of an arm: K = 960, K = 8, or K = 8 mixed."""
    k = arm.removeprefix("K = ").removesuffix(", mixed")
    mixed = "tests/mixed.py " if arm.endswith("mixed") else ""
    return f"{mixed}{method}.py --k-classes {k}"


def dose_command(method, value, arm):
    """The recipe's own value is not written: it is an arm of the study."""
    option, values = DOSES[method]
    changed = "" if value == values[0] else f" {option} {value}"
    return arm_command(method, arm) + changed


def longer_command(method, arm):
    return f"{arm_command(method, arm)} {LONGER[method]}"


def prior_command(name, data):
    return PRIORS[name] + DATA[data]


def toys():
    """Commands by (form, prior)."""
    return {
        (form, prior): f"tests/toy.py --exponent {exponent} {options}"
        for form, options in FORMS.items()
        for prior, exponent in TOY_PRIORS.items()
    }


# ---- Results
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

    def numbers(self, command, read, seeds=SEEDS):
        """{seed: number}; read: line -> a number, KeyError if the line has none."""
        found = {}
        for seed, line in sorted(self.lines[command].items()):
            if seed < seeds:
                try:
                    found[seed] = read(line)
                except KeyError:
                    continue
        return found


def at(*keys):
    """Reads line[key][key]..."""
    return lambda line: functools.reduce(operator.getitem, keys, line)


def top1(target):
    """Reads the percent right of a target, by the best feature."""
    return at(target, "top1")


def has_collapsed(line):
    """The plan's rule: at the end a prediction tells nothing of its image.

    Early lines of runs with Sinkhorn have the entropy less the cross-entropy as `information`: if
    all images get one prediction, balanced targets are uniform, and it is not above 0 either."""
    return line["last_log_line"].get("information", np.inf) < 0.02


# ---- Statistics
def interval(numbers, level=0.95):
    """Mean and half-width of its interval, nan for a single number."""
    numbers = np.asarray(list(numbers), dtype=float)
    n = len(numbers)
    if n < 2:
        return numbers.mean(), np.nan
    return numbers.mean(), stats.t.ppf((1 + level) / 2, n - 1) * numbers.std(ddof=1) / n**0.5


def paired(first, second):
    """Differences second - first of the seeds that both have."""
    return [second[seed] - first[seed] for seed in first if seed in second]


def holm(values):
    """p values, adjusted for their number by Holm's step-down rule."""
    values = np.asarray(values, dtype=float)
    order = np.argsort(values)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return adjusted.clip(max=1)


def shares_lost(results, method, arm="K = 8"):
    return shares_lost_between(results, arm_command(method, "K = 960"), arm_command(method, arm))


def shares_lost_between(results, base, command):
    """{seed: percent of what the base learns, beyond the untrained network, that the command
    lacks}. A collapsed base has learnt nothing that could be lost: its seed is left out."""
    many = results.numbers(base, top1("digits"))
    collapsed = results.numbers(base, has_collapsed)
    untrained = results.numbers(base, top1("digits untrained"))
    few = results.numbers(command, top1("digits"))
    seeds = [seed for seed in many if seed in few and seed in untrained and not collapsed[seed]]
    return {seed: 100 * (many[seed] - few[seed]) / (many[seed] - untrained[seed]) for seed in seeds}


def primary(results):
    """The primary outcome by method: its mean share lost and the lower end of its interval; that
    less the pooled controls' with the interval of Welch's t; p as adjusted for three methods; the
    verdict, if all seeds are there."""
    pooled = [x for method in CONTROLS for x in shares_lost(results, method).values()]
    found = {}
    for method in WITH_PRIOR:
        lost = list(shares_lost(results, method).values())
        if len(lost) < 2 or len(pooled) < 2:
            return {}  # the adjustment is for all three
        test = stats.ttest_ind(lost, pooled, equal_var=False)
        low, high = test.confidence_interval()
        mean, half = interval(lost)
        found[method] = dict(
            own_low=mean - half,
            difference=(low + high) / 2,
            half=(high - low) / 2,
            p=float(test.pvalue),
        )
    for method, p in zip(found, holm([one["p"] for one in found.values()])):
        found[method]["adjusted"] = p
        found[method]["verdict"] = verdict(**found[method]) if is_complete(results) else "running"
    return found


def verdict(own_low, difference, half, adjusted, **_):
    """By the plan, and the method itself must lose: that the controls gain is not enough."""
    if difference > 0 and adjusted < 0.05 and own_low > 0:
        return "supported"
    return "refuted" if difference + half < MARGIN else "undecided"


def verdict_of_controls(mean, half):
    """half: of the 90 % interval of their mean share lost."""
    if abs(mean) + half < MARGIN:
        return "hardly affected"
    return "affected" if abs(mean) - half > MARGIN else "undecided"


def is_complete(results):
    """Whether all runs of the primary outcome are there."""
    commands = [arm_command(method, arm) for method in METHODS for arm in ARMS]
    return all(len(results.numbers(command, top1("digits"))) == SEEDS for command in commands)


# ---- Writing
def cell(numbers, digits=1, sign=False):
    """ "mean ± half-width", or the number alone, or nothing."""
    numbers = list(numbers)
    if not numbers:
        return ""
    mean, half = interval(numbers)
    return plus_minus(mean, half, digits, sign)


def plus_minus(mean, half, digits=1, sign=False):
    text = format(mean, f"{'+' if sign else ''}.{digits}f")
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def p_value(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def grouped(rows):
    """A first cell that the row above has too is left empty."""
    above = [None] + [row[0] for row in rows]
    return [["" if row[0] == first else row[0], *row[1:]] for first, row in zip(above, rows)]


def markdown(header, rows):
    if not rows:
        return "*No runs yet.*"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- Tables
def arms_table(results):
    """README's and the page's first: digits by arm."""
    rows = []
    for method, name in METHODS.items():
        base = arm_command(method, "K = 960")
        columns = [results.numbers(arm_command(method, arm), top1("digits")) for arm in ARMS]
        if columns[0]:
            untrained = results.numbers(base, top1("digits untrained"))
            cells = [cell(numbers.values()) for numbers in (untrained, *columns)]
            lost = cell(shares_lost(results, method).values(), digits=0)
            rows.append([name, len(columns[0]), *cells, lost])
    return markdown(["method", "seeds", "untrained", *ARMS, "lost at K = 8, %"], rows)


def primary_table(results):
    """By the plan; the last column is what mixing saves, pair by pair."""
    found = primary(results)
    rows = []
    for method in METHODS if found else ():
        few, mixed = (shares_lost(results, method, arm) for arm in ARMS[1:])
        row = [METHODS[method], len(few), cell(few.values())]
        if method in found:
            one = found[method]
            row += [plus_minus(one["difference"], one["half"], sign=True)]
            row += [p_value(one["adjusted"]), one["verdict"]]
        else:
            row += [""] * 3
        rows.append([*row, cell(paired(mixed, few), sign=True)])
        collapsed = results.numbers(arm_command(method, "K = 8"), has_collapsed)
        if any(collapsed.values()):
            healthy = {seed: x for seed, x in few.items() if not collapsed[seed]}
            row = ["the same, not collapsed", len(healthy), cell(healthy.values()), *[""] * 3]
            rows.append([*row, cell(paired(mixed, healthy), sign=True)])
    if found:
        pooled = [x for method in CONTROLS for x in shares_lost(results, method).values()]
        mean, half = interval(pooled, level=0.9)
        said = verdict_of_controls(mean, half) if is_complete(results) else "running"
        rows.append(["both, 90 %", len(pooled), plus_minus(mean, half), "", "", said, ""])
    header = ["method", "runs", "lost at K = 8, %", "more than the controls", "p, adjusted"]
    return markdown([*header, "claim", "saved by mixing, %"], rows)


def paper_table(results):
    """The paper's signs beside ours, which an interval on one side of 0 decides."""
    compared = []  # what, the paper's words, its sign, our changes
    for target, said, sign in (
        ("digits", "much lower", "lower"),
        ("count", "much lower", "lower"),
        ("size", "not as the classes", None),
    ):
        for method in WITH_PRIOR:
            pair = [results.numbers(arm_command(method, arm), top1(target)) for arm in ARMS[:2]]
            compared.append([f"{METHODS[method]}: {target}", said, sign, paired(*pair)])
    for method in CONTROLS:
        pair = [results.numbers(arm_command(method, arm), top1("digits")) for arm in ARMS[:2]]
        compared.append([f"{METHODS[method]}: digits", "hardly moved", None, paired(*pair)])
    for data, sign in (("long-tailed", "higher"), ("balanced", "lower")):
        base = results.numbers(prior_command("MSN", data), top1("digits"))
        for name in ("PMSN, 0.25", "PMSN, 1"):
            found = results.numbers(prior_command(name, data), top1("digits"))
            compared.append([f"{name}, {data}: digits", sign, sign, paired(base, found)])
    rows = []
    for what, said, sign, changes in compared:
        if len(changes) > 1:
            mean, half = interval(changes)
            agrees = ""
            if sign:
                side = "higher" if mean > 0 else "lower"
                agrees = "agrees" if side == sign else "the opposite"
                agrees = agrees if abs(mean) > half else "undecided"
            rows.append([what, said, len(changes), plus_minus(mean, half, sign=True), agrees])
    return markdown(["at K = 8, and by PMSN", "the paper", "pairs", "here", ""], rows)


def targets_table(results):
    """Secondary: everything that was evaluated, from K = 960 to each other arm."""
    rows = []
    for target in TARGETS[1:]:
        for method, name in METHODS.items():
            many = results.numbers(arm_command(method, "K = 960"), top1(target))
            if not many:
                continue
            row = [target, name, len(many), cell(many.values())]
            for arm in ARMS[1:]:
                found = results.numbers(arm_command(method, arm), top1(target))
                row.append(cell(paired(many, found), sign=True))
            rows.append(row)
    return markdown(["target", "method", "seeds", *ARMS], grouped(rows))


def features_table(results):
    """What each feature of the ViTs gives."""
    rows = []
    for method, arms in (("msn", ARMS), *((method, ARMS[:1]) for method in CONTROLS)):
        for arm in arms:
            found = [
                results.numbers(arm_command(method, arm), at("digits", "features", feature))
                for feature in ("cls", "cls4", "patches")
            ]
            if found[0]:
                cells = [cell(numbers.values()) for numbers in found]
                rows.append([f"{METHODS[method]}, {arm}", len(found[0]), *cells])
    header = ["digits", "seeds", "cls", "cls of four blocks", "mean of patches"]
    return markdown(header, rows)


def sweep_table(results):
    """Digits at each K, and their same-seed change from the next larger K."""
    columns = ["K"]
    rows = [[k] for k in SWEEP]
    for method in ("simclr", "msn"):
        columns += [f"{METHODS[method]}: digits (seeds)", "change from the next row"]
        larger = {}  # of the next larger K, which is the row below
        for row in reversed(rows):
            found = results.numbers(arm_command(method, f"K = {row[0]}"), top1("digits"))
            row.append(f"{cell(found.values())} ({len(found)})" if found else "")
            row.append(cell(paired(larger, found), sign=True))
            larger = found
    return markdown(columns, [row for row in rows if any(row[1:])])


def distances_table(results):
    """Of embeddings: of a class over that between classes is the share that K = 8 should raise."""
    rows = []
    for method in WITH_PRIOR:
        for arm in ARMS:
            command = arm_command(method, arm)
            found = [
                results.numbers(command, at("distances", "embedding", name))
                for name in ("image", "same_class", "other_class")
            ]
            ratio = results.numbers(command, class_ratio)
            if ratio:
                cells = [cell(numbers.values(), digits=2) for numbers in (*found, ratio)]
                rows.append([METHODS[method], arm, len(ratio), *cells])
    header = ["method", "arm", "seeds", "two views", "same class", "other class", "same / other"]
    return markdown(header, grouped(rows))


def class_ratio(line):
    found = line["distances"]["embedding"]
    return found["same_class"] / found["other_class"]


def doses_table(results):
    """Digits by dose; the last column is by how much less is lost than with the recipe's own."""
    rows = []
    for method, (option, values) in DOSES.items():
        changes = []  # by dose, {seed: K = 8 less K = 960}
        for value in values:
            many, few = (
                results.numbers(dose_command(method, value, arm), top1("digits"), DOSE_SEEDS)
                for arm in ARMS[:2]
            )
            change = {seed: few[seed] - many[seed] for seed in many if seed in few}
            changes.append(change)
            if change:
                row = [METHODS[method], f"`{option} {value}`", len(change)]
                row += [cell(numbers.values()) for numbers in (many, few)]
                saved = paired(changes[0], change) if len(changes) > 1 else []
                rows.append([*row, cell(change.values(), sign=True), cell(saved, sign=True)])
    header = ["method", "dose", "seeds", *ARMS[:2], "change", "from the first dose"]
    return markdown(header, grouped(rows))


def longer_table(results):
    """Controls that are trained for longer; the claim is by the rule for controls."""
    rows = []
    pooled = []
    for method in CONTROLS:
        commands = [longer_command(method, arm) for arm in ARMS[:2]]
        many, few = (results.numbers(command, top1("digits")) for command in commands)
        untrained = results.numbers(commands[0], top1("digits untrained"))
        lost = list(shares_lost_between(results, *commands).values())
        pooled += lost
        if lost:
            cells = [cell(numbers.values()) for numbers in (untrained, many, few)]
            change = cell(paired(many, few), sign=True)
            rows.append([METHODS[method], len(lost), *cells, change, cell(lost), ""])
    if len(pooled) > 1:
        mean, half = interval(pooled, level=0.9)
        complete = len(pooled) == len(CONTROLS) * LONGER_SEEDS
        said = verdict_of_controls(mean, half) if complete else "running"
        rows.append(["both, 90 %", len(pooled), *[""] * 4, plus_minus(mean, half), said])
    header = ["method", "runs", "untrained", *ARMS[:2], "change", "lost at K = 8, %", "claim"]
    return markdown(header, rows)


PRIOR_COLUMNS = {
    "digits": top1("digits"),
    "from cls": at("digits", "features", "cls"),
    "AMI: class": at("prototypes", "adjusted", "class"),
    "first digit": at("prototypes", "adjusted", "first digit"),
    "prototypes in use": at("prototypes", "used"),
    "effective number": at("prototypes", "effective"),
}


def priors_table(results):
    rows = []
    for data in DATA:
        for name in PRIORS:
            command = prior_command(name, data)
            collapsed = results.numbers(command, has_collapsed)
            if collapsed:
                found = [results.numbers(command, read) for read in PRIOR_COLUMNS.values()]
                cells = [cell(numbers.values()) for numbers in found]
                rows.append([data, name, f"{sum(collapsed.values())} of {len(collapsed)}", *cells])
    return markdown(["plates", "method", "collapsed", *PRIOR_COLUMNS], grouped(rows))


def priors_change_table(results):
    """A row a pair of methods: changes of digits and Fisher's test of collapses, on each data."""
    rows = []
    for pair in PAIRS:
        row = [*reversed(pair)]
        for data in DATA:
            commands = [prior_command(name, data) for name in pair]
            collapsed = [results.numbers(command, has_collapsed) for command in commands]
            for target in ("digits", "from cls"):
                found = [results.numbers(command, PRIOR_COLUMNS[target]) for command in commands]
                row.append(change_cell(*found, *collapsed))
            row.append(fisher(*collapsed) if all(collapsed) else "")
        if any(row[2:]):
            rows.append(row)
    header = ["method", "change from"]
    for data in DATA:
        header += [f"{data}: digits", "from cls", "collapses, p"]
    return markdown(header, rows)


def change_cell(first, second, *collapsed):
    """The mean same-seed change; if a run has collapsed, also without its seed."""
    text = cell(paired(first, second), sign=True)
    gone = {seed for runs in collapsed for seed, did in runs.items() if did}
    if text and gone:
        healthy = {seed: number for seed, number in first.items() if seed not in gone}
        text += f"; without collapsed pairs {cell(paired(healthy, second), sign=True)}"
    return text


def fisher(first, second):
    """p of Fisher's exact test for two {seed: collapsed}."""
    counts = [[sum(one.values()), len(one) - sum(one.values())] for one in (first, second)]
    return p_value(stats.fisher_exact(counts).pvalue)


def tried_table(results):
    """Lines that say why they were tried, on the way to the recipes; by method."""
    found = [line for lines in results.lines.values() for line in lines.values() if "tried" in line]
    found.sort(key=lambda line: [*METHODS].index(line["command"].split()[1].removesuffix(".py")))
    rows = []
    for line in found:
        last = line["last_log_line"]
        information = f"{last['information']:.2f}" if "information" in last else ""
        digits = f"{line['digits']['top1']:.1f}" if "digits" in line else ""
        rows.append([line["tried"], last["step"], information, digits])
    return markdown(["what", "updates", "information", "digits"], rows)


def toy_table(results):
    """What prototypes tell of a and b under each prior, on average and in one run, in a row."""
    rows = []
    for form in FORMS:
        found = [
            [line["toy"] for line in results.lines[toys()[form, prior]].values()]
            for prior in TOY_PRIORS
        ]
        if not all(found):
            continue
        row = [form, len(found[0])]
        for runs in found:
            best = min(runs, key=lambda run: run["loss"])
            row += [cell((run[digit] for run in runs), digits=0) for digit in "ab"]
            row.append(f"{best['a']:.0f}, {best['b']:.0f}")
        rows.append(row)
    header = ["form", "seeds"]
    for prior in TOY_PRIORS:
        header += [f"{prior} prior: of a", "of b", "a, b at the lowest loss"]
    return markdown(header, rows)


def folder_table(results):
    rows = []
    many = results.numbers(FOLDER["K = 80"], top1("class"))
    for name, command in FOLDER.items():
        found = results.numbers(command, top1("class"))
        if found:
            untrained = results.numbers(command, top1("class untrained"))
            row = [name, len(found), cell(found.values()), cell(untrained.values())]
            rows.append([*row, cell(paired(many, found), sign=True) if found != many else ""])
    return markdown(["SimCLR", "seeds", "class", "untrained", "change from K = 80"], rows)


def time_table(results):
    """How long the study's runs took, on one thread each."""
    groups = collections.defaultdict(list)
    for lines in results.lines.values():
        for line in lines.values():
            if "tried" not in line and line.get("threads", 1) == 1:
                command = line["command"].removeprefix("python ").removeprefix("tests/mixed.py ")
                hours = [line["seconds"] / 3600, line["seconds_evaluating"] / 3600]
                groups[f"`{command.split()[0]}`"].append(hours)
                groups["all"].append(hours)
    groups["all"] = groups.pop("all", [])  # the last row
    rows = []
    for script, found in groups.items():
        rows.append([script, len(found), *(f"{sum(hours):.1f}" for hours in zip(*found))])
    return markdown(["script", "runs", "hours training", "hours evaluating"], rows)


# ---- Figures
COLOURS = {  # of a method, in every figure
    "simclr": "tab:blue",
    "vicreg": "tab:green",
    "msn": "tab:purple",
    "pmsn": "tab:pink",
    "mae": "tab:brown",
    "data2vec": "tab:orange",
}


def in_style(draw):
    """The figure in this style, which no other figure gets."""

    @functools.wraps(draw)
    def styled(results):
        import matplotlib

        style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
        with matplotlib.rc_context(style):
            return draw(results)

    return styled


def new_figure(columns, width, height, **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = dict(figsize=(width, height), dpi=120, layout="constrained")
    return plt.subplots(1, columns, **size, **options)


@in_style
def draw_arms(results):
    """Digits in the three arms, a line a seed; dashed, if one of its runs collapsed."""
    figure, axes = new_figure(len(METHODS), 9, 2.8, sharex=True, sharey=True)
    for axis, (method, name) in zip(axes, METHODS.items()):
        digits = [results.numbers(arm_command(method, arm), top1("digits")) for arm in ARMS]
        collapsed = [results.numbers(arm_command(method, arm), has_collapsed) for arm in ARMS]
        seeds = [seed for seed in digits[0] if all(seed in arm for arm in digits)]
        for seed in seeds:
            style = "--" if any(arm[seed] for arm in collapsed) else "-"
            axis.plot(ARMS, [arm[seed] for arm in digits], style, marker=".", linewidth=0.8,
                      color=COLOURS[method])  # fmt: skip
        untrained = results.numbers(arm_command(method, ARMS[0]), top1("digits untrained"))
        if untrained:
            axis.axhline(np.mean(list(untrained.values())), color="grey", linestyle=":")
        axis.set_title(f"{name}, n = {len(seeds)}")
        axis.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel("digits, percent")
    return figure


@in_style
def draw_sweep(results):
    """Digits against K: all runs, and a line through the means; an open circle has collapsed."""
    figure, axes = new_figure(2, 7, 3, sharex=True, sharey=True)
    for axis, method in zip(axes, ("simclr", "msn")):
        means = {}
        for k in SWEEP:
            command = arm_command(method, f"K = {k}")
            found = results.numbers(command, top1("digits"), SWEEP_SEEDS)
            collapsed = results.numbers(command, has_collapsed, SWEEP_SEEDS)
            for seed, number in found.items():
                axis.plot(k, number, "o", color=COLOURS[method], markersize=4,
                          fillstyle="none" if collapsed[seed] else "full")  # fmt: skip
            if found:
                means[k] = np.mean(list(found.values()))
        axis.plot(list(means), list(means.values()), color=COLOURS[method])
        base = arm_command(method, "K = 960")
        untrained = results.numbers(base, top1("digits untrained"), SWEEP_SEEDS)
        if untrained:
            axis.axhline(np.mean(list(untrained.values())), color="grey", linestyle=":")
        axis.set_title(METHODS[method])
        axis.set_xscale("log", base=2)
        axis.set_xticks(SWEEP, SWEEP)
        axis.minorticks_off()
        axis.set_xlabel("K, distinct classes in a batch")
    axes[0].set_ylabel("digits, percent (dotted: untrained)")
    return figure


@in_style
def draw_tail(results):
    """Class sizes of long-tailed plates beside the priors over prototypes."""
    figure, (left, right) = new_figure(2, 7, 2.8)
    sizes = np.sort(sampler.long_tailed_sizes(1.0, seed=0))[::-1]
    left.loglog(np.arange(1, 1001), sizes, color="black")
    left.axhline(150, color="grey", linestyle=":")
    left.set_xlabel("rank of a class")
    left.set_ylabel("images (dotted: balanced)")
    for exponent in (0, 0.25, 0.5, 1):
        prior = sampler.power_law_prior(256, exponent)
        right.loglog(np.arange(1, 257), prior, label=f"exponent {exponent}")
    right.set_xlabel("rank of a prototype")
    right.set_ylabel("prior")
    right.legend(frameon=False)
    return figure


@in_style
def draw_prototypes(results):
    """The pictures nearest to twelve prototypes of MSN, at K = 8 and 960, seed 0."""
    images, _ = sampler.open_data("plates", "val")
    figure, axes = new_figure(2, 8, 5.1)
    for axis, arm in zip(axes, ("K = 8", "K = 960")):
        axis.axis("off")
        axis.set_title(arm)
        line = results.lines[arm_command("msn", arm)].get(0)
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
    "arms": arms_table,
    "primary": primary_table,
    "paper": paper_table,
    "targets": targets_table,
    "features": features_table,
    "sweep": sweep_table,
    "distances": distances_table,
    "doses": doses_table,
    "longer": longer_table,
    "priors": priors_table,
    "priors change": priors_change_table,
    "tried": tried_table,
    "toy": toy_table,
    "folder": folder_table,
    "time": time_table,
}
FIGURES = {
    "arms.png": draw_arms,
    "sweep.png": draw_sweep,
    "tail.png": draw_tail,
    "prototypes.png": draw_prototypes,
}
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
