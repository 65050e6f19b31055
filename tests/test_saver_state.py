"""What becomes of the list of checkpoints when a save fails half-way through its last steps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import gpusaver
from gpusaver.errors import UnknownError
from gpusaver.storage.local import LocalStorage


class StateFails(LocalStorage):
    """Refuses to replace the state file while ``failing``."""

    failing = False

    def replace(self, source: str, target: str) -> None:
        if self.failing and os.path.basename(target) == "checkpoint":
            raise UnknownError(f"cannot rename {source} to {target}: injected")
        super().replace(source, target)


def test_a_prefix_the_state_file_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    saver = gpusaver.Saver({"w": np.zeros(3)})
    with pytest.raises(ValueError, match="UTF-8"):
        saver.save(os.fsencode(tmp_path) + b"/bad\xff")
    assert os.listdir(tmp_path) == []
    good = saver.save(tmp_path / "good")
    assert gpusaver.latest_checkpoint(tmp_path) == good
    saver.close()


def test_such_a_prefix_serves_without_a_state_file(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.arange(3)}) as saver:
        prefix = saver.save(os.fsencode(tmp_path) + b"/bad\xff", write_state=False)
    np.testing.assert_array_equal(gpusaver.load(prefix)["w"], [0, 1, 2])


def test_a_path_with_nul_is_named(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}) as saver, pytest.raises(ValueError, match="NUL"):
        saver.save(f"{tmp_path}/a\0b")


def test_what_was_to_be_deleted_is_not_forgotten_when_the_state_file_cannot_be_written(tmp_path: Path) -> None:
    storage = StateFails()
    with gpusaver.Saver({"w": np.zeros(3)}, max_to_keep=1, storage=storage) as saver:
        first = saver.save(tmp_path / "m", 1)
        storage.failing = True
        with pytest.raises(UnknownError, match="injected"):
            saver.save(tmp_path / "m", 2)
        assert saver.last_checkpoints == [first]
        assert gpusaver.latest_checkpoint(tmp_path) == first
        storage.failing = False
        third = saver.save(tmp_path / "m", 3)
        assert saver.last_checkpoints == [third]
        assert not gpusaver.checkpoint_exists(first)


def test_surplus_positional_arguments_name_the_front_end_with_sessions(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        with pytest.raises(TypeError, match=r"gpusaver\.compat\.v1"):
            saver.save(tmp_path / "k", 1, "latest")  # type: ignore[misc]
        with pytest.raises(TypeError, match=r"gpusaver\.compat\.v1"):
            saver.restore(tmp_path / "k", True)  # type: ignore[misc]


def test_a_state_file_given_as_prefix_is_recognised(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        prefix = saver.save(tmp_path / "k", 1)
        with pytest.raises(gpusaver.InvalidArgumentError, match=r"is a state file; .*k-1") as caught:
            saver.restore(tmp_path / "checkpoint")
    assert prefix in str(caught.value)
