"""Does a long run grow? python tests/endurance.py [STEPS]

Runs simclr.py and msn.py in their smallest form, a process each, on a folder of small pictures with
one loader process, and prints resident memory, threads and file descriptors of the run at step 200
and at its last step. Exit status 1 if memory grows by 2 percent or more after step 200, or if there
are more threads or descriptors. Linux only: it reads /proc."""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SETTLED = 200  # the step from which nothing may grow
MOST = 0.02  # growth of memory
SMALLEST = {
    "simclr": "--arch small --hidden 16 --output 8",
    "msn": "--dim 16 --depth 1 --heads 2 --stem 8 8 8 --hidden 16 --output 8 --num-prototypes 16 "
    "--focal-views 1",
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


def watch(name, data, out, steps, results):
    """Run a script; put its usage at SETTLED and at the last step, and its seconds."""
    import torch

    script = __import__(name)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    seen = []
    schedule = script.schedule

    def spied(step, *rest):
        if step + 1 in (SETTLED, steps):
            seen.append(usage())
        return schedule(step, *rest)

    options = f"--recipe plates --data {data} --batch-size 8 --epochs {steps} --steps {steps}"
    options += f" --workers 1 --log-every 10 --save-minutes 0.005 --out {out} "
    start = time.time()
    with mock.patch.object(script, "schedule", spied):
        sys.stdout = open(os.devnull, "w")
        script.main((options + SMALLEST[name]).split())
    results.put((seen, time.time() - start))


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    context = multiprocessing.get_context("spawn")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pictures"
        draw_pictures(data)
        for name in SMALLEST:
            results = context.SimpleQueue()
            arguments = (name, data, Path(folder) / name, steps, results)
            process = context.Process(target=watch, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{name}.py ended with status {process.exitcode}")
            (before, after), seconds = results.get()
            growth = after[0] / before[0] - 1
            grown = growth >= MOST or after[1] > before[1] or after[2] > before[2]
            failed = failed or grown
            print(
                f"{name}: step {SETTLED}: {before[0]:.1f} MiB, {before[1]} threads, {before[2]} "
                f"descriptors; step {steps}: {after[0]:.1f} MiB ({growth:+.2%}), {after[1]} "
                f"threads, {after[2]} descriptors; {seconds:.0f} s{': GROWN' * grown}",
                flush=True,
            )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
