"""The language of the tables: a row is a list of steps, each with what it must give in TensorFlow and in gpusaver.

A row runs in an empty current directory with a clock that stands still until a step moves it; times in a row count
from its start.  ``{cwd}`` in any text stands for the directory.  The two drivers (tests/test_saver_rows.py and
tests/tf/test_tf_saver_rows.py) subclass `Scene`.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

#: The end of every table file.  A file with it is enough of a V1 checkpoint to exist.
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")

ANYTHING = object()


@dataclass(frozen=True)
class Raises:
    """An error whose class has this name among its bases, and whose text matches the pattern."""

    error: str
    text: str = ""

    def fits(self, error: Exception) -> bool:
        names = [cls.__name__ for cls in type(error).__mro__]
        return self.error in names and re.search(self.text, str(error)) is not None


@dataclass(frozen=True)
class Step:
    operation: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensorflow: Any = ANYTHING
    gpusaver: Any = ANYTHING
    why: str = ""
    side: str = "gpusaver"

    def gives(self, expected: Any) -> Step:
        return replace(self, tensorflow=expected, gpusaver=expected)

    def differs(self, *, tensorflow: Any, gpusaver: Any, why: str, compat: str = "gpusaver") -> Step:
        """A deliberate difference, with the reason for it.  ``compat``: which side the TensorFlow-1 front end takes."""
        return replace(self, tensorflow=tensorflow, gpusaver=gpusaver, why=why, side=compat)

    @property
    def compat(self) -> Any:
        return getattr(self, self.side)


@dataclass(frozen=True)
class Row:
    section: int  # of saver-behaviour.md
    title: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return f"{self.section}-{self.title}"


def row(section: int, title: str, *steps: Step) -> Row:
    return Row(section, title, steps)


def _operation(name: str) -> Callable[..., Step]:
    return lambda *args, **kwargs: Step(name, args, kwargs)


# The words of the language; each is the method of `Scene` with that name.
at, saver, save, saves, last, recover, set_last, callers_list = map(
    _operation, ("at", "saver", "save", "saves", "last", "recover", "set_last", "callers_list")
)
mkdir, write, fake, v1_file, touch, move, delete, block, on_disk, text = map(
    _operation, ("mkdir", "write", "fake", "v1_file", "touch", "move", "delete", "block", "on_disk", "text")
)
state, state_times, latest, generate, update, exists, mtimes, remove = map(
    _operation, ("state", "state_times", "latest", "generate", "update", "exists", "mtimes", "remove")
)
metas, saver_def, proto, from_proto, export, import_graph = map(
    _operation, ("metas", "saver_def", "proto", "from_proto", "export", "import_graph")
)
later, wait, iterate = map(_operation, ("later", "wait", "iterate"))


def listing(latest_path: str, *paths: str) -> str:
    """The text of a state file."""
    lines = [f'model_checkpoint_path: "{latest_path}"\n']
    return "".join(lines + [f'all_model_checkpoint_paths: "{path}"\n' for path in paths])


def by_number(name: str) -> list[str | int]:
    """Sorts k-2 before k-11."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Scene:
    """The operations that need neither library, and the running of a row."""

    #: The library's module functions on state files.
    functions: Any

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Not 0: files get the true time, and retention compares it with the clock.
        self.start = float(int(time.time()))
        self.now = self.start
        self.naps: list[float] = []
        self._savers: dict[str, Any] = {}
        self._events: list[tuple[float, str]] = []
        self._callers_list: list[tuple[str, float]] = []

    def new_saver(self, **options: Any) -> Any:
        raise NotImplementedError

    def save_with(self, saver: Any, path: Any, step: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _second(self) -> float:
        return self.now - self.start

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        assert len(self.naps) < 1000, "sleeps for ever"
        self._pass_time(seconds)

    def run(self, steps: Iterable[Step], column: str) -> None:
        for number, step in enumerate(steps):
            expected = self._filled(getattr(step, column))
            where = f"step {number}, {step.operation}{step.args}{step.kwargs or ''}"
            operation = getattr(self, step.operation)
            try:
                found = operation(*self._filled(step.args), **self._filled(step.kwargs))
            except Exception as error:
                if not (isinstance(expected, Raises) and expected.fits(error)):
                    raise AssertionError(f"{where}: expected {expected!r}, raised {error!r}") from error
            else:
                assert expected is ANYTHING or found == expected, f"{where}: expected {expected!r}, found {found!r}"

    def _filled(self, value: Any) -> Any:
        """The value with the current directory in the place of ``{cwd}``."""
        if isinstance(value, str):
            return value.replace("{cwd}", str(self.directory))
        if isinstance(value, list | tuple):
            return type(value)(map(self._filled, value))
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        if isinstance(value, PurePath):
            return type(value)(self._filled(str(value)))
        return value

    # savers

    def at(self, minute: float) -> None:
        self.now = self.start + minute * 60

    def saver(self, label: str = "", **options: Any) -> None:
        self._savers[label] = self.new_saver(**options)

    def save(self, path: Any, step: Any = None, *, by: str = "", **options: Any) -> Any:
        return self.save_with(self._savers[by], path, step, **options)

    def saves(self, path: str, minutes: Iterable[float], *, by: str = "") -> None:
        """A save at each of the minutes, with the minute for a step."""
        for minute in minutes:
            self.at(minute)
            self.save(path, minute, by=by)

    def last(self, *, by: str = "") -> list[str]:
        found = self._savers[by].last_checkpoints
        found.append("must be a copy")
        return list(self._savers[by].last_checkpoints)

    def recover(self, paths: Any, *, by: str = "") -> None:
        self._savers[by].recover_last_checkpoints(paths)

    def set_last(self, paths_and_times: Any, *, by: str = "") -> None:
        self._callers_list = type(paths_and_times)((path, self.start + second) for path, second in paths_and_times)
        self._savers[by].set_last_checkpoints_with_time(self._callers_list)

    def callers_list(self) -> list[str]:
        """What the list given to `set_last` holds by now."""
        return [path for path, _ in self._callers_list]

    # files

    def mkdir(self, path: str) -> None:
        os.makedirs(path)

    def write(self, path: str, content: str | bytes) -> None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    def fake(self, *prefixes: str) -> None:
        """Files named like those of checkpoints."""
        for prefix in prefixes:
            self.write(prefix + ".index", b"")
            self.write(prefix + ".data-00000-of-00001", b"")

    def v1_file(self, path: str) -> None:
        self.write(path, bytes(40) + TABLE_MAGIC)

    def touch(self, path: str, second: float) -> None:
        os.utime(path, (self.start + second, self.start + second))

    def move(self, source: str, target: str) -> None:
        os.rename(source, target)

    def delete(self, path: str) -> None:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def block(self, path: str) -> None:
        """Puts a directory that is not empty in the place of a file, so that it cannot be deleted like one."""
        os.unlink(path)
        os.makedirs(path + "/inside")

    def on_disk(self, directory: str) -> list[str]:
        """Names of files and, for a pair of index and data, of the checkpoint; `.meta` files are left out."""
        names = [re.sub(r"\.data-\d{5}-of-\d{5}$", ".data", name) for name in os.listdir(directory)]
        left = {name for name in names if not name.endswith(".meta")}
        prefixes = {name[: -len(".index")] for name in left if name.endswith(".index")}
        complete = [prefix for prefix in prefixes if prefix + ".data" in left]
        left -= {prefix + ending for prefix in complete for ending in (".index", ".data")}
        return sorted([*left, *complete], key=by_number)

    def text(self, path: str) -> str:
        return Path(path).read_bytes().decode()

    # meta graphs

    def import_with(self, source: Any, **options: Any) -> tuple[Any, list[str]]:
        """The Saver that the library makes of it, and the names of all variables that were made."""
        raise NotImplementedError

    def saver_from(self, saver_def: Any) -> Any:
        raise NotImplementedError

    def metas(self, directory: str) -> list[str]:
        """Names of the files with meta graphs, which `on_disk` leaves out."""
        return sorted((name for name in os.listdir(directory) if name.endswith((".meta", ".graph"))), key=by_number)

    def saver_def(self, *, by: str = "") -> tuple[Any, ...]:
        """Names and retention; of a Saver that was imported, whose names may differ, the retention alone."""
        found = self._savers[by].as_saver_def()
        names = (found.filename_tensor_name, found.save_tensor_name, found.restore_op_name)
        retention = (found.max_to_keep, found.keep_checkpoint_every_n_hours)
        return retention if by == "imported" else (*names, *retention, found.sharded)

    def proto(self, scope: str | None = None) -> str | None:
        found = self._savers[""].to_proto(scope)
        return None if found is None else found.restore_op_name

    def from_proto(self, **fields: Any) -> tuple[int, bool]:
        """Retention and sharding of a Saver made from a SaverDef."""
        self.saver(**fields)
        found = self.saver_from(self._savers[""].as_saver_def()).as_saver_def()
        return found.max_to_keep, found.sharded

    def export(self, path: Any, **options: Any) -> list[str]:
        """The collections of the exported graph."""
        return sorted(self._savers[""].export_meta_graph(path, **options).collection_def)

    def import_graph(self, source: Any, **options: Any) -> list[str] | None:
        """The names of the variables that were made; None if there was no Saver to return.  It is called "imported"."""
        saver, names = self.import_with(source, **options)
        self._savers["imported"] = saver
        return None if saver is None else sorted(names)

    # functions on state files

    def state(self, directory: Any, *args: Any, **kwargs: Any) -> tuple[str, list[str]] | None:
        found = self.functions.get_checkpoint_state(directory, *args, **kwargs)
        return None if found is None else (found.model_checkpoint_path, list(found.all_model_checkpoint_paths))

    def state_times(self, directory: str) -> tuple[list[float], float]:
        found = self.functions.get_checkpoint_state(directory)
        return list(found.all_model_checkpoint_timestamps), found.last_preserved_timestamp

    def latest(self, *args: Any) -> str | None:
        return self.functions.latest_checkpoint(*args)

    def generate(self, *args: Any, **kwargs: Any) -> tuple[str, list[str]]:
        found = self.functions.generate_checkpoint_state_proto(*args, **kwargs)
        return found.model_checkpoint_path, list(found.all_model_checkpoint_paths)

    def update(self, *args: Any, **kwargs: Any) -> None:
        return self.functions.update_checkpoint_state(*args, **kwargs)

    def exists(self, prefix: Any) -> bool:
        return self.functions.checkpoint_exists(prefix)

    def mtimes(self, prefixes: Any) -> list[float]:
        return [found - self.start for found in self.functions.get_checkpoint_mtimes(prefixes)]

    def remove(self, prefix: Any, **kwargs: Any) -> None:
        self.functions.remove_checkpoint(prefix, **kwargs)

    # waiting

    def later(self, second: float, prefix: str) -> None:
        """At this second the checkpoint appears, as the newest of its directory."""
        self._events.append((second, prefix))

    def _pass_time(self, seconds: float) -> None:
        self.now += seconds
        for event in [event for event in self._events if event[0] <= self._second()]:
            self._events.remove(event)
            self.fake(event[1])
            directory, name = os.path.split(event[1])
            self.write(f"{directory}/checkpoint", f'model_checkpoint_path: "{name}"\n')

    def wait(self, *args: Any, **kwargs: Any) -> tuple[str | None, list[float]]:
        """What came, and how long it slept between the looks."""
        self.naps = []
        found = self.functions.wait_for_new_checkpoint(*args, **kwargs)
        return found, self.naps

    def iterate(self, *args: Any, take: int, work: float = 0, answers: Any = None, **kwargs: Any) -> list[Any]:
        """(second, prefix) of the first `take` checkpoints, each followed by some seconds of work, and the second of
        the end.  ``answers``: what timeout_fn returns, call by call; ``"asked"`` marks each call."""
        found: list[Any] = []
        if answers is not None:
            answers = list(answers)

            def timeout_fn() -> bool:
                found.append("asked")
                return answers.pop(0)

            kwargs["timeout_fn"] = timeout_fn
        for path in self.functions.checkpoints_iterator(*args, **kwargs):
            found.append((self._second(), path))
            self._pass_time(work)
            take -= 1
            if take == 0:
                return found
        return [*found, self._second()]
