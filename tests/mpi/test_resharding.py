"""What n ranks have saved, m others restore, cut otherwise, each reading what it needs and little more."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from grids import Index, parts, tilings
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import SimulatedTransport, run

import gpusaver
from gpusaver import PartitionedVariable
from gpusaver.errors import DataLossError
from gpusaver.pipeline import assemble


@contextmanager
def folder() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="gpusaver-mpi-"))
    yield directory
    shutil.rmtree(directory)


def save_by(count: int, prefix: Path, array: np.ndarray, tiling: list[Index]) -> None:
    def save(transport: SimulatedTransport) -> str:
        state = {"t": parts(array, tiling, transport.rank, count), "step": 7}
        with gpusaver.Saver(state, comm=transport, max_to_keep=None) as saver:
            return saver.save(prefix, write_meta_graph=False)

    assert run(count, save) == [str(prefix)] * count


def restored_by(count: int, prefix: Path, array: np.ndarray, tiling: list[Index]) -> list[gpusaver.RestoreReport]:
    """The reports, once every part of every rank is found to be right."""

    def restore(transport: SimulatedTransport) -> gpusaver.RestoreReport:
        mine = parts(np.zeros_like(array), tiling, transport.rank, count)
        state = {"t": mine, "step": 0}
        with gpusaver.Saver(state, comm=transport) as saver:
            report = saver.restore(prefix)
        for part in mine:
            np.testing.assert_array_equal(part.value, array[part.slice.index(array.shape)])
        assert state["step"] == 7
        return report

    reports = run(count, restore)
    failed = [error for error in reports if isinstance(error, BaseException)]
    if failed:
        raise failed[0]
    return reports


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=60)
@given(st.data(), SHAPES, st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 64, 1 << 20]), st.integers(0, 64))
def test_any_tiling_by_any_number_of_ranks(
    data: st.DataObject, shape: list[int], writers: int, readers: int, small: int, gap: int
) -> None:
    """``small`` and ``gap``: also with the rules for large tensors."""
    array = np.random.default_rng(0).integers(0, 1 << 15, shape, np.int16)
    with (
        folder() as directory,
        mock.patch.object(assemble, "_SMALL_NBYTES", small),
        mock.patch.object(assemble, "_RUN_GAP", gap),
        mock.patch.object(assemble, "_MAX_RUNS", data.draw(st.sampled_from([1, 4, 100]))),
    ):
        save_by(writers, directory / "k", array, data.draw(tilings(shape)))
        restored_by(readers, directory / "k", array, data.draw(tilings(shape)))
        np.testing.assert_array_equal(gpusaver.load(directory / "k")["t"], array)


def rows(count: int, size: int) -> list[Index]:
    bounds = np.linspace(0, size, count + 1).astype(int).tolist()
    return [(slice(start, stop), slice(None)) for start, stop in itertools.pairwise(bounds)]


def columns(count: int, size: int) -> list[Index]:
    return [(second, first) for first, second in rows(count, size)]


LARGE = (3072, 4096)  # float32: 48 MiB


@pytest.mark.parametrize("written", [rows(1, 3072), rows(4, 3072), columns(2, 4096)])
@pytest.mark.parametrize("wanted", [rows(3, 3072), rows(5, 3072), columns(2, 4096)])
def test_little_more_is_read_than_needed(tmp_path: Path, written: list[Index], wanted: list[Index]) -> None:
    array = np.arange(LARGE[0] * LARGE[1], dtype=np.float32).reshape(LARGE)
    save_by(len(written), tmp_path / "k", array, written)
    for report in restored_by(len(wanted), tmp_path / "k", array, wanted):
        assert report.needed_nbytes <= report.read_nbytes <= 1.1 * report.needed_nbytes


def test_narrow_columns_are_read_with_what_lies_between(tmp_path: Path) -> None:
    """Of rows shorter than a page."""
    array = np.arange(1 << 20, dtype=np.float32).reshape(-1, 256)
    gpusaver.save(tmp_path / "k", {"t": array})
    part = PartitionedVariable(array.shape, np.s_[:, 3:5], np.zeros((4096, 2), np.float32))
    with gpusaver.Saver({"t": part}) as saver:
        report = saver.restore(tmp_path / "k")
    np.testing.assert_array_equal(part.value, array[:, 3:5])
    assert (report.needed_nbytes, report.read_nbytes, report.unverified) == (4096 * 8, 1 << 22, [])


def test_damage_of_what_is_read_in_part_is_found_by_verifying_before(tmp_path: Path) -> None:
    array = np.arange(1 << 20, dtype=np.float32).reshape(-1, 1024)
    prefix = gpusaver.save(tmp_path / "k", {"t": array})
    data = tmp_path / "k.data-00000-of-00001"
    octets = bytearray(data.read_bytes())
    octets[100] ^= 1
    data.write_bytes(octets)
    part = PartitionedVariable(array.shape, np.s_[0:10, :], np.zeros((10, 1024), np.float32))
    with gpusaver.Saver({"t": part}) as saver:
        with pytest.raises(DataLossError, match="tensor t are damaged"):
            saver.restore(prefix, verify="before")
        assert not part.value.any()
        assert saver.restore(prefix).unverified == ["t"]


def test_damage_of_what_ranks_read_in_part_is_found_by_all_of_them_together(tmp_path: Path) -> None:
    """The checksums of their parts make up that of the slice."""
    array = np.arange(1 << 20, dtype=np.float32).reshape(-1, 1024)
    gpusaver.save(tmp_path / "k", {"t": array, "step": 7})
    reports = restored_by(3, tmp_path / "k", array, rows(3, 1024))
    assert [report.unverified for report in reports] == [[]] * 3
    data = tmp_path / "k.data-00000-of-00001"
    octets = bytearray(data.read_bytes())
    octets[-100] ^= 1
    data.write_bytes(octets)
    with pytest.raises(DataLossError, match=r"data-00000-of-00001: the bytes of tensor t are damaged") as caught:
        restored_by(3, tmp_path / "k", array, rows(3, 1024))
    assert caught.value.modified == ("step", "t")
    mine = parts(np.zeros_like(array), rows(3, 1024), 0, 1)
    with gpusaver.Saver({"t": mine}) as saver, pytest.raises(DataLossError, match="tensor t are damaged"):
        saver.restore(tmp_path / "k")  # one process that has all parts
