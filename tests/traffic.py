"""On paper: the bytes that a process hands to collectives in one update, and the time that takes.

python tests/traffic.py          both tables, as Markdown, at the papers' sizes

Bytes are formulas of the network and the batch, which test_traffic.py compares to the byte with
what four processes do. Seconds are estimates. They assume:
- Rings. Of n bytes a process sends 2 (W - 1) / W n for an all-reduce, (W - 1) n for an all-gather
  of n from each, (W - 1) / W n for a reduce-scatter or an all-to-all of n in all, n for a
  broadcast.
- 8 GPUs a machine. Up to 8 processes send by NVLink, 450 GB/s each; more have a network card each,
  25 GB/s (200 Gbit/s), and all that a process sends goes through it. That is the worst order of
  the ring: in the best one only one GPU in eight sends to another machine.
- No latency. Each collective that is not of gradients is waited for: tens of microseconds.
- 40 percent of 989 TFLOP/s, an H100's in bfloat16, and two thirds of them for backward.
- Run.agree's flags and lines of the log are as fast as the rest, though flags are on the CPU.
"""

import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data2vec  # noqa: E402
import mae  # noqa: E402
import msn  # noqa: E402
import pmsn  # noqa: E402
import simclr  # noqa: E402
import vicreg  # noqa: E402

METHODS = (simclr, vicreg, msn, pmsn, mae, data2vec)
WORLDS = 8, 256
FLOAT = 4  # bytes
INT64 = 8
NVLINK = 450e9  # bytes/s of one GPU
NETWORK_CARD = 25e9
FLOPS = 0.4 * 989e12  # per second
BUCKET = 25 * 2**20  # bytes: DDP reduces gradients in buckets of at most this

GATHER = "all_gather", "all_to_all"  # what gather(z) uses, forward and backward
BATCH_NORM = "all_gather", "all_reduce"  # what the scripts' BatchNorm uses
SYNC_BATCH_NORM = "all_gather", "all_reduce"  # what torch's uses, read in its source

# kind: what for; ring: "all_reduce", ...; size: bytes that one process hands over
Collective = namedtuple("Collective", "kind ring size")


# ---- 1. Bytes


def network_of(script, args):
    """The network that train() hands to DDP, without memory for its weights."""
    with torch.device("meta"):
        if script in (simclr, vicreg):
            encoder, dim = script.resnet(args.arch, args.image_size)
            if script is vicreg:
                return vicreg.VICReg(encoder, dim, args.hidden, args.output)
            return simclr.SimCLR(encoder, dim, args.hidden, args.output, args.layers)
        sizes = args.image_size, args.patch_size, args.dim, args.depth, args.heads
        if script is mae:
            decoder = args.decoder_dim, args.decoder_depth, args.decoder_heads
            return mae.MAE(*sizes, *decoder, args.norm_pix_loss)
        if script is data2vec:
            return data2vec.Data2Vec(data2vec.BeiT(*sizes, args.layer_scale), args.dim)
        encoder = script.VisionTransformer(*sizes, args.stem)
        return script.MSN(encoder, args.dim, args.hidden, args.output, args.num_prototypes)


def collectives(script, args, network, processes, gpu):
    """Those of one update, without lines of the log and checkpoints; args.batch_size images."""
    own = own_collectives(script, args, args.batch_size // processes, processes)
    of_all = [gradients(network), *buffers(network), flags()]
    return of_all + batch_norm(script, args, network, gpu) + own


def gradients(network):
    """DDP's mean of float32 gradients, in buckets, each as soon as backward has filled it."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Collective("gradients", "all_reduce", FLOAT * trained)


def buffers(network):
    """Before a forward pass DDP sends process 0's buffers to all: BatchNorm's running statistics,
    which are the same anyway, and data2vec's table of positions. One collective for each dtype."""
    sizes = {}
    for buffer in network.buffers():
        sizes[buffer.dtype] = sizes.get(buffer.dtype, 0) + buffer.numel() * buffer.itemsize
    return [Collective("buffers", "broadcast", size) for size in sizes.values()]


def flags():
    """Run.agree: whether to stop and whether to save."""
    return Collective("flags", "all_reduce", 2 * INT64)


def batch_norm(script, args, network, gpu):
    """Of each layer and pass: mean and variance of D channels, and in backward their gradients. On
    GPUs SyncBatchNorm adds the number of images, forward."""
    passes = {simclr: 1, vicreg: 2}.get(script, 1 + (getattr(args, "focal_views", 0) > 0))
    of_target = 1 if script in (msn, pmsn) else 0  # without backward
    layers = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    forward, backward = SYNC_BATCH_NORM if gpu else BATCH_NORM
    found = []
    for numbers in (2 * layer.num_features for layer in layers):
        statistics = Collective("batch_norm", forward, (numbers + gpu) * FLOAT)
        found += [statistics] * (passes + of_target)
        found += [Collective("batch_norm", backward, numbers * FLOAT)] * passes
    return found


def gather(numbers, processes, passes=2):
    """gather(z) of so many numbers in a process: forward, and backward if there are two passes. An
    all-gather takes the process's own part, all others as much as all have."""
    own = numbers * FLOAT
    sizes = {ring: own if ring == "all_gather" else processes * own for ring in GATHER}
    return [Collective("gather", ring, sizes[ring]) for ring in GATHER[:passes]]


def own_collectives(script, args, B, processes):
    """Those of the method, with B images in a process."""

    def mean(numbers, passes=1):
        return [Collective("means", "all_reduce", numbers * FLOAT)] * passes

    if script is simclr:  # the last: embedding_std
        return gather(2 * B * args.output, processes) + mean(args.output)
    if script is vicreg:  # mean, variance, and the smaller of two products' squares
        D = args.output
        squares = mean(D * D, 2)
        if D >= args.batch_size:
            squares = gather(B * D, processes, passes=1) + mean(1, 2)
        return 2 * (mean(D, 2) + mean(D, 2) + squares)
    if script in (msn, pmsn):  # the mean prediction; Sinkhorn's three rounds, without backward
        K = args.num_prototypes
        return mean(K, 2) + mean(K, 3 if args.sinkhorn else 0)
    return mean(1) if script is data2vec else []  # how many patches are masked


def sent(collective, processes):
    """Bytes that a process sends for it."""
    W = processes
    factors = dict(
        all_reduce=2 * (W - 1) / W,
        all_gather=W - 1,
        reduce_scatter=(W - 1) / W,
        all_to_all=(W - 1) / W,
        broadcast=1,
    )
    return factors[collective.ring] * collective.size


# ---- 2. Seconds


def flops(script, args, network, processes):
    """Floating-point operations of one process in one update: forward and backward."""
    B = args.batch_size // processes

    def alone(z):  # as long as the real one's, whose other parts come from other processes
        return z.repeat(processes, *[1] * (z.ndim - 1))

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        outputs = forward(script, args, network, B)
        loss = outputs if script in (simclr, vicreg) else outputs.sum()  # what is left is small
        with (
            mock.patch.object(script, "world_size", lambda: processes),
            mock.patch.object(script, "gather", alone, create=True),
        ):
            if script is simclr:
                loss = simclr.nt_xent_loss(*outputs.chunk(2), args.temperature)
            elif script is vicreg:
                loss = vicreg.vicreg_loss(*outputs)[0]
        loss.backward()
    return counter.get_total_flops()


def forward(script, args, network, B):
    """Both networks of B images -> what the loss is computed from."""

    def views(V, size=args.image_size):
        return torch.rand(V * B, 3, size, size)

    if script is simclr:
        return network(views(2))
    if script is vicreg:
        return network(views(1), views(1))
    if script is mae:
        return network(views(1), args.mask_ratio)[0]
    if script is data2vec:
        with torch.no_grad():
            network.encoder(views(1))
        mask = torch.ones(B, network.encoder.grid**2, dtype=torch.bool)
        x = network.encoder(views(1), mask, network.mask_token)[-1]
        return network.lm_head(network.encoder.norm(x)[:, : args.num_masked])
    with torch.no_grad():
        network([views(1)])
    anchors = [views(args.rand_views)]
    if args.focal_views:
        anchors.append(views(args.focal_views, args.focal_size))
    kept = int((args.image_size // args.patch_size) ** 2 * (1 - args.patch_drop))
    z, prototypes = network(anchors, torch.arange(kept))
    return script.log_assignment(z, prototypes, args.temperature)


def not_hidden(sending, computing, gradient_bytes):
    """Seconds of sending during which a GPU waits. sending {kind: seconds}, computing: seconds.

    Gradients are sent during backward, but for what takes longer than it, and the last bucket."""
    last = sending["gradients"] * min(1, BUCKET / gradient_bytes)
    late = max(last, sending["gradients"] - 2 / 3 * computing)
    return late + sum(sending.values()) - sending["gradients"]


# ---- 3. Tables


def rows():
    """A dict for each method and number of processes, at the paper's sizes and of one process.

    kinds {kind: bytes} handed to collectives; sent: bytes; waits: collectives that are not of
    gradients; flops; computing, sending and not_hidden: seconds."""
    return [row(script, processes) for script in METHODS for processes in WORLDS]


def row(script, processes):
    args = script.parse_args(["--recipe", "paper"])
    network = network_of(script, args)
    found = collectives(script, args, network, processes, gpu=True)
    bandwidth = NVLINK if processes <= 8 else NETWORK_CARD
    kinds = dict(gradients=0, gather=0, batch_norm=0, other=0)
    sending = dict.fromkeys(kinds, 0.0)
    for collective in found:
        kind = collective.kind if collective.kind in kinds else "other"
        kinds[kind] += collective.size
        sending[kind] += sent(collective, processes) / bandwidth
    operations = flops(script, args, network, processes)
    computing = operations / FLOPS
    return dict(
        method=script.__name__,
        processes=processes,
        images=args.batch_size // processes,
        kinds=kinds,
        sent=sum(sent(collective, processes) for collective in found),
        waits=sum(collective.kind != "gradients" for collective in found),
        flops=operations,
        computing=computing,
        sending=sum(sending.values()),
        not_hidden=not_hidden(sending, computing, kinds["gradients"]),
    )


def table():
    """Both tables and what they assume, as Markdown."""
    bytes_ = [
        "| method | processes | images a process | gradients MB | gather MB | BatchNorm MB "
        "| other kB | sent by a process MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    seconds = [
        "| method | processes | TFLOP a process | computing ms | sending ms | not hidden ms "
        "| waits | bound by |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows():
        name = f"| {r['method']} | {r['processes']} "
        *most, other = r["kinds"].values()
        megabytes = " | ".join(f"{x / 1e6:,.2f}" for x in most)
        ends = f"{other / 1e3:,.3f} | {r['sent'] / 1e6:,.1f}"
        bytes_.append(f"{name}| {r['images']} | {megabytes} | {ends} |")
        times = (1e3 * r[key] for key in ("computing", "sending", "not_hidden"))
        milliseconds = " | ".join(f"{x:,.2f}" for x in times)
        bound = "computing" if r["computing"] > r["not_hidden"] else "sending"
        seconds.append(
            f"{name}| {r['flops'] / 1e12:,.1f} | {milliseconds} | {r['waits']} | {bound} |"
        )
    return "\n".join([*bytes_, "", BYTES, "", *seconds, "", SECONDS])


BYTES = """\
A process hands this to collectives in one update at the paper's sizes (1 MB is 1e6 bytes). "Other":
buffers that DDP sends before a forward pass, means over the batch, whether to stop or save. "Sent"
counts rings: of n bytes 2 (W - 1) / W n for an all-reduce among W processes, (W - 1) n for an
all-gather of n from each, (W - 1) / W n for a reduce-scatter or an all-to-all, and n for a
broadcast from one process to all."""

SECONDS = """\
Estimates, not measured: 40 percent of 989 TFLOP/s (an H100, bfloat16); 8 processes send by NVLink,
450 GB/s, and 256 by a network card of 25 GB/s each, through which all passes that a process sends.
That is the worst order of the ring; in the best one an eighth does. DDP sends gradients in buckets
of 25 MiB during backward, two thirds of computing, so that only the last bucket and what backward
is too short for are "not hidden", besides all other kinds. "Waits" are collectives other than those
of gradients; each adds its latency, tens of microseconds, which no milliseconds here include."""


if __name__ == "__main__":
    print(table())
