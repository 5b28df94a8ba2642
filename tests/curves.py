"""Draw quantities of one or more runs' log.jsonl over the steps.

    python tests/curves.py runs/msn/log.jsonl --out msn-log.png
    python tests/curves.py docs/logs/simclr.jsonl docs/logs/simclr-rate.jsonl --out simclr-log.png
    python tests/curves.py runs/a/log.jsonl runs/b/log.jsonl --show loss lr --out rates.png

A panel for each quantity, a curve for each log, of its first file's length.
"""

import argparse
import json
from pathlib import Path

# What tells most of a method, of those that a log has.
TELLING = ("loss", "embedding_std", "variance", "entropy", "information", "kl", "target_std")
COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:orange")


def read_log(path):
    """{quantity: list of numbers} of a log; quantities that are lists, as usage, are left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name, value in lines[0].items() if not isinstance(value, list)]
    return {name: [line[name] for line in lines] for name in names}


def title_of(path):
    """runs/msn/log.jsonl is called msn, docs/logs/msn.jsonl too."""
    return path.parent.name if path.stem == "log" else path.stem


def draw(paths, show=None):
    """The figure; show: names of quantities, None: TELLING's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {title_of(path): read_log(path) for path in paths}
    first = next(iter(logs.values()))
    show = show or [name for name in TELLING if name in first]
    figure, axes = plt.subplots(
        1, len(show), figsize=(3.2 * len(show), 2.6), dpi=120, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], show):
        for (title, log), colour in zip(logs.items(), COLOURS):
            axis.plot(log["step"], log[name], color=colour, label=title)
        values = [value for log in logs.values() for value in log[name]]
        if min(values) > 0 and max(values) > 1e4 * min(values):
            axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_xlim(0, first["step"][-1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    return figure


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("logs", type=Path, nargs="+", help="log.jsonl of runs")
    p.add_argument("--show", nargs="+", help="quantities of the logs; default: the telling ones")
    p.add_argument("--out", type=Path, required=True, help="PNG file")
    args = p.parse_args(argv)
    draw(args.logs, args.show).savefig(args.out, metadata={"Software": None})


if __name__ == "__main__":
    main()
