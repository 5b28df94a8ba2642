"""Which images share a mini-batch, and which prior PMSN matches: the two dials of the study.

*The hidden uniform cluster prior in self-supervised learning* (Assran et al., ICLR 2023, arXiv
2210.07277) keeps the data and changes only the mini-batch: each holds exactly K classes. K = 960
of ImageNet's 1,000 is a balanced batch, K = 8 is not. Every image is still seen equally often.

    sampler = KClassBatchSampler(labels, batch_size=1024, k_classes=8, rank=0, world_size=8)
    sampler.set_epoch(epoch)
    for indices in sampler: ...  # this process's 128 of the batch's 1,024 images
"""

import numpy as np
import torch


def power_law_prior(num_prototypes, exponent):
    """(K,) float64 that sum to 1, entry k proportional to k**-exponent, k from 1."""
    if num_prototypes < 1:
        raise ValueError(f"num_prototypes is {num_prototypes}: give at least 1")
    weights = torch.arange(1, num_prototypes + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def long_tail(labels, exponent, seed):
    """Indices that keep a share k**-exponent of class k (k from 1), at least one image a class."""
    order, labels = np.random.default_rng(seed).permutation(len(labels)), np.asarray(labels)
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    kept = np.round(sizes * np.arange(1, len(sizes) + 1) ** -float(exponent)).astype(int)
    return np.sort(order[_ranges(np.cumsum(sizes) - sizes, np.maximum(kept, 1))])


class KClassBatchSampler:
    """Batches of exactly `k_classes` distinct classes; None: plain shuffling of all images.

    labels: N integers. batch_size: images a global batch. Iterating gives lists of indices, this
    process's share: shares partition the batch, and joined by rank they are the one that a single
    process sees. Batches follow from (seed, epoch) alone, so processes agree without talking.

    A class gets floor or ceil of batch / K images. Classes are dealt least-dealt first, ties
    shuffled: a deck of cards, refilled when empty, that repeats no class in a batch. Images of a
    class have a deck of their own. Within an epoch the counts of two classes differ by at most one
    share, those of two images of a class by at most one. ValueError: arguments that cannot be met.
    """

    def __init__(self, labels, batch_size, k_classes=None, *, rank=0, world_size=1, seed=0):
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are not N integers but {labels.dtype} {labels.shape}")
        classes, labels = np.unique(labels, return_inverse=True)
        N, most = len(labels), min(len(classes), batch_size)
        if batch_size < 1 or batch_size % world_size:
            fit = max(batch_size - batch_size % world_size, world_size)
            raise ValueError(
                f"{batch_size} is no positive multiple of {world_size} processes: use {fit}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        if N < batch_size:
            raise ValueError(f"{N} images are fewer than a batch of {batch_size}: use at most {N}")
        if k_classes is not None and not 1 <= k_classes <= most:
            among = f"of {len(classes)} classes, {batch_size} images"
            raise ValueError(f"{k_classes} classes a batch {among}: choose 1 to {most}")
        self.batch_size, self.k_classes, self.seed, self.epoch = batch_size, k_classes, seed, 0
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.labels = labels.astype(np.min_scalar_type(len(classes)))  # small: sorted by radix
        self.sizes = np.bincount(labels)  # (classes,) images of each class
        self.starts = np.cumsum(self.sizes) - self.sizes

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.labels) // self.batch_size

    def __iter__(self):
        rng, n, K = np.random.default_rng([self.seed, self.epoch]), len(self), self.k_classes
        deck = rng.permutation(len(self.labels))
        if K is None:
            yield from (b[self.share].tolist() for b in deck[: n * self.batch_size].reshape(n, -1))
            return
        deck = deck[
            np.argsort(self.labels[deck], kind="stable")
        ]  # class after class, each shuffled
        spent, dealt = np.zeros_like(self.sizes), np.zeros(len(self.sizes))  # of this deck; in all
        counts = self.batch_size // K + (np.arange(K) < self.batch_size % K)  # larger shares first
        for _ in range(n):
            # Least dealt first keeps max(dealt) - min(dealt) <= one share at every batch, by
            # induction: whoever is dealt had no more than whoever is not. Ties are random.
            classes = np.argsort(dealt + rng.random(len(dealt)))[:K]
            dealt[classes] += counts
            short = spent[classes] + counts > self.sizes[classes]
            refilled = self._refill(deck, spent, classes[short], counts[short], rng)
            first, taken = (self.starts + spent)[classes[~short]], counts[~short]
            spent[classes[~short]] += taken
            batch = np.concatenate([refilled, deck[_ranges(first, taken)]])
            yield rng.permutation(batch)[self.share].tolist()  # no cut shows a class pattern

    def _refill(self, deck, spent, classes, counts, rng):
        """Deal what is left of each class's deck, then from a new shuffle -> image indices."""
        sizes, left = self.sizes[classes], self.sizes[classes] - spent[classes]
        place = _ranges(self.starts[classes], sizes)  # where these decks lie, one after another
        owner = np.repeat(np.arange(len(classes)), sizes)
        rank = _ranges(np.zeros_like(sizes), sizes)  # of a card in its deck
        # The rest to the front and the dealt cards, shuffled, behind it: none comes twice.
        dealt = rank < spent[classes][owner]
        cards = deck[place][np.lexsort((rng.random(len(place)), dealt, owner))]
        wrapped = _ranges(np.zeros_like(counts), counts) % np.repeat(sizes, counts)
        picks = cards[np.repeat(np.cumsum(sizes) - sizes, counts) + wrapped]
        # Behind the rest, `taken` cards of the new round are dealt; the others wait, shuffled.
        taken = (counts - left) % sizes
        waits = (rank - left[owner]) % sizes[owner] >= taken[owner]
        deck[place] = cards[np.lexsort((rng.random(len(place)), waits, owner))]
        spent[classes] = taken
        return picks


def _ranges(starts, counts):
    """The ranges start, start + 1, ... of `counts` numbers each, one after another."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
