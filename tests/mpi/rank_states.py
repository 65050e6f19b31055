"""What the ranks of the tests under mpiexec have."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusaver import PartitionedVariable

#: So many ranks are a group in which one is killed.
GROUP = 3

ROWS, COLUMNS = (97, 40), (36, 50)


def tensors(version: int) -> dict[str, Any]:
    """What is saved, whole."""
    random = np.random.default_rng(version)
    return {
        "by_rows": random.random(ROWS, np.float32),
        "by_columns": random.random(COLUMNS),
        "replicated": random.integers(0, 255, 3000, np.uint8),
        "step": np.int64(version),
    }


def bounds(size: int, rank: int, count: int) -> slice:
    return slice(size * rank // count, size * (rank + 1) // count)


def state_of(version: int, rank: int, count: int) -> dict[str, Any]:
    """What one of ``count`` ranks has of it."""
    whole = tensors(version)
    rows, columns = (bounds(ROWS[0], rank, count), slice(None)), (slice(None), bounds(COLUMNS[1], rank, count))
    return {
        "by_rows": PartitionedVariable(ROWS, rows, whole["by_rows"][rows].copy()),
        "by_columns": PartitionedVariable(COLUMNS, columns, whole["by_columns"][columns].copy()),
        "replicated": whole["replicated"],
        "step": whole["step"],
    }
