"""--bf16: the same training but for rounding, weights stay float32; off on CPUs by default."""

import json

import benchmark
import pytest
import torch
from test_readme import SCRIPTS, SHORT

TOY = dict(image_size=32, patch_size=8, dim=32, depth=1, heads=2)
TOY |= dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_losses_agree_to_the_precision_of_bf16(name, tmp_path, monkeypatch):
    script = SCRIPTS[name]
    images, labels = script.draw_plates(1, seed=0)
    monkeypatch.setattr(script, "draw_plates", lambda per_class, seed: (images, labels))
    losses, weights, kinds = [], [], set()
    linear = torch.nn.functional.linear

    def spied(x, *rest):
        y = linear(x, *rest)
        kinds.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    for flag in ("--no-bf16", "--bf16"):
        out = tmp_path / flag[2:]
        options = [flag, "--out", str(out), "--steps", "3", "--log-every", "1"]
        script.main([*options, *SHORT[script], "--batch-size", "64", "--warmup", "0"])
        lines = (out / "log.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        assert state["options"]["bf16"] == (flag == "--bf16")
        weights.append(state["encoder"])
        assert (torch.bfloat16 in kinds) == (flag == "--bf16")
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
    assert not torch.equal(*losses)
    assert all(x.dtype != torch.bfloat16 for x in weights[1].values())


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_default_is_on_with_a_gpu_alone(name, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert SCRIPTS[name].parse_args([]).bf16 == gpu


def test_benchmarks_measure():
    some, all_ = benchmark.mask(5, 32, **TOY | dict(image_size=64, patch_size=4, depth=4))
    assert some < 0.7 * all_  # 65 of 257 tokens are encoded
    options = [*SHORT[SCRIPTS["mae.py"]], "--batch-size", "64"]
    assert all(speed > 0 for speed in benchmark.bf16("mae", 1, *options))
