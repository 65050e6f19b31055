"""``Saver(incremental=...)``: what is not written again, and when it is."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.layout import PHASE
from gpusaver.errors import DataLossError, UnimplementedError
from gpusaver.pipeline import incremental
from gpusaver.storage.routing import RoutedStorage

pytest.importorskip("xxhash")

Variables = dict[str, gpusaver.Variable]
MIB = 1 << 20


def model(**options: Any) -> Variables:
    """A large variable and a small one that are frozen, and one that is trained."""
    with gpusaver.variables():
        return {
            "embedding": gpusaver.Variable(np.arange(300_000.0), name="embedding", trainable=False, **options),
            "scale": gpusaver.Variable(np.float32(3), name="scale", trainable=False),
            "w": gpusaver.Variable(np.zeros(1000, np.float32), name="w"),
        }


def train(variables: Variables) -> None:
    variables["w"].value[...] += 1


def save(saver: gpusaver.Saver, path: Any, step: int | None = None, capture: Any = "blocking") -> gpusaver.SaveReport:
    pending = saver.save_async(path, step, capture=capture)
    assert pending is not None
    pending.result()
    assert pending.report is not None
    return pending.report


def assert_holds(prefix: str, values: dict[str, Any]) -> None:
    assert list(gpusaver.verify(prefix)) == []
    found = gpusaver.load(prefix)
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)


def now(variables: Variables) -> dict[str, Any]:
    return {name: np.copy(variable.value) for name, variable in variables.items()}


def inode_of(prefix: str, shard: int = 1) -> int:
    return os.stat(f"{prefix}.data-{shard:05d}-of-00002").st_ino


@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
@pytest.mark.parametrize("mode", [True, "declared"])
def test_frozen_variables_are_written_once(tmp_path: Path, mode: Any, capture: Any) -> None:
    variables = model()
    states, reports = [], []
    with gpusaver.Saver(list(variables.values()), incremental=mode, max_to_keep=2) as saver:
        for step in range(4):
            train(variables)
            states.append(now(variables))
            reports.append(save(saver, tmp_path / "k", step, capture))
    assert [report.linked_nbytes for report in reports] == [0, *[PHASE + 300_000 * 8 + 4] * 3]
    assert [report.nbytes for report in reports] == [300_000 * 8 + 4 + 4000] * 4
    assert inode_of(f"{tmp_path}/k-2") == inode_of(f"{tmp_path}/k-3")
    for step in (2, 3):  # retention has taken away what wrote the bytes
        assert_holds(f"{tmp_path}/k-{step}", states[step])
    assert len([name for name in os.listdir(tmp_path) if ".data-" in name]) == 4


def test_off_unless_asked_for(tmp_path: Path) -> None:
    variables = model()
    with gpusaver.Saver(list(variables.values())) as saver:
        for step in range(3):
            assert save(saver, tmp_path / "k", step).linked_nbytes == 0
    assert (tmp_path / "k-2.data-00000-of-00001").exists()
    with pytest.raises(ValueError, match="incremental: expected False, True or 'declared', found 'always'"):
        gpusaver.Saver({"w": np.zeros(3)}, incremental="always")  # type: ignore[arg-type]


def test_what_does_not_change_is_found(tmp_path: Path) -> None:
    """Arrays do not say that they are frozen: they have a file of their own from the third save on."""
    state = {"still": np.arange(100_000.0), "moving": np.zeros(1000), "step": 0, "text": "the same"}
    linked = []
    with gpusaver.Saver(state, incremental=True) as saver:
        for step in range(6):
            state["moving"] += 1
            state["step"] = step
            linked.append(save(saver, tmp_path / "k", step).linked_nbytes > 800_000)
            assert_holds(f"{tmp_path}/k-{step}", {**state, "text": b"the same"})
    assert linked == [False, False, False, True, True, True]


def test_what_changes_after_all_is_written(tmp_path: Path) -> None:
    variables = model()
    linked = []
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        for step in range(10):
            train(variables)
            if step in (2, 5):
                variables["embedding"].value[299_999] += 1e-9
            linked.append(save(saver, tmp_path / "k", step).linked_nbytes > 1000)
            assert_holds(f"{tmp_path}/k-{step}", now(variables))
    # At once where it is found; then a layout without it; then with it again, until it has changed too often.
    assert linked[:3] == [False, True, False]
    assert not linked[5]


def test_a_moving_variable_that_says_it_is_frozen_disturbs_three_times(tmp_path: Path) -> None:
    variables = model()
    linked = []
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        for step in range(12):
            variables["scale"].value[...] = step
            linked.append(save(saver, tmp_path / "k", step).linked_nbytes)
            assert_holds(f"{tmp_path}/k-{step}", now(variables))
    assert linked[-1] >= 300_000 * 8


def forged(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Other bytes with the same CRC-32C: the last four make up for a change of the first."""
    other = data.copy()
    other[0] ^= 1
    base = crc32c(other.data)
    rows = []  # (effect on the checksum, bits flipped)
    for bit in range(32):
        other[-4 + bit // 8] ^= 1 << bit % 8
        rows.append((crc32c(other.data) ^ base, 1 << bit))
        other[-4 + bit // 8] ^= 1 << bit % 8
    missing, flips = base ^ crc32c(data.data), 0
    for place in reversed(range(32)):
        pivot = next((row for row in rows if row[0] >> place & 1), None)
        if pivot is None:
            continue
        rows = [(a ^ pivot[0], b ^ pivot[1]) if a >> place & 1 else (a, b) for a, b in rows if (a, b) != pivot]
        if missing >> place & 1:
            missing, flips = missing ^ pivot[0], flips ^ pivot[1]
    other[-4:] ^= np.frombuffer(flips.to_bytes(4, "little"), np.uint8)
    assert missing == 0
    return other


def test_the_checksum_in_the_index_is_not_what_decides(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 255, 100_000, np.uint8)
    other = forged(data)
    assert crc32c(other.data) == crc32c(data.data)
    with gpusaver.variables():
        frozen = gpusaver.Variable(data.copy(), name="frozen", trainable=False)
    with gpusaver.Saver([frozen], incremental=True) as saver:
        saver.save(tmp_path / "k", 1)
        frozen.value[...] = other
        assert save(saver, tmp_path / "k", 2).linked_nbytes == 0
        assert_holds(f"{tmp_path}/k-2", {"frozen": other})


def remove(path: str) -> None:
    os.unlink(path)


def cut(path: str) -> None:
    os.truncate(path, os.stat(path).st_size - 1)


def replace_by_another(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[5] ^= 1
    os.unlink(path)
    Path(path).write_bytes(content)


def change_in_place(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("harm", [remove, cut, replace_by_another, change_in_place])
def test_a_file_that_is_not_what_it_was_is_written_anew(tmp_path: Path, harm: Callable[[str], None]) -> None:
    variables = model()
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        saver.save(tmp_path / "k", 1)
        harm(f"{tmp_path}/k-1.data-00001-of-00002")
        train(variables)
        assert save(saver, tmp_path / "k", 2).linked_nbytes == 0
        assert_holds(f"{tmp_path}/k-2", now(variables))
        assert save(saver, tmp_path / "k", 3).linked_nbytes > 0
        assert_holds(f"{tmp_path}/k-3", now(variables))


@pytest.mark.parametrize("when", ["always", "between looking and linking"])
def test_where_there_are_no_links_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    variables = model()
    link = os.link

    def failing(source: str, target: str) -> None:
        if when == "always":
            raise OSError(errno.EMLINK, "too many links")
        link(source, target)
        replace_by_another(source)

    monkeypatch.setattr(os, "link", failing)
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        saver.save(tmp_path / "k", 1, write_meta_graph=False)
        train(variables)
        assert save_without_meta(saver, tmp_path / "k", 2).linked_nbytes == 0
        assert_holds(f"{tmp_path}/k-2", now(variables))
    assert not [name for name in os.listdir(tmp_path) if name.endswith("gpusaver-tmp")]


def save_without_meta(saver: gpusaver.Saver, path: Path, step: int) -> gpusaver.SaveReport:
    pending = saver.save_async(path, step, write_meta_graph=False)
    assert pending is not None
    pending.result()
    assert pending.report is not None
    return pending.report


def test_strict_finds_a_damaged_file_and_the_next_save_writes(tmp_path: Path) -> None:
    """Damage that neither size nor time of the file tells of."""
    variables = model()
    with gpusaver.Saver(list(variables.values()), incremental=True, strict=True) as saver:
        saver.save(tmp_path / "k", 1)
        path = f"{tmp_path}/k-1.data-00001-of-00002"
        times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
        with open(path, "r+b") as file:
            file.write(bytes(PHASE) + b"\xff")
        os.utime(path, ns=times)
        with pytest.raises(DataLossError, match="differs when it is read again"):
            saver.save(tmp_path / "k", 2)
        assert save(saver, tmp_path / "k", 3).linked_nbytes == 0
        assert_holds(f"{tmp_path}/k-3", now(variables))


def test_the_same_prefix_again(tmp_path: Path) -> None:
    variables = model()
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        for number in range(4):
            train(variables)
            assert (save(saver, tmp_path / "k").linked_nbytes > 0) == (number > 0)
            assert_holds(f"{tmp_path}/k", now(variables))


def test_a_file_for_each_device_and_kind(tmp_path: Path) -> None:
    with gpusaver.variables():
        variables = {
            f"v{n}": gpusaver.Variable(
                np.full(1000 + n, float(n)), name=f"v{n}", trainable=n % 2 == 0, device=f"cpu:{n // 2}"
            )
            for n in range(4)
        }
    with gpusaver.Saver(list(variables.values()), incremental=True, sharded=True) as saver:
        for step in range(3):
            variables["v0"].value[...] += 1
            variables["v2"].value[...] += 1
            if step == 2:
                variables["v3"].value[...] += 1
            report = save(saver, tmp_path / "k", step)
            assert report.linked_nbytes == (0, 8 * (1001 + 1003), 8 * 1001)[step]
            assert_holds(f"{tmp_path}/k-{step}", now(variables))
    assert len([name for name in os.listdir(tmp_path) if name.startswith("k-2.data-")]) == 4


def test_nothing_but_frozen_variables(tmp_path: Path) -> None:
    variables = {name: variable for name, variable in model().items() if name != "w"}
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        for step in range(3):
            save(saver, tmp_path / "k", step)
            assert_holds(f"{tmp_path}/k-{step}", now(variables))


def test_declared_ones_are_looked_at_in_places(tmp_path: Path) -> None:
    """Small ones everywhere.  What this mode cannot see is part of what it says."""
    size = 4 * MIB
    with gpusaver.variables():
        large = gpusaver.Variable(np.zeros(size, np.uint8), name="large", trainable=False)
        small = gpusaver.Variable(np.zeros(MIB, np.uint8), name="small", trainable=False)
    for place, variable, is_seen in (
        (MIB - 1, small, True),
        (64 * 1024 - 1, large, True),
        (64 * 1024, large, False),
        (3 * MIB, large, True),
    ):
        with gpusaver.Saver([large, small], incremental="declared") as saver:
            saver.save(tmp_path / "k", 1)
            variable.value[place] ^= 1
            report = save(saver, tmp_path / "k", 2)
            assert report.linked_nbytes == (0 if is_seen else PHASE + 5 * MIB)
    blocks = list(incremental._blocks(5, 3 * MIB))
    assert blocks == [(5, 65531), (MIB, 65536), (2 * MIB, 65536), (3 * MIB, 5)]


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_object_stores_copy(place: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("obstore")
    if place == "s3":
        request.getfixturevalue("s3")
    root = "memory://incremental" if place == "memory" else "s3://bucket/incremental"
    variables = model()
    with gpusaver.variables():
        variables["huge"] = gpusaver.Variable(np.arange(1_500_000.0), name="huge", trainable=False)  # two parts
    with gpusaver.Saver(list(variables.values()), incremental=True, max_to_keep=1) as saver:
        for step in range(3):
            train(variables)
            assert (save(saver, f"{root}/k", step).linked_nbytes > 0) == (step > 0)
            assert_holds(f"{root}/k-{step}", now(variables))
        RoutedStorage().remove(f"{root}/k-2.data-00001-of-00002")
        train(variables)
        assert save(saver, f"{root}/k", 3).linked_nbytes == 0
        assert_holds(f"{root}/k-3", now(variables))
    assert len([name for name in RoutedStorage().list(root) if ".data-" in name]) == 2


def test_larger_objects_than_a_store_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    object_store = pytest.importorskip("gpusaver.storage.object_store")
    monkeypatch.setattr(object_store, "COPY_LIMIT_NBYTES", 1_000_000)
    variables = model()
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        for step in range(2):
            assert save(saver, "memory://too-large/k", step).linked_nbytes == 0
            assert_holds(f"memory://too-large/k-{step}", now(variables))


def test_progress_counts_what_is_linked(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    variables = model()
    with gpusaver.Saver(list(variables.values()), incremental=True) as saver:
        for step in range(2):
            request = gpusaver.saver.SaveRequest(
                None, "blocking", "wait", is_awaited=True, on_written=lambda done, total: seen.append((done, total))
            )
            pending = saver.start(f"{tmp_path}/k-{step}", request)
            assert pending is not None
            pending.result()
            total = PHASE + 300_000 * 8 + 4 + 4000
            assert seen[-1] == (total, total)
            seen.clear()


def test_without_xxhash(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "xxhash":
            raise ImportError("No module named 'xxhash'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnimplementedError, match=r"pip install 'gpusaver\[incremental\]'"):
        gpusaver.Saver({"w": np.zeros(3)}, incremental=True)
