"""Static shapes: what is known of a tensor's shape before anything runs.

Inside the package a shape is a tuple with None for an unknown size, or None where not even the rank is known.
``TensorShape`` is the same as users see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

Shape = tuple[int | None, ...] | None


class Dimension(int):
    """A known size: an int that also has TensorFlow 1's ``.value``."""

    @property
    def value(self) -> int:
        return int(self)


class TensorShape:
    """The static shape of a tensor; sizes are ints, None where unknown."""

    __slots__ = ("_sizes",)

    def __init__(self, dims: Any = None) -> None:
        self._sizes: Shape = as_shape(dims)

    @property
    def ndims(self) -> int | None:
        return None if self._sizes is None else len(self._sizes)

    rank = ndims

    @property
    def dims(self) -> list[Dimension | None] | None:
        return None if self._sizes is None else [None if n is None else Dimension(n) for n in self._sizes]

    def as_list(self) -> list[int | None]:
        """ValueError if the rank is unknown."""
        if self._sizes is None:
            raise ValueError("as_list() is not defined on an unknown TensorShape.")
        return list(self._sizes)

    def is_fully_defined(self) -> bool:
        return is_known(self._sizes)

    def num_elements(self) -> int | None:
        return math.prod(n for n in self._sizes or () if n is not None) if self.is_fully_defined() else None

    def is_compatible_with(self, other: Any) -> bool:
        return is_compatible(self._sizes, as_shape(other))

    def assert_is_compatible_with(self, other: Any) -> None:
        if not self.is_compatible_with(other):
            raise ValueError(f"Shapes {self} and {TensorShape(other)} are incompatible")

    def merge_with(self, other: Any) -> TensorShape:
        """What both say; ValueError if they contradict each other."""
        return TensorShape(merge(self._sizes, as_shape(other)))

    def concatenate(self, other: Any) -> TensorShape:
        sizes = as_shape(other)
        return TensorShape(None if self._sizes is None or sizes is None else self._sizes + sizes)

    @overload
    def __getitem__(self, key: int) -> Dimension | None: ...
    @overload
    def __getitem__(self, key: slice) -> TensorShape: ...
    def __getitem__(self, key: int | slice) -> Dimension | TensorShape | None:
        if self._sizes is None:
            return TensorShape(None) if isinstance(key, slice) else None
        if isinstance(key, slice):
            return TensorShape(self._sizes[key])
        size = self._sizes[key]
        return None if size is None else Dimension(size)

    def __iter__(self) -> Iterator[Dimension | None]:
        if self._sizes is None:
            raise ValueError("Cannot iterate over a shape with unknown rank.")
        return iter(self.dims or ())

    def __len__(self) -> int:
        if self._sizes is None:
            raise ValueError("Cannot take the length of shape with unknown rank.")
        return len(self._sizes)

    def __bool__(self) -> bool:
        return self._sizes is not None

    def __eq__(self, other: object) -> bool:
        try:
            return self._sizes == as_shape(other)
        except TypeError:
            return False

    def __hash__(self) -> int:
        return hash(self._sizes)

    def __str__(self) -> str:
        return shape_text(self._sizes)

    def __repr__(self) -> str:
        return f"TensorShape({None if self._sizes is None else list(self._sizes)})"


def as_shape(value: Any) -> Shape:
    """From a TensorShape, a list or tuple of sizes (None or -1: unknown), an int, or None (unknown rank)."""
    if value is None or isinstance(value, TensorShape):
        return None if value is None else value._sizes
    if isinstance(value, int):
        value = (value,)
    if hasattr(value, "as_list"):  # TensorFlow's
        value = value.as_list()
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError(f"Dimension value must be an integer or None, found shape {value!r}")
    return tuple(_size(size) for size in value)


def _size(size: Any) -> int | None:
    if size is None:
        return None
    number = getattr(size, "value", size)
    if number is None:
        return None
    try:
        number = number.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"Dimension value must be an integer or None, found {size!r}") from None
    return None if number == -1 else int(number)


def is_known(shape: Shape) -> bool:
    return shape is not None and None not in shape


def is_compatible(one: Shape, other: Shape) -> bool:
    if one is None or other is None:
        return True
    return len(one) == len(other) and all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def merge(one: Shape, other: Shape) -> Shape:
    """ValueError if they contradict each other."""
    if one is None or other is None:
        return other if one is None else one
    if not is_compatible(one, other):
        raise ValueError(f"Shapes {shape_text(one)} and {shape_text(other)} are incompatible")
    return tuple(b if a is None else a for a, b in zip(one, other, strict=True))


def shape_text(shape: Shape) -> str:
    if shape is None:
        return "<unknown>"
    return "(" + ", ".join("?" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def broadcast(one: Shape, other: Shape) -> Shape:
    """The shape of ``a + b``; ValueError if there is none."""
    if one is None or other is None:
        return None
    rank = max(len(one), len(other))
    padded = [(1,) * (rank - len(shape)) + shape for shape in (one, other)]
    sizes: list[int | None] = []
    for a, b in zip(*padded, strict=True):
        if a == 1 or b == 1:
            sizes.append(b if a == 1 else a)
        elif a is None or b is None:
            sizes.append(a if b is None else b)  # the other one can only be this, or 1
        elif a == b:
            sizes.append(a)
        else:
            raise ValueError(f"Dimensions must be equal, but are {a} and {b}")
    return tuple(sizes)


def numbers(shape: Shape) -> Sequence[int]:
    """For messages that say -1."""
    return [-1 if n is None else n for n in shape or ()]
