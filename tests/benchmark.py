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
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mae  # noqa: E402


def mask(rounds, batch_size=16, image_size=224, **sizes):
    """Seconds of a step of ViT-B/16 (or of `sizes`) that encodes a quarter of the patches, and of
    one that encodes all but one (of all of them no loss is left) -> the two medians."""
    model = mae.MAE(image_size, norm_pix_loss=True, **sizes)
    optimizer, patches = mae.optimizer_of(model, 0.05), model.pos_embed.shape[1] - 1
    images = torch.randn(batch_size, 3, image_size, image_size)
    seconds = {0.75: [], 1 / patches: []}
    for _ in range(1 + rounds):
        for ratio, list_ in seconds.items():
            noise = torch.rand(batch_size, patches)
            began = time.perf_counter()
            mae.mae_step(model, optimizer, images, noise, 1e-4, ratio)
            list_.append(time.perf_counter() - began)
    return [statistics.median(list_[1:]) for list_ in seconds.values()]


def bf16(name, rounds, *options):
    """Images/s of a script's recipe for plates with and without --bf16: of each the median over
    `rounds` runs of twenty steps, the last ten of which count."""
    script, speeds = importlib.import_module(name), {"--bf16": [], "--no-bf16": []}
    plates = script.draw_plates(2, seed=0)
    for _ in range(rounds):
        for flag, list_ in speeds.items():
            with (
                tempfile.TemporaryDirectory() as out,
                mock.patch.object(script, "draw_plates", lambda per_class, seed: plates),
                contextlib.redirect_stdout(None),
            ):
                command = f"{flag} --epochs 20 --steps 20 --log-every 10 --out {out}".split()
                script.main([*command, *options])
                line = (Path(out) / "log.jsonl").read_text().splitlines()[-1]
            list_.append(json.loads(line)["images_per_second"])
    return [statistics.median(list_) for list_ in speeds.values()]


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
