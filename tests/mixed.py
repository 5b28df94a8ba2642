"""The study's third arm: the images of a run with few classes in a batch, in other company.

    python tests/mixed.py simclr.py --k-classes 8 --seed 0 --out runs/mixed

This runs the script as it is, but for its batches: the images of every 16 consecutive ones are
dealt out again among these 16, at random. The run sees the same images as without, each within 16
updates of its time. Only the company in a batch differs: up to 16 times as many classes.
"""

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sampler

TOGETHER = 16  # batches


class MixedBatchSampler(sampler.KClassBatchSampler):
    """As its parent, with the images of each block of batches shuffled among them."""

    def __init__(self, labels, batch_size, k_classes=None, *, rank=0, world_size=1, seed=0):
        super().__init__(labels, batch_size, k_classes, rank=rank, world_size=world_size, seed=seed)
        self.unmixed = sampler.KClassBatchSampler(labels, batch_size, k_classes, seed=seed)

    def __iter__(self):
        first = self.epoch * len(self)
        last = first + len(self)
        start = first - first % TOGETHER  # a block may begin in the epoch before
        batches = self.unmixed_from(start)
        for block in range(start, last, TOGETHER):
            images = np.concatenate(list(itertools.islice(batches, TOGETHER)))
            rng = np.random.default_rng([self.seed, block, TOGETHER])
            mixed = rng.permutation(images).reshape(TOGETHER, -1)
            for number, batch in enumerate(mixed, block):
                if first <= number < last:
                    yield batch[self.share].tolist()

    def unmixed_from(self, start):
        """Global batches from this one on, epoch after epoch."""
        for epoch in itertools.count(start // len(self)):
            self.unmixed.set_epoch(epoch)
            skipped = max(start - epoch * len(self), 0)
            yield from itertools.islice(self.unmixed, skipped, None)

    def describe(self, batches):
        return f"{super().describe(batches)}; {TOGETHER} batches shuffled together"


def main(argv):
    name, *options = argv
    sys.path.insert(0, str(Path(name).resolve().parent))  # of this file, not of its namesake
    script = importlib.import_module(Path(name).stem)
    script.KClassBatchSampler = MixedBatchSampler
    script.main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
