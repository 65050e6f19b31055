"""Arrays of other libraries: through DLPack (fakes that delegate to NumPy), PyTorch and JAX where installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.errors import FailedPreconditionError
from gpusaver.reader import CheckpointReader


class Tensor:
    """A foreign array that speaks DLPack, the version of 2023 on."""

    def __init__(self, values: Any) -> None:
        self.memory = np.array(values)

    def __dlpack__(self, **options: Any) -> Any:
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class OldTensor(Tensor):
    """DLPack as it was before it could say "read-only"."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.memory.__dlpack__(stream=stream)


class PinnedTensor(Tensor):
    def __dlpack_device__(self) -> tuple[int, int]:
        return (3, 0)


class Broken(Tensor):
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("not today")


def save_and_restore(directory: Path, value: Any, clear: Any) -> tuple[Any, gpusaver.RestoreReport]:
    state = {"w": value}
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(directory / "k")
        clear()
        report = saver.restore(prefix)
    return state["w"], report


@pytest.mark.parametrize("kind", [Tensor, OldTensor])
def test_dlpack(tmp_path: Path, kind: type[Tensor]) -> None:
    value = kind(np.arange(6.0).reshape(2, 3).T)
    restored, report = save_and_restore(tmp_path, value, lambda: value.memory.fill(0))
    assert restored is value
    assert report.values == {}
    np.testing.assert_array_equal(value.memory, np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(gpusaver.load(tmp_path)["w"], value.memory)


def test_a_producer_that_says_read_only_is_replaced(tmp_path: Path) -> None:
    value = Tensor([1.0, 2.0])
    value.memory.flags.writeable = False
    try:
        np.from_dlpack(value)
    except BufferError:
        pytest.skip("this NumPy does not export read-only memory")
    restored, _ = save_and_restore(tmp_path, value, lambda: None)
    assert type(restored) is np.ndarray
    np.testing.assert_array_equal(restored, [1, 2])


def test_a_producer_that_refuses_is_named() -> None:
    with pytest.raises(TypeError, match="deep/w: Broken cannot be stored in a checkpoint: not today"):
        gpusaver.Saver({"deep": {"w": Broken([1])}})


def test_a_class_is_not_its_instances() -> None:
    with pytest.raises(TypeError, match=r"^w: type cannot be stored"):
        gpusaver.Saver({"w": Tensor})


def test_memory_of_a_gpu_without_one() -> None:
    pytest.importorskip("cupy")

    class OnGpu(Tensor):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    with pytest.raises((TypeError, FailedPreconditionError)):
        gpusaver.Saver({"w": OnGpu([1])})


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "bool", "complex64"])
    def test_types(self, torch: Any, tmp_path: Path, name: str) -> None:
        value = torch.tensor([0, 1, 1]).to(getattr(torch, name))
        restored, _ = save_and_restore(tmp_path, value, lambda: value.zero_())
        assert restored is value
        assert value.to(torch.complex64).real.tolist() == [0, 1, 1]
        assert CheckpointReader(f"{tmp_path}/k").get_variable_to_dtype_map()["w"].name == name

    def test_parameters_that_need_a_gradient(self, torch: Any, tmp_path: Path) -> None:
        value = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        restored, _ = save_and_restore(tmp_path, value, lambda: value.data.zero_())
        assert restored is value
        assert value.requires_grad
        assert value.tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_strided_and_scalar(self, torch: Any, tmp_path: Path) -> None:
        value = torch.arange(12.0).reshape(3, 4).t()[::2]
        save_and_restore(tmp_path, value, lambda: value.zero_())
        assert value.tolist() == [[0, 4, 8], [2, 6, 10]]
        scalar = torch.tensor(2.5, dtype=torch.bfloat16)
        save_and_restore(tmp_path, scalar, lambda: scalar.zero_())
        assert scalar.item() == 2.5

    def test_a_class_derived_elsewhere(self, torch: Any, tmp_path: Path) -> None:
        class Mine(torch.Tensor):  # type: ignore[misc]
            pass

        value = torch.arange(3.0).as_subclass(Mine).requires_grad_()
        save_and_restore(tmp_path, value, lambda: value.detach().zero_())
        assert value.tolist() == [0, 1, 2]

    def test_tied_with_numpy(self, torch: Any, tmp_path: Path) -> None:
        memory = np.arange(4.0)
        state = {"a": memory, "b": torch.from_numpy(memory)}
        with gpusaver.Saver(state) as saver:
            reader = CheckpointReader(saver.save(tmp_path / "k"))
        entries = [reader.find(name).entry for name in "ab"]  # type: ignore[union-attr]
        assert entries[0].offset == entries[1].offset

    @pytest.mark.parametrize(
        "make",
        [
            lambda torch: torch.device("cpu"),
            lambda torch: torch.float32,
            lambda torch: torch.Generator(),
            lambda torch: torch.eye(3).to_sparse(),
            lambda torch: torch.zeros(3, device="meta"),
            lambda torch: torch.zeros(3, dtype=torch.complex64).conj(),
            lambda torch: torch.nn.Linear(1, 1),
        ],
        ids=["device", "dtype", "generator", "sparse", "meta", "conjugate", "module"],
    )
    def test_what_cannot_be_stored_is_named(self, torch: Any, make: Any) -> None:
        with pytest.raises(TypeError, match=r"^deep/w: .* cannot be stored"):
            gpusaver.Saver({"deep": {"w": make(torch)}})

    def test_a_state_dict(self, torch: Any, tmp_path: Path) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        prefix = gpusaver.save(tmp_path / "k", dict(model.state_dict()))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        with gpusaver.Saver(dict(model.state_dict())) as saver:
            saver.restore(prefix)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    def test_variables(self, torch: Any) -> None:
        with gpusaver.variables(), pytest.raises(TypeError, match="declared float64"):
            gpusaver.Variable(torch.zeros(3), name="v", dtype=np.float64)


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self) -> Any:
        return pytest.importorskip("jax")

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "int32", "bool"])
    def test_arrays_are_replaced_by_arrays(self, jax: Any, tmp_path: Path, name: str) -> None:
        value = jax.numpy.array([[0, 1], [1, 0]], name)
        prefix = gpusaver.save(tmp_path / "k", {"w": value})
        state = {"w": jax.numpy.zeros((2, 2), name)}
        with gpusaver.Saver(state) as saver:
            report = saver.restore(prefix)
        assert isinstance(state["w"], jax.Array)
        assert state["w"].dtype == value.dtype
        assert state["w"].sharding == value.sharding
        assert state["w"].tolist() == value.tolist()
        assert list(report.values) == ["w"]

    def test_what_cannot_be_stored_is_named(self, jax: Any) -> None:
        for value in (jax.random.key(0), jax.ShapeDtypeStruct((3,), "float32"), jax.devices()[0]):
            with pytest.raises(TypeError, match=r"^deep/w: .* cannot be stored"):
                gpusaver.Saver({"deep": {"w": value}})
