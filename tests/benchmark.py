"""Ratios of speed: interleaved in one run, medians.

python tests/benchmark.py mask            mae.py: a step at mask ratio 0.75 over one at ratio 0
python tests/benchmark.py bf16 SCRIPT     images/s on plates with --bf16 over those without
"""

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mae  # noqa: E402
import sampler  # noqa: E402


def mask(rounds, batch_size=16, image_size=224, clock=time.perf_counter, **sizes):
    """Seconds of a step of ViT-B/16 (or of `sizes`) that encodes a quarter of the patches, and of
    one that encodes all but one (of all of them no loss is left) -> the two medians."""
    model = mae.MAE(image_size, norm_pix_loss=True, **sizes)
    optimizer = torch.optim.AdamW(
        mae.parameter_groups(model), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
    )
    images = torch.randn(batch_size, 3, image_size, image_size)
    patches = model.pos_embed.shape[1] - 1
    seconds = {0.75: [], 1 / patches: []}
    for _ in range(1 + rounds):  # the first one warms up
        for ratio, measured in seconds.items():
            args = types.SimpleNamespace(mask_ratio=ratio, bf16=False)
            noise = torch.rand(batch_size, patches)
            began = clock()
            mae.mae_step(model, optimizer, images, noise, 1e-4, args)
            measured.append(clock() - began)
    some, all_ = (statistics.median(measured[1:]) for measured in seconds.values())
    return some, all_


def bf16(name, rounds, *options):
    """Images/s of a script's recipe for plates with and without --bf16: of each the median over
    `rounds` runs of twenty steps, the last ten of which count."""
    script = importlib.import_module(name)
    plates = sampler.draw_plates(2, seed=0)
    speeds = {"--bf16": [], "--no-bf16": []}
    for _ in range(rounds):
        for flag, measured in speeds.items():
            with (
                tempfile.TemporaryDirectory() as out,
                mock.patch.object(sampler, "draw_plates", lambda per_class, seed: plates),
                contextlib.redirect_stdout(None),
            ):
                length = ["--epochs", "20", "--steps", "20", "--log-every", "10"]
                script.main([flag, *length, "--out", out, *options])
                line = (Path(out) / "log.jsonl").read_text().splitlines()[-1]
            measured.append(json.loads(line)["images_per_second"])
    return [statistics.median(measured) for measured in speeds.values()]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=["mask", "bf16"])
    p.add_argument("script", nargs="?", default="data2vec")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args(argv)
    if args.what == "mask":
        some, all_ = mask(args.rounds)
        print(f"ratio 0.75: {some:.3f} s, ratio 0: {all_:.3f} s, quotient {some / all_:.3f}")
    else:
        with_, without = bf16(args.script, args.rounds)
        print(f"{args.script}: {with_:.0f} with --bf16, {without:.0f}: {with_ / without:.2f} times")


if __name__ == "__main__":
    main()
