"""The tables of saver behaviour against ``gpusaver.compat.v1.train``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tables import ROWS
from tables.scenario import Row, Scene

import gpusaver.compat.v1 as tf
from gpusaver.compat.v1 import saver as saver_module


class CompatScene(Scene):
    def __init__(self, directory: Path, session: Any) -> None:
        super().__init__(directory)
        self._session = session
        self.opened: list[Any] = []
        clocks = {"clock": self.clock, "sleep": self.sleep}
        train = tf.train
        self.functions = SimpleNamespace(
            get_checkpoint_state=train.get_checkpoint_state,
            latest_checkpoint=train.latest_checkpoint,
            generate_checkpoint_state_proto=train.generate_checkpoint_state_proto,
            update_checkpoint_state=train.update_checkpoint_state,
            checkpoint_exists=train.checkpoint_exists,
            get_checkpoint_mtimes=train.get_checkpoint_mtimes,
            remove_checkpoint=train.remove_checkpoint,
            checkpoints_iterator=lambda *args, **kwargs: train.checkpoints_iterator(*args, **kwargs, **clocks),
            wait_for_new_checkpoint=lambda *args, **kwargs: train.wait_for_new_checkpoint(*args, **kwargs, **clocks),
        )

    def new_saver(self, **options: Any) -> Any:
        self.opened.append(tf.train.Saver(**options))
        return self.opened[-1]

    def saver_from(self, saver_def: Any) -> Any:
        self.opened.append(tf.train.Saver.from_proto(saver_def))
        return self.opened[-1]

    def import_with(self, source: Any, **options: Any) -> tuple[Any, list[str]]:
        with tf.Graph().as_default():
            saver = tf.train.import_meta_graph(source, **options)
            return saver, [variable.op.name for variable in tf.global_variables()]

    def save_with(self, saver: Any, path: Any, step: Any, **options: Any) -> Any:
        return saver.save(self._session, path, step, **{"write_meta_graph": False, **options})


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CompatScene]:
    monkeypatch.chdir(tmp_path)
    tf.get_variable("v", [2])
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        scene = CompatScene(tmp_path, session)
        monkeypatch.setattr(saver_module, "clock", scene.clock)
        yield scene
        for saver in scene.opened:
            saver.close()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, scene: CompatScene) -> None:
    scene.run(row.steps, "compat")
