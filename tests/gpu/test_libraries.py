"""Arrays of PyTorch, JAX and Numba on the device: from their own memory, and back into it where it is writable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpu.tools import Gpu

#: Of other libraries: what they leave open or deprecate is theirs.
pytestmark = pytest.mark.filterwarnings("default")
VALUES = np.arange(1 << 18, dtype=np.float32).reshape(512, 512)


@pytest.mark.needs_module("torch")
@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_pytorch(gpu: Gpu, tmp_path: Path, capture: Any):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    with torch.cuda.stream(torch.cuda.Stream()):
        plain = torch.tensor(VALUES, device="cuda")
        state = {
            "plain": plain,
            "turned": torch.tensor(VALUES, device="cuda").T,
            "bfloat16": torch.tensor(VALUES, device="cuda").to(torch.bfloat16),
            "trained": torch.nn.Parameter(torch.tensor(VALUES, device="cuda")),
        }
        expected = {name: tensor.detach().to(torch.float32).cpu().clone() for name, tensor in state.items()}
        pointers = {name: tensor.data_ptr() for name, tensor in state.items()}
        torch.cuda.synchronize()
        with gpusaver.Saver(state) as saver:
            pending = saver.save_async(tmp_path / "model", capture=capture)
            pending.result()
            with torch.no_grad():
                for tensor in state.values():
                    tensor.fill_(0)
            torch.cuda.synchronize()
            saver.restore(pending.prefix)
        for name, tensor in state.items():
            assert torch.equal(tensor.detach().to(torch.float32).cpu(), expected[name]), name
        assert {name: tensor.data_ptr() for name, tensor in state.items()} == pointers


@pytest.mark.needs_module("jax")
def test_jax(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU backend")
    state = {"w": jax.numpy.asarray(VALUES), "b": jax.numpy.asarray(VALUES, dtype=jax.numpy.bfloat16)}
    expected = {name: np.asarray(array) for name, array in state.items()}
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "model")
        for name in state:
            state[name] = state[name] * 0
        report = saver.restore(prefix)
    assert sorted(report.values) == ["b", "w"]
    for name, array in state.items():
        assert isinstance(array, jax.Array)
        assert np.array_equal(np.asarray(array), expected[name])


@pytest.mark.needs_module("numba")
def test_numba(gpu: Gpu, tmp_path: Path):
    from numba import cuda

    array = cuda.to_device(VALUES)
    with gpusaver.Saver({"w": array}) as saver:
        prefix = saver.save(tmp_path / "model")
        cuda.to_device(np.zeros_like(VALUES), to=array)
        saver.restore(prefix)
    assert np.array_equal(array.copy_to_host(), VALUES)
