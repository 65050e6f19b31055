"""Damage drawn at random in checkpoints too large for all of it: tests/test_damage.py tries every bit of a small one.

The index and the data files carry checksums: there, an error that names the file (and the tensor, if it is its data),
or bit-exact data.  The state file and `.meta` carry none: there, no crash, no way out of the directory, and what is
restored is bit-exactly a committed checkpoint.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage_tools import exact, is_refused, outcome
from scenarios import Scenario, version_of
from size import sized

import gpusaver
from gpusaver.bundle.index import BundleIndex
from gpusaver.errors import Error
from gpusaver.pipeline import restore

State = dict[str, Any]
CountCases = Callable[[int], None]

BATCHES = sized(2, 20)
FLIPS_PER_BATCH = sized(2500, 5000)
#: Of each kind of coarser damage, in each batch.
COARSE_PER_BATCH = sized(60, 250)
STATE_FILES_PER_BATCH = sized(500, 2500)


def large_state(seed: int) -> State:
    """One tensor of many chunks, some of several, many small ones, and strings; two files."""
    random = np.random.default_rng(seed)
    state: State = {f"small/{number}": random.random(number % 40) for number in range(100)}
    state["large"] = random.random((200, 300), np.float32)
    state["medium"] = random.integers(0, 9, 30_000, np.int16)
    state["words"] = np.array([b"x" * int(n) for n in random.integers(0, 50, 200)], object)
    state["large"] = gpusaver.Variable(state["large"], "large", device="cpu:1")
    return state


def save_large(directory: Path, seed: int) -> dict[str, bytes]:
    with gpusaver.variables():
        gpusaver.Saver(large_state(seed), sharded=True).save(directory / "k", write_state=False, write_meta_graph=False)
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


class Victim:
    """A checkpoint to be damaged, and another of the same names, shapes and places."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "victim"
        other = directory / "other"
        for place in (self.directory, other):
            place.mkdir()
        self.files = save_large(self.directory, 1)
        self.others = save_large(other, 2)
        assert len(self.files) == 3
        self.values = self.load()
        self._owners: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.files}
        index = BundleIndex(self.files["k.index"], "k.index")
        for key, entry in index.items():
            name = f"k.data-{entry.shard:05d}-of-{index.num_shards:05d}"
            self._owners[name].append((entry.offset, entry.offset + entry.nbytes, key.decode()))

    def load(self) -> dict[str, Any]:
        return exact(gpusaver.load(self.directory / "k"))

    def owners(self, name: str, start: int, stop: int) -> list[str]:
        """The tensors that have bytes in that part of the file."""
        return [key for first, last, key in self._owners[name] if first < stop and start < last]

    def check(self, name: str, damaged: bytes) -> bool:
        """Whether the checkpoint with this file is refused; else it must be read bit for bit."""
        path, original = self.directory / name, self.files[name]
        path.write_bytes(damaged)
        found = outcome(self.load)
        path.write_bytes(original)
        if not isinstance(found, Error):
            assert found == self.values, "wrong values were read silently"
            return False
        # An index of another checkpoint is sound in itself: then the data do not fit it.
        is_sound = name == "k.index" and damaged == self.others[name]
        assert str(self.directory / "k.data") in str(found) if is_sound else str(path) in str(found)
        if name != "k.index":
            shared = min(len(original), len(damaged))
            differing = np.flatnonzero(
                np.frombuffer(original[:shared], np.uint8) != np.frombuffer(damaged[:shared], np.uint8)
            ).tolist()
            differing += [*range(len(damaged), len(original))]
            hit = {key for at in differing for key in self.owners(name, at, at + 1)} if len(differing) < 50 else None
            named = hit if hit is not None else self.owners(name, differing[0], differing[-1] + 1)
            assert any(f"tensor {key}" in str(found) for key in named), found
        return True

    def check_flip(self, name: str, at: int, bit: int) -> None:
        """As :meth:`check`, in place: there are many."""
        path, original = self.directory / name, self.files[name]
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes((original[at] ^ 1 << bit,)), at)
            owners = self.owners(name, at, at + 1)
            refused = is_refused(self.load, self.values, str(path), *(f"tensor {key}" for key in owners))
            os.pwrite(file.fileno(), original[at : at + 1], at)
        if name != "k.index":
            assert refused == bool(owners)


@pytest.fixture
def victim(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Victim:
    monkeypatch.setattr(restore, "CHUNK_NBYTES", 32 * 1024)
    return Victim(memory_path)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_flipped_bits(batch: int, victim: Victim, count_cases: CountCases) -> None:
    draw = random.Random(batch)
    names = list(victim.files)
    for number in range(FLIPS_PER_BATCH):
        name = names[number % len(names)]
        victim.check_flip(name, draw.randrange(len(victim.files[name])), draw.randrange(8))
    assert victim.load() == victim.values
    count_cases(FLIPS_PER_BATCH)


def swapped_sectors(draw: random.Random, data: bytes, other: bytes) -> bytes:
    first, second = sorted(draw.sample(range(len(data) // 512), 2))
    one, two = data[first * 512 :][:512], data[second * 512 :][:512]
    return data[: first * 512] + two + data[first * 512 + 512 : second * 512] + one + data[second * 512 + 512 :]


def zeroed_page(draw: random.Random, data: bytes, other: bytes) -> bytes:
    at = draw.randrange(-(-len(data) // 4096)) * 4096
    return (data[:at] + bytes(4096) + data[at + 4096 :])[: len(data)]


def lost_write(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """A sector that still holds what was there before."""
    at = draw.randrange(-(-len(data) // 512)) * 512
    return data[:at] + other[at : at + 512].ljust(len(data[at : at + 512]), b"\0") + data[at + 512 :]


def truncated(draw: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def appended(draw: random.Random, data: bytes, other: bytes) -> bytes:
    return data + draw.randbytes(draw.randint(1, 5000))


def replaced(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """The whole file of another checkpoint."""
    return other


KINDS = [swapped_sectors, zeroed_page, lost_write, truncated, appended, replaced]


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_coarser_damage(
    kind: Callable[[random.Random, bytes, bytes], bytes], batch: int, victim: Victim, count_cases: CountCases
) -> None:
    draw = random.Random(batch)
    names = list(victim.files)
    refused = count = 0
    for number in range(COARSE_PER_BATCH):
        name = names[number % len(names)]
        damaged = kind(draw, victim.files[name], victim.others[name])
        if damaged != victim.files[name]:
            count += 1
            refused += victim.check(name, damaged)
    assert victim.load() == victim.values
    if kind is appended:
        assert refused == count // 3, "behind an index it hides the footer, behind a data file it belongs to nothing"
    else:
        assert refused > count * 0.9, "hardly any byte of these files belongs to nothing"
    count_cases(count)


def damaged_text(draw: random.Random, text: bytes) -> bytes:
    """A state file with flipped, lost, doubled and foreign bytes."""
    data = bytearray(text)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                data[at : at + 1] = bytes((draw.randrange(256),))
            case 1 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                del data[at : at + draw.randint(1, 40)]
            case 3:
                data[at:at] = draw.choice([b"../", b"/", b"\\000", b'"', b"/etc/", b"..", b"k-1", b"\n", b"{", b"\\"])
            case 4:
                start = draw.randrange(len(data) + 1)
                data[at:at] = data[start : start + draw.randint(1, 60)]
            case _:
                data[at:] = draw.randbytes(draw.randint(0, 64))
    return bytes(data)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_state_files(batch: int, memory_path: Path, count_cases: CountCases) -> None:
    draw = random.Random(batch)
    Scenario("outside", (7,)).run(memory_path)  # k-7, one level above: nobody may get there
    directory = memory_path / "inside"
    directory.mkdir()
    Scenario("inside", (1, 2, 3)).run(directory)
    path = directory / "checkpoint"
    text = path.read_bytes()
    followed = 0
    for _ in range(STATE_FILES_PER_BATCH):
        path.write_bytes(damaged_text(draw, text))
        latest = outcome(lambda: gpusaver.latest_checkpoint(directory))
        if latest is None or isinstance(latest, Error):
            continue
        assert os.path.realpath(latest).startswith(f"{directory}{os.sep}")
        assert version_of(gpusaver.load(latest)) in (1, 2, 3)
        followed += 1
    assert 0 < followed < STATE_FILES_PER_BATCH
    count_cases(STATE_FILES_PER_BATCH)


def flipped(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_meta_files(batch: int, memory_path: Path, count_cases: CountCases) -> None:
    """Variables made from it may lack some, never hold what was not saved under their name."""
    draw = random.Random(batch)
    scenario = Scenario("meta", (1,))
    scenario.run(memory_path)
    prefix = scenario.prefix(memory_path, 1)
    stored = exact(gpusaver.load(prefix))
    path = Path(f"{prefix}.meta")
    whole = path.read_bytes()

    def restored() -> dict[str, Any]:
        with gpusaver.variables():
            gpusaver.import_meta_graph(path).restore(prefix)
            return exact({variable.name: variable.value for variable in gpusaver.current_variables()})

    assert restored() == stored
    followed = 0
    for _ in range(STATE_FILES_PER_BATCH):
        path.write_bytes(draw.choice([flipped, damaged_text])(draw, whole))
        found = outcome(restored)
        if not isinstance(found, Error):
            assert found.items() <= stored.items()
            followed += 1
    assert 0 < followed < STATE_FILES_PER_BATCH
    count_cases(STATE_FILES_PER_BATCH)
