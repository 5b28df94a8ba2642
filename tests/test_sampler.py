"""sampler.py: what batches hold over a whole run, bad input, plates, tails, folders, the prior."""

import itertools
import json
import math
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sampler import (
    KClassBatchSampler,
    draw_plates,
    long_tail,
    long_tailed_sizes,
    open_data,
    power_law_prior,
)

ROOT = Path(__file__).parent.parent


def labels_of(sizes, seed=0):
    """Shuffled labels, sizes[c] of class c."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def epoch_of(labels, batch_size, k_classes=None, *, epoch=0, **options):
    """The batches of one epoch, by a sampler that begins there."""
    batches = KClassBatchSampler(labels, batch_size, k_classes, **options)
    batches.set_epoch(epoch)
    return list(batches)


def joined_parts(labels, batch_size, k_classes=None, *, world_size, **options):
    """The batches of an epoch, put together from what each process gets."""
    parts = [
        epoch_of(labels, batch_size, k_classes, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return [list(itertools.chain(*cuts)) for cuts in zip(*parts, strict=True)]


def sequence_of(labels, batch_size, k_classes, epochs, seed=0):
    """The batches of all epochs, one after another, by one sampler."""
    batches = KClassBatchSampler(labels, batch_size, k_classes, seed=seed)
    sequence = []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        sequence += batches
    return sequence


# ---- 1. What holds at every batch of a run
def audit(labels, batch_size, k_classes, batches):
    """Count, image by image, whether batches keep what the docstring of the class promises."""
    images_of = defaultdict(list)
    for image, label in enumerate(labels):
        images_of[label].append(image)
    larger = math.ceil(batch_size / k_classes)
    dealt = dict.fromkeys(images_of, 0)
    seen = Counter()
    for batch in batches:
        assert len(batch) == batch_size
        in_batch = Counter(batch)
        shares = Counter(labels[image] for image in batch)
        assert len(shares) == k_classes
        seen.update(batch)
        for label, share in shares.items():
            images = images_of[label]
            assert share in (batch_size // k_classes, larger)
            dealt[label] += share
            # Once where the class has images enough, else as evenly as whole numbers can be.
            assert max(in_batch[image] for image in images) <= math.ceil(share / len(images))
            times = [seen[image] for image in images]
            assert max(times) - min(times) <= 1
        assert max(dealt.values()) - min(dealt.values()) <= larger


def random_case(rng):
    """Labels with gaps, of few or many classes, equal or not; batch, of which an epoch has about
    ten at most; K; processes, which share the batch; seed."""
    classes = rng.integers(1, rng.choice([3, 8, 25]), endpoint=True)
    largest = rng.choice([1, 3, 9, 30, 300], p=[0.1, 0.2, 0.3, 0.25, 0.15])
    sizes = rng.integers(1, largest, size=classes, endpoint=True)
    if rng.random() < 0.3:
        sizes = np.maximum(largest // np.arange(1, classes + 1), 1)  # a long tail
    names = rng.choice(2**40, size=classes, replace=False) - 2**39
    labels = names[labels_of(sizes, rng.integers(1000))]
    world_size = int(rng.integers(1, min(8, len(labels)), endpoint=True))
    images_each = len(labels) // world_size
    batch_size = world_size * max(images_each // int(rng.integers(1, 11)), 1)
    k_classes = int(rng.integers(1, min(batch_size, classes), endpoint=True))
    return labels.tolist(), batch_size, k_classes, world_size, int(rng.integers(10**6))


@pytest.mark.parametrize("block", range(4))
def test_what_holds_over_three_epochs(block):
    """500 data sets at random: everything at every batch, from any epoch on, for all processes."""
    rng = np.random.default_rng([block, 2026])
    for _ in range(500):
        labels, batch_size, k_classes, world_size, seed = random_case(rng)
        batches = sequence_of(labels, batch_size, k_classes, 3, seed)
        length = len(labels) // batch_size
        assert len(batches) == 3 * length
        audit(labels, batch_size, k_classes, batches)
        epoch = int(rng.integers(3))
        piece = batches[epoch * length : (epoch + 1) * length]
        options = dict(world_size=world_size, epoch=epoch, seed=seed)
        assert joined_parts(labels, batch_size, k_classes, **options) == piece


def test_the_audit_finds_what_is_wrong():
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    right = [[0, 3], [6, 1], [4, 7]]
    audit(labels, 2, 2, right)
    for wrong in (
        [[0, 3], [6]],  # an image is missing
        [[0, 1], [3, 6]],  # one class
        [[0, 3], [1, 4]],  # class 2 waits
        [[0, 3], [6, 0]],  # image 0 comes again too early
    ):
        with pytest.raises(AssertionError):
            audit(labels, 2, 2, wrong)
    with pytest.raises(AssertionError):
        audit(labels, 6, 2, [[0, 1, 1, 3, 4, 5]])  # an image twice in a batch
    with pytest.raises(AssertionError):
        audit(labels, 6, 2, [[0, 1, 3, 4, 5, 3]])  # shares of 2 and 4


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_plain_shuffling(world_size):
    """Every image at most once in an epoch, shares that partition the batch, every image as often
    in the first batch and in the part that is left out."""
    labels = labels_of([7] * 15)
    assert len(KClassBatchSampler(labels, 16)) == 6
    counts = np.zeros((2, 105), int)
    for epoch in range(1000 // world_size):
        whole = epoch_of(labels, 16, epoch=epoch, seed=3)
        assert len(set(itertools.chain(*whole))) == 96
        assert joined_parts(labels, 16, world_size=world_size, epoch=epoch, seed=3) == whole
        counts[0, whole[0]] += 1
        counts[1, list(itertools.chain(*whole))] += 1
    for count, rate in zip(counts, (16 / 105, 96 / 105)):
        sigma = math.sqrt(rate * (1 - rate) / (epoch + 1))
        assert abs(count / (epoch + 1) - rate).max() < 5 * sigma


# ---- 2. One endless sequence
@pytest.mark.parametrize("k_classes", [None, 4])
def test_batches_follow_from_seed_and_number_alone(k_classes):
    labels = labels_of([20] * 10)
    fresh = [epoch_of(labels, 16, k_classes, seed=3, epoch=e) for e in range(4)]
    batches = KClassBatchSampler(labels, 16, k_classes, seed=3)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert len(batches) == 12
    assert list(batches) == fresh[0] == list(batches)  # without set_epoch: epoch 0, each time
    list(itertools.islice(batches, 5))  # a run that was stopped here
    for epoch in (2, 0, 3, 3, 1):  # onwards, back, again
        batches.set_epoch(epoch)
        assert list(batches) == fresh[epoch]
        assert list(itertools.islice(batches, 7, None)) == fresh[epoch][7:]  # it continues
    assert list(zip(batches, batches, strict=True)) == [(b, b) for b in fresh[1]]
    early = iter(batches)
    begun = [next(early), next(early)]
    batches.set_epoch(3)
    assert list(batches) == fresh[3]
    assert begun + list(early) == fresh[1]  # another iteration in between changes nothing
    assert state == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    np.random.seed(1)
    torch.manual_seed(1)
    assert list(batches) == fresh[3]


def test_epochs_seeds_and_k_differ():
    labels = labels_of([20] * 10)
    runs = list(itertools.product([None, 3, 4], range(5), range(5)))  # (0, 1) is not (1, 0) either
    first = [epoch_of(labels, 16, k, seed=s, epoch=e)[0] for k, s, e in runs]
    assert len({frozenset(batch) for batch in first}) == len(runs)


# ---- 3. What is left to chance
SEEDS = 1500


def assert_rates(counts, rate):
    """counts (seeds, items), independent: every item's mean is `rate`, to 5 sigma."""
    error = np.abs(counts.mean(axis=0) - rate)
    sigma = np.sqrt(counts.var(axis=0).mean() / len(counts))  # items are alike: one variance
    assert error.max() <= 5 * sigma + 1e-9, f"{error.max() / max(sigma, 1e-9):.1f} sigma"


def times_drawn(batches, items):
    """How often each of `items` numbers is in each batch: (..., batch size) -> (..., items)."""
    flat = batches.reshape(-1, batches.shape[-1])
    flat = flat + items * np.arange(len(flat))[:, None]  # one range of numbers for each row
    counts = np.bincount(flat.ravel(), minlength=items * len(flat))
    return counts.reshape(*batches.shape[:-1], items)


def test_larger_shares_and_company_are_random():
    labels = labels_of([10] * 8)  # batches of 10 with 4 of 8 classes: 3 + 3 + 2 + 2 images
    batches = np.array([epoch_of(labels, 10, 4, seed=seed) for seed in range(SEEDS)])
    counts = times_drawn(labels[batches], 8)
    present = 1.0 * (counts > 0)
    larger = 1.0 * (counts == 3)
    for batch in range(8):
        assert_rates(present[:, batch], 4 / 8)
        assert_rates(larger[:, batch], 2 / 8)
    first, second = np.triu_indices(8, k=1)
    assert_rates(present[:, 0, first] * present[:, 0, second], 4 * 3 / (8 * 7))
    assert_rates(larger[:, 0, first] * larger[:, 0, second], 2 * 1 / (8 * 7))
    assert_rates(labels[batches[:, 0]], 3.5)  # no place in the batch prefers a class
    assert_rates((batches == 7).sum(axis=(1, 2))[:, None], 1)  # 80 places for 80 images


def test_company_and_decks_are_shuffled_anew():
    equal = labels_of([10] * 8)  # 4 of 8 classes, then the other 4, then 4 again
    batches = np.array([epoch_of(equal, 8, 4, seed=seed) for seed in range(SEEDS)])
    present = times_drawn(equal[batches], 8) > 0
    met = (present[:, 0] & present[:, 2]).sum(axis=1)
    assert_rates(met[:, None], 2)
    assert_rates((met[:, None] - 2) ** 2, 4 / 7)  # hypergeometric: as if batch 0 were forgotten

    labels = labels_of([5, 27])  # every batch has 2 of the 5 images a..e of class 0
    batches = np.array([epoch_of(labels, 4, 2, seed=seed) for seed in range(SEEDS)])
    drawn = times_drawn(batches, 32)[:, :, labels == 0]
    overlaps = drawn @ drawn.transpose(0, 2, 1)  # (seeds, 8, 8), images that two batches share
    means = np.zeros((8, 8))
    # Batches 0 to 4: ab, cd, ex, then two that share what is not x; x is any of a..d.
    means[2] = 0.5, 0.5, 2, 0.5, 0.5, 0.8, 0.8, 0.8
    means[3] = 0.75, 0.75, 0.5, 2, 0, 0.8, 0.8, 0.8
    means[5, :5] = 0.8  # after these ten cards all is forgotten: 2 of 5 meet 2 of 5 in 2 * 2 / 5
    for batch, others in ((2, range(8)), (3, range(8)), (5, range(5))):
        for other in others:
            assert_rates(overlaps[:, batch, [other]], means[batch, other])


def test_a_process_gets_a_random_part_of_the_batch():
    labels = labels_of([500] * 16)
    cuts = np.concatenate(
        [labels[epoch_of(labels, 64, 8, rank=rank, world_size=4)] for rank in range(4)]
    )  # (batches, 16): 16 of 64 images, of which 8 classes have 8 each
    classes = np.array([len(set(cut)) for cut in cuts])
    expected = 8 * (1 - math.comb(56, 16) / math.comb(64, 16))  # 7.3; 2 if cut by class
    assert abs(classes.mean() - expected) < 5 * classes.std() / np.sqrt(len(cuts))


# ---- 4. What a run is told
@pytest.mark.parametrize("k_classes", [2, 8, 20, 32, 128, 960])
def test_the_table_of_docs(k_classes):
    """As many updates as a run of plates has, seed 0."""
    batches = sequence_of(np.arange(150_000) // 150, 1024, k_classes, epochs=3)[:292]
    images = np.bincount(np.concatenate(batches), minlength=150_000)
    classes = images.reshape(1000, 150).sum(axis=1)
    repeated = max(1024 - len(set(batch)) for batch in batches)
    row = (
        f"| {k_classes} | {(classes == 0).sum()} | {(images == 0).sum():,} | "
        f"{classes.min()}–{classes.max()} | {images.min()}–{images.max()} | {repeated} |"
    )
    assert row in (ROOT / "docs/sampler.md").read_text().splitlines()


def test_the_picture_of_docs():
    """32 plates of a batch of 8 classes beside 32 of a batch of 960."""
    numbers = torch.arange(150_000) // 150
    few, many = (numbers[pictures.some_of_a_batch(numbers, k)].unique() for k in (8, 960))
    assert len(few) == 8 and len(many) >= 28
    path = ROOT / "docs/batches.png"
    there = np.asarray(Image.open(path), dtype=float)
    made = pictures.pixels(pictures.draw_batches()).astype(float)
    assert path.stat().st_size < 60_000 and there.shape == made.shape == (225, 800)
    assert np.abs(made - there).mean() < 6  # levels of 16 among 256


def test_describe():
    def text(sizes, batch_size, k_classes, batches):
        return KClassBatchSampler(labels_of(sizes), batch_size, k_classes).describe(batches)

    plates = "150,000 images of 1,000 classes; batches of 1,024, "
    assert text([150] * 1000, 1024, 8, 292) == f"{plates}K = 8: a class is in 2.3 of 292 batches"
    assert text([150] * 1000, 1024, None, 292) == f"{plates}any classes"
    few = text([150] * 1000, 1024, 8, 124)  # 992 visits
    assert few.endswith("a class is in 1.0 of 124 batches (warning: some are never reached)")
    assert "warning" not in text([150] * 1000, 1024, 8, 125)
    assert "warning" not in text([150] * 1000, 1050, 7, 292)  # 150 each
    twice = text([150] * 1000, 1051, 7, 292)  # 151 of one
    assert twice.endswith("(warning: 151 images of a class each: those of small ones come twice)")
    both = text([10] * 9 + [1], 4, 2, 4)
    assert "10 to 1 each" in both and both.count("(warning: ") == 2

    labels = np.repeat(np.arange(1000), 50)
    kept = labels[long_tail(labels, 1.0, seed=0)]
    shown = KClassBatchSampler(kept, 100).describe(10)
    law = "1,173 images of 1,000 classes, 50 to 1 each, about as rank^-0.18; "
    assert shown == law + "batches of 100, any classes"


# ---- 5. Forms of labels, bad input
def test_forms_of_labels():
    labels = labels_of([9] * 7)
    expected = epoch_of(labels, 10, 4)
    forms = [labels.tolist(), tuple(labels.tolist()), list(labels), labels.repeat(2)[::2]]
    forms += [labels.astype(kind) for kind in (np.int8, np.uint8, np.uint16, np.int32, np.uint64)]
    forms += [torch.tensor(labels, dtype=kind) for kind in (torch.int64, torch.int32, torch.uint8)]
    forms.append(np.array([-(2**40), -5, 0, 7, 300, 999, 10**12])[labels])  # with gaps
    for form in forms:
        frozen = form.copy() if isinstance(form, np.ndarray) else form
        if frozen is not form:
            frozen.flags.writeable = False  # labels are only read
        assert epoch_of(frozen, 10, 4) == expected
    for k_classes in (None, 4):  # what a DataLoader wants
        for batch in KClassBatchSampler(labels, 10, k_classes):
            assert type(batch) is list and [type(index) for index in batch] == [int] * 10


BAD = {
    "more classes than there are": (dict(k_classes=11), "11 10"),
    "more classes than images": (dict(batch_size=6, k_classes=8), "8 6"),
    "no class": (dict(k_classes=0), "0 1 10"),
    "not divisible": (dict(batch_size=30, world_size=8), "30 8 multiple 24"),
    "fewer images than processes": (dict(batch_size=3, world_size=8), "3 8 multiple"),
    "empty batch": (dict(batch_size=0), "0 1"),
    "batch larger than the data": (dict(batch_size=128), "100 batch most"),
    "rank too large": (dict(rank=4, world_size=4), "rank 4 0 3"),
    "rank negative": (dict(rank=-1, world_size=4), "rank -1 0 3"),
    "float labels": (dict(labels=np.arange(100) / 10), "float64 integers"),
    "labels in columns": (dict(labels=np.zeros((100, 2), int)), "integers (100, 2)"),
}


@pytest.mark.parametrize("options, words", BAD.values(), ids=BAD.keys())
def test_bad_input(options, words):
    options = dict(labels=np.arange(100) % 10, batch_size=20) | options
    with pytest.raises(ValueError) as error:
        KClassBatchSampler(**options)
    text = str(error.value)
    assert "\n" not in text
    for word in words.split():
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", text), f"{word} is not in: {text}"


# ---- 6. Plates
def test_plates_are_drawn_in_seconds():
    start = time.process_time()  # threads that wait count too
    draw_plates(15, seed=0)
    assert time.process_time() - start < 2  # 0.4 s alone, for a tenth of the training set


@pytest.mark.parametrize("split, each", [("train", 150), ("val", 10)])
def test_sets_of_plates(split, each):
    images, labels = open_data("plates", split)
    N = 1000 * each
    assert images.shape == (N, 1, 32, 32) and images.dtype == torch.uint8
    assert list(labels) == ["number", "digits", "count", "size"]  # the class first
    assert torch.equal(labels["number"], torch.arange(1000).repeat_interleave(each))
    assert torch.equal(labels["digits"] @ torch.tensor([100, 10, 1]), labels["number"])
    assert labels["digits"].shape == (N, 3)
    assert labels["digits"].min() == 0 and labels["digits"].max() == 9
    for bins, name in ((4, "count"), (3, "size")):  # near uniform: 5 standard deviations
        share = labels[name].bincount(minlength=bins) / N
        assert len(share) == bins and (share - 1 / bins).abs().max() < 5 * (0.25 / N) ** 0.5


def test_plates_follow_from_their_seed_and_number():
    state = torch.get_rng_state()
    images, labels = draw_plates(2, seed=3)
    again, same = draw_plates([2] * 1000, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # numbers of its own
    assert torch.equal(images, again)
    assert all(torch.equal(labels[name], same[name]) for name in labels)
    other, _ = draw_plates(2, seed=4)
    assert (images.int() - other.int()).abs().float().mean() > 20
    sizes = np.array([3] + [1] * 998 + [5])
    images, labels = draw_plates(sizes, seed=3)
    assert len(images) == 1006 and labels["number"].bincount().tolist() == sizes.tolist()


def inked(images):
    """Marks (N, 1024) in [0, 1], the number's ink 1, discs fainter; and where the ink is."""
    pixels = images[:, 0].float()
    ground = pixels.flatten(1).mode(dim=1).values.view(-1, 1, 1)
    marks = (pixels - ground).abs().flatten(1)
    marks = marks / marks.amax(dim=1, keepdim=True)
    return marks, (marks > 0.6).float()


def test_plates_show_their_labels():
    plates, _ = open_data("plates", "train")
    part = torch.arange(150_000) % 150 < 18  # of each class; all would take longer
    means = inked(plates[part])[1].view(1000, 18, -1).mean(dim=1)
    images, labels = open_data("plates", "val")
    marks, ink = inked(images)
    guess = F.normalize(ink) @ F.normalize(means).T
    assert (guess.argmax(dim=1) == labels["number"]).float().mean() > 0.1  # chance: 0.001
    faint = ((marks > 0.05) & (marks < 0.4)).float().mean(dim=1)
    by_count = torch.stack([faint[labels["count"] == count].mean() for count in range(4)])
    assert (by_count.diff() > 0.01).all()
    columns = torch.arange(1024) % 32
    spread = (ink * (columns - 15.5).square()).sum(1) / ink.sum(1)
    by_size = torch.stack([spread[labels["size"] == size].mean() for size in range(3)])
    assert (by_size.diff() > 0.5).all()


# ---- 7. Long tails
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_long_tail_of_plates_is_a_power_law(exponent):
    runs = [long_tailed_sizes(exponent, seed) for seed in range(10)]
    in_order = np.sort(runs[0])[::-1]
    assert in_order.sum() == 150_000 and in_order[-1] >= 10
    slope = np.polyfit(np.log(np.arange(1, 1001)), np.log(in_order), deg=1)[0]
    assert abs(slope + exponent) < 0.02
    assert np.array_equal(long_tailed_sizes(exponent, seed=0), runs[0])
    for sizes in runs:
        assert np.array_equal(np.sort(sizes)[::-1], in_order)
        first_digit = np.arange(1000) // 100
        assert abs(np.corrcoef(first_digit, np.log(sizes))[0, 1]) < 0.16  # 5 standard deviations
    assert len({sizes.argmax() for sizes in runs}) > 5  # the most frequent class


def test_a_steep_tail_of_plates_keeps_ten_of_each():
    for exponent in (1.5, 2, 9, 400):
        sizes = long_tailed_sizes(exponent, seed=0)
        assert sizes.sum() == 150_000 and sizes.min() == 10


def test_open_data_cuts_the_training_set(monkeypatch, tmp_path):
    monkeypatch.setattr("sampler.draw_plates", lambda per_class, seed: (per_class, seed))
    assert open_data("plates", "train") == (150, 0)
    assert open_data("plates", "val", tail=1.0, seed=5) == (10, 1)
    sizes, seed = open_data("plates", "train", tail=1.0, seed=5)
    assert seed == 0 and sizes.tolist() == long_tailed_sizes(1.0, 5).tolist()

    make_files(tmp_path, *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(12)))
    whole, _ = open_data(str(tmp_path), "train")
    paths, labels = open_data(str(tmp_path), "train", tail=1.0, seed=5)
    assert labels["class"].tolist() == [0] * 6 + [1] * 3
    assert [path for path in whole if path in paths] == paths


def test_long_tail_keeps_a_power_of_the_rank():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    for exponent, expected in (
        (0.0, [100] * 10),
        (1.0, [100, 50, 33, 25, 20, 17, 14, 12, 11, 10]),
        (0.5, [100, 71, 58, 50, 45, 41, 38, 35, 33, 32]),
        (9.0, [100] + [1] * 9),  # at least one
    ):
        kept = long_tail(labels, exponent, seed=0)
        assert np.bincount(labels[kept]).tolist() == expected
        assert kept.tolist() == sorted(set(kept.tolist()))
        steeper = long_tail(labels.tolist(), exponent + 0.5, seed=0)
        assert set(steeper.tolist()) <= set(kept.tolist())  # of each class the same come first
    first, again, other = (long_tail(labels, 1.0, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert set(first.tolist()) != set(other.tolist())


# ---- 8. CIFAR and folders
def make_files(root, *names):
    """Empty ones: open_data looks at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize("data, name", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_is_one_tensor(data, name, monkeypatch):
    class Published:
        def __init__(self, root, train, download):
            assert root == "data" and download
            self.data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3) + train
            self.targets = [3, 1, 2, 3]

    monkeypatch.setattr(f"sampler.{name}", Published)
    for split in ("train", "val"):
        images, labels = open_data(data, split)
        assert images.dtype == torch.uint8 and images.shape == (4, 3, 32, 32)
        expected = Published("data", split == "train", True).data
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
        assert {k: x.tolist() for k, x in labels.items()} == {"class": [3, 1, 2, 3]}
    images, labels = open_data(data, "train", tail=1.0)
    assert images.shape == (3, 3, 32, 32) and sorted(labels["class"].tolist()) == [1, 2, 3]

    def unreachable(*_, **__):
        raise RuntimeError("no network\nsecond line")

    monkeypatch.setattr(f"sampler.{name}", unreachable)
    expected = rf"{data}: needs a download or ./data \(RuntimeError: no network\)"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        open_data(data, "train")


def test_folders_and_listings_are_read(tmp_path, capsys):
    make_files(tmp_path, "train/b/2.png", "train/a/1.png", "train/b/x/10.png")
    make_files(tmp_path, "val/a/0.png", "val/c/0.png")
    paths, labels = open_data(str(tmp_path), "train")
    in_order = ["train/a/1.png", "train/b/2.png", "train/b/x/10.png"]
    assert paths == [str(tmp_path / name) for name in in_order] and capsys.readouterr().out == ""
    assert {k: x.tolist() for k, x in labels.items()} == {"class": [0, 1, 1]}
    assert open_data(str(tmp_path), "val")[1]["class"].tolist() == [0, 1]
    listing = dict(  # iNaturalist's: images in any order, and annotations in another
        images=[dict(id=7, file_name="train/b/2.png"), dict(id=5, file_name="train/a/1.png")],
        annotations=[dict(image_id=5, category_id=40), dict(image_id=7, category_id=2)],
    )
    (tmp_path / "train2018.json").write_text(json.dumps(listing))
    paths, labels = open_data(str(tmp_path), "train")
    assert paths == [str(tmp_path / name) for name in ("train/b/2.png", "train/a/1.png")]
    assert labels["class"].tolist() == [2, 40]
    assert len(open_data(str(tmp_path), "val")[0]) == 2  # only what is listed is read from a list


def test_all_that_pillow_reads_is_an_image(tmp_path, capsys, monkeypatch):
    """What else lies there is counted, in a line of the first process."""
    endings = [".jpg", ".JPEG", ".jfif", ".jpe", ".mpo", ".gif", ".webp", ".bmp", ".tiff", ".ppm"]
    if ".avif" in Image.registered_extensions():
        endings.append(".avif")
    names = [f"train/class/picture{ending}" for ending in endings]
    others = ["notes.txt", "report.pdf", "film.mp4", "no_ending", ".hidden.jpg", ".folder/a.jpg"]
    make_files(tmp_path, *names, *(f"train/class/{name}" for name in others), "train/a.jpg")
    paths, labels = open_data(str(tmp_path), "train")
    assert sorted(paths) == sorted(str(tmp_path / name) for name in names)
    assert labels["class"].tolist() == [0] * len(endings)
    monkeypatch.setenv("RANK", "1")
    open_data(str(tmp_path), "train")
    assert capsys.readouterr().out == f"{tmp_path}/train: 7 other files are left out\n"


BAD_FOLDERS = {  # files, and words of the error
    "missing": ([], "FileNotFoundError"),
    "a file": (["train"], "NotADirectoryError"),
    "no classes": (["train/picture.png"], "find any class folder"),
    "empty classes": (["train/b/a.txt", "train/a/.1.png"], "for the classes a, b"),
    "hidden class": (["train/.a/1.png", "train/b/1.png"], "for the classes .a"),
}


def refused(data):
    """What open_data says to a folder."""
    with pytest.raises(ValueError) as error:
        open_data(str(data), "train")
    text = str(error.value)
    assert text.startswith(f"{data}: needs {data}/train/CLASS/IMAGE (") and "\n" not in text
    return text


@pytest.mark.parametrize("names, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_folders_without_pictures_are_refused(names, words, tmp_path):
    make_files(tmp_path, *names)
    assert words in refused(tmp_path)


def test_listings_without_pictures_are_refused(tmp_path):
    for text, words in (
        ("{}", "KeyError: 'annotations'"),
        ('{"images": [], "annotations": []}', "the listing has no images"),
        ('{"images": [{"id": 7}], "annotations": []}', "KeyError: 7"),
        ('{"images": ', "JSONDecodeError"),
        ("[]", "TypeError"),
    ):
        (tmp_path / "train2018.json").write_text(text)
        assert words in refused(tmp_path)


# ---- 9. The prior
def test_power_law_prior():
    golden = np.load(ROOT / "tests/golden/power_law.npz")
    assert len(golden.files) == 12
    for key in golden.files:
        k, exponent = re.fullmatch(r"k(\d+)_e(\d+)", key).groups()
        prior = power_law_prior(int(k), int(exponent) / 100)
        assert prior.dtype == torch.float64 and abs(prior.sum().item() - 1) < 1e-12
        np.testing.assert_allclose(prior.numpy(), golden[key], rtol=1e-12, err_msg=key)
    prior = power_law_prior(1000, 2.5)
    assert (prior[999] / prior[0]).item() == pytest.approx(1000**-2.5, rel=1e-12)
    assert power_law_prior(1024, 0).tolist() == [1 / 1024] * 1024
    assert power_law_prior(1, 0.25).tolist() == [1]
    with pytest.raises(ValueError, match="num_prototypes is 0.* at least 1"):
        power_law_prior(0, 0.25)
