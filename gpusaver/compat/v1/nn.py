"""``tf.nn``."""

from __future__ import annotations

from typing import Any

from gpusaver.compat.v1.convert import apply, convert_to_tensor, emit
from gpusaver.compat.v1.functions import (
    add,
    concat,
    exp,
    log1p,
    negative,
    reshape,
    shape,
    sigmoid,
    stop_gradient,
    subtract,
    tanh,
    transpose,
    where,
    zeros_like,
)
from gpusaver.compat.v1.graph import Tensor, get_default_graph


def relu(features: Any, name: str | None = None) -> Tensor:
    return emit("Relu", features, name=name)


def softplus(features: Any, name: str | None = None) -> Tensor:
    return emit("Softplus", features, name=name)


def _along(op: str, logits: Any, axis: int, name: str | None) -> Tensor:
    """An op that works along the last axis, along any: that one is brought to the end and back."""
    x = convert_to_tensor(logits)
    shape = x.static_shape
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        return emit(op, x, name=name)
    if shape is None:
        raise ValueError(f"{op} along axis {axis} of {x!r}: the rank must be known")
    order = list(range(len(shape)))
    order[axis], order[-1] = order[-1], order[axis]
    return transpose(apply(op, transpose(x, order)), order)


def softmax(logits: Any, axis: int | None = None, name: str | None = None, dim: int | None = None) -> Tensor:
    return _along(
        "Softmax", logits, -1 if axis is None and dim is None else int(axis if axis is not None else dim or 0), name
    )


def log_softmax(logits: Any, axis: int | None = None, name: str | None = None, dim: int | None = None) -> Tensor:
    return _along(
        "LogSoftmax", logits, -1 if axis is None and dim is None else int(axis if axis is not None else dim or 0), name
    )


def bias_add(value: Any, bias: Any, data_format: str | None = None, name: str | None = None) -> Tensor:
    """``data_format``: where the channels are, "NHWC" (last) or "NCHW" (second)."""
    layout = "NHWC" if data_format is None else "NCHW" if data_format.startswith("NC") else "NHWC"
    return emit("BiasAdd", value, bias, data_format=layout, name=name)


def l2_loss(t: Any, name: str | None = None) -> Tensor:
    return emit("L2Loss", t, name=name)


def _losses(op: str, logits: Any, labels: Any, name: str | None = None) -> Tensor:
    """The first output of an op whose second one is for its gradient."""
    loss: Tensor = apply(op, logits, labels, name=name)[0]
    return loss


def softmax_cross_entropy_with_logits_v2(
    labels: Any, logits: Any, axis: int | None = None, name: str | None = None, dim: int | None = None
) -> Tensor:
    """One loss a row; gradients go into the labels too."""
    x = convert_to_tensor(logits)
    y = convert_to_tensor(labels, x.dtype)
    if axis not in (None, -1) or dim not in (None, -1):
        raise ValueError("softmax_cross_entropy_with_logits: only the last axis is there")
    with get_default_graph().name_scope(name or "softmax_cross_entropy_with_logits"):
        rank_of = None if x.static_shape is None else len(x.static_shape)
        if rank_of == 2:
            return _losses("SoftmaxCrossEntropyWithLogits", x, y)
        sizes = shape(x)
        classes = sizes[-1:]
        flat = concat([[-1], classes], 0)
        loss = _losses("SoftmaxCrossEntropyWithLogits", reshape(x, flat), reshape(y, flat))
        return reshape(loss, sizes[:-1])


def softmax_cross_entropy_with_logits(
    _sentinel: Any = None,
    labels: Any = None,
    logits: Any = None,
    dim: int = -1,
    name: str | None = None,
    axis: Any = None,
) -> Tensor:
    """One loss a row; no gradient goes into the labels.  ValueError for arguments by position."""
    if _sentinel is not None or labels is None or logits is None:
        raise ValueError("Only call `softmax_cross_entropy_with_logits` with named arguments (labels=..., logits=...)")
    return softmax_cross_entropy_with_logits_v2(
        stop_gradient(convert_to_tensor(labels, convert_to_tensor(logits).dtype)), logits, axis, name, dim
    )


def sparse_softmax_cross_entropy_with_logits(
    _sentinel: Any = None, labels: Any = None, logits: Any = None, name: str | None = None
) -> Tensor:
    """The same for labels that are numbers of classes."""
    if _sentinel is not None or labels is None or logits is None:
        raise ValueError("Only call `sparse_softmax_cross_entropy_with_logits` with named arguments")
    return _losses("SparseSoftmaxCrossEntropyWithLogits", logits, labels, name)


def sigmoid_cross_entropy_with_logits(
    _sentinel: Any = None, labels: Any = None, logits: Any = None, name: str | None = None
) -> Tensor:
    """Element by element, without an overflow for either sign."""
    if _sentinel is not None or labels is None or logits is None:
        raise ValueError("Only call `sigmoid_cross_entropy_with_logits` with named arguments")
    x = convert_to_tensor(logits)
    y = convert_to_tensor(labels, x.dtype)
    with get_default_graph().name_scope(name or "logistic_loss") as scope:
        zeros = zeros_like(x)
        is_positive = x >= zeros
        positive = where(is_positive, x, zeros)
        shrinking = where(is_positive, negative(x), x)
        return add(subtract(positive, x * y), log1p(exp(shrinking)), scope)


__all__ = [
    "bias_add",
    "l2_loss",
    "log_softmax",
    "relu",
    "sigmoid",
    "sigmoid_cross_entropy_with_logits",
    "softmax",
    "softmax_cross_entropy_with_logits",
    "softmax_cross_entropy_with_logits_v2",
    "softplus",
    "sparse_softmax_cross_entropy_with_logits",
    "tanh",
]
