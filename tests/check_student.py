"""Is a student's version of a function right? For whoever sets an assignment with these scripts.

    python tests/check_student.py simclr.nt_xent_loss                       in simclr.py itself
    python tests/check_student.py simclr.nt_xent_loss --file my_simclr.py   in a copy of it
    python tests/check_student.py --blank simclr.nt_xent_loss --out my_simclr.py       a hand-out
    python tests/check_student.py --list

A line for each property: ok, or WRONG and a hint. The likely mistake of a function is known by the
value that it gives. Exit status: 0 if all properties hold, 1 if not, 2 if there is nothing to
check. Values and gradients are those of tests/golden, or else of slow versions. All of it is one
process: several are checked by the tests of the repository alone.
"""

import argparse
import ast
import functools
import math
import operator
import random
import shutil
import signal
import sys
import traceback
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
RTOL = 3e-5  # of the largest entry: whoever computes in float32 is right, too
SECONDS = 20  # for all properties of a function: an endless loop ends, too
BLANK = 'raise NotImplementedError("write me")'

sys.path.insert(0, str(ROOT))  # where a student's copy of a script finds sampler.py


# ---- 1. What is printed
class Wrong(Exception):
    """Nothing more can be checked; the text says why."""


class Report:
    """Prints a line for each property of a student's function, and counts those that are wrong."""

    def __init__(self):
        self.total = 0
        self.wrong = 0

    def true(self, text, holds, hint=""):
        self.total += 1
        self.wrong += not holds
        print(f"ok     {text}" if holds else f"WRONG  {text}{': ' * bool(hint)}{hint}")

    def equal(self, text, mine, expected, mistake=None, rtol=RTOL):
        """mine and expected: arrays or numbers. mistake: a hint, and the value that it is for."""
        if mine is None:
            raise Wrong(f"{text}: None is returned: is a `return` missing?")
        mine = array(mine)
        expected = array(expected)
        hint = describe_difference(mine, expected)
        if mistake is not None and near(mine, array(mistake[1]), rtol):
            hint = mistake[0]
        self.true(text, near(mine, expected, rtol), hint)

    def gradients(self, text, loss, inputs, expected, rtol=RTOL):
        """inputs {name: tensor}; expected {name: array}, without those that must get none."""
        if not torch.is_tensor(loss) or not loss.requires_grad:
            raise Wrong(f"{text}: none leaves the loss: no_grad, detach, .item() or numpy?")
        found = torch.autograd.grad(loss, inputs.values(), retain_graph=True, allow_unused=True)
        for name, gradient in zip(inputs, found):
            whole = f"{text}, by {name}"
            if name not in expected:
                hint = "labels get none: compute them under torch.no_grad()"
                self.true(whole, gradient is None, hint)
            elif gradient is None:
                self.true(whole, False, "none arrives: detached, or computed under no_grad?")
            else:
                self.equal(whole, gradient, expected[name], rtol=rtol)

    def float32(self, function, *inputs):
        """The value of low-precision inputs against that of the same in float64."""
        mine = function(*inputs)
        exact = function(*(x.double() for x in inputs))
        holds = mine.dtype != torch.bfloat16 and near(array(mine), array(exact))
        hint = "with --bf16 inputs come as bfloat16, so convert them first"
        self.true("of bfloat16 inputs it is computed in float32", holds, hint)


def array(x):
    if torch.is_tensor(x):
        x = x.detach().double().numpy()
    return np.asarray(x, dtype=float)


def near(mine, other, rtol=RTOL):
    """Whether the entries are finite and agree, to a fraction of the largest."""
    if mine.shape != other.shape or not np.isfinite(mine).all():
        return False
    return bool(np.abs(mine - other).max() <= rtol * np.abs(other).max() + 1e-12)


def describe_difference(mine, expected):
    if mine.shape != expected.shape:
        return f"shape {mine.shape} instead of {expected.shape}"
    if not np.isfinite(mine).all():
        return "not finite: a log, square root or division of 0, or a large exp?"
    ratio = (mine * expected).sum() / (expected * expected).sum()
    if expected.ndim == 0:
        return f"{mine:.5g} is {ratio:.3f} times the expected {expected:.5g}"
    if near(mine, ratio * expected):
        return f"{ratio:.3f} times what is expected"
    share = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
    return f"off by {100 * share:.2g} percent of the expected norm"


def terms_of(result, *names):
    """The tuple of these values that a function returns."""
    if not isinstance(result, tuple) or len(result) != len(names):
        raise Wrong(f"a {type(result).__name__} is returned, not the tuple ({', '.join(names)})")
    return result


def load(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensors(golden, *names, prefix=""):
    """{name: float64 tensor that wants a gradient}."""
    found = {name: torch.from_numpy(golden[prefix + name]).double() for name in names}
    return {name: x.requires_grad_() for name, x in found.items()}


# ---- 2. SimCLR and VICReg
def check_nt_xent(script, report):
    golden = load("simclr_loss")
    inputs = tensors(golden, "z1", "z2")
    z1, z2 = (z.detach() for z in inputs.values())
    z = F.normalize(torch.cat([z1, z2]))
    cosines = z @ z.T
    positives = cosines.diag(len(z1)).mean()
    for case, temperature in (("t01", 0.1), ("t05", 0.5)):
        with_itself = (cosines / temperature).logsumexp(dim=1).mean() - positives / temperature
        hint = "an embedding is compared with itself, too: leave k = i out of the sum"
        loss = script.nt_xent_loss(*inputs.values(), temperature)
        expected = golden[f"{case}_loss_mean"]
        report.equal(f"the loss at temperature {temperature}", loss, expected, (hint, with_itself))
        expected = {name: golden[f"{case}_grad_{name}"] for name in inputs}
        report.gradients(f"its gradient at temperature {temperature}", loss, inputs, expected)
    finite = script.nt_xent_loss(z1.float(), z2.float(), 0.001).isfinite()
    hint = "exp(1000) is infinite: subtract each row's largest first, or use logsumexp"
    report.true("a temperature of 0.001 does not overflow", finite, hint)
    report.float32(script.nt_xent_loss, z1.bfloat16(), z2.bfloat16())


def check_vicreg(script, report):
    golden = load("vicreg_loss")
    inputs = tensors(golden, "x", "y")

    def terms(x, y, *coefficients):
        result = script.vicreg_loss(x, y, *coefficients)
        return terms_of(result, "loss", "invariance", "variance", "covariance")

    loss, invariance, variance, covariance = terms(*inputs.values())
    report.equal("invariance", invariance, golden["sim_loss"])
    deviations = [(z.var(dim=0, unbiased=False) + 1e-4).sqrt() for z in inputs.values()]
    biased = (1 - torch.stack(deviations)).clamp(min=0).mean()
    hint = "the variance is divided by N: by N - 1, it is the unbiased one"
    report.equal("variance", variance, golden["std_loss"], (hint, biased))
    report.equal("covariance", covariance, golden["cov_loss"])
    report.equal("the loss is 25 invariance + 25 variance + 1 covariance", loss, golden["loss"])
    expected = {name: golden[f"grad_{name}"] for name in inputs}
    report.gradients("its gradient", loss, inputs, expected)

    loss, *values = terms(*inputs.values(), 2.0, 3.0, 4.0)
    expected = 2 * values[0] + 3 * values[1] + 4 * values[2]
    report.equal("the loss with coefficients 2, 3 and 4", loss, expected)
    same = torch.ones(8, 4, requires_grad=True)
    terms(same, torch.zeros(8, 4))[0].backward()
    hint = "the square root has no gradient at 0: add 1e-4 to the variance first"
    report.true("embeddings all the same: a finite gradient", same.grad.isfinite().all(), hint)
    low = [z.detach().bfloat16() for z in inputs.values()]
    report.float32(lambda *z: terms(*z)[0], *low)


# ---- 3. MSN and PMSN
def check_msn(script, report):
    golden = load("msn_loss")
    inputs = tensors(golden, "anchors", "targets", "prototypes", prefix="v3_")

    def terms(*arguments, sinkhorn=False):
        result = script.msn_loss(*arguments, sinkhorn=sinkhorn)
        return terms_of(result, "loss", "cross_entropy", "me_max")

    blunt, _ = slow_msn(*inputs.values(), 0.1, sharpen=1.0)
    hint = "targets are not sharpened: divide their cosines by temperature x sharpen"
    mistakes = dict(cross_entropy=(hint, blunt), me_max=None)
    for kind in ("plain", "sinkhorn"):
        balanced = functools.partial(terms, sinkhorn=kind == "sinkhorn")
        expected = part(golden, f"v3_{kind}_w1_")
        check_siamese(report, f"{kind} targets", balanced, inputs, expected, mistakes)
    check_siamese_details(report, terms, inputs)


def check_pmsn(script, report):
    golden = load("pmsn_loss")
    inputs = tensors(golden, "anchors", "targets", "prototypes")

    def terms(*arguments, prior=None, sinkhorn=False):
        prior = power_law(0.0, len(arguments[2])) if prior is None else prior
        result = script.pmsn_loss(*arguments[:3], prior, *arguments[3:], sinkhorn=sinkhorn)
        return terms_of(result, "loss", "cross_entropy", "kl")

    for exponent, key in ((0.0, "e000_"), (1.0, "e100_")):
        expected = part(golden, key)
        hint = "the reversed divergence, KL(prior || mean): KL(mean || prior) is wanted"
        mistakes = dict(cross_entropy=None, kl=(hint, expected["wrong_reversed_kl"]))
        of_prior = functools.partial(terms, prior=power_law(exponent))
        check_siamese(report, f"exponent {exponent:g}", of_prior, inputs, expected, mistakes)
    _, mine, _ = of_prior(*inputs.values(), sinkhorn=True)
    expected = expected["sinkhorn_cross_entropy"]
    report.equal("cross_entropy with sinkhorn, which follows the prior", mine, expected)
    prior = power_law(1.0)
    prior[7] = 0
    loss, _, _ = terms(*inputs.values(), prior=prior)
    hint = "the log of 0 is infinite: clamp the prior to the smallest number"
    report.true("a prior of 0 gives a finite loss", loss.isfinite(), hint)
    check_siamese_details(report, terms, inputs)


def part(golden, prefix):
    """The entries whose names begin so, named by the rest."""
    return {n.removeprefix(prefix): golden[n] for n in golden.files if n.startswith(prefix)}


def check_siamese(report, text, terms, inputs, expected, mistakes):
    """Values of both terms, their sum and its gradient, with uniform prior or another.

    terms: inputs, temperature, sharpen, weight -> loss and both terms. mistakes: {term: mistake}"""
    loss, *values = terms(*inputs.values())
    for (name, mistake), value in zip(mistakes.items(), values):
        report.equal(f"{text}: {name}", value, expected[name], mistake)
    first, second = mistakes
    loss_of_5 = terms(*inputs.values(), 0.1, 0.25, 5.0)[0]
    total = expected[first] + 5 * expected[second]
    report.equal(f"{text}: loss = {first} + 5 {second}", loss_of_5, total)
    gradients = {name: expected[f"grad_{name}"] for name in ("anchors", "prototypes")}
    report.gradients(f"{text}: gradient", loss, inputs, gradients)


def check_siamese_details(report, terms, inputs):
    """What holds with the uniform prior."""
    loss = terms(*inputs.values(), 0.2, 0.5)[0]
    report.equal("temperature 0.2, sharpen 0.5", loss, sum(slow_msn(*inputs.values(), 0.2, 0.5)))
    one = torch.eye(8)[:1].repeat(8, 1)  # all anchors and targets are the first prototype
    loss = terms(one, one, torch.eye(8), 0.005)[0]
    hint = "0 log 0 is 0: clamp the mean prediction before the log; use log_softmax"
    report.true("a prototype that nobody uses gives a finite loss", loss.isfinite(), hint)
    anchors, targets, prototypes = (x.detach() for x in inputs.values())
    low = [anchors.bfloat16(), targets.bfloat16(), prototypes.float()]
    report.float32(lambda *z: terms(*z)[0], *low)


def slow_msn(anchors, targets, prototypes, temperature, sharpen):
    """(cross_entropy, me_max) without Sinkhorn's balance."""
    prototypes = F.normalize(prototypes)
    p = (F.normalize(anchors) @ prototypes.T / temperature).softmax(dim=1)
    t = (F.normalize(targets) @ prototypes.T / (temperature * sharpen)).softmax(dim=1)
    cross_entropy = -(t.repeat(len(p) // len(t), 1) * p.log()).sum(dim=1).mean()
    mean_p = p.mean(dim=0)
    return cross_entropy, (mean_p * mean_p.log()).sum() + math.log(len(prototypes))


def check_sinkhorn(script, report):
    golden = load("pmsn_loss")
    inputs = tensors(golden, "targets", "prototypes")
    targets, prototypes = (F.normalize(x.detach()) for x in inputs.values())
    cosines = targets @ prototypes.T
    skewed = (cosines / 0.025).softmax(dim=1)
    law = power_law(1.0)
    wrong = skewed
    for _ in range(3):
        wrong = wrong / wrong.sum(dim=1, keepdim=True)
        wrong = wrong / wrong.sum(dim=0) * law * len(wrong)
    hint = "a round ends with the images, so that each has mass 1: prototypes come first"
    mine = script.sinkhorn_balance(skewed, law)
    expected = golden["e100_sinkhorn_assignments"]
    report.equal("three rounds to a power law", mine, expected, (hint, wrong))

    mixed = (cosines / 0.1).softmax(dim=1)
    shares = script.sinkhorn_balance(mixed, law, rounds=300).mean(dim=0)
    report.equal("after 300 rounds a prototype has its share of the prior", shares, law)
    unused = mixed.clone()
    unused[:, 3] = 0
    mine = script.sinkhorn_balance(unused, law)
    hint = "its mass is 0: clamp it before you divide"
    report.true("a prototype without mass gives no nan", mine.isfinite().all(), hint)
    given = mixed.float()
    mine = script.sinkhorn_balance(given, law)
    report.true("float32 stays float32", mine.dtype == torch.float32)
    report.true("the argument stays as it was", torch.equal(given, mixed.float()))


def check_msn_schedule(script, report):
    golden = load("msn_schedules")
    for case in "ab":
        config = golden[f"{case}_cfg_ipe_epochs_warmup_startlr_lr_finallr_wd_finalwd"].tolist()
        epoch_steps, epochs, warmup, start_lr, lr, final_lr, *weight_decay = config
        args = types.SimpleNamespace(
            epochs=int(epochs), warmup=warmup, start_lr=start_lr, lr=lr, final_lr=final_lr,
            weight_decay=weight_decay, ema=0.996,
        )  # fmt: skip
        steps = int(epoch_steps * epochs)
        rates = [script.schedule(step, int(epoch_steps), args) for step in range(steps)]
        for name, short in (("lr", "lr"), ("weight_decay", "wd"), ("ema", "ema")):
            mine = np.array([rate[name] for rate in rates])
            expected = golden[f"{case}_{short}"]
            late = np.append(mine[:1], expected[:-1])
            mistake = ("one update late: each update has the value of the one before", late)
            text = f"{name} of a run of {steps} updates"
            report.equal(text, mine, expected, mistake, rtol=1e-9)


# ---- 4. MAE
def check_mae_forward(script, report):
    golden = load("mae_forward")
    images = torch.from_numpy(golden["images"])
    noise = torch.from_numpy(golden["noise"])
    model = script.MAE(
        image_size=32, patch_size=8, dim=64, depth=2, heads=2, decoder_dim=32, decoder_depth=1,
        decoder_heads=2,
    )  # fmt: skip
    weights = part(golden, "sd/").items()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights})

    def forward(*arguments):
        return terms_of(model(*arguments), "loss", "pred", "mask")

    _, pred, mask = forward(images, 0.75, noise)
    hint = "order and its inverse are exchanged: the inverse is order.argsort()"
    mistake = (hint, noise.argsort(dim=1) >= 4)
    report.equal("the mask: 1 but for the smallest noise", mask, golden["mask"], mistake)
    report.equal("the prediction, in the image's order", pred, golden["pred"], rtol=1e-4)
    for kind in ("rawpix", "normpix"):
        model.norm_pix_loss = kind == "normpix"
        model.zero_grad()
        loss, _, _ = forward(images, 0.75, noise)
        case = f"norm_pix_loss={model.norm_pix_loss}"
        report.equal(f"the loss, {case}", loss, golden[f"loss_{kind}"])
        if loss.requires_grad:
            loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        norm = torch.stack([torch.zeros(()), *norms]).norm()
        expected = golden[f"grad_total_norm_{kind}"]
        report.equal(f"the norm of its gradient, {case}", norm, expected, rtol=1e-4)

    masks = torch.cat([forward(images)[2], forward(images)[2]])  # of three images each
    differ = len(masks.unique(dim=0)) > 3
    hint = "draw noise of shape (B, N) at each call"
    report.true("without noise each image and call has a mask of its own", differ, hint)
    kept = (forward(images, 0.7)[2] == 0).sum(dim=1)
    report.equal("the number of kept patches is rounded down", kept, np.full(3, 4.0))


def check_mae_loss(script, report):
    golden = load("mae_forward")
    inputs = tensors(golden, "pred", prefix="loss_only/")
    pred = inputs["pred"]
    mask = torch.from_numpy(golden["loss_only/mask"])
    patches = script.patchify(torch.from_numpy(golden["loss_only/images"]).double(), 8)
    deviation = (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()
    normalised = (patches - patches.mean(dim=2, keepdim=True)) / deviation
    for kind, target in (("rawpix", patches), ("normpix", normalised)):
        normalise = kind == "normpix"
        error = pred.detach() - target
        hint = "all patches count: only the removed ones do (mask 1)"
        loss = script.mae_loss(pred, patches, mask, normalise)
        expected = golden[f"loss_only/expected_{kind}"]
        mistake = (hint, error.square().mean())
        report.equal(f"the loss, norm_pix_loss={normalise}", loss, expected, mistake, rtol=3e-6)
        expected = {"pred": 2 * error * mask[:, :, None] / mask.sum() / error.shape[2]}
        report.gradients(f"its gradient, norm_pix_loss={normalise}", loss, inputs, expected)
    low = patches.bfloat16()  # all that is left is its rounding
    report.float32(lambda x, y: script.mae_loss(x, y, mask), low, patches.float())


# ---- 5. data2vec
def check_block_mask(script, report):
    def draw(seed, grid=14, num_masked=120, min_block=16):
        return script.block_mask(grid, num_masked, min_block, random.Random(seed))

    first = draw(0)
    form = (first.dtype, first.shape) == (torch.bool, (14, 14))
    report.true("a bool tensor (14, 14)", form)
    most = max(int(draw(seed).sum()) for seed in range(100))
    hint = f"{most} of 120 are masked: refuse a block without room"
    report.true("never more than num_masked", most <= 120, hint)
    draw(0, grid=3, num_masked=9, min_block=9)  # no block fits: an endless loop is told by stop()
    random.seed(1)
    state = random.getstate()
    same = torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    same &= random.getstate() == state
    hint = "draw from rng, not from random, numpy or torch"
    report.true("random numbers come from rng alone", same, hint)
    for name, num_masked in (("official", 120), ("beit75", 75)):
        masks = torch.stack([draw(seed, num_masked=num_masked) for seed in range(300)]).numpy()
        golden = part(load("data2vec_masks"), f"{name}/")
        error = (1 / len(masks) + 1 / 2000) ** 0.5  # the recorded means are of 2,000 masks
        mine = (np.diff(masks, axis=1).sum() + np.diff(masks).sum()) / len(masks)
        expected = golden["boundary_edges_mean"]
        close = abs(mine - expected) <= 5 * error * golden["boundary_edges_std"]
        hint = f"{mine:.1f} instead of {expected:.1f} edges between masked patches and others"
        report.true(f"shapes in 300 masks of {num_masked}", close, hint)
        frequency = golden["position_frequency"]
        sigma = error * np.sqrt(frequency * (1 - frequency)).clip(min=0.02)
        even = (np.abs(masks.mean(axis=0) - frequency) <= 5 * sigma).all()
        hint = "a block is equally likely wherever it fits"
        report.true(f"frequency of each patch in 300 masks of {num_masked}", even, hint)


def check_data2vec_targets(script, report):
    golden = load("data2vec_targets")
    layers = list(torch.from_numpy(golden["teacher_layers"]).float())
    mine = script.data2vec_targets(layers)
    expected = golden["target_all/official"]
    mistake = ("the mean of the layers is not normalised", golden["target_all/perlayerln_only"])
    text = "the mean of the last six layers, each normalised, normalised again"
    report.equal(text, mine, expected, mistake)
    eight = torch.stack([F.layer_norm(x[:, 1:], x.shape[2:]) for x in layers[-8:]]).mean(dim=0)
    eight = F.layer_norm(eight, eight.shape[2:])
    report.equal("top_k=8", script.data2vec_targets(layers, top_k=8), eight)
    low = [layer.bfloat16() for layer in layers]
    report.float32(lambda *layers: script.data2vec_targets(list(layers)), *low)


def check_data2vec_loss(script, report):
    golden = load("data2vec_targets")
    mask = torch.from_numpy(golden["mask"]).bool().flatten(1)
    target = torch.from_numpy(golden["target_masked/official"])
    pred = torch.from_numpy(golden["predictions"]).float()[mask].requires_grad_()
    for name, beta in (("loss_beta2", 2.0), ("loss_beta0p12", 0.12)):
        loss = script.data2vec_loss(pred, target, beta)
        mistake = ("beta is ignored: this is that of beta 1", F.smooth_l1_loss(pred, target))
        report.equal(f"the loss, beta {beta:g}", loss, golden[f"{name}/official"], mistake)
    expected = {"pred": golden["grad_beta2/official"][mask.numpy()]}
    loss = script.data2vec_loss(pred, target)
    report.gradients("its gradient, beta 2", loss, {"pred": pred}, expected, rtol=1e-4)
    low = target.bfloat16()  # all that is left is its rounding
    report.float32(script.data2vec_loss, low, target)


# ---- 6. The sampler
def check_batches(script, report):
    equal = [25] * 16  # images of each class
    long_tail = [400, 150, 80, 40, 20, 10, 5, 3, 2, 1, 1, 1]

    def batches_of(sizes, batch_size, k_classes, **options):
        """labels (N,), batches of three epochs (batches, images of this process)."""
        labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
        sampler = script.KClassBatchSampler(labels, batch_size, k_classes, **options)
        batches = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            batches += list(sampler)
        lengths = {len(batch) for batch in batches}
        if lengths != {batch_size // options.get("world_size", 1)}:
            raise Wrong(f"batches of {sorted(lengths)} images, where {batch_size} are wanted")
        return labels, np.array(batches)

    for sizes, batch_size, k_classes in ((equal, 41, 3), (equal, 61, 15), (long_tail, 65, 7)):
        labels, batches = batches_of(sizes, batch_size, k_classes)
        of_class = np.stack([np.bincount(labels[b], minlength=len(sizes)) for b in batches])
        of_image = np.stack([np.bincount(b, minlength=len(labels)) for b in batches])
        case = f"K = {k_classes} of {len(sizes)} classes"
        least = batch_size // k_classes
        found = of_class[of_class > 0]
        exact = ((of_class > 0).sum(axis=1) == k_classes).all()
        report.true(f"{case}: K are in every batch", exact)
        hint = f"{found.min()} to {found.max()}, where {least} or {least + 1} are due"
        fair = set(found) <= {least, least + 1}
        report.true(f"{case}: equal shares in a batch", fair, hint)
        level = np.ptp(of_class.cumsum(axis=0), axis=1).max() <= least + 1
        hint = "deal the least dealt classes first"
        report.true(f"{case}: they differ by one share at most, at every batch", level, hint)
        once = (of_image <= np.ceil(of_class / sizes)[:, labels]).all()
        hint = "deal a class's images like cards"
        report.true(f"{case}: no image twice in a batch if there are enough", once, hint)
        seen = of_image.cumsum(axis=0)
        spread = max(np.ptp(seen[:, labels == k], axis=1).max() for k in range(len(sizes)))
        hint = "deal a class's deck to its end before you shuffle it anew"
        report.true(f"{case}: an image comes again after all of its class", spread <= 1, hint)

    _, batches = batches_of(equal, 80, 16)
    repeated = set(batches[0]) == set(batches[5])  # a fifth of all images each
    hint = "shuffle it again when it is used up"
    report.true("each round of a class's images has an order of its own", not repeated, hint)
    _, whole = batches_of(equal, 40, 5)
    parts = [batches_of(equal, 40, 5, rank=rank, world_size=4)[1] for rank in range(4)]
    same = np.array_equal(np.concatenate(parts, axis=1), whole)
    hint = "draw all random numbers from self.rng, in the same order in all processes"
    report.true("the batches of four processes join to those of one", same, hint)
    first = set()
    for seed in range(60):
        labels, batches = batches_of(equal, 40, 3, seed=seed)
        first |= set(labels[batches[0]])
    hint = "break ties between classes at random"
    report.true("each class can be in the first batch", len(first) == 16, hint)


def power_law(exponent, num_prototypes=40):
    weights = np.arange(1.0, num_prototypes + 1) ** -exponent
    return torch.from_numpy(weights / weights.sum())


def check_power_law(script, report):
    golden = load("power_law")
    for num_prototypes, exponent in ((2, 1.0), (10, 0.0), (10, 0.25), (1024, 0.25)):
        weights = np.arange(1.0, num_prototypes + 1) ** -exponent
        mistake = ("the weights do not sum to 1: divide by their sum", weights)
        mine = script.power_law_prior(num_prototypes, exponent)
        expected = golden[f"k{num_prototypes}_e{round(100 * exponent):03}"]
        text = f"{num_prototypes} prototypes, exponent {exponent:g}"
        report.equal(text, mine, expected, mistake, rtol=1e-6)
    report.true("a float64 tensor", mine.dtype == torch.float64)
    refused = False
    try:
        script.power_law_prior(0, 0.25)
    except ValueError:
        refused = True
    report.true("no prototypes: ValueError", refused)


# ---- 7. Exercises
EXERCISES = {  # function: its check, and the definitions that are blanked
    "simclr.nt_xent_loss": (check_nt_xent, ["nt_xent_loss"]),
    "vicreg.vicreg_loss": (check_vicreg, ["vicreg_loss", "variance_and_covariance"]),
    "msn.msn_loss": (check_msn, ["msn_loss"]),
    "msn.sinkhorn_balance": (check_sinkhorn, ["sinkhorn_balance"]),
    "msn.schedule": (check_msn_schedule, ["schedule", "cosine"]),
    "pmsn.pmsn_loss": (check_pmsn, ["pmsn_loss"]),
    "mae.MAE.forward": (check_mae_forward, ["MAE.forward"]),
    "mae.mae_loss": (check_mae_loss, ["mae_loss"]),
    "data2vec.block_mask": (check_block_mask, ["block_mask"]),
    "data2vec.data2vec_targets": (check_data2vec_targets, ["data2vec_targets"]),
    "data2vec.data2vec_loss": (check_data2vec_loss, ["data2vec_loss"]),
    "sampler.KClassBatchSampler": (check_batches, ["Dealer.next_batch", "deal_and_shuffle"]),
    "sampler.power_law_prior": (check_power_law, ["power_law_prior"]),
}


def check(name, path):
    """Print all properties of one function in a student's file -> exit status 0 or 1."""
    examine, definitions = EXERCISES[name]
    script = load_script(name.split(".")[0], path)
    try:
        operator.attrgetter(definitions[0])(script)
    except AttributeError:
        fail(f"{path} has no {definitions[0]}: give --file a copy of the script that has it")
    report = Report()
    end = ""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
    try:
        examine(script, report)
    except (Exception, SystemExit) as error:
        report.true(name, False, describe_error(error, path))
        end = "; the others have to wait"
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        dist.destroy_process_group()
    wrong = f"{report.wrong} of {report.total} properties wrong{end}"
    print(f"{name}: {wrong if report.wrong else f'all {report.total} properties hold'}")
    return int(report.wrong > 0)


def stop(number, frame):
    raise TimeoutError(f"not done after {SECONDS} s: an endless loop?")


def load_script(name, path):
    """A student's file as a module. Its text is compiled anew: no cached bytecode."""
    script = types.ModuleType(f"student_{name}")
    sys.modules[script.__name__] = script
    try:
        source = path.read_text(encoding="utf-8")
        exec(compile(source, str(path), "exec"), script.__dict__)
    except (Exception, SystemExit) as error:
        fail(f"{path} cannot be imported: {describe_error(error, path)}")
    return script


def describe_error(error, path):
    """In a line, with the innermost line of the student's file through which the error came."""
    if isinstance(error, Wrong):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename == str(path)]
    if isinstance(error, NotImplementedError) and frames:
        return f"{frames[-1].name} is still blank"
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{text} (line {frames[-1].lineno} of {path.name})" if frames else text


def fail(message):
    """A wrong name or file: one line on stderr and exit status 2."""
    print(f"check_student.py: error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- 8. Hand-outs
def blank(names, path, out):
    """Write a copy of a script with the bodies of these functions blanked, sampler.py beside it."""
    try:
        source = path.read_text(encoding="utf-8")
        for name in names:
            for definition in EXERCISES[name][1]:
                source = blanked(source, definition, path)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "x", encoding="utf-8", newline="") as file:
            file.write(source)
        if not names[0].startswith("sampler.") and not (out.parent / "sampler.py").exists():
            shutil.copy(ROOT / "sampler.py", out.parent)
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"--blank {path} --out {out}: {describe_error(error, path)}")
    for name in names:
        print(f"{out}: {' and '.join(EXERCISES[name][1])} blank; to check it:")
        print(f"python tests/check_student.py {name} --file {out}")


def blanked(source, definition, path):
    """The source with the body of one definition, after its docstring, replaced by BLANK."""
    body = ast.parse(source).body
    for part in definition.split("."):
        node = next((n for n in body if getattr(n, "name", None) == part), None)
        if node is None:
            fail(f"{path} has no {definition}: give --file a copy of the script that has it")
        body = node.body
    start = body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        start = body[0].end_lineno
    lines = source.split("\n")
    lines[start : node.end_lineno] = [" " * body[0].col_offset + BLANK]
    return "\n".join(lines)


def parse_args(argv):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.error = lambda message: fail(f"{message}: see --help")
    p.add_argument(
        "function", nargs="?", choices=EXERCISES, metavar="FUNCTION", help="what to check: --list"
    )
    p.add_argument("--file", type=Path, help="the student's file; None: the repository's")
    p.add_argument(
        "--blank", nargs="+", choices=EXERCISES, metavar="FUNCTION", help="make a hand-out"
    )
    p.add_argument("--out", type=Path, help="file of the hand-out; sampler.py is put beside it")
    p.add_argument("--list", action="store_true", help="functions that can be checked")
    args = p.parse_args(argv)
    if args.list:
        return args
    if bool(args.blank) == bool(args.function) or bool(args.blank) != bool(args.out):
        fail("give a function to check (--list shows all), or --blank FUNCTION and --out FILE")
    scripts = {name.split(".")[0] for name in args.blank or [args.function]}
    if len(scripts) > 1:
        fail(f"--blank: {' and '.join(sorted(scripts))} are two scripts: blank one at a time")
    args.file = args.file or ROOT / f"{scripts.pop()}.py"
    return args


def main(argv=None):
    """-> exit status 0 or 1; 2 is SystemExit."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    if args.list:
        print("\n".join(EXERCISES))
        return 0
    if args.blank:
        blank(args.blank, args.file, args.out)
        return 0
    return check(args.function, args.file)


if __name__ == "__main__":
    sys.exit(main())
