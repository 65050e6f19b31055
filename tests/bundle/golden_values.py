"""Compares decoded values with the ``expected-*.json`` of the golden checkpoints."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from gpusaver.bundle.crc import unmask
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.strings import decode_strings
from gpusaver.tensor import DataType, TensorSpec


def decode_array(entry: Entry, data: bytes, *, big_endian: bool = False) -> np.ndarray:
    """The array that the stored bytes of a whole tensor or slice stand for."""
    spec = entry.spec
    if spec.dtype == DataType.string:
        items = decode_strings(data, math.prod(spec.shape), "t", unmask(entry.crc), big_endian=big_endian)
        array = np.empty(len(items), dtype=object)
        array[:] = items
        return array.reshape(spec.shape)
    stored = np.frombuffer(data, np.uint8)
    if big_endian:
        stored = stored.reshape(-1, spec.dtype.swap_width)[:, ::-1].reshape(-1)
    bits = spec.dtype.sub_byte_bits
    if bits:
        stored = stored & (2**bits - 1)
        if spec.dtype in (DataType.int4, DataType.int2):
            stored = ((stored ^ 1 << bits - 1) - (1 << bits - 1)).astype(np.int8)
            return stored.astype(spec.dtype.numpy_dtype).reshape(spec.shape)
    return np.ascontiguousarray(stored).view(spec.dtype.numpy_dtype).reshape(spec.shape)


def check_array(expected: dict[str, Any], spec: TensorSpec, array: np.ndarray) -> None:
    """Asserts that a tensor is exactly the expected one, bit by bit."""
    assert (spec.dtype.name, list(spec.shape)) == (expected["dtype"], expected["shape"])
    assert (array.dtype, array.shape) == (spec.dtype.numpy_dtype, spec.shape)
    if "strings_b64" in expected:
        assert array.ravel().tolist() == [base64.b64decode(item) for item in expected["strings_b64"]]
    elif "data_b64" in expected:
        assert array.tobytes() == base64.b64decode(expected["data_b64"])
    else:
        assert array.ravel().astype(np.int64).tolist() == [int(value) for value in expected["values"]]
