"""The tables of saver behaviour against gpusaver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tables import ROWS
from tables.scenario import Row, Scene

import gpusaver
from gpusaver import checkpoint_files, checkpoint_state
from gpusaver.saver import Saver


class NativeScene(Scene):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.opened: list[Saver] = []
        clocks = {"clock": self.clock, "sleep": self.sleep}
        self.functions = SimpleNamespace(
            get_checkpoint_state=checkpoint_state.get_checkpoint_state,
            latest_checkpoint=checkpoint_state.latest_checkpoint,
            generate_checkpoint_state_proto=checkpoint_state.generate_checkpoint_state_proto,
            update_checkpoint_state=checkpoint_state.update_checkpoint_state,
            checkpoint_exists=checkpoint_files.checkpoint_exists,
            get_checkpoint_mtimes=checkpoint_files.get_checkpoint_mtimes,
            remove_checkpoint=checkpoint_files.remove_checkpoint,
            checkpoints_iterator=lambda *args, **kwargs: checkpoint_state.checkpoints_iterator(
                *args, **kwargs, **clocks
            ),
            wait_for_new_checkpoint=lambda *args, **kwargs: checkpoint_state.wait_for_new_checkpoint(
                *args, **kwargs, **clocks
            ),
        )

    def new_saver(self, **options: Any) -> Saver:
        with gpusaver.variables():
            gpusaver.Variable(np.zeros(2, np.float32), "v")
            self.opened.append(Saver(clock=self.clock, **options))
        return self.opened[-1]

    def saver_from(self, saver_def: Any) -> Saver:
        with gpusaver.variables():
            gpusaver.Variable(np.zeros(2, np.float32), "v")
            self.opened.append(Saver.from_proto(saver_def))
        return self.opened[-1]

    def import_with(self, source: Any, **options: Any) -> tuple[Saver, list[str]]:
        with gpusaver.variables():
            self.opened.append(gpusaver.import_meta_graph(source, **options))
            return self.opened[-1], [variable.name for variable in gpusaver.current_variables()]

    def save_with(self, saver: Saver, path: Any, step: Any, **options: Any) -> str:
        return saver.save(path, step, **{"write_meta_graph": False, **options})


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeScene]:
    monkeypatch.chdir(tmp_path)
    scene = NativeScene(tmp_path)
    yield scene
    for saver in scene.opened:
        saver.close()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, scene: NativeScene) -> None:
    scene.run(row.steps, "gpusaver")


def test_the_differences_are_explained() -> None:
    steps = [step for row in ROWS for step in row.steps]
    differing = [step for step in steps if step.tensorflow != step.gpusaver]
    assert differing
    assert all(step.why for step in differing)
