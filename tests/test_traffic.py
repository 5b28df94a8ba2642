"""tests/traffic.py: its formulas are what four processes hand to collectives, to the byte."""

import contextlib
import functools
import io
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import traffic
from runs import SCRIPTS, command_line, fork_group, two_of_each_class
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import msn
import pmsn
import vicreg

PROCESSES = 4
CASES = {name: (script, []) for name, script in SCRIPTS.items()}
CASES["msn"] = msn, "--focal-views 2 --focal-size 16 --sinkhorn".split()
CASES["pmsn"] = pmsn, ["--no-sinkhorn"]
CASES["vicreg, wide"] = vicreg, ["--output", "64"]  # more than images in a batch
STEPS = 4
THIRD = 2  # DDP arranges its buckets in the first two updates; the last one writes files
# What a process hands over: the argument that has it.
RINGS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
}


class Recorder(TorchDispatchMode):
    """Bytes that are handed to collectives, by kind and ring, of each update.

    All pass the dispatcher, those of DDP too. In backward the node that runs tells the kind: of a
    parameter it is gradients; of another, what its number, which grows in forward, belongs to."""

    def __init__(self):
        super().__init__()
        self.updates = [Counter()]
        self.kinds = []  # of the functions that are running
        self.nodes = []  # (first, end, kind) of those that ran

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            ring, place = RINGS[func.name().split("::")[1]]  # another is not expected
            size = sum(x.numel() * x.itemsize for x in tree_leaves(args[place]))
            self.updates[-1][self.kind(ring), ring] += size
        return func(*args, **(kwargs or {}))

    def kind(self, ring):
        node = torch._C._current_autograd_node()
        if node is None:
            return "buffers" if ring == "broadcast" else [*self.kinds, "means"][0]
        if hasattr(node, "variable"):
            return "gradients"
        number = node._sequence_nr()
        found = [kind for first, end, kind in self.nodes if first <= number < end]
        return found[0] if found else "means"

    def named(self, kind, function):
        """The function, whose collectives are of this kind."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            first = torch._C._autograd._get_sequence_nr()
            self.kinds.append(kind)
            try:
                return function(*args, **kwargs)
            finally:
                self.kinds.pop()
                self.nodes.append((first, torch._C._autograd._get_sequence_nr(), kind))

        return call

    def watch(self, script, patch):
        """Name the kinds of a script's functions, and count each update for itself."""
        log = script.Run.log
        patch.setattr(script.Run, "agree", self.named("flags", script.Run.agree))
        if hasattr(script, "gather"):
            patch.setattr(script, "gather", self.named("gather", script.gather))
        if hasattr(script, "BatchNorm"):
            forward = self.named("batch_norm", script.BatchNorm.forward)
            patch.setattr(script.BatchNorm, "forward", forward)

        def count(*args):
            log(*args)
            self.updates.append(Counter())

        patch.setattr(script.Run, "log", count)


def options_of(case, out):
    script, options = CASES[case]
    return command_line(script, out, *options, "--steps", STEPS)


def work_of_four(rank, folder):
    """Train in each case, and keep what the third update handed to collectives."""
    torch.set_num_threads(1)
    for case, (script, _) in CASES.items():
        store = dist.FileStore(f"{folder}/{case} store", PROCESSES)
        joined = functools.partial(
            dist.init_process_group, store=store, rank=rank, world_size=PROCESSES
        )
        recorder = Recorder()
        with (
            two_of_each_class(),
            mock.patch.dict("os.environ", RANK=str(rank)),
            mock.patch.object(dist, "init_process_group", joined),
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            recorder,
        ):
            recorder.watch(script, patch)
            script.main(options_of(case, f"{folder}/{case}"))
        torch.save(dict(recorder.updates[THIRD]), f"{folder}/{case} {rank}")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    fork_group(work_of_four, folder, PROCESSES)
    return folder


def on_paper(case):
    script, _ = CASES[case]
    args = script.parse_args(options_of(case, "out"))
    network = traffic.network_of(script, args)
    bytes_ = Counter()
    for collective in traffic.collectives(script, args, network, PROCESSES, gpu=False):
        bytes_[collective.kind, collective.ring] += collective.size
    return dict(bytes_)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_formulas(case, four_processes):
    for rank in range(PROCESSES):
        assert torch.load(four_processes / f"{case} {rank}") == on_paper(case)


def test_all_kinds_occur():
    kinds = {kind for case in CASES for kind, _ in on_paper(case)}
    assert kinds == {"gradients", "gather", "batch_norm", "buffers", "means", "flags"}


def test_rings():
    """Four processes pass n bytes on: each sends the quarter that it has, three times or six."""
    sizes = dict(all_reduce=6, all_gather=12, reduce_scatter=3, broadcast=4, all_to_all=3)
    for ring, expected in sizes.items():
        assert traffic.sent(traffic.Collective("any", ring, 4), processes=4) == expected


@pytest.fixture(scope="module")
def rows():
    return {(row["method"], row["processes"]): row for row in traffic.rows()}


def test_flops_are_those_of_the_networks(rows):
    """ResNet-50 takes 4.1 G multiplications for an image of 224 pixels, ViT-B/16 17.5 G; training
    takes three times as many, and each counts with its addition."""
    per_image = {name: row["flops"] / row["images"] for (name, _), row in rows.items()}
    assert per_image["simclr"] == pytest.approx(2 * 3 * 2 * 4.1e9, rel=0.03)  # two views
    assert 1.02 < per_image["vicreg"] / per_image["simclr"] < 1.1  # the expander is larger
    assert per_image["data2vec"] == pytest.approx((1 + 3) * 2 * 17.5e9, rel=0.03)  # and the target
    assert per_image["msn"] == per_image["pmsn"]


def test_the_papers_sizes(rows):
    """Gradients do not depend on the number of processes; who gathers, and who has BatchNorm."""
    assert len(rows) == 2 * len(SCRIPTS)
    for (name, processes), row in rows.items():
        assert row["images"] * processes in (1024, 2048, 4096)
        assert row["kinds"]["gradients"] == rows[name, 8]["kinds"]["gradients"]
        assert 0 < row["not_hidden"] <= row["sending"]
        assert (row["kinds"]["batch_norm"] > 0) == (name not in ("mae", "data2vec"))
        assert (row["kinds"]["gather"] > 0) == (name in ("simclr", "vicreg"))
    assert rows["mae", 8]["kinds"]["gradients"] == 4 * 111_655_680  # the official model's


def test_the_table_has_a_line_for_each_row(rows, monkeypatch):
    monkeypatch.setattr(traffic, "rows", lambda: list(rows.values()))
    lines = traffic.table().splitlines()
    for script in SCRIPTS.values():
        for processes in traffic.WORLDS:
            assert sum(x.startswith(f"| {script.__name__} | {processes} |") for x in lines) == 2
    for line in lines:
        assert line.count("|") in (0, 9) and len(line) <= 120


def test_a_collective_more_is_noticed():
    """The recorder counts what a formula would miss."""
    recorder = Recorder()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with recorder:
            dist.all_reduce(torch.zeros(3))
            recorder.named("gather", dist.broadcast)(torch.zeros(5, dtype=torch.int64), 0)
    finally:
        dist.destroy_process_group()
    assert recorder.updates == [{("means", "all_reduce"): 12, ("buffers", "broadcast"): 40}]
