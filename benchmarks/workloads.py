"""What is saved: named float32 arrays of random values, each where NumPy allocates it.

The values come from one block of memory that every process of a run shares::

    block   | array |pad| array |pad| ...        each array at a multiple of 64 bytes

A process has memory for its large arrays only while it is measured: so a run of a dozen fits into a small machine.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

ARRAY_ALIGNMENT = 64
_SEED = 20240229
_FILL_ELEMENTS = 1 << 22
#: Of such size glibc's malloc gives an array pages of its own, and NumPy asks for huge ones (4 MiB).
_OWN_PAGES_NBYTES = 4 << 20
_PAGE_NBYTES = 4096
_MADV_DONTNEED = 4
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

_BOTH = ("save", "restore")

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Workload:
    """``orders``: what is measured, as :mod:`worker` names it.  ``peers``: those that take part, None for all
    that are not only in lists.
    ``is_transposed``: matrices lie in Fortran order.  ``in_memory``: the files go to /dev/shm.
    """

    name: str
    title: str
    shapes: dict[str, Shape]
    orders: tuple[str, ...] = _BOTH
    peers: tuple[str, ...] | None = None
    is_transposed: bool = False
    in_memory: bool = False

    @property
    def nbytes(self) -> int:
        """Of the arrays, without padding."""
        return sum(4 * int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def offsets(self) -> list[int]:
        """Of the arrays in the block, and last the size of the block: a multiple of 4096."""
        sizes = [-(-4 * int(np.prod(shape)) // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT for shape in self.shapes.values()]
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


def _mixed() -> dict[str, Shape]:
    return _training_state(_gpt2_small()) | {f"scalars/{i:04d}": () for i in range(5_000)}


#: Where all of them would take too long.
_FEW = ("gpusaver", "torch.save", "safetensors", "raw page cache x1", "raw O_DIRECT x4")
_SOME = (*_FEW, "np.savez")

#: Copies that stay in memory, and what makes sense only beside them.
LISTED_ONLY = frozenset(
    ("gpusaver async", "PyTorch DCP x4 async", "memcpy", "gpusaver x2 files", "raw page cache x2 files")
)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt2", "GPT-2 small, float32, with Adam", _training_state(_gpt2_small()), (*_BOTH, "cold", "next")),
        Workload("small", "10,000 tensors of 1-16 KiB", _small(10_000), (*_BOTH, "next")),
        Workload(
            "gpt2-async",
            "GPT-2 small with Adam, asynchronously: the arrays may change after *return*",
            _training_state(_gpt2_small()),
            ("save",),
            ("gpusaver", "gpusaver async", "PyTorch DCP x4 async", "Orbax", "memcpy", "raw O_DIRECT x4"),
        ),
        Workload(
            "gpt2-memory",
            "GPT-2 small with Adam, to memory (/dev/shm)",
            _training_state(_gpt2_small()),
            (*_BOTH, "next"),
            peers=(*_FEW, "gpusaver recycle", "gpusaver x2 files", "raw page cache x2 files", "raw page cache x4 over"),
            in_memory=True,
        ),
        Workload("small-100k", "100,000 tensors of 1-16 KiB", _small(100_000), (*_BOTH, "list", "some"), _SOME),
        Workload("one", "one tensor of 4 GB", {"w": (1_000_000_000,)}, peers=_FEW),
        Workload("mixed", "GPT-2 small with Adam, and 5,000 scalars", _mixed(), peers=_FEW),
        Workload(
            "strided",
            "GPT-2 small, weights alone, matrices in Fortran order",
            _gpt2_small(),
            # safetensors stores their elements in memory's order, and a raw read fills memory.
            peers=tuple(name for name in _SOME if name not in ("safetensors", "raw page cache x1")),
            is_transposed=True,
        ),
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


class State:
    """The arrays of one process.  Between :meth:`fill` and :meth:`drop` they have their values, every page in use."""

    def __init__(self, workload: Workload, fd: int) -> None:
        self.block = memoryview(mmap.mmap(fd, workload.offsets[-1], prot=mmap.PROT_READ))
        order: Literal["F", "C"] = "F" if workload.is_transposed else "C"
        self.arrays: Arrays = {name: np.empty(shape, np.float32, order) for name, shape in workload.shapes.items()}
        self._offsets = workload.offsets
        self.fill()

    def fill(self) -> None:
        for array, offset in zip(self.arrays.values(), self._offsets, strict=False):
            np.copyto(array, np.frombuffer(self.block, np.float32, array.size, offset).reshape(array.shape))

    def drop(self) -> None:
        """Gives the pages of large arrays back to the system: they are fresh ones, zeros, when next touched."""
        for array in self.arrays.values():
            start, end = array.ctypes.data, array.ctypes.data + array.nbytes
            first = -(-start // _PAGE_NBYTES) * _PAGE_NBYTES
            nbytes = end // _PAGE_NBYTES * _PAGE_NBYTES - first
            if array.nbytes >= _OWN_PAGES_NBYTES and _LIBC is not None:
                _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), _MADV_DONTNEED)
