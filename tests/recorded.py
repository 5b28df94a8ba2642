"""The numbers of tests/golden, whose README.md says what made them, and comparisons with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def load(name):
    return np.load(Path(__file__).parent / f"golden/{name}.npz")


def tensor(arrays, name, dtype=torch.float32):
    return torch.from_numpy(arrays[name]).to(dtype)


def tensors(arrays, dtype, *names):
    return [tensor(arrays, name, dtype) for name in names]


def options(arrays):
    """{name: number}, the settings of a recorded run."""
    return dict(zip(arrays["hparam_names"].tolist(), arrays["hparams"].tolist(), strict=True))


def assert_recorded(value, expected, dtype, rtol=1e-9):
    """A tensor of this type: in float64 each number to rtol, in float32 to 1e-5 of the largest."""
    assert value.dtype == dtype
    value = value.detach().double().numpy()
    expected = np.asarray(expected)
    if dtype == torch.float32:
        rtol = 0
    atol = 1e-12 if rtol else max(1e-5 * np.abs(expected).max(), 1e-12)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


def assert_close(value, expected, atol=0.0, rtol=0.0):
    np.testing.assert_allclose(value.detach().double(), expected, rtol=rtol, atol=atol)
