"""What all tests share: the plates are drawn once, and processes start quickly."""

import functools
import gc
import multiprocessing
import os

# Small networks gain nothing from a second thread, and equal numbers of threads give equal bits.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import sampler

pytest.register_assert_rewrite("runs")
# Test processes are forked from a server that has imported these once, and has no threads.
multiprocessing.set_forkserver_preload(
    ["pytest", "torchvision.transforms.v2", "simclr", "vicreg", "msn", "pmsn", "mae", "data2vec"]
)
# What tests of failures left is not freed in a forked process, which lacks the threads to do so.
os.register_at_fork(after_in_child=gc.freeze)
drawn_once = functools.cache(sampler.draw_plates)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let tests see the GPU: for test_gpu.py")


def pytest_configure(config):
    """Tests compare bits, and test_devices.py has a GPU of its own, which a real one disturbs."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def plates_are_drawn_once(monkeypatch):
    """open_data("plates", ...) draws in the first test that needs it. A test of the drawing itself
    takes sampler.draw_plates.__wrapped__, or imports draw_plates by name."""
    monkeypatch.setattr(sampler, "draw_plates", drawn_once)


@pytest.fixture
def few_plates(monkeypatch):
    """Two images of each class instead of 150."""
    monkeypatch.setattr(sampler, "draw_plates", lambda per_class, seed: drawn_once(2, seed))


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test has set is set back."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def full_precision():
    """data2vec.py lowers it on a GPU, also on one that is not there."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Also with --gpu: sums of a GPU have no fixed order, so its runs are not the same twice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of sixty pictures of four classes, in an ImageFolder's layout."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(60):
        (root / f"train/class{i % 4}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + i % 7, 48 - i % 5)).save(root / f"train/class{i % 4}/{i}.jpg")
    return root


@pytest.fixture(scope="session")
def undisturbed(pictures, tmp_path_factory):
    """script -> the checkpoint and log of a run on the pictures that nothing befalls, and the
    number of calls and returns of functions in it."""
    import runs  # its asserts are rewritten only if it comes after the line above

    return functools.cache(
        lambda script: runs.undisturbed(script, pictures, tmp_path_factory.mktemp(script.__name__))
    )
