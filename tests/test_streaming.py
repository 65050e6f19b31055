"""Tensors in blocks: the same elements as the reader gives, and every byte verified."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpusaver
from gpusaver import DataLossError, NotFoundError, OutOfRangeError, PartitionedVariable, UnimplementedError, streaming

GOLDEN = Path(__file__).resolve().parent / "golden"
PREFIXES = sorted(str(path).removesuffix(".index") for path in GOLDEN.glob("*/*.index"))


def read(prefix: Any, name: str) -> bytes:
    with streaming.TensorStream(gpusaver.load_checkpoint(prefix)) as stream:
        return b"".join(block.tobytes() for block in stream.blocks(name))


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.removeprefix(f"{GOLDEN}/"))
@pytest.mark.parametrize("block_nbytes", [64, 8 << 20])
def test_every_golden_tensor(prefix: str, block_nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_NBYTES", block_nbytes)
    reader = gpusaver.load_checkpoint(prefix)
    names = [name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype.is_fixed_size]
    whole = reader.get_tensors(names)
    with streaming.TensorStream(reader) as stream:
        for name in names:
            assert b"".join(block.tobytes() for block in stream.blocks(name)) == np.asarray(whole[name]).tobytes()


@given(data=st.data())
@settings(deadline=None)
def test_parts_of_any_cut(data: st.DataObject, tmp_path_factory: Any) -> None:
    """A grid of cuts in every dimension, read in blocks that end within parts."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    values = np.random.default_rng(0).standard_normal(shape)
    boxes: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))})
        boxes = [(*box, slice(*cut)) for box in boxes for cut in itertools.pairwise(cuts)]
    parts = [PartitionedVariable(shape, box, values[box]) for box in boxes]
    prefix = gpusaver.save(tmp_path_factory.mktemp("parts") / "model", {"t": parts})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK_NBYTES", data.draw(st.sampled_from([8, 64, 200])))
        assert read(prefix, "t") == values.tobytes()


def save_parts(folder: Path) -> str:
    table = np.arange(60.0).reshape(6, 10)
    parts = [PartitionedVariable(table.shape, cut, table[cut]) for cut in (np.s_[:, :4], np.s_[:, 4:])]
    return gpusaver.save(folder / "model", {"t": parts, "w": np.arange(60.0), "s": "text"}, write_meta_graph=False)


@pytest.mark.parametrize("name", ["t", "w"])
def test_damage_is_told_at_the_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_NBYTES", 80)
    prefix = save_parts(tmp_path)
    data = Path(f"{prefix}.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    at = content.index(np.float64(33.0).tobytes(), 0 if name == "t" else content.index(np.arange(20.0).tobytes()))
    content[at] ^= 1
    data.write_bytes(content)
    blocks = []
    with (
        streaming.TensorStream(gpusaver.load_checkpoint(prefix)) as stream,
        pytest.raises(DataLossError, match=f"tensor {name}.*checksum"),
    ):
        blocks.extend(len(block) for block in stream.blocks(name))
    assert len(blocks) > 1
    data.write_bytes(content[:100])
    with pytest.raises(OutOfRangeError):
        read(prefix, name)


def test_what_has_no_blocks(tmp_path: Path) -> None:
    prefix = save_parts(tmp_path)
    with pytest.raises(UnimplementedError, match="string"):
        read(prefix, "s")
    with pytest.raises(NotFoundError, match="nothing"):
        read(prefix, "nothing")


def test_a_v1_checkpoint(tmp_path: Path) -> None:
    reader = gpusaver.load_checkpoint(GOLDEN / "v1_tf1" / "legacy.ckpt")
    names = [name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype.is_fixed_size]
    assert len(names) == 11
    assert [name for name in names if read(reader.prefix, name) != np.asarray(reader[name]).tobytes()] == []
