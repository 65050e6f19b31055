"""Restoring: all complaints at once, partly, reshaped, and from damaged files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.bundle.crc import crc32c
from gpusaver.errors import DataLossError, InvalidArgumentError, NotFoundError, OutOfRangeError
from gpusaver.pipeline import restore as restore_pipeline
from gpusaver.storage.local import LocalStorage
from gpusaver.tensor import DataType

GOLDEN = Path(__file__).parent.parent / "golden"


def restore(prefix: Any, state: Any, *, saver_options: Any = None, **options: Any) -> gpusaver.RestoreReport:
    with gpusaver.Saver(state, **(saver_options or {})) as saver:
        return saver.restore(prefix, **options)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    state = {"layer1/weights": np.ones((2, 3)), "layer1/bias": np.ones(3, np.float32), "step": 7, "other": "text"}
    return gpusaver.save(tmp_path / "k", state)


def wanted() -> dict[str, Any]:
    """One that fits, two that are missing, one of another shape, one of another type."""
    return {
        "layer1": {"weights": np.zeros((3, 2)), "bias": np.zeros(3, np.float64), "biass": np.zeros(3)},
        "step": 0,
        "missing": np.zeros(2),
    }


def is_untouched(state: dict[str, Any]) -> bool:
    return state["step"] == 0 and not any(np.any(value) for value in (*state["layer1"].values(), state["missing"]))


def test_every_complaint_is_in_one_error(prefix: str) -> None:
    state = wanted()
    with pytest.raises(NotFoundError) as caught:
        restore(prefix, state)
    for text in (
        f"Restoring from checkpoint {prefix} failed; no variable was changed.",
        "Not found in checkpoint (2 of 5 variables):",
        "Key layer1/biass not found in checkpoint; did you mean layer1/bias",
        "Key missing not found in checkpoint\n",
        "a mismatch between the variables and the checkpoint:",
        "tensor_name = layer1/weights; expected shape [3, 2] does not equal stored shape [2, 3]",
        "tensor_name = layer1/bias; expected dtype float64 does not equal original dtype float32",
        "partial=True skips",
    ):
        assert text in str(caught.value)
    assert isinstance(caught.value, LookupError)
    assert is_untouched(state)


def test_mismatches_alone_are_another_error(prefix: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected shape \[2\] does not equal stored shape \[3\]") as caught:
        restore(prefix, {"layer1/bias": np.zeros(2, np.float32), "step": 1.0})
    assert "step; expected dtype float64 does not equal original dtype int64" in str(caught.value)
    assert "Not found" not in str(caught.value)


def test_partial_skips_missing_names_only(prefix: str) -> None:
    state = wanted()
    with pytest.raises(InvalidArgumentError, match="layer1/weights") as caught:
        restore(prefix, state, partial=True)
    assert "Key missing" not in str(caught.value)
    assert is_untouched(state)
    del state["layer1"]["weights"], state["layer1"]["bias"]
    report = restore(prefix, state, partial=True)
    assert (report.restored, report.missing, report.skipped) == (["step"], ["layer1/biass", "missing"], [])
    assert report.unexpected == ["layer1/bias", "layer1/weights", "other"]
    assert state["step"] == 7


def test_partial_shapes_skips_mismatches_too(prefix: str) -> None:
    state = wanted()
    report = restore(prefix, state, partial="shapes")
    assert report.restored == ["step"]
    assert report.missing == ["layer1/biass", "missing"]
    assert report.skipped == ["layer1/bias", "layer1/weights"]
    assert report.unexpected == ["other"]
    assert report.values == {"step": 7}
    state["step"] = 0
    assert is_untouched(state)
    assert repr(report) == "<gpusaver.RestoreReport restored=1 missing=2 skipped=2 replaced=1>"


@pytest.mark.parametrize("partial", [True, "shapes"])
def test_nothing_that_fits_is_an_error_all_the_same(prefix: str, partial: Any) -> None:
    with pytest.raises(NotFoundError, match="Key stepp not found in checkpoint; did you mean step"):
        restore(prefix, {"stepp": 0}, partial=partial)
    with pytest.raises(InvalidArgumentError, match="expected dtype"):
        restore(prefix, {"step": 0.0}, partial=partial)


def test_unexpected_names_are_no_error(prefix: str) -> None:
    report = restore(prefix, {"step": 0})
    assert report.unexpected == ["layer1/bias", "layer1/weights", "other"]
    assert report.missing == report.skipped == []


@pytest.mark.parametrize("shape", [(6,), (3, 2), (1, 6, 1)])
@pytest.mark.parametrize("kind", ["writable", "read-only", "fortran"])
def test_reshape(prefix: str, shape: tuple[int, ...], kind: str) -> None:
    array = np.zeros(shape, order="F" if kind == "fortran" else "C")
    array.flags.writeable = kind != "read-only"
    state = {"layer1/weights": array}
    if kind == "fortran" and not array.flags.c_contiguous:
        with pytest.raises(InvalidArgumentError, match="strided memory"):
            restore(prefix, state, saver_options={"reshape": True})
        return
    restore(prefix, state, saver_options={"reshape": True})
    assert state["layer1/weights"].shape == shape
    assert (state["layer1/weights"] == 1).all()


def test_reshape_of_scalars(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", {"a": np.array([5]), "b": 6, "c": np.array([["t"]])})
    state = {"a": 0, "b": np.zeros((1, 1), int), "c": ""}
    restore(prefix, state, saver_options={"reshape": True})
    assert state == {"a": 5, "b": np.array([[6]]), "c": "t"}


@pytest.mark.parametrize("size", [5, 7])
def test_reshape_wants_equal_counts_and_types(prefix: str, size: int) -> None:
    with pytest.raises(InvalidArgumentError, match="expected shape"):
        restore(prefix, {"layer1/weights": np.zeros(size)}, saver_options={"reshape": True})
    with pytest.raises(InvalidArgumentError, match="expected dtype"):
        restore(prefix, {"layer1/weights": np.zeros(6, np.float32)}, saver_options={"reshape": True})


def damage(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        octet = file.read(1)
        file.seek(offset)
        file.write(bytes([octet[0] ^ 1]))


def entry_of(prefix: str, name: str) -> Any:
    return gpusaver.CheckpointReader(prefix).find(name).entry  # type: ignore[union-attr]


KINDS = ["plain", "strided", "read-only", "small", "text", "number"]


def many_kinds(fill: int) -> dict[str, Any]:
    """Variables that are restored in different ways; several share a chunk."""
    read_only = np.full(50_000, fill, np.int16)
    read_only.flags.writeable = False
    return {
        "first": np.full(90_000, fill, np.uint8),
        "last": np.full(100_000, fill, np.uint8),
        "number": fill,
        "plain": np.full(70_000, fill, np.uint8),
        "read-only": read_only,
        "small": np.full(10, fill, np.uint8),
        "strided": np.full((300, 400), fill, np.uint8)[:, ::2],
        "text": str(fill),
    }


@pytest.mark.parametrize("victim", KINDS)
@pytest.mark.parametrize("chunk_nbytes", [64 * 1024, 8 << 20])
def test_damage_is_found_and_what_was_overwritten_is_named(
    tmp_path: Path, victim: str, chunk_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_pipeline, "CHUNK_NBYTES", chunk_nbytes)
    prefix = gpusaver.save(tmp_path / "k", many_kinds(1))
    entry = entry_of(prefix, victim)
    damage(f"{prefix}.data-00000-of-00001", entry.offset + entry.nbytes - 1)
    for verify in ("before", "during"):
        state, untouched = many_kinds(0), many_kinds(0)
        with pytest.raises(DataLossError, match=rf"k\.data-00000-of-00001.*{victim}|{victim} in .*k\.data-") as caught:
            restore(prefix, state, verify=verify)
        changed = {name for name in state if not np.array_equal(state[name], untouched[name])}
        if verify == "before":
            assert not changed
            assert caught.value.modified == ()
        assert changed <= set(caught.value.modified)
        replaced = {"number", "read-only", "text"}
        assert not replaced & {*changed, *caught.value.modified}
        assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("verify", ["before", "during"])
def test_damage_is_found_in_a_tensor_far_from_the_others(tmp_path: Path, verify: Any) -> None:
    """Such are read one by one."""
    model = {f"v{number:03d}": np.full(9000, 1 + number % 250, np.uint8) for number in range(1000)}
    prefix = gpusaver.save(tmp_path / "k", model)
    some = {name: np.zeros_like(array) for name, array in list(model.items())[::10]}
    assert restore(prefix, some, verify=verify).restored == list(some)
    np.testing.assert_equal(some, {name: model[name] for name in some})
    damage(f"{prefix}.data-00000-of-00001", entry_of(prefix, "v500").offset + 8999)
    for array in some.values():
        array.fill(0)
    with pytest.raises(DataLossError, match=r"k\.data-00000-of-00001: the bytes of tensor v500 are damaged") as caught:
        restore(prefix, some, verify=verify)
    changed = {name for name, array in some.items() if array.any()}
    assert ("v500" in changed) == (verify == "during")
    assert changed <= set(caught.value.modified)
    del some["v500"]
    restore(prefix, some, verify=verify)
    np.testing.assert_equal(some, {name: model[name] for name in some})


def test_tensors_far_apart_are_read_at_a_time_where_that_is_worth_having(tmp_path: Path) -> None:
    """As of object stores, where each read takes long."""
    at_a_time = threading.Barrier(4, timeout=10)

    class Remote(LocalStorage):
        def open(self, path: str, *, uncached: bool = False) -> Any:
            file = super().open(path, uncached=uncached)
            if ".data-" in path:
                file.parallel_reads = 4  # type: ignore[misc]
                for name in ("read_into", "read_each"):
                    setattr(file, name, waiting(getattr(file, name)))
            return file

    def waiting(read: Any) -> Any:
        def wait(*args: Any) -> None:
            at_a_time.wait()
            read(*args)

        return wait

    model = {f"v{number:03d}": np.full(9000, 1 + number % 250, np.uint8) for number in range(1000)}
    prefix = gpusaver.save(tmp_path / "k", model)
    some = {name: np.zeros_like(array) for name, array in list(model.items())[::10]}
    restore(prefix, some, saver_options={"storage": Remote()})
    np.testing.assert_equal(some, {name: model[name] for name in some})


def test_what_is_short_is_found_before_a_byte_is_written(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", many_kinds(1))
    path = f"{prefix}.data-00000-of-00001"
    os.truncate(path, os.path.getsize(path) - 1)
    state = many_kinds(0)
    with pytest.raises(OutOfRangeError, match=r"k\.data-00000-of-00001 has \d+ bytes, but tensor .* was cut short"):
        restore(prefix, state)
    np.testing.assert_equal(state, many_kinds(0))


@pytest.mark.parametrize("sequentially", [False, True])
def test_restoring_twice_and_with_one_thread(tmp_path: Path, sequentially: bool) -> None:
    prefix = gpusaver.save(tmp_path / "k", many_kinds(1))
    state = many_kinds(0)
    with gpusaver.Saver(state, restore_sequentially=sequentially) as saver:
        for _ in range(2):
            saver.restore(prefix)
            np.testing.assert_equal(state, many_kinds(1))
            for name in ("first", "plain", "strided"):
                state[name][...] = 0


def test_restoring_changes_neither_list_nor_state_file(tmp_path: Path) -> None:
    state = {"w": np.zeros(3)}
    with gpusaver.Saver(state) as saver:
        first, second = (saver.save(tmp_path / "k", step) for step in (1, 2))
        saver.restore(first)
        assert saver.last_checkpoints == [first, second]
        assert gpusaver.latest_checkpoint(tmp_path) == second


def test_other_libraries_restore_what_is_sharded(tmp_path: Path) -> None:
    with gpusaver.variables():
        for number in range(3):
            gpusaver.Variable(np.full(5, number), name=f"v{number}", device=f"cpu:{number}")
        with gpusaver.Saver(sharded=True) as saver:
            prefix = saver.save(tmp_path / "k")
    state = {f"v{number}": np.zeros(5, int) for number in range(3)}
    restore(prefix, state)
    assert [value.tolist() for value in state.values()] == [[n] * 5 for n in range(3)]


@pytest.mark.parametrize("folder", ["object_based_tf1", "object_based_tf2"])
def test_object_based_checkpoints_under_readable_names(folder: str) -> None:
    prefix = gpusaver.latest_checkpoint(GOLDEN / folder) or ""
    reader = gpusaver.CheckpointReader(prefix)
    names = [
        name
        for name, key in reader.readable_names.items()
        if name != key and (found := reader.find(name)) is not None and found.spec.dtype is not DataType.string
    ]
    assert names
    targets = {name: np.zeros_like(reader.get_tensor(name)) for name in names}
    for name, array in targets.items():
        state = {name: np.array(array)}
        report = restore(prefix, state)
        np.testing.assert_array_equal(state[name], reader.get_tensor(name))
        assert report.restored == [name]
        assert reader.readable_names[name] not in report.unexpected


def test_v1_checkpoints() -> None:
    prefix = str(GOLDEN / "v1_tf1" / "legacy.ckpt")
    reader = gpusaver.CheckpointReader(prefix)
    shapes = reader.get_variable_to_shape_map()
    name = next(name for name, shape in shapes.items() if shape)
    expected = reader.get_tensor(name)
    array = np.zeros_like(expected)
    assert restore(prefix, {name: array}).unexpected == sorted(set(shapes) - {name})
    np.testing.assert_array_equal(array, expected)


def test_every_byte_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpusaver.pipeline import chunk, restore

    state = {"large": np.arange(2_500_000.0), "small": np.arange(5)}
    gpusaver.save(tmp_path / "k", state)
    sizes: list[int] = []

    def counting(buffer: Any, value: int = 0) -> int:
        sizes.append(memoryview(buffer).nbytes)
        return crc32c(buffer, value)

    for module in (chunk, restore):
        monkeypatch.setattr(module, "crc32c", counting)
    gpusaver.Saver(state).restore(tmp_path / "k")
    assert sum(sizes) == sum(array.nbytes for array in state.values())
