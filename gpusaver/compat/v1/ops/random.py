"""Random numbers: drawn on the host, so that a seed gives the same ones on every device.  Not TensorFlow's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusaver.compat.v1.ops.rules import from_shape_input
from gpusaver.compat.v1.table import op

_SEEDS = "seed:int=0 seed2:int=0 dtype:type T:type=int32"


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return random.standard_normal(shape)


def _truncated(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Beyond two standard deviations: drawn again."""
    values = np.asarray(random.standard_normal(shape))
    while (outside := np.abs(values) > 2).any():
        values[outside] = random.standard_normal(int(outside.sum()))
    return values


def _kernel(draw: Any) -> Any:
    def kernel(run: Any, node: Any, shape: Any) -> Any:
        values = np.asarray(draw(run.random(node), tuple(shape.tolist())))
        return run.xp.asarray(values.astype(node.attrs["dtype"].numpy_dtype))

    return kernel


for _name, _draw in (
    ("RandomStandardNormal", _normal),
    ("RandomUniform", lambda random, shape: random.random(shape, np.float32)),
    ("TruncatedNormal", _truncated),
):
    op(_name, "shape:T! -> dtype", _SEEDS, shape=from_shape_input(0), kernel=_kernel(_draw))


def _integers(run: Any, node: Any, shape: Any, low: Any, high: Any) -> Any:
    values = run.random(node).integers(int(low), int(high), tuple(shape.tolist()))
    return run.xp.asarray(np.asarray(values, node.attrs["Tout"].numpy_dtype))


op(
    "RandomUniformInt",
    "shape:T! minval:Tout! maxval:Tout! -> Tout",
    "seed:int=0 seed2:int=0 Tout:type T:type=int32",
    shape=from_shape_input(0),
    kernel=_integers,
)
