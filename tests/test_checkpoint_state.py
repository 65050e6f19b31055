"""State files: the exact text, round trips, hostile content; and the files of checkpoints."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpusaver import checkpoint_files
from gpusaver import checkpoint_state as cs
from gpusaver.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from gpusaver.protos import CheckpointState
from gpusaver.storage.local import LocalStorage

GOLDEN = Path(__file__).parent / "golden"

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)
messages = st.builds(
    CheckpointState,
    model_checkpoint_path=st.text(),
    all_model_checkpoint_paths=st.lists(st.text(), max_size=5),
    all_model_checkpoint_timestamps=st.lists(st.floats(allow_nan=False), max_size=5),
    last_preserved_timestamp=st.floats(allow_nan=False),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake(*prefixes: str) -> None:
    for prefix in prefixes:
        os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
        for suffix in (".index", ".data-00000-of-00001"):
            Path(prefix + suffix).write_bytes(b"")


# The text


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/checkpoint")), ids=lambda path: path.parent.name)
def test_golden_text_is_reproduced(path: Path) -> None:
    text = path.read_text()
    state = cs._parse(text, str(path))
    assert state is not None
    assert cs.to_text(state) == text


@pytest.mark.parametrize("file", ["checkpoint", "other_state"])
def test_golden_states(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    expected = json.loads((GOLDEN / "state_dir" / "expected-state.json").read_text())["states"][file]
    state = cs.get_checkpoint_state("state_dir", file)
    assert state is not None
    assert state.model_checkpoint_path == expected["model_checkpoint_path"]
    assert list(state.all_model_checkpoint_paths) == expected["all_model_checkpoint_paths"]
    assert cs.latest_checkpoint("state_dir", file) == expected["latest_checkpoint"]


def test_golden_state_of_a_moved_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """abs_state names /data/run1/model.ckpt-20, which is gone, and -30, which lies beside it."""
    monkeypatch.chdir(GOLDEN)
    state = cs.get_checkpoint_state("state_dir", "abs_state")
    assert state is not None
    assert list(state.all_model_checkpoint_paths) == ["state_dir/model.ckpt-30"]
    assert cs.latest_checkpoint("state_dir", "abs_state") == "state_dir/model.ckpt-30"


def test_golden_v1() -> None:
    directory = str(GOLDEN / "v1_tf1")
    latest = cs.latest_checkpoint(directory)
    assert latest is not None
    assert checkpoint_files.checkpoint_exists(latest)
    assert checkpoint_files.checkpoint_exists(os.path.join(directory, "legacy.ckpt"))
    assert checkpoint_files.checkpoint_exists(os.path.join(directory, "sh.ckpt-?????-of-00002"))
    assert not checkpoint_files.checkpoint_exists(os.path.join(directory, "expected-legacy.ckpt.json"))
    assert len(checkpoint_files.get_checkpoint_mtimes([os.path.join(directory, "sh.ckpt-?????-of-00002")])) == 1


@given(messages)
@example(CheckpointState(model_checkpoint_path="\\" * 254 + "\"'\n\x00\x7f\x80\u2028\ufeff"))
def test_text_round_trip(state: CheckpointState) -> None:
    parsed = cs._parse(cs.to_text(state), "memory")
    assert parsed is not None
    assert parsed.SerializeToString() == state.SerializeToString()


@given(st.lists(names, min_size=1, max_size=4, unique=True))
@example(["C:\\k", "\\\\server\\k"])
def test_names_survive_the_file(tmp_path_factory: pytest.TempPathFactory, found: list[str]) -> None:
    directory = str(tmp_path_factory.getbasetemp() / "round_trip")
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, name) for name in found]
    cs.update_checkpoint_state(directory, paths[-1], paths, latest_filename="state of all", save_relative_paths=True)
    state = cs.get_checkpoint_state(directory, "state of all")
    assert state is not None
    assert state.model_checkpoint_path == paths[-1]
    assert list(state.all_model_checkpoint_paths) == paths


# Hostile content


@given(st.one_of(st.binary(), st.text().map(str.encode), messages.map(cs.to_text).map(str.encode)), st.integers(0, 99))
def test_any_content_gives_a_state_or_none_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cut: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "hostile"
    directory.mkdir(exist_ok=True)
    for data in (content, content[:cut]):
        (directory / "checkpoint").write_bytes(data)
        try:
            state = cs.get_checkpoint_state(directory)
            latest = cs.latest_checkpoint(directory)
        except InvalidArgumentError:
            continue
        assert latest is None
        for path in [state.model_checkpoint_path, *state.all_model_checkpoint_paths] if state else []:
            assert path == "" or os.path.realpath(path).startswith(os.path.join(os.path.realpath(directory), ""))


@pytest.mark.parametrize(
    "entry",
    [
        "../outside/k",
        "sub/../../outside/k",
        "link/../outside/k",
        "/{cwd}/outside/k",
        "{cwd}/outside/k",
        "{cwd}/d/../outside/k",
        "..",
        ".",
        "/",
        "../outside/",
        "../d-2/k",
        "k\\000",
    ],
)
@pytest.mark.usefixtures("here")
def test_entries_never_lead_outside(entry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake("outside/k", "d-2/k", "outside/.index", "d/sub/x")
    os.symlink("../outside", "d/link")
    entry = entry.replace("{cwd}", str(tmp_path))
    Path("d/checkpoint").write_text(f'model_checkpoint_path: "{entry}" all_model_checkpoint_paths: ["{entry}", "j"]')
    state = cs.get_checkpoint_state("d")
    assert state is not None
    assert state.model_checkpoint_path == ""
    assert list(state.all_model_checkpoint_paths) == ["d/j"]
    assert cs.latest_checkpoint("d") is None
    assert "allow_outside=True" in caplog.text


@pytest.mark.usefixtures("here")
def test_allow_outside_follows_what_exists_and_else_prefers_what_is_here() -> None:
    fake("outside/k", "d/k", "d/j")
    Path("d/checkpoint").write_text(
        'model_checkpoint_path: "../outside/k" all_model_checkpoint_paths: ["/gone/i", "/gone/j", "../outside/k"]'
    )
    state = cs.get_checkpoint_state("d", allow_outside=True)
    assert state is not None
    assert list(state.all_model_checkpoint_paths) == ["/gone/i", "d/j", "d/../outside/k"]
    assert cs.latest_checkpoint("d", allow_outside=True) == "d/../outside/k"
    assert cs.latest_checkpoint("d") == "d/k"


@pytest.mark.usefixtures("here")
def test_timestamps_of_skipped_entries_are_skipped() -> None:
    fake("d/k-2")
    Path("d/checkpoint").write_text(
        'model_checkpoint_path: "k-2" all_model_checkpoint_paths: ["/x/k-1", "k-2"] '
        "all_model_checkpoint_timestamps: [1, 2]"
    )
    state = cs.get_checkpoint_state("d")
    assert state is not None
    assert list(state.all_model_checkpoint_timestamps) == [2.0]


@pytest.mark.usefixtures("here")
def test_absurd_files_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with open("checkpoint", "wb") as file:
        file.truncate(1 << 40)
    assert cs.get_checkpoint_state(".") is None
    assert "expected at most" in caplog.text
    Path("checkpoint").write_text('model_checkpoint_path: "' + "\\" * 1_000_000 + '"')
    assert cs.get_checkpoint_state(".") is None
    assert "backslashes" in caplog.text
    caplog.clear()
    Path("checkpoint").write_text("[" * 1_000_000)
    assert cs.get_checkpoint_state(".") is None
    assert len(caplog.text) < 1000


@pytest.mark.usefixtures("here")
def test_unreadable_state_file(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(LocalStorage):
        def open(self, path: str) -> object:  # type: ignore[override]
            raise PermissionDeniedError(f"cannot open {path}")

    assert cs.get_checkpoint_state(".", storage=Refusing()) is None
    assert "cannot open ./checkpoint" in caplog.text


@pytest.mark.usefixtures("here")
def test_a_directory_that_is_not_utf8_can_be_read_but_not_held_by_a_message() -> None:
    directory = os.fsdecode(b"d\xff")
    fake(f"{directory}/k")
    cs.update_checkpoint_state(directory, f"{directory}/k")
    assert cs.latest_checkpoint(b"d\xff") == f"{directory}/k"
    with pytest.raises(InvalidArgumentError, match="not valid UTF-8"):
        cs.get_checkpoint_state(directory)


# Writing


@pytest.mark.usefixtures("here")
def test_a_name_that_is_not_utf8_is_refused() -> None:
    Path("checkpoint").write_text("before")
    with pytest.raises(InvalidArgumentError, match="not valid UTF-8"):
        cs.update_checkpoint_state("", b"k\xff")
    assert Path("checkpoint").read_text() == "before"
    assert os.listdir(".") == ["checkpoint"]


@pytest.mark.usefixtures("here")
def test_a_failed_update_changes_nothing() -> None:
    class Failing(LocalStorage):
        def replace(self, source: str, target: str) -> None:
            raise PermissionDeniedError(f"cannot rename {source} to {target}")

    cs.update_checkpoint_state("", "k-1")
    before = Path("checkpoint").read_bytes()
    with pytest.raises(PermissionDeniedError):
        cs.update_checkpoint_state("", "k-2", storage=Failing())
    assert Path("checkpoint").read_bytes() == before
    assert os.listdir(".") == ["checkpoint"]


@pytest.mark.usefixtures("here")
def test_more_than_a_reader_would_take_is_not_written() -> None:
    with pytest.raises(InvalidArgumentError, match="List fewer checkpoints"):
        cs.update_checkpoint_state("", "k", ["x" * 4000] * 1100)
    assert os.listdir(".") == []


def test_the_callers_lists_are_not_changed() -> None:
    paths, times = ["d/k-1"], [1.0, 2.0]
    state = cs.generate_checkpoint_state_proto("d", "d/k-2", paths, times)
    assert list(state.all_model_checkpoint_paths) == ["k-1", "k-2"]
    assert (paths, times) == (["d/k-1"], [1.0, 2.0])


@pytest.mark.parametrize("directory", ["d", "{cwd}/d"])
@pytest.mark.parametrize("path", ["d/k", "{cwd}/d/k"])
def test_save_relative_paths(directory: str, path: str, here: Path) -> None:
    directory, path = directory.replace("{cwd}", str(here)), path.replace("{cwd}", str(here))
    state = cs.generate_checkpoint_state_proto(directory, path, save_relative_paths=True)
    assert list(state.all_model_checkpoint_paths) == [state.model_checkpoint_path] == ["k"]


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="empty"):
        cs.generate_checkpoint_state_proto("d", "d/k", ["", "d/k"])


# The files of a checkpoint


@pytest.mark.usefixtures("here")
def test_checkpoint_times_keep_the_prefix() -> None:
    fake("d/a", "d/b")
    os.utime("d/b.index", (7.5, 7.5))
    (first, _), second = checkpoint_files.checkpoint_times(["d/a", b"d/gone", Path("d/b")])
    assert first == "d/a"
    assert second == ("d/b", 7.5)


@pytest.mark.usefixtures("here")
def test_checkpoint_times_of_files_that_vanish() -> None:
    class Vanishing(LocalStorage):
        def modified_time(self, path: str) -> float:
            raise NotFoundError(path)

    fake("d/a")
    assert checkpoint_files.checkpoint_times(["d/a"], storage=Vanishing()) == []


@pytest.mark.usefixtures("here")
def test_remove_takes_the_index_first_and_all_it_can() -> None:
    fake("d/k")
    removed = []

    class KeepingTheIndex(LocalStorage):
        def remove(self, path: str) -> None:
            removed.append(path)
            if path == "d/k.index":
                raise PermissionDeniedError(f"cannot remove {path}")
            super().remove(path)

    with pytest.raises(PermissionDeniedError, match=r"cannot remove d/k\.index"):
        checkpoint_files.remove_checkpoint("d/k", storage=KeepingTheIndex())
    assert removed[0] == "d/k.index"
    assert os.listdir("d") == ["k.index"]


@pytest.mark.usefixtures("here")
def test_remove_v1() -> None:
    for name in ("old", "s-00000-of-00002", "s-00001-of-00002", "s-00000-of-00001"):
        Path(name).write_bytes((GOLDEN / "v1_tf1" / "legacy.ckpt").read_bytes())
    Path("s.meta").write_bytes(b"")  # TensorFlow cuts the shard numbers off for this one
    checkpoint_files.remove_checkpoint("old")
    checkpoint_files.remove_checkpoint("s-?????-of-00002")
    assert os.listdir(".") == ["s-00000-of-00001"]


def test_the_log_says_why_nothing_is_found(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "checkpoint").write_text('model_checkpoint_path: "k"')
    with caplog.at_level(logging.ERROR):
        assert cs.latest_checkpoint(here) is None
    assert f"{here}/checkpoint names {here}/k as the newest checkpoint" in caplog.text
