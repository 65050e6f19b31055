"""What is saved on a GPU: named CuPy arrays, and a training loop that changes every one of them at every step."""

from __future__ import annotations

import importlib
import os
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from machine import ROOT
from workloads import WORKLOADS, Shape

#: Beyond this the check of a restore looks at some of the arrays.
_DIGEST_NBYTES = 2 << 30
_TILE_WORDS = 1 << 16
#: Of a training step, however fast the device.
_MOST_PRODUCTS = 1 << 14


@dataclass(frozen=True)
class GpuWorkload:
    """``step_seconds``: how long a training step should take; ``rounds``: how often everything is measured."""

    name: str
    title: str
    shapes: dict[str, Shape]
    dtype: Any
    step_seconds: float
    rounds: int

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize


def _llama_7b() -> dict[str, Shape]:
    """6.7 billion parameters."""
    width, inner, words = 4096, 11008, 32000
    shapes: dict[str, Shape] = {"embed": (words, width), "norm": (width,), "head": (words, width)}
    for layer in range(32):
        block = dict.fromkeys(("q", "k", "v", "o"), (width, width))
        block |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        shapes |= {f"layer{layer}/{name}": shape for name, shape in block.items()}
        shapes |= {f"layer{layer}/norm{number}": (width,) for number in (1, 2)}
    return shapes


GPU_WORKLOADS = {
    workload.name: workload
    for workload in (
        GpuWorkload("gpt2", WORKLOADS["gpt2"].title, WORKLOADS["gpt2"].shapes, np.float32, 0.05, 3),
        GpuWorkload("small", WORKLOADS["small"].title, WORKLOADS["small"].shapes, np.float32, 0.02, 3),
        GpuWorkload("7b", "7 billion parameters, bfloat16", _llama_7b(), ml_dtypes.bfloat16, 0.3, 1),
    )
}


class State:
    """The arrays of a workload.  ``plain`` are the same as integers or float32, which every library knows."""

    def __init__(self, workload: GpuWorkload) -> None:
        self.cupy = importlib.import_module("cupy")
        self.workload = workload
        dtype = np.dtype(workload.dtype)
        simple = np.dtype(np.int16) if dtype.itemsize == 2 else dtype
        self.plain = {name: self.cupy.zeros(shape, simple) for name, shape in workload.shapes.items()}
        self.arrays = {name: array.view(dtype) for name, array in self.plain.items()}
        tiles = []
        for array in self.plain.values():
            words = array.nbytes // 4
            starts = range(0, words, _TILE_WORDS)
            tiles += [(array.data.ptr + 4 * start, min(_TILE_WORDS, words - start)) for start in starts]
        self._tiles = self.cupy.asarray(np.array(tiles, np.uint64).reshape(-1))
        self._count = len(tiles)
        with open(os.path.join(ROOT, "benchmarks", "gpu_change.cu"), encoding="utf-8") as file:
            self._kernel = self.cupy.RawKernel(file.read(), "change")
        for _ in range(3):
            self.change()
        self.synchronize()

    @property
    def nbytes(self) -> int:
        return self.workload.nbytes

    def change(self) -> None:
        """Queues the update of an optimizer step."""
        self._kernel((self._count,), (256,), (self._tiles,))

    def clear(self) -> None:
        for array in self.plain.values():
            array.fill(0)

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def digest(self) -> int:
        """Of all arrays, or of as many, evenly chosen, as have 2 GiB."""
        step = -(-self.nbytes // _DIGEST_NBYTES)
        value = 0
        for array in list(self.plain.values())[::step]:
            value = zlib.crc32(array.get().data.cast("B"), value)
        return value

    def free_memory(self) -> int:
        return int(self.cupy.cuda.runtime.memGetInfo()[0])


@dataclass
class Steps:
    """Seconds of each step and of each ``loss.get()`` when the loss was there; ``least_free``: bytes of the device."""

    seconds: list[float] = field(default_factory=list)
    gets: list[float] = field(default_factory=list)
    least_free: int = 1 << 62


class Training:
    """Matrix products, then the update, then ``loss.get()``: as long as the workload's ``step_seconds``.

    ``seconds``: how long a step takes.
    """

    def __init__(self, state: State, side: int) -> None:
        self._state = state
        self._matrix = state.cupy.full((side, side), 1 / side, np.float32)
        self.seconds = self._calibrate(state.workload.step_seconds)

    def _calibrate(self, wanted: float) -> float:
        """A step is not only products: their time is the difference of steps with few and with many of them."""
        self._products = 1
        self.baseline(1)  # compiles
        few = many = self._median()
        while many < wanted / 2 and self._products < _MOST_PRODUCTS:
            self._products *= 2
            many = self._median()
        for _ in range(2):  # measured, then corrected by what came out
            if self._products > 1:
                each = max(many - few, 1e-9) / (self._products - 1)
                self._products = min(max(1, 1 + round((wanted - few) / each)), _MOST_PRODUCTS)
                many = self._median()
        return many

    def _median(self) -> float:
        return statistics.median(self.baseline(3).seconds)

    def step(
        self, steps: Steps, begin: Callable[[], object] | None = None, fence: Callable[[], None] | None = None
    ) -> None:
        """``begin`` starts a save before the forward pass; ``fence`` is called before the update."""
        start = time.perf_counter()
        if begin is not None:
            begin()
        product = self._matrix
        for _ in range(self._products):
            product = product @ self._matrix
        loss = product[:1].sum()
        if fence is not None:
            fence()
        self._state.change()
        self._state.cupy.cuda.Stream.null.synchronize()
        before_get = time.perf_counter()
        loss.get()
        end = time.perf_counter()
        steps.seconds.append(end - start)
        steps.gets.append(end - before_get)
        steps.least_free = min(steps.least_free, self._state.free_memory())

    def baseline(self, count: int) -> Steps:
        steps = Steps()
        for _ in range(count):
            self.step(steps)
        return steps


def stalls(before: Steps, window: Steps, after: Steps) -> dict[str, float]:
    """What a save cost the steps of its window, from the call to durable, beyond the median of the steps ``before``.

    ``stall_noise``: how far as many steps ``after``, without a save, are from that median: an error of the median, or
    a clock that drifts, adds up over the steps of both alike.  A stall that is no larger is none.
    """
    usual = statistics.median(before.seconds)
    return {
        "stall": sum(window.seconds) - usual * len(window.seconds),
        "stall_noise": abs(sum(after.seconds) - usual * len(after.seconds)),
        "step": usual,
        "steps": len(window.seconds),
        "worst_step": max(window.seconds),
        "get_p99": percentile(window.gets, 99),
        "get_p99_before": percentile(before.gets, 99),
    }


def percentile(values: list[float], percent: int) -> float:
    return float(np.percentile(np.asarray(values), percent))
