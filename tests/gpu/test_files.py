"""Files from a device and from the host: the same bytes, each readable by the other; and restores into place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpusaver
from gpu.tools import (
    Gpu,
    assert_holds,
    contents,
    data_files,
    device_state,
    host_state,
    host_values,
    octets,
    spoil,
)


@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_cupy_and_numpy_write_the_same_bytes(gpu: Gpu, tmp_path: Path, capture: str):
    values = host_values(gpu, 3)
    host, device = host_state(values), device_state(gpu, values)
    for name, variables in (("host", host), ("device", device)):
        with gpusaver.Saver(variables) as saver:
            saver.save_async(tmp_path / name / "model", capture=capture).result()
    files = data_files(tmp_path / "host")
    assert len(files) == 2
    assert files == data_files(tmp_path / "device")


def test_a_checkpoint_goes_from_the_device_to_the_host_and_back(gpu: Gpu, tmp_path: Path):
    values = host_values(gpu, 5)
    state, expected = device_state(gpu, values), contents(host_state(values))
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "device" / "model")
    assert_holds(prefix, expected)
    host = {name: np.zeros_like(array) for name, array in host_state(values).items()}
    with gpusaver.Saver(host) as saver:
        saver.restore(prefix)
        assert contents(host) == expected
        prefix = saver.save(tmp_path / "host" / "model")
    spoil(state)
    pointers = {name: array.data.ptr for name, array in state.items()}
    with gpusaver.Saver(state) as saver:
        report = saver.restore(prefix)
    assert contents(state) == expected
    assert {name: array.data.ptr for name, array in state.items()} == pointers
    assert report.nbytes == sum(map(len, expected.values()))


@pytest.mark.parametrize("verify", ["during", "before"])
def test_a_flipped_bit_is_found(gpu: Gpu, tmp_path: Path, verify: str):
    state = device_state(gpu, host_values(gpu, 6))
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "model")
        (path,) = tmp_path.glob("*.data-*")
        octets_ = bytearray(path.read_bytes())
        octets_[len(octets_) // 2] ^= 4
        path.write_bytes(octets_)
        spoil(state)
        before = contents(state)
        with pytest.raises(gpusaver.DataLossError, match="are damaged"):
            saver.restore(prefix, verify=verify)
        if verify == "before":
            assert contents(state) == before


def test_a_tensor_larger_than_the_ring(gpu: Gpu, tmp_path: Path):
    """Which is 32 MiB; on a real device several GB, with a last chunk that is cut."""
    count = (33 << 20) + 5 if gpu.is_simulated else (3 << 30) + 5
    array = gpu.cupy.zeros(count, np.uint8)
    array[:4096] += 1
    array[-4099:] += 2
    with gpusaver.Saver({"w": array}) as saver:
        pending = saver.save_async(tmp_path / "model", capture="deferred")
        prefix = pending.result()
        array.fill(9)
        saver.restore(prefix)
    assert octets(array[:4097]) == b"\1" * 4096 + b"\0"
    assert octets(array[-4100:]) == b"\0" + b"\2" * 4099
    assert int(array[4096:-4099].sum()) == 0


def test_arrays_of_ten_thousand(gpu: Gpu, tmp_path: Path):
    count = gpu.rounds(10_000) * (100 if gpu.is_simulated else 1)
    block = gpu.cupy.arange(count * 40, dtype=np.int32)
    state = {f"v{number:05}": block[number * 40 : number * 40 + number % 40 + 1].copy() for number in range(count)}
    expected = contents(state)
    with gpusaver.Saver(state) as saver:
        prefix = saver.save_async(tmp_path / "model", capture="snapshot").result()
        spoil(state)
        saver.restore(prefix)
    assert contents(state) == expected


def test_tied_and_overlapping_arrays(gpu: Gpu, tmp_path: Path):
    array = gpu.cupy.arange(1000, dtype=np.float32)
    state = {"a": array, "b": array[:], "half": array[:500]}
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "model")
        with pytest.raises(gpusaver.InvalidArgumentError, match="overlap in memory"):
            saver.restore(prefix)
    assert next(tmp_path.glob("*.data-*")).stat().st_size == 6000
    array.fill(0)
    with gpusaver.Saver({"a": array, "b": array[:]}) as saver:
        saver.restore(prefix)
    assert octets(array) == np.arange(1000, dtype=np.float32).tobytes()
