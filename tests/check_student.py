"""Is a student's version of a function right? For whoever sets an assignment with these scripts.

    python tests/check_student.py simclr.nt_xent_loss                       in simclr.py itself
    python tests/check_student.py simclr.nt_xent_loss --file my_simclr.py   in a copy of it
    python tests/check_student.py --blank simclr.nt_xent_loss --out my_simclr.py       a hand-out
    python tests/check_student.py --list

A line for each property: ok, or WRONG and what the likely mistake is. Exit status: 0 if all hold, 1
if not, 2 if there is nothing to check. Values and gradients are those of tests/golden. Where there
are none, slow versions and stated properties take their place. All of it is one process: what a
function does with several is not checked here but by the tests of the repository.
"""

import argparse
import ast
import contextlib
import functools
import itertools
import math
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

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
RTOL = 3e-5  # of the largest entry: whoever computes in float32 is right, too
SECONDS = 10  # for a property: an endless loop ends, too
BLANK = 'raise NotImplementedError("write me")'
FLOAT32 = "not computed in float32: with --bf16 the inputs come as bfloat16, so convert them first"
LABELS = "targets must not get a gradient: compute them under torch.no_grad()"

sys.path.insert(0, str(ROOT))  # where a student's copy of a script finds sampler.py


# ---- 1. What is printed
class Wrong(Exception):
    """A property does not hold; the text says why, or what to look at."""


class GiveUp(Exception):
    """What is wrong has been printed, and the other properties cannot be looked at."""


class Report:
    """Prints a line for each property of the student's file, and counts both kinds."""

    def __init__(self, path):
        self.path = path
        self.right = 0
        self.wrong = 0
        self.reasons = set()

    @contextlib.contextmanager
    def __call__(self, text):
        """Within this, Wrong or any error of the student's code means that `text` does not hold."""
        try:
            with time_limit(SECONDS):
                yield
        except Wrong as wrong:
            self.complain(text, str(wrong))
        except (Exception, SystemExit) as error:
            frame = students_frame(error, self.path)
            if isinstance(error, NotImplementedError) and frame and frame.line.startswith("raise"):
                self.complain(text, f"{frame.name} is still blank")
                raise GiveUp from None
            self.complain(text, describe_error(error, self.path))
            if isinstance(error, TimeoutError):
                raise GiveUp from None
        else:
            self.right += 1
            print(f"ok     {text}")

    def complain(self, text, reason):
        self.wrong += 1
        print(f"WRONG  {text}: {'the same as above' if reason in self.reasons else reason}")
        self.reasons.add(reason)


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError after so many seconds, on systems that have alarms."""

    def stop(number, _):
        raise TimeoutError(f"not done after {seconds} s: an endless loop?")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def students_frame(error, path):
    """The innermost line of the student's file through which the error came, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f for f in reversed(frames) if f.filename == str(path)), None)


def describe_error(error, path):
    kind = type(error).__name__
    text = f"{kind}: {error}".rstrip(": ").splitlines()[0]
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg} (line {error.lineno} of {path.name})"
    frame = students_frame(error, path)
    return text if frame is None else f"{text} (line {frame.lineno} of {path.name})"


def fail(message):
    """A wrong name or file: one line on stderr and exit status 2."""
    line = f"check_student.py: error: {message}".replace("\n", " ")
    print(line, file=sys.stderr)
    sys.exit(2)


# ---- 2. Comparisons, which say what is wrong
def expect(mine, expected, what="value", mistakes=None, sizes=None, rtol=RTOL):
    """Raise Wrong, with the likely mistake, unless `mine` is the expected array or number.

    mistakes: {mistake: what it gives}. sizes: {number: what there are so many of}."""
    expected = array(expected)
    if not isinstance(mine, (torch.Tensor, np.ndarray, float, int)):
        raise Wrong(f"your {what} is {kind_of(mine)}: is a `return` missing?")
    mine = array(mine)
    if mine.shape != expected.shape:
        raise Wrong(f"your {what} has shape {mine.shape}, not {expected.shape}")
    if not np.isfinite(mine).all():
        raise Wrong(
            f"your {what} is not finite: a log, square root or division of 0, or a large exp?"
        )
    if near(mine, expected, rtol):
        return
    for mistake, value in (mistakes or {}).items():
        value = array(value)
        if value.shape == mine.shape and near(mine, value, rtol):
            raise Wrong(mistake)
    raise Wrong(f"your {what} {difference(mine, expected, sizes or {})}")


def array(x):
    if torch.is_tensor(x):
        x = x.detach().double().numpy()
    return np.asarray(x, dtype=float)


def near(mine, other, rtol):
    """Whether all entries are finite and agree, to a fraction of the largest."""
    if not np.isfinite(mine).all() or not np.isfinite(other).all():
        return False
    return bool(np.abs(mine - other).max() <= rtol * np.abs(other).max() + 1e-12)


def difference(mine, expected, sizes):
    """In words: a factor, if it is one, and where it may come from."""
    size = (expected * expected).sum()
    ratio = (mine * expected).sum() / size if size else math.inf
    if not math.isfinite(ratio) or not near(mine, ratio * expected, RTOL):
        if mine.ndim == 0:
            return f"is {mine:.6g}, not {expected:.6g}"
        share = np.linalg.norm(mine - expected) / np.linalg.norm(expected) if size else math.inf
        percent = f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.0f}"
        return f"is off by {percent} percent of the expected one's norm"
    if abs(ratio - 1) < 1e-3:
        return f"is nearly right, to {abs(ratio - 1):.0e}: an epsilon too many, or one missing?"
    text = f"is {ratio:.3f} times the expected one"
    if mine.ndim == 0:
        text += f" ({expected:.6g})"
    for number, things in sizes.items():
        if abs(ratio / number - 1) < RTOL or abs(ratio * number - 1) < RTOL:
            return f"{text}: a mean over {number} {things}, or a sum?"
    return f"{text}: its sign?" if abs(ratio + 1) < RTOL else text


def kind_of(x):
    return "None" if x is None else f"a {type(x).__name__}"


def as_loss(x, what="loss"):
    """A scalar tensor, or Wrong."""
    if not torch.is_tensor(x):
        hint = "is a `return` missing?" if x is None else "no .item(), which has no gradient"
        raise Wrong(f"your {what} is {kind_of(x)}, not a tensor: {hint}")
    if x.shape != ():
        raise Wrong(f"your {what} has shape {tuple(x.shape)}: a mean or a sum is missing")
    return x


def terms_of(result, names):
    """{name: scalar tensor} of a tuple that a loss returns."""
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        found = f"a tuple of {len(result)}" if isinstance(result, tuple) else kind_of(result)
        raise Wrong(f"{found} is returned, not the tuple ({', '.join(names)})")
    return {name: as_loss(x, name) for name, x in zip(names, result)}


def gradients(loss, inputs):
    """Of a loss by tensors {name: tensor}, or Wrong. Where none arrives: None."""
    if not as_loss(loss).requires_grad:
        raise Wrong("no gradient leaves the loss: no_grad, detach, .item() or numpy on the way?")
    found = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, allow_unused=True)
    return dict(zip(inputs, found))


def expect_gradients(loss, inputs, expected, mistakes=None, sizes=None, rtol=RTOL):
    """expected: {name: array}; mistakes: {mistake: {name: array}}."""
    for name, gradient in gradients(loss, {name: inputs[name] for name in expected}).items():
        if gradient is None:
            raise Wrong(f"no gradient reaches {name}: detached, or computed under no_grad?")
        wrong = {text: given[name] for text, given in (mistakes or {}).items() if name in given}
        expect(gradient, expected[name], f"gradient of {name}", wrong, sizes, rtol)


def expect_single_precision(function, *inputs):
    """A loss or a tensor of bfloat16 inputs against the same function of float64 ones."""
    mine = function(*inputs)
    if not torch.is_tensor(mine):
        raise Wrong(f"{kind_of(mine)} is returned, not a tensor")
    exact = function(*(x.double() for x in inputs))
    if torch.finfo(mine.dtype).bits < 32 or not near(array(mine), array(exact), RTOL):
        raise Wrong(FLOAT32)


def load(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensors(golden, names, dtype=torch.float64):
    """{name without what comes before "_": tensor that wants a gradient}."""
    found = {name: torch.from_numpy(golden[name]).to(dtype) for name in names}
    return {name.split("_")[-1]: x.requires_grad_() for name, x in found.items()}


def noise(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=rng)


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


# ---- 3. SimCLR
def check_nt_xent(script, holds):
    golden = load("simclr_loss")
    z = tensors(golden, ["z1", "z2"])
    z1, z2 = z.values()
    sizes = {2: "views", 16: "images", 32: "embeddings"}
    for case, temperature in (("t01", 0.1), ("t05", 0.5)):
        mistakes = wrong_nt_xents(z1.detach(), z2.detach(), temperature)
        with holds(f"the loss at temperature {temperature}"):
            loss = as_loss(script.nt_xent_loss(z1, z2, temperature))
            expect(loss, golden[f"{case}_loss_mean"], "loss", mistakes, sizes)
        with holds(f"its gradient at temperature {temperature}"):
            expected = {name: golden[f"{case}_grad_{name}"] for name in z}
            expect_gradients(script.nt_xent_loss(z1, z2, temperature), z, expected, sizes=sizes)
    with holds("the length of an embedding does not matter"):
        lengths = torch.logspace(-3, 3, 16, dtype=torch.float64)[:, None]
        loss = as_loss(script.nt_xent_loss(z1 * lengths, z2 / lengths, 0.1))
        if not near(array(loss), array(script.nt_xent_loss(z1, z2, 0.1)), RTOL):
            raise Wrong("divide each embedding by its norm, so that products are cosines")
    with holds("a temperature of 0.001 does not overflow"):
        loss = as_loss(script.nt_xent_loss(z1.float(), z2.float(), 0.001))
        if not loss.isfinite():
            raise Wrong("exp(1000) is infinite: subtract each row's largest first, or logsumexp")
    with holds("bfloat16 embeddings give a loss in float32"):
        low = [x.detach().bfloat16() for x in (z1, z2)]
        expect_single_precision(script.nt_xent_loss, *low)


def cosines_of(z1, z2):
    z = unit(torch.cat([z1, z2]))
    return z @ z.T


def nt_xent_rows(logits, left_out=None, shift=None):
    """The terms of 2N anchors: logits (2N, 2N). left_out: what the sums do not have, by default
    the diagonal. shift: from an anchor to its positive, by default N."""
    M = len(logits)
    row = torch.arange(M)
    if left_out is None:
        left_out = row == row[:, None]
    positives = logits[row, (row + (shift or M // 2)) % M]
    return logits.masked_fill(left_out, -math.inf).logsumexp(dim=1) - positives


def wrong_nt_xents(z1, z2, temperature):
    """{typical mistake: its loss}."""
    cosines = cosines_of(z1, z2)
    logits = cosines / temperature
    raw = torch.cat([z1, z2])
    N = len(z1)
    row = torch.arange(2 * N)
    nothing = torch.zeros(2 * N, 2 * N, dtype=torch.bool)
    itself = row == row[:, None]
    positive = (row + N) % (2 * N) == row[:, None]
    own_view = row // N == row[:, None] // N
    rows = {
        "an embedding is compared with itself, too: leave k = i out of the sum": (logits, nothing),
        "the positive is not in the sum: k = j stays, only k = i goes": (logits, itself | positive),
        "only the other view's embeddings are compared with: those of the own view count, too": (
            logits, own_view,
        ),
        "the temperature is missing: divide the cosines by it": (cosines,),
        "cosines are multiplied by the temperature: divide": (cosines * temperature,),
        "embeddings are not normalised: cosines are wanted": (raw @ raw.T / temperature,),
        "the positive is another image's: the partner of i is i + N": (logits, itself, 1),
    }  # fmt: skip
    mistakes = {text: nt_xent_rows(*given).mean() for text, given in rows.items()}
    first = nt_xent_rows(logits)[:N].mean()
    second = nt_xent_rows(logits)[N:].mean()
    return mistakes | {
        "only the first view's embeddings are anchors: those of both views are": first,
        "only the second view's embeddings are anchors: those of both views are": second,
    }


# ---- 4. VICReg
VICREG = ("loss", "invariance", "variance", "covariance")


def check_vicreg(script, holds):
    golden = load("vicreg_loss")
    inputs = tensors(golden, ["x", "y"])
    x, y = inputs.values()

    def terms(*coefficients):
        return terms_of(script.vicreg_loss(x, y, *coefficients), VICREG)

    sizes = {2: "views", 16: "images", 24: "dimensions", 384: "entries"}
    mistakes = wrong_vicregs(x.detach(), y.detach())
    short = {"invariance": "sim", "variance": "std", "covariance": "cov"}
    for number, (name, of) in enumerate(short.items()):
        with holds(name):
            expect(terms()[name], golden[f"{of}_loss"], name, mistakes[name], sizes)
        with holds(f"its gradient, the coefficient of {name} alone being 1"):
            coefficients = [0.0, 0.0, 0.0]
            coefficients[number] = 1.0
            expected = {"x": golden[f"grad_{of}_x"], "y": golden[f"grad_{of}_y"]}
            expect_gradients(terms(*coefficients)["loss"], inputs, expected, sizes=sizes)
    with holds("the loss is 25 invariance + 25 variance + 1 covariance"):
        expect(terms()["loss"], golden["loss"], "loss")
    with holds("all terms with more images (20) than dimensions (6)"):
        z1 = 0.5 * noise(20, 6) + 3
        z2 = 0.3 * noise(20, 6, seed=1)
        wide = terms_of(script.vicreg_loss(z1, z2), VICREG)
        for name, value in zip(VICREG[1:], slow_vicreg(z1, z2)):
            expect(wide[name], value, name, wrong_vicregs(z1, z2)[name])
    with holds("whitened views cost nothing"):
        white = torch.linalg.qr(z1 - z1.mean(dim=0))[0] * math.sqrt(19)
        for name, value in terms_of(script.vicreg_loss(white, white), VICREG).items():
            if abs(value.item()) > 1e-6:
                raise Wrong(f"{name} is {value.item():.3g}, not 0")
    with holds("the gradient is finite when all embeddings are the same"):
        same = {"z1": torch.ones(8, 4, requires_grad=True), "z2": torch.zeros(8, 4)}
        loss = terms_of(script.vicreg_loss(*same.values()), VICREG)["loss"]
        if not gradients(loss, {"z1": same["z1"]})["z1"].isfinite().all():
            raise Wrong("the square root has no gradient at 0: add 1e-4 to the variance first")
    with holds("bfloat16 embeddings give a loss in float32"):
        low = [z.detach().bfloat16() for z in (x, y)]
        expect_single_precision(lambda *z: terms_of(script.vicreg_loss(*z), VICREG)["loss"], *low)


def slow_vicreg(z1, z2, ddof=1, eps=1e-4, centre=True, diagonal=False):
    invariance = (z1 - z2).square().mean()
    variance = 0.0
    covariance = 0.0
    for z in (z1, z2):
        N, D = z.shape
        matrix = (z - z.mean(dim=0) * centre).T @ (z - z.mean(dim=0) * centre) / (N - ddof)
        variance = variance + (1 - (matrix.diag() + eps).sqrt()).clamp(min=0).mean() / 2
        squares = matrix.square()
        covariance = covariance + (squares.sum() - squares.trace() * (not diagonal)) / D
    return invariance, variance, covariance


def wrong_vicregs(z1, z2):
    """{term: {typical mistake: its value}}."""
    _, biased_variance, biased_covariance = slow_vicreg(z1, z2, ddof=0)
    _, variance_at_0, covariance_at_0 = slow_vicreg(z1, z2, centre=False)
    _, variance_without_epsilon, _ = slow_vicreg(z1, z2, eps=0.0)
    _, _, covariance_and_diagonal = slow_vicreg(z1, z2, diagonal=True)
    hinge = sum((1 - z.var(dim=0) - 1e-4).clamp(min=0).mean() / 2 for z in (z1, z2))
    return {
        "invariance": {
            "a mean of absolute differences: squares are wanted": (z1 - z2).abs().mean(),
            "a norm for each image: no square root is taken": (z1 - z2).norm(dim=1).mean(),
        },
        "variance": {
            "the variance is divided by N: by N - 1, it is the unbiased one": biased_variance,
            "the hinge is on the variance: on the deviation, its square root": hinge,
            "1e-4 is missing under the square root": variance_without_epsilon,
            "embeddings are not centred: subtract the mean of the batch": variance_at_0,
        },
        "covariance": {
            "covariances are divided by N: by N - 1": biased_covariance,
            "the diagonal counts: only covariances of different dimensions do": (
                covariance_and_diagonal
            ),
            "embeddings are not centred: subtract the mean of the batch": covariance_at_0,
        },
    }


# ---- 5. MSN and PMSN
MSN = ("loss", "cross_entropy", "me_max")
PMSN = ("loss", "cross_entropy", "kl")


def check_msn(script, holds):
    golden = load("msn_loss")
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    for views, kind in (("v1", "plain"), ("v3", "plain"), ("v3", "sinkhorn")):
        inputs = siamese_inputs(golden, f"{views}_")
        sinkhorn = kind == "sinkhorn"
        case = f"{views}_{kind}"
        which = f"{views[1]} anchor view{'s' * (views == 'v3')}, {kind} targets"

        def terms(weight, inputs=inputs, sinkhorn=sinkhorn):
            result = script.msn_loss(
                *inputs.values(), temperature=0.1, sharpen=0.25, me_max_weight=weight,
                sinkhorn=sinkhorn,
            )  # fmt: skip
            return terms_of(result, MSN)

        check_siamese(holds, terms, inputs, uniform, "me_max", golden, case, which, sinkhorn)
    with holds("temperature and sharpening as given"):
        expected = slow_siamese(inputs, uniform, temperature=0.2, sharpen=0.5)
        given = script.msn_loss(*inputs.values(), temperature=0.2, sharpen=0.5)
        for name, value in expected.items():
            expect(terms_of(given, MSN)["me_max" if name == "divergence" else name], value, name)

    def loss_of(*z, **options):
        return terms_of(script.msn_loss(*z, **options), MSN)

    check_siamese_details(holds, loss_of, inputs)


def check_pmsn(script, holds):
    golden = load("pmsn_loss")
    inputs = siamese_inputs(golden, "")
    for exponent in (0.0, 0.25, 1.0):
        prior = power_law(40, exponent)
        case = f"e{round(100 * exponent):03}"

        def terms(weight, prior=prior, sinkhorn=False):
            result = script.pmsn_loss(
                *inputs.values(), prior, temperature=0.1, sharpen=0.25, prior_weight=weight,
                sinkhorn=sinkhorn,
            )  # fmt: skip
            return terms_of(result, PMSN)

        which = f"exponent {exponent:g}" + ", which is MSN" * (exponent == 0)
        check_siamese(holds, terms, inputs, prior, "kl", golden, case, which, sinkhorn=False)
    with holds("exponent 1: gradient of kl alone"):
        expected = {name: golden[f"e100_kl_grad_{name}"] for name in ("anchors", "prototypes")}
        expect_gradients(terms(1.0)["kl"], inputs, expected)
    with holds("exponent 1: cross_entropy with sinkhorn follows the prior"):
        value = terms(1.0, sinkhorn=True)["cross_entropy"]
        wrong = {
            "the targets are not balanced: sinkhorn=True is ignored": (
                slow_siamese(inputs, prior)["cross_entropy"]
            ),
            "the targets are balanced to the uniform prior: give sinkhorn_balance this one": (
                slow_siamese(inputs, power_law(40, 0.0), sinkhorn=True)["cross_entropy"]
            ),
        }
        expect(value, golden["e100_sinkhorn_cross_entropy"], "cross_entropy", wrong)
    with holds("a prior of 0 gives a finite loss"):
        prior = power_law(40, 1.0)
        prior[7] = 0
        loss = terms(1.0, prior=prior / prior.sum())["loss"]
        if not loss.isfinite():
            raise Wrong("the log of 0 is infinite: clamp the prior to the smallest number")

    def loss_of(*z, **options):
        return terms_of(script.pmsn_loss(*z, power_law(len(z[2]), 0.25), **options), PMSN)

    check_siamese_details(holds, loss_of, inputs)


def siamese_inputs(golden, prefix):
    return tensors(golden, [f"{prefix}{name}" for name in ("anchors", "targets", "prototypes")])


def check_siamese(holds, terms, inputs, prior, name, golden, case, which, sinkhorn):
    """Terms, weight and gradients against recorded ones. terms: weight -> {name: scalar}."""
    key = case if name == "kl" else f"{case}_w1"
    mistakes = wrong_siamese(inputs, prior, sinkhorn)
    sizes = {3: "views", 16: "images", 40: "prototypes", 48: "anchors"}
    with holds(f"{which}: cross_entropy"):
        value = terms(1.0)["cross_entropy"]
        expected = golden[f"{key}_cross_entropy"]
        expect(value, expected, "cross_entropy", mistakes["cross_entropy"], sizes)
    if not sinkhorn:  # the targets do not matter
        with holds(f"{which}: {name}"):
            expect(terms(1.0)[name], golden[f"{key}_{name}"], name, mistakes["divergence"], sizes)
    with holds(f"{which}: loss = cross_entropy + 5 {name}"):
        cross_entropy = golden[f"{key}_cross_entropy"]
        term = golden[f"{key}_{name}"]
        wrong = {
            "the weight is ignored: multiply the second term by it": cross_entropy + term,
            "the sign of the second term is wrong: add it": cross_entropy - 5 * term,
            "the second term is missing": cross_entropy,
        }
        expect(terms(5.0)["loss"], cross_entropy + 5 * term, "loss", wrong)
    with holds(f"{which}: gradient of the loss"):
        loss = terms(1.0)["loss"]
        if gradients(loss, {"targets": inputs["targets"]})["targets"] is not None:
            raise Wrong(LABELS)
        names = ("anchors", "prototypes")
        wrong = slow_siamese(inputs, prior, sinkhorn=sinkhorn, learn_targets=True)
        wrong = gradients(wrong["loss"], {name: inputs[name] for name in names})
        expected = {name: golden[f"{key}_grad_{name}"] for name in names}
        expect_gradients(loss, inputs, expected, {f"{LABELS}, prototypes included": wrong})


def check_siamese_details(holds, loss_of, inputs):
    """loss_of: anchors, targets, prototypes, options -> {name: scalar}."""
    anchors, targets, prototypes = (x.detach() for x in inputs.values())
    with holds("lengths of embeddings and prototypes do not matter"):
        lengths = torch.logspace(-2, 2, 16, dtype=torch.float64)[:, None]
        mine = loss_of(anchors * lengths.repeat(3, 1), targets / lengths, 3 * prototypes)["loss"]
        if not near(array(mine), array(loss_of(anchors, targets, prototypes)["loss"]), RTOL):
            raise Wrong("divide embeddings and prototypes by their norms: cosines are wanted")
    with holds("a prototype that nobody uses gives a finite loss"):
        z = torch.eye(8)[:1].repeat(8, 1)
        if not loss_of(z, z, torch.eye(8), temperature=0.005)["loss"].isfinite():
            raise Wrong("0 log 0 is 0: clamp the mean prediction before the log; use log_softmax")
    with holds("bfloat16 embeddings and float32 prototypes give a loss in float32"):
        low = [anchors.bfloat16(), targets.bfloat16(), prototypes.float()]
        expect_single_precision(lambda *z: loss_of(*z)["loss"], *low)


def slow_siamese(inputs, prior, temperature=0.1, sharpen=0.25, sinkhorn=False, learn_targets=False):
    """{name: term} of MSN's or PMSN's loss with weight 1."""
    anchors, targets, prototypes = inputs.values()
    prototypes = unit(prototypes)
    p = (unit(anchors) @ prototypes.T / temperature).softmax(dim=1)
    t = (unit(targets) @ prototypes.T / temperature / sharpen).softmax(dim=1)
    if sinkhorn:
        t = slow_sinkhorn(t, prior)
    if not learn_targets:
        t = t.detach()
    cross_entropy = cross_entropy_of(t, p)
    mean_p = p.mean(dim=0)
    divergence = (mean_p * (mean_p / prior).log()).sum()
    return dict(loss=cross_entropy + divergence, cross_entropy=cross_entropy, divergence=divergence)


def cross_entropy_of(t, p):
    """t (B, K); p (V * B, K), view after view."""
    return -(t.repeat(len(p) // len(t), 1) * p.log()).sum(dim=1).mean()


def slow_sinkhorn(t, prior, rounds=3, rows_first=False):
    for _ in range(rounds):
        if rows_first:
            t = t / t.sum(dim=1, keepdim=True)
        t = t / t.sum(dim=0) * prior * len(t)
        if not rows_first:
            t = t / t.sum(dim=1, keepdim=True)
    return t


def wrong_siamese(inputs, prior, sinkhorn):
    """{term: {typical mistake: its value}}, at temperature 0.1 and sharpening 0.25."""
    anchors, targets, prototypes = (x.detach() for x in inputs.values())
    V = len(anchors) // len(targets)
    anchor_cosines = unit(anchors) @ unit(prototypes).T
    target_cosines = unit(targets) @ unit(prototypes).T
    p = (anchor_cosines / 0.1).softmax(dim=1)

    def targets_at(temperature, cosines=target_cosines, balanced=sinkhorn):
        t = (cosines / temperature).softmax(dim=1)
        return slow_sinkhorn(t, prior) if balanced else t

    t = targets_at(0.025)
    raw_p = (anchors @ prototypes.T / 0.1).log_softmax(dim=1)
    raw_t = targets_at(0.025, targets @ prototypes.T)
    raw = -(raw_t.repeat(V, 1) * raw_p).sum(dim=1).mean()
    scattered = -(t.repeat_interleave(V, dim=0) * p.log()).sum(dim=1).mean()
    exchanged = -(p * t.repeat(V, 1).clamp(min=1e-300).log()).sum(dim=1).mean()
    blunt = cross_entropy_of(targets_at(0.1), p)
    flat = cross_entropy_of(targets_at(0.4), p)
    hot = cross_entropy_of(t, anchor_cosines.softmax(dim=1))
    other_balance = cross_entropy_of(targets_at(0.025, balanced=not sinkhorn), p)
    balanced_first = slow_sinkhorn(targets_at(0.1, balanced=False), prior) ** 4
    early = cross_entropy_of(balanced_first / balanced_first.sum(dim=1, keepdim=True), p)
    cross_entropy = {
        "targets are not sharpened: divide their cosines by temperature x sharpen": blunt,
        "targets are flattened: divide their cosines by temperature x sharpen": flat,
        "anchors meet the targets of other images: anchors come view after view": scattered,
        "-sum p log t: it is -sum t log p, p the anchors' prediction": exchanged,
        "embeddings and prototypes are not normalised: cosines are wanted": raw,
        "the temperature is missing: divide the anchors' cosines by it": hot,
        f"the targets are {'not ' * sinkhorn}balanced, though sinkhorn={sinkhorn}": other_balance,
    }
    if sinkhorn:
        cross_entropy["targets are balanced before they are sharpened: sharpen first"] = early
    mean_p = p.mean(dim=0)
    mean_t = t.mean(dim=0)
    entropy = -(mean_p * mean_p.log()).sum()
    mean_of_entropies = -(p * p.log()).sum(dim=1).mean()
    to_prior = -(mean_p * prior.log()).sum()
    reverse = (prior * (prior / mean_p).log()).sum()
    of_targets = (mean_t * (mean_t / prior).log()).sum()
    uniform = math.log(len(prototypes))
    divergence = {
        "this is minus the entropy: subtract log prior, so that it is 0 at the prior": -entropy,
        "this is the entropy: the sign is wrong, and log prior is missing": entropy,
        "the log comes before the mean: average the predictions first": uniform - mean_of_entropies,
        "the reversed divergence, KL(prior || mean): KL(mean || prior) is wanted": reverse,
        "the mean of the targets: it is the mean of the anchors, which learn": of_targets,
        "the prior is ignored: this is the divergence to the uniform one": uniform - entropy,
        "log mean is missing: this is the mean's cross-entropy to the prior": to_prior,
    }
    return dict(cross_entropy=cross_entropy, divergence=divergence)


def check_sinkhorn(script, holds):
    golden = load("msn_loss")
    plain = torch.from_numpy(golden["v1_plain_assignments"])
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    inputs = siamese_inputs(load("pmsn_loss"), "")
    of_images = unit(inputs["targets"].detach()) @ unit(inputs["prototypes"].detach()).T
    skewed = (of_images / 0.025).softmax(dim=1)
    law = power_law(40, 1.0)

    def wrong(t, prior):
        return {
            "one round too few: three are made": slow_sinkhorn(t, prior, rounds=2),
            "one round too many: three are made": slow_sinkhorn(t, prior, rounds=4),
            "a round ends with the images, so that each has mass 1: prototypes come first": (
                slow_sinkhorn(t, prior, rows_first=True)
            ),
            "the prior is ignored: each prototype gets its own share": slow_sinkhorn(t, uniform),
        }

    with holds("three rounds to the uniform prior"):
        mine = script.sinkhorn_balance(plain, uniform)
        expected = golden["v1_sinkhorn_assignments"]
        expect(mine, expected, "result", wrong(plain, uniform), {16: "images", 40: "prototypes"})
    with holds("three rounds to a power law"):
        mine = script.sinkhorn_balance(skewed, law)
        expected = load("pmsn_loss")["e100_sinkhorn_assignments"]
        expect(mine, expected, "result", wrong(skewed, law), {16: "images", 40: "prototypes"})
    with holds("every image has mass 1"):
        mine = script.sinkhorn_balance(skewed, law)
        expect(mine.sum(dim=1), np.ones(16), "sum over prototypes", sizes={16: "images"})
    with holds("after 300 rounds every prototype has its share of the prior"):
        mixed = (of_images / 0.1).softmax(dim=1)
        shares = script.sinkhorn_balance(mixed, law, rounds=300).mean(dim=0)
        expect(shares, law, "mean over images", rtol=1e-5)
    with holds("a prototype without mass gives no nan"):
        unused = mixed.float()
        unused[:, 3] = 0
        if not script.sinkhorn_balance(unused, uniform).isfinite().all():
            raise Wrong("its mass is 0: clamp it before you divide")
    with holds("float32 stays float32, and the argument as it was"):
        given = mixed.float()
        mine = script.sinkhorn_balance(given, law)
        if not torch.equal(given, mixed.float()):
            raise Wrong("the argument is changed: work on a new tensor")
        if mine.dtype != torch.float32:
            raise Wrong(f"{mine.dtype} comes out: convert the prior, which is float64")


def check_msn_schedule(script, holds):
    golden = load("msn_schedules")
    for case in "ab":
        config = golden[f"{case}_cfg_ipe_epochs_warmup_startlr_lr_finallr_wd_finalwd"].tolist()
        epoch_steps, epochs, warmup, start_lr, lr, final_lr, *weight_decay = config
        args = types.SimpleNamespace(
            epochs=int(epochs), warmup=warmup, start_lr=start_lr, lr=lr, final_lr=final_lr,
            weight_decay=weight_decay, ema=0.996,
        )  # fmt: skip
        steps = int(epoch_steps * epochs)
        run = f"run {case} of {steps} updates"
        for name, short in (("lr", "lr"), ("weight_decay", "wd"), ("ema", "ema")):
            with holds(f"{name} of {run}"):
                rates = [script.schedule(step, int(epoch_steps), args) for step in range(steps + 1)]
                if not isinstance(rates[0], dict) or name not in rates[0]:
                    raise Wrong("a dict is wanted: lr, weight_decay, ema")
                expected = golden[f"{case}_{short}"]
                mine = np.array([rate[name] for rate in rates])
                check_rates(name, mine, expected, args, int(epoch_steps))


def check_rates(name, mine, expected, args, epoch_steps):
    """mine: one more than the expected."""
    if near(mine[1:], expected, 1e-9):
        raise Wrong("one update late: each update has the value of the one before")
    if near(mine[:-2], expected[1:], 1e-9):
        raise Wrong("one update early: each update has the value of the one after")
    run_steps = args.epochs * epoch_steps
    warmup = int(args.warmup * epoch_steps)
    ends = args.weight_decay if name == "weight_decay" else [args.lr, args.final_lr]
    unstretched = []
    for now in range(1, run_steps + 1):
        if name == "ema":
            value = args.ema + (1 - args.ema) * (now - 1) / run_steps
        elif name == "weight_decay":
            value = half_wave(*ends, now / run_steps)
        elif now < warmup:
            value = args.start_lr + (args.lr - args.start_lr) * now / warmup
        else:
            value = half_wave(*ends, (now - warmup) / (run_steps - warmup))
        unstretched.append(value)
    text = "the schedule ends with the run: its horizon is 1.25 times the run"
    expect(mine[:-1], expected, name, {text: unstretched}, rtol=1e-9)


def half_wave(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


# ---- 6. MAE
MAE_SIZES = dict(image_size=32, patch_size=8, dim=64, depth=2, heads=2)
MAE_SIZES |= dict(decoder_dim=32, decoder_depth=1, decoder_heads=2)


def check_mae_forward(script, holds):
    golden = load("mae_forward")
    images = torch.from_numpy(golden["images"])
    given = torch.from_numpy(golden["noise"])
    model = script.MAE(**MAE_SIZES)
    names = [name for name in golden.files if name.startswith("sd/")]
    model.load_state_dict({n.removeprefix("sd/"): torch.from_numpy(golden[n]) for n in names})
    order = given.argsort(dim=1)
    place = order.argsort(dim=1)

    def forward(*arguments, model=model):
        result = model(*arguments)
        if not isinstance(result, tuple) or len(result) != 3:
            raise Wrong(f"{kind_of(result)} is returned, not the tuple (loss, pred, mask)")
        return result

    with holds("the patches of the smallest noise are kept, the mask is 1 where removed"):
        sorted_mask = (torch.arange(16) >= 4).expand(3, -1)
        wrong = {
            "the patches of the largest noise are kept: the smallest ones are": place < 12,
            "the mask is upside down: 1 means removed": place < 4,
            "the mask is in the order of the noise: use the inverse permutation": sorted_mask,
            "order and its inverse are exchanged: the inverse is order.argsort()": order >= 4,
        }
        expect(forward(images, 0.75, given)[2], golden["mask"], "mask", wrong)
    with holds("the prediction, in the order of the image's patches"):
        hint = "patches are at wrong places: give decode the inverse permutation, not the order"
        with torch.no_grad():
            pred = forward(images, 0.75, given)[1]
            wrong = {hint: model.decode(model.encode(images, order[:, :4]), order)}
        expect(pred, golden["pred"], "prediction", wrong, rtol=1e-4)
    for kind in ("rawpix", "normpix"):
        with holds(f"the loss and the norm of its gradient, norm_pix_loss={kind == 'normpix'}"):
            model.norm_pix_loss = kind == "normpix"
            model.zero_grad()
            loss, _, _ = forward(images, 0.75, given)
            expect(as_loss(loss), golden[f"loss_{kind}"], "loss", rtol=1e-5)
            weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
            norms = [g.norm() for g in gradients(loss, weights).values() if g is not None]
            if len(norms) < len(weights):
                raise Wrong("some weights get no gradient")
            total = torch.stack(norms).norm()
            expect(total, golden[f"grad_total_norm_{kind}"], "norm of the gradient", rtol=1e-4)
    with holds("what is removed does not reach the prediction"):
        hidden = torch.from_numpy(golden["mask"]).view(3, 1, 4, 4).bool()
        hidden = hidden.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        with torch.no_grad():
            pred = forward(images, 0.75, given)[1]
            other = forward(torch.where(hidden, images + 5, images), 0.75, given)[1]
        expect(other, pred, "prediction of other pixels under the mask", rtol=1e-5)
    with holds("without noise each image and each call has a mask of its own"):
        mask = forward(images, 0.75)[2]
        if len(mask.unique(dim=0)) == 1:
            raise Wrong("all images have the same mask: draw noise of shape (B, N)")
        if torch.equal(mask, forward(images, 0.75)[2]):
            raise Wrong("two calls have the same masks: draw new noise")
        expect(mask.sum(dim=1), np.full(3, 12.0), "number of removed patches")
    with holds("the number of kept patches is rounded down"):
        with torch.no_grad():
            mask = forward(images, 0.7)[2]
        rounded_up = {"rounded up: int(N * (1 - mask_ratio))": np.full(3, 5.0)}
        expect((mask == 0).sum(dim=1), np.full(3, 4.0), "number of kept patches", rounded_up)


def check_mae_loss(script, holds):
    golden = load("mae_forward")
    pred, mask = (torch.from_numpy(golden[f"loss_only/{name}"]) for name in ("pred", "mask"))
    patches = cut_patches(torch.from_numpy(golden["loss_only/images"]))
    pred.requires_grad_()
    sizes = {3: "images", 192: "values", 16: "patches", int(mask.sum()): "removed patches"}
    for kind in ("rawpix", "normpix"):
        normalise = kind == "normpix"
        wrong = wrong_mae_losses(pred.detach().double(), patches.double(), mask, normalise)
        with holds(f"the loss, norm_pix_loss={normalise}"):
            loss = as_loss(script.mae_loss(pred, patches, mask, normalise))
            expect(loss, golden[f"loss_only/expected_{kind}"], "loss", wrong, sizes, rtol=3e-6)
        with holds(f"its gradient, norm_pix_loss={normalise}"):
            given = pred.detach().double().requires_grad_()
            loss = slow_mae_loss(given, patches.double(), mask, normalise)
            expected = gradients(loss, {"pred": given})
            loss = script.mae_loss(pred, patches, mask, normalise)
            expect_gradients(loss, {"pred": pred}, expected, sizes=sizes, rtol=1e-4)
    with holds("visible patches do not matter"):
        changed = pred + 9 * (mask == 0)[:, :, None]
        losses = [as_loss(script.mae_loss(x, patches, mask)) for x in (pred, changed)]
        if not near(array(losses[0]), array(losses[1]), RTOL):
            raise Wrong("another prediction where the mask is 0 gives another loss")
    with holds("a bfloat16 prediction gives a loss in float32"):
        low = patches.bfloat16()  # all that is left is its rounding
        loss_of = functools.partial(script.mae_loss, mask=mask)
        expect_single_precision(loss_of, low, patches)


def cut_patches(images):
    """images (B, 3, 32, 32) -> patches of 8 pixels (B, 16, 192): in each row, column, channel."""
    rows = [images[:, :, r : r + 8, c : c + 8] for r in range(0, 32, 8) for c in range(0, 32, 8)]
    return torch.stack([x.permute(0, 2, 3, 1).flatten(1) for x in rows], dim=1)


def slow_mae_loss(pred, patches, mask, normalise, unbiased=True):
    if normalise:
        variance = patches.var(dim=2, keepdim=True, unbiased=unbiased)
        patches = (patches - patches.mean(dim=2, keepdim=True)) / (variance + 1e-6).sqrt()
    return (pred - patches).square().mean(dim=2)[mask.bool()].mean()


def wrong_mae_losses(pred, patches, mask, normalise):
    """{typical mistake: its loss}."""

    def loss(mask, normalise=normalise, **options):
        return slow_mae_loss(pred, patches, mask, normalise, **options)

    images = [
        slow_mae_loss(pred[i : i + 1], patches[i : i + 1], mask[i : i + 1], normalise)
        for i in range(len(mask))
    ]
    wrong = {
        "all patches count: only the removed ones do (mask 1)": loss(torch.ones_like(mask)),
        "the visible patches count: the removed ones do (mask 1)": loss(1 - mask),
        "a sum over removed patches, divided by the number of all": loss(mask) * mask.mean(),
        "a mean of means: all removed patches of the batch weigh the same": sum(images) / 3,
        f"this is the loss with norm_pix_loss={not normalise}": loss(mask, not normalise),
    }
    if normalise:
        biased = loss(mask, unbiased=False)
        wrong["a patch's variance is divided by n: by n - 1 (unbiased)"] = biased
    return wrong


# ---- 7. data2vec
def check_block_mask(script, holds):
    golden = load("data2vec_masks")

    def draw(grid, num_masked, min_block, seed):
        mask = script.block_mask(grid, num_masked, min_block, random.Random(seed))
        if not torch.is_tensor(mask) or mask.dtype != torch.bool or mask.shape != (grid, grid):
            found = f"{mask.dtype} {tuple(mask.shape)}" if torch.is_tensor(mask) else kind_of(mask)
            raise Wrong(f"a bool tensor ({grid}, {grid}) is wanted, not {found}")
        return mask

    def at_most(grid, num_masked, min_block, seeds=100):
        most = max(int(draw(grid, num_masked, min_block, seed).sum()) for seed in range(seeds))
        if most > num_masked:
            raise Wrong(f"{most} patches of {num_masked} are masked: refuse a block without room")

    with holds("a bool tensor, True where masked"):
        masked = int(draw(14, 120, 16, 0).sum())
        if masked < 98:
            raise Wrong(f"{masked} of 196 are True, where 120 are to be masked: True means masked")
    with holds("never more than num_masked"):
        at_most(14, 120, 16)
        at_most(8, 39, 4)
    with holds("it ends though no block fits"):
        at_most(3, 9, 9, seeds=1)
    with holds("random numbers come from rng alone"):
        random.seed(1)
        state = random.getstate()
        masks = [draw(14, 120, 16, seed) for seed in (0, 0, 1)]
        if not torch.equal(masks[0], masks[1]):
            raise Wrong("one seed gives two masks: draw from rng, not from random, numpy or torch")
        if torch.equal(masks[0], masks[2]) or random.getstate() != state:
            raise Wrong("draw from rng, not from the module random")
    for name, num_masked in (("official", 120), ("beit75", 75)):
        with holds(f"numbers, places and shapes of 300 masks of {num_masked} patches"):
            masks = torch.stack([draw(14, num_masked, 16, seed) for seed in range(300)])
            compare_masks(masks, golden, name)
    try:
        same = all(
            np.array_equal(draw(14, 120, 16, int(seed)), expected)
            for seed, expected in zip(golden["example_seeds"], golden["example_masks"])
        )
    except Exception:  # reported above
        return
    print(f"       draw by draw the official masks: {'yes' if same else 'no, nor need they be'}")


def compare_masks(masks, golden, name):
    """Of 300 masks: means of their number of patches, boundaries and places, to 5 sigma."""
    across = (masks[:, :, 1:] != masks[:, :, :-1]).sum(dim=(1, 2))
    boundary = across + (masks[:, 1:] != masks[:, :-1]).sum(dim=(1, 2))
    error = (1 / len(masks) + 1 / 2000) ** 0.5
    few = "go on until no block fits ten times in a row"
    blocks = "rectangles of area min_block to the room left, aspect log-uniform from 0.3 to 1 / 0.3"
    for what, mine, key, hint in (
        ("masked patches", masks.sum(dim=(1, 2)), "count", few),
        ("borders between masked and visible patches", boundary, "boundary_edges", blocks),
    ):
        mean = mine.double().mean().item()
        expected = golden[f"{name}/{key}_mean"].item()
        if abs(mean - expected) > 5 * error * golden[f"{name}/{key}_std"].item():
            hint = "" if key == "count" and mean > expected else f": {hint}"
            raise Wrong(f"{mean:.1f} {what} on average, not {expected:.1f}{hint}")
    frequency = golden[f"{name}/position_frequency"]
    sigma = error * np.sqrt(frequency * (1 - frequency)).clip(min=0.02)
    gap = np.abs(array(masks.double().mean(dim=0)) - frequency) / sigma
    if gap.max() > 5:
        row, column = np.unravel_index(gap.argmax(), gap.shape)
        raise Wrong(
            f"the patch in row {row}, column {column} is masked {gap.max():.0f} sigma too often or "
            "too rarely: a block is equally likely wherever it fits"
        )


def check_data2vec_targets(script, holds):
    golden = load("data2vec_targets")
    layers = torch.from_numpy(golden["teacher_layers"]).float()
    expected = golden["target_all/official"]
    wrong = {
        "layers are not normalised one by one before their mean": golden["target_all/postln_only"],
        "the mean of the layers is not normalised": golden["target_all/perlayerln_only"],
        "layers are normalised over patches, not over the entries of each patch": (
            golden["target_all/instnorm_then_perlayerln"]
        ),
        "nothing is normalised: layers one by one, then their mean": (
            golden["target_all/plain_average"]
        ),
        "the first layers: the last top_k are wanted": slow_targets(layers.flip(0), 6),
        "all layers: the last top_k are wanted": slow_targets(layers, 12),
        "the last patch is left out: the cls token comes first": slow_targets(layers.roll(1, 2), 6),
    }
    with holds("the mean of the last six layers, each normalised, normalised again"):
        mine = script.data2vec_targets(layers)
        if torch.is_tensor(mine) and mine.shape == (3, 17, 24):
            raise Wrong("the cls token is among the targets: leave out the first of each layer")
        expect(mine, expected, "target", wrong, rtol=1e-5)
    with holds("a list of layers will do"):
        expect(script.data2vec_targets(list(layers)), expected, "target", rtol=1e-5)
    with holds("top_k=8"):
        ignored = {"top_k is ignored": expected}
        mine = script.data2vec_targets(layers, top_k=8)
        expect(mine, slow_targets(layers, 8), "target", ignored, rtol=1e-5)
    with holds("bfloat16 layers give targets in float32"):
        expect_single_precision(script.data2vec_targets, layers.bfloat16())


def slow_targets(layers, top_k):
    def normalise(x):
        mean = x.mean(dim=2, keepdim=True)
        return (x - mean) / (x.var(dim=2, keepdim=True, unbiased=False) + 1e-5).sqrt()

    return normalise(torch.stack([normalise(x[:, 1:]) for x in layers[-top_k:]]).mean(dim=0))


def check_data2vec_loss(script, holds):
    golden = load("data2vec_targets")
    mask = torch.from_numpy(golden["mask"]).bool().flatten(1)
    target = torch.from_numpy(golden["target_masked/official"])
    whole = torch.from_numpy(golden["predictions"]).float()
    pred = whole[mask].requires_grad_()
    gaps = (pred.detach() - target).double().abs()
    sizes = {24: "entries", 22: "patches", 528: "entries of all patches"}
    for name, beta in (("loss_beta2", 2.0), ("loss_beta0p12", 0.12)):
        small = gaps < beta
        wrong = {
            "beta is ignored: this is that of beta 1": smooth_l1(gaps, 1.0).mean(),
            "this is Huber's loss: divide it by beta": smooth_l1(gaps, beta).mean() * beta,
            "the two parts do not meet: beyond beta it is |d| - beta / 2": (
                torch.where(small, gaps.square() / (2 * beta), gaps).mean()
            ),
            "the quadratic part is twice too large: it is d^2 / (2 beta)": (
                torch.where(small, gaps.square() / beta, gaps - beta / 2).mean()
            ),
            "squares everywhere: beyond beta it is linear": (gaps.square() / (2 * beta)).mean(),
            "this is the mean squared error": gaps.square().mean(),
            "this is the mean absolute error": gaps.mean(),
        }
        with holds(f"the loss, beta {beta:g}"):
            loss = as_loss(script.data2vec_loss(pred, target, beta))
            expect(loss, golden[f"{name}/official"], "loss", wrong, sizes, rtol=1e-5)
    with holds("its gradient, beta 2"):
        expected = {"pred": golden["grad_beta2/official"][mask.numpy()]}
        loss = script.data2vec_loss(pred, target)
        expect_gradients(loss, {"pred": pred}, expected, sizes=sizes, rtol=1e-4)
    with holds("a bfloat16 prediction gives a loss in float32"):
        low = target.bfloat16()  # all that is left is its rounding
        expect_single_precision(script.data2vec_loss, low, target)


def smooth_l1(gaps, beta):
    return torch.where(gaps < beta, gaps.square() / (2 * beta), gaps - beta / 2)


# ---- 8. The sampler
EQUAL = [25] * 16
LONG_TAIL = [400, 150, 80, 40, 20, 10, 5, 3, 2, 1, 1, 1]


def check_batches(script, holds):
    def epoch_of(sizes, batch_size, k_classes, epoch=0, **options):
        """labels (N,), batches (batches, images of this process)."""
        labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
        sampler = script.KClassBatchSampler(labels, batch_size, k_classes, **options)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        expected = len(labels) // batch_size
        if len(batches) != expected:
            raise Wrong(f"{len(batches)} batches an epoch, not {expected}: whole ones only")
        share = batch_size // options.get("world_size", 1)
        if {len(batch) for batch in batches} != {share}:
            raise Wrong(f"batches of {sorted({len(b) for b in batches})} images, not {share}")
        return labels, np.array(batches)

    cases = [
        (EQUAL, 41, 3),
        (EQUAL, 61, 15),
        (EQUAL, 16, 1),
        (LONG_TAIL, 64, 2),
        (LONG_TAIL, 64, 7),
    ]

    def epochs():
        for sizes, batch_size, k_classes in cases:
            yield *epoch_of(sizes, batch_size, k_classes), np.array(sizes), k_classes

    with holds("an epoch of N // batch_size lists of integers"):
        for case in cases:
            epoch_of(*case)
        batch = next(iter(script.KClassBatchSampler([0, 1, 2] * 6, 6, 3)))
        if type(batch) is not list or any(type(index) is not int for index in batch):
            raise Wrong("a batch is a list of Python's own int: .tolist()")
    with holds("exactly K classes in every batch"):
        for labels, batches, _, k_classes in epochs():
            for batch in batches:
                found = len(set(labels[batch]))
                if found != k_classes:
                    raise Wrong(f"{found} classes in a batch, not {k_classes}")
    with holds("a class has floor or ceil of batch / K images in a batch"):
        for labels, batches, _, k_classes in epochs():
            share = batches.shape[1] / k_classes
            for batch in batches:
                counts = np.unique(labels[batch], return_counts=True)[1]
                if counts.min() < math.floor(share) or counts.max() > math.ceil(share):
                    raise Wrong(
                        f"{counts.min()} to {counts.max()} images, where {share:.3g} is due"
                    )
    with holds("no image twice in a batch if its class has enough"):
        for labels, batches, sizes, _ in epochs():
            for batch in batches:
                images = np.bincount(batch, minlength=len(labels))
                due = np.bincount(labels[batch], minlength=len(sizes)) / sizes
                if (images > np.ceil(due)[labels]).any() or (images < np.floor(due)[labels]).any():
                    raise Wrong(
                        "deal a class's images like cards: each once before any comes again"
                    )
    with holds("classes are dealt equally often in an epoch"):
        for labels, batches, sizes, k_classes in epochs():
            dealt = np.zeros(len(sizes))
            for number, batch in enumerate(batches, 1):
                dealt += np.bincount(labels[batch], minlength=len(sizes))
                if np.ptp(dealt) > math.ceil(len(batch) / k_classes):
                    raise Wrong(
                        f"after batch {number} one class has had {dealt.max():.0f} images and "
                        f"another {dealt.min():.0f}: deal the least dealt classes first"
                    )
    with holds("images of a class are seen equally often in an epoch"):
        for labels, batches, sizes, _ in epochs():
            seen = np.bincount(batches.ravel(), minlength=len(labels))
            for label in range(len(sizes)):
                if np.ptp(seen[labels == label]) > 1:
                    raise Wrong("a class's deck is dealt to its end before it is shuffled anew")
    with holds("one seed and epoch give the same batches, others give others"):
        first, again, later, other = (
            epoch_of(EQUAL, 40, 3, epoch=epoch, seed=seed)[1].tolist()
            for epoch, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
        )
        if first != again:
            raise Wrong("seed a generator with (self.seed, self.epoch): default_rng([seed, epoch])")
        if first in (later, other):
            raise Wrong(
                "another epoch or seed gives the same batches: both belong in the generator"
            )
    with holds("all classes are equally likely in the first batch"):
        counts = np.zeros(16)
        for epoch in range(200):
            labels, batches = epoch_of(EQUAL, 40, 3, epoch=epoch)
            counts[np.unique(labels[batches[0]])] += 1
        if np.abs(counts - 37.5).max() > 6 * 5.6:
            raise Wrong("break ties between classes at random, in each epoch anew")
    with holds("the batches of several processes join to that of one"):
        labels, whole = epoch_of(EQUAL, 40, 5)
        parts = [epoch_of(EQUAL, 40, 5, rank=rank, world_size=4)[1] for rank in range(4)]
        if not np.array_equal(np.concatenate(parts, axis=1), whole):
            raise Wrong("make the batch of all processes, then yield batch[self.share]")
        if np.mean([len(set(labels[row])) for part in parts for row in part]) < 3.5:
            raise Wrong("a process gets whole classes: shuffle the batch before it is cut")
    with holds("k_classes=None: a shuffle, no image twice in an epoch"):
        _, batches = epoch_of(LONG_TAIL, 60, None)
        if len(set(batches.ravel().tolist())) < batches.size:
            raise Wrong("an image comes twice")
        if np.array_equal(batches.ravel(), np.arange(batches.size)):
            raise Wrong("the images come in order")


def power_law(num_prototypes, exponent):
    weights = np.array([k**-exponent for k in range(1, num_prototypes + 1)])
    return torch.from_numpy(weights / weights.sum())


def check_power_law(script, holds):
    golden = load("power_law")
    for num_prototypes, exponent in itertools.product((2, 10, 1024), (0.0, 0.25, 1.0)):
        with holds(f"{num_prototypes} prototypes, exponent {exponent:g}"):
            k = np.arange(1.0, num_prototypes + 1)
            weights = {
                "the sign of the exponent is wrong: k ** -exponent": k**exponent,
                "k starts at 2: it counts from 1": (k + 1) ** -exponent,
                "an exponential law: k is the base": np.exp(-exponent * k),
                "a softmax of the weights: divide them by their sum": np.exp(k**-exponent),
            }
            wrong = {text: value / value.sum() for text, value in weights.items()}
            wrong["the weights do not sum to 1: divide by their sum"] = k**-exponent
            mine = script.power_law_prior(num_prototypes, exponent)
            expected = golden[f"k{num_prototypes}_e{round(100 * exponent):03}"]
            expect(mine, expected, "prior", wrong, rtol=1e-6)
    with holds("a float64 tensor"):
        mine = script.power_law_prior(10, 0.25)
        if not torch.is_tensor(mine) or mine.dtype != torch.float64:
            raise Wrong(f"{mine.dtype if torch.is_tensor(mine) else kind_of(mine)} comes out")
    with holds("no prototypes: ValueError"):
        try:
            script.power_law_prior(0, 0.25)
        except ValueError:
            return
        raise Wrong("no error is raised")


# ---- 9. Exercises
EXERCISES = {  # function: (its check, definitions that are blanked)
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
    "sampler.KClassBatchSampler": (
        check_batches,
        ["KClassBatchSampler.__iter__", "KClassBatchSampler._refill"],
    ),
    "sampler.power_law_prior": (check_power_law, ["power_law_prior"]),
}


def check(name, path):
    """Print all properties of one function in a student's file -> exit status 0 or 1."""
    examine, definitions = EXERCISES[name]
    script = load_script(name.split(".")[0], path)
    find(script, definitions[0], path)
    report = Report(path)
    end = ""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        examine(script, report)
    except GiveUp:
        end = "; the others have to wait"
    except Exception as error:  # what lies between the properties, such as a network's __init__
        report.complain(name, describe_error(error, path))
    finally:
        dist.destroy_process_group()
    if report.wrong:
        properties = f"{report.wrong} of {report.right + report.wrong} properties"
        print(f"{name}: {properties} wrong{end}")
        return 1
    print(f"{name}: all {report.right} properties hold")
    return 0


def find(script, definition, path):
    """The function of this dotted name, which the file must have."""
    found = script
    for part in definition.split("."):
        if not hasattr(found, part):
            fail(f"{path} has no {definition}: give --file a copy of the script that has it")
        found = getattr(found, part)


def load_script(name, path):
    """A student's file as a module. Its text is compiled anew: no cached bytecode."""
    script = types.ModuleType(f"student_{name}")
    script.__file__ = str(path)
    sys.modules[script.__name__] = script
    source = read(path)
    try:
        exec(compile(source, str(path), "exec"), script.__dict__)
    except (Exception, SystemExit) as error:
        fail(f"{path} cannot be imported: {describe_error(error, path)}: correct it first")
    return script


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text file"
        fail(f"{path}: {reason}: give the path of a copy of a script")


# ---- 10. Hand-outs
def blank(names, path, out):
    """Write a copy of a script with the bodies of these functions blanked, sampler.py beside it."""
    source = read(path)
    for name in names:
        for definition in EXERCISES[name][1]:
            source = blanked(source, definition, path)
    beside = out.parent / "sampler.py"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "x", encoding="utf-8", newline="") as file:
            file.write(source)
        if not names[0].startswith("sampler.") and not beside.exists():
            shutil.copy(ROOT / "sampler.py", beside)
    except FileExistsError:
        fail(f"--out {out} exists: remove it, or give another name")
    except OSError as error:
        fail(f"--out {out}: {error.strerror}: give another name")
    for name in names:
        print(f"{out}: {' and '.join(EXERCISES[name][1])} blank; to check it:")
        print(f"python tests/check_student.py {name} --file {out}")


def blanked(source, definition, path):
    """The source with the body of one definition, after its docstring, replaced by BLANK."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        fail(f"{path}: {describe_error(error, path)}: correct it first")
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
    p.add_argument("function", nargs="?", help="what to check: SCRIPT.FUNCTION, see --list")
    p.add_argument("--file", type=Path, help="the student's file; None: the repository's")
    p.add_argument("--blank", nargs="+", metavar="FUNCTION", help="make a hand-out, of one script")
    p.add_argument("--out", type=Path, help="file of the hand-out; sampler.py is put beside it")
    p.add_argument("--list", action="store_true", help="functions that can be checked")
    args = p.parse_args(argv)
    if args.list:
        return args
    names = args.blank or [args.function]
    if args.blank and args.function:
        fail("give a function to check, or --blank and --out, not both: see --help")
    if names == [None]:
        fail("which function? --list shows all")
    for name in names:
        if name not in EXERCISES:
            fail(f"{name} is none of the functions: choose one of {', '.join(EXERCISES)}")
    scripts = {name.split(".")[0] for name in names}
    if len(scripts) > 1:
        fail(f"--blank: {' and '.join(sorted(scripts))} are two scripts: blank one at a time")
    if bool(args.blank) != bool(args.out):
        fail("--blank and --out belong together: --blank FUNCTION --out FILE")
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
