"""tests/benchmark.py: both ratios are measured."""

import time

import benchmark


def test_a_step_that_encodes_fewer_patches_is_faster():
    sizes = dict(image_size=64, patch_size=4, dim=64, depth=3, heads=2)
    decoder = dict(decoder_dim=16, decoder_depth=1, decoder_heads=1)
    some, all_ = benchmark.mask(5, 8, clock=time.process_time, **sizes, **decoder)
    assert 0 < some < 0.7 * all_  # 65 of 257 tokens are encoded


def test_bf16_is_measured_on_short_runs():
    sizes = ["--dim", "16", "--depth", "1", "--heads", "2", "--batch-size", "16"]
    decoder = ["--decoder-dim", "8", "--decoder-depth", "1", "--decoder-heads", "1"]
    assert all(speed > 0 for speed in benchmark.bf16("mae", 1, *sizes, *decoder))
