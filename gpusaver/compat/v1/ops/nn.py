"""Activations and losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import apply
from gpusaver.compat.v1.ops.rules import merged, scalar, unchanged
from gpusaver.compat.v1.shapes import Shape, broadcast, merge
from gpusaver.compat.v1.table import op
from gpusaver.errors import InvalidArgumentError


def _relu_gradient(node: Any, g: Any) -> list[Any]:
    return [apply("ReluGrad", g, node.outputs[0])]


op(
    "Relu",
    "features:T -> T",
    "T:type",
    shape=unchanged,
    kernel=lambda run, node, x: run.xp.maximum(x, 0),
    gradient=_relu_gradient,
)
op(
    "ReluGrad",
    "gradients:T features:T -> T",
    "T:type",
    shape=merged,
    kernel=lambda run, node, g, x: g * (x > 0),
)
op(
    "Softplus",
    "features:T -> T",
    "T:type",
    shape=unchanged,
    kernel=lambda run, node, x: run.xp.maximum(x, 0) + run.xp.log1p(run.xp.exp(-run.xp.abs(x))),
    gradient=lambda node, g: [apply("Mul", g, apply("Sigmoid", node.inputs[0]))],
)


def _softmax(run: Any, node: Any, x: Any) -> Any:
    exponents = run.xp.exp(x - x.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def _softmax_gradient(node: Any, g: Any) -> list[Any]:
    y = node.outputs[0]
    total = apply("Sum", apply("Mul", g, y), [-1], keep_dims=True)
    return [apply("Mul", apply("Sub", g, total), y)]


def _log_softmax(run: Any, node: Any, x: Any) -> Any:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - run.xp.log(run.xp.exp(shifted).sum(axis=-1, keepdims=True))


def _log_softmax_gradient(node: Any, g: Any) -> list[Any]:
    total = apply("Sum", g, [-1], keep_dims=True)
    return [apply("Sub", g, apply("Mul", total, apply("Exp", node.outputs[0])))]


op("Softmax", "logits:T -> T", "T:type", shape=unchanged, kernel=_softmax, gradient=_softmax_gradient)
op("LogSoftmax", "logits:T -> T", "T:type", shape=unchanged, kernel=_log_softmax, gradient=_log_softmax_gradient)


def _entropy_shape(node: Any) -> list[Shape]:
    shape = broadcast(node.inputs[0].static_shape, node.inputs[1].static_shape)
    if shape is not None and len(shape) != 2:
        raise ValueError(f"Shape must be rank 2 but is rank {len(shape)}")
    return [None if shape is None else shape[:1], shape]


def _entropy(run: Any, node: Any, logits: Any, labels: Any) -> tuple[Any, Any]:
    """The loss of each row and, as TensorFlow's op does, its gradient beside it."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponents = run.xp.exp(shifted)
    total = exponents.sum(axis=1, keepdims=True)
    loss = (labels * (run.xp.log(total) - shifted)).sum(axis=1)
    return loss, exponents / total - labels


def _refuse_second(of_backprop: Any) -> None:
    """The second output is the gradient of the first; its own gradient is not there."""
    if of_backprop is not None:
        raise LookupError("the second derivative of a cross-entropy is not there")


def _sparse_gradient(node: Any, g: Any, of_backprop: Any) -> list[Any]:
    _refuse_second(of_backprop)
    return [apply("Mul", apply("ExpandDims", g, -1), node.outputs[1]), None]


def _entropy_gradient(node: Any, g: Any, of_backprop: Any) -> list[Any]:
    _refuse_second(of_backprop)
    logits, _ = node.inputs
    column = apply("ExpandDims", g, -1)
    log = apply("LogSoftmax", logits)
    return [apply("Mul", column, node.outputs[1]), apply("Mul", column, apply("Neg", log))]


op(
    "SoftmaxCrossEntropyWithLogits",
    "features:T labels:T -> T T",
    "T:type",
    shape=_entropy_shape,
    kernel=_entropy,
    gradient=_entropy_gradient,
)


def _sparse_shape(node: Any) -> list[Shape]:
    logits, labels = node.inputs[0].static_shape, node.inputs[1].static_shape
    return [merge(labels, None if logits is None else logits[:1]), logits]


def _sparse_entropy(run: Any, node: Any, logits: Any, labels: Any) -> tuple[Any, Any]:
    classes = logits.shape[1]
    if run.xp is np and labels.size and not (labels.min() >= 0 and labels.max() < classes):
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise InvalidArgumentError(
            f"Received a label value of {wrong} which is outside the valid range of [0, {classes})"
        )
    hot = (labels[:, None] == run.xp.arange(classes, dtype=labels.dtype)).astype(logits.dtype)
    return _entropy(run, node, logits, hot)


op(
    "SparseSoftmaxCrossEntropyWithLogits",
    "features:T labels:Tlabels -> T T",
    "T:type Tlabels:type=int64",
    shape=_sparse_shape,
    kernel=_sparse_entropy,
    gradient=_sparse_gradient,
)


def _bias_shape(node: Any) -> list[Shape]:
    value, bias = (tensor.static_shape for tensor in node.inputs)
    if value is not None and bias is not None and (len(bias) != 1 or len(value) < 2):
        raise ValueError(
            f"bias must be a vector and value of rank 2 at least, found ranks {len(bias)} and {len(value)}"
        )
    if value is None or bias is None or node.attrs["data_format"] in ("NCHW", b"NCHW"):
        return [value]
    return [(*value[:-1], merge((value[-1],), bias)[0])]  # type: ignore[index]


def _bias_form(node: Any, rank: int) -> tuple[int, ...]:
    """How a bias is reshaped to lie along the channels."""
    first = node.attrs["data_format"] in ("NCHW", b"NCHW")
    return (-1, *[1] * (rank - 2)) if first else (-1,)


def _bias_sum(run: Any, node: Any, g: Any) -> Any:
    channel = 1 if node.attrs["data_format"] in ("NCHW", b"NCHW") else g.ndim - 1
    return g.sum(axis=tuple(axis for axis in range(g.ndim) if axis != channel))


def _bias_gradient(node: Any, g: Any) -> list[Any]:
    return [g, apply("BiasAddGrad", g, data_format=node.attrs["data_format"])]


op(
    "BiasAdd",
    "value:T bias:T -> T",
    "T:type data_format:string='NHWC'",
    shape=_bias_shape,
    kernel=lambda run, node, x, bias: x + bias.reshape(_bias_form(node, x.ndim)),
    gradient=_bias_gradient,
)
op(
    "BiasAddGrad",
    "out_backprop:T -> T",
    "T:type data_format:string='NHWC'",
    shape=lambda node: [
        None
        if node.inputs[0].static_shape is None
        else (node.inputs[0].static_shape[-1],)
        if node.attrs["data_format"] in ("NHWC", b"NHWC")
        else (node.inputs[0].static_shape[1],)
    ],
    kernel=_bias_sum,
)
op(
    "L2Loss",
    "t:T -> T",
    "T:type",
    shape=scalar,
    kernel=lambda run, node, x: (x * x).sum() / x.dtype.type(2),
    gradient=lambda node, g: [apply("Mul", node.inputs[0], g)],
)
