"""Does a long run grow? python tests/endurance.py [STEPS]

Runs simclr.py and msn.py in their smallest form, a process each, on a folder of small pictures with
one loader process, and prints resident memory, threads and file descriptors of the run at step 200
and at its last step. Exit status 1 if memory grows by 2 percent or more after step 200, or if there
are more threads or descriptors. Linux only: it reads /proc."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

SETTLED = 200  # the step from which nothing may grow
MOST = 1.02  # growth of memory
SMALLEST = {
    "simclr": "--arch small --hidden 16 --output 8",
    "msn": "--dim 16 --depth 1 --heads 2 --stem 8 8 8 8 8 --hidden 16 --output 8 "
    "--num-prototypes 16 --focal-views 1",
}


def draw_pictures(root, number=24):
    rng = np.random.default_rng(0)
    for i in range(number):
        path = root / f"train/class{i % 4}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(36, 40, 3), dtype=np.uint8)).save(path)


def usage():
    """Of this process: resident memory in MiB, threads, file descriptors."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return memory, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def watch(name, folder, steps):
    """Run a script -> its usage at SETTLED and at the last step."""
    script = __import__(name)
    schedule = script.schedule
    seen = []

    def spied(step, *rest):
        if step + 1 in (SETTLED, steps):
            seen.append(usage())
        return schedule(step, *rest)

    options = f"--recipe plates --data {folder} --batch-size 8 --epochs {steps} --steps {steps} "
    options += f"--workers 1 --log-every 10 --save-minutes 0.005 --out {folder}/{name} "
    with mock.patch.object(script, "schedule", spied), contextlib.redirect_stdout(None):
        script.main((options + SMALLEST[name]).split())
    return seen


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    os.environ |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # of the runs
    grown = False
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder))
        for name in SMALLEST:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                before, after = alone.submit(watch, name, folder, steps).result()
            memory, threads, descriptors = after
            grown |= memory >= MOST * before[0] or threads > before[1] or descriptors > before[2]
            for step, used in ((SETTLED, before), (steps, after)):
                numbers = "{:.1f} MiB, {} threads, {} descriptors".format(*used)
                print(f"{name}: step {step}: {numbers}", flush=True)
    sys.exit("something has grown" if grown else 0)


if __name__ == "__main__":
    main()
