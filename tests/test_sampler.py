"""sampler.py: what a batch holds, what an epoch adds up to, processes, bad input, speed, prior."""

import math
import re
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sampler import KClassBatchSampler, power_law_prior

GOLDEN = Path(__file__).parent / "golden" / "power_law.npz"


def epoch_of(labels, batch_size, k_classes=None, *, epoch=0, **options):
    """The batches of one epoch -> (batches, images of this process)."""
    sampler = KClassBatchSampler(labels, batch_size, k_classes, **options)
    sampler.set_epoch(epoch)
    return np.array(list(sampler))


def epochs_of(labels, batch_size, k_classes=None, *, epochs):
    """The batches of many epochs of one sampler -> (epochs, batches, batch size)."""
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
    least, most = batch_size // k_classes, -(-batch_size // k_classes)
    by_class, starts = np.argsort(labels), np.cumsum(sizes) - sizes
    seen, batches = np.zeros(len(labels), int), 0
    for batch in sampler:
        assert len(batch) == batch_size
        images = np.bincount(batch, minlength=len(labels))  # how often each is in this batch
        classes = np.bincount(labels[batch], minlength=len(sizes))
        assert np.count_nonzero(classes) == k_classes
        assert set(classes[classes > 0]) <= {least, most}
        # 0 or 1 where a class has images enough, else as even as whole numbers can be
        assert (images >= (classes // sizes)[labels]).all()
        assert (images <= (-(-classes // sizes))[labels]).all()
        seen, batches = seen + images, batches + 1
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


# ---- 1. A batch and an epoch


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


# ---- 2. Many epochs


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
    present, larger = 1.0 * (counts > 0), 1.0 * (counts == 3)
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


# ---- 3. Processes


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


# ---- 4. Reproducible


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


# ---- 5. Kinds of labels


def test_items_are_lists_of_int():
    for k_classes in (None, 3):
        for batch in KClassBatchSampler([0, 1, 2] * 6, 6, k_classes, rank=1, world_size=2):
            assert type(batch) is list and [type(index) for index in batch] == [int] * 3


def test_forms_of_labels():
    labels = labels_of([9] * 7)
    expected = epoch_of(labels, 10, 4)
    forms = [labels.tolist(), tuple(labels.tolist()), list(labels), labels.repeat(2)[::2]]
    forms += [labels.astype(kind) for kind in "int8 uint8 int16 uint16 int32 uint64".split()]
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


# ---- 6. Bad input: one line that says what is wrong and what would be right

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


# ---- 7. Speed and memory at the size of ImageNet and iNaturalist18


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

    batches, times = iter(sampler), []
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


# ---- 8. Prior


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
