"""Elementwise ops, casts and matrix products."""

from __future__ import annotations

from typing import Any

from gpusaver.compat.v1.convert import apply
from gpusaver.compat.v1.ops.rules import broadcasted, merged, reduced_to, unchanged
from gpusaver.compat.v1.shapes import Shape, broadcast
from gpusaver.compat.v1.table import op


def _unary(name: str, kernel: Any, gradient: Any = None) -> None:
    op(name, "x:T -> T", "T:type", shape=unchanged, kernel=kernel, gradient=gradient)


def _of_output(name: str) -> Any:
    """A gradient that TensorFlow computes from the output by an op of its own."""
    return lambda node, g: [apply(name, node.outputs[0], g)]


def _times(factor: Any) -> Any:
    """The gradient ``g * factor(x)``."""
    return lambda node, g: [apply("Mul", g, factor(node.inputs[0]))]


def _like(run: Any, x: Any, result: Any) -> Any:
    """NumPy makes float64 of some integers; TensorFlow keeps the type."""
    return result if result.dtype == x.dtype else result.astype(x.dtype)


_unary("Neg", lambda run, node, x: run.xp.negative(x), lambda node, g: [apply("Neg", g)])
_unary("Abs", lambda run, node, x: run.xp.abs(x), _times(lambda x: apply("Sign", x)))
_unary("Sign", lambda run, node, x: run.xp.sign(x), lambda node, g: [apply("ZerosLike", node.inputs[0])])
_unary("Square", lambda run, node, x: x * x, _times(lambda x: apply("Mul", x, 2)))
_unary("Sqrt", lambda run, node, x: run.xp.sqrt(x), _of_output("SqrtGrad"))
_unary("Rsqrt", lambda run, node, x: _like(run, x, 1 / run.xp.sqrt(x)), _of_output("RsqrtGrad"))
_unary("Reciprocal", lambda run, node, x: _like(run, x, 1 / x), _of_output("ReciprocalGrad"))
_unary("Exp", lambda run, node, x: run.xp.exp(x), lambda node, g: [apply("Mul", g, node.outputs[0])])
_unary("Log", lambda run, node, x: run.xp.log(x), _times(lambda x: apply("Reciprocal", x)))
_unary("Log1p", lambda run, node, x: run.xp.log1p(x), _times(lambda x: apply("Reciprocal", apply("AddV2", x, 1))))
_unary("Sin", lambda run, node, x: run.xp.sin(x), _times(lambda x: apply("Cos", x)))
_unary("Cos", lambda run, node, x: run.xp.cos(x), _times(lambda x: apply("Neg", apply("Sin", x))))
for _name, _function in (("Floor", "floor"), ("Ceil", "ceil"), ("Round", "rint")):
    _unary(
        _name,
        lambda run, node, x, f=_function: _like(run, x, getattr(run.xp, f)(x)),
        lambda node, g: [None],
    )
_unary("Tanh", lambda run, node, x: run.xp.tanh(x), _of_output("TanhGrad"))


def sigmoid(run: Any, node: Any, x: Any) -> Any:
    """Without an overflow for either sign."""
    small = run.xp.exp(-run.xp.abs(x))
    return _like(run, x, run.xp.where(x >= 0, 1, small) / (1 + small))


_unary("Sigmoid", sigmoid, _of_output("SigmoidGrad"))


def _gradient_op(name: str, kernel: Any, gradient: Any = None) -> None:
    op(name, "y:T dy:T -> T", "T:type", shape=merged, kernel=kernel, gradient=gradient)


_gradient_op("SqrtGrad", lambda run, node, y, dy: _like(run, y, dy / (y + y)))
_gradient_op("RsqrtGrad", lambda run, node, y, dy: _like(run, y, dy * (y * y * y) * y.dtype.type(-0.5)))
_gradient_op("ReciprocalGrad", lambda run, node, y, dy: -dy * y * y)
_gradient_op("TanhGrad", lambda run, node, y, dy: dy * (1 - y * y))
_gradient_op("SigmoidGrad", lambda run, node, y, dy: dy * y * (1 - y))


def _both(first: Any, second: Any) -> Any:
    """The gradient of ``f(x, y)``: two functions of (node, g), summed where an input was broadcast."""

    def gradient(node: Any, g: Any) -> list[Any]:
        x, y = node.inputs
        return [reduced_to(first(node, g), x, y), reduced_to(second(node, g), y, x)]

    return gradient


def _binary(name: str, kernel: Any, gradient: Any = None) -> None:
    op(name, "x:T y:T -> T", "T:type", shape=broadcasted, kernel=kernel, gradient=gradient)


def _x_times_g(node: Any, g: Any) -> Any:
    return apply("Mul", node.inputs[0], g)


def _y_times_g(node: Any, g: Any) -> Any:
    return apply("Mul", g, node.inputs[1])


def _pass(node: Any, g: Any) -> Any:
    return g


def _negate(node: Any, g: Any) -> Any:
    return apply("Neg", g)


def _of_quotient(node: Any, g: Any) -> Any:
    x, y = node.inputs
    return apply("Mul", g, apply("RealDiv", apply("RealDiv", apply("Neg", x), y), y))


def _of_base(node: Any, g: Any) -> Any:
    x, y = node.inputs
    return apply("Mul", apply("Mul", g, y), apply("Pow", x, apply("Sub", y, 1)))


def _of_exponent(node: Any, g: Any) -> Any:
    """0 where the logarithm does not exist, as in TensorFlow."""
    x = node.inputs[0]
    positive = apply("Greater", x, 0)
    safe = apply("SelectV2", positive, x, apply("AddV2", apply("ZerosLike", x), 1))
    log = apply("SelectV2", positive, apply("Log", safe), apply("ZerosLike", x))
    return apply("Mul", apply("Mul", g, node.outputs[0]), log)


def _where_chosen(comparison: str, *, chosen: bool) -> Any:
    def gradient(node: Any, g: Any) -> Any:
        zeros = apply("ZerosLike", g)
        is_first = apply(comparison, *node.inputs)
        return apply("SelectV2", is_first, g, zeros) if chosen else apply("SelectV2", is_first, zeros, g)

    return gradient


def _twice_difference(sign: int) -> Any:
    def gradient(node: Any, g: Any) -> Any:
        return apply("Mul", apply("Mul", g, 2 * sign), apply("Sub", *node.inputs))

    return gradient


def _floor_mod(run: Any, node: Any, x: Any, y: Any) -> Any:
    return run.xp.remainder(x, y)


_binary("AddV2", lambda run, node, x, y: x + y, _both(_pass, _pass))
_binary("Add", lambda run, node, x, y: x + y, _both(_pass, _pass))
_binary("Sub", lambda run, node, x, y: x - y, _both(_pass, _negate))
_binary("Mul", lambda run, node, x, y: x * y, _both(_y_times_g, _x_times_g))
_binary(
    "RealDiv",
    lambda run, node, x, y: run.xp.true_divide(x, y),
    _both(lambda node, g: apply("RealDiv", g, node.inputs[1]), _of_quotient),
)
_binary("FloorDiv", lambda run, node, x, y: run.xp.floor_divide(x, y), lambda node, g: [None, None])
_binary("FloorMod", _floor_mod)
_binary("Pow", lambda run, node, x, y: run.xp.power(x, y), _both(_of_base, _of_exponent))
_binary(
    "Maximum",
    lambda run, node, x, y: run.xp.maximum(x, y),
    _both(_where_chosen("GreaterEqual", chosen=True), _where_chosen("GreaterEqual", chosen=False)),
)
_binary(
    "Minimum",
    lambda run, node, x, y: run.xp.minimum(x, y),
    _both(_where_chosen("LessEqual", chosen=True), _where_chosen("LessEqual", chosen=False)),
)
_binary(
    "SquaredDifference",
    lambda run, node, x, y: run.xp.square(x - y),
    _both(_twice_difference(1), _twice_difference(-1)),
)

for _name, _function in (
    ("Equal", "equal"),
    ("NotEqual", "not_equal"),
    ("Less", "less"),
    ("LessEqual", "less_equal"),
    ("Greater", "greater"),
    ("GreaterEqual", "greater_equal"),
):
    op(
        _name,
        "x:T y:T -> bool",
        "T:type incompatible_shape_error:bool=True" if _name in ("Equal", "NotEqual") else "T:type",
        shape=broadcasted,
        kernel=lambda run, node, x, y, f=_function: getattr(run.xp, f)(x, y),
        gradient=lambda node, g: [None, None],
    )
for _name, _function in (("LogicalAnd", "logical_and"), ("LogicalOr", "logical_or")):
    op(
        _name,
        "x:bool y:bool -> bool",
        shape=broadcasted,
        kernel=lambda run, node, x, y, f=_function: getattr(run.xp, f)(x, y),
        gradient=lambda node, g: [None, None],
    )
op("LogicalNot", "x:bool -> bool", shape=unchanged, kernel=lambda run, node, x: run.xp.logical_not(x))


def _add_n(run: Any, node: Any, *inputs: Any) -> Any:
    total = inputs[0]
    for other in inputs[1:]:
        total = total + other
    return total


op(
    "AddN",
    "inputs:N*T -> T",
    "N:int T:type",
    shape=merged,
    kernel=_add_n,
    gradient=lambda node, g: [g] * len(node.inputs),
)


def _cast(run: Any, node: Any, x: Any) -> Any:
    return x.astype(node.attrs["DstT"].numpy_dtype)


def _cast_gradient(node: Any, g: Any) -> list[Any]:
    source = node.inputs[0].dtype
    return [apply("Cast", g, DstT=source) if source.is_floating and g.dtype.is_floating else None]


op(
    "Cast",
    "x:SrcT -> DstT",
    "SrcT:type DstT:type Truncate:bool=False",
    shape=unchanged,
    kernel=_cast,
    gradient=_cast_gradient,
)


def _select_shape(node: Any) -> list[Shape]:
    """Of Select: a condition of rank 1 may choose among rows."""
    return [node.inputs[1].static_shape if node.inputs[1].static_shape is not None else node.inputs[2].static_shape]


def _select(run: Any, node: Any, condition: Any, x: Any, y: Any) -> Any:
    if condition.ndim == 1 and x.ndim > 1:
        condition = condition.reshape(-1, *[1] * (x.ndim - 1))
    return run.xp.where(condition, x, y)


def _select_gradient(node: Any, g: Any) -> list[Any]:
    zeros = apply("ZerosLike", g)
    return [None, apply("Select", node.inputs[0], g, zeros), apply("Select", node.inputs[0], zeros, g)]


def _select_v2_gradient(node: Any, g: Any) -> list[Any]:
    condition, x, y = node.inputs
    zeros = apply("ZerosLike", g)
    full = node.outputs[0]
    return [
        None,
        reduced_to(apply("SelectV2", condition, g, zeros), x, full),
        reduced_to(apply("SelectV2", condition, zeros, g), y, full),
    ]


op(
    "Select",
    "condition:bool t:T e:T -> T",
    "T:type",
    shape=_select_shape,
    kernel=_select,
    gradient=_select_gradient,
)
op(
    "SelectV2",
    "condition:bool t:T e:T -> T",
    "T:type",
    shape=lambda node: [
        broadcast(node.inputs[0].static_shape, broadcast(node.inputs[1].static_shape, node.inputs[2].static_shape))
    ],
    kernel=lambda run, node, condition, x, y: run.xp.where(condition, x, y),
    gradient=_select_v2_gradient,
)


def _matmul_shape(node: Any) -> list[Shape]:
    a, b = (tensor.static_shape for tensor in node.inputs)
    for shape in (a, b):
        if shape is not None and len(shape) != 2:
            raise ValueError(f"Shape must be rank 2 but is rank {len(shape)}")
    a, b = a or (None, None), b or (None, None)
    rows, inner = a[::-1] if node.attrs["transpose_a"] else a
    other, columns = b[::-1] if node.attrs["transpose_b"] else b
    if inner is not None and other is not None and inner != other:
        raise ValueError(f"Dimensions must be equal, but are {inner} and {other}")
    return [(rows, columns)]


def _matmul(run: Any, node: Any, a: Any, b: Any) -> Any:
    attrs = node.attrs
    return (a.T if attrs["transpose_a"] else a) @ (b.T if attrs["transpose_b"] else b)


def _product_gradient(name: str, first: str, second: str) -> Any:
    """Of a product whose attributes ``first`` and ``second`` say which side is transposed."""

    def product(x: Any, y: Any, at: bool, bt: bool) -> Any:
        attrs: dict[str, Any] = {first: at, second: bt}
        return apply(name, x, y, **attrs)

    def gradient(node: Any, g: Any) -> list[Any]:
        a, b = node.inputs
        cases = {
            (False, False): lambda: [product(g, b, False, True), product(a, g, True, False)],
            (False, True): lambda: [product(g, b, False, False), product(g, a, True, False)],
            (True, False): lambda: [product(b, g, False, True), product(a, g, False, False)],
            (True, True): lambda: [product(b, g, True, True), product(g, a, True, True)],
        }
        return cases[bool(node.attrs[first]), bool(node.attrs[second])]()

    return gradient


op(
    "MatMul",
    "a:T b:T -> T",
    "transpose_a:bool=False transpose_b:bool=False T:type",
    shape=_matmul_shape,
    kernel=_matmul,
    gradient=_product_gradient("MatMul", "transpose_a", "transpose_b"),
)


def _batch_matmul_shape(node: Any) -> list[Shape]:
    x, y = (tensor.static_shape for tensor in node.inputs)
    if x is None or y is None:
        return [None]
    if len(x) < 2 or len(y) < 2:
        raise ValueError("Shape must be at least rank 2")
    batch = broadcast(x[:-2], y[:-2])
    rows, inner = x[:-3:-1] if node.attrs["adj_x"] else x[-2:]
    other, columns = y[:-3:-1] if node.attrs["adj_y"] else y[-2:]
    if inner is not None and other is not None and inner != other:
        raise ValueError(f"Dimensions must be equal, but are {inner} and {other}")
    return [None if batch is None else (*batch, rows, columns)]


def _batch_matmul(run: Any, node: Any, x: Any, y: Any) -> Any:
    def adjoint(a: Any) -> Any:
        return run.xp.conj(run.xp.swapaxes(a, -1, -2))

    return run.xp.matmul(adjoint(x) if node.attrs["adj_x"] else x, adjoint(y) if node.attrs["adj_y"] else y)


def _batch_matmul_gradient(node: Any, g: Any) -> list[Any]:
    """Batches of one shape; where one was broadcast, TensorFlow too sums it up."""
    x, y = node.inputs
    grads = _product_gradient("BatchMatMulV2", "adj_x", "adj_y")(node, g)
    if x.static_shape is None or y.static_shape is None or x.static_shape[:-2] != y.static_shape[:-2]:
        raise LookupError("the gradient of a BatchMatMulV2 whose batches are broadcast is not there")
    return list(grads)


op(
    "BatchMatMulV2",
    "x:T y:T -> T",
    "T:type adj_x:bool=False adj_y:bool=False",
    shape=_batch_matmul_shape,
    kernel=_batch_matmul,
    gradient=_batch_matmul_gradient,
)
