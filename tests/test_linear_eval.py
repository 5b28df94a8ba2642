"""linear_eval.py: labels, features, heads and their choice, whole evaluations, bad input."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision.transforms import v2

import data2vec
import linear_eval
import mae
import msn
import sampler
import simclr
import vicreg

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("--dim", "16", "--depth", "2", "--heads", "2", "--hidden", "16", "--output", "8"),
    *("--num-prototypes", "16", "--stem", "8", "8", "8", "--patch-size", "4"),
]


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


# ---- Labels


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


# ---- Heads


def separable(n, classes=4, dim=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n, 1), generator=rng)
    centres = 3 * torch.eye(classes, dim)
    return centres[labels[:, 0]] + 0.3 * torch.randn(n, dim, generator=rng), labels


@pytest.fixture
def fit(checkpoint, tmp_path, monkeypatch):
    """Evaluate given features: a picture of two by two pixels is the number of its row in them."""

    def evaluate(features, labels, test_features, test_labels, classes, *options):
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
                classes=labels[:, 0],
            ),
            test=linear_eval.Split(test_images, test_labels, test_labels[:, 0]),
            num_classes=classes,
        )
        with monkeypatch.context() as patch:
            patch.setattr(linear_eval, "load_encoder", lambda *_: encoder)
            patch.setattr(linear_eval, "open_task", lambda *_: task)
            patch.setattr(linear_eval, "features", features_of)
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


def batches_of(x, labels, size, seed=5):
    """-> what train_heads asks for."""

    def batches(epoch):
        rng = torch.Generator().manual_seed(seed + epoch)
        for rows in torch.randperm(len(x), generator=rng).split(size):
            yield linear_eval.Examples({"x": x[rows]}, labels[rows])

    return batches


def test_heads_are_vissl_s():
    """Heads of three targets trained at once, against each alone, by an explicit loop: affine
    BatchNorm, which is not decayed, or none; Linear; SGD with Nesterov momentum; a tenth of the
    rate at 2/7, 4/7, 6/7 of the epochs."""
    x, first = separable(300)
    labels = torch.cat([first, (first + 1) % 4, first // 2], dim=1)
    recipe = linear_eval.TASKS["imagenet"] | dict(epochs=7, batch_size=128)
    made = [("batch", 0.05), ("batch", 0.2), ("none", 0.05), ("none", 0.2)]
    heads = torch.nn.ModuleList(linear_eval.Head("x", *kind, 8, 3, 4) for kind in made)
    alone = copy.deepcopy(heads)
    linear_eval.train_heads(heads, batches_of(x, labels, 128), 3, recipe)
    for head, trained, (norm, rate) in zip(alone, heads, made):
        parameters = [*head.linear.parameters(), *head.norm.parameters()]
        velocity = [torch.zeros_like(p) for p in parameters]
        for epoch in range(7):
            lr = rate * 128 / 256 * 0.1 ** sum(epoch >= m for m in (2, 4, 6))
            for batch in batches_of(x, labels, 128)(epoch):
                normed = batch.features["x"]
                if norm == "batch":
                    mean, deviation = normed.mean(0), normed.var(0, unbiased=False) + 1e-5
                    normed = (normed - mean) / deviation.sqrt() * head.norm.weight + head.norm.bias
                logits = normed @ head.linear.weight.T + head.linear.bias
                loss = F.cross_entropy(logits.view(-1, 4), batch.labels.flatten())
                for i, gradient in enumerate(torch.autograd.grad(loss, parameters)):
                    with torch.no_grad():
                        decay = 5e-4 * (i < 2)  # weight and bias, not the norm
                        gradient = gradient + decay * parameters[i]
                        velocity[i] = 0.9 * velocity[i] + gradient
                        parameters[i] -= lr * (gradient + 0.9 * velocity[i])
        for ours, expected in zip(trained.parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        if norm == "batch":
            assert trained.norm.num_batches_tracked == 7 * 3


def cosine(share):
    return (1 + np.cos(np.pi * share)) / 2


def test_linear_accuracy_equals_logistic_regression():
    """On the features of a random encoder of plates, standardised, at the same regularisation."""
    images, labels = sampler.draw_plates(4, seed=2)
    options = dict(script="msn", seed=0, data="plates", image_size=32, patch_size=4, dim=48)
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
    # A batch of 300 and a cosine, so that little of the noise of SGD is left at the end.
    recipe = linear_eval.TASKS["plates"] | dict(epochs=200, batch_size=300, cosine=True)
    head = linear_eval.Head("x", "none", 1.0, 48, 1, 10)
    batches = batches_of(x[:3000], digit[:3000], 300)
    linear_eval.train_heads(torch.nn.ModuleList([head]), batches, 10, recipe)
    tested = linear_eval.Examples({"x": x[3000:]}, digit[3000:])
    ours = linear_eval.percent(linear_eval.correct(head, tested)).item()
    assert expected > 20 and abs(ours - expected) <= 0.5
    weight = torch.from_numpy(theirs.coef_).float()
    found = head.linear.weight
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


def test_accuracy_of_each_class_is_a_part_of_the_whole(fit):
    x, labels = separable(400)
    test, test_labels = separable(150, seed=1)
    test[test_labels[:, 0] == 2] = x[labels[:, 0] == 1][0]  # class 2 looks like 1
    report = fit(dict(x=x), labels, dict(x=test), test_labels, 4, "--epochs", 8, "--batch-size", 32)
    assert report["class_sizes"] == labels[:, 0].bincount().tolist()
    assert report["top1_per_class"] == [100, 100, 0, 100]
    counts = test_labels[:, 0].bincount()
    assert report["top1"] == pytest.approx(100 - 100 * counts[2].item() / 150, abs=1e-4)


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
    train = linear_eval.Examples(dict(x=x), labels)
    tested = linear_eval.Examples(dict(x=test), test_labels)
    found = linear_eval.knn_accuracy(train, tested, "x", k=7, num_classes=3)
    assert found == pytest.approx(100 * right.mean() / 30, rel=1e-6)


def test_subsets_of_the_training_set():
    kinds = torch.cat([torch.full((n,), i) for i, n in enumerate((100, 40, 3))])
    kinds = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(1))]
    for choice, expected in {
        "0.1": [10, 4, 1],
        "5-per-class": [5, 5, 3],
        "1": [100, 40, 3],
    }.items():
        first, again, other = (linear_eval.subset(choice, kinds, s) for s in (0, 0, 1))
        assert kinds[first].bincount().tolist() == expected
        assert first.tolist() == sorted(set(first.tolist())) == again.tolist()
        assert torch.equal(first, other) == (choice == "1")


# ---- Images and features


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


def test_files_are_resized_by_8_7_and_cropped(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(90, 160, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = linear_eval.read_image(tmp_path / "a.png")
    expected = v2.functional.resize(whole, [64, 113])[:, 4:60, 28:84]  # of 64 x 113 the middle 56
    shown = linear_eval.Images([tmp_path / "a.png"], 56, "crop", False, 0)[None, [0]]
    assert shown.shape == (1, 3, 56, 56)
    assert torch.equal(shown[0], expected)


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
    own = msn.VisionTransformer(32, 4, 16, 2, 2, [8, 8, 8]).eval()  # msn.py's own network
    own.load_state_dict(before)
    torch.testing.assert_close(encoder(x), own(x), atol=1e-5, rtol=1e-5)


def test_encode_standardises_if_the_run_did(checkpoint):
    encoder = linear_eval.load_encoder(checkpoint)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    for standardise in (False, True):
        encoder.options["standardise"] = standardise
        x = linear_eval.normalise(images.float() / 255, standardise)
        torch.testing.assert_close(linear_eval.features(encoder, images)["cls"], encoder(x))


@pytest.mark.parametrize("script, arch", [(simclr, "small"), (vicreg, "resnet18")])
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
        sizes |= dict(stem=[48, 64, 96], patch_size=4, position_std=0.5)
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


# ---- Whole evaluations


@pytest.mark.parametrize("mode", [[], ["--cached"]])
def test_evaluates_a_folder(checkpoint, folder, tmp_path, capsys, mode):
    reports = []
    for name in ("a.json", "b.json"):
        options = "--epochs 5 --batch-size 16 --workers 0 --out".split() + [str(tmp_path / name)]
        linear_eval.main([str(checkpoint), *mode, *options, "--knn", "3"])
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_two_processes_equal_one(checkpoint, folder, tmp_path, capsys):
    """The file with sampler.py, in an empty folder; shares of the batches are never even."""
    for name in ("linear_eval.py", "sampler.py"):
        shutil.copy(ROOT / name, tmp_path)
    options = [str(checkpoint), "--train-fraction", "0.99", "--epochs", "2", "--batch-size", "21"]
    options += ["--workers", "0", "--knn", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "linear_eval.py"), *options, "--out", "two.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("untrained") == 1
    linear_eval.main([*options, "--out", str(tmp_path / "one.json")])
    two = json.loads((tmp_path / "two.json").read_text())
    assert json.loads((tmp_path / "one.json").read_text()) == two


def test_processes_share_a_batch(monkeypatch):
    batch = torch.tensor([5, 7, 9, 4, 2])
    shares = []
    for process in range(4):
        monkeypatch.setattr(linear_eval, "rank", lambda process=process: process)
        monkeypatch.setattr(linear_eval, "world_size", lambda: 4)
        shares.append(linear_eval.own_share(batch).tolist())
    assert shares == [[5, 7], [9, 4], [2, 2], [2, 2]]  # joined and cut to five: the batch


def test_a_stopped_evaluation_goes_on(checkpoint, folder, tmp_path, monkeypatch):
    def start(name):
        options = "--epochs 4 --batch-size 16 --workers 0 --no-untrained --out".split()
        linear_eval.main([str(checkpoint), *options, str(tmp_path / name), *more])
        return json.loads((tmp_path / name).read_text())

    more = []
    whole = start("whole.json")
    factor = linear_eval.rate_factor
    epochs = []
    stops = True

    def spied(epoch, *rest):
        epochs.append(epoch)
        if epoch == 2 and stops:
            raise KeyboardInterrupt
        return factor(epoch, *rest)

    monkeypatch.setattr(linear_eval, "rate_factor", spied)
    for seed, first in (("0", 2), ("1", 0)):  # the second is another evaluation
        stops = True
        more = []
        with pytest.raises(KeyboardInterrupt):
            start("part.json")
        assert {path.name for path in tmp_path.glob("part*")} == {"part.json.heads"}
        stops = False
        epochs.clear()
        more = ["--seed", seed]
        report = start("part.json")
        assert min(epochs) == first and (report == whole) == (seed == "0")
        assert {path.name for path in tmp_path.glob("part*")} == {"part.json"}
        (tmp_path / "part.json").unlink()


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


def test_each_report_has_a_name_of_its_own(checkpoint, folder, tmp_path, monkeypatch):
    """Data and target; the file's name, if it is not checkpoint.pt; a fraction."""
    task = linear_eval.open_task(str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))

    def name(*line):
        path = linear_eval.report_file(task, linear_eval.parse_args(list(line)))
        assert path.parent == tmp_path
        return path.name

    end = f"{folder.name}_class"
    assert name(f"{tmp_path}/checkpoint.pt") == f"linear_eval_{end}.json"
    assert name(f"{tmp_path}/vits16.pth") == f"linear_eval_vits16_{end}.json"
    few = "--train-fraction", "5-per-class"
    assert name(f"{tmp_path}/checkpoint.pt", *few) == f"linear_eval_{end}_5-per-class.json"
    assert name(f"{tmp_path}/v.pth", *few) == f"linear_eval_v_{end}_5-per-class.json"
    assert name("x.pth", "--out=~/y.json") == "y.json"
    assert linear_eval.parse_args(["x.pth", "--data", "~/z"]).data == f"{tmp_path}/z"


def test_it_runs_without_docstrings(monkeypatch):
    monkeypatch.setattr(linear_eval, "__doc__", None)  # as python -OO does
    assert linear_eval.parse_args(["checkpoint.pt"]).knn == 0


def test_plates_targets(few_plates):
    for target, shape in dict(digits=3, number=1, count=1, size=1).items():
        task = linear_eval.open_task("plates", target)
        assert torch.equal(task.train.classes, torch.arange(1000).repeat_interleave(2))
        assert (len(task.train.images), len(task.test.images)) == (2000, 2000)
        assert task.train.labels.shape == (2000, shape)
        assert task.num_classes == dict(digits=10, number=1000, count=4, size=3)[target]
        assert (task.target, task.name) == (target, "plates")
    assert linear_eval.open_task("plates", None).target == "digits"


# ---- Bad input


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
    assert "foreign.pt: no encoder" in refused(capsys, tmp_path / "foreign.pt")
    assert "missing" in refused(capsys, checkpoint, "--data", tmp_path / "missing")
    assert "train/CLASS" in refused(capsys, checkpoint, "--data", tmp_path / "empty")
    message = refused(capsys, checkpoint, "--target", "digits")
    assert "--target digits" in message and "choose one of class" in message
    assert "not writable" in refused(capsys, checkpoint, "--out", checkpoint / "x.json")
    assert "a folder" in refused(capsys, checkpoint, "--out", tmp_path / "empty")
    for option, value in (("--epochs", 0), ("--rates", 0), ("--batch-size", 1), ("--knn", -1)):
        assert f"{option}: {value}: give a number at least" in refused(
            capsys, checkpoint, option, value
        )
    assert "unrecognized" in refused(capsys, checkpoint, "--nonsense")
    for choice in ("0", "1.5", "-0.1", "x-per-class", "0-per-class", tmp_path / "no_list"):
        message = refused(capsys, checkpoint, f"--train-fraction={choice}")
        assert f"--train-fraction: {choice}: give a share" in message
    assert "--target dist" in refused(capsys, checkpoint, "--task", "kitti-dist")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("part, name", [("", "step"), ("options", "seed"), ("options", "stem")])
def test_incomplete_checkpoints(checkpoint, tmp_path, capsys, part, name):
    state = torch.load(checkpoint, weights_only=True)
    del (state[part] if part else state)[name]
    torch.save(state, tmp_path / "less.pt")
    assert "less.pt: no encoder that is built here" in refused(capsys, tmp_path / "less.pt")


def test_diverged_encoder(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["encoder"]["cls_token"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    assert "not finite" in refused(capsys, tmp_path / "nan.pt", "--workers", 0)


def test_bad_folders(checkpoint, folder, tmp_path, capsys):
    root = tmp_path / "data"
    options = ["--data", root, "--workers", 0, "--epochs", 1, "--out", tmp_path / "r.json"]
    for name in ("train/K\u00fcken", "train/b", "val/Ku\u0308ken", "val/c"):
        picture(root / name / "1.png", 0)
    message = refused(capsys, checkpoint, *options)
    assert "val is not sorted into the classes of train: b is not in both" in message
    (root / "val/c").rename(root / "val/b")
    linear_eval.main([str(checkpoint), *map(str, options)])  # one class name in two forms
    (tmp_path / "r.json").unlink()
    (root / "train/b/2.png").write_bytes(b"not a picture")
    for workers in (0, 1):
        message = refused(capsys, checkpoint, *options, "--workers", workers)
        assert f"{root / 'train/b/2.png'}: unreadable" in message
    assert not list(tmp_path.glob("r.json*"))
    shutil.rmtree(root / "val")
    picture(root / "val/images/1.png", 0)  # Tiny ImageNet, as unpacked
    assert "val is not sorted into the classes" in refused(capsys, checkpoint, *options)
    shutil.rmtree(root / "val")
    assert f"{root / 'val'}/CLASS/IMAGE" in refused(capsys, checkpoint, *options)


def test_the_report_is_written_before_it_is_printed(checkpoint, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(linear_eval, "print_report", broken)
    options = ["--workers", "0", "--epochs", "1", "--cached", "--out", f"{tmp_path}/r.json"]
    with pytest.raises(BrokenPipeError):
        linear_eval.main([str(checkpoint), *options])
    assert json.loads((tmp_path / "r.json").read_text())["heads"]


def picture(path, seed, size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


# ---- The study's data sets


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
    assert linear_eval.CLEVR["cosine"]
    rates = [0.01 * linear_eval.rate_factor(e, 50, cosine=True) for e in range(50)]
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
    (lists / "train_places205.csv").write_text("a/abbey/1.jpg zero\n")
    refuse(tmp_path / "places", "places205", "ValueError")
    message = refused(capsys, str(checkpoint), "--data", str(study / "KITTI"), "--target", "count")
    assert "--target count" in message and "dist" in message
