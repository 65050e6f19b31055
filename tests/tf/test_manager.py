"""CheckpointManager beside TensorFlow's: each reads what the other has left, and they keep the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.checkpoint import checkpoint_management

import gpusaver


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in directory.glob("ckpt-*.index"))


def test_tensorflow_reads_the_state_file_and_the_checkpoints(tmp_path: Path) -> None:
    with gpusaver.CheckpointManager({"w": np.arange(3.0)}, tmp_path, max_to_keep=2, best_to_keep=1) as manager:
        for step in range(1, 5):
            manager.save(step, metric=step)
        assert tf.train.latest_checkpoint(str(tmp_path)) == manager.latest_checkpoint
    assert steps_in(tmp_path) == [1, 3, 4]
    ours, theirs = gpusaver.get_checkpoint_state(tmp_path), tf.train.get_checkpoint_state(str(tmp_path))
    assert ours is not None
    assert list(theirs.all_model_checkpoint_paths) == [f"{tmp_path}/ckpt-3", f"{tmp_path}/ckpt-4"]
    assert list(theirs.all_model_checkpoint_timestamps) == list(ours.all_model_checkpoint_timestamps)
    assert theirs.last_preserved_timestamp == ours.last_preserved_timestamp > 0
    np.testing.assert_array_equal(tf.train.load_variable(str(tmp_path), "w"), np.arange(3.0))
    variable = tf.Variable([1.0])
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(v=variable), str(tmp_path), max_to_keep=2)
    assert manager.checkpoints == [f"{tmp_path}/ckpt-3", f"{tmp_path}/ckpt-4"]
    manager.save(checkpoint_number=5)
    assert steps_in(tmp_path) == [1, 4, 5]  # the best is on no list of TensorFlow's


def test_what_tensorflow_has_saved_is_managed(tmp_path: Path) -> None:
    theirs = tf.train.CheckpointManager(tf.train.Checkpoint(v=tf.Variable([1.0, 2.0])), str(tmp_path), max_to_keep=3)
    for _ in range(4):
        theirs.save()
    state = {"v": np.zeros(2, np.float32)}
    with gpusaver.CheckpointManager(state, tmp_path, max_to_keep=3) as manager:
        assert manager.checkpoints == theirs.checkpoints == [f"{tmp_path}/ckpt-{step}" for step in (2, 3, 4)]
        assert manager.restore_or_initialize() == f"{tmp_path}/ckpt-4"  # by its readable name
        np.testing.assert_array_equal(state["v"], [1, 2])
        manager.save(5)
    assert steps_in(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("hours", [None, 1.0, 0.5])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_same_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, hours: float | None) -> None:
    """Saves at irregular moments; both managers made anew in the middle, as after a restart."""
    now = [1_000_000.0]
    monkeypatch.setattr(checkpoint_management, "time", SimpleNamespace(time=lambda: now[0]))
    pauses = [20, 20, 20, 45, 5, 5, 70, 20, 20, 20, 20, 1, 1, 20, 40, 20, 20]
    (tmp_path / "ours").mkdir()
    made: list[tuple[gpusaver.CheckpointManager, tf.train.CheckpointManager]] = []
    for step, pause in enumerate(pauses, start=1):
        if step in (1, 8):
            for ours, _ in made:
                ours.close()
            ours = gpusaver.CheckpointManager({"w": np.zeros(2)}, tmp_path / "ours", keep, hours, clock=lambda: now[0])
            checkpoint = tf.train.Checkpoint(v=tf.Variable([1.0]))
            made = [(ours, tf.train.CheckpointManager(checkpoint, str(tmp_path / "theirs"), keep, hours))]
        now[0] += pause * 60
        ours, theirs = made[0]
        ours.save(step)
        theirs.save(checkpoint_number=step)
        assert steps_in(tmp_path / "ours") == steps_in(tmp_path / "theirs"), f"after save {step}"
        assert [Path(path).name for path in ours.checkpoints] == [Path(path).name for path in theirs.checkpoints]
    made[0][0].close()
