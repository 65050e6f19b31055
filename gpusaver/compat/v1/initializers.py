"""What variables start with.  An initializer is called with (shape, dtype) and gives a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpusaver.compat.v1.convert import constant, convert_to_tensor, emit
from gpusaver.compat.v1.dtypes import as_dtype
from gpusaver.compat.v1.functions import add, multiply, ones, zeros
from gpusaver.compat.v1.graph import Tensor, get_default_graph

#: What TensorFlow takes for the graph's seed where only an operation has one.
_DEFAULT_GRAPH_SEED = 87654321


def get_seed(op_seed: int | None) -> tuple[int, int]:
    """The attributes ``seed`` and ``seed2`` of a random operation; both 0: different numbers each time."""
    graph = get_default_graph()
    if graph.seed is not None:
        return graph.seed, graph.version if op_seed is None else op_seed
    return (0, 0) if op_seed is None else (_DEFAULT_GRAPH_SEED, op_seed)


def _draw(op: str, shape: Any, dtype: Any, seed: int | None, name: str | None = None, *bounds: Any) -> Tensor:
    first, second = get_seed(seed)
    sizes = convert_to_tensor(list(shape), "int32") if isinstance(shape, list | tuple) else convert_to_tensor(shape)
    attrs: dict[str, Any] = {"seed": first, "seed2": second}
    if bounds:
        return emit(op, sizes, *bounds, Tout=dtype, name=name, **attrs)
    return emit(op, sizes, dtype=dtype, name=name, **attrs)


def random_normal(
    shape: Any,
    mean: Any = 0.0,
    stddev: Any = 1.0,
    dtype: Any = "float32",
    seed: int | None = None,
    name: str | None = None,
) -> Tensor:
    """Reproducible where a seed is given, here; not the numbers that TensorFlow draws."""
    with get_default_graph().name_scope(name or "random_normal"):
        return add(multiply(_draw("RandomStandardNormal", shape, dtype, seed), stddev), mean)


def truncated_normal(
    shape: Any,
    mean: Any = 0.0,
    stddev: Any = 1.0,
    dtype: Any = "float32",
    seed: int | None = None,
    name: str | None = None,
) -> Tensor:
    """The same within two standard deviations of the mean."""
    with get_default_graph().name_scope(name or "truncated_normal"):
        return add(multiply(_draw("TruncatedNormal", shape, dtype, seed), stddev), mean)


def random_uniform(
    shape: Any,
    minval: Any = 0,
    maxval: Any = None,
    dtype: Any = "float32",
    seed: int | None = None,
    name: str | None = None,
) -> Tensor:
    """In [minval, maxval); integers need a maxval."""
    wanted = as_dtype(dtype)
    with get_default_graph().name_scope(name or "random_uniform"):
        if wanted.is_integer:
            if maxval is None:
                raise ValueError(f"Must specify maxval for integer dtype {wanted.name}")
            low, high = convert_to_tensor(minval, wanted), convert_to_tensor(maxval, wanted)
            return _draw("RandomUniformInt", shape, wanted, seed, None, low, high)
        low, high = convert_to_tensor(minval, wanted), convert_to_tensor(1 if maxval is None else maxval, wanted)
        return add(multiply(_draw("RandomUniform", shape, wanted, seed), high - low), low)


class Initializer:
    """Base of all: a function of shape and dtype."""

    def __init__(self, dtype: Any = "float32") -> None:
        self.dtype = as_dtype(dtype)

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        raise NotImplementedError


class Zeros(Initializer):
    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        return zeros(shape, dtype or self.dtype)


class Ones(Initializer):
    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        return ones(shape, dtype or self.dtype)


class Constant(Initializer):
    """``value``: a scalar, or as many values as the variable has elements (fewer: the last one repeats)."""

    def __init__(self, value: Any = 0, dtype: Any = "float32", verify_shape: bool = False) -> None:
        super().__init__(dtype)
        self.value = value

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None, verify_shape: Any = None) -> Tensor:
        return constant(self.value, dtype or self.dtype, shape=shape)


class RandomUniform(Initializer):
    def __init__(
        self, minval: Any = -0.05, maxval: Any = 0.05, seed: int | None = None, dtype: Any = "float32"
    ) -> None:
        super().__init__(dtype)
        self.minval, self.maxval, self.seed = minval, maxval, seed

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        return random_uniform(shape, self.minval, self.maxval, dtype or self.dtype, self.seed)


class RandomNormal(Initializer):
    def __init__(self, mean: Any = 0.0, stddev: Any = 1.0, seed: int | None = None, dtype: Any = "float32") -> None:
        super().__init__(dtype)
        self.mean, self.stddev, self.seed = mean, stddev, seed

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        return random_normal(shape, self.mean, self.stddev, dtype or self.dtype, self.seed)


class TruncatedNormal(RandomNormal):
    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        return truncated_normal(shape, self.mean, self.stddev, dtype or self.dtype, self.seed)


class VarianceScaling(Initializer):
    """Spread by the number of inputs ("fan_in"), outputs ("fan_out") or their mean ("fan_avg")."""

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
        dtype: Any = "float32",
    ) -> None:
        super().__init__(dtype)
        if scale <= 0 or mode not in ("fan_in", "fan_out", "fan_avg"):
            raise ValueError(f"scale above 0 and mode fan_in, fan_out or fan_avg expected, found {scale}, {mode!r}")
        if distribution not in ("normal", "truncated_normal", "untruncated_normal", "uniform"):
            raise ValueError(f"Invalid `distribution` argument: {distribution!r}")
        self.scale, self.mode, self.distribution, self.seed = scale, mode, distribution, seed

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Tensor:
        whole = list(shape) if partition_info is None else list(partition_info.full_shape)
        fans_in, fans_out = _fans(whole)
        fans = {"fan_in": fans_in, "fan_out": fans_out, "fan_avg": (fans_in + fans_out) / 2}[self.mode]
        variance = self.scale / max(1.0, fans)
        wanted = dtype or self.dtype
        if self.distribution == "uniform":
            limit = math.sqrt(3 * variance)
            return random_uniform(shape, -limit, limit, wanted, self.seed)
        if self.distribution == "untruncated_normal":
            return random_normal(shape, 0.0, math.sqrt(variance), wanted, self.seed)
        # What lies within two deviations has this share of the deviation.
        return truncated_normal(shape, 0.0, math.sqrt(variance) / 0.87962566103423978, wanted, self.seed)


def _fans(shape: Sequence[int]) -> tuple[float, float]:
    if len(shape) < 2:
        size = float(shape[0]) if shape else 1.0
        return size, size
    field = math.prod(shape[:-2])
    return float(shape[-2] * field), float(shape[-1] * field)


class GlorotUniform(VarianceScaling):
    """The default of get_variable."""

    def __init__(self, seed: int | None = None, dtype: Any = "float32") -> None:
        super().__init__(1.0, "fan_avg", "uniform", seed, dtype)


class GlorotNormal(VarianceScaling):
    def __init__(self, seed: int | None = None, dtype: Any = "float32") -> None:
        super().__init__(1.0, "fan_avg", "truncated_normal", seed, dtype)
