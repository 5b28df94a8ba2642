"""linear_eval.py: labels, features, heads and their choice, whole evaluations, bad input."""

import copy
import functools
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision import models
from torchvision.transforms import v2

import data2vec
import linear_eval
import mae
import msn
import sampler
import simclr
import vicreg

GOLDEN, ROOT = Path(__file__).parent / "golden", Path(__file__).resolve().parent.parent
TINY = (
    "--dim 16 --depth 2 --heads 2 --hidden 16 --output 8 --num-prototypes 16 --stem 8 8 8".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and light, as files of several modes and sizes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "CMYK")
    for i in range(100):
        split, light = "val" if i % 5 == 4 else "train", i % 2
        (root / split / f"class{light}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(90, size=(30 + i % 7, 40, 3), dtype=np.uint8) + 150 * light
        mode = modes[i // 2 % 5]
        suffix = "jpg" if mode == "CMYK" else "png"
        picture = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
        picture.save(root / split / f"class{light}/{i}.{suffix}")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = f"--data {folder} --recipe cifar10 --batch-size 16 --steps 2 --focal-views 0".split()
    msn.main([*options, *TINY, "--workers", "0", "--out", str(out)])
    return out / "checkpoint.pt"


def test_clevr_labels():
    golden = json.loads((GOLDEN / "clevr_labels.json").read_text())
    for scene, expected in zip(golden["scenes"], golden["expected"]):
        assert linear_eval.clevr_count(scene) == expected["count_label"]
        assert linear_eval.clevr_dist(scene) == expected["dist_label"]
    too_far, at_the_camera, two_objects = golden["out_of_range_scenes"]
    for scene in (too_far, at_the_camera):
        assert linear_eval.clevr_count(scene) == 0
        with pytest.raises(ValueError):
            linear_eval.clevr_dist(scene)
    assert linear_eval.clevr_dist(two_objects) == 2
    with pytest.raises(ValueError):
        linear_eval.clevr_count(two_objects)


def test_kitti_labels():
    golden = json.loads((GOLDEN / "kitti_labels.json").read_text())
    assert len(golden["expected"]) == len(golden["files"]) == 20
    for row in golden["expected"]:
        lines = golden["files"][row["file"]].splitlines()
        assert linear_eval.kitti_dist(lines) == row["label"], row["note"]
    behind, far = (golden["out_of_range_files"][f"00090{i}.txt"].splitlines() for i in (0, 1))
    with pytest.raises(ValueError):
        linear_eval.kitti_dist(behind)
    assert linear_eval.kitti_dist(far) == 3


def test_encoder_is_frozen_and_features_are_its_own(checkpoint):
    encoder = linear_eval.load_encoder(checkpoint)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)
    features = linear_eval.features(encoder, images)
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    x = linear_eval.normalise(images.float() / 255, encoder.options["standardise"])
    tokens = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    torch.testing.assert_close(features["cls"], encoder(x), atol=1e-5, rtol=0)
    cls4 = torch.cat([encoder.norm(t)[:, 0] for t in tokens], dim=1)  # the encoder has two blocks
    torch.testing.assert_close(features["cls4"], cls4, atol=1e-5, rtol=0)
    patches = encoder.norm(tokens[-1])[:, 1:].mean(dim=1)
    torch.testing.assert_close(features["patches"], patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(features["raw"], tokens[-1][:, 0], atol=1e-5, rtol=0)
    own = msn.VisionTransformer(32, 8, 16, 2, 2, [8, 8, 8]).eval()  # msn.py's own network
    own.load_state_dict(before)
    torch.testing.assert_close(encoder(x), own(x), atol=1e-5, rtol=1e-5)


def separable(n, classes=4, dim=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n, 1), generator=rng)
    centres = 3 * torch.eye(classes, dim)
    return centres[labels[:, 0]] + 0.3 * torch.randn(n, dim, generator=rng), labels


@pytest.fixture
def fit(checkpoint, tmp_path, monkeypatch):
    """Evaluate given features: a picture of two by two pixels is the number of its row in them."""

    def evaluate(features, labels, test_features, test_labels, classes, *options, kinds=None):
        def pictures(n, last):
            rows = torch.arange(n)
            pixels = torch.stack([rows // 256, rows % 256, torch.full((n,), last), rows * 0], dim=1)
            return pixels.byte().view(n, 1, 2, 2)

        def features_of(encoder, pixels):
            a, b, which = pixels[:, 0].flatten(1)[:, :3].long().unbind(dim=1)
            return {k: x[256 * a + b] for k, x in (features, test_features)[which[0]].items()}

        encoder = linear_eval.load_encoder(checkpoint)
        encoder.options |= dict(image_size=2)
        test_images = pictures(len(test_labels), 1)
        task = linear_eval.Task(
            data=encoder.options["data"],
            target="class",
            name="plates",
            train=linear_eval.Split(
                images=pictures(len(labels), 0),
                labels=labels,
                classes=labels[:, 0] if kinds is None else kinds,
            ),
            test=linear_eval.Split(test_images, test_labels, test_labels[:, 0]),
            num_classes=classes,
        )
        recipe = linear_eval.TASKS["plates"] | dict(features=list(features))
        with monkeypatch.context() as patch:
            patch.setattr(linear_eval, "load_encoder", lambda *_: encoder)
            patch.setattr(linear_eval, "open_task", lambda *_: task)
            patch.setattr(linear_eval, "features", features_of)
            patch.setitem(linear_eval.TASKS, "plates", recipe)
            out = tmp_path / "fit.json"
            options = list(map(str, options)) + ["--no-untrained", "--out", str(out)]
            linear_eval.main([str(checkpoint), *options])
        return json.loads(out.read_text())

    return evaluate


def test_heads_learn_what_is_linear_and_only_that(fit):
    (x, labels), (test, test_labels) = separable(2000), separable(500, seed=1)
    noise = torch.randn(2000, 8), torch.randn(500, 8)
    features, test_features = dict(good=x, noise=noise[0]), dict(good=test, noise=noise[1])
    options = "--epochs", 8, "--batch-size", 64, "--knn", 5
    report = fit(features, labels, test_features, test_labels, 4, *options)
    heads = report["heads"]
    assert len(heads) == 2 * 2 * 3 and report["training_images"] == 1800
    assert {(h["feature"], h["norm"], h["lr"]) for h in heads} == {
        (f, n, r) for f in features for n in ("batch", "none") for r in (0.01, 0.1, 0.5)
    }
    assert heads[0]["feature"] == "good" and heads[0]["top1"] > 99 and report["knn"] > 99
    chance = [head["top1"] for head in heads if head["feature"] == "noise"]
    assert max(chance) < 35


def test_heads_trained_together_learn_as_alone():
    torch.manual_seed(0)
    bank, rates, alone = linear_eval.Heads(8, 3, 4, (0.1, 1.0)), (0.1, 1.0), []
    for linear in bank.linears:
        alone.append(torch.nn.Sequential(torch.nn.BatchNorm1d(8), copy.deepcopy(linear)))
    velocities = [torch.zeros(12, 8) for _ in rates]
    sgd = dict(momentum=0.9, nesterov=True, lr=0.1)
    together = torch.optim.SGD(bank.groups(128, 5e-4), **sgd)
    for _ in range(4):
        x, labels = torch.randn(32, 8), torch.randint(4, (32, 3))
        logits = bank(x)
        loss = sum(F.cross_entropy(one.flatten(0, 1), labels.flatten()) for one in logits)
        together.zero_grad()
        loss.backward()
        together.step()
        for i, (head, rate) in enumerate(zip(alone, rates)):
            torch.testing.assert_close(logits[i].flatten(1), head(x), atol=1e-5, rtol=1e-5)
            own = F.cross_entropy(head(x).reshape(-1, 4), labels.flatten())
            gradient = torch.autograd.grad(own, head[1].weight)[0] + 5e-4 * head[1].weight
            with torch.no_grad():  # Nesterov's step on this head's own loss, at half its rate: 128
                velocities[i] = 0.9 * velocities[i] + gradient
                weight = head[1].weight - rate / 2 * (gradient + 0.9 * velocities[i])
                torch.testing.assert_close(bank.linears[i].weight, weight, atol=1e-5, rtol=1e-5)
                head[1].load_state_dict(bank.linears[i].state_dict())
                head[0].weight.copy_(bank.scales[i])
                head[0].bias.copy_(bank.shifts[i])


def batches_of(x, labels, size, seed=5):
    """-> what train_heads asks for, and the same as a list for each epoch."""

    def batches(epoch):
        rng = torch.Generator().manual_seed(seed + epoch)
        return [(i, dict(x=x[i])) for i in torch.randperm(len(x), generator=rng).split(size)]

    return batches


def test_heads_are_vissl_s():
    """Four heads trained at once against each alone, by an explicit loop: affine BatchNorm, which
    is not decayed, or none; Linear; SGD with Nesterov momentum; a tenth at 2/7, 4/7, 6/7."""
    (x, labels), rates = separable(300), [0.05, 0.2]
    recipe = linear_eval.TASKS["imagenet"] | dict(epochs=7, batch_size=128)
    made = {norm: linear_eval.Heads(8, 1, 4, rates, norm, reads="x") for norm in ("batch", "none")}
    banks = torch.nn.ModuleList(made.values())
    alone = []
    for norm in ("batch", "none"):
        for linear in copy.deepcopy(made[norm].linears):
            first = torch.nn.BatchNorm1d(8) if norm == "batch" else torch.nn.Identity()
            alone.append(torch.nn.Sequential(first, linear))
    batches = batches_of(x, labels, 128)
    linear_eval.train_heads(banks, batches, 3, labels, recipe)
    velocity = [[torch.zeros_like(p) for p in head.parameters()] for head in alone]
    for epoch in range(7):
        for index, _ in batches(epoch):
            for head, rate, momenta in zip(alone, rates * 2, velocity):
                parameters = list(head.parameters())
                loss = F.cross_entropy(head(x[index]), labels[index, 0])
                lr = rate * 128 / 256 * 0.1 ** sum(epoch >= m for m in (2, 4, 6))
                for i, gradient in enumerate(torch.autograd.grad(loss, parameters)):
                    with torch.no_grad():
                        decay = 5e-4 * (i >= len(parameters) - 2)  # weight and bias, not the norm
                        gradient = gradient + decay * parameters[i]
                        momenta[i] = 0.9 * momenta[i] + gradient
                        parameters[i] -= lr * (gradient + 0.9 * momenta[i])
    for i, (norm, linear) in enumerate(alone):
        bank = made["batch" if i < 2 else "none"]
        pairs = [(bank.linears[i % 2].weight, linear.weight)]
        pairs += [(bank.linears[i % 2].bias, linear.bias)]
        if i < 2:
            pairs += [(bank.scales[i], norm.weight), (bank.shifts[i], norm.bias)]
            torch.testing.assert_close(bank.norm.running_mean, norm.running_mean)
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_heads_of_mae_and_msn_normalise_as_official():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(64, 8)
    mae = linear_eval.Heads(8, 1, 4, [0.1], "standard", 0.01)
    centred = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(mae(x)[0, :, 0], mae.linears[0](centred), atol=1e-5, rtol=1e-5)
    assert mae.linears[0].weight.abs().max() <= 0.05 and not mae.linears[0].bias.any()
    assert [len(group["params"]) for group in mae.groups(256, 0.0)] == [2]
    head = linear_eval.Heads(8, 1, 4, [0.1, 0.2], "layer")
    own = torch.nn.LayerNorm(8)
    for i in range(2):
        torch.nn.init.normal_(own.weight)
        torch.nn.init.normal_(own.bias)
        head.scales[i].data.copy_(own.weight)
        head.shifts[i].data.copy_(own.bias)
        expected = head.linears[i](F.normalize(own(x), dim=1))
        torch.testing.assert_close(head(x)[i, :, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "protocol, kind, peak, expected",
    [
        # MAE: 10 epochs of warm-up, then a cosine to 0, by the step. MSN: a cosine by the step.
        ("mae", linear_eval.LARS, 0.1, lambda e: e / 10 if e < 10 else cosine((e - 10) / 80)),
        ("msn", torch.optim.SGD, 0.2, lambda e: cosine(e / 100)),
        ("vicreg", torch.optim.SGD, 0.3, lambda e: cosine(int(e) / 100)),
    ],
)
def test_rates_of_the_methods_own_protocols(protocol, kind, peak, expected, monkeypatch):
    (x, labels), rates, step = separable(100), [], kind.step
    recipe = linear_eval.TASKS["imagenet"] | linear_eval.PROTOCOLS[protocol] | dict(batch_size=50)
    head = linear_eval.Heads(
        8, 1, 4, recipe["rates"], norm=recipe["norms"][0], std=recipe["std"], reads="x"
    )

    def record(self, *options):
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0].get("nesterov", False) == (protocol == "msn")
        assert self.param_groups[0]["weight_decay"] == (1e-6 if protocol == "vicreg" else 0)
        return step(self, *options)

    monkeypatch.setattr(kind, "step", record)
    banks = torch.nn.ModuleList([head])
    linear_eval.train_heads(banks, batches_of(x, labels, 50), 2, labels, recipe)
    assert len(rates) == 2 * (90 if protocol == "mae" else 100)
    curve = [peak * 50 / 256 * expected(i / 2) for i in range(len(rates))]
    np.testing.assert_allclose(rates, curve, rtol=1e-9, atol=1e-12)


def cosine(share):
    return (1 + np.cos(np.pi * share)) / 2


def test_linear_accuracy_equals_logistic_regression():
    """On the features of a random encoder of plates, standardised, at the same regularisation."""
    images, labels = sampler.draw_plates(4, seed=2)
    options = dict(script="msn", seed=0, data="plates", image_size=32, patch_size=8, dim=48)
    options |= dict(depth=2, heads=3, stem=[16, 32, 32], standardise=True)
    encoder = linear_eval.new_encoder(options)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    parts = images.expand(-1, 3, -1, -1).split(500)
    x = torch.cat([linear_eval.features(encoder, part)["patches"] for part in parts])
    x, digit = x[order], labels["digits"][order, :1]
    x = (x - x[:3000].mean(0)) / x[:3000].std(0, unbiased=False)
    theirs = LogisticRegression(
        C=1 / (3000 * 5e-4), max_iter=5000, tol=1e-8
    )  # |w|^2 / 2 + C sum of losses
    theirs.fit(x[:3000].numpy(), digit[:3000, 0].numpy())
    expected = 100 * theirs.score(x[3000:].numpy(), digit[3000:, 0].numpy())
    # A batch of 300 and a cosine to 0, so that little of the noise of SGD is left at the end.
    recipe = linear_eval.TASKS["plates"] | dict(epochs=200, batch_size=300, cosine=True, final=0.0)
    heads = linear_eval.Heads(48, 1, 10, [1.0], "none", reads="x")
    banks = torch.nn.ModuleList([heads])
    linear_eval.train_heads(banks, batches_of(x[:3000], digit, 300), 10, digit[:3000], recipe)
    ours = linear_eval.accuracy(heads, x[3000:], digit[3000:]).item()
    assert expected > 20 and abs(ours - expected) <= 0.5
    weight = torch.from_numpy(theirs.coef_).float()
    found = heads.linears[0].weight
    assert F.cosine_similarity(found.flatten(), weight.flatten(), dim=0) > 0.999


def test_held_out_images_are_not_trained_on(fit):
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 400, generator=rng), torch.randint(2, (300, 1), generator=rng)
    options = "--epochs", 14, "--batch-size", 32
    heads = fit(dict(x=x), labels, dict(x=x), labels, 2, *options)["heads"]
    assert max(head["top1"] for head in heads) > 90  # labels at random, learnt by heart
    assert max(head["held_out"] for head in heads) < 80


def test_heads_follow_from_their_seed_and_report_each_target(fit):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=rng)
    targets = torch.stack([x[:, 0] > 0, torch.rand(400, generator=rng) > 0.5], dim=1).long()
    runs = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(global_seed)
        options = "--epochs", 20, "--batch-size", 64, "--seed", seed
        runs.append(fit(dict(x=x), targets, dict(x=x), targets, 2, *options)["heads"])
    assert runs[0] == runs[1] != runs[2]
    for head in runs[0]:
        easy, hopeless = head["targets"]
        assert easy > hopeless and abs(head["top1"] - (easy + hopeless) / 2) < 1e-3
    easy, hopeless = runs[0][0]["targets"]
    assert easy > 90 and hopeless < 70
    assert len({tuple(head["targets"]) for head in runs[0]}) > 3


def test_choice_is_by_the_held_out_tenth_not_by_the_test_set(fit):
    (x, labels), (test, test_labels) = separable(1000), separable(200, seed=1)
    features = dict(train_only=x, always=x + 1.5 * torch.randn(x.shape))
    test_features = dict(train_only=torch.randn(test.shape), always=test)  # misleads at test
    options = "--epochs", 5, "--batch-size", 64
    heads = fit(features, labels, test_features, test_labels, 4, *options)["heads"]
    assert heads[0]["feature"] == "train_only" and heads[0]["top1"] < 45
    assert max(head["top1"] for head in heads) > 80
    assert heads == sorted(heads, key=lambda head: -head["held_out"])


def test_neighbours_vote_by_their_cosine():
    rng = torch.Generator().manual_seed(0)
    x, test = torch.randn(90, 4, generator=rng), torch.randn(30, 4, generator=rng)
    labels = torch.randint(3, (90, 2), generator=rng)
    test_labels = torch.randint(3, (30, 2), generator=rng)
    right = np.zeros(2)
    for one, label in zip(test, test_labels):
        cosine = F.cosine_similarity(one[None], x)
        nearest = sorted(range(90), key=lambda i: -cosine[i])[:7]
        for t in range(2):
            votes = [0.0] * 3
            for i in nearest:
                votes[labels[i, t]] += np.exp(cosine[i].item() / 0.07)
            right[t] += np.argmax(votes) == label[t]
    train = linear_eval.Examples(torch.arange(90), dict(x=x), labels)
    tested = linear_eval.Examples(torch.arange(30), dict(x=test), test_labels)
    found = linear_eval.knn_accuracy(train, tested, "x", k=7, num_classes=3)
    np.testing.assert_allclose(found, 100 * right / 30)


def test_subsets_of_the_training_set(tmp_path, capsys):
    kinds = torch.cat([torch.full((n,), i) for i, n in enumerate((100, 40, 3))])
    kinds = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(1))]
    for choice, expected in {
        "0.1": [10, 4, 1],
        "5-per-class": [5, 5, 3],
        "1": [100, 40, 3],
    }.items():
        first, again, other = (linear_eval.subset(choice, kinds, kinds, s) for s in (0, 0, 1))
        assert kinds[first].bincount().tolist() == expected
        assert first.tolist() == sorted(set(first.tolist())) == again.tolist()
        assert torch.equal(first, other) == (choice == "1")
    paths = [f"train/n{i % 2}/n{i % 2}_{i}.JPEG" for i in range(8)]
    (tmp_path / "list.txt").write_text("n1_3.JPEG\nn0_2.JPEG\n")
    found = linear_eval.subset(str(tmp_path / "list.txt"), paths, torch.arange(8) % 2, 0)
    assert found.tolist() == [2, 3]
    (tmp_path / "list.txt").write_text("n1_4.JPEG\n")
    with pytest.raises(linear_eval.Refusal, match="n1_4.JPEG is no training image"):
        linear_eval.subset(str(tmp_path / "list.txt"), paths, torch.arange(8) % 2, 0)


def test_lists_name_images_or_their_classes_too(tmp_path):
    paths = ["d/train/a/1.png", "d/train/b/1.png", "d/train/b/2.png", "d/train/aa/deep er/3.png"]
    file = tmp_path / "list.txt"

    def chosen(text):
        file.write_text(text)
        return linear_eval.listed(file, paths).tolist()

    assert chosen("2.png\n\nb/1.png\n2.png") == [1, 2]
    assert chosen("a/1.png\r\nd/train/aa/deep er/3.png\r\n") == [0, 3]
    assert chosen("deep er/3.png") == [3]
    for text, words in {
        "2.png\n1.png": "1.png is d/train/a/1.png and d/train/b/1.png: write CLASS/NAME",
        "c/1.png": "c/1.png is no training image",
        "2.pn": "2.pn is no training image",
        "g": "g is no training image",  # the end of a name is not enough
        "\n": "names no image",
    }.items():
        with pytest.raises(linear_eval.Refusal, match=words):
            chosen(text)
    file.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(linear_eval.Refusal, match="not a text file"):
        linear_eval.listed(file, paths)


def test_augmented_images_follow_from_seed_epoch_and_index(folder):
    paths = linear_eval.open_task(str(folder)).train.images
    images = linear_eval.Images(paths, 16, "crop", False, seed=3)
    first, again = images[0, [4, 7]], images[0, [7, 4]]
    assert first.shape == (2, 3, 16, 16) and torch.equal(first[0], again[1])
    assert not torch.equal(first, images[1, [4, 7]])
    torch.manual_seed(hash((3, 0, 7)))
    chain = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    assert torch.equal(first[1], chain(linear_eval.read_image(paths[7])))
    flipped = linear_eval.Images(paths, 16, "flip", True, seed=3)
    whole = flipped[None, [4]]
    assert {torch.equal(flipped[e, [4]], whole) for e in range(9)} == {True, False}
    turned = (torch.equal(flipped[e, [4]], whole.flip(3)) for e in range(9))
    assert any(turned) and len({flipped[e, [4]].sum().item() for e in range(9)}) == 1
    memory = torch.randint(256, (5, 1, 32, 32), dtype=torch.uint8)
    cifar = linear_eval.Images(memory, 32, "flip", False, seed=3)
    assert torch.equal(cifar[None, [1, 3]], memory[[1, 3]].expand(-1, 3, -1, -1))
    shown = cifar[0, list(range(5))][:, :1]
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(shown, memory)]
    assert all(t or torch.equal(a, b) for t, a, b in zip(turned, shown, memory))
    assert 0 < sum(turned) < 5


@pytest.mark.parametrize("mode", [[], ["--cached"]])
def test_evaluates_a_folder(checkpoint, folder, tmp_path, capsys, mode):
    reports = []
    for name in ("a.json", "b.json"):
        options = "--epochs 5 --batch-size 16 --workers 0 --out".split() + [str(tmp_path / name)]
        linear_eval.main([str(checkpoint), *mode, *options, "--knn", "3", "--nearest", "5"])
        reports.append(json.loads((tmp_path / name).read_text()))
    report = reports[0]
    assert reports[0] == reports[1]
    assert report["task"] == f"{folder} class" and report["step"] == 2
    assert report["recipe"] == "imagenet" and report["augment"] == ("none" if mode else "crop")
    assert report["top1"] == report["heads"][0]["top1"] and report["best"] == report["heads"][0]
    assert report["top1"] > 90 and report["knn"] > 90  # light and dark
    assert report["untrained_top1"] == report["untrained_heads"][0]["top1"]
    assert len(report["heads"]) == len(report["untrained_heads"]) == 3 * 2 * 3
    printed = capsys.readouterr().out
    assert f"{report['top1']:.1f}, untrained {report['untrained_top1']:.1f}" in printed
    row = f"| `{checkpoint}` | {report['task']} | {report['top1']:.1f} | "
    assert f"{row}{report['untrained_top1']:.1f} | {report['knn']:.1f} |\n" in printed
    with Image.open(tmp_path / "a.png") as picture:  # five rows: a test image, nine training images
        assert picture.size == (10 * 34 + 2, 5 * 34 + 2)
        pixels = np.asarray(picture).astype(float)
    cells = [pixels[2 + 34 * i : 34 + 34 * i] for i in range(5)]
    light = np.array(
        [[c[:, 2 + 34 * j : 34 + 34 * j].mean() > 120 for j in range(10)] for c in cells]
    )
    assert (light == light[:, :1]).all()  # neighbours of a dark picture are dark
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json",
        "a.png",
        "b.json",
        "b.png",
    ]


@pytest.mark.parametrize("protocol", ["msn", "mae", "vicreg"])
def test_the_methods_own_protocols_run(protocol, checkpoint, tmp_path):
    out = tmp_path / "r.json"
    options = "--epochs 12 --batch-size 16 --workers 0 --no-untrained --rates 2 8".split()
    linear_eval.main([str(checkpoint), "--protocol", protocol, *options, "--out", str(out)])
    report = json.loads(out.read_text())
    feature, norm = dict(msn=("raw", "layer"), mae=("cls", "standard"), vicreg=("cls", "none"))[
        protocol
    ]
    assert {(h["feature"], h["norm"]) for h in report["heads"]} == {(feature, norm)}
    assert [h["lr"] for h in sorted(report["heads"], key=lambda h: h["lr"])] == [2, 8]
    assert report["untrained_top1"] is None and report["protocol"] == protocol
    assert report["top1"] >= 50


BOTH_MODES = """
import os, runpy, sys
port, script, *options = sys.argv[1:]
for mode in ([], ["--cached"]):
    sys.argv = [script, *options, "--out", f"two{len(mode)}.json", *mode]
    runpy.run_path(script, run_name="__main__")
    os.environ["MASTER_PORT"] = port  # torchrun's own store remembers the first group's addresses
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
"""


def test_two_processes_equal_one_to_the_last_digit(
    checkpoint, folder, tmp_path, capsys, one_thread
):
    """The file with sampler.py, in an empty folder; parts of training and test set are never even.

    torchrun's processes evaluate in both modes: to start them takes longer than to evaluate."""
    script = shutil.copy(ROOT / "linear_eval.py", tmp_path)
    shutil.copy(ROOT / "sampler.py", tmp_path)
    (tmp_path / "both_modes.py").write_text(BOTH_MODES)
    options = [str(checkpoint), "--train-fraction", "0.99", "--epochs", "2", "--batch-size", "20"]
    options += ["--workers", "0", "--knn", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(tmp_path / "both_modes.py")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        command += [str(server.getsockname()[1]), str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("untrained") == 2
    for mode in ([], ["--cached"]):
        out = tmp_path / f"one{len(mode)}.json"
        linear_eval.main([*options, *mode, "--out", str(out)])
        assert capsys.readouterr().out.count("untrained") == 1
        two = json.loads((tmp_path / f"two{len(mode)}.json").read_text())
        assert json.loads(out.read_text()) == two
        assert two["augment"] == ("none" if mode else "crop")


def test_another_process_may_remove_the_file_that_tries_the_folder(
    checkpoint, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(Path, "touch", lambda self: None)  # gone before this process unlinks it
    options = ["--cached", "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "x.json")]
    linear_eval.main([str(checkpoint), *options])
    assert (tmp_path / "x.json").exists()


@pytest.mark.parametrize("mode", [[], ["--cached"]])
def test_a_stopped_evaluation_goes_on(checkpoint, folder, tmp_path, monkeypatch, mode):
    def start(name):
        options = "--epochs 4 --batch-size 16 --workers 0 --no-untrained --out".split()
        linear_eval.main([str(checkpoint), *mode, *options, str(tmp_path / name)])
        return json.loads((tmp_path / name).read_text())

    whole, factor, epochs = start("whole.json"), linear_eval.rate_factor, []

    def stop(epoch, *rest, **more):
        epochs.append(epoch)
        if epoch == 2 and monkeypatched:
            raise KeyboardInterrupt
        return factor(epoch, *rest, **more)

    monkeypatched = True
    monkeypatch.setattr(linear_eval, "rate_factor", stop)
    with pytest.raises(KeyboardInterrupt):
        start("part.json")
    left = {"part.json.features"} | ({"part.json.heads"} if not mode else set())
    assert {path.name for path in tmp_path.glob("part*")} == left
    monkeypatched, gathered = False, []
    epochs.clear()
    own = linear_eval.collect
    monkeypatch.setattr(linear_eval, "collect", lambda *x: gathered.append(1) or own(*x))
    assert start("part.json") == whole
    assert not gathered  # the features were there
    assert min(epochs) == (0 if mode else 2)  # heads on cached features take seconds
    assert {path.name for path in tmp_path.glob("part*")} == {"part.json"}
    (tmp_path / "part.json.features").write_bytes(b"damaged")
    assert start("part.json") == whole and gathered


def test_evaluates_the_trained_and_the_untrained_encoder(checkpoint, tmp_path, monkeypatch):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | dict(step=7), tmp_path / "checkpoint.pt")
    seen, own = [], linear_eval.encode
    monkeypatch.setattr(
        linear_eval,
        "encode",
        lambda networks, *rest, **more: seen.append(networks) or own(networks, *rest, **more),
    )
    options = "--epochs 1 --batch-size 16 --workers 0".split()
    linear_eval.main([str(tmp_path / "checkpoint.pt"), *options])
    trained, fresh = state["encoder"], linear_eval.new_encoder(state["options"]).state_dict()
    for networks in seen:
        assert networks.keys() == {"trained", "untrained"}
        for network, expected in zip(networks.values(), (trained, fresh)):
            assert all(torch.equal(expected[k], v) for k, v in network.state_dict().items())
    assert len(seen) == 3 and not torch.equal(trained["cls_token"], fresh["cls_token"])
    (report,) = tmp_path.glob("*.json*")  # beside the checkpoint, and no partial file
    assert report.name.startswith("linear_eval_") and report.name.endswith("_class.json")
    assert json.loads(report.read_text())["step"] == 7


def test_evaluates_plates(tmp_path, capsys, few_plates):
    msn.main([*TINY, "--steps", "1", "--out", str(tmp_path)])
    capsys.readouterr()
    linear_eval.main([str(tmp_path / "checkpoint.pt"), "--epochs", "1"])
    report = json.loads((tmp_path / "linear_eval_plates_digits.json").read_text())
    first, middle, last = (f"{x:.1f}" for x in report["best"]["targets"])
    line = capsys.readouterr().out.splitlines()[-1]
    shown = f"plates digits | {report['top1']:.1f} ({first} {middle} {last}) | "
    assert shown in line and report["recipe"] == "plates" and report["augment"] == "none"
    assert {head["lr"] for head in report["heads"]} == {0.01, 0.1, 0.5}
    assert len(report["untrained_heads"]) == len(report["heads"])


def test_encode_standardises_if_the_run_did(checkpoint):
    encoder = linear_eval.load_encoder(checkpoint)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    for standardise in (False, True):
        encoder.options["standardise"] = standardise
        x = linear_eval.normalise(images.float() / 255, standardise)
        torch.testing.assert_close(linear_eval.features(encoder, images)["cls"], encoder(x))


@pytest.mark.parametrize("script", [simclr, vicreg])
@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_residual_networks_are_evaluated_on_the_pixels_of_their_run(script, arch, folder, tmp_path):
    options = f"--data {folder} --recipe plates --arch {arch} --batch-size 8 --steps 2 --seed 3"
    options += f" --image-size 16 --hidden 16 --output 8 --workers 0 --out {tmp_path}"
    script.main(options.split())
    encoder = linear_eval.load_encoder(tmp_path / "checkpoint.pt")
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    x = images.float() / 255  # of which SimCLR's network sees just these
    x = x if script is simclr else linear_eval.normalise(x, False)
    features = linear_eval.features(encoder, images)
    assert features.keys() == {"pooled"}
    torch.testing.assert_close(features["pooled"], encoder(x), atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    start = script.resnet(arch, 16)[0].state_dict()
    control = linear_eval.new_encoder(encoder.options)
    assert all(torch.equal(start[key], value) for key, value in control.state_dict().items())
    linear_eval.main([str(tmp_path / "checkpoint.pt"), "--epochs", "1", "--workers", "0"])
    report = json.loads((tmp_path / f"linear_eval_{folder.name}_class.json").read_text())
    assert 0 <= report["top1"] <= 100 and report["best"]["feature"] == "pooled"


def test_files_are_resized_by_8_7_and_cropped(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(90, 160, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = linear_eval.read_image(tmp_path / "a.png")
    expected = linear_eval.TF.resize(whole, [64, 113])[:, 4:60, 28:84]  # of 64 x 113 the middle 56
    shown = linear_eval.Images([tmp_path / "a.png"], 56, "crop", False, 0)[None, [0]]
    assert shown.shape == (1, 3, 56, 56)
    assert torch.equal(shown[0], expected)


def test_ordinary_files_are_resized_whole_and_long_ones_in_the_middle(tmp_path):
    for size in ((40, 160), (160, 40), (41, 163), (90, 90), (64, 250)):
        picture(tmp_path / "a.png", 0, size)
        image = linear_eval.read_image(tmp_path / "a.png")
        old = v2.Compose([v2.Resize(24 * 8 // 7), v2.CenterCrop(24)])
        shown = linear_eval.Images([tmp_path / "a.png"], 24, "crop", False, 0)[None, [0]]
        assert torch.equal(shown[0], old(image)), size
    smooth = np.linspace(0, 255, 400)[None, :, None] * np.ones((20, 1, 3))
    for turned in (smooth, smooth.transpose(1, 0, 2)):
        Image.fromarray(turned.astype(np.uint8)).save(tmp_path / "b.png")
        old = v2.Compose([v2.Resize(18), v2.CenterCrop(16)])
        expected = old(linear_eval.read_image(tmp_path / "b.png")).int()
        shown = linear_eval.Images([tmp_path / "b.png"], 16, "crop", False, 0)[None, [0]][0]
        assert (shown - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [(60000, 2), (1, 2000), (2000, 1), (1, 1)])
def test_a_line_is_not_enlarged_to_gigabytes(size, tmp_path):
    Image.new("RGB", size, (9, 99, 200)).save(tmp_path / "line.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for augment in ("crop", "flip"):
        images = linear_eval.Images([tmp_path / "line.png"], 224, augment, False, 0)
        for epoch in (None, 0):
            shown = images[epoch, [0]][0]
            assert shown.shape == (3, 224, 224)
            assert (shown == torch.tensor([9, 99, 200])[:, None, None]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; was 6 GB


@pytest.mark.parametrize("script", ["msn", "mae", "data2vec"])
def test_untrained_encoders_have_the_initial_distribution(script):
    """Of each tensor the deviation and the largest entry are those of the script's own network."""
    sizes = dict(image_size=32, patch_size=8, dim=96, depth=2, heads=2)
    if script == "mae":
        own = mae.MAE(**sizes, decoder_dim=8, decoder_depth=1, decoder_heads=1)
        own = {k: v for k, v in own.state_dict().items() if "decoder" not in k and "mask" not in k}
    elif script == "data2vec":
        own = data2vec.BeiT(**sizes, layer_scale=0.1).state_dict()
        sizes |= dict(layer_scale=0.1)
        for i in (0, 1):  # it scales the branches down by their depth
            for layer in ("attn.proj", "mlp.fc2"):
                own[f"blocks.{i}.{layer}.weight"] *= (2 * i + 2) ** 0.5
    else:
        sizes |= dict(stem=[48, 64, 96])
        own = msn.VisionTransformer(**sizes).state_dict()
    control = linear_eval.new_encoder(sizes | dict(script=script, seed=0)).state_dict()
    assert own.keys() == control.keys()
    for name, weight in own.items():
        if name == "pos_embed" and script == "mae":
            continue  # fixed: an evaluation takes it from the checkpoint
        found = control[name]
        assert found.shape == weight.shape, name
        if weight.numel() > 1000:
            assert abs(found.std() / weight.std() - 1) < 0.1, name
            assert 0.7 < found.abs().max() / weight.abs().max() < 1.4, name
        elif "bias" in name and (script != "mae" or "patch" not in name) or "norm" in name:
            assert torch.equal(found, weight), name


def test_plates_targets():
    for target, shape in dict(digits=3, number=1, count=1, size=1).items():
        task = linear_eval.open_task("plates", target)
        assert torch.equal(task.train.classes, torch.arange(1000).repeat_interleave(50))
        assert (len(task.train.images), len(task.test.images)) == (50000, 10000)
        assert task.train.labels.shape == (50000, shape)
        assert task.num_classes == dict(digits=10, number=1000, count=4, size=3)[target]
        assert (task.target, task.name) == (target, "plates")
    assert linear_eval.open_task("plates", None).target == "digits"


def test_groups_of_frequent_and_of_rare_classes():
    kinds = torch.tensor([0] * 5 + [1] * 9 + [2] * 5 + [3] * 5 + [4] * 1 + [5] * 5 * 5)
    kinds = torch.cat([kinds, kinds + 6, kinds[:0] + 9, torch.full((30,), 3)])  # 12 classes
    test = torch.arange(12).repeat(2)
    groups = linear_eval.frequency_groups(kinds, test, 0.0)
    # 3: 35, then 5 and 11: 25, 1 and 7: 9, then 0 is the first of those with 5
    assert groups["frequent"].nonzero()[:, 0].tolist() == [3, 5, 15, 17]
    assert groups["rare"].nonzero()[:, 0].tolist() == [2, 4, 6, 8, 9, 10, 14, 16, 18, 20, 21, 22]
    tail = linear_eval.frequency_groups(torch.arange(20).repeat(50), torch.arange(20), 1.0)
    assert tail["frequent"].tolist() == [True] * 2 + [False] * 18
    assert tail["rare"].tolist() == [False] * 10 + [True] * 10


def test_heads_are_scored_on_groups_too(fit):
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(200, 4, generator=rng), torch.arange(200)[:, None] % 20
    x[:, 0] = 9.0 * (labels[:, 0] >= 2) - 4.5
    targets = (labels >= 2).long()
    test = x.clone()
    test[labels[:, 0] < 2, 0] *= -1  # the two classes seen most are wrong
    options = "--epochs", 20, "--batch-size", 32, "--rates", 0.1
    kinds = torch.cat([torch.zeros(100), torch.ones(100)]).long()  # of training images, by 0 and 1
    best = fit(dict(x=x), targets, dict(x=test), targets, 2, *options, kinds=kinds)["best"]
    assert best["targets"] == [90.0] and best["rare"] == [100.0]


def test_of_a_long_tailed_run_the_groups_are_told(checkpoint, tmp_path, capsys):
    state, lines = torch.load(checkpoint, weights_only=True), {}
    for exponent in (0.0, 1.0):
        state["options"]["long_tail"] = exponent
        torch.save(state, tmp_path / "tail.pt")
        out = tmp_path / "tail.json"
        options = ["--out", str(out), "--workers", "0", "--cached", "--epochs", "2"]
        linear_eval.main([str(tmp_path / "tail.pt"), *options])
        lines[exponent], best = capsys.readouterr().out, json.loads(out.read_text())["best"]
        assert len(best["frequent"]) == len(best["rare"]) == 1
    assert "rarer half" not in lines[0.0]
    frequent, rare = f"{best['frequent'][0]:.1f}", f"{best['rare'][0]:.1f}"
    assert f"seen most: {frequent}, the rarer half: {rare}\n" in lines[1.0]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as error:
        linear_eval.main(list(map(str, argv)))
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and "Traceback" not in message
    return message


def test_bad_input(checkpoint, folder, tmp_path, capsys):
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    (tmp_path / "empty").mkdir()
    assert "no such file" in refused(capsys, tmp_path / "none.pt")
    assert "half.pt: damaged" in refused(capsys, tmp_path / "half.pt")
    assert "foreign.pt: damaged or foreign" in refused(capsys, tmp_path / "foreign.pt")
    assert "missing" in refused(capsys, checkpoint, "--data", tmp_path / "missing")
    assert "train/CLASS" in refused(capsys, checkpoint, "--data", tmp_path / "empty")
    message = refused(capsys, checkpoint, "--target", "digits")
    assert "--target digits" in message and "class" in message
    assert "not writable" in refused(capsys, checkpoint, "--out", checkpoint / "x.json")
    assert "--epochs 0: give a whole number of at least 1" in refused(
        capsys, checkpoint, "--epochs", 0
    )
    assert "unrecognized" in refused(capsys, checkpoint, "--nonsense")
    assert "--rates 0: give a number above 0" in refused(capsys, checkpoint, "--rates", 0)
    for choice in ("0", "1.5", "-0.1", "x-per-class", "0-per-class", tmp_path / "no_list"):
        assert f"--train-fraction {choice}" in refused(
            capsys, checkpoint, f"--train-fraction={choice}"
        )
    assert "--task kitti-dist needs" in refused(capsys, checkpoint, "--task", "kitti-dist")
    assert "it is a folder" in refused(capsys, checkpoint, "--out", tmp_path / "empty")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("part, name", [("", "step"), ("options", "data"), ("options", "stem")])
def test_incomplete_checkpoints(checkpoint, tmp_path, capsys, part, name):
    state = torch.load(checkpoint, weights_only=True)
    del (state[part] if part else state)[name]
    torch.save(state, tmp_path / "less.pt")
    assert "damaged or foreign" in refused(capsys, tmp_path / "less.pt")


def test_diverged_encoder(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["encoder"]["cls_token"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    assert "not finite" in refused(capsys, tmp_path / "nan.pt", "--workers", 0)


def test_bad_folders(checkpoint, folder, tmp_path, capsys):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / name / "1.png")
    assert "class b" in refused(capsys, checkpoint, "--data", tmp_path)
    (tmp_path / "val/c").rename(tmp_path / "val/b")
    (tmp_path / "train/b/2.png").write_bytes(b"not a picture")
    out = ["--workers", 0, "--out", tmp_path / "report.json"]
    assert "2.png: unreadable" in refused(capsys, checkpoint, "--data", tmp_path, *out)
    assert not list(tmp_path.glob("report.json*"))
    (tmp_path / "train/note.txt").touch()  # not a class
    (tmp_path / "train/b/2.png").unlink()
    linear_eval.main([str(checkpoint), "--data", str(tmp_path), *map(str, out)])
    for split in ("train", "val"):
        (tmp_path / split / "b/1.png").unlink()
        (tmp_path / split / "b").rmdir()
    assert "one training image" in refused(capsys, checkpoint, "--data", tmp_path, *out)


def test_folders_that_lack_something_say_what_they_have(checkpoint, tmp_path, capsys):
    root = tmp_path / "data"
    options = ["--data", root, "--workers", 0, "--epochs", 1, "--out", tmp_path / "r.json"]
    for split in ("train", "validation", "test"):
        for name in ("a", "b"):
            picture(root / split / name / "1.png", 0)
    message = refused(capsys, checkpoint, *options)
    for part in ("no folder val", "test, train, validation", "val/CLASS/IMAGE"):
        assert part in message
    (root / "validation").rename(root / "val")
    (root / "train").rename(root / "training")
    assert "no folder train, but test, training, val" in refused(capsys, checkpoint, *options)
    (root / "training").rename(root / "train")
    (root / "val/b").rename(root / "val/c")
    assert "class b is not in both" in refused(capsys, checkpoint, *options)
    (root / "val/c").rename(root / "val/b")
    (root / "val/.ipynb_checkpoints").mkdir()
    (root / "train/__MACOSX").mkdir()
    linear_eval.main([str(checkpoint), *map(str, options)])
    capsys.readouterr()
    shutil.rmtree(root / "val")
    picture(root / "val/1.png", 0)
    message = refused(capsys, checkpoint, *options)
    assert f"{root / 'val'} has no class folders" in message and "val/CLASS/IMAGE" in message


def test_a_console_without_a_letter_of_a_path_gets_its_code(checkpoint, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in ("猫", "犬"):
            picture(tmp_path / "動物" / split / name / "1.png", 0)
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    options = f"--data {tmp_path}/動物 --workers 0 --epochs 1 --out {tmp_path}/報告.json".split()
    linear_eval.main([str(checkpoint), *options])
    console.flush()
    assert b"\\u52d5\\u7269 class" in console.buffer.getvalue()
    assert json.loads((tmp_path / "報告.json").read_text())["task"] == f"{tmp_path}/動物 class"


def test_the_report_is_written_before_it_is_printed(checkpoint, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(linear_eval, "print_report", broken)
    options = f"--workers 0 --epochs 1 --cached --out {tmp_path}/r.json".split()
    with pytest.raises(BrokenPipeError):
        linear_eval.main([str(checkpoint), *options])
    assert json.loads((tmp_path / "r.json").read_text())["heads"]


def test_the_size_of_features_is_said_before_the_work(checkpoint, tmp_path, monkeypatch, capsys):
    sizes = dict(SC_PAGE_SIZE=100, SC_PHYS_PAGES=1000)
    monkeypatch.setattr(os, "sysconf", sizes.get)
    said = []
    own = linear_eval.collect
    monkeypatch.setattr(
        linear_eval, "collect", lambda *x: said.append(capsys.readouterr().out) or own(*x)
    )
    options = f"--workers 0 --epochs 1 --cached --out {tmp_path}/r.json".split()
    linear_eval.main([str(checkpoint), *options])
    assert "warning: the features of 100 images will take 0.0 GB of 0.0 GB" in said[0]
    assert said[0].count("\n") == 1 and "--train-fraction" in said[0]
    sizes["SC_PAGE_SIZE"] = 4096
    linear_eval.main([str(checkpoint), *options])
    assert "warning" not in said[2]


def test_features_are_joined_into_one_tensor_that_is_made_once(monkeypatch):
    x = torch.randn(7, 3)
    batches = [(rows, dict(a=x[rows], b=x[rows, :1])) for rows in torch.arange(7).split(3)]
    joined = linear_eval.collect(batches, 7)
    assert torch.equal(joined["a"], x) and torch.equal(joined["b"], x[:, :1])
    batches[1][1]["a"][0, 0] = float("inf")
    with pytest.raises(SystemExit):
        linear_eval.collect(batches, 7)


@pytest.mark.parametrize("own, other", [("--data", None), (None, "--data d: missing")])
def test_what_one_process_lacks_ends_all(own, other, checkpoint, tmp_path, monkeypatch, capsys):
    """Two processes as one sees them: the other's message comes from all_gather_object."""

    def gathered(messages, message):
        messages[:] = [message, other]

    monkeypatch.setattr(linear_eval.dist, "all_gather_object", gathered)
    monkeypatch.setattr(linear_eval, "world_size", lambda: 2)
    options = ["--data", str(tmp_path / "none")] if own else []
    options += ["--out", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit) as error:
        linear_eval.main([str(checkpoint), *options])
    message = capsys.readouterr().err
    assert error.value.code == 2
    assert message.count("\n") == (1 if own else 0)  # the other speaks for itself
    if own:
        assert f"process 0 on {socket.gethostname()}: --data {tmp_path / 'none'}" in message
    assert not list(tmp_path.glob("r.json*"))


def picture(path, seed, size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Small data sets in the layouts of CLEVR, KITTI, Places205, iNaturalist 2018 as published."""
    root = tmp_path_factory.mktemp("study")
    golden = json.loads((GOLDEN / "clevr_labels.json").read_text())
    for split in ("train", "val"):
        file = root / f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(info={}, scenes=golden["scenes"])))
        for i, scene in enumerate(golden["scenes"]):
            picture(root / f"CLEVR_v1.0/images/{split}/{scene['image_filename']}", i)
    kitti = json.loads((GOLDEN / "kitti_labels.json").read_text())
    for name, text in kitti["files"].items():
        file = root / "KITTI/training/label_2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        picture(root / f"KITTI/training/image_2/{file.stem}.png", int(file.stem))
    rows = [
        ("a/abbey/1.jpg", 0),
        ("a/apartment_building/outdoor/2.jpg", 7),
        ("z/zen garden/3.jpg", 204),
    ]
    for split in ("train", "val"):
        file = root / f"Places/trainvalsplit_places205/{split}_places205.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{path} {label}\n" for path, label in rows))
    for i, (path, _) in enumerate(rows):
        picture(root / "Places/data/vision/torralba/deeplearning/images256" / path, i)
    for split, first in (("train", 0), ("val", 6)):
        names = [f"train_val2018/Aves/{i % 3 + 40}/{i}.jpg" for i in range(first, first + 6)]
        images = [dict(id=10 * i, file_name=name) for i, name in enumerate(names)]
        labels = [dict(image_id=10 * i, category_id=i % 3 + 40) for i in reversed(range(6))]
        for i, name in enumerate(names):
            picture(root / "iNat" / name, first + i)
        listing = json.dumps(dict(images=images, annotations=labels))
        (root / f"iNat/{split}2018.json").write_text(listing)
    return root


def test_the_studys_data_sets_are_read_as_published(study):
    golden = json.loads((GOLDEN / "clevr_labels.json").read_text())
    data = str(study / "CLEVR_v1.0")
    for target, name in (("count", "count_label"), ("dist", "dist_label")):
        task = linear_eval.open_task(data, target)
        assert (task.target, task.name) == (target, f"clevr-{target}")
        again = linear_eval.open_task(data, None, task.name)
        assert torch.equal(again.test.labels, task.test.labels)
        assert (again.target, again.name) == (task.target, task.name)
        expected = [row[name] for row in golden["expected"]]
        assert task.num_classes == max(expected) + 1
        for split in (task.train, task.test):
            assert split.labels[:, 0].tolist() == expected
            names = [scene["image_filename"] for scene in golden["scenes"]]
            assert [Path(path).name for path in split.images] == names
        assert "/images/train/" in task.train.images[0] and "/images/val/" in task.test.images[0]
    assert linear_eval.open_task(data, None).target == "count"
    with pytest.raises(linear_eval.Refusal, match="--target count: --task clevr-dist has dist"):
        linear_eval.open_task(data, "count", "clevr-dist")
    kitti = json.loads((GOLDEN / "kitti_labels.json").read_text())
    expected = {Path(row["file"]).stem: row["label"] for row in kitti["expected"]}
    task = linear_eval.open_task(str(study / "KITTI"), None)
    assert (task.target, task.name) == ("dist", "kitti-dist")
    assert (len(task.train.images), len(task.test.images)) == (16, 4)
    assert {Path(path).stem for path in task.train.images + task.test.images} == expected.keys()
    for split in (task.train, task.test):
        assert split.labels[:, 0].tolist() == [expected[Path(path).stem] for path in split.images]
    task = linear_eval.open_task(str(study / "iNat"), None)
    assert (task.target, task.name) == ("class", "inat18")
    assert task.num_classes == 43  # as in the lists, not by folders
    for split in (task.train, task.test):
        folders = [int(Path(path).parent.name) for path in split.images]
        assert folders == split.labels[:, 0].tolist()
    task = linear_eval.open_task(str(study / "Places"), None)
    assert task.num_classes == 205 and (task.target, task.name) == ("class", "places205")
    assert task.train.labels[:, 0].tolist() == [0, 7, 204]
    assert task.train.images[2].endswith("images256/z/zen garden/3.jpg")


@pytest.mark.parametrize(
    "data, target, epochs, augment",
    [
        ("CLEVR_v1.0", "count", 50, "flip"),
        ("CLEVR_v1.0", "dist", 100, "flip"),
        ("KITTI", "dist", 28, "crop"),
        ("Places", "class", 14, "crop"),
        ("iNat", "class", 84, "crop"),
    ],
)
def test_the_studys_data_sets_are_evaluated_by_vissls_recipes(
    data, target, epochs, augment, study, checkpoint, tmp_path
):
    options = ["--data", str(study / data), "--target", target, "--workers", "0"]
    options += ["--no-untrained", "--out", str(tmp_path / "r.json")]
    linear_eval.main([str(checkpoint), *options])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["task"] == f"{study / data} {target}" and report["epochs"] == epochs
    assert 0 <= report["top1"] <= 100 and len(report["heads"]) == 3 * 2 * 3
    assert report["augment"] == augment and report["batch_size"] == 256


def test_cifar100_is_flipped_and_its_val_is_the_test_set(checkpoint, tmp_path, monkeypatch):
    class Cifar:
        def __init__(self, root, train, download):
            rng = np.random.default_rng(train)
            self.targets = list(range(100)) * (2 if train else 1)
            self.data = rng.integers(256, size=(len(self.targets), 32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(sampler, "CIFAR100", Cifar)
    options = ["--data", "cifar100", "--epochs", "1", "--out", str(tmp_path / "r.json")]
    linear_eval.main([str(checkpoint), *options])
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["recipe"], report["augment"]) == ("cifar100", "flip")
    assert report["training_images"] == 180 and report["task"] == "cifar100 class"
    assert linear_eval.TASKS["cifar100"]["epochs"] == 28


def test_clevr_is_squashed_and_its_rate_falls_by_a_cosine(study, monkeypatch):
    images = linear_eval.open_task(str(study / "CLEVR_v1.0"), "count").train.images
    whole = linear_eval.Images(images, 16, "flip", True, 0)[None, [0]][0]
    assert whole.shape == (3, 16, 16)
    with Image.open(images[0]) as file:
        expected = np.asarray(file.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(whole.numpy().astype(int) - expected).max() <= 2
    schedule = {k: linear_eval.CLEVR[k] for k in ("cosine", "final", "warmup")}
    rates = [0.01 * linear_eval.rate_factor(e, 50, **schedule) for e in range(50)]
    curve = [1e-4 + (0.01 - 1e-4) * cosine(e / 50) for e in range(50)]
    np.testing.assert_allclose(rates, curve, rtol=1e-9)
    assert abs(rates[49] - 1.098e-4) < 1e-7  # VISSL's own at its last epoch


def test_wrong_layouts_of_the_studys_data_sets_are_refused(study, checkpoint, tmp_path, capsys):
    def refuse(data, *words):
        message = refused(capsys, str(checkpoint), "--data", str(data))
        assert all(str(word) in message for word in words), message

    (tmp_path / "clevr/scenes").mkdir(parents=True)
    refuse(tmp_path / "clevr", "clevr", "CLEVR_train_scenes.json")
    (tmp_path / "kitti/training/label_2").mkdir(parents=True)
    refuse(tmp_path / "kitti", "kitti", "no images of train")
    (tmp_path / "kitti/training/label_2/000000.txt").write_text("Car 0 0 0\n")
    refuse(tmp_path / "kitti", "kitti", "IndexError")
    lists = tmp_path / "places/trainvalsplit_places205"
    lists.mkdir(parents=True)
    (lists / "train_places205.csv").write_text("a/abbey/1.jpg 0\n")
    refuse(tmp_path / "places", "a/abbey/1.jpg is missing", "unpack")
    (lists / "train_places205.csv").write_text("a/abbey/1.jpg zero\n")
    refuse(tmp_path / "places", "places205", "ValueError")
    message = refused(capsys, str(checkpoint), "--data", str(study / "KITTI"), "--target", "count")
    assert "--target count" in message and "dist" in message


# ---- Released files: the official key layouts, built of timm's and torchvision's models


def jittered(model):
    """In evaluation mode, no weight at its initial 0 or 1, statistics as after training."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn_like(tensor)
            tensor.add_(noise.abs() if "running_var" in name else noise)
    return model.eval()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


VIT = dict(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3)
LAYOUTS = {
    "timm": lambda x: x,
    "msn": lambda x: {
        "target_encoder": prefixed(x | {"fc.fc1.weight": torch.ones(3, 3)}, "module."),
        "prototypes": torch.ones(4, 3),
        "epoch": 3,
    },
    "mae": lambda x: {
        "model": x | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.bias": torch.ones(8)}
    },
    "dino": lambda x: {
        "student": {},
        "teacher": prefixed(x, "backbone.") | {"head.mlp.0.weight": torch.ones(2, 2)},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_transformers_give_their_features(layout, tmp_path):
    theirs = jittered(timm.models.VisionTransformer(**VIT, num_classes=5))
    state = {k: x for k, x in theirs.state_dict().items() if layout == "timm" or "head" not in k}
    torch.save(LAYOUTS[layout](state), tmp_path / "released.pth")
    encoder = linear_eval.load_encoder(tmp_path / "released.pth")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found = linear_eval.features(encoder, images)
    with torch.no_grad():
        tokens = theirs.forward_features(linear_eval.normalise(images.float() / 255, False))
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
    control = linear_eval.new_encoder(encoder.options)  # the untrained one has the same sizes
    assert {k: x.shape for k, x in control.state_dict().items()} == {
        k: x.shape for k, x in encoder.state_dict().items()
    }


def test_a_released_data2vec_gives_its_features(tmp_path):
    options = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    theirs = jittered(timm.models.beit.Beit(**VIT, **options, num_classes=0, global_pool="token"))
    state = theirs.state_dict() | {"mask_token": torch.ones(1, 1, 192)}
    state |= {"lm_head.bias": torch.ones(192)}
    state["rel_pos_bias.relative_position_index"] = torch.ones(17, 17, dtype=torch.long)
    torch.save({"model": state}, tmp_path / "released.pth")
    encoder = linear_eval.load_encoder(tmp_path / "released.pth")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = theirs.forward_features(linear_eval.normalise(images.float() / 255, False))
    found = linear_eval.features(encoder, images)
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)


@functools.cache
def jittered_resnet(arch):
    return jittered(dict(resnet18=models.resnet18, resnet50=models.resnet50)[arch]())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("prefix", ["", "module.backbone.", "module.encoder."])
def test_released_resnets_give_their_features(arch, prefix, tmp_path):
    theirs = copy.deepcopy(jittered_resnet(arch))
    state = prefixed(theirs.state_dict(), prefix)
    state |= {"module.projector.0.weight": torch.ones(2, 2)} if prefix else {}
    torch.save({"model": state} if prefix else state, tmp_path / "released.pth")
    theirs.fc = torch.nn.Identity()
    encoder = linear_eval.load_encoder(tmp_path / "released.pth")
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(linear_eval.normalise(images.float() / 255, False))
    found = linear_eval.features(encoder, images)["pooled"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_keys_without_a_place_are_listed_and_data_must_be_given(tmp_path, capsys):
    state = timm.models.VisionTransformer(**VIT, num_classes=0).state_dict()
    torch.save(state | {"blocks.0.attn.q_norm": torch.ones(192)}, tmp_path / "normed.pth")
    assert "blocks.0.attn.q_norm" in refused(capsys, tmp_path / "normed.pth", "--data", "plates")
    missing = {name: x for name, x in state.items() if name != "norm.bias"}
    torch.save(missing, tmp_path / "missing.pth")
    assert "norm.bias" in refused(capsys, tmp_path / "missing.pth", "--data", "plates")
    torch.save(state, tmp_path / "whole.pth")
    assert "--data" in refused(capsys, tmp_path / "whole.pth")


def test_a_released_file_is_evaluated(study, tmp_path):
    state = timm.models.VisionTransformer(**VIT, num_classes=0).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    options = ["--data", str(study / "KITTI"), "--epochs", "2", "--workers", "0"]
    linear_eval.main([str(tmp_path / "vit.pth"), *options])
    report = json.loads((tmp_path / "linear_eval_KITTI_dist.json").read_text())
    assert report["step"] is None and len(report["untrained_heads"]) == 18
