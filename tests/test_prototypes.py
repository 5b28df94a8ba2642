"""tests/prototypes.py: its numbers on assignments that are known, and on a run."""

import json

import numpy as np
import prototypes
import pytest
import torch
from runs import TINY
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

import linear_eval
import msn
import sampler


def test_what_prototypes_tell():
    rng = np.random.default_rng(0)
    digit = rng.integers(4, size=1000)
    noise = rng.integers(4, size=1000)
    mixed = np.where(rng.random(1000) < 0.3, noise, digit)
    share = mutual_info_score(mixed, digit) / entropy(np.bincount(digit))
    np.testing.assert_allclose(prototypes.told(mixed, digit), 100 * share)
    assert 30 < 100 * share < 60
    a = np.arange(400) // 100
    b = np.arange(400) % 4
    np.testing.assert_allclose(prototypes.told(7 - a, a), 100)
    np.testing.assert_allclose(prototypes.told(a // 2, a), 50)
    np.testing.assert_allclose(prototypes.told(a, b), 0, atol=1e-9)
    np.testing.assert_allclose(prototypes.told(0 * a, a), 0, atol=1e-9)


def test_the_share_of_the_most_common_label():
    labels = np.array([[0, 1, 1, 2], [3, 3, 3, 3], [0, 1, 2, 3]])
    assert prototypes.most_common_share(labels).tolist() == [50, 100, 25]


def test_prototypes_that_hold_the_first_digit():
    """Ten of fifteen prototypes are one for each first digit: all numbers follow by hand."""
    _, labels = sampler.open_data("plates", "val")
    labels = prototypes.labels_by_name(labels)
    first = torch.from_numpy(labels["first digit"])
    similarity = torch.nn.functional.one_hot(first, 15).float()
    similarity += 0.01 * torch.rand(similarity.shape, generator=torch.Generator().manual_seed(0))
    found = prototypes.describe(similarity, labels)
    assert found["used"] == 10
    np.testing.assert_allclose(found["effective"], 10)
    np.testing.assert_allclose(found["information"]["first digit"], 100)
    np.testing.assert_allclose(found["information"]["class"], 100 / 3)
    np.testing.assert_allclose(found["information"]["last digit"], 0, atol=1e-9)
    assert found["information"]["count"] < 1
    assert found["shares"]["first digit"] == 100
    assert abs(found["shares"]["count"] - found["chance"]["count"]) < 8
    assert np.shape(found["shown"]) == (10, 10)
    for pictures in found["shown"]:
        assert len(set(labels["first digit"][pictures])) == 1
    # Of ten draws from ten, four and three values: simulated by a second way.
    for name, values in (("first digit", 10), ("count", 4), ("size", 3)):
        drawn = torch.randint(values, (20_000, 10), generator=torch.Generator().manual_seed(1))
        counts = torch.nn.functional.one_hot(drawn, values).sum(dim=1).amax(dim=1)
        assert abs(10 * counts.float().mean() - found["chance"][name]) < 0.5


@pytest.mark.parametrize("many", [200, 14])
def test_twelve_prototypes_at_even_ranks_of_use(many):
    """Prototype p attracts the more pictures the smaller p is."""
    label = {name: np.zeros(10_000, dtype=int) for name in ("class", *prototypes.LABELS)}
    label["class"][0] = label["first digit"][0] = label["count"][0] = label["size"][0] = 1
    share = np.arange(many, 0, -1)
    owner = np.repeat(np.arange(many), share * 10_000 // share.sum() + 1)[:10_000]
    similarity = torch.nn.functional.one_hot(torch.from_numpy(owner), many).float()
    shown = prototypes.describe(similarity, label)["shown"]
    ranks = [owner[pictures[0]] for pictures in shown]
    assert ranks == np.linspace(0, owner.max(), 12).round().astype(int).tolist()


def test_a_run(tmp_path, few_plates, capsys):
    """The embeddings are the target's, on the pictures that linear_eval.py's encoder sees."""
    msn.main([*TINY[msn], "--steps", "2", "--out", str(tmp_path)])
    path = tmp_path / "checkpoint.pt"
    target, options = prototypes.load_target(path)
    images, labels = sampler.open_data("plates", "val")
    found = prototypes.similarities(target, options, images[:300])
    encoder = linear_eval.load_encoder(path)
    with torch.no_grad():
        cls = linear_eval.features(encoder, images[:300].expand(-1, 3, -1, -1))["cls"]
        z = torch.nn.functional.normalize(target.projector(cls))
        expected = z @ torch.nn.functional.normalize(target.prototypes).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    prototypes.main([str(path)])
    written = json.loads((tmp_path / "prototypes.json").read_text())
    printed = capsys.readouterr().out
    assert f"used         {written['used']}" in printed
    assert 1 <= written["effective"] <= written["used"] <= 16
    similarity = prototypes.similarities(target, options, images)
    assert written == prototypes.describe(similarity, prototypes.labels_by_name(labels))
