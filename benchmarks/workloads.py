"""What is saved: named float32 arrays of random values, in one block of memory that every process of a run shares.

::

    block   | array |pad| array |pad| ...        each array at a multiple of 64 bytes

One block instead of one per process lets a run of a dozen processes fit into the memory of a small machine.  Small
arrays are copied out of it, so that they are what most NumPy arrays are: owners of memory of their own.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

_ALIGNMENT = 64
_SEED = 20240229
_FILL_ELEMENTS = 1 << 22
_OWN_MEMORY_NBYTES = 1 << 20

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    shapes: dict[str, Shape]

    @property
    def nbytes(self) -> int:
        """Of the arrays, without padding."""
        return sum(4 * int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def offsets(self) -> list[int]:
        """Of the arrays in the block, and last the size of the block: a multiple of 4096."""
        sizes = [-(-4 * int(np.prod(shape)) // _ALIGNMENT) * _ALIGNMENT for shape in self.shapes.values()]
        starts = [0, *itertools.accumulate(sizes)]
        return [*starts[:-1], -(-starts[-1] // 4096) * 4096]


def _gpt2_small() -> dict[str, Shape]:
    """The 148 parameters of GPT-2 small (124,439,808 elements)."""
    width = 768
    shapes: dict[str, Shape] = {"wte": (50257, width), "wpe": (1024, width)}
    for layer in range(12):
        block = {
            "ln_1/g": (width,),
            "ln_1/b": (width,),
            "attn/c_attn/w": (width, 3 * width),
            "attn/c_attn/b": (3 * width,),
            "attn/c_proj/w": (width, width),
            "attn/c_proj/b": (width,),
            "ln_2/g": (width,),
            "ln_2/b": (width,),
            "mlp/c_fc/w": (width, 4 * width),
            "mlp/c_fc/b": (4 * width,),
            "mlp/c_proj/w": (4 * width, width),
            "mlp/c_proj/b": (width,),
        }
        shapes.update({f"h{layer}/{name}": shape for name, shape in block.items()})
    return shapes | {"ln_f/g": (width,), "ln_f/b": (width,)}


def _training_state(model: dict[str, Shape]) -> dict[str, Shape]:
    """Weights and Adam's two moments."""
    return {f"{part}/{name}": shape for part in ("model", "adam_m", "adam_v") for name, shape in model.items()}


def _small(count: int) -> dict[str, Shape]:
    """Vectors of 1 to 16 KiB."""
    sizes = np.random.default_rng(_SEED).integers(1024, 16 * 1024, count, endpoint=True) // 4
    return {f"layer_{i // 100:03d}/tensor_{i % 100:02d}": (size,) for i, size in enumerate(sizes.tolist())}


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt2", "GPT-2 small, float32, with Adam", _training_state(_gpt2_small())),
        Workload("small", "10,000 tensors of 1-16 KiB", _small(10_000)),
        Workload("gpt2-quick", "GPT-2 small, float32, weights alone", _gpt2_small()),
        Workload("small-quick", "2,000 tensors of 1-16 KiB", _small(2_000)),
    )
}


def create_block(workload: Workload) -> int:
    """Memory for the workload as a file descriptor, which child processes may inherit; filled with the values."""
    nbytes = workload.offsets[-1]
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(f"gpusaver-bench-{workload.name}")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, nbytes)
    values = np.frombuffer(mmap.mmap(fd, nbytes), np.float32)
    random = np.random.default_rng(_SEED)
    for start in range(0, len(values), _FILL_ELEMENTS):
        random.standard_normal(dtype=np.float32, out=values[start : start + _FILL_ELEMENTS])
    return fd


def open_block(workload: Workload, fd: int) -> tuple[memoryview, Arrays]:
    """The whole block and the arrays, every page of them in use already."""
    block = mmap.mmap(fd, workload.offsets[-1])
    np.frombuffer(block, np.uint8)[::4096].sum()
    arrays: Arrays = {}
    for (name, shape), offset in zip(workload.shapes.items(), workload.offsets, strict=False):
        array = np.frombuffer(block, np.float32, int(np.prod(shape)), offset).reshape(shape)
        arrays[name] = array if array.nbytes >= _OWN_MEMORY_NBYTES else array.copy()
    return memoryview(block), arrays
