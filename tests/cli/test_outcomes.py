"""Exit codes, hostile names, terminals and pipes, interruption, and what is missing: the same for every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from command_tools import Command, environment, on_terminal, screen_of

import gpusaver
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import encode_index
from gpusaver.cli.app import command
from gpusaver.display import shown
from gpusaver.tensor import DataType, TensorSpec

HOSTILE = [
    "\x1b]0;a new title\x07",
    "\x1b[2J\x1b[31mred",
    "line\nbreak\ttab\rreturn",
    "\u202egnp.exe",
    "[bold]markup[/bold] :smile:",
    "not-utf8-\udcff",
    "\x9b31m",
    "zero\u200bwidth",
]


def all_commands(prefix: str, other: str, folder: Path) -> list[list[str]]:
    return [
        ["ls", str(folder)],
        ["latest", str(folder)],
        ["show", prefix],
        ["show", prefix, "--tree"],
        ["show", prefix, "--stats"],
        ["show", prefix, "--json"],
        ["verify", prefix, other],
        ["diff", prefix, other],
        ["convert", prefix, str(folder / "x.npz")],
        ["convert", prefix, str(folder / "x.safetensors")],
        ["rename", prefix, str(folder / "renamed"), "-e", "$", "x", "--dry-run"],
        ["prune", str(folder), "--keep", "1", "--dry-run"],
        *(["get", prefix, name] for name in HOSTILE),
        *(["get", prefix, f"{name}?"] for name in HOSTILE),
    ]


def hostile_checkpoints(folder: Path) -> tuple[str, str]:
    """Two whose names differ in value, the second damaged, in a directory whose own names are hostile."""
    prefix = gpusaver.save(folder / "a-1", {name: np.ones(2) for name in HOSTILE})
    other = gpusaver.save(folder / "b-1", {name: np.zeros(2) for name in HOSTILE} | {"more": 1})
    data = Path(f"{other}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:100] + bytes(4) + b"\1" * 32)
    gpusaver.Saver({"w": np.ones(1)}).save(folder / "\x1b[31mevil", 3)
    return prefix, other


def test_nothing_of_a_name_reaches_a_pipe_raw(tmp_path: Path, cli: Command) -> None:
    prefix, other = hostile_checkpoints(tmp_path)
    for arguments in all_commands(prefix, other, tmp_path):
        outcome = cli(*arguments)
        for text in (outcome.out, outcome.err):
            assert all(c.isprintable() or c in "\n\t" for c in text), arguments
            assert "\u202e" not in text
            assert "\u200b" not in text
    code, out, _ = cli("show", prefix)
    assert code == 0
    assert len(out.splitlines()) == 1 + len(HOSTILE)
    assert all(line.count("\t") == 4 for line in out.splitlines())
    names = [row["name"] for row in json.loads(cli("show", prefix, "--json").out)["tensors"]]
    assert sorted(names) == sorted(HOSTILE)


def test_nothing_of_a_name_reaches_a_terminal_raw(tmp_path: Path) -> None:
    """``screen_of`` fails for any sequence but those of colours and bars."""
    prefix, other = hostile_checkpoints(tmp_path)
    for arguments in (["show", prefix], ["show", prefix, "--tree"], ["diff", prefix, other], ["ls", str(tmp_path)]):
        text = screen_of(on_terminal(arguments)[1])
        assert all(c.isprintable() or c == "\n" for c in text)
    assert r"\x1b[31mevil" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain/ünï cöde 中", "plain/ünï cöde 中"),
        ("\x1b\n\x7f\x85", r"\x1b\x0a\x7f\x85"),
        ("\u202e\u2028\U000e0001", r"\u202e\u2028\U000e0001"),
        ("\udcff\udc80\ud800", r"\xff\x80\ud800"),
    ],
)
def test_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_damaged_and_missing_files_are_errors_of_one_line(golden: Path, cli: Command) -> None:
    Path("broken.index").write_bytes(b"nothing of the kind")
    entry = Entry(TensorSpec(DataType.float32, (2**40,)), 0, 0, 2**42, 0)
    Path("liar.index").write_bytes(encode_index(1, [(b"w", entry)]))
    Path("liar.data-00000-of-00001").write_bytes(bytes(64))
    for path in ("broken", "none", "none/at/all", "dtypes/all.index", "dtypes/checkpoint"):
        for name in ("show", "get", "diff", "convert", "rename"):
            more = {"get": ["w"], "diff": ["dtypes"], "convert": ["out"], "rename": ["out", "-e", "a", "b"]}
            code, out, err = cli(name, path, *more.get(name, []))
            assert (code, out, err.count("\n")) == (3, "", 1), (name, path)
            assert err.startswith("gpusaver: ")
    assert cli("verify", "broken").code == 1
    for arguments in (["get", "liar", "w"], ["show", "liar", "--stats"], ["convert", "liar", "out"]):
        assert cli(*arguments).code == 3
    assert not Path("out.index").exists()


def test_wrong_usage(cli: Command) -> None:
    for arguments in (
        ["fly"],
        ["show"],
        ["show", "a", "--filter", "("],
        ["bench", "--size", "much"],
        ["show", "a", "b"],
    ):
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("gpusaver: ")
    assert cli("--version") == (0, f"gpusaver, version {gpusaver.__version__}\n", "")
    assert cli("--help").code == 0


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_one_sentence(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom gpusaver.cli import main; sys.exit(main())"
    done = run_python(code, "ls")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "pip install 'gpusaver[cli]'" in done.stderr


def test_without_matplotlib_one_sentence(tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None\nfrom gpusaver.cli import main; sys.exit(main())"
    done = run_python(code, "trace", str(tmp_path), "--size", "1MB")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "pip install 'gpusaver[trace]'" in done.stderr


def test_the_library_does_not_import_the_command() -> None:
    code = (
        "import gpusaver, sys; print([m for m in sys.modules if m.split('.')[0] in ('click', 'rich') or '.cli' in m])"
    )
    assert run_python(code).stdout == "[]\n"


def test_interrupted_on_a_terminal(tmp_path: Path) -> None:
    """While it reads a sparse file of 64 GB."""
    spec = TensorSpec(DataType.uint8, (1 << 36,))
    (tmp_path / "a.index").write_bytes(encode_index(1, [(b"w", Entry(spec, 0, 0, spec.nbytes, 0))]))
    with open(tmp_path / "a.data-00000-of-00001", "wb") as file:
        file.truncate(spec.nbytes)
    code, sent = on_terminal(["verify", tmp_path / "a"], interrupt_at=b"verifying")
    assert code == 130
    assert screen_of(sent).splitlines()[-1] == "gpusaver: interrupted"


def test_interrupted_while_it_writes(golden: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpusaver.conversion import npz

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = set(os.listdir())
    monkeypatch.setattr(npz, "write_npy", interrupted)
    code, _, err = cli("convert", "conv_tf1", "out.npz")
    assert (code, err) == (130, "gpusaver: interrupted\n")
    assert set(os.listdir()) == before


def test_a_reader_that_goes_away(golden: Path) -> None:
    command_line = [sys.executable, "-m", "gpusaver", "show", "big_index"]
    with subprocess.Popen(command_line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_no_terminal_no_drawing(golden: Path) -> None:
    for arguments in (
        ["ls", "state_dir"],
        ["verify", "big_index"],
        ["diff", "conv_tf1", "conv_tf2"],
        ["show", "dtypes"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gpusaver", *arguments], env=environment(), capture_output=True, timeout=60
        )
        assert b"\x1b" not in done.stdout + done.stderr
        assert "─".encode() not in done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpusaver"],
        env=environment(_GPUSAVER_COMPLETE=f"{shell}_source"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "_GPUSAVER_COMPLETE" in done.stdout
    words = {"bash": {"COMP_WORDS": "gpusaver ve", "COMP_CWORD": "1"}, "zsh": {}, "fish": {}}[shell]
    if words:
        found = subprocess.run(
            [sys.executable, "-m", "gpusaver"],
            env=environment(_GPUSAVER_COMPLETE="bash_complete", **words),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.stdout.split() == ["plain,verify"]


#: What programs may rely on: the keys of each JSON document, and of the rows in its lists.
SCHEMAS: dict[str, dict[str, Any]] = {
    "ls state_dir": {"directory": str, "checkpoints": ["modified", "name", "nbytes", "prefix", "state", "step"]},
    "latest state_dir": {"prefix": str},
    "show conv_tf2": {
        "prefix": str,
        "tensors": ["dtype", "elements", "name", "nbytes", "shape", "shards", "slices"],
        "totals": {"tensors": int, "elements": int, "nbytes": int, "shards": int},
    },
    "show conv_tf2 --stats": {
        "prefix": str,
        "tensors": ["dtype", "elements", "max", "mean", "min", "name", "nan", "nbytes", "shape", "shards", "slices"],
        "totals": {"tensors": int, "elements": int, "nbytes": int, "shards": int},
    },
    "get conv_tf2 global_step": {"name": str, "dtype": str, "shape": list, "value": int},
    "verify conv_tf2": {"checkpoints": ["prefix", "problems"]},
    "diff state_dir/model.ckpt-40 state_dir": {
        "first": str,
        "second": str,
        "tensors": ["change", "differing", "first", "max_abs", "max_rel", "name", "second"],
        "counts": {"added": int, "removed": int, "changed": int, "equal": int},
    },
    "convert conv_tf2 a.npz": {"destination": str, "tensors": int, "nbytes": int, "left_out": list},
    "rename conv_tf2 b -e conv c": {"destination": str, "names": ["new", "old"], "linked": int, "copied": int},
    "prune state_dir --keep 1 --dry-run": {
        "directory": str,
        "checkpoints": ["action", "modified", "name", "nbytes", "prefix", "reason", "step"],
        "freed": int,
        "dry_run": bool,
    },
    "doctor .": {"checks": ["found", "verdict", "what"]},
    "bench . --size 1MB": {"nbytes": int, "rows": ["ceiling", "rate", "seconds", "share", "what"]},
    "trace . --size 1MB": {"seconds": float, "stages": ["nbytes", "rate", "seconds", "share", "stage"], "picture": str},
}


def schema_of(document: Any, expected: Any) -> Any:
    if isinstance(expected, dict):
        return {key: schema_of(value, expected.get(key)) for key, value in document.items()}
    if isinstance(expected, list):
        assert document
        keys = {tuple(sorted(row)) for row in document}
        return list(keys.pop()) if len(keys) == 1 else keys
    return type(document)


@pytest.mark.parametrize("line", SCHEMAS)
def test_json(line: str, golden: Path, cli: Command) -> None:
    code, out, _ = cli(*line.split(), "--json")
    assert code in (0, 1)
    assert schema_of(json.loads(out), SCHEMAS[line]) == SCHEMAS[line]
    assert out.isascii()


def test_every_command_that_prints_a_table_has_json() -> None:
    def options(name: str) -> Sequence[click.Parameter]:
        return command.commands[name].params

    assert {line.split()[0] for line in SCHEMAS} | {"rewrite"} == set(command.commands)
    assert all(any("--json" in option.opts for option in options(name)) for name in command.commands)
