"""Draw quantities of one or more runs' log.jsonl over the steps.

    python tests/curves.py runs/msn/log.jsonl --out msn-log.png
    python tests/curves.py runs/msn/log.jsonl runs/other/log.jsonl --line entropy 5.55 "log K" \
        --out msn-log.png
    python tests/curves.py runs/a/log.jsonl runs/b/log.jsonl --show loss lr --out rates.png
    python tests/curves.py runs/pmsn/log.jsonl --prior runs/pmsn/checkpoint.pt --out prior.png

A panel for each quantity, a curve for each log, of the first one's length. With --prior one more
panel: the mean prediction of MSN or PMSN over the prototypes, of the target network and unaltered
pictures, beside the prior, each from the largest share to the smallest.
"""

import argparse
import json
from pathlib import Path

import prototypes
import tables
import torch

import pmsn

# What tells most of a method, of those that a log has.
TELLING = ("loss", "embedding_std", "variance", "entropy", "information", "kl", "target_std")
SPARE_COLOURS = ("tab:red", "black", "tab:grey", "tab:cyan")


def read_log(path):
    """{quantity: list of numbers} of a log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in lines[0]}


def title_of(path):
    """runs/msn/log.jsonl is called msn, docs/logs/msn.jsonl too."""
    return path.parent.name if path.stem == "log" else path.stem


def colours_of(titles):
    """Its method's own for each title, such as pmsn-tail, once; for the others red, black ..."""
    colours = {}
    spare = iter(SPARE_COLOURS)
    for title in titles:
        colour = tables.COLOURS.get(title.split("-")[0])
        if colour is None or colour in colours.values():
            colour = next(spare)
        colours[title] = colour
    return colours


def mean_prediction(checkpoint, data):
    """The mean over pictures of softmax(cosine similarity / temperature), and the prior: (K,)."""
    target, options = prototypes.load_target(checkpoint)
    images, _ = prototypes.open_pictures(data, options.image_size)
    similarity = prototypes.similarities(target, options, images)
    predicted = (similarity / options.temperature).softmax(dim=1).mean(dim=0)
    if hasattr(options, "exponent"):
        return predicted, pmsn.prior_of(options)
    return predicted, torch.full_like(predicted, 1 / len(predicted))


def draw(args):
    """The figure; args: of parse_args."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {title_of(path): read_log(path) for path in args.logs}
    colours = colours_of(logs)
    first = next(iter(logs.values()))
    show = args.show or [name for name in TELLING if name in first]
    panels = len(show) + (args.prior is not None)
    figure, axes = plt.subplots(
        1, panels, figsize=(3.2 * panels, 2.6), dpi=120, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], show):
        for title, log in logs.items():
            if name in log:
                axis.plot(log["step"], log[name], color=colours[title], label=title)
        values = [value for log in logs.values() for value in log.get(name, [])]
        if min(values) > 0 and max(values) > 1e4 * min(values):
            axis.set_yscale("log")
        axis.set(title=name, xlabel="step", xlim=(0, first["step"][-1]))
    for name, low, high in args.limits:
        axes[0, show.index(name)].set(yscale="linear", ylim=(float(low), float(high)))
    for name, height, label in args.line:
        axis = axes[0, show.index(name)]
        axis.axhline(float(height), color="grey", linestyle=":")
        axis.annotate(label, (1, float(height)), (-2, 2), color="grey", fontsize=8, ha="right",
                      xycoords=axis.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
    if args.prior:
        predicted, prior = mean_prediction(args.prior, args.data)
        used = dict(color=next(iter(colours.values())), label="used")
        axes[0, -1].plot(predicted.sort(descending=True).values, **used)
        axes[0, -1].plot(prior.sort(descending=True).values, color="black", label="prior")
        axes[0, -1].set(title="prototypes' shares", xlabel="rank", yscale="log")
        axes[0, -1].legend(frameon=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=len(logs), frameon=False)
    return figure


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("logs", type=Path, nargs="+", help="log.jsonl of runs")
    p.add_argument("--show", nargs="+", help="quantities of the logs; default: the telling ones")
    p.add_argument("--line", nargs=3, action="append", default=[],
                   metavar=("QUANTITY", "VALUE", "LABEL"), help="a dotted line")  # fmt: skip
    p.add_argument("--limits", nargs=3, action="append", default=[],
                   metavar=("QUANTITY", "LOW", "HIGH"), help="of a panel")  # fmt: skip
    p.add_argument("--prior", type=Path, help="checkpoint of msn.py or pmsn.py: the prior's panel")
    p.add_argument("--data", default="plates", help="of that checkpoint, as prototypes.py's")
    p.add_argument("--out", type=Path, required=True, help="PNG file")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw(args).savefig(args.out, metadata={"Software": None})


if __name__ == "__main__":
    main()
