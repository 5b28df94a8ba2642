"""--bf16: the same training but for rounding, weights stay float32; off on CPUs by default."""

import pytest
import torch
from runs import SIAMESE, each_script, run


@each_script
def test_losses_agree_to_the_precision_of_bf16(script, few_plates, tmp_path, monkeypatch):
    losses = []
    kinds = set()
    linear = torch.nn.functional.linear

    def spied(x, *rest):
        y = linear(x, *rest)
        kinds.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    for flag in ("--no-bf16", "--bf16"):
        options = flag, "--steps", 3, "--log-every", 1, "--batch-size", 64
        if script in SIAMESE:
            # Beside the large positions of plates the first differences of images are small, and
            # bfloat16 rounds them coarsely.
            options += "--position-std", 0.02, "--clip", 3, "--start-lr", 1e-4, "--lr", 1e-4
            options += ("--stem", *script.RECIPES["plates"]["stem"])
        state, log = run(script, tmp_path / flag[2:], *options)
        losses.append(torch.tensor([line["loss"] for line in log]).mean())
        assert state["options"]["bf16"] == (flag == "--bf16")
        assert (torch.bfloat16 in kinds) == (flag == "--bf16")
    # The mean over steps: rounding moves a single loss of few images by some percent, either way.
    torch.testing.assert_close(*losses, rtol=0.015, atol=0)
    assert not torch.equal(*losses)
    assert all(x.dtype != torch.bfloat16 for x in state["encoder"].values())


@pytest.mark.parametrize("gpu", [False, True])
@each_script
def test_the_default_is_on_with_a_gpu_alone(script, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert script.parse_args([]).bf16 == gpu
