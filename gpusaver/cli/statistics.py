"""Numbers about tensors, block by block: what they hold, and how two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.tensor import DataType

Array = npt.NDArray[Any]


def wide(block: Array) -> Array:
    """As a type that NumPy calculates with: float64, complex128, int64 or uint64; every value exactly."""
    if block.dtype.kind in "biu":
        return block.astype(np.uint64 if block.dtype.kind in "bu" else np.int64)
    if block.dtype.kind == "c":
        return block.astype(np.complex128)
    if block.dtype.kind == "f":
        return block.astype(np.float64)
    name = block.dtype.name  # ml_dtypes' own
    return block.astype(np.int64 if name.startswith("int") else np.uint64 if name.startswith("uint") else np.float64)


class Statistics:
    """Minimum, maximum and mean without NaNs, and their number.  Complex numbers have no order, strings nothing."""

    def __init__(self, dtype: DataType) -> None:
        self.has_any = dtype.is_fixed_size
        self._has_order = dtype not in (DataType.complex64, DataType.complex128)
        self._min: Any = None
        self._max: Any = None
        self._sum: Any = 0.0
        self._count = self._nan = 0

    def add(self, block: Array) -> None:
        values = wide(block)
        if values.dtype.kind in "fc":
            is_nan = np.isnan(values)
            self._nan += int(is_nan.sum())
            values = values[~is_nan]
        if not values.size:
            return
        self._count += values.size
        with np.errstate(invalid="ignore", over="ignore"):
            self._sum += values.sum(dtype=np.complex128 if values.dtype.kind == "c" else np.float64)
        if self._has_order:
            low, high = values.min().item(), values.max().item()
            self._min = low if self._min is None else min(self._min, low)
            self._max = high if self._max is None else max(self._max, high)

    def row(self) -> dict[str, Any]:
        has_mean = self._count and self._has_order
        mean = float(self._sum) / self._count if has_mean else None
        return {"min": self._min, "max": self._max, "mean": mean, "nan": self._nan if self.has_any else None}


class Difference:
    """How two tensors of one type and shape differ.

    ``count``: elements that differ; NaN equals NaN, and 0 equals -0, but with ``exact`` only equal bits are equal.
    ``max_abs``, ``max_rel``: the largest ``|a - b|`` and ``|a - b| / max(|a|, |b|)``; infinite where one is NaN.
    """

    def __init__(self, exact: bool) -> None:
        self._exact = exact
        self.count = 0
        self.max_abs = 0.0
        self.max_rel = 0.0

    def add(self, first: Array, second: Array) -> None:
        a, b = wide(first), wide(second)
        with np.errstate(invalid="ignore", over="ignore"):
            differs = (a != b) & ~((a != a) & (b != b))
        bits = differs if not self._exact else _bits_differ(first, second)
        self.count += int((bits | differs).sum())
        if not differs.any():
            return
        a, b = a[differs], b[differs]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            apart = _distance(a, b)
            relative = apart / np.maximum(_magnitude(a), _magnitude(b))
        self.max_abs = max(self.max_abs, float(np.where(np.isnan(apart), math.inf, apart).max()))
        self.max_rel = max(self.max_rel, float(np.where(np.isnan(relative), math.inf, relative).max()))


def _distance(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":  # in the type itself the difference of two large numbers would overflow
        low, high = np.minimum(a, b), np.maximum(a, b)
        return (high.view(np.uint64) - low.view(np.uint64)).astype(np.float64)
    return np.asarray(np.abs(a - b))


def _magnitude(values: Array) -> Array:
    return np.asarray(np.abs(values if values.dtype.kind == "c" else values.astype(np.float64)))


def _bits_differ(first: Array, second: Array) -> Array:
    a, b = (np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1) for array in (first, second))
    return np.asarray((a != b).any(axis=1))


def side_by_side(first: Iterable[Array], second: Iterable[Array]) -> Iterator[tuple[Array, Array]]:
    """Pieces of equal length of two tensors that come in blocks of their own sizes."""
    others = iter(second)
    other: Array = np.empty(0)
    for block in first:
        while len(block):
            if not len(other):
                other = next(others)
            length = min(len(block), len(other))
            yield block[:length], other[:length]
            block, other = block[length:], other[length:]
    for _ in others:  # whatever is left: the end of the checksum
        pass
