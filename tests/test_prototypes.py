"""tests/prototypes.py and curves.py: numbers that are known otherwise, and pictures of runs."""

import json

import curves
import numpy as np
import prototypes
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import TINY

import linear_eval
import msn
import pmsn
import sampler


def test_prototypes_that_hold_the_first_digit():
    """Ten of fifteen prototypes are one for each first digit: all numbers follow by hand."""
    _, labels = prototypes.open_pictures("plates", 32)
    first = torch.from_numpy(labels["first digit"])
    similarity = F.one_hot(first, 15).float()
    similarity += 0.01 * torch.rand(similarity.shape, generator=torch.Generator().manual_seed(0))
    found = prototypes.describe(similarity, labels)
    assert found["used"] == 10
    np.testing.assert_allclose(found["effective"], 10)
    np.testing.assert_allclose(found["adjusted"]["first digit"], 100)
    assert 30 < found["adjusted"]["class"] < 70
    for name in ("last digit", "count", "size"):
        assert abs(found["adjusted"][name]) < 0.5
    similarity = torch.rand(10_000, 256, generator=torch.Generator().manual_seed(2))
    by_chance = prototypes.describe(similarity, labels)
    assert all(abs(x) < 1 for x in by_chance["adjusted"].values())
    assert found["shares"]["first digit"] == 100
    assert abs(found["shares"]["count"] - found["chance"]["count"]) < 8
    assert np.shape(found["shown"]) == (10, 10)
    for pictures in found["shown"]:
        assert len(set(labels["first digit"][pictures])) == 1
    # Of ten draws from ten, four and three values: simulated by a second way.
    for name, values in (("first digit", 10), ("count", 4), ("size", 3)):
        drawn = torch.randint(values, (20_000, 10), generator=torch.Generator().manual_seed(1))
        counts = F.one_hot(drawn, values).sum(dim=1).amax(dim=1)
        assert abs(10 * counts.float().mean() - found["chance"][name]) < 0.5


@pytest.mark.parametrize("many", [200, 14])
def test_twelve_prototypes_at_even_ranks_of_use(many):
    """Prototype p attracts the more pictures the smaller p is."""
    share = np.arange(many, 0, -1)
    owner = np.repeat(np.arange(many), share * 10_000 // share.sum() + 1)[:10_000]
    shown = prototypes.describe(F.one_hot(torch.from_numpy(owner), many).float(), {})["shown"]
    ranks = [owner[pictures[0]] for pictures in shown]
    assert ranks == np.linspace(0, owner.max(), 12).round().astype(int).tolist()


def test_a_run(tmp_path, few_plates, capsys):
    """The embeddings are the target's, on the pictures that linear_eval.py's encoder sees."""
    msn.main([*TINY[msn], "--steps", "2", "--out", str(tmp_path)])
    path = tmp_path / "checkpoint.pt"
    target, options = prototypes.load_target(path)
    images, labels = prototypes.open_pictures("plates", 32)
    similarity = prototypes.similarities(target, options, images)
    encoder = linear_eval.load_encoder(path)
    with torch.no_grad():
        cls = linear_eval.features(encoder, images[:300].expand(-1, 3, -1, -1))["cls"]
        expected = F.normalize(target.projector(cls)) @ F.normalize(target.prototypes).T
    torch.testing.assert_close(similarity[:300], expected, atol=1e-5, rtol=0)

    prototypes.main([str(path)])
    written = json.loads((tmp_path / "prototypes.json").read_text())
    assert written == prototypes.describe(similarity, labels)
    assert f"used         {written['used']}\n" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "prototypes.png"))[..., 0]
    assert sheet.shape == (34 * len(written["shown"]) + 2, 34 * 10 + 2)
    np.testing.assert_allclose(sheet[2:34, 36:68], images[written["shown"][0][1], 0], atol=1)


def test_a_run_on_a_folder(tmp_path, pictures):
    options = f"--data {pictures} --recipe plates --workers 0 --steps 1 --out {tmp_path}"
    pmsn.main([*TINY[pmsn], *options.split()])
    path = tmp_path / "checkpoint.pt"
    prototypes.main([str(path), "--data", str(pictures)])
    written = json.loads((tmp_path / "prototypes.json").read_text())
    assert list(written["shares"]) == ["class"]
    assert Image.open(tmp_path / "prototypes.png").width == 342

    # The mean prediction by its definition, one picture after another.
    images, _ = prototypes.open_pictures(str(pictures), 32)
    target, options = prototypes.load_target(path)
    predicted, prior = curves.mean_prediction(path, str(pictures))
    predictions = []
    for image in images:
        with torch.no_grad():
            z, q = target([msn.normalise(image[None].float() / 255, options.standardise)])
        cosine = F.cosine_similarity(z, q)
        predictions.append((cosine / options.temperature).softmax(dim=0))
    torch.testing.assert_close(predicted, torch.stack(predictions).mean(dim=0), atol=1e-5, rtol=0)
    assert torch.equal(prior, sampler.power_law_prior(16, 0.25))


@pytest.mark.parametrize("script", [msn, pmsn])
def test_curves_of_a_run(script, tmp_path, few_plates):
    """A panel for each quantity; with the checkpoint one more, of shares from large to small."""
    script.main([*TINY[script], "--steps", "2", "--out", str(tmp_path / "run")])
    log = tmp_path / "run/log.jsonl"
    options = ["--show", "loss", "lr", "--prior", str(tmp_path / "run/checkpoint.pt"), "--out", "-"]
    options += ["--line", "lr", "0.1", "a rate", "--limits", "loss", "0", "9"]
    loss, lr, shares = curves.draw(curves.parse_args([str(log), str(log), *options])).axes
    assert loss.get_ylim() == (0, 9) and lr.lines[-1].get_ydata() == [0.1, 0.1]
    assert [text.get_text() for text in lr.texts] == ["a rate"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for axis, name in ((loss, "loss"), (lr, "lr")):
        assert axis.get_title() == name
        assert axis.lines[0].get_xdata().tolist() == [line["step"] for line in lines]
        assert axis.lines[0].get_ydata().tolist() == [line[name] for line in lines]
    predicted, prior = (line.get_ydata() for line in shares.lines)
    for curve in (predicted, prior):
        np.testing.assert_allclose(sum(curve), 1, rtol=1e-5)
        assert len(curve) == 16 and (np.diff(curve) <= 0).all()
    steepness = prior[0] / prior[-1]
    np.testing.assert_allclose(steepness, 1 if script is msn else 16**0.25, rtol=1e-6)
    curves.main([str(log), "--out", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").width > 1000
