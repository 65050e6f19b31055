"""What the functions on state files read, write, find, delete and wait for: sections 6 and 8 of saver-behaviour.md."""

from __future__ import annotations

from pathlib import PurePosixPath

from tables.scenario import (
    Raises,
    Row,
    at,
    delete,
    exists,
    fake,
    generate,
    iterate,
    later,
    latest,
    mkdir,
    move,
    mtimes,
    on_disk,
    remove,
    row,
    save,
    saver,
    saves,
    state,
    state_times,
    text,
    touch,
    update,
    v1_file,
    wait,
    write,
)

LITERAL = "paths are literal, never globs"
INSIDE = "a state file does not lead out of its directory"
MOVED = "an entry from elsewhere is looked for by its base name, so a directory can be moved"


def newest(path: str) -> str:
    return f'model_checkpoint_path: "{path}"\n'


READING: list[Row] = [
    row(6, "no state file", state("d").gives(None), latest("d").gives(None)),
    *(
        row(
            6,
            f"paths joined to {directory!r}",
            write(
                "d/checkpoint", newest("k-2") + 'all_model_checkpoint_paths: "k-1"\nall_model_checkpoint_paths: "k-2"'
            ),
            write("checkpoint", newest("k-2")),
            state(directory).gives((f"{joined}k-2", listed)),
        )
        for directory, joined, listed in (
            ("d", "d/", ["d/k-1", "d/k-2"]),
            ("./d", "./d/", ["./d/k-1", "./d/k-2"]),
            ("d/", "d/", ["d/k-1", "d/k-2"]),
            ("{cwd}/d", "{cwd}/d/", ["{cwd}/d/k-1", "{cwd}/d/k-2"]),
            (PurePosixPath("d"), "d/", ["d/k-1", "d/k-2"]),
            (".", "./", []),
            ("", "", []),
        )
    ),
    row(6, "directory None", state(None).gives(Raises("TypeError")), latest(None).gives(Raises("TypeError"))),
    row(
        6,
        "directory in bytes",
        write("d/checkpoint", newest("k")),
        state(b"d").differs(
            tensorflow=Raises("TypeError"), gpusaver=("d/k", []), why="str, bytes or PathLike everywhere"
        ),
    ),
    row(
        6,
        "latest_filename",
        write("d/other", newest("k")),
        state("d", "other").gives(("d/k", [])),
        state("d").gives(None),
    ),
    row(6, "state file is a directory", mkdir("d/checkpoint"), state("d").gives(None), latest("d").gives(None)),
    *(
        row(6, f"not parsable: {name}", write("d/checkpoint", content), state("d").gives(None), latest("d").gives(None))
        for name, content in (
            ("no fields", "garbage"),
            ("unknown field", newest("k") + "surprise: 1"),
            ("wrong type", "model_checkpoint_path: 1"),
            ("no closing quote", 'model_checkpoint_path: "k'),
            ("byte order mark", "\ufeff" + newest("k")),
            ("escape that is no UTF-8", newest("\\377")),
            ("binary message", b"\x0a\x01k\x12\x01k"),
        )
    ),
    row(
        6,
        "bytes that are no UTF-8",
        write("d/checkpoint", b'model_checkpoint_path: "\xff"'),
        state("d").differs(
            tensorflow=Raises("UnicodeDecodeError"), gpusaver=None, why="unreadable like any other damaged state file"
        ),
    ),
    *(
        row(
            6,
            f"no newest checkpoint: {name}",
            write("d/checkpoint", content),
            state("d").gives(Raises("ValueError", "(?i)invalid checkpoint state")),
            latest("d").gives(Raises("ValueError", "(?i)invalid checkpoint state")),
        )
        for name, content in (
            ("empty file", ""),
            ("comment", "# nothing"),
            ("only the list", 'all_model_checkpoint_paths: "k"'),
            ("empty name", newest("")),
        )
    ),
    *(
        row(6, f"text format: {name}", write("d/checkpoint", content), state("d").gives(expected))
        for name, content, expected in (
            ("single quotes", "model_checkpoint_path: 'k'", ("d/k", [])),
            ("last of two", newest("k-1") + newest("k-2"), ("d/k-2", [])),
            (
                "comments and one line",
                '# a\nmodel_checkpoint_path:"k" all_model_checkpoint_paths:"k" # b',
                ("d/k", ["d/k"]),
            ),
            ("list", 'model_checkpoint_path: "k", all_model_checkpoint_paths: ["j", "k"];', ("d/k", ["d/j", "d/k"])),
            ("literals side by side", 'model_checkpoint_path: "k-" \'1\'\n"0"', ("d/k-10", [])),
            ("escapes", newest("a\\x62\\143\\\"\\'\\\\\\n\\t"), ("d/abc\"'\\\n\t", [])),
            ("octal UTF-8, as of TensorFlow 1.15", newest("\\303\\251"), ("d/é", [])),
            ("raw UTF-8, as of TensorFlow 2.21", newest("é"), ("d/é", [])),
            ("carriage returns", 'model_checkpoint_path: "k"\r\n', ("d/k", [])),
        )
    ),
    row(
        6,
        "timestamps",
        write(
            "d/checkpoint",
            newest("k-2") + 'all_model_checkpoint_paths: ["k-1", "k-2"]\n'
            "all_model_checkpoint_timestamps: [1.5, 3]\nlast_preserved_timestamp: 0.5",
        ),
        state_times("d").gives(([1.5, 3.0], 0.5)),
    ),
    row(
        6,
        "a reader's result is its own",
        saver(),
        save("d/k", 1),
        state("d").gives(("d/k-1", ["d/k-1"])),
        state("d").gives(("d/k-1", ["d/k-1"])),
    ),
]

FINDING: list[Row] = [
    row(6, "latest", saver(), saves("d/k", [1, 2]), latest("d").gives("d/k-2"), latest("./d").gives("./d/k-2")),
    row(
        6, "latest in the current directory", saver(), save("k", 1), latest("").gives("k-1"), latest(".").gives("./k-1")
    ),
    row(6, "latest of a PathLike", saver(), save("d/k", 1), latest(PurePosixPath("d")).gives("d/k-1")),
    row(
        6,
        "latest trusts the state file alone",
        fake("d/k-1", "d/k-2"),
        write("d/checkpoint", newest("k-1")),
        latest("d").gives("d/k-1"),
    ),
    row(
        6,
        "no older one in the place of the latest",
        saver(),
        saves("d/k", [1, 2]),
        delete("d/k-2.index"),
        latest("d").gives(None),
        state("d").gives(("d/k-2", ["d/k-1", "d/k-2"])),
    ),
    row(
        6,
        "latest is a directory",
        mkdir("d/k"),
        write("d/checkpoint", newest("k")),
        latest("d").differs(tensorflow="d/k", gpusaver=None, why="a directory is no checkpoint"),
    ),
    row(6, "latest is of format V1", v1_file("d/k"), write("d/checkpoint", newest("k")), latest("d").gives("d/k")),
    row(
        6,
        "latest is a V1 checkpoint of several shards",
        v1_file("d/k-00000-of-00002"),
        v1_file("d/k-00001-of-00002"),
        write("d/checkpoint", newest("k-?????-of-00002")),
        latest("d").gives("d/k-?????-of-00002"),
    ),
    row(
        6,
        "brackets in the directory",
        fake("[d]/k"),
        write("[d]/checkpoint", newest("k")),
        latest("[d]").differs(tensorflow=None, gpusaver="[d]/k", why=LITERAL),
    ),
    row(
        6,
        "glob in the state file",
        fake("d/k"),
        write("d/checkpoint", newest("*")),
        latest("d").differs(tensorflow="d/*", gpusaver=None, why=LITERAL),
    ),
    row(
        6,
        "moved directory, relative paths",
        saver(save_relative_paths=True),
        save("{cwd}/d/k", 1),
        move("d", "e"),
        latest("e").gives("e/k-1"),
    ),
    row(
        6,
        "moved directory, absolute paths",
        saver(save_relative_paths=False),
        save("{cwd}/d/k", 1),
        save("{cwd}/d/k", 2),
        move("d", "e"),
        latest("e").differs(tensorflow=None, gpusaver="e/k-2", why=MOVED),
        state("e").differs(
            tensorflow=("{cwd}/d/k-2", ["{cwd}/d/k-1", "{cwd}/d/k-2"]),
            gpusaver=("e/k-2", ["e/k-1", "e/k-2"]),
            why=MOVED,
        ),
    ),
    row(
        6,
        "absolute path inside the directory",
        write("d/checkpoint", newest("{cwd}/d/k")),
        state("d").gives(("{cwd}/d/k", [])),
    ),
    row(
        6,
        "absolute path of another machine",
        write(
            "d/checkpoint", newest("/data/run/k-2") + 'all_model_checkpoint_paths: ["/data/run/k-1", "/data/run/k-2"]'
        ),
        fake("d/k-2"),
        state("d").differs(
            tensorflow=("/data/run/k-2", ["/data/run/k-1", "/data/run/k-2"]), gpusaver=("d/k-2", ["d/k-2"]), why=MOVED
        ),
    ),
    row(
        6,
        "path of another machine with Windows",
        write("d/checkpoint", newest("C:\\\\run\\\\k-2")),
        fake("d/k-2"),
        latest("d").differs(tensorflow=None, gpusaver="d/k-2", why=MOVED),
    ),
    row(
        6,
        "path that leads out of the directory",
        fake("other/k"),
        write("d/checkpoint", newest("../other/k") + 'all_model_checkpoint_paths: ["../other/k", "j"]'),
        latest("d").differs(tensorflow="d/../other/k", gpusaver=None, why=INSIDE),
        state("d").differs(tensorflow=("d/../other/k", ["d/../other/k", "d/j"]), gpusaver=("", ["d/j"]), why=INSIDE),
    ),
    row(
        6,
        "path in a folder of the directory",
        fake("d/sub/k"),
        write("d/checkpoint", newest("sub/k")),
        latest("d").gives("d/sub/k"),
    ),
]

WRITING: list[Row] = [
    *(
        row(6, f"generate: {name}", generate(*args).gives(expected))
        for name, args, expected in (
            ("one", ("d", "d/k-2"), ("k-2", ["k-2"])),
            ("appended", ("d", "d/k-2", ["d/k-1"]), ("k-2", ["k-1", "k-2"])),
            ("appended although listed", ("d", "d/k-2", ["d/k-2", "d/k-1"]), ("k-2", ["k-2", "k-1", "k-2"])),
            ("absolute", ("/a/d", "/a/d/k-2", ["/a/d/k-1"]), ("/a/d/k-2", ["/a/d/k-1", "/a/d/k-2"])),
            ("absolute path, relative directory", ("d", "/a/d/k"), ("/a/d/k", ["/a/d/k"])),
            ("current directory", (".", "./k"), ("k", ["k"])),
            ("no directory", ("", "k"), ("k", ["k"])),
            ("beside", ("d", "e/k"), ("../e/k", ["../e/k"])),
            ("above", ("d/e", "d/k"), ("../k", ["../k"])),
            ("too few timestamps", ("d", "d/k", ["d/j", "d/k"], [1.0]), Raises("ValueError", "timestamp")),
            ("no path", ("d", None), Raises("TypeError")),
            ("no directory at all", (None, "k"), Raises("TypeError")),
        )
    ),
    row(
        6,
        "generate: tuple",
        generate("d", "d/k", ("d/k",)).differs(
            tensorflow=Raises("TypeError"), gpusaver=("k", ["k"]), why="the list is copied, so any iterable serves"
        ),
    ),
    row(
        6,
        "update",
        mkdir("d"),
        update("d", "d/k-2", ["d/k-1", "d/k-2"]).gives(None),
        text("d/checkpoint").gives(
            newest("k-2") + 'all_model_checkpoint_paths: "k-1"\nall_model_checkpoint_paths: "k-2"\n'
        ),
        update("d", "d/k-3", latest_filename="other"),
        on_disk("d").gives(["checkpoint", "other"]),
    ),
    row(
        6,
        "update with timestamps",
        mkdir("d"),
        update(
            "d",
            "d/k-2",
            ["d/k-1", "d/k-2"],
            all_model_checkpoint_timestamps=[1.0, 1700000000.1234567],
            last_preserved_timestamp=1e22,
        ),
        text("d/checkpoint").gives(
            newest("k-2") + 'all_model_checkpoint_paths: "k-1"\nall_model_checkpoint_paths: "k-2"\n'
            "all_model_checkpoint_timestamps: 1.0\nall_model_checkpoint_timestamps: 1700000000.1234567\n"
            "last_preserved_timestamp: 1e+22\n"
        ),
    ),
    row(6, "update in a missing directory", update("d", "d/k").gives(Raises("NotFoundError")), on_disk(".").gives([])),
    row(
        6,
        "update over the state file, absolute",
        mkdir("d"),
        update("{cwd}/d", "{cwd}/d/checkpoint").gives(Raises("RuntimeError", "conflicts with")),
        on_disk("d").gives([]),
    ),
    row(
        6,
        "update over the state file, relative",
        mkdir("d"),
        update("d", "d/checkpoint").gives(None),
        on_disk("d").gives(["checkpoint"]),
    ),
]

FILES: list[Row] = [
    row(
        6,
        "exists",
        fake("d/k"),
        mkdir("d/folder"),
        v1_file("d/old"),
        v1_file("d/s-00000-of-00001"),
        exists("d/k").gives(True),
        exists(b"d/k").differs(tensorflow=Raises("TypeError"), gpusaver=True, why="str, bytes or PathLike everywhere"),
        exists("d/none").gives(False),
        exists("").gives(False),
        exists("d/old").gives(True),
        exists("d/s-?????-of-00001").gives(True),
        exists("d/s-?????-of-00002").gives(False),
        exists("d/folder").differs(tensorflow=True, gpusaver=False, why="a directory is no checkpoint"),
        exists("d/k.index").differs(tensorflow=True, gpusaver=False, why="the prefix is d/k"),
        exists("d/k.data-00000-of-00001").differs(tensorflow=True, gpusaver=False, why="the prefix is d/k"),
        exists("d/*").differs(tensorflow=True, gpusaver=False, why=LITERAL),
    ),
    row(
        6,
        "the state file is no checkpoint",
        write("d/checkpoint", newest("k")),
        exists("d/checkpoint").differs(tensorflow=True, gpusaver=False, why="nothing could be restored from it"),
    ),
    row(
        6,
        "mtimes",
        fake("d/a", "d/b"),
        v1_file("d/old"),
        touch("d/a.index", 100),
        touch("d/b.index", 50),
        touch("d/old", 70),
        mtimes(["d/a", "d/none", "d/old", "d/b"]).gives([100.0, 70.0, 50.0]),
        mtimes([]).gives([]),
    ),
    row(
        6,
        "mtimes of a single path",
        fake("d"),
        touch("d.index", 0),
        mtimes("d").differs(
            tensorflow=[0.0], gpusaver=Raises("TypeError"), why="it is a list of characters to TensorFlow"
        ),
    ),
    row(
        6,
        "remove",
        fake("d/k-1", "d/k-11", "d/k-1-1", "d/k"),
        write("d/k-1.data-00001-of-00002", ""),
        write("d/k-1.meta", ""),
        remove("d/k-1").gives(None),
        on_disk("d").gives(["k", "k-1-1", "k-11"]),
        exists("d/k-1.meta").gives(False),
        remove("d/k-1").gives(None),
        remove("nowhere/k").gives(None),
    ),
    row(
        6,
        "remove with another suffix",
        fake("d/k"),
        write("d/k.graph", ""),
        remove("d/k", meta_graph_suffix="graph"),
        on_disk("d").gives([]),
    ),
    row(
        6,
        "remove with a star",
        fake("d/k-1", "d/k-2"),
        remove("d/k*"),
        on_disk("d").differs(tensorflow=[], gpusaver=["k-1", "k-2"], why=LITERAL),
    ),
    row(
        6,
        "remove in brackets",
        fake("[d]/k"),
        remove("[d]/k"),
        on_disk("[d]").differs(tensorflow=["k"], gpusaver=[], why=LITERAL),
    ),
    row(
        6,
        "remove never takes the state file",
        write("d/checkpoint", newest("k")),
        remove("d/checkpoint"),
        on_disk("d").gives(["checkpoint"]),
    ),
]

WAITING: list[Row] = [
    row(8, "there already", fake("d/k"), write("d/checkpoint", newest("k")), wait("d").gives(("d/k", []))),
    row(8, "comes later", later(2.5, "d/k-1"), wait("d").gives(("d/k-1", [1, 1, 1]))),
    row(
        8,
        "another one comes",
        fake("d/k-1"),
        write("d/checkpoint", newest("k-1")),
        later(1, "d/k-2"),
        wait("d", "d/k-1").gives(("d/k-2", [1])),
    ),
    row(8, "compared as text", fake("d/k"), write("d/checkpoint", newest("k")), wait("d", "./d/k").gives(("d/k", []))),
    row(8, "times out", wait("d", timeout=3).gives((None, [1, 1, 1]))),
    row(8, "other sleep", later(2, "d/k"), wait("d", seconds_to_sleep=5, timeout=60).gives(("d/k", [5]))),
    row(8, "timeout below the sleep", later(1, "d/k"), wait("d", seconds_to_sleep=2, timeout=1).gives((None, []))),
    row(8, "timeout of the length of the sleep", later(1, "d/k"), wait("d", timeout=1).gives(("d/k", [1]))),
    row(8, "directory None", wait(None).gives(Raises("TypeError"))),
    row(
        8,
        "iterator",
        at(1),
        later(61, "d/k-1"),
        later(65, "d/k-2"),
        iterate("d", take=2).gives([(61.0, "d/k-1"), (65.0, "d/k-2")]),
    ),
    row(
        8,
        "iterator misses what comes and goes",
        later(1, "d/k-1"),
        later(2, "d/k-2"),
        later(3, "d/k-3"),
        iterate("d", take=2, work=10).gives([(1.0, "d/k-1"), (11.0, "d/k-3")]),
    ),
    row(
        8,
        "iterator with an interval",
        *(later(second, f"d/k-{second}") for second in range(1, 40)),
        iterate("d", min_interval_secs=10, work=4, take=3).gives([(1.0, "d/k-1"), (11.0, "d/k-11"), (21.0, "d/k-21")]),
    ),
    row(8, "iterator times out", later(1, "d/k"), iterate("d", timeout=5, take=9).gives([(1.0, "d/k"), 6.0])),
    row(
        8,
        "iterator asks timeout_fn after each checkpoint and timeout",
        later(1, "d/k"),
        iterate("d", timeout=2, take=9, answers=[False, False, True]).gives(
            [(1.0, "d/k"), "asked", "asked", "asked", 5.0]
        ),
    ),
]

ROWS: list[Row] = [*READING, *FINDING, *WRITING, *FILES, *WAITING]
