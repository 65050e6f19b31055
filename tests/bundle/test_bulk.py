"""What is done for all entries at once gives what is done for each alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.crc import mask, unmask
from gpusaver.bundle.entry import Entries, Entry, decode_entries, decode_entry, encode_entry
from gpusaver.bundle.index import BundleIndex, IndexTemplate, encode_index
from gpusaver.errors import DataLossError
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

uint32 = st.integers(0, 2**32 - 1)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    dtype = draw(st.sampled_from([DataType.float32, DataType.int64, DataType.bool, DataType.string, DataType.bfloat16]))
    spec = TensorSpec(dtype, tuple(draw(st.lists(st.integers(0, 300), max_size=3))))
    nbytes = spec.nbytes if dtype.is_fixed_size else spec.num_elements + draw(st.integers(0, 2**40))
    offset = draw(st.integers(0, 2**20) | st.integers(0, 2**62))
    return Entry(spec, draw(st.integers(0, 3)), offset, nbytes, draw(uint32 | st.just(0)))


def decoded(values: list[bytes]) -> list[Entry]:
    """By columns, in two blocks."""
    parts = []
    for block in (values[::2], values[1::2]):
        ends = list(itertools.accumulate(map(len, block)))
        starts = [end - len(value) for end, value in zip(ends, block, strict=True)]
        parts.append(decode_entries(b"".join(block), np.array(starts, np.int64), np.array(ends, np.int64), 4))
    joined = Entries.joined(parts)
    first, second = joined[: len(values[::2])], joined[len(values[::2]) :]
    return [row for pair in itertools.zip_longest(first, second) for row in pair if row is not None]


@given(st.lists(entries(), max_size=20))
def test_decoding_all_is_decoding_each(rows: list[Entry]) -> None:
    values = [encode_entry(row) for row in rows]
    assert decoded(values) == [decode_entry(value, 4) for value in values] == rows


@given(entries(), st.data())
def test_what_one_alone_refuses_all_refuse(row: Entry, data: st.DataObject) -> None:
    value = bytearray(encode_entry(row))
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    values = [encode_entry(row), bytes(value)]
    try:
        expected = [decode_entry(each, 4) for each in values]
    except Exception as error:
        with pytest.raises(type(error)):
            decoded(values)
    else:
        assert decoded(values) == expected


def test_an_index_decoded_as_a_whole_answers_as_before() -> None:
    part = TensorSlice(((0, 2),))
    rows = {
        b"name%04d" % n: Entry(TensorSpec(DataType.float32, (n,)), 0, 4 * n * n, 4 * n, mask(n)) for n in range(300)
    }
    rows[b"whole"] = Entry(TensorSpec(DataType.float32, (2,)), 0, 0, 0, 0, (part,))
    data = encode_index(1, sorted(rows.items()))
    index = BundleIndex(data, "x.index")
    index.rows(sorted(rows))
    assert {key: index.get(key) for key in rows} == rows
    assert index.get(b"name") is None
    assert index.get(b"") is None
    assert dict(index.items()) == rows


def test_damage_is_named_when_the_entry_is_asked_for() -> None:
    rows = [(b"name%04d" % n, Entry(TensorSpec(DataType.float32, (1,)), 0, 4 * n, 4, 1)) for n in range(300)]
    rows[7] = (rows[7][0], rows[7][1]._replace(nbytes=5))
    index = BundleIndex(encode_index(1, rows), "x.index")
    assert index.rows([key for key, _ in rows]) is None
    assert index.get(rows[8][0]) == rows[8][1]
    with pytest.raises(DataLossError, match="name0007"):
        index.get(rows[7][0])


@given(st.lists(entries(), min_size=1, max_size=60), st.data())
def test_a_template_is_filled_as_the_index_is_encoded(rows: list[Entry], data: st.DataObject) -> None:
    keyed = [(b"key%02d" % number, row) for number, row in enumerate(rows)]
    keyed.insert(0, (b"\x00", Entry(TensorSpec(DataType.float32, (4,)), 0, 0, 0, 0, (TensorSlice(((1, 2),)),))))
    crcs = [0, *data.draw(st.lists(uint32, min_size=len(rows), max_size=len(rows)))]
    template = IndexTemplate(4, keyed)
    expected = encode_index(
        4, [(key, row if row.slices else row._replace(crc=crc)) for (key, row), crc in zip(keyed, crcs, strict=True)]
    )
    assert template.fill(np.array(crcs, np.uint32), lambda: keyed) == expected


@given(st.lists(uint32, max_size=9))
def test_masks_of_arrays_are_those_of_their_elements(values: list[int]) -> None:
    array = np.array(values, np.uint32)
    assert mask(array).tolist() == [mask(value) for value in values]
    assert unmask(array).tolist() == [unmask(value) for value in values]
