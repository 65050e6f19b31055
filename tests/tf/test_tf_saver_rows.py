"""The tables of saver behaviour against TensorFlow: they say what it does, so the differences in them are real ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf
from tables import ROWS
from tables.scenario import Row, Scene
from tensorflow.python.training import checkpoint_utils
from tensorflow.python.training import saver as saver_module

v1 = tf.compat.v1


class TensorFlowScene(Scene):
    functions = SimpleNamespace(
        get_checkpoint_state=v1.train.get_checkpoint_state,
        latest_checkpoint=v1.train.latest_checkpoint,
        generate_checkpoint_state_proto=v1.train.generate_checkpoint_state_proto,
        update_checkpoint_state=v1.train.update_checkpoint_state,
        checkpoint_exists=v1.train.checkpoint_exists,
        get_checkpoint_mtimes=v1.train.get_checkpoint_mtimes,
        remove_checkpoint=v1.train.remove_checkpoint,
        checkpoints_iterator=v1.train.checkpoints_iterator,
        wait_for_new_checkpoint=checkpoint_utils.wait_for_new_checkpoint,
    )

    def __init__(self, directory: Path, session: Any) -> None:
        super().__init__(directory)
        self._session = session

    def new_saver(self, **options: Any) -> Any:
        return v1.train.Saver(**options)

    def saver_from(self, saver_def: Any) -> Any:
        return v1.train.Saver.from_proto(saver_def)

    def import_with(self, source: Any, **options: Any) -> tuple[Any, list[str]]:
        with tf.Graph().as_default():
            saver = v1.train.import_meta_graph(source, **options)
            return saver, [variable.op.name for variable in v1.global_variables()]

    def save_with(self, saver: Any, path: Any, step: Any, **options: Any) -> Any:
        return saver.save(self._session, path, step, **{"write_meta_graph": False, **options})


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorFlowScene]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("tensorflow"), "disabled", True)
    with tf.Graph().as_default():
        v1.get_variable("v", [2])
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            scene = TensorFlowScene(tmp_path, session)
            clock = SimpleNamespace(time=scene.clock, sleep=scene.sleep)
            monkeypatch.setattr(saver_module, "time", clock)
            monkeypatch.setattr(checkpoint_utils, "time", clock)
            yield scene


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, scene: TensorFlowScene) -> None:
    scene.run(row.steps, "tensorflow")
