"""sampler.py: data sets, what a batch holds, what an epoch adds up to, processes, bad input, speed,
the prior."""

import json
import math
import re
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from sampler import (
    KClassBatchSampler,
    draw_plates,
    long_tail,
    open_data,
    open_prior,
    power_law_prior,
)

GOLDEN = Path(__file__).parent / "golden" / "power_law.npz"


# ---- 1. Data sets


@pytest.fixture(scope="module")
def plates():
    """The training set of plates, its labels, and the seconds that it took."""
    start = time.process_time()  # of this process: other programs do not count
    images, labels = draw_plates(50, seed=0)
    return images, labels, time.process_time() - start


def test_plates_are_drawn_in_seconds(plates):
    images, labels, seconds = plates
    assert seconds < 15  # 2.5 s alone; threads that wait count too
    assert images.shape == (50_000, 1, 32, 32) and images.dtype == torch.uint8
    number, digits, count, size = (labels[k] for k in ("number", "digits", "count", "size"))
    assert next(iter(labels)) == "number"  # the class
    assert torch.equal(number.bincount(), torch.full([1000], 50))
    assert torch.equal(digits @ torch.tensor([100, 10, 1]), number)
    assert digits.shape == (50_000, 3) and digits.min() == 0 and digits.max() == 9
    for bins, labels in ((4, count), (3, size)):  # near uniform: 5 standard deviations
        share = labels.bincount(minlength=bins) / 50_000
        assert len(share) == bins and (share - 1 / bins).abs().max() < 5 * (0.25 / 50_000) ** 0.5


def test_plates_follow_from_their_seed():
    torch.manual_seed(1)
    images, labels = draw_plates(2, seed=3)
    state = torch.get_rng_state()
    again, same = draw_plates(2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # numbers of its own
    other, _ = draw_plates(2, seed=4)
    assert torch.equal(images, again)
    assert all(torch.equal(labels[name], same[name]) for name in labels)
    assert (images.int() - other.int()).abs().float().mean() > 20


def test_plates_show_their_labels(plates):
    twenty = torch.arange(50_000) % 50 < 20  # of each class; all would take longer
    images = plates[0][twenty]
    labels = {name: values[twenty] for name, values in plates[1].items()}
    pixels = images[:, 0].float()
    ground = pixels.flatten(1).mode(dim=1).values.view(-1, 1, 1)
    marks = (pixels - ground).abs().flatten(1)
    marks = marks / marks.amax(dim=1, keepdim=True)  # ink of the number is 1, discs are fainter
    inked = (marks > 0.6).float()
    known = torch.arange(len(marks)) % 20 >= 2
    means = inked[known].view(1000, 18, -1).mean(dim=1)
    guess = F.normalize(inked[~known]) @ F.normalize(means).T
    assert (guess.argmax(dim=1) == labels["number"][~known]).float().mean() > 0.1  # chance: 0.001
    faint = ((marks > 0.05) & (marks < 0.4)).float().mean(dim=1)
    by_count = torch.stack([faint[labels["count"] == count].mean() for count in range(4)])
    assert (by_count.diff() > 0.01).all()
    columns = torch.arange(len(marks[0])) % 32
    spread = (inked * (columns - 15.5).square()).sum(1) / inked.sum(1)
    by_size = torch.stack([spread[labels["size"] == size].mean() for size in range(3)])
    assert (by_size.diff() > 0.5).all()


def test_the_two_sets_of_plates_differ_in_seed_and_size(monkeypatch):
    monkeypatch.setattr("sampler.draw_plates", lambda per_class, seed: (per_class, seed))
    assert open_data("plates", "train") == (50, 0)
    assert open_data("plates", "val") == (10, 1)


def test_cifar_is_one_tensor(monkeypatch):
    class Published:
        def __init__(self, root, train, download):
            assert root == "data" and download
            self.data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3) + train
            self.targets = [3, 1, 2, 3]

    for data, name in (("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")):
        monkeypatch.setattr(f"sampler.{name}", Published)
        for split in ("train", "val"):
            images, labels = open_data(data, split)
            assert images.dtype == torch.uint8 and images.shape == (4, 3, 32, 32)
            expected = Published("data", split == "train", True).data
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
            assert {k: x.tolist() for k, x in labels.items()} == {"class": [3, 1, 2, 3]}

        def unreachable(*_, **__):
            raise RuntimeError("no network\nsecond line")

        monkeypatch.setattr(f"sampler.{name}", unreachable)
        with pytest.raises(ValueError) as error:
            open_data(data, "train")
        assert str(error.value).startswith(f"{data}: needs a download or ./data (RuntimeError: no")
        assert "\n" not in str(error.value)


def test_folders_and_listings_are_read(tmp_path):
    names = ["train/b/2.png", "train/a/1.png", "train/b/10.png", "val/a/0.png", "val/c/0.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    in_order = ["train/a/1.png", "train/b/10.png", "train/b/2.png"]
    paths, labels = open_data(str(tmp_path), "train")
    assert paths == [str(tmp_path / name) for name in in_order]
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


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "no classes", "empty classes", "a file", "listing"]
)
def test_folders_without_pictures_are_refused(kind, tmp_path):
    data = tmp_path / "data"
    if kind == "a file":
        data.touch()
    elif kind != "missing":
        (data / ("train/class0" if kind == "empty classes" else "train")).mkdir(parents=True)
    if kind == "no classes":
        Image.new("RGB", (8, 8)).save(data / "train/picture.png")
    if kind == "listing":
        (data / "train2018.json").write_text('{"images": []}')
    with pytest.raises(ValueError) as error:
        open_data(str(data), "train")
    assert str(error.value).startswith(f"{data}: needs {data}/train/CLASS/IMAGE (")
    assert "\n" not in str(error.value)


def test_long_tail_keeps_a_power_of_the_rank():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    for exponent, expected in (
        (0.0, [100] * 10),
        (1.0, [100, 50, 33, 25, 20, 17, 14, 12, 11, 10]),
        (0.5, [100, 71, 58, 50, 45, 41, 38, 35, 33, 32]),
        (9.0, [100] + [1] * 9),  # at least one
    ):
        kept = long_tail(labels, exponent, seed=0)
        np.testing.assert_array_equal(np.bincount(labels[kept], minlength=10), expected)
        assert len(set(kept.tolist())) == len(kept)
    first, again, other = (long_tail(labels, 1.0, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first.tolist()) != set(other.tolist())


# ---- 2. A batch and an epoch


def epoch_of(labels, batch_size, k_classes=None, *, epoch=0, **options):
    """The batches of one epoch: (batches, images of this process)."""
    sampler = KClassBatchSampler(labels, batch_size, k_classes, **options)
    sampler.set_epoch(epoch)
    return np.array(list(sampler))


def epochs_of(labels, batch_size, k_classes=None, *, epochs):
    """The batches of many epochs of one sampler: (epochs, batches, batch size)."""
    sampler = KClassBatchSampler(labels, batch_size, k_classes)
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    return np.array(batches)


def times_drawn(batches, items):
    """How often each of `items` numbers is among the last dimension's."""
    flat = batches.reshape(-1, batches.shape[-1])
    flat = flat + items * np.arange(len(flat))[:, None]  # one range of numbers for each row
    counts = np.bincount(flat.ravel(), minlength=items * len(flat))
    return counts.reshape(*batches.shape[:-1], items)


def audit(labels, batch_size, k_classes, *, seed=0, epoch=0):
    """Check all that must hold in every batch, and in an epoch after every batch."""
    sampler = KClassBatchSampler(labels, batch_size, k_classes, seed=seed)
    sampler.set_epoch(epoch)
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    least = batch_size // k_classes
    most = math.ceil(batch_size / k_classes)
    by_class = np.argsort(labels)
    starts = np.cumsum(sizes) - sizes
    seen = np.zeros(len(labels), int)
    batches = 0
    for batch in sampler:
        assert len(batch) == batch_size
        images = np.bincount(batch, minlength=len(labels))  # how often each is in this batch
        classes = np.bincount(labels[batch], minlength=len(sizes))
        assert np.count_nonzero(classes) == k_classes
        assert set(classes[classes > 0]) <= {least, most}
        # 0 or 1 where a class has images enough, else as even as whole numbers can be
        assert (images >= (classes // sizes)[labels]).all()
        assert (images <= (-(-classes // sizes))[labels]).all()
        seen = seen + images
        batches += 1
        assert np.ptp(np.bincount(labels, weights=seen)) <= most
        in_order = seen[by_class]
        spread = np.maximum.reduceat(in_order, starts) - np.minimum.reduceat(in_order, starts)
        assert spread.max() <= 1
    assert batches == len(sampler) == len(labels) // batch_size


def assert_equal_rates(counts, rate):
    """counts (epochs, items), independent over epochs: every item's mean is `rate`, to 5 sigma."""
    error = np.abs(counts.mean(axis=0) - rate)
    sigma = np.sqrt(counts.var(axis=0).mean() / len(counts))  # items are alike: one variance
    assert error.max() <= 5 * sigma + 1e-9, f"{error.max() / max(sigma, 1e-9):.1f} sigma"


def labels_of(sizes, seed=0):
    """Shuffled labels, sizes[c] of class c."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("k_classes", [1, 2, 3, 8, 15, 16])
@pytest.mark.parametrize("batch_size", [16, 40, 61])
def test_batches_of_equal_classes(batch_size, k_classes):
    for epoch in range(3):
        audit(labels_of([25] * 16), batch_size, k_classes, epoch=epoch)


@pytest.mark.parametrize("k_classes", [1, 2, 7, 12])
def test_batches_of_a_long_tail(k_classes):
    sizes = [400, 150, 80, 40, 20, 10, 5, 3, 2, 1, 1, 1]  # shares are larger than most classes
    for epoch in range(3):
        audit(labels_of(sizes), 64, k_classes, epoch=epoch)


@pytest.mark.parametrize("block", range(4))
def test_batches_of_random_data(block):
    rng = np.random.default_rng(block)
    for _ in range(100):
        sizes = rng.integers(1, rng.choice([2, 4, 30]), size=rng.integers(1, 13), endpoint=True)
        batch_size = int(rng.integers(1, min(sizes.sum(), 24), endpoint=True))
        k_classes = int(rng.integers(1, min(batch_size, len(sizes)), endpoint=True))
        seed, epoch = (int(n) for n in rng.integers(1000, size=2))
        audit(labels_of(sizes, seed), batch_size, k_classes, seed=seed, epoch=epoch)


def test_without_k_classes_it_is_a_shuffle_without_replacement():
    labels = labels_of([7] * 15)
    epochs = epochs_of(labels, 8, epochs=2000)
    assert epochs.shape == (2000, 13, 8)  # 105 images: the last one is dropped
    drawn = times_drawn(epochs, 105)
    assert drawn.sum(axis=1).max() == 1
    assert_equal_rates(drawn.sum(axis=1), 104 / 105)
    assert_equal_rates(drawn[:, 0], 8 / 105)
    # Not the classes' doing: 8 of 105 images drawn anyhow are of 15 (1 - C(98, 8) / C(105, 8)).
    classes = np.count_nonzero(times_drawn(labels[epochs], 15), axis=-1)
    expected = 15 * (1 - math.comb(98, 8) / math.comb(105, 8))
    assert abs(classes.mean() - expected) < 5 * classes.std() / np.sqrt(classes.size)


@pytest.mark.parametrize("k_classes", [None, 1, 5])
@pytest.mark.parametrize("images, batch_size, batches", [(50, 5, 10), (54, 5, 10), (9, 9, 1)])
def test_length(images, batch_size, batches, k_classes):
    labels = np.arange(images) % 5
    for world_size in (1, batch_size):
        sampler = KClassBatchSampler(labels, batch_size, k_classes, world_size=world_size)
        assert len(sampler) == batches == len(list(sampler))


# ---- 3. Many epochs


def test_every_class_and_image_is_seen_equally_often():
    labels = labels_of([11] * 10)
    batches = epochs_of(labels, 16, 3, epochs=1000)
    assert_equal_rates(times_drawn(batches, 110).sum(axis=1), 6 * 16 / 110)
    assert_equal_rates(times_drawn(labels[batches], 10).sum(axis=1), 6 * 16 / 10)


def test_size_of_a_class_does_not_matter():
    sizes = np.array([40, 20, 12, 6, 4, 3, 2, 1])
    labels = labels_of(sizes)
    batches = epochs_of(labels, 20, 3, epochs=1000)
    assert_equal_rates(times_drawn(labels[batches], 8).sum(axis=1), 4 * 20 / 8)
    images = times_drawn(batches, len(labels)).sum(axis=1)
    for c, size in enumerate(sizes):
        assert_equal_rates(images[:, labels == c], 4 * 20 / 8 / size)


def test_larger_shares_and_company_are_random():
    labels = labels_of([10] * 8)  # batches of 10 with 4 of 8 classes: 3 + 3 + 2 + 2 images
    batches = epochs_of(labels, 10, 4, epochs=1500)
    counts = times_drawn(labels[batches], 8)
    present = 1.0 * (counts > 0)
    larger = 1.0 * (counts == 3)
    for batch in range(8):  # each batch on its own: later ones do not make up for earlier ones
        assert_equal_rates(present[:, batch], 4 / 8)
        assert_equal_rates(larger[:, batch], 2 / 8)
    first, second = np.triu_indices(8, k=1)
    assert_equal_rates(present[:, 0, first] * present[:, 0, second], 4 * 3 / (8 * 7))
    assert_equal_rates(larger[:, 0, first] * larger[:, 0, second], 2 * 1 / (8 * 7))
    assert_equal_rates(labels[batches[:, 0]], 3.5)  # no place in the batch prefers a class


def test_decks_are_shuffled_anew():
    labels = labels_of([5, 27])  # every batch has 2 of the 5 images a..e of class 0
    drawn = times_drawn(epochs_of(labels, 4, 2, epochs=1500), 32)[:, :, labels == 0]
    overlaps = drawn @ drawn.transpose(0, 2, 1)  # (epochs, 8, 8), images that two batches share
    means = np.zeros((8, 8))
    # Batches 0 to 4: ab, cd, ex, then two that share what is not x; x is any of a..d.
    means[2] = 0.5, 0.5, 2, 0.5, 0.5, 0.8, 0.8, 0.8
    means[3] = 0.75, 0.75, 0.5, 2, 0, 0.8, 0.8, 0.8
    means[5, :5] = 0.8  # after these ten cards all is forgotten: 2 of 5 meet 2 of 5 in 2 * 2 / 5
    for batch, others in ((2, range(8)), (3, range(8)), (5, range(5))):
        for other in others:
            assert_equal_rates(overlaps[:, batch, [other]], means[batch, other])


# ---- 4. Processes


@pytest.mark.parametrize("k_classes", [None, 1, 3, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 24])
def test_processes_partition_the_batch(world_size, k_classes):
    labels = labels_of([30] * 10)
    whole = epoch_of(labels, 24, k_classes, seed=5, epoch=2)
    cuts = [
        epoch_of(labels, 24, k_classes, seed=5, epoch=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {cut.shape for cut in cuts} == {(12, 24 // world_size)}
    np.testing.assert_array_equal(np.concatenate(cuts, axis=1), whole)


def test_a_cut_is_a_random_part_of_the_batch():
    labels = labels_of([500] * 16)
    cuts = [
        labels[epoch_of(labels, 64, 8, epoch=epoch, rank=rank, world_size=4)]
        for rank in range(4)
        for epoch in range(4)
    ]
    cuts = np.concatenate(cuts)  # (batches, 16): 16 of 64 images, of which 8 classes have 8 each
    classes = np.array([len(set(cut)) for cut in cuts])
    expected = 8 * (1 - math.comb(56, 16) / math.comb(64, 16))  # 7.3; 2 if cut by class
    assert abs(classes.mean() - expected) < 5 * classes.std() / np.sqrt(len(cuts))
    neighbours = (cuts[:, 1:] == cuts[:, :-1]).mean(axis=1)  # order within the cut is random too
    assert abs(neighbours.mean() - 7 / 63) < 5 * neighbours.std() / np.sqrt(len(cuts))


# ---- 5. Reproducible


@pytest.mark.parametrize("k_classes", [None, 4])
def test_batches_follow_from_seed_and_epoch_alone(k_classes):
    labels = labels_of([20] * 10)
    fresh = {e: epoch_of(labels, 16, k_classes, seed=3, epoch=e).tolist() for e in range(4)}
    sampler = KClassBatchSampler(labels, 16, k_classes, seed=3)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert list(sampler) == fresh[0] == list(sampler)  # without set_epoch: epoch 0, each time
    list(islice(sampler, 5))  # a run that was stopped here
    for epoch in (2, 0, 3, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == fresh[epoch]
        assert list(islice(sampler, 7, None)) == fresh[epoch][7:]
    assert [pair for pair in zip(sampler, sampler, strict=True)] == [(b, b) for b in fresh[1]]
    assert state == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    np.random.seed(1)
    torch.manual_seed(1)
    assert list(sampler) == fresh[1]


@pytest.mark.parametrize("k_classes", [None, 4])
def test_epochs_and_seeds_differ(k_classes):
    labels = labels_of([20] * 10)
    runs = [(s, e) for s in range(5) for e in range(5)]  # (0, 1) is not (1, 0) either
    batches = [epoch_of(labels, 16, k_classes, seed=s, epoch=e)[0].tolist() for s, e in runs]
    assert len({tuple(batch) for batch in batches}) == len(runs)
    assert len({frozenset(batch) for batch in batches}) == len(runs)


# ---- 6. Forms of labels


def test_items_are_lists_of_int():
    for k_classes in (None, 3):
        for batch in KClassBatchSampler([0, 1, 2] * 6, 6, k_classes, rank=1, world_size=2):
            assert type(batch) is list and [type(index) for index in batch] == [int] * 3


def test_forms_of_labels():
    labels = labels_of([9] * 7)
    expected = epoch_of(labels, 10, 4)
    forms = [labels.tolist(), tuple(labels.tolist()), list(labels), labels.repeat(2)[::2]]
    kinds = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint64]
    forms += [labels.astype(kind) for kind in kinds]
    forms += [torch.tensor(labels, dtype=kind) for kind in (torch.int64, torch.int32, torch.uint8)]
    for form in forms:
        np.testing.assert_array_equal(epoch_of(form, 10, 4), expected)
    frozen = labels.copy()
    frozen.flags.writeable = False  # labels are only read
    np.testing.assert_array_equal(epoch_of(frozen, 10, 4), expected)


def test_label_values_may_have_gaps():
    names = np.array([10**12, -5, 0, 7, 300, -(2**40), 999])
    audit(names[labels_of([9] * 7)], 10, 4)


def test_more_classes_than_8_or_16_bits_count():
    audit(labels_of([3] * 300), 280, 270)
    audit(labels_of([2] * 70_000), 60_000, 50_000)


def test_as_batch_sampler_of_a_loader():
    labels = torch.tensor(labels_of([9] * 7))
    sampler = KClassBatchSampler(labels, 12, 4, rank=1, world_size=2)
    loader = DataLoader(TensorDataset(torch.arange(63), labels), batch_sampler=sampler)
    assert len(loader) == 5
    assert [indices.tolist() for indices, _ in loader] == list(sampler)


# ---- 7. Bad input: one line that says what is wrong and what would be right

BAD = {
    "more classes than there are": (dict(k_classes=11), "11 10"),
    "more classes than images": (dict(batch_size=6, k_classes=8), "8 6"),
    "no class": (dict(k_classes=0), "0 1 10"),
    "negative number of classes": (dict(k_classes=-3), "-3 1 10"),
    "not divisible": (dict(batch_size=30, world_size=8), "30 8 multiple 24"),
    "fewer images than processes": (dict(batch_size=3, world_size=8), "3 8 multiple"),
    "empty batch": (dict(batch_size=0), "0 1"),
    "batch larger than the data": (dict(batch_size=128), "100 batch most"),
    "rank too large": (dict(rank=4, world_size=4), "4 0..3"),
    "rank negative": (dict(rank=-1, world_size=4), "-1 0..3"),
    "float labels": (dict(labels=np.arange(100) / 10), "float64 integers"),
    "float tensor": (dict(labels=torch.zeros(100)), "float32 integers"),
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


def test_limits_are_accepted():
    labels = np.arange(100) % 10
    audit(labels, 100, 10)
    audit(labels, 10, 10)
    audit(labels, 1, 1)
    assert epoch_of(labels, 100, rank=3, world_size=4).shape == (1, 25)


# ---- 8. Speed and memory at the size of ImageNet and iNaturalist18


def large(name):
    """1,281,167 labels of 1,000 nearly equal classes, or 437,513 of 8,142 long-tailed ones."""
    if name == "imagenet":
        sizes = np.bincount(np.arange(1_281_167) % 1000)
    else:
        sizes = np.maximum(1000 / np.arange(1, 8143) ** 0.6, 2)
        sizes = np.floor(sizes * 430_000 / sizes.sum()).astype(int)
        sizes[0] += 437_513 - sizes.sum()
    return labels_of(sizes)


@pytest.mark.parametrize("name, images", [("imagenet", 1_281_167), ("inat18", 437_513)])
def test_speed_and_memory(name, images):
    labels = large(name)
    assert len(labels) == images
    clock = time.process_time  # of this process alone: a busy machine changes nothing

    start = clock()
    sampler = KClassBatchSampler(labels.tolist(), 4096, 960)
    assert clock() - start < 1.0  # seconds

    batches = iter(sampler)
    times = []
    for _ in range(50):
        start = clock()
        batch = next(batches)
        times.append(clock() - start)
        assert len(np.unique(labels[batch])) == 960
    assert np.median(times) < 0.005

    sampler = KClassBatchSampler(labels, 1024, 960)
    start = clock()
    next(islice(sampler, len(sampler) // 2, None))
    assert clock() - start < 1.0

    tracemalloc.start()
    for _ in islice(KClassBatchSampler(labels, 4096, 960), 20):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6  # bytes


# ---- 9. Prior


@pytest.mark.parametrize("num_prototypes", [1, 2, 10, 1024])
@pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0, 2.5])
def test_power_law(num_prototypes, exponent):
    prior = power_law_prior(num_prototypes, exponent)
    assert prior.shape == (num_prototypes,) and prior.dtype == torch.float64
    assert abs(prior.sum().item() - 1) < 1e-12
    for k in (1, 2, 3, 7, 1000):
        if k <= num_prototypes:
            assert prior[k - 1] / prior[0] == pytest.approx(k**-exponent, rel=1e-12)


def test_power_law_of_exponent_0_is_uniform():
    assert power_law_prior(1024, 0).tolist() == [1 / 1024] * 1024


def test_power_law_against_reference():
    golden = np.load(GOLDEN)
    assert len(golden.files) == 12
    for key in golden.files:
        k, exponent = re.fullmatch(r"k(\d+)_e(\d+)", key).groups()
        prior = power_law_prior(int(k), int(exponent) / 100)
        np.testing.assert_allclose(prior.numpy(), golden[key], rtol=1e-12, err_msg=key)


def test_power_law_of_no_prototypes():
    with pytest.raises(ValueError, match="num_prototypes is 0.* at least 1"):
        power_law_prior(0, 0.25)


def test_priors_from_files(tmp_path):
    weights = [4, 0, 2.5, 1.5]
    (tmp_path / "a.txt").write_text("4\n0\n2.5\n1.5\n")
    np.save(tmp_path / "a.npy", np.array(weights, np.float32))
    np.save(tmp_path / "b.npy", np.array([1, 2, 3, 4]))
    for name, expected in (("a.txt", weights), ("a.npy", weights), ("b.npy", [1, 2, 3, 4])):
        prior = open_prior(f"file:{tmp_path / name}", 0.25, 4)
        np.testing.assert_allclose(prior, np.array(expected) / sum(expected), rtol=1e-15)
        assert prior.dtype == torch.float64
    assert torch.equal(open_prior("power-law", 0.5, 9), power_law_prior(9, 0.5))
    assert torch.equal(open_prior("uniform", 0.5, 9), power_law_prior(9, 0.0))


BAD_PRIORS = {  # of 16 weights
    "a weight too many": "1\n" * 17,
    "a weight too few": "1\n" * 15,
    "none": "",
    "negative": "1\n" * 15 + "-1\n",
    "not a number": "1\n" * 15 + "nan\n",
    "infinite": "1\n" * 15 + "inf\n",
    "zeros": "0\n" * 16,
    "words": "one\n" * 16,
    "a picture": b"\x89PNG\xff\xfe",
    "no file": None,
}


def write_bad_prior(kind, path):
    """One of BAD_PRIORS as a file: text, or numpy's format if the name says so."""
    content = BAD_PRIORS[kind]
    numpy_format = path.suffix == ".npy" and kind != "words"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None and numpy_format:
        np.save(path, np.array([float(x) for x in content.split()]))
    elif content is not None:
        path.write_text(content)


@pytest.mark.parametrize("ending", ["txt", "npy"])
@pytest.mark.parametrize("kind", BAD_PRIORS)
def test_bad_priors_are_refused(kind, ending, tmp_path):
    path = tmp_path / f"prior.{ending}"
    write_bad_prior(kind, path)
    with pytest.raises(ValueError) as error:
        open_prior(f"file:{path}", 0.25, 16)
    assert str(error.value).startswith(f"file:{path} (")
    assert "give power-law, uniform or file:PATH of 16 weights" in str(error.value)


def test_an_unknown_prior_is_refused():
    with pytest.raises(ValueError, match="^zipf .*: give power-law, uniform or file:PATH"):
        open_prior("zipf", 0.25, 16)


# ---- 10. Properties, of 2,000 data sets at random


def random_case(rng):
    """Labels with gaps, of a few or many classes, equal or not; sizes of a batch that is possible;
    processes that divide it."""
    classes = int(rng.integers(1, rng.choice([3, 8, 25]), endpoint=True))
    sizes = rng.integers(1, rng.choice([1, 3, 9]), size=classes, endpoint=True)
    if rng.random() < 0.3:
        sizes = np.maximum(40 // np.arange(1, classes + 1), 1)  # a long tail
    names = rng.choice(2**40, size=classes, replace=False) - 2**39
    images = int(sizes.sum())
    fewest = -(-images // 12)  # of a batch: an epoch has at most twelve
    batch_size = int(rng.integers(fewest, min(images, 5 * fewest), endpoint=True))
    k_classes = int(rng.integers(1, min(batch_size, classes), endpoint=True))
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    seed, epoch = (int(n) for n in rng.integers(10**6, size=2))
    labels = names[labels_of(sizes, seed)]
    return labels, batch_size, k_classes, int(rng.choice(divisors)), seed, epoch


@pytest.mark.parametrize("block", range(4))
def test_properties_of_batches(block):
    rng = np.random.default_rng([block, 2026])
    distinct = 0
    for _ in range(500):
        labels, batch_size, k_classes, world_size, seed, epoch = random_case(rng)
        case = dict(seed=seed, epoch=epoch)
        audit(labels, batch_size, k_classes, **case)  # classes, shares, counts, repetitions
        whole = epoch_of(labels, batch_size, k_classes, **case)
        again = epoch_of(labels.tolist(), batch_size, k_classes, **case)
        np.testing.assert_array_equal(whole, again)
        ranks = {0, int(rng.integers(world_size)), world_size - 1}
        share = batch_size // world_size
        for rank in ranks:
            cut = epoch_of(labels, batch_size, k_classes, rank=rank, world_size=world_size, **case)
            np.testing.assert_array_equal(cut, whole[:, rank * share : (rank + 1) * share])
        if len(labels) >= 12 and whole.size >= 12 and len(set(whole.ravel().tolist())) >= 12:
            distinct += 1  # the same by chance is less likely than one in 12!
            for change in (dict(case, epoch=epoch + 1), dict(case, seed=seed + 1)):
                other = epoch_of(labels, batch_size, k_classes, **change)
                assert not np.array_equal(other, whole)
    assert distinct > 200


@pytest.mark.parametrize("block", range(4))
def test_properties_of_plain_shuffles(block):
    rng = np.random.default_rng([block, 2027])
    for _ in range(125):
        labels, batch_size, _, world_size, seed, epoch = random_case(rng)
        whole = epoch_of(labels, batch_size, seed=seed, epoch=epoch)
        assert whole.shape == (len(labels) // batch_size, batch_size)
        assert len(set(whole.ravel().tolist())) == whole.size  # no image twice in an epoch
        cuts = [
            epoch_of(labels, batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        np.testing.assert_array_equal(np.concatenate(cuts, axis=1), whole)


def test_properties_of_long_tails():
    rng = np.random.default_rng(2028)
    for _ in range(500):
        labels, *_, seed, _ = random_case(rng)
        exponent = float(rng.choice([0, 0.25, 1, 2.5, 40, rng.random() * 3]))
        kept = long_tail(labels, exponent, seed)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert 0 <= kept[0] and kept[-1] < len(labels)
        _, ranks, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        counts = np.bincount(ranks[kept], minlength=len(sizes))
        expected = sizes * np.arange(1.0, len(sizes) + 1) ** -exponent
        assert ((abs(counts - expected) <= 0.5 + 1e-9) | (counts == 1)).all()
        assert counts.min() >= 1 and (counts <= sizes).all()
        np.testing.assert_array_equal(long_tail(labels.tolist(), exponent, seed), kept)
        steeper = long_tail(labels, exponent + 0.5, seed)
        assert set(steeper.tolist()) <= set(kept.tolist())  # of each class the same come first
        if exponent == 0:
            assert len(kept) == len(labels)


def test_properties_of_priors():
    rng = np.random.default_rng(2029)
    for _ in range(500):
        num_prototypes = int(rng.integers(1, rng.choice([2, 50, 3000]), endpoint=True))
        exponent = float(rng.choice([0, 0.25, 1, rng.random() * 6]))
        prior = power_law_prior(num_prototypes, exponent)
        assert prior.shape == (num_prototypes,) and prior.dtype == torch.float64
        assert abs(prior.sum().item() - 1) < 1e-12 and (prior > 0).all()
        assert (prior.diff() <= 0).all()
        k = int(rng.integers(1, num_prototypes, endpoint=True))
        assert prior[k - 1] / prior[0] == pytest.approx(k**-exponent, rel=1e-9)
        assert torch.equal(power_law_prior(num_prototypes, exponent), prior)
