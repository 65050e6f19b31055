"""One checkpoint by several ranks, on simulated messages: the same on real ones is in test_mpiexec.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_ranks import SimulatedTransport, run

import gpusaver
from gpusaver import PartitionedVariable
from gpusaver.errors import CancelledError, FailedPreconditionError, InvalidArgumentError
from gpusaver.storage.local import LocalStorage

Work = Callable[[SimulatedTransport], Any]

FULL = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)


def together(size: int, work: Work) -> list[Any]:
    """What the ranks return; the first error, if there is one."""
    outcomes = run(size, work)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def rows_of(transport: SimulatedTransport) -> PartitionedVariable:
    share = 24 // transport.size
    index = np.s_[transport.rank * share : (transport.rank + 1) * share, :]
    return PartitionedVariable(FULL.shape, index, FULL[index].copy())


def state_of(transport: SimulatedTransport) -> dict[str, Any]:
    """A part of one tensor, replicated ones, and one of its own."""
    return {
        "emb": rows_of(transport),
        "w": np.arange(1000.0),
        "b": np.arange(7),
        "step": 5,
        "text": "hello",
        f"own{transport.rank}": np.full(3, transport.rank),
    }


def expected(size: int) -> dict[str, Any]:
    state = {"emb": FULL, "w": np.arange(1000.0), "b": np.arange(7), "step": np.int64(5), "text": b"hello"}
    return state | {f"own{rank}": np.full(3, rank) for rank in range(size)}


def data_sizes(prefix: str | Path) -> list[int]:
    directory, base = os.path.split(prefix)
    names = sorted(name for name in os.listdir(directory) if name.startswith(f"{base}.data-"))
    return [os.path.getsize(os.path.join(directory, name)) for name in names]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_tensor_is_there_once(tmp_path: Path, size: int) -> None:
    def work(transport: SimulatedTransport) -> str:
        with gpusaver.Saver(state_of(transport), comm=transport) as saver:
            return saver.save(tmp_path / "k", 1)

    assert together(size, work) == [f"{tmp_path}/k-1"] * size
    np.testing.assert_equal(gpusaver.load(tmp_path / "k-1"), expected(size))
    assert not list(gpusaver.verify(tmp_path / "k-1"))
    assert sum(data_sizes(tmp_path / "k-1")) < 1.1 * sum(np.asarray(v).nbytes for v in expected(size).values())
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-1"


def test_replicas_are_spread_by_size(tmp_path: Path) -> None:
    state = {f"v{number}": np.zeros(1000 * (1 + number % 5), np.uint8) for number in range(40)}

    def work(transport: SimulatedTransport) -> None:
        own = {"heavy": np.zeros(30_000, np.uint8)} if transport.rank == 1 else {}
        with gpusaver.Saver(state | own, comm=transport) as saver:
            saver.save(tmp_path / "k")

    together(4, work)
    assert all(abs(size - 150_000 / 4) <= 5000 for size in data_sizes(tmp_path / "k"))


def test_the_same_part_on_several_ranks_is_written_once(tmp_path: Path) -> None:
    """As with tensor parallelism inside data parallelism."""

    def work(transport: SimulatedTransport) -> None:
        half = np.s_[12 * (transport.rank % 2) : 12 * (transport.rank % 2) + 12, :]
        with gpusaver.Saver({"emb": PartitionedVariable(FULL.shape, half, FULL[half])}, comm=transport) as saver:
            saver.save(tmp_path / "k")

    together(4, work)
    assert sum(data_sizes(tmp_path / "k")) == FULL.nbytes
    np.testing.assert_array_equal(gpusaver.load(tmp_path / "k")["emb"], FULL)


def test_ranks_without_variables_do_no_harm(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> str:
        state = {"w": np.arange(5)} if transport.rank == 2 else {}
        with gpusaver.Saver(state, comm=transport) as saver:
            prefix = saver.save(tmp_path / "k")
            saver.restore(prefix)
            return prefix

    together(4, work)
    assert data_sizes(tmp_path / "k") == [40]


def test_nobody_has_a_variable(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> str:
        with gpusaver.Saver({}, comm=transport, allow_empty=True) as saver:
            return saver.save(tmp_path / "k")

    together(2, work)
    assert gpusaver.load(tmp_path / "k") == {}


def test_a_shard_per_device_of_each_rank(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        with gpusaver.variables():
            variables = [
                gpusaver.Variable(np.full(10, transport.rank + 10 * device), f"r{transport.rank}d{device}", device=name)
                for device, name in enumerate(["cpu:1", "cpu:2", "cpu:3"][: transport.rank])
            ]
            with gpusaver.Saver(variables, comm=transport, sharded=True) as saver:
                saver.save(tmp_path / "k")

    together(3, work)
    assert data_sizes(tmp_path / "k") == [80] * 3
    found = gpusaver.load(tmp_path / "k")
    assert {name: int(value[0]) for name, value in found.items()} == {"r1d0": 1, "r2d0": 2, "r2d1": 12}


def test_saves_again_and_again(tmp_path: Path) -> None:
    """One prefix, new steps, and what retention gives up; descriptions go round once."""
    sent = []

    def work(transport: SimulatedTransport) -> list[str]:
        state = state_of(transport)
        with gpusaver.Saver(state, comm=transport, max_to_keep=2) as saver:
            for number in range(3):
                state["w"][:] = number
                saver.save(tmp_path / "same", write_state=False)
                np.testing.assert_array_equal(gpusaver.load(tmp_path / "same")["w"], number)
            for step in (1, 2, 3):
                saver.save(tmp_path / "k", step)
            sent.append(transport.rank)
            state["new"] = state.pop("b")
            with pytest.raises(ValueError, match="the set of variable names changed"):
                saver.save(tmp_path / "k", 4)
            return saver.last_checkpoints

    assert together(3, work) == [[f"{tmp_path}/k-2", f"{tmp_path}/k-3"]] * 3
    assert not gpusaver.checkpoint_exists(tmp_path / "k-1")
    assert not gpusaver.checkpoint_exists(tmp_path / "k-4")
    assert len(data_sizes(tmp_path / "same")) == 3
    assert not [name for name in os.listdir(tmp_path) if "gpusaver-" in name]


def test_the_meta_graph_describes_what_all_have(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        with gpusaver.variables():
            variables = [
                gpusaver.Variable(np.zeros(3), "w"),
                gpusaver.Variable(np.zeros(2), f"own{transport.rank}", trainable=False),
            ]
            with gpusaver.Saver([*variables, part_named("emb", transport)], comm=transport) as saver:
                saver.save(tmp_path / "k")

    def part_named(name: str, transport: SimulatedTransport) -> PartitionedVariable:
        part = rows_of(transport)
        part.name = name
        return part

    together(2, work)
    with gpusaver.variables():
        saver = gpusaver.import_meta_graph(tmp_path / "k.meta")
        saver.restore(tmp_path / "k")
        found = {variable.name: variable for variable in gpusaver.current_variables()}
    assert {name: variable.trainable for name, variable in found.items()} == {
        "emb": False,
        "own0": False,
        "own1": False,
        "w": True,
    }
    np.testing.assert_array_equal(found["emb"].value, FULL)


def test_in_the_background(tmp_path: Path) -> None:
    """A save is committed by whoever waits for it on every rank: result, the next save, or close."""

    def work(transport: SimulatedTransport) -> str:
        state = state_of(transport)
        with gpusaver.Saver(state, comm=transport) as saver:
            first = saver.save_async(tmp_path / "k", 1)
            assert first is not None
            state["w"][:] = -1  # it was a snapshot
            assert not first.done()
            assert not os.path.exists(tmp_path / "k-1.index")
            first.result()
            np.testing.assert_array_equal(gpusaver.load(tmp_path / "k-1")["w"], np.arange(1000))
            second = saver.save_async(tmp_path / "k", 2, capture="deferred")
            assert second is not None
            second.fence()
            saver.save(tmp_path / "k", 3)
            assert second.done()
            assert second.report is not None
            saver.save_async(tmp_path / "k", 4)
        return first.prefix

    together(3, work)
    assert all(gpusaver.checkpoint_exists(tmp_path / f"k-{step}") for step in (1, 2, 3, 4))


def test_variables_that_change_before_the_fence_are_found(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        state = state_of(transport)
        with gpusaver.Saver(state, comm=transport, check_captures=True) as saver:
            pending = saver.save_async(tmp_path / "k", capture="deferred")
            assert pending is not None
            for value in (state["emb"].value, state["w"], state["b"], state[f"own{transport.rank}"]):
                value[:] = 0
            with pytest.raises(FailedPreconditionError, match="variables changed between save_async"):
                pending.fence()
            with pytest.raises(CancelledError):
                pending.result()

    together(2, work)


def test_one_rank_cancels(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        with gpusaver.Saver(state_of(transport), comm=transport) as saver:
            pending = saver.save_async(tmp_path / "k", 1)
            assert pending is not None
            if transport.rank == 1:
                assert pending.cancel()
            with pytest.raises(CancelledError, match="rank 1: the save was cancelled"):
                pending.result()
            saver.save(tmp_path / "k", 2)

    together(3, work)
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(".index")) == ["k-2.index"]


@pytest.mark.parametrize("shard", [0, 1])
def test_strict(tmp_path: Path, shard: int) -> None:
    """Each rank reads its own file again."""

    class LyingStorage(LocalStorage):
        def open(self, path: str, *, uncached: bool = False) -> Any:
            if uncached and f".data-0000{shard}" in path:
                Path(path).write_bytes(bytes(os.path.getsize(path)))
            return super().open(path, uncached=uncached)

    def work(transport: SimulatedTransport, storage: LocalStorage) -> str:
        state = {"emb": rows_of(transport)}
        with gpusaver.Saver(state, comm=transport, strict=True, storage=storage) as saver:
            return saver.save(tmp_path / "k")

    together(2, lambda transport: work(transport, LocalStorage()))
    before = sorted(os.listdir(tmp_path))
    outcomes = run(2, lambda transport: work(transport, LyingStorage()))
    assert all(isinstance(outcome, gpusaver.DataLossError) for outcome in outcomes)
    assert f"rank {shard}: cannot save" in str(outcomes[0])
    assert sorted(os.listdir(tmp_path)) == before
    np.testing.assert_array_equal(gpusaver.load(tmp_path / "k")["emb"], FULL)


def test_restoring_the_newest_that_is_whole(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> str | None:
        state = {"emb": rows_of(transport), "step": 0}
        with gpusaver.Saver(state, comm=transport) as saver:
            assert saver.restore_latest(tmp_path / "empty") is None
            for step in (1, 2):
                state["step"] = step
                saver.save(tmp_path / "k", step)
            if transport.rank == 0:
                path = tmp_path / "k-2.data-00001-of-00002"
                path.write_bytes(bytes(path.stat().st_size))
            report = saver.restore_latest(tmp_path)
            assert report is not None
            assert state["step"] == 1
            return report.prefix

    assert together(2, work) == [f"{tmp_path}/k-1"] * 2


def test_damage_that_one_rank_finds_is_everybodys_error(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> tuple[str, ...]:
        state = {"emb": rows_of(transport), f"own{transport.rank}": np.zeros(3)}
        with gpusaver.Saver(state, comm=transport) as saver:
            saver.save(tmp_path / "k")
            if transport.rank == 0:
                path = tmp_path / "k.data-00001-of-00003"
                path.write_bytes(bytes(path.stat().st_size))
            with pytest.raises(gpusaver.DataLossError, match=r"rank 1: .*data-00001-of-00003.*damaged") as caught:
                saver.restore(tmp_path / "k")
            return caught.value.modified

    modified = together(3, work)
    assert modified[0] == ("emb", "own0")
    assert "emb" in modified[1]


def test_a_missing_name_on_one_rank_changes_nothing_anywhere(tmp_path: Path) -> None:
    gpusaver.save(tmp_path / "k", {"w": np.ones(3)})

    def work(transport: SimulatedTransport) -> None:
        state = {"w": np.zeros(3)} | ({"other": np.zeros(3)} if transport.rank == 1 else {})
        with gpusaver.Saver(state, comm=transport) as saver:
            with pytest.raises(gpusaver.NotFoundError, match=r"rank 1: .*\n.*\n.*Key other not found"):
                saver.restore(tmp_path / "k")
            assert not state["w"].any()

    together(2, work)


def test_what_the_ranks_must_not_decide_alone(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        with gpusaver.Saver({"w": np.zeros(3)}, comm=transport) as saver:
            with pytest.raises(ValueError, match="ranks are not busy alike"):
                saver.save_async(tmp_path / "k", when_busy="skip")
            with pytest.raises(ValueError, match="takes no Saver with comm"):
                gpusaver.CheckpointManager(saver, tmp_path, 3)

    together(2, work)
    with pytest.raises(TypeError, match="expected a communicator of mpi4py, found int"):
        gpusaver.Saver({"w": np.zeros(3)}, comm=7)
    with pytest.raises(ValueError, match="comm_deadline: expected more than 0"):
        together(1, lambda transport: gpusaver.Saver({"w": np.zeros(3)}, comm=transport, comm_deadline=0))


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    """The others fail, naming it; then the communicator is given up."""

    def work(transport: SimulatedTransport) -> None:
        saver = gpusaver.Saver(state_of(transport), comm=transport)
        saver.save(tmp_path / "k", 1)
        if transport.rank == 2:
            return
        with pytest.raises(
            gpusaver.DeadlineExceededError, match=r"rank 2 of 4 did not take part within 600 s"
        ) as caught:
            saver.save(tmp_path / "k", 2)
        assert caught.value.ranks == (2,)
        with pytest.raises(FailedPreconditionError, match=r"the communicator was given up, because .*rank 2 of 4"):
            saver.save(tmp_path / "k", 2)

    together(4, work)
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(".index")) == ["k-1.index"]


def test_ranks_that_do_different_things(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        with gpusaver.Saver({"w": np.zeros(3)}, comm=transport) as saver:
            prefix = saver.save(tmp_path / "k")
            with pytest.raises(
                InvalidArgumentError, match="disagree on what is called: ranks 0, 2: save; rank 1: restore"
            ):
                saver.restore(prefix) if transport.rank == 1 else saver.save(prefix)

    together(3, work)
