"""simclr.py and vicreg.py against recorded numbers: losses, LARS, steps, processes, memory."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recorded import DTYPES, assert_recorded, load, tensors
from runs import CONVOLUTIONAL, compute_jointly
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import simclr
import vicreg

NT_XENT = load("simclr_loss")
VICREG = load("vicreg_loss")
LARS = load("lars")
SCHEDULES = load("schedules")
TRAJECTORIES = {method: load(f"{method.__name__}_trajectory") for method in CONVOLUTIONAL}
METHODS = pytest.mark.parametrize("method", CONVOLUTIONAL, ids=["simclr", "vicreg"])
# Options of a step, and the names of its metrics.
STEP = SimpleNamespace(temperature=0.1, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, bf16=False)
METRICS = {
    simclr: {"loss", "embedding_std"},
    vicreg: {"loss", "invariance", "variance", "covariance"},
}
# BatchNorm follows, so that their gradient is 0 in exact arithmetic.
ROUNDING = "expander.0.bias", "expander.3.bias"


def distance(mine, theirs):
    """How far two arrays or tensors are apart, as a fraction of the second's size."""
    mine, theirs = (torch.as_tensor(x).detach().double() for x in (mine, theirs))
    return ((mine - theirs).norm() / theirs.norm()).item()


def noise(*shapes, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=rng).to(dtype) for s in shapes]


# ---- 1. Losses


@DTYPES
@pytest.mark.parametrize("t, temperature", [("t01", []), ("t05", [0.5])])  # 0.1 is the default
@pytest.mark.parametrize("power", [0, 3])  # of lengths, which do not count
def test_nt_xent_is_the_recorded_one(power, t, temperature, dtype):
    z1, z2 = (z.requires_grad_() for z in tensors(NT_XENT, dtype, "z1", "z2"))
    lengths = torch.logspace(-power, power, len(z1), dtype=dtype)[:, None]
    loss = simclr.nt_xent_loss(z1 * lengths, z2 / lengths, *temperature)
    loss.backward()
    assert_recorded(loss, NT_XENT[f"{t}_loss_mean"], dtype)
    assert_recorded(2 * loss, NT_XENT[f"{t}_loss_official_scale"], dtype)
    assert_recorded(z1.grad, NT_XENT[f"{t}_grad_z1"], dtype)
    assert_recorded(z2.grad, NT_XENT[f"{t}_grad_z2"], dtype)


@DTYPES
def test_nt_xent_equals_a_loop(dtype):
    N = 5
    temperature = 0.3
    z1, z2 = noise((N, 7), (N, 7), dtype=dtype)
    z = [v / np.linalg.norm(v) for v in torch.cat([z1, z2]).double().numpy()]
    expected = 0.0
    for i in range(2 * N):
        others = [math.exp(z[i] @ z[k] / temperature) for k in range(2 * N) if k != i]
        expected -= math.log(math.exp(z[i] @ z[(i + N) % (2 * N)] / temperature) / sum(others))
    assert_recorded(simclr.nt_xent_loss(z1, z2, temperature), expected / (2 * N), dtype)


@pytest.mark.parametrize(
    "given, wanted", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_losses_are_of_at_least_single_precision(given, wanted):
    z1, z2 = noise((16, 8), (16, 8), dtype=given)
    for loss in (lambda *z: [simclr.nt_xent_loss(*z)], vicreg.vicreg_loss):
        terms = loss(z1, z2)
        expected = loss(z1.double(), z2.double())
        assert {term.dtype for term in terms} == {wanted}
        for term, value in zip(terms, expected, strict=True):  # inside too: the inputs are rounded
            assert abs(term - value) < 1e-5 * value.abs()


@DTYPES
def test_vicreg_loss_is_the_recorded_one(dtype):
    names = ["sim", "std", "cov"]
    inputs = tensors(VICREG, dtype, "x", "y")

    def check(gradients, *coefficients):
        x, y = (z.clone().requires_grad_() for z in inputs)
        terms = vicreg.vicreg_loss(x, y, *coefficients)
        terms[0].backward()
        for term, name in zip(terms[1:], names, strict=True):
            assert_recorded(term, VICREG[f"{name}_loss"], dtype)
        assert_recorded(x.grad, VICREG[f"{gradients}_x"], dtype)
        assert_recorded(y.grad, VICREG[f"{gradients}_y"], dtype)
        return terms[0]

    assert_recorded(check("grad"), VICREG["loss"], dtype)  # 25, 25 and 1 are the defaults
    for name, coefficients in zip(names, torch.eye(3).tolist()):
        assert_recorded(check(f"grad_{name}", *coefficients), VICREG[f"{name}_loss"], dtype)


@DTYPES
@pytest.mark.parametrize("N, D", [(6, 20), (20, 6), (8, 8)])
def test_vicreg_loss_equals_explicit_covariances(N, D, dtype):
    z1, z2 = (z.requires_grad_() for z in noise((N, D), (N, D), dtype=dtype))
    with torch.no_grad():
        z1 += 3  # a mean, which does not count
        z2 *= 0.3
    terms = vicreg.vicreg_loss(z1, z2, 2.0, 3.0, 5.0)
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    sim = (exact[0] - exact[1]).square().sum() / (N * D)
    std = 0.0
    cov = 0.0
    for z in exact:
        matrix = sum(row[:, None] * row[None] for row in z - z.mean(dim=0)) / (N - 1)  # (D, D)
        std = std + (1 - (matrix.diag() + 1e-4).sqrt()).clamp(min=0).mean() / 2
        cov = cov + matrix[~torch.eye(D, dtype=torch.bool)].square().sum() / D
    total = 2 * sim + 3 * std + 5 * cov
    for term, value in zip(terms, (total, sim, std, cov), strict=True):
        assert_recorded(term, value.item(), dtype)
    terms[0].backward()
    for z, gradient in zip((z1, z2), torch.autograd.grad(total, exact)):
        assert_recorded(z.grad, gradient, dtype)


@DTYPES
def test_vicreg_loss_of_whitened_views_is_0(dtype):
    N = 20
    D = 6
    atol = 1e-12 if dtype == torch.float64 else 1e-6
    (z,) = noise((N, D))
    white = (torch.linalg.qr(z - z.mean(dim=0))[0] * math.sqrt(N - 1)).to(dtype)
    for term in vicreg.vicreg_loss(white, white):
        assert abs(term) < atol
    twin = torch.cat([white[:, :1], white[:, :-1]], dim=1)  # dimensions 0 and 1 correlate fully
    _, invariance, variance, covariance = vicreg.vicreg_loss(twin, twin)
    assert max(abs(invariance), abs(variance), abs(covariance - 2 * 2 / D)) < atol
    _, _, variance, _ = vicreg.vicreg_loss(white / 2, white / 2)
    assert abs(variance - (1 - math.sqrt(0.25 + 1e-4))) < atol


# ---- 2. LARS and rates


def lars_values(method, dtype, rates, lr_in_buffer, restart=None):
    """{recorded name: value after each of six steps, or the momentum after the last}."""
    names = ["weight", "bias", "bn_weight", "zero_weight"]
    params = [nn.Parameter(p) for p in tensors(LARS, dtype, *(f"init_{n}" for n in names))]
    options = [LARS[name].item() for name in ("weight_decay", "momentum", "eta")]
    optimizer = method.LARS(params, 0, *options, lr_in_buffer=lr_in_buffer)
    values = []
    for i, lr in enumerate(LARS[f"lr_{rates}"].tolist()):
        if i == restart:  # with other options, which the state overrides
            state = copy.deepcopy(optimizer.state_dict())
            params = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer = method.LARS(params, 1, 0.0, 0.0, 0.0, lr_in_buffer=not lr_in_buffer)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = lr
        for p, name in zip(params, names):
            p.grad = torch.from_numpy(LARS[f"grad_{name}"][i]).to(dtype)
        optimizer.step()
        values.append([p.detach().clone() for p in params])
    results = {name: torch.stack(steps) for name, steps in zip(names, zip(*values))}
    ends = [optimizer.state[p]["momentum_buffer"] for p in params]
    return results | {f"{name}_momentum_end": end for name, end in zip(names, ends)}


@DTYPES
@METHODS
def test_lars_is_the_recorded_one(method, dtype):
    inside = method is simclr
    exact = dtype == torch.float64
    rtol = 1e-10 if exact else 1e-5
    atol = 1e-13 if exact else 1e-6
    for rates in ("var", "const"):
        mine = lars_values(method, dtype, rates, inside)
        other = lars_values(method, dtype, rates, not inside)
        again = lars_values(method, dtype, rates, inside, restart=3)
        for name, value in mine.items():
            golden = torch.from_numpy(LARS[f"{method.__name__}_{rates}_{name}"])
            assert value.dtype == dtype and torch.equal(value, again[name])
            torch.testing.assert_close(value.double(), golden, rtol=rtol, atol=atol)
            same = torch.allclose(other[name].double(), golden, rtol, atol)
            assert same == (rates == "const" and "momentum" not in name)


def assert_rates(method, steps, epoch_steps, recorded, **options):
    args = SimpleNamespace(**options)
    rates = [method.schedule(t, epoch_steps, args)["lr"] for t in steps]
    np.testing.assert_allclose(rates, SCHEDULES[recorded], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("run, batch", [("", 256), ("full_", 4096)])
def test_rates_of_simclr_are_the_recorded_ones(run, batch):
    warmup, total = (int(SCHEDULES[f"simclr_{run}{name}_steps"]) for name in ("warmup", "total"))
    steps = SCHEDULES["simclr_full_steps"].tolist() if run else range(355)
    options = dict(batch_size=batch, warmup=warmup, epochs=total, final_lr=0.0)
    assert_rates(simclr, steps, 1, f"simclr_{run}lr_linear", base_lr=0.3, **options)
    base_lr = 0.075 * 256 / math.sqrt(batch)
    assert_rates(simclr, steps, 1, f"simclr_{run}lr_sqrt", base_lr=base_lr, **options)


@pytest.mark.parametrize("run", ["a", "b", "full"])
def test_rates_of_vicreg_are_the_recorded_ones(run):
    config = SCHEDULES[f"vicreg_{run}_cfg_epochs_stepsperepoch_baselr_batch"].tolist()
    epochs, epoch_steps, base_lr, batch = config
    all_steps = range(int(epochs * epoch_steps))
    steps = SCHEDULES["vicreg_full_steps"].tolist() if run == "full" else all_steps
    options = dict(base_lr=base_lr, batch_size=batch, warmup=10, epochs=epochs, final_lr=0.001)
    assert_rates(vicreg, steps, epoch_steps, f"vicreg_{run}_lr", **options)


# ---- 3. Training steps


def recorded(method, prefix):
    """{the model's name: recorded array}, of every trained parameter."""
    golden = TRAJECTORIES[method]
    head = "projector" if method is simclr else "expander"
    return {
        name.replace("backbone", "encoder").replace("projector", head): golden[f"{prefix}/{name}"]
        for name in map(str, golden["param_names"])
    }


def small_model(method, dtype):
    """The model of the recorded run at its start, and its trained parameters by name."""
    layers = []
    for before, after in ((3, 8), (8, 16)):
        conv = nn.Conv2d(before, after, 3, 2, padding=1, bias=False)
        layers += [conv, method.BatchNorm(after), nn.ReLU()]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if method is simclr:
        model = simclr.SimCLR(encoder, dim=16, hidden=16, output=12, layers=3)
    else:
        model = vicreg.VICReg(encoder, dim=16, hidden=32, output=24)
    start = recorded(method, "init")
    model = model.to(dtype)
    for name, value in start.items():
        model.get_parameter(name).data.copy_(torch.from_numpy(value))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    return model, {name: trained[name] for name in start}


def train(method, dtype, steps, decay=None, flip_buffer=False, ahead=0, wrap=lambda model: model):
    """Repeat the recorded run, with a mistake if asked for.

    Returns first gradients, losses, rates, norms after each step, and weights."""
    golden = TRAJECTORIES[method]
    model, weights = small_model(method, dtype)
    config = {k: v.item() for k, v in golden.items() if k.startswith("cfg_") and v.ndim == 0}
    horizon = SimpleNamespace(
        base_lr=config["cfg_base_lr"],
        batch_size=config["cfg_batch"],
        warmup=10,
        epochs=config.get("cfg_total_steps", 20),  # of one step each
        final_lr=0.0 if method is simclr else 0.001,
    )
    optimizer = method.LARS(
        weights.values(),
        lr=0.0,
        weight_decay=config["cfg_weight_decay"] if decay is None else decay,
        momentum=config["cfg_momentum"],
        trust=config["cfg_eta"],
        lr_in_buffer=(method is simclr) != flip_buffer,
    )
    parallel = wrap(model)
    losses = []
    lrs = []
    norms = []
    for i in range(steps):
        x, y = (torch.from_numpy(golden[k][i % 5]).to(dtype) for k in "xy")
        lrs.append(method.schedule(i + ahead, 1, horizon)["lr"])
        if method is simclr:
            metrics = simclr.simclr_step(parallel, optimizer, torch.cat([x, y]), lrs[i], STEP)
        else:
            metrics = vicreg.vicreg_step(parallel, optimizer, x, y, lrs[i], STEP)
        assert metrics.keys() == METRICS[method]
        assert all(x.shape == () and x.isfinite() for x in metrics.values())
        losses.append(metrics["loss"].detach())
        norms.append([p.detach().norm() for p in weights.values()])
        if i == 0:
            gradients = {name: p.grad.clone() for name, p in weights.items()}
            others = [p for p in model.parameters() if not p.requires_grad]
    assert len(others) == (method is simclr)  # the last BatchNorm's shift
    assert all(p.grad is None and not p.any() for p in others)
    return gradients, losses, lrs, torch.tensor(norms), weights


def update_ratio(weights, method, prefix):
    """The worst parameter's distance from its recorded end, as a fraction of the way there."""
    start = recorded(method, "init")
    end = recorded(method, f"{prefix}_final")
    moved = [name for name in weights if name not in ROUNDING]
    for name in weights.keys() - moved:
        np.testing.assert_allclose(weights[name].detach(), end[name], rtol=0, atol=1e-6)
    mine = {name: weights[name].detach().double().numpy() for name in moved}
    norm = np.linalg.norm
    return max(norm(w - end[k]) / norm(end[k] - start[k]) for k, w in mine.items())


@DTYPES
@METHODS
@pytest.mark.parametrize("steps", [5, 14])
def test_steps_are_the_recorded_ones(steps, method, dtype):
    golden = TRAJECTORIES[method]
    exact = dtype == torch.float64
    prefix = f"mean_s{steps}" if method is simclr else f"s{steps}"
    gradients, losses, lrs, norms, weights = train(method, dtype, steps)
    for name, value in recorded(method, "grad0").items():
        if name in ROUNDING:
            assert gradients[name].abs().max() < 1e-5  # not NaN
        else:
            assert_recorded(gradients[name], value, dtype)
    np.testing.assert_allclose(lrs, golden[f"{prefix}_lrs"], rtol=1e-10, atol=1e-12)
    rtol = 1e-9 if exact else 1e-5 if steps == 5 else 1e-4
    np.testing.assert_allclose(losses, golden[f"{prefix}_losses"], rtol=rtol)
    np.testing.assert_allclose(norms, golden[f"{prefix}_param_norms"], rtol=rtol)
    tolerance = 1e-6 if exact else 3e-3 if steps == 5 else 1e-3
    assert update_ratio(weights, method, prefix) <= tolerance


def other_batches(model):
    """The mistake: BatchNorm of each view instead of both together (SimCLR), or the reverse."""

    def forward(*views):
        if len(views) == 1:
            return torch.cat([model(view) for view in views[0].chunk(2)])
        return model.expander(model.encoder(torch.cat(views))).chunk(2)

    return forward


@METHODS
def test_mistakes_exceed_the_tolerance(method):
    """Of weights, at ten times float32's tolerance; losses would hardly show the missing decay."""
    mistakes = [dict(decay=0.0), dict(flip_buffer=True), dict(wrap=other_batches), dict(ahead=1)]
    for mistake in mistakes:
        *_, weights = train(method, torch.float64, 5, **mistake)
        ratio = update_ratio(weights, method, "mean_s5" if method is simclr else "s5")
        assert ratio > 10 * 3e-3, mistake


def test_twice_the_loss_takes_the_steps_of_the_official_scale(monkeypatch):
    loss = simclr.nt_xent_loss
    monkeypatch.setattr(simclr, "nt_xent_loss", lambda *inputs: 2 * loss(*inputs))
    *_, weights = train(simclr, torch.float64, 14)
    assert update_ratio(weights, simclr, "official_s14") < 1e-6
    assert update_ratio(weights, simclr, "mean_s14") > 0.1


# ---- 4. Processes

KINDS = [(torch.float64, False), (torch.float32, False), (torch.float64, True)]  # local BatchNorm
CASES = {  # recorded numbers, their prefix, inputs, and what the mistakes are called
    "t01": (NT_XENT, "t01_", "z1 z2 lin_x1 lin_x2", "localneg_loss", "localneg"),
    "t05": (NT_XENT, "t05_", "z1 z2 lin_x1 lin_x2", "localneg_loss", "localneg"),
    "vicreg": (VICREG, "", "x y lin_x lin_y", "localstats_loss", "localstats_grad"),
}
COLLECTIVES = {  # of a process's rows; the same by torch's own functions, of all rows and its share
    "all_reduce_mean": (
        lambda x: simclr.all_reduce_mean(x.mean(dim=0)),
        lambda x, share: x.mean(dim=0),
    ),
    "gather": (simclr.gather, lambda x, share: x),
    "BatchNorm": (
        lambda x: simclr.BatchNorm(3).double()(x),
        lambda x, share: F.batch_norm(x, None, None, training=True)[share],
    ),
}


def sum_of(y, rank):
    """A loss of a process that sees y: no two have the same."""
    rng = torch.Generator().manual_seed(rank)
    return (y * torch.randn(y.shape, dtype=torch.float64, generator=rng)).sum()


def joint_collective(name, rank, processes):
    function, _ = COLLECTIVES[name]
    (x,) = noise((16, 3, 5))
    x = x.chunk(processes)[rank].requires_grad_()
    y = function(x)
    sum_of(y, rank).backward()
    return y.detach(), x.grad


def joint_loss(case, rank, processes, dtype):
    """This process's loss of recorded embeddings, their gradients and a linear encoder's."""
    golden, _, inputs, *_ = CASES[case]
    shares = [np.split(golden[name], processes)[rank] for name in inputs.split()]
    z1, z2, *images = (torch.from_numpy(x).to(dtype).requires_grad_() for x in shares)
    temperature = dict(t01=0.1, t05=0.5).get(case)

    def loss_of(*z):
        return simclr.nt_xent_loss(*z, temperature) if temperature else vicreg.vicreg_loss(*z)[0]

    loss = loss_of(z1, z2)
    loss.backward()
    linear = nn.Linear(*reversed(golden["lin_W"].shape), bias=False)
    linear.weight.data = torch.from_numpy(golden["lin_W"]).to(dtype)
    encode = DistributedDataParallel(linear)
    loss_of(*encode(torch.cat(images)).chunk(2)).backward()
    return loss.detach(), z1.grad, z2.grad, linear.weight.grad


def whole_step(method, rank, processes, dtype, local):
    """A network's gradients and statistics by this process's share of 16 images."""
    torch.manual_seed(0)
    encoder, dim = method.resnet("small", 32)
    if method is simclr:
        model = simclr.SimCLR(encoder, dim, hidden=24, output=12, layers=2)
    else:
        # Narrower than the batch of all: Z'Z. The recorded embeddings are wider: ZZ'.
        model = vicreg.VICReg(encoder, dim, hidden=24, output=12)
    model = model.to(dtype)
    views = torch.rand(2, 16, 3, 16, 16).to(dtype).chunk(processes, dim=1)[rank]
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    with pytest.MonkeyPatch.context() as patch:
        if local:
            patch.setattr(method.BatchNorm, "forward", nn.BatchNorm1d.forward)
        if method is simclr:
            loss = simclr.nt_xent_loss(*parallel(views.flatten(0, 1)).chunk(2))
        else:
            loss = vicreg.vicreg_loss(*parallel(*views))[0]
        loss.backward()
    trained = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def joint_work(rank, processes):
    results = {name: joint_collective(name, rank, processes) for name in COLLECTIVES}
    for case in CASES:
        for dtype in (torch.float64, torch.float32):
            results[f"{case} {dtype}"] = joint_loss(case, rank, processes, dtype)
    for method in CONVOLUTIONAL:
        for kind in KINDS:
            results[f"{method.__name__} {kind}"] = whole_step(method, rank, processes, *kind)
    return results


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """{number of processes: what each of them computed}."""
    return compute_jointly(joint_work, tmp_path_factory.mktemp("processes"), groups=(4, 2, 1))


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("R", [1, 2, 4])
def test_collectives_and_their_gradients_are_those_of_all_rows(R, name, joint):
    """The gradient of the mean of the processes' losses, once DDP has divided it by R."""
    _, of_one = COLLECTIVES[name]
    (x,) = noise((16, 3, 5))
    x.requires_grad_()
    expected = [of_one(x, share) for share in torch.arange(16).chunk(R)]
    sum(sum_of(y, rank) / R for rank, y in enumerate(expected)).backward()
    outputs, gradients = zip(*(worker[name] for worker in joint[R]))
    torch.testing.assert_close(outputs, tuple(expected), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat(gradients) / R, x.grad, rtol=0, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("R", [2, 4])
def test_losses_of_processes_are_the_recorded_ones(R, case, dtype, joint):
    golden, prefix, inputs, wrong_loss, wrong_gradient = CASES[case]
    results = zip(*(worker[f"{case} {dtype}"] for worker in joint[R]))
    losses, *gradients, linear = (torch.stack(parts) for parts in results)
    of_R = {k.removeprefix(f"{prefix}r{R}_"): v for k, v in golden.items()}
    of_each = of_R["local_loss" if case == "vicreg" else "local_loss_mean"]
    for loss, expected in zip(losses, of_each, strict=True):
        assert_recorded(loss, expected, dtype)
    full = golden["loss" if case == "vicreg" else f"{prefix}loss_mean"]
    assert_recorded(losses.mean(), full, dtype)
    assert distance(losses, of_R[f"wrong_{wrong_loss}"]) > 0.05
    for gradient, z in zip(gradients, inputs.split()):
        if case == "vicreg":
            assert_recorded(gradient, of_R[f"raw_grad_{z}"], dtype)
        assert_recorded(gradient / R, of_R[f"grad_{z}"], dtype)
        for mistake in ("nograd_gather", wrong_gradient):
            assert distance(gradient / R, of_R[f"wrong_{mistake}_{z}"]) > 0.05
    for gradient in linear:
        assert_recorded(gradient, golden[f"{prefix}lin_grad_W"], dtype)


@METHODS
@pytest.mark.parametrize("R", [1, 2, 4])
def test_processes_compute_what_one_computes(R, method, joint):
    """Gradients, of every parameter by itself, and running statistics of every BatchNorm."""
    for dtype, local in KINDS:
        alone = whole_step(method, 0, 1, dtype, local=False)
        batches = {v.item() for k, v in alone.items() if k.endswith("num_batches_tracked")}
        assert batches == {1 if method is simclr else 2}  # views joined, or one by one
        worst = 0.0
        for worker in joint[R]:
            mine = worker[f"{method.__name__} {(dtype, local)}"]
            assert mine.keys() == alone.keys()
            errors = [distance(mine[k], v) for k, v in alone.items() if k not in ROUNDING]
            worst = max(worst, *errors)
        if local and R > 1:
            assert worst > 0.01
        else:
            assert worst < (1e-12 if dtype == torch.float64 else 1e-5)


# ---- 5. Memory


def status(key):
    """A line of /proc/self/status in bytes. A child's getrusage would start with our own peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of_nt_xent(B, processes):
    """Bytes that loss and gradient of B images need in one of so many processes, at the peak."""

    def gather(z):  # the others' are constant
        others = z.new_full((processes * len(z), *z.shape[1:]), 0.1)
        others[: len(z)] = z
        return others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "world_size", lambda: processes)
        patch.setattr(simclr, "rank", lambda: 0)
        patch.setattr(simclr, "gather", gather)
        z1, z2 = (torch.randn(B, 32, requires_grad=True) for _ in range(2))
        before = status("VmRSS")
        simclr.nt_xent_loss(z1, z2).backward()
        return status("VmHWM") - before


def measured_peak(rank, _):
    """The first process is one of eight, the second is alone."""
    processes = [8, 1][rank]
    dist.destroy_process_group()
    with simclr.process_group():  # as in a run; what it keeps but does not fit again counts
        peak_of_nt_xent(8, processes)  # what the first call needs is not counted
        peak = peak_of_nt_xent(4096 // processes, processes)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured on Linux")
def test_a_process_of_8_holds_an_eighth_of_the_similarities(tmp_path):
    share, whole = compute_jointly(measured_peak, tmp_path, groups=(2,))[2]
    logits = 2 * 4096 // 8 * 2 * 4096 * 4  # bytes of the process's rows: 34 MB
    assert logits < share <= 2.2 * logits  # logits and their gradient
    assert 7 * share < whole < 8.5 * share
