"""tests/mixed.py: images in other company; tests/distances.py: how far they are apart."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import distances
import mixed
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import TINY

import msn
import sampler
import simclr
import vicreg

LABELS = np.repeat(np.arange(40), 25)  # 1,000 images; an epoch has 31 batches of 32


def batches(kind, epochs, **options):
    """Of the epochs, one after another."""
    found = []
    one = kind(LABELS, 32, 4, seed=3, **options)
    for epoch in epochs:
        one.set_epoch(epoch)
        found += list(one)
    return np.array(found)


def test_each_block_of_16_batches_has_the_images_it_had():
    """Also across the ends of epochs, of 31 batches; and hardly a batch has those it had."""
    plain = batches(sampler.KClassBatchSampler, range(4))[:112]
    found = batches(mixed.MixedBatchSampler, range(4))[:112]
    for block in range(0, 112, 16):
        those = slice(block, block + 16)
        assert sorted(plain[those].flat) == sorted(found[those].flat)
        assert len(np.unique(LABELS[found[those]], axis=0)) == 16
    assert all(len(set(LABELS[batch])) == 4 for batch in plain)
    assert np.mean([len(set(LABELS[batch])) for batch in found]) > 20


def test_mixed_batches_begin_anywhere_and_are_shared_among_processes():
    whole = batches(mixed.MixedBatchSampler, range(3))
    np.testing.assert_array_equal(batches(mixed.MixedBatchSampler, [1]), whole[31:62])
    np.testing.assert_array_equal(batches(mixed.MixedBatchSampler, [2, 0])[31:], whole[:31])
    shares = [
        batches(mixed.MixedBatchSampler, range(3), rank=rank, world_size=2) for rank in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    other = mixed.MixedBatchSampler(LABELS, 32, 4, seed=4)
    assert list(itertools.chain(other)) != whole[:31].tolist()


def test_a_run_in_mixed_batches(tmp_path, few_plates, capsys, monkeypatch):
    """It is the script's own, with other batches; stopped, it continues."""
    script = Path(mixed.__file__)
    options = ["--k-classes", "4", "--batch-size", "16", "--steps"]
    command = [sys.executable, script, "simclr.py", "--help"]
    assert "simclr" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain = [*TINY[simclr], *options, "4", "--out", str(tmp_path / "plain")]
    simclr.main(plain)
    monkeypatch.setattr(simclr, "KClassBatchSampler", simclr.KClassBatchSampler)  # set back after
    for out, stop in (("once", "4"), ("twice", "2"), ("twice", "4")):
        mixed.main(["simclr.py", *TINY[simclr], *options, stop, "--out", str(tmp_path / out)])
    assert "16 batches shuffled together" in capsys.readouterr().out
    once, twice, other = (
        torch.load(tmp_path / out / "checkpoint.pt")["simclr"] for out in ("once", "twice", "plain")
    )
    for name, weights in once.items():
        assert torch.equal(weights, twice[name])
    assert not torch.equal(other["projector.0.weight"], once["projector.0.weight"])


def test_distances_pair_by_pair():
    rng = torch.Generator().manual_seed(0)
    first, second = F.normalize(torch.randn(2, 30, 5, generator=rng), dim=2)
    classes = torch.arange(30) % 4
    pairs = dict(image=[], same_class=[], other_class=[])
    for i, j in itertools.product(range(30), repeat=2):
        kind = "image" if i == j else "same_class" if classes[i] == classes[j] else "other_class"
        pairs[kind].append((first[i] - second[j]).square().sum().item())
    found = distances.distances(first, second, classes)
    assert found == pytest.approx({kind: np.mean(x) for kind, x in pairs.items()}, rel=1e-5)


@pytest.mark.parametrize("script", [simclr, vicreg, msn])
def test_distances_of_a_run(script, tmp_path, few_plates, capsys):
    script.main([*TINY[script], "--steps", "1", "--out", str(tmp_path)])
    distances.main([str(tmp_path / "checkpoint.pt")])
    found = json.loads((tmp_path / "distances.json").read_text())
    for numbers in found.values():
        assert 0 < numbers["image"] < numbers["other_class"] < 4
    encoder, projector, options, _ = distances.load_network(tmp_path / "checkpoint.pt")
    images = sampler.open_data("plates", "val")[0][:4]
    with script.process_group():
        views = distances.two_views(images, options, script)
    assert views.shape == (2, 4, 3, 32, 32) and not torch.equal(views[0], views[1])
    z = distances.embed(views, encoder, projector)["embedding"]
    torch.testing.assert_close(z, F.normalize(z, dim=2))
