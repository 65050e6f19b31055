"""What a checkpoint holds while training goes on: the values at the call, in every mode and on every kind of stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpu.tools import Gpu, Load, assert_holds, assign, contents, device_state, host_state, host_values, plain, spoil

ROUNDS = 200
CAPTURES = ("snapshot", "deferred", "blocking", "auto")


@pytest.mark.parametrize("kind", ["null", "blocking", "non-blocking"])
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_whatever_is_changed_next_the_file_holds_the_old_values(gpu: Gpu, tmp_path: Path, capture: str, kind: str):
    """Under load: when save_async is called the values are still being computed, and are spoilt at the first moment
    that the mode allows."""
    values = [host_values(gpu, seed) for seed in (0, 1)]
    sources = [device_state(gpu, one) for one in values]
    expected = [contents(host_state(one)) for one in values]
    state = device_state(gpu, values[0])
    load = Load(gpu)
    with gpu.streams()[kind], gpusaver.Saver(state, max_to_keep=1) as saver:
        for number in range(gpu.rounds(ROUNDS)):
            load.queue()
            assign(state, sources[number % 2])
            pending = saver.save_async(tmp_path / "model", number, capture=capture)
            if capture == "deferred":
                load.queue()  # forward and backward: reads are free
                pending.fence()
            spoil(state)
            load.queue()
            prefix = pending.result()
            assert pending.capture == capture
            assert_holds(prefix, expected[number % 2])


@pytest.mark.parametrize("capture", CAPTURES)
def test_training_ends_with_the_same_numbers_with_and_without_saves(gpu: Gpu, tmp_path: Path, capture: str):
    assert train(gpu, 20, None, capture) == train(gpu, 20, tmp_path, capture)


def train(gpu: Gpu, steps: int, directory: Path | None, capture: str) -> dict[str, bytes]:
    """Saves at every other step if there is a directory, and restores the last at the end."""
    cupy, side = gpu.cupy, 32 if gpu.is_simulated else 1024
    random = np.random.default_rng(0)
    state = {name: cupy.asarray(random.standard_normal((side, side), np.float32)) for name in ("w", "m", "v")}
    matrix = cupy.asarray(random.standard_normal((side, side), np.float32))
    matrix *= np.float32(1 / side)
    saver = gpusaver.Saver(state, max_to_keep=1) if directory is not None else None
    with cupy.cuda.Stream(non_blocking=True) as stream:
        gpu.cupy.cuda.Stream.null.synchronize()
        for step in range(steps):
            gradient = matrix @ state["w"]
            pending = None
            if saver is not None and directory is not None and step % 2 == 0:
                pending = saver.save_async(directory / "model", step, capture=capture)  # type: ignore[arg-type]
            if pending is not None and pending.capture == "deferred":
                pending.fence()
            state["m"] *= np.float32(0.5)
            state["m"] += gradient
            state["v"] += gradient * gradient
            state["w"] -= state["m"] * np.float32(0.001)
            if pending is not None:
                pending.result()
        stream.synchronize()
    found = contents(state)
    if saver is not None and directory is not None:
        saver.restore(gpusaver.latest_checkpoint(directory))
        assert contents(state) != found  # of an earlier step
        saver.close()
    return found


def test_a_captured_graph_is_replayed_while_its_memory_is_saved_and_restored(gpu: Gpu, tmp_path: Path):
    """Its pointers stay good: restores go into the arrays' own memory."""
    array = gpu.cupy.zeros(gpu.size(1 << 22), np.float32)
    stream = gpu.cupy.cuda.Stream(non_blocking=True)
    gpu.synchronize()
    with stream, gpusaver.Saver({"w": array}, max_to_keep=None) as saver:
        array += np.float32(1)  # compiles the kernel
        stream.begin_capture()
        array += np.float32(1)
        graph = stream.end_capture()
        prefixes = []
        for number in range(gpu.rounds(50)):
            graph.launch(stream)
            capture = ("snapshot", "deferred")[number % 2]
            pending = saver.save_async(tmp_path / "model", number, capture=capture)
            pending.fence()
            graph.launch(stream)
            prefixes.append(pending.result())
        for number, prefix in enumerate(prefixes):
            assert (gpusaver.load(prefix)["w"] == 2 * number + 2).all()
        saver.restore(prefixes[0])
        graph.launch(stream)
        assert (array.get() == 3).all()


def test_save_restore_and_fence_refuse_a_stream_under_capture_and_leave_it_whole(gpu: Gpu, tmp_path: Path):
    array = gpu.cupy.zeros(1000, np.float32)
    stream = gpu.cupy.cuda.Stream(non_blocking=True)
    gpu.synchronize()
    with stream, gpusaver.Saver({"w": array}) as saver:
        array += np.float32(1)
        prefix = saver.save(tmp_path / "model", 1)
        pending = saver.save_async(tmp_path / "model", 2, capture="deferred")
        pending.result()
        stream.begin_capture()
        calls: tuple[Any, ...] = (
            *(lambda capture=capture: saver.save_async(tmp_path / "no", capture=capture) for capture in CAPTURES),
            *(lambda: saver.save(tmp_path / "no"), lambda: saver.restore(prefix), pending.fence),
        )
        for call in calls:
            with pytest.raises(gpusaver.FailedPreconditionError, match="CUDA graph"):
                call()
        array += np.float32(1)
        graph = stream.end_capture()
        graph.launch(stream)
        assert (array.get() == 2).all()
        saver.save(tmp_path / "model", 3)
    assert not list(tmp_path.glob("no*"))


def test_a_change_before_the_fence_is_found(gpu: Gpu, tmp_path: Path):
    array = gpu.cupy.zeros(gpu.size(1 << 20), np.float32)
    with gpusaver.Saver({"w": array}, check_captures=True) as saver:
        pending = saver.save_async(tmp_path / "good", capture="deferred")
        pending.fence()
        plain(array).fill(1)
        pending.result()
        pending = saver.save_async(tmp_path / "bad", capture="deferred")
        plain(array)[5:6].fill(2)
        with pytest.raises(gpusaver.FailedPreconditionError, match="changed"):
            pending.fence()
        pending.exception()


def test_a_fence_holds_back_the_stream_that_it_is_given(gpu: Gpu, tmp_path: Path):
    values = host_values(gpu, 3)
    state, expected = device_state(gpu, values), contents(host_state(values))
    update = gpu.cupy.cuda.Stream(non_blocking=True)
    gpu.synchronize()
    with gpusaver.Saver(state, max_to_keep=1) as saver:
        for number in range(gpu.rounds(30)):
            assign(state, device_state(gpu, values))
            pending = saver.save_async(tmp_path / "model", number, capture="deferred")
            pending.fence(update)
            with update:
                spoil(state)
            assert_holds(pending.result(), expected)
            update.synchronize()


def test_the_call_sees_what_the_current_stream_still_computes(gpu: Gpu, tmp_path: Path):
    array, load = gpu.cupy.zeros(gpu.size(1 << 20), np.int32), Load(gpu)
    gpu.synchronize()
    with gpu.cupy.cuda.Stream(non_blocking=True), gpusaver.Saver({"w": array}) as saver:
        for number in range(gpu.rounds(30)):
            load.queue()
            plain(array).fill(number)
            assert (gpusaver.load(saver.save(tmp_path / "model"))["w"] == number).all()
