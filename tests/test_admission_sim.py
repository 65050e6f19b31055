"""Which device arrays are taken, row by row of the table in docs/design.md; and machines without a device."""

from __future__ import annotations

import builtins
import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sim.fixture import every_schedule, installed, simulated_cupy  # noqa: F401
from sim.tools import chunks_of_kilobytes, late, on_device, on_host, schedule, stored, values  # noqa: F401

import gpusaver
from gpusaver.device import admit
from gpusaver.errors import FailedPreconditionError, InvalidArgumentError
from gpusaver.pipeline.plan import _one_by_one, _plain
from gpusaver.saver import Saver
from gpusaver.tensor import DataType
from gpusaver.variables import flatten

WITH_AND_WITHOUT_KERNELS = pytest.mark.parametrize(
    "sim", [{"schedule": "late"}, {"schedule": 4, "kernels": False}], indirect=True, ids=["kernels", "no-kernels"]
)
DTYPES = [dtype for dtype in DataType if dtype.name not in ("invalid", "string", "resource", "variant")]


def view_of(sim: Any, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return sim.cupy.ndarray(shape, memory.dtype, memory.data, strides=strides)


def save_and_restore(directory: Path, state: dict[str, Any], clear: Any) -> Any:
    with Saver(state) as saver:
        prefix = saver.save(directory / "model")
        clear()
        report = saver.restore(prefix)
    return report


# ------------------------------------------------------------------------------------------------------ row by row


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_contiguous_of_every_type(sim, tmp_path, dtype):
    model = values(dtype.numpy_dtype)
    array = on_device(sim, model)
    pointer = array.data.ptr
    admitted = admit(array, "w", dtype)
    assert (admitted.spec.dtype, admitted.array is array) == (dtype, True)
    save_and_restore(tmp_path, {"w": array}, lambda: array.view(np.uint8).fill(0))
    assert (on_host(array), array.data.ptr) == (stored(model), pointer)


@WITH_AND_WITHOUT_KERNELS
@pytest.mark.parametrize("how", ["fortran", "stepped", "reversed", "permuted", "column"])
def test_strided_arrays_take_no_contiguous_copy(sim, tmp_path, small_chunks, how):
    """Of a row of chunks, one after the other goes through a buffer of a chunk's size."""
    model = np.random.default_rng(2).integers(0, 99, (24, 40, 36)).astype(np.int16)
    view = {
        "fortran": lambda a: a.T,
        "stepped": lambda a: a[::2, :, ::3],
        "reversed": lambda a: a[::-1, :, ::-1],
        "permuted": lambda a: a.transpose(1, 0, 2),
        "column": lambda a: a[:, :, 7],
    }[how]
    array, expected = view(on_device(sim, model)), stored(view(model))
    used = sim.memory[0].used
    most = 0
    allocate = sim.memory[0].allocate

    def watched(size: int) -> int:
        nonlocal most
        pointer = allocate(size)
        most = max(most, sim.memory[0].used - used)
        return pointer

    sim.memory[0].allocate = watched
    save_and_restore(tmp_path, {"w": array}, lambda: array.fill(0))
    assert most <= 2 * 8192 + 4 * 4096  # two buffers, and tables
    assert on_host(array) == expected


@late
def test_big_endian_is_refused_by_name(sim):
    with pytest.raises(TypeError, match=r"layer/w: a big-endian array on a device cannot be stored; convert it"):
        Saver({"layer": {"w": sim.cupy.zeros(3, np.dtype(">i4"))}})


@WITH_AND_WITHOUT_KERNELS
def test_elements_that_share_memory_are_saved_and_not_restored(sim, tmp_path):
    memory = on_device(sim, np.arange(12, dtype=np.int32))
    broadcast = view_of(sim, memory, (3, 4), (0, 4))
    windows = view_of(sim, memory, (5, 4), (8, 4))
    state = {"broadcast": broadcast, "windows": windows}
    with Saver(state) as saver:
        prefix = saver.save(tmp_path / "model")
        assert gpusaver.load(prefix)["broadcast"].tolist() == [[0, 1, 2, 3]] * 3
        assert gpusaver.load(prefix)["windows"].tolist() == [list(range(n, n + 4)) for n in range(0, 10, 2)]
        with pytest.raises(InvalidArgumentError, match="several elements share one place in memory"):
            saver.restore(prefix)
    assert memory.get().tolist() == list(range(12))


@late
def test_tied_arrays(sim, tmp_path):
    array = on_device(sim, np.arange(1000, dtype=np.float32))
    state = {"a": array, "b": array[:], "c": array.reshape(10, 100)}
    with Saver({"a": array, "b": array[:]}) as saver:
        prefix = saver.save(tmp_path / "tied")
        array.fill(0)
        saver.restore(prefix)
    assert array.get().tolist() == list(range(1000))
    assert next(tmp_path.glob("tied.data-*")).stat().st_size == 4000
    gpusaver.save(tmp_path / "other", {"a": np.zeros(1000, np.float32), "b": np.ones(1000, np.float32)})
    different = pytest.raises(InvalidArgumentError, match=r"but the checkpoint\s+stores different values")
    with Saver({"a": array, "b": array[:]}) as saver, different:
        saver.restore(tmp_path / "other")
    with Saver(state) as saver:  # the same memory, but another shape
        prefix = saver.save(tmp_path / "shapes")
        with pytest.raises(InvalidArgumentError, match="overlap in memory but are not the same array"):
            saver.restore(prefix)
    assert array.get().tolist() == list(range(1000))


class Interface:
    """What Numba, RMM and their kin hand out."""

    def __init__(self, array: Any, *, read_only: bool = False) -> None:
        self.array, self.read_only = array, read_only

    @property
    def __cuda_array_interface__(self) -> Any:
        interface = dict(self.array.__cuda_array_interface__)
        return interface | {"data": (interface["data"][0], self.read_only)}


class TorchTensor:
    """A tensor of PyTorch, on a device; ``base`` is one that needs a gradient."""

    def __init__(self, array: Any, dtype: str, base: TorchTensor | None = None) -> None:
        self.array, self.dtype, self.device = array, f"torch.{dtype}", types.SimpleNamespace(type="cuda")
        self.is_detached = base is not None

    def detach(self) -> TorchTensor:
        return TorchTensor(self.array, self.dtype.removeprefix("torch."), self)

    def view(self, dtype: Any) -> TorchTensor:
        return TorchTensor(self.array.view(dtype), np.dtype(dtype).name, self)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        assert self.is_detached, "Can't export tensors that require gradient"
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2"])
def test_pytorch(sim, tmp_path, monkeypatch, name):
    torch = types.SimpleNamespace(Tensor=TorchTensor, uint8=np.uint8, int16=np.int16)
    monkeypatch.setitem(sys.modules, "torch", torch)
    model = values(DataType[name].numpy_dtype)
    array = on_device(sim, model)
    state = {"w": TorchTensor(array, name)}
    save_and_restore(tmp_path, state, lambda: array.view(np.uint8).fill(0))
    assert on_host(array) == stored(model)
    assert gpusaver.load_checkpoint(str(tmp_path / "model")).get_variable_to_dtype_map()["w"].name == name


@every_schedule
def test_a_read_only_array_is_replaced(sim, tmp_path):
    with sim.cupy.cuda.Device(1):
        array = on_device(sim, np.arange(9, dtype=np.int32))
    given = Interface(array, read_only=True)
    state = {"w": given, "nested": [given]}
    report = save_and_restore(tmp_path, state, lambda: None)
    assert sorted(report.values) == ["nested/0", "w"]
    for replaced in (state["w"], state["nested"][0]):
        assert type(replaced) is sim.cupy.ndarray
        assert replaced.data.ptr != array.data.ptr
        assert (replaced.device.id, replaced.get().tolist()) == (1, list(range(9)))


class JaxArray:
    """An array of JAX: immutable, on one device or (``devices``) spread over several."""

    def __init__(self, array: Any, sharding: str, devices: int = 1) -> None:
        self.array, self.sharding, self.devices = array, sharding, devices
        self.was_converted = False

    def __dlpack_device__(self) -> Any:
        if self.devices > 1:
            raise BufferError("__dlpack__ only supports unsharded arrays")
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        self.was_converted = True
        return self.array.get()


@pytest.mark.parametrize("devices", [1, 2])
def test_jax(sim, tmp_path, monkeypatch, devices):
    jax = types.SimpleNamespace(Array=JaxArray, device_put=lambda value, sharding: (value, sharding))
    monkeypatch.setitem(sys.modules, "jax", jax)
    given = JaxArray(on_device(sim, np.arange(5, dtype=np.float32)), "sharding", devices)
    state = {"w": given}
    report = save_and_restore(tmp_path, state, lambda: None)
    assert given.was_converted == (devices > 1)
    assert list(report.values) == ["w"]
    value, sharding = state["w"]
    assert (value.tolist(), sharding) == ([0, 1, 2, 3, 4], "sharding")


@WITH_AND_WITHOUT_KERNELS
@pytest.mark.parametrize("kind", ["managed", "asynchronous", "foreign"])
def test_memory_from_elsewhere_is_used_by_pointer(sim, tmp_path, kind):
    runtime, cuda = sim.cupy.cuda.runtime, sim.cupy.cuda
    allocate = {
        "managed": runtime.mallocManaged,
        "asynchronous": lambda size: runtime.mallocAsync(size, 0),
        "foreign": runtime.malloc,
    }[kind]
    pointer = allocate(4000)
    array = sim.cupy.ndarray((10, 100), np.int32, cuda.MemoryPointer(cuda.UnownedMemory(pointer, 4000, None), 0))
    array[...] = on_device(sim, np.arange(1000, dtype=np.int32).reshape(10, 100))
    given = Interface(array) if kind == "foreign" else array
    save_and_restore(tmp_path, {"w": given}, lambda: array.fill(0))
    assert array.get().tolist() == np.arange(1000).reshape(10, 100).tolist()
    assert array.data.ptr == pointer
    runtime.deviceSynchronize()
    runtime.free(pointer)


@late
def test_what_has_no_type_in_a_checkpoint_is_named(sim):
    array = sim.cupy.zeros(4, np.int64)
    for dtype in ("datetime64[s]", "i4,i4"):
        with pytest.raises(TypeError, match=r"deep/w: an array of dtype .* cannot be stored"):
            Saver({"deep": {"w": array.view(np.dtype(dtype))}})


@every_schedule
def test_a_tensor_larger_than_the_ring(sim, tmp_path, small_chunks):
    model = np.random.default_rng(3).integers(0, 256, 8192 * 11 + 77, np.uint8)
    array = on_device(sim, model)
    for capture in ("snapshot", "deferred", "blocking"):
        with Saver({"w": array}) as saver:
            pending = saver.save_async(tmp_path / "model", capture=capture)
            pending.fence()
            array.fill(0)
            saver.restore(pending.result())
        assert on_host(array) == stored(model)


# --------------------------------------------------------------------------------- damage is found by the device, too


@WITH_AND_WITHOUT_KERNELS
@pytest.mark.parametrize("verify", ["during", "before"])
def test_damage_is_found(sim, tmp_path, small_chunks, verify):
    """A bit of a tensor in one piece, of one in many, of a strided one, and of one between others."""
    rng = np.random.default_rng(5)
    models = {"a": rng.integers(0, 9, 20_000, np.uint8), "b": rng.integers(0, 9, (50, 3)).astype(np.int16)}
    models |= {f"s{n}": rng.integers(0, 9, 40, np.uint8) for n in range(8)}
    arrays = {name: on_device(sim, model) for name, model in models.items()}
    arrays["b"] = arrays["b"].T
    with Saver(arrays) as saver:
        prefix = saver.save(tmp_path / "model")
        data = next(tmp_path.glob("model.data-*"))
        good = data.read_bytes()
        for name in ("a", "b", "s3"):
            entry = gpusaver.load_checkpoint(prefix).find(name).entry
            for place in (entry.offset, entry.offset + entry.nbytes - 1):
                bad = bytearray(good)
                bad[place] ^= 4
                data.write_bytes(bad)
                for array in arrays.values():
                    array.fill(77)
                with pytest.raises(gpusaver.errors.DataLossError, match=f"the bytes of tensor {name} are") as caught:
                    saver.restore(prefix, verify=verify)
                assert (name in caught.value.modified) == (verify == "during")
                if verify == "before":
                    assert all(set(array.get().ravel().tolist()) == {77} for array in arrays.values())
        data.write_bytes(good)
        saver.restore(prefix, verify=verify)
    for name, model in models.items():
        assert on_host(arrays[name]) == stored(model.T if name == "b" else model)


# ------------------------------------------------------------------------------------------------- the same bytes


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from([np.dtype(name) for name in "bool int8 uint16 float32 float64 complex128".split()])
tensors = st.lists(st.tuples(shapes, dtypes, st.booleans()), min_size=1, max_size=12)


@settings(max_examples=25)
@given(tensors, st.booleans())
# Empty arrays all lie at address 0 on a device, and are not for that the same tensor.
@example(
    given_tensors=[((0,), np.dtype(bool), False), ((), np.dtype(bool), False), ((0,), np.dtype(bool), False)],
    sharded=False,
)
def test_files_from_cupy_and_numpy_are_the_same(tmp_path_factory, given_tensors, sharded):
    """Where all arrays are on one device; what is on several lies in a stretch of the file for each."""
    directory = tmp_path_factory.mktemp("parity")
    rng = np.random.default_rng(0)
    host = {}
    for number, (shape, dtype, is_turned) in enumerate(given_tensors):
        array = rng.integers(0, 2, shape).astype(dtype)
        host[f"v{number}"] = array.T if is_turned else array
    host["large"] = rng.standard_normal(20_000)
    with installed(schedule="late") as sim:
        device = {name: on_device(sim, array) for name, array in host.items()}
        for name, variables in (("host", host), ("device", device)):
            with Saver(variables, sharded=sharded) as saver:
                saver.save(directory / name / "model", write_state=False)
        names = {path.name for path in (directory / "host").glob("model.[di]*")}
        assert names == {path.name for path in (directory / "device").glob("model.[di]*")}
        for name in names:
            assert (directory / "host" / name).read_bytes() == (directory / "device" / name).read_bytes(), name
        del device


# --------------------------------------------------------------------------------------- machines without a device


@late
def test_cupy_without_a_driver(sim, tmp_path):
    prefix = gpusaver.save(tmp_path / "model", {"w": np.arange(4)})
    sim.has_driver = False
    for call in (
        lambda: gpusaver.load(prefix, device="cuda:0"),
        lambda: gpusaver.Variable(np.arange(4), "v", device="cuda:0"),
    ):
        with pytest.raises(FailedPreconditionError, match=r"CuPy is installed, but CUDA cannot be used: .*driver"):
            call()
    assert gpusaver.load(prefix)["w"].tolist() == [0, 1, 2, 3]
    with Saver({"w": np.zeros(4, np.int64)}) as saver:
        saver.restore(prefix)
        saver.warmup(tmp_path / "model")


@late
def test_two_wheels_of_cupy_are_warned_about(sim, monkeypatch, caplog):
    def version(name: str) -> str:
        if name not in ("cupy-cuda12x", "cupy-cuda13x"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "14.2.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    import gpusaver.device.cuda  # noqa: F401

    assert "(cupy-cuda12x 14.2.0 and cupy-cuda13x 14.2.0): uninstall all of them, then install one" in caplog.text


def test_no_cupy(tmp_path, monkeypatch):
    prefix = gpusaver.save(tmp_path / "model", {"w": np.arange(4)})
    original = builtins.__import__

    def without_cupy(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_cupy)
    for name in [name for name in sys.modules if name.startswith(("cupy", "gpusaver.device.cuda"))]:
        monkeypatch.delitem(sys.modules, name)

    class OnDevice:
        __cuda_array_interface__ = types.MappingProxyType({"data": (1 << 48, False)})

    for call in (
        lambda: gpusaver.load(prefix, device="cuda:0"),
        lambda: gpusaver.Variable(np.arange(4), "v", device="cuda:0"),
        lambda: Saver({"w": OnDevice()}),
    ):
        with pytest.raises(FailedPreconditionError, match=r"need CuPy, which cannot be imported: .* Install gpusaver"):
            call()
    assert gpusaver.load(prefix)["w"].tolist() == [0, 1, 2, 3]


def test_importing_gpusaver_imports_no_cupy():
    script = "import sys, gpusaver; sys.exit(any(name.partition('.')[0] == 'cupy' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# ------------------------------------------------------------------------------------------------------ by columns


def test_columns_say_what_each_leaf_says(sim):
    arrays = {name: on_device(sim, values(np.dtype(name))) for name in ("f4", "i8", "?", "c16")}
    empty = {f"empty {number}": sim.cupy.empty((0, 3), np.float32) for number in range(2)}
    state = arrays | empty | {"host": np.zeros(3), "strided": on_device(sim, values(np.dtype("f4"))).T}
    leaves = flatten(state)
    rows, sources, strings = _plain(leaves)
    expected_rows, expected_sources, expected_strings = _one_by_one(leaves, None)
    assert (rows, strings) == (expected_rows, expected_strings)
    assert sources.runtimes == expected_sources.runtimes
    assert list(map(id, sources.arrays)) == list(map(id, expected_sources.arrays))


def test_arrays_on_a_device_that_are_the_same_bytes_have_no_columns(sim):
    array = on_device(sim, values(np.dtype("f4")))
    assert _plain(flatten({"w": array, "view": array[:]})) is None
    assert _plain(flatten({"w": array, "step": 1})) is None
