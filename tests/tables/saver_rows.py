"""What a Saver calls its checkpoints and writes into the state file.

Sections 2 (save) and 5 (paths in the state file) of saver-behaviour.md: the rows marked core or expected that need no
graph, and the deliberate differences.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from tables.scenario import (
    Raises,
    Row,
    last,
    latest,
    listing,
    mkdir,
    on_disk,
    row,
    save,
    saver,
    state,
    text,
    write,
)

NAMING: list[Row] = [
    row(2, "without step", saver(), save("d/k").gives("d/k"), on_disk("d").gives(["checkpoint", "k"])),
    row(2, "step", saver(), save("d/k", 5).gives("d/k-5"), on_disk("d").gives(["checkpoint", "k-5"])),
    row(2, "step zero", saver(), save("d/k", 0).gives("d/k-0")),
    row(2, "negative step", saver(), save("d/k", -3).gives("d/k--3")),
    row(2, "step beyond 32 bits", saver(), save("d/k", 2**40).gives("d/k-1099511627776")),
    row(2, "bool as step", saver(), save("d/k", True).gives("d/k-1")),
    row(2, "NumPy integer as step", saver(), save("d/k", np.int64(7)).gives("d/k-7")),
    row(2, "float as step", saver(), save("d/k", 7.0).gives(Raises("TypeError"))),
    row(
        2,
        "array as step",
        saver(),
        save("d/k", np.array(7)).differs(
            tensorflow=Raises("TypeError"),
            gpusaver="d/k-7",
            why="without a session it is what a step variable is",
            compat="tensorflow",
        ),
        save("d/k", np.array([7])).gives(Raises("TypeError")),
        save("d/k", np.array(7.0)).gives(Raises("TypeError")),
    ),
    row(
        2,
        "digits as step",
        saver(),
        save("d/k", "7").differs(
            tensorflow=Raises("ValueError"),
            gpusaver=Raises("TypeError", "gpusaver.compat.v1"),
            why="a string there is a call written for sessions: the message says so",
            compat="tensorflow",
        ),
    ),
    row(
        2,
        "padded step",
        saver(pad_step_number=True),
        save("d/k", 7).gives("d/k-00000007"),
        save("d/k", -7).gives("d/k--0000007"),
        save("d/k", 123456789).gives("d/k-123456789"),
        save("d/k").gives("d/k"),
    ),
    row(2, "path in bytes", saver(), save(b"d/k", 3).gives("d/k-3"), last().gives(["d/k-3"])),
    row(
        2,
        "path as PathLike",
        saver(),
        save(PurePosixPath("d/k"), 3).differs(
            tensorflow=Raises("TypeError"), gpusaver="d/k-3", why="pathlib is what people use"
        ),
    ),
    row(2, "path None", saver(), save(None).gives(Raises("TypeError")), on_disk(".").gives([])),
    row(
        2,
        "empty path",
        saver(),
        save("").gives(Raises("ValueError")),
        on_disk(".").differs(tensorflow=[""], gpusaver=[], why="checked before anything is written"),
    ),
    row(
        2,
        "path ending in a slash",
        saver(),
        save("d/").differs(
            tensorflow="d/", gpusaver=Raises("ValueError"), why="hidden files that later saves stumble over"
        ),
    ),
    row(2, "dots and dashes in the name", saver(), save("d/k.v1-2.ckpt", 3).gives("d/k.v1-2.ckpt-3")),
    row(
        2,
        "sharded on one device",
        mkdir("d"),
        saver(sharded=True),
        save("d/k", 1).gives("d/k-1"),
        on_disk("d").gives(["checkpoint", "k-1"]),
    ),
    row(
        2,
        "glob characters in the path",
        saver(max_to_keep=1),
        save("[d]/k*", 1).gives("[d]/k*-1"),
        latest("[d]").differs(tensorflow=None, gpusaver="[d]/k*-1", why="paths are literal, never globs"),
        save("[d]/k*", 2),
        on_disk("[d]").differs(
            tensorflow=["checkpoint", "k*-1", "k*-2"],
            gpusaver=["checkpoint", "k*-2"],
            why="paths are literal, never globs",
        ),
    ),
    row(
        2,
        "glob characters never reach other checkpoints",
        saver(max_to_keep=1),
        save("d/ab", 1),
        saver("stars", max_to_keep=1),
        save("d/a*", 1, by="stars"),
        save("d/c", 1, by="stars"),
        on_disk("d").differs(
            tensorflow=["c-1", "checkpoint"],
            gpusaver=["ab-1", "c-1", "checkpoint"],
            why="paths are literal, never globs",
        ),
    ),
]

DIRECTORIES: list[Row] = [
    row(2, "one missing level is created", mkdir("x"), saver(), save("x/y/k").gives("x/y/k")),
    row(
        2,
        "two missing levels are not",
        saver(),
        save("x/y/k", 1).gives(Raises("ValueError", "Parent directory of x/y/k(-1)? doesn't exist, can't save")),
        on_disk(".").gives([]),
        last().gives([]),
    ),
    row(
        2,
        "parent is a file",
        write("f", "text"),
        saver(),
        save("f/k").gives(Raises("ValueError", "Parent directory of f/k doesn't exist, can't save")),
        on_disk(".").gives(["f"]),
    ),
    row(
        2,
        "missing directory when sharded",
        saver(sharded=True),
        save("d/k", 1).differs(
            tensorflow=Raises("ValueError", "Parent directory"), gpusaver="d/k-1", why="one rule for both"
        ),
    ),
    row(
        2,
        "a failed save changes nothing",
        saver(),
        save("d/k", 1),
        save("x/y/k", 2).gives(Raises("ValueError")),
        last().gives(["d/k-1"]),
        text("d/checkpoint").gives(listing("k-1", "k-1")),
        on_disk("d").gives(["checkpoint", "k-1"]),
    ),
]

STATE_FILE: list[Row] = [
    row(
        2,
        "latest_filename",
        saver(),
        save("d/k", 1, latest_filename="newest"),
        on_disk("d").gives(["k-1", "newest"]),
        latest("d").gives(None),
        latest("d", "newest").gives("d/k-1"),
    ),
    row(
        2,
        "latest_filename with a directory",
        saver(),
        save("d/k", 1, latest_filename="x/newest").gives(
            Raises("ValueError", "'latest_filename' must not contain path components")
        ),
        on_disk(".").gives([]),
    ),
    row(
        2,
        "collision of path and state file",
        saver(),
        save("d/checkpoint").gives(Raises("ValueError", "'latest_filename' collides with 'save_path'")),
        save("d/k", latest_filename="k").gives(Raises("ValueError", "'latest_filename' collides with 'save_path'")),
        on_disk(".").gives([]),
    ),
    row(
        2,
        "no collision with a step",
        saver(max_to_keep=1),
        save("d/checkpoint", 1).gives("d/checkpoint-1"),
        save("d/checkpoint", 2),
        on_disk("d").gives(["checkpoint", "checkpoint-2"]),
        latest("d").gives("d/checkpoint-2"),
    ),
    row(
        2,
        "no collision when sharded",
        mkdir("d"),
        saver(sharded=True, max_to_keep=1),
        save("d/checkpoint").gives("d/checkpoint"),
        save("d/k"),
        on_disk("d").gives(["checkpoint", "k"]),
        text("d/checkpoint").gives(listing("k", "k")),
    ),
    row(
        2,
        "write_state=False",
        saver(max_to_keep=1),
        save("d/k", 1),
        save("d/k", 2, write_state=False).gives("d/k-2"),
        last().gives(["d/k-1"]),
        text("d/checkpoint").gives(listing("k-1", "k-1")),
        on_disk("d").gives(["checkpoint", "k-1", "k-2"]),
        save("d/k", 3),
        on_disk("d").gives(["checkpoint", "k-2", "k-3"]),
    ),
    row(
        2,
        "write_state=False alone",
        saver(),
        save("d/k", 2, write_state=False),
        on_disk("d").gives(["k-2"]),
    ),
    row(
        2,
        "same path again",
        saver(max_to_keep=2),
        save("d/k"),
        save("d/k"),
        last().gives(["d/k"]),
        on_disk("d").gives(["checkpoint", "k"]),
        text("d/checkpoint").gives(listing("k", "k")),
    ),
    row(
        2,
        "same path moves to the end of the list",
        saver(max_to_keep=2),
        save("d/k", 1),
        save("d/k", 2),
        save("d/k", 1),
        last().gives(["d/k-2", "d/k-1"]),
        save("d/k", 3),
        on_disk("d").gives(["checkpoint", "k-1", "k-3"]),
        text("d/checkpoint").gives(listing("k-3", "k-1", "k-3")),
    ),
    row(
        2,
        "same file spelt differently",
        saver(max_to_keep=1),
        save("d/k"),
        save("./d/k"),
        on_disk("d").differs(
            tensorflow=["checkpoint"], gpusaver=["checkpoint", "k"], why="TensorFlow deletes what it has just saved"
        ),
        latest("d").differs(tensorflow=None, gpusaver="d/k", why="the same"),
    ),
    row(
        5,
        "absolute path",
        saver(save_relative_paths=False),
        save("{cwd}/d/k", 1).gives("{cwd}/d/k-1"),
        text("d/checkpoint").gives(listing("{cwd}/d/k-1", "{cwd}/d/k-1")),
        last().gives(["{cwd}/d/k-1"]),
    ),
    row(
        5,
        "absolute path, save_relative_paths",
        saver(save_relative_paths=True),
        save("{cwd}/d/k", 1).gives("{cwd}/d/k-1"),
        text("d/checkpoint").gives(listing("k-1", "k-1")),
        last().gives(["{cwd}/d/k-1"]),
        state("d").gives(("d/k-1", ["d/k-1"])),
    ),
    row(
        5,
        "absolute path, default",
        saver(),
        save("{cwd}/d/k", 1),
        text("d/checkpoint").differs(
            tensorflow=listing("{cwd}/d/k-1", "{cwd}/d/k-1"),
            gpusaver=listing("k-1", "k-1"),
            why="save_relative_paths=True: a directory can be moved",
            compat="tensorflow",
        ),
    ),
    *(
        row(
            5,
            f"{path}, save_relative_paths={relative}",
            saver(save_relative_paths=relative),
            save(path, 1).gives(f"{path}-1"),
            text(file).gives(listing(written, written)),
            last().gives([f"{path}-1"]),
        )
        for relative in (False, True)
        for path, file, written in (
            ("d/k", "d/checkpoint", "k-1"),
            ("k", "checkpoint", "k-1"),
            ("./k2", "checkpoint", "k2-1"),
        )
    ),
    row(
        5,
        "absolute after relative",
        saver(save_relative_paths=True),
        save("d/k", 1),
        save("{cwd}/d/k", 2),
        text("d/checkpoint").differs(
            tensorflow=listing("k-2", "d/k-1", "k-2"),
            gpusaver=listing("k-2", "k-1", "k-2"),
            why="TensorFlow's path would be looked for in d/d",
        ),
    ),
    row(
        5,
        "quotes, backslashes and non-ASCII in the name",
        saver(),
        save("d/a\"b'c\\é漢\t\n\x7f", 1),
        text("d/checkpoint").gives(listing("a\\\"b\\'c\\\\é漢\\t\\n\\177-1", "a\\\"b\\'c\\\\é漢\\t\\n\\177-1")),
        state("d").gives(("d/a\"b'c\\é漢\t\n\x7f-1", ["d/a\"b'c\\é漢\t\n\x7f-1"])),
    ),
]

ROWS: list[Row] = [*NAMING, *DIRECTORIES, *STATE_FILE]
