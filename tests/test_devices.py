"""Every tensor of a training step is on the GPU, without a GPU: on fake tensors.

A fake tensor has a shape, a dtype and a device, here cuda, but no numbers. An operation on two of
them fails where the real one would, so that a tensor left on the CPU is noticed. So is a number
that Python asks of the GPU (.item(), if x > 0), and a copy to it without non_blocking: the program
would wait there for all that the GPU has to do. What fake tensors cannot tell, numbers above all,
is in test_gpu.py.

A script's own `train` runs, on real batches of plates. Run, which writes files, is replaced, and
so is DistributedDataParallel, which fake tensors do not have. torch's autograd engine asks the
driver about its streams: `backward` below calls the same nodes in the same order instead.
"""

import contextlib
import functools
import inspect
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  shapes of what collectives return
import torch.nn.functional as F
from runs import SCRIPTS, SIAMESE, TINY, each_script
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import data2vec
import mae
import msn
import pmsn
import simclr
import vicreg

pytestmark = [
    pytest.mark.usefixtures("few_plates"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # a deepcopy's
]

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
B = 8  # images in a process
VIEWS = {script: "siamese_views" for script in SIAMESE}
VIEWS |= {simclr: "simclr_views", vicreg: "vicreg_views"}
VIEWS |= {mae: "mae_inputs", data2vec: "data2vec_inputs"}
LOSSES = {script: f"{name}_loss" for name, script in SCRIPTS.items()} | {simclr: "nt_xent_loss"}
STEPS = {script: f"{name}_step" for name, script in SCRIPTS.items()}
COLOURING = "photometry", "jitter_colours"

COLOURS = "--jitter 0.4 0.4 0.4 0.1 --grey 0.3 --blur 0.5 --solarise 0.3 --threshold 0.5".split()
FOCAL = "--focal-views 2 --focal-size 16 --noise 0.1".split()
MORE = {script: [*COLOURS, *FOCAL] for script in SIAMESE}  # so that nothing is left out
MORE |= {simclr: COLOURS, mae: []}
MORE[vicreg] = "--jitter 0.4 0.4 0.4 0.1 --grey 0.3 --blur 1 0.5 --solarise 0 0.3".split()
MORE[data2vec] = "--jitter 0.4 0.4 0.4 0.1 --drop-path 0.5".split()


# ---- 1. A GPU that is not there


def statistics(number):
    """What a kernel of BatchNorm returns that takes (B, D, ...): so many float32 (D,)."""
    return lambda x, *_: tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(number))


# Kernels of torch's SyncBatchNorm, for which fake tensors have none.
LACKING = {
    torch.ops.aten.batch_norm_stats.default: statistics(2),
    torch.ops.aten.batch_norm_gather_stats_with_counts.default: statistics(2),
    torch.ops.aten.batch_norm_elemt.default: lambda x, *_: torch.empty_like(x),
    torch.ops.aten.batch_norm_backward_reduce.default: statistics(4),
    torch.ops.aten.batch_norm_backward_elemt.default: lambda x, *_: torch.empty_like(x),
}


class FakeGPU(FakeTensorMode):
    """Tensors on cuda are fake, those on the CPU real, numbers included. A mask on cuda, whose
    numbers are not known, counts as all True where it chooses entries."""

    CHOOSE = (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
        torch.ops.aten._unsafe_index_put.default,
        torch.ops.aten._index_put_impl_.default,
    )

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.waits = []  # shapes of what was copied to or from cuda while the program waited

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or CPU)
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if device.type == "cpu" and not fake:
            return func(*args, **kwargs)
        there = not fake and not kwargs.get("non_blocking")
        back = fake and kwargs.get("device") == CPU
        if (there or back) and args and torch.is_tensor(args[0]):
            self.waits.append(tuple(args[0].shape))
        if func in LACKING:
            assert {x.device for x in tensors(args)} == {CUDA}, f"{func}: not on one device"
            with self:
                return LACKING[func](*args)
        if func in self.CHOOSE:
            # x[index] = 1.0 copies the number, and an index on the CPU is copied too.
            self.waits += [tuple(x.shape) for x in tensors(args[1:]) if x.device == CPU]
            indices = [x for index in args[1] for x in self.numbers_of(index)]
            args = (args[0], indices, *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def numbers_of(self, index):
        """An index; instead of a mask the indices, one for each dimension, of what it chooses."""
        if index is None or index.dtype != torch.bool:
            return [index]
        if not isinstance(index, FakeTensor):
            return index.nonzero().unbind(1)
        with self:
            return [torch.empty(index.numel(), dtype=torch.long, device=CUDA)] * index.ndim


def backward(loss):
    """loss.backward(), in Python. Gradients must be on the device of what they are gradients of.

    Nodes run from the latest to the earliest, as in torch's engine, which also sums a gradient over
    dimensions that were broadcast, and casts it."""
    gradients = {loss.grad_fn: [torch.ones_like(loss)]}
    while gradients:
        node = max(gradients, key=lambda node: node._sequence_nr())
        arrived = gradients.pop(node)
        if hasattr(node, "variable"):  # a parameter
            weight = node.variable
            weight.grad = arrived[0] if weight.grad is None else weight.grad + arrived[0]
            continue
        results = node(*arrived) if callable(node) else node.apply(*arrived)
        results = results if isinstance(results, tuple) else (results,)
        for (before, place), gradient in zip(node.next_functions, results):
            if before is None or gradient is None:
                continue
            wanted = before._input_metadata[place]
            assert gradient.device == wanted.device, f"{node.name()}: {gradient.device}"
            gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
            sums = gradients.setdefault(before, [None] * len(before._input_metadata))
            sums[place] = gradient if sums[place] is None else sums[place] + gradient


@contextlib.contextmanager
def fake_gpu():
    """Within it, device cuda is fake, also for autocast and backward."""
    with (
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        FakeGPU() as gpu,
    ):
        yield gpu


# ---- 2. A script's training on a device


def rehearse(script, device, processes=1, options=(), begin=lambda: None):
    """train() for two updates -> what some functions returned, by name: a list, a value a call.

    begin() is called before the first of them, when all is built."""
    line = [*TINY[script], *MORE[script], "--batch-size", str(B * processes), "--steps", "2"]
    args = script.parse_args([*line, "--epochs", "1", "--warmup", "0", *options])
    returned = {}

    def note(name, value):
        kept = tree_map(lambda x: x.detach().clone() if torch.is_tensor(x) else x, value)
        returned.setdefault(name, []).append(kept)
        return value

    def spied(name):
        function = getattr(script, name)
        return lambda *args, **kwargs: note(name, function(*args, **kwargs))

    def alone(network, **options):
        network.register_forward_hook(lambda module, inputs, outputs: note("forward", outputs))
        return network

    class Rehearsal(script.Run):
        """Without files and an end. It logs, but no line."""

        FIRST_LINES = ()

        def __init__(self, name, parts, sampler, args):
            self.args = args
            self.out = Path(args.out)
            self.step = 0
            self.last = args.steps
            self.metrics = []
            self.bar = tqdm(disable=True)

        def steps(self, loader):
            begin()
            for step, batch in enumerate(loader):
                torch.manual_seed(step)
                yield step, batch

    names = [VIEWS[script], LOSSES[script], STEPS[script]]
    names += [name for name in COLOURING if hasattr(script, name)]
    patches = {name: spied(name) for name in names}
    patches |= dict(Run=Rehearsal, DistributedDataParallel=alone)
    patches |= dict(save_image=lambda picture, *rest, **options: note("drawn", picture))
    if script is mae:  # it waits for the GPU, when a line is logged
        patches |= dict(draw_reconstruction=lambda *tensors: note("drawn", tensors[:3]))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=processes)
    try:  # no other process exists: collectives return at once
        with mock.patch.multiple(script, **patches):
            script.train(args, device)
    finally:
        dist.destroy_process_group()
    return returned


@functools.cache
def on_fake_gpu(script, processes=1, bf16=False):
    """What rehearse returns, and the copies that an update waits for."""
    with fake_gpu() as gpu:
        flag = "--bf16" if bf16 else "--no-bf16"
        returned = rehearse(script, CUDA, processes, [flag], begin=gpu.waits.clear)
    return returned, gpu.waits


def tensors(value):
    return [x for x in tree_leaves(value) if torch.is_tensor(x)]


def described(value):
    """Shapes and dtypes, the same for fake tensors and real ones."""
    return [(tuple(x.shape), x.dtype) for x in tensors(value)]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
@each_script
def test_all_is_on_the_gpu_and_nothing_waits_for_it(script, processes, bf16):
    """Views, embeddings, losses and metrics, at every update; of two processes, the first."""
    returned, waits = on_fake_gpu(script, processes, bf16)
    assert waits == []
    assert len(returned[STEPS[script]]) == 2
    for name, values in returned.items():
        assert tensors(values) and all(x.device == CUDA for x in tensors(values)), name
    outputs = {x.dtype for x in tensors(returned["forward"])}
    assert torch.bfloat16 in outputs if bf16 else outputs == {torch.float32}

    # All else is float32: views, the scalars of the loss's function, metrics.
    pictures = tensors(returned[VIEWS[script]])
    losses = tensors(returned[LOSSES[script]])
    for step in returned[STEPS[script]]:
        metrics = step[0] if isinstance(step, tuple) else step
        assert metrics["loss"].shape == ()
        losses += metrics.values()
    for name in COLOURING:
        coloured = tensors(returned.get(name, []))
        assert {x.shape[1:] for x in coloured} <= {(3, 32, 32), (3, 16, 16)}
        pictures += coloured
    assert {x.dtype for x in pictures + losses} == {torch.float32}
    assert {x.shape for x in tensors(returned[LOSSES[script]])} == {()}


@each_script
def test_shapes_and_dtypes_are_the_cpus(script):
    """Of all that is returned. data2vec's mask counts as all True, so its predictions are more."""
    fake, _ = on_fake_gpu(script)
    real = rehearse(script, CPU, options=["--no-bf16"])
    assert fake.keys() == real.keys() and len(fake) >= 4
    for name in fake.keys() - ({"forward"} if script is data2vec else set()):
        assert described(fake[name]) == described(real[name]), name


def test_a_gpu_jitters_all_images_at_once_and_a_cpu_in_groups(monkeypatch):
    groups = []
    jitter = simclr.jitter_colours

    def spied(image, shifts, order):
        groups.append((image.device, len(image)))
        return jitter(image, shifts, order)

    monkeypatch.setattr(simclr, "jitter_colours", spied)
    for device in (CPU, CUDA):
        with fake_gpu():
            image = torch.zeros(200, 3, 32, 32, device=device)
            simclr.jitter_some(image, 2, [0.4, 0.4, 0.4, 0.1], probability=1.0)
    assert groups == [(CPU, 85), (CPU, 85), (CPU, 30), (CUDA, 200)]


def test_data2vec_multiplies_in_tensorfloat32_on_gpus_with_bf16_alone():
    assert torch.get_float32_matmul_precision() == "highest"
    rehearse(data2vec, CPU, options=["--bf16"])
    assert torch.get_float32_matmul_precision() == "highest"
    with fake_gpu():
        rehearse(data2vec, CUDA, options=["--bf16"])
        assert torch.get_float32_matmul_precision() == "high"
        rehearse(data2vec, CUDA, options=["--no-bf16"])  # a later run in the same process
        assert torch.get_float32_matmul_precision() == "highest"


# ---- 3. What the harness finds


def with_mistake(function, right, wrong):
    """A copy of a script's function in which one expression is another."""
    source = inspect.getsource(function)
    assert source.count(right) == 1
    names = {}
    exec(source.replace(right, wrong), names)
    return types.FunctionType(names[function.__name__].__code__, function.__globals__)


ON_GPU = ".to(device, non_blocking=True)"
MISTAKES = {
    "choice": (simclr, "change_some", "part = part.to(image.device, non_blocking=True)", "pass"),
    "numbers": (msn, "change_some", "x[part].to(image.device, non_blocking=True)", "x[part]"),
    "masks": (mae, "mae_inputs", f"noise{ON_GPU}", "noise"),
    "noise": (msn, "siamese_views", f"noise.flatten(0, 1){ON_GPU}", "noise.flatten(0, 1)"),
    "patches": (msn, "train", f"patches_to_keep(args){ON_GPU}", "patches_to_keep(args)"),
    "prior": (pmsn, "train", "prior_of(args).to(device)", "prior_of(args)"),
    "targets": (data2vec, "train", f"mask{ON_GPU}", "mask"),
    "network": (vicreg, "train", "vicreg.to(device, ", "vicreg.to(CPU, "),
    "waiting": (simclr, "simclr_views", f"crops{ON_GPU}", "crops.to(device)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, monkeypatch):
    """A tensor left on the CPU, or a copy that waits; on a CPU it does no harm."""
    script, name, right, wrong = MISTAKES[mistake]
    monkeypatch.setattr(script, "CPU", CPU, raising=False)
    monkeypatch.setattr(script, name, with_mistake(getattr(script, name), right, wrong))
    rehearse(script, CPU)
    with pytest.raises((RuntimeError, AssertionError), match="device|cpu|waits"):
        returned, waits = on_fake_gpu.__wrapped__(script)
        assert waits == [], "it waits"


def test_devices_of_gradients_are_looked_at():
    class Leaves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return torch.ones(gradient.shape)

    with fake_gpu():
        x = torch.ones(3, device=CUDA, requires_grad=True)
        (2 * x).exp().sum().backward()
        assert x.grad.device == CUDA and x.grad.shape == (3,)
        with pytest.raises(AssertionError, match="cpu"):
            Leaves.apply(2 * x).sum().backward()


def test_a_number_asked_of_the_gpu_is_found():
    with fake_gpu():
        x = torch.ones(3, device=CUDA)
        for ask in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.nonzero()):
            with pytest.raises(Exception, match="aten"):
                ask()


def test_a_copy_that_waits_is_found():
    with fake_gpu() as gpu:
        torch.ones(3).to(CUDA, non_blocking=True)
        assert gpu.waits == []
        torch.ones(3).to(CUDA)
        torch.tensor(1.0, device=CUDA)
        torch.ones(2, device=CUDA).new_tensor([1, 2])
        torch.ones(2, device=CUDA)[torch.ones(1, dtype=torch.long, device=CUDA)] = 1.0
        torch.ones(2, device=CUDA)[torch.ones(4, dtype=torch.long)]
        torch.ones(5, device=CUDA).cpu()
        assert gpu.waits == [(3,), (), (2,), (), (4,), (5,)]


def test_gradients_in_python_are_torchs():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, requires_grad=True)
    shift = torch.randn(3, requires_grad=True)
    results = []
    for run in (torch.Tensor.backward, backward):
        weight.grad = shift.grad = None
        x = simclr.all_reduce_mean((torch.ones(5, 4) @ weight + shift).tanh())
        run(F.cross_entropy(x * x.detach() + x, torch.arange(5) % 3))
        results.append((weight.grad, shift.grad))
    torch.testing.assert_close(*results)
