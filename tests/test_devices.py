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
import inspect
import types
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

import data2vec
import mae
import msn
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


def same_shape(x, *_):
    return torch.empty_like(x)


# Kernels of torch's SyncBatchNorm, for which fake tensors have none.
LACKING = {
    torch.ops.aten.batch_norm_stats.default: statistics(2),
    torch.ops.aten.batch_norm_gather_stats_with_counts.default: statistics(2),
    torch.ops.aten.batch_norm_elemt.default: same_shape,
    torch.ops.aten.batch_norm_backward_reduce.default: statistics(4),
    torch.ops.aten.batch_norm_backward_elemt.default: same_shape,
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
        self.waits = []  # shapes of what was copied to cuda while the program waited

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or CPU)
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if device.type == "cpu" and not fake:
            return func(*args, **kwargs)
        if not fake and args and not kwargs.get("non_blocking") and torch.is_tensor(args[0]):
            self.waits.append(tuple(args[0].shape))
        if func in LACKING:
            assert {x.device for x in tensors(args)} == {CUDA}, f"{func}: not on one device"
            with self:
                return LACKING[func](*args)
        if func in self.CHOOSE:
            indices = [x for index in args[1] for x in self.numbers_of(index)]
            args = (args[0], indices, *args[2:])
            if any(x.device == CPU for x in tensors(args[2:])):  # x[index] = 1.0
                self.waits.append(())
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


@contextlib.contextmanager
def world_of(processes):
    """Process 0 of so many, none of which exists: collectives return at once."""
    if processes == 1:
        yield
        return
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- 2. A script's training on a device


class Rehearsal:
    """Run without files, checkpoint and end: two updates."""

    step = 0
    saving = False
    means = {}

    def __init__(self, script, args, device):
        self.out = args.out
        self.last = args.steps

    def check_data(self, images, classes):
        pass

    def restore(self, sampler, **parts):
        pass

    def steps(self, loader):
        for batch in loader:
            torch.manual_seed(self.step)
            yield self.step, batch
            self.step += 1

    def log(self, metrics, rates):
        pass


def rehearse(script, device, processes=1, options=()):
    """train() for two updates -> what some functions returned, by name: a list, a value a call."""
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

    names = [VIEWS[script], LOSSES[script], STEPS[script]]
    names += [name for name in COLOURING if hasattr(script, name)]
    patches = {name: spied(name) for name in names}
    patches |= dict(Run=Rehearsal, DistributedDataParallel=alone)
    patches |= dict(all_or_none=contextlib.nullcontext)
    patches |= dict(draw_views=lambda groups, out, normalised: note("drawn", groups))
    with mock.patch.multiple(script, **patches):
        script.train(args, device)
    return returned


def on_fake_gpu(script, processes=1, options=()):
    with world_of(processes), fake_gpu():
        return rehearse(script, CUDA, processes, options)


def tensors(value):
    return [x for x in tree_leaves(value) if torch.is_tensor(x)]


def described(value):
    """Shapes and dtypes, the same for fake tensors and real ones."""
    return [(tuple(x.shape), x.dtype) for x in tensors(value)]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
@each_script
def test_all_is_on_the_gpu(script, processes, bf16):
    """Views, embeddings, losses and metrics, after every update; of two processes, the first."""
    flag = "--bf16" if bf16 else "--no-bf16"
    returned = on_fake_gpu(script, processes, [flag])
    assert len(returned[STEPS[script]]) == 2
    for name, values in returned.items():
        assert all(x.device == CUDA for x in tensors(values)), name
    for name in (VIEWS[script], LOSSES[script], STEPS[script], "drawn"):
        floats = [x for x in tensors(returned[name]) if x.is_floating_point()]
        assert floats and all(x.dtype in (torch.float32, torch.bfloat16) for x in floats), name
    assert_losses_are_float32(script, returned)
    outputs = {x.dtype for x in tensors(returned["forward"])}
    assert torch.bfloat16 in outputs if bf16 else outputs == {torch.float32}


def assert_losses_are_float32(script, returned):
    """Scalars of the loss's function, and all metrics; views too."""
    for x in tensors(returned[LOSSES[script]]):
        assert x.dtype == torch.float32 and x.shape == ()
    for step in returned[STEPS[script]]:
        metrics = step[0] if isinstance(step, tuple) else step
        assert metrics["loss"].shape == ()
        assert all(x.dtype == torch.float32 for x in metrics.values())
    assert all(x.dtype == torch.float32 for x in tensors(returned[VIEWS[script]]))
    for name in COLOURING:
        for x in tensors(returned.get(name, [])):
            assert x.dtype == torch.float32 and x.shape[1:] in [(3, 32, 32), (3, 16, 16)]


@each_script
def test_shapes_and_dtypes_are_the_cpus(script):
    """Of all that is returned. data2vec's mask counts as all True, so its predictions are more."""
    fake = on_fake_gpu(script, options=["--no-bf16"])
    real = rehearse(script, CPU, options=["--no-bf16"])
    assert fake.keys() == real.keys() and len(fake) >= 4
    for name in fake.keys() - ({"forward"} if script is data2vec else set()):
        assert described(fake[name]) == described(real[name]), name


@each_script
def test_no_update_waits_for_the_gpu(script):
    with fake_gpu() as gpu:
        begin = mock.patch.object(Rehearsal, "restore", lambda *_, **parts: gpu.waits.clear())
        with begin:
            rehearse(script, CUDA)
    assert gpu.waits == []


def test_data2vec_multiplies_in_tensorfloat32_on_gpus_with_bf16_alone():
    assert torch.get_float32_matmul_precision() == "highest"
    rehearse(data2vec, CPU, options=["--bf16"])
    assert torch.get_float32_matmul_precision() == "highest"
    on_fake_gpu(data2vec, options=["--bf16"])
    assert torch.get_float32_matmul_precision() == "high"
    on_fake_gpu(data2vec, options=["--no-bf16"])  # a later run in the same process
    assert torch.get_float32_matmul_precision() == "highest"


# ---- 3. What the harness finds


def with_mistake(function, right, wrong):
    """A copy of a script's function in which one expression is another."""
    source = inspect.getsource(function)
    assert source.count(right) == 1
    names = {}
    exec(source.replace(right, wrong), names)
    return types.FunctionType(names[function.__name__].__code__, function.__globals__)


MISTAKES = {
    "colours": (simclr, "change_some", "chosen.to(image.device, non_blocking=True)", "chosen"),
    "masks": (mae, "mae_inputs", "noise.to(device, non_blocking=True)", "noise"),
    "noise": (msn, "siamese_views", ".to(device, non_blocking=True)\n    return", "\n    return"),
    "targets": (data2vec, "train", "mask.to(device, non_blocking=True)", "mask"),
    "network": (vicreg, "train", "vicreg.to(device, ", "vicreg.to(CPU, "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tensor_left_on_the_cpu_is_found(mistake, monkeypatch):
    script, name, right, wrong = MISTAKES[mistake]
    on_fake_gpu(script)
    monkeypatch.setattr(script, "CPU", CPU, raising=False)
    monkeypatch.setattr(script, name, with_mistake(getattr(script, name), right, wrong))
    rehearse(script, CPU)  # where it does no harm
    with pytest.raises((RuntimeError, AssertionError), match="device|cpu"):
        on_fake_gpu(script)


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
        assert gpu.waits == [(3,), (), (2,), ()]


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
