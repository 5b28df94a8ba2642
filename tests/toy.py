"""A toy: which of two digits do two prototypes tell, and under which prior?

    python tests/toy.py --exponent 2 --seed 0
    python tests/toy.py --exponent 0 --noise 0.3 --seed 0
    python tests/toy.py --exponent 2 --plates --drawings 2 --noise 0.1 --seed 0

The numbers are a 0 b. Each of a and b has two values; a is balanced, b follows a power law of
exponent 2, as the prior does with --exponent 2 (0: uniform, MSN's). So a union of values fits the
one prior by a, the other by b. Either digit is given as a code, which makes them equally easy, or,
with --plates, the number is a picture, and an image's two views are of one drawing of it or of two.

The result is what prototypes tell of a and of b on balanced new data, in percent of its entropy,
and the mean loss of the last tenth of the steps: printed, and written to --out as JSON.
"""

import argparse
import copy
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import msn
import pmsn
import sampler

VALUES = (2, 4)  # of the digits
TAIL = 2.0  # b's k-th value has a share proportional to k**-TAIL
TRAINING = (2, 3, 4, 5, 6, 7)  # seeds of the plates
TEST = (8, 9)
DRAWINGS = 50  # of each number, by each seed
PLATES = dict(hidden=256, output=32, lr=3e-3)
CODES = dict(hidden=64, output=16, lr=1e-2)


class NoEncoder(nn.Module):
    """images (B, ...) -> (B, D): projector and prototypes learn on the numbers of the images."""

    def forward(self, images, keep=None):
        return images.flatten(1)


@functools.cache
def plates(drawings, seed):
    """Plates a 0 b: standardised images (N, 1, 32, 32), a and b (N,) each, N = 100 drawings."""
    images, labels = sampler.draw_plates(drawings, seed)
    chosen = labels["digits"][:, 1] == 0
    digits = labels["digits"][chosen]
    images = msn.normalise(images[chosen].float() / 255, standardise=True)
    return images, digits[:, 0], digits[:, 2]


def open_data(seeds, codes):
    """Plates whose a and b are of VALUES: images, or codes (N, 4), one-hot for a, then for b; which
    values they have, (N,) each, and N for each of the four numbers."""
    values = torch.tensor(VALUES)
    kept = []
    for seed in seeds:
        images, a, b = plates(DRAWINGS, seed)
        chosen = torch.isin(a, values) & torch.isin(b, values)
        kept.append([images[chosen], a[chosen], b[chosen]])
    images, a, b = (torch.cat(parts) for parts in zip(*kept))
    a = (a == VALUES[1]).long()
    b = (b == VALUES[1]).long()
    if codes:
        images = torch.cat([F.one_hot(a), F.one_hot(b)], dim=1).float()
    cells = torch.stack([(2 * a + b == cell).nonzero()[:, 0] for cell in range(4)])
    return images, a, b, cells


def draw_views(images, cells, tail, args, rng):
    """Two views (128, ...) of numbers: a is balanced, b has the shares tail (2,)."""
    cell = 2 * torch.randint(2, (128,), generator=rng)
    cell += torch.multinomial(tail, 128, replacement=True, generator=rng)
    which = torch.randint(cells.shape[1], (2, 128), generator=rng)
    if args.drawings == 1:
        which = which[:1].expand(2, -1)
    views = []
    for number in which:
        view = images[cells[cell, number]]
        if args.plates:  # light on dark or dark on light
            view = view * (torch.randint(2, (128, 1, 1, 1), generator=rng) * 2 - 1)
        views.append(view + args.noise * torch.randn(view.shape, generator=rng))
    return views


def run(args):
    """MSN's projector and two prototypes learn by pmsn.py's own step -> what prototypes tell of a
    and of b, the loss at the end."""
    sizes = PLATES if args.plates else CODES
    rng = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    images, _, _, cells = open_data(TRAINING, codes=not args.plates)
    model = msn.MSN(
        NoEncoder(), images[0].numel(), sizes["hidden"], sizes["output"], num_prototypes=2
    )
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(msn.parameter_groups(model))
    prior = sampler.power_law_prior(2, args.exponent)
    tail = sampler.power_law_prior(2, TAIL)
    rates = dict(lr=sizes["lr"], weight_decay=0.01, ema=0.99)
    options = types.SimpleNamespace(
        bf16=False, temperature=0.1, sharpen=0.25, prior_weight=1.0, sinkhorn=True, clip=3.0
    )
    losses = []
    for _ in range(args.steps):
        target_view, anchor_view = draw_views(images, cells, tail, args, rng)
        metrics = pmsn.pmsn_step(
            model, target, optimizer, target_view, [anchor_view], None, prior, rates, options
        )
        losses.append(metrics["loss"].detach())
    images, a, b, _ = open_data(TEST, codes=not args.plates)
    with torch.no_grad():
        z, prototypes = target.eval()([images])
    prototype = msn.log_assignment(z, prototypes, 0.1).argmax(dim=1).numpy()
    loss = torch.stack(losses[-args.steps // 10 :]).mean()
    return dict(
        a=told(prototype, a.numpy()),
        b=told(prototype, b.numpy()),
        loss=loss.item(),
    )


def told(prototype, label):
    """What prototypes (N,) tell of a label (N,), in percent of its entropy."""
    return 100 * max(float(mutual_info_score(prototype, label)), 0.0) / entropy(np.bincount(label))


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--exponent", type=float, default=0.0, help="of the prior")
    p.add_argument("--plates", action="store_true", help="pictures instead of codes")
    p.add_argument("--drawings", type=int, choices=(1, 2), default=2, help="of a number in views")
    p.add_argument("--noise", type=float, default=0.5, help="deviation")
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="JSON file of the result")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    result = run(args)
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    print(" ".join(f"{name} {x:.3g}" for name, x in result.items()))


if __name__ == "__main__":
    main()
