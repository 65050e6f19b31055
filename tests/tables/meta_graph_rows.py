"""`.meta` files and SaverDefs.

Sections 2 and 12 of saver-behaviour.md: the rows about meta graphs that need no session.
"""

from __future__ import annotations

from tables.scenario import (
    Raises,
    Row,
    export,
    from_proto,
    import_graph,
    last,
    metas,
    mkdir,
    proto,
    row,
    save,
    saver,
    saver_def,
    write,
)

NOTHING = "without variables there is nothing to make"
NOT_ONE = "what is no meta graph is told, and never taken for an empty one"

WRITING: list[Row] = [
    row(
        2,
        "a .meta goes with each checkpoint",
        saver(max_to_keep=2),
        *(save("d/k", step, write_meta_graph=True) for step in (1, 2, 3)),
        metas("d").gives(["k-2.meta", "k-3.meta"]),
    ),
    row(
        2,
        "write_meta_graph=False",
        saver(max_to_keep=1),
        save("d/k", 1, write_meta_graph=True),
        save("d/k", 2, write_meta_graph=False).gives("d/k-2"),
        metas("d").gives([]),
    ),
    row(
        2,
        "write_state=False",
        saver(max_to_keep=1),
        *(save("d/k", step, write_meta_graph=True, write_state=False) for step in (1, 2)),
        metas("d").gives(["k-1.meta", "k-2.meta"]),
        last().gives([]),
    ),
    row(
        2,
        "another suffix",
        saver(max_to_keep=1),
        *(save("d/k", step, write_meta_graph=True, meta_graph_suffix="graph") for step in (1, 2)),
        metas("d").gives(["k-2.graph"]),
    ),
    row(
        2,
        "a suffix that changes leaves the old file",
        saver(max_to_keep=1),
        save("d/k", 1, write_meta_graph=True),
        save("d/k", 2, write_meta_graph=True, meta_graph_suffix="graph"),
        metas("d").gives(["k-1.meta", "k-2.graph"]),
    ),
    row(
        2,
        "a suffix that is another file's",
        saver(),
        save("d/k", 1, write_meta_graph=True, meta_graph_suffix="index").differs(
            tensorflow="d/k-1",
            gpusaver=Raises("ValueError", "meta_graph_suffix 'index'"),
            why="it would overwrite the index",
        ),
    ),
    row(
        2,
        "the same prefix again",
        saver(),
        *(save("d/k", write_meta_graph=True).gives("d/k") for _ in range(2)),
        metas("d").gives(["k.meta"]),
        import_graph("d/k.meta").gives(["v"]),
    ),
]

SAVER_DEFS: list[Row] = [
    row(
        12,
        "as_saver_def",
        saver(),
        saver_def().gives(("save/Const:0", "save/control_dependency:0", "save/restore_all", 5, 10000.0, False)),
    ),
    row(
        12,
        "as_saver_def of another",
        saver(name="aux", max_to_keep=None, keep_checkpoint_every_n_hours=0.5),
        saver_def().gives(("aux/Const:0", "aux/control_dependency:0", "aux/restore_all", 0, 0.5, False)),
    ),
    row(
        12,
        "as_saver_def, sharded",
        saver(sharded=True),
        saver_def().gives(("save/Const:0", "save/Identity:0", "save/restore_all", 5, 10000.0, True)),
    ),
    row(
        12,
        "as_saver_def without hours",
        saver(keep_checkpoint_every_n_hours=None),
        saver_def().differs(
            tensorflow=("save/Const:0", "save/control_dependency:0", "save/restore_all", 5, 0.0, False),
            gpusaver=("save/Const:0", "save/control_dependency:0", "save/restore_all", 5, 10000.0, False),
            why="None means that none is kept beyond max_to_keep, and 0 would keep all",
            compat="tensorflow",
        ),
    ),
    row(
        12,
        "to_proto",
        saver(name="aux"),
        proto().gives("aux/restore_all"),
        proto("aux").gives("restore_all"),
        proto("other").gives(None),
        proto("au").differs(
            tensorflow="aux/restore_all", gpusaver=None, why="a scope is a name with a slash, not any beginning"
        ),
    ),
    row(12, "from_proto", from_proto(max_to_keep=3, sharded=True).gives((3, True))),
]

READING: list[Row] = [
    row(
        12,
        "exported and imported",
        saver(max_to_keep=2, keep_checkpoint_every_n_hours=3),
        mkdir("d"),
        export("d/x").gives(["trainable_variables", "variables"]),
        import_graph("d/x").gives(["v"]),
        export("d/x", as_text=True, clear_devices=True),
        import_graph("d/x").gives(["v"]),
        import_graph("d/x", clear_devices=True, import_scope="s").gives(["s/v"]),
        saver_def(by="imported").gives((2, 3.0)),
        last(by="imported").gives([]),
    ),
    row(12, "exported collections", saver(), export(None, collection_list=["variables"]).gives(["variables"])),
    row(12, "export into a missing directory", saver(), export("none/x"), import_graph("none/x").gives(["v"])),
    row(
        12,
        "export into a missing tree",
        saver(),
        export("no/ne/x").differs(
            tensorflow=["trainable_variables", "variables"],
            gpusaver=Raises("ValueError", "Parent directory"),
            why="at most one missing directory is made, as by a save",
        ),
    ),
    row(12, "import of a missing file", import_graph("none").gives(Raises("OSError", "does not exist"))),
    row(12, "import of text", write("x", "hello"), import_graph("x").gives(Raises("OSError", "Cannot parse file"))),
    row(
        12,
        "import of an empty file",
        write("x", ""),
        import_graph("x").differs(tensorflow=None, gpusaver=Raises("DataLossError", "empty"), why=NOT_ONE),
    ),
    row(
        12,
        "import of bytes",
        write("x", b"\x88\x88\x88"),
        import_graph("x").differs(
            tensorflow=Raises("UnicodeDecodeError"), gpusaver=Raises("DataLossError", "no text"), why=NOT_ONE
        ),
    ),
    row(
        12,
        "import of a graph without variables",
        write("x", 'graph_def { node { name: "n" op: "NoOp" } }'),
        import_graph("x").differs(
            tensorflow=None, gpusaver=Raises("ValueError", "describes no variables"), why=NOTHING, compat="tensorflow"
        ),
    ),
    row(12, "import of something else", import_graph(3).gives(Raises("TypeError"))),
]

ROWS: list[Row] = [*WRITING, *SAVER_DEFS, *READING]
