"""Python's operators on tensors and variables: ``a + b``, ``a[1:]``, ``a < b``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpusaver.compat.v1.graph import Tensor


def _call(function: str, *args: Any) -> Tensor:
    from gpusaver.compat.v1 import functions  # which is made of tensors: only now

    found: Tensor = getattr(functions, function)(*args)
    return found


class Operators:
    """``==`` compares objects, not elements: ``tf.equal`` does that."""

    def __add__(self, other: Any) -> Tensor:
        return _call("binary", "AddV2", self, other, "add")

    def __radd__(self, other: Any) -> Tensor:
        return _call("binary", "AddV2", other, self, "add")

    def __sub__(self, other: Any) -> Tensor:
        return _call("binary", "Sub", self, other, "sub")

    def __rsub__(self, other: Any) -> Tensor:
        return _call("binary", "Sub", other, self, "sub")

    def __mul__(self, other: Any) -> Tensor:
        return _call("binary", "Mul", self, other, "mul")

    def __rmul__(self, other: Any) -> Tensor:
        return _call("binary", "Mul", other, self, "mul")

    def __truediv__(self, other: Any) -> Tensor:
        return _call("truediv", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _call("truediv", other, self)

    def __floordiv__(self, other: Any) -> Tensor:
        return _call("binary", "FloorDiv", self, other, "floordiv")

    def __rfloordiv__(self, other: Any) -> Tensor:
        return _call("binary", "FloorDiv", other, self, "floordiv")

    def __mod__(self, other: Any) -> Tensor:
        return _call("binary", "FloorMod", self, other, "mod")

    def __rmod__(self, other: Any) -> Tensor:
        return _call("binary", "FloorMod", other, self, "mod")

    def __pow__(self, other: Any) -> Tensor:
        return _call("binary", "Pow", self, other, "pow")

    def __rpow__(self, other: Any) -> Tensor:
        return _call("binary", "Pow", other, self, "pow")

    def __matmul__(self, other: Any) -> Tensor:
        return _call("matmul", self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _call("matmul", other, self)

    def __lt__(self, other: Any) -> Tensor:
        return _call("binary", "Less", self, other, "Less")

    def __le__(self, other: Any) -> Tensor:
        return _call("binary", "LessEqual", self, other, "LessEqual")

    def __gt__(self, other: Any) -> Tensor:
        return _call("binary", "Greater", self, other, "Greater")

    def __ge__(self, other: Any) -> Tensor:
        return _call("binary", "GreaterEqual", self, other, "GreaterEqual")

    def __and__(self, other: Any) -> Tensor:
        return _call("logical_and", self, other)

    def __or__(self, other: Any) -> Tensor:
        return _call("logical_or", self, other)

    def __xor__(self, other: Any) -> Tensor:
        return _call("logical_xor", self, other)

    def __invert__(self) -> Tensor:
        return _call("logical_not", self)

    def __neg__(self) -> Tensor:
        return _call("negative", self)

    def __abs__(self) -> Tensor:
        return _call("abs", self)

    def __getitem__(self, key: Any) -> Tensor:
        return _call("getitem", self, key)

    __array_priority__ = 100  # `numpy_array + tensor` comes here
