"""What a tensor costs beside its bytes: Python's own memory, counted by tracemalloc, which no noise can shake."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import gpusaver

COUNT = 20_000
LIMIT_NBYTES = 1024


@contextmanager
def bounded(what: str, before: int) -> Iterator[None]:
    """At most so much more than ``before`` is in use meanwhile, for each tensor."""
    gc.collect()
    tracemalloc.reset_peak()
    yield
    peak = (tracemalloc.get_traced_memory()[1] - before) / COUNT
    assert peak < LIMIT_NBYTES, f"{what}: {peak:.0f} bytes for each tensor"


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start(1)
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("write_meta_graph", [False, True])
def test_a_tensor_takes_less_than_a_kibibyte_beside_its_bytes(
    tmp_path: Path, write_meta_graph: bool, traced: None
) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:  # what is kept for all Savers
        saver.restore(saver.save(tmp_path / "warm"))
    state = {f"layer_{n // 100:03d}/tensor_{n % 100:02d}": np.zeros(n % 300 + 1, np.uint8) for n in range(COUNT)}
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    with bounded("made", before):
        saver = gpusaver.Saver(state)
    for step in range(2):
        with bounded(f"save {step}", before):
            prefix = saver.save(tmp_path / "model", step, write_meta_graph=write_meta_graph)
    for _ in range(2):
        with bounded("restored", before):
            saver.restore(prefix)
    with bounded("restored by another", tracemalloc.get_traced_memory()[0]):
        gpusaver.Saver(state).restore(prefix)
    saver.close()
