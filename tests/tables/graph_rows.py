"""Rows of behaviour that need a graph and a session: run on ``gpusaver.compat.v1`` and on ``tensorflow.compat.v1``.

A row is a function of the module ``tf``, run in an empty current directory with a default graph of its own; what it
returns or raises is compared.  Sections are those of saver-behaviour.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables.scenario import Raises

Play = Callable[[Any], Any]


@dataclass(frozen=True)
class GraphRow:
    section: int
    title: str
    play: Play
    tensorflow: Any
    gpusaver: Any
    why: str

    def __str__(self) -> str:
        return f"{self.section}-{self.title}"

    def check(self, tf: Any, expected: Any) -> None:
        found = self._outcome(tf)
        if isinstance(expected, Raises):
            assert isinstance(found, Exception), f"expected {expected!r}, found {found!r}"
            assert expected.fits(found), f"expected {expected!r}, raised {found!r}"
        elif isinstance(found, Exception):
            raise AssertionError(f"expected {expected!r}, raised {found!r}") from found
        else:
            assert found == expected

    def _outcome(self, tf: Any) -> Any:
        try:
            return self.play(tf)
        except Exception as error:
            return error


GRAPH_ROWS: list[GraphRow] = []
_SAME = object()


def graph_row(
    section: int, title: str, expected: Any, *, gpusaver: Any = _SAME, why: str = ""
) -> Callable[[Play], Play]:
    """``expected`` of both; with ``gpusaver`` a deliberate difference, and ``why`` the reason for it."""

    def add(play: Play) -> Play:
        GRAPH_ROWS.append(GraphRow(section, title, play, expected, expected if gpusaver is _SAME else gpusaver, why))
        return play

    return add


def session_of(tf: Any) -> Any:
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    return session


def two(tf: Any) -> tuple[Any, Any]:
    return tf.get_variable("a", initializer=[1.0, 2.0]), tf.get_variable("b", initializer=tf.constant(3, tf.int32))


def stored(tf: Any, prefix: str) -> dict[str, Any]:
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name).tolist() for name in sorted(reader.get_variable_to_shape_map())}


def saved(tf: Any, saver: Any, prefix: str = "k") -> dict[str, Any]:
    with session_of(tf) as session:
        saver.save(session, os.path.abspath(prefix), write_meta_graph=False)
    return stored(tf, os.path.abspath(prefix))


# 1. constructor


@graph_row(1, "all global variables by default", {"a": [1.0, 2.0], "b": 3})
def _(tf: Any) -> Any:
    two(tf)
    tf.Variable(0.5, collections=[tf.GraphKeys.LOCAL_VARIABLES], name="local")
    tf.Variable(0.5, collections=[], name="loose")
    return saved(tf, tf.train.Saver())


@graph_row(1, "not trainable ones too", {"a": [1.0, 2.0], "b": 3, "n": 7})
def _(tf: Any) -> Any:
    two(tf)
    tf.Variable(7, trainable=False, name="n")
    return saved(tf, tf.train.Saver())


@graph_row(1, "a list takes the names of the variables", {"b": 3})
def _(tf: Any) -> Any:
    return saved(tf, tf.train.Saver([two(tf)[1]]))


@graph_row(1, "a dict gives names", {"x/y": [1.0, 2.0], "z": 3})
def _(tf: Any) -> Any:
    a, b = two(tf)
    return saved(tf, tf.train.Saver({"z": b, "x/y": a}))


@graph_row(1, "tuple and set", [{"a": [1.0, 2.0], "b": 3}, {"a": [1.0, 2.0], "b": 3}])
def _(tf: Any) -> Any:
    both = two(tf)
    return [saved(tf, tf.train.Saver(both), "t"), saved(tf, tf.train.Saver(set(both)), "s")]


@graph_row(1, "nested list", {"a": [1.0, 2.0], "b": 3})
def _(tf: Any) -> Any:
    a, b = two(tf)
    return saved(tf, tf.train.Saver([[a], [b]]))


@graph_row(1, "a bare variable", Raises("TypeError"))
def _(tf: Any) -> Any:
    tf.train.Saver(two(tf)[0])


@graph_row(1, "a string", Raises("TypeError", "should be passed in a dict or a list"))
def _(tf: Any) -> Any:
    two(tf)
    tf.train.Saver("a")


@graph_row(
    1,
    "a list of something else",
    Raises("AttributeError"),
    gpusaver=Raises("TypeError", "not a Variable"),
    why="says what is wrong",
)
def _(tf: Any) -> Any:
    tf.train.Saver([1])


@graph_row(1, "a dict of something else", Raises("TypeError", "(?i)not a Variable"))
def _(tf: Any) -> Any:
    tf.train.Saver({"a": 1})


@graph_row(1, "keys that are no strings", Raises("TypeError", "Name is not a string|Names to save must be strings"))
def _(tf: Any) -> Any:
    tf.train.Saver({1: two(tf)[0]})


@graph_row(1, "one variable twice in a list", Raises("ValueError", "At least two variables have the same name: a"))
def _(tf: Any) -> Any:
    a, _b = two(tf)
    tf.train.Saver([a, a])


@graph_row(1, "one variable under two keys", Raises("ValueError", "same saveable will be restored with two names: y"))
def _(tf: Any) -> Any:
    a, _b = two(tf)
    tf.train.Saver({"x": a, "y": a})


@graph_row(1, "an empty list", Raises("ValueError", "No variables to save"))
def _(tf: Any) -> Any:
    two(tf)
    tf.train.Saver([])


@graph_row(1, "an empty graph", Raises("ValueError", "No variables to save"))
def _(tf: Any) -> Any:
    tf.train.Saver()


@graph_row(1, "allow_empty", [None, None, [], None])
def _(tf: Any) -> Any:
    saver = tf.train.Saver(allow_empty=True)
    with tf.Session() as session:
        return [
            saver.save(session, os.path.abspath("k"), write_meta_graph=False),
            saver.restore(session, "nowhere"),
            saver.last_checkpoints,
            saver.saver_def,
        ]


@graph_row(1, "var_list and defer_build", Raises("ValueError", "build cannot be deferred"))
def _(tf: Any) -> Any:
    tf.train.Saver(list(two(tf)), defer_build=True)


@graph_row(1, "save before build", Raises("RuntimeError", "should be called before save"))
def _(tf: Any) -> Any:
    two(tf)
    saver = tf.train.Saver(defer_build=True)
    assert saver.saver_def is None
    with session_of(tf) as session:
        saver.save(session, os.path.abspath("k"))


@graph_row(1, "build takes what is there by then", {"a": [1.0, 2.0], "b": 3})
def _(tf: Any) -> Any:
    saver = tf.train.Saver(defer_build=True)
    two(tf)
    saver.build()
    return saved(tf, saver)


@graph_row(1, "saver_def of another kind", Raises("ValueError"))
def _(tf: Any) -> Any:
    two(tf)
    tf.train.Saver(saver_def="save")


@graph_row(1, "saver_def without names", Raises("ValueError", "save_tensor_name"))
def _(tf: Any) -> Any:
    two(tf)
    tf.train.Saver(saver_def=tf.train.SaverDef(filename_tensor_name="f"))


@graph_row(1, "saver_def of another Saver", {"a": [1.0, 2.0], "b": 3})
def _(tf: Any) -> Any:
    two(tf)
    return saved(tf, tf.train.Saver(saver_def=tf.train.Saver().as_saver_def()))


@graph_row(
    1,
    "what the SaverDef says",
    ["save/Const:0", "save/control_dependency:0", "save/restore_all", 5, False, 10000.0, 2],
)
def _(tf: Any) -> Any:
    two(tf)
    found = tf.train.Saver().as_saver_def()
    names = [found.filename_tensor_name, found.save_tensor_name, found.restore_op_name]
    return [*names, found.max_to_keep, found.sharded, found.keep_checkpoint_every_n_hours, int(found.version)]


@graph_row(1, "the next Saver has the next scope", ["save/restore_all", "save_1/restore_all", "aux/restore_all"])
def _(tf: Any) -> Any:
    two(tf)
    savers = [tf.train.Saver(), tf.train.Saver(), tf.train.Saver(name="aux")]
    return [saver.saver_def.restore_op_name for saver in savers]


@graph_row(1, "a finalized graph", Raises("RuntimeError", "finalized"))
def _(tf: Any) -> Any:
    two(tf)
    tf.get_default_graph().finalize()
    tf.train.Saver()


def parts(tf: Any) -> Any:
    with tf.variable_scope("scope", partitioner=tf.fixed_size_partitioner(3)):
        return tf.get_variable("p", [5, 2], initializer=tf.ones_initializer())


@graph_row(1, "partitioned in a list", {"scope/p": [[1.0, 1.0]] * 5})
def _(tf: Any) -> Any:
    return saved(tf, tf.train.Saver([parts(tf)]))


@graph_row(1, "the parts in a list", {"scope/p": [[1.0, 1.0]] * 5})
def _(tf: Any) -> Any:
    return saved(tf, tf.train.Saver(list(parts(tf))))


@graph_row(1, "partitioned in a dict", [{"x": [[1.0, 1.0]] * 5}, {"x": [[1.0, 1.0]] * 5}])
def _(tf: Any) -> Any:
    whole = parts(tf)
    return [saved(tf, tf.train.Saver({"x": whole}), "w"), saved(tf, tf.train.Saver({"x": list(whole)}), "l")]


@graph_row(1, "one part in a dict is a tensor of its own", {"x": [[1.0, 1.0], [1.0, 1.0]]})
def _(tf: Any) -> Any:
    return saved(tf, tf.train.Saver({"x": next(iter(parts(tf)))}))


@graph_row(1, "a list of whole variables under one name", Raises("ValueError", "Slices must all be slices"))
def _(tf: Any) -> Any:
    tf.train.Saver({"x": list(two(tf))})


@graph_row(1, "names of partitioned variables", ["scope/p/part_0", "scope/p/part_1", "scope/p/part_2"])
def _(tf: Any) -> Any:
    parts(tf)
    return [variable.op.name for variable in tf.global_variables()]


# 2. save


@graph_row(2, "the session is none", Raises("TypeError", "'sess' must be a Session"))
def _(tf: Any) -> Any:
    two(tf)
    tf.train.Saver().save(None, os.path.abspath("k"))


@graph_row(2, "the session is closed", Raises("RuntimeError", "closed Session"))
def _(tf: Any) -> Any:
    two(tf)
    session = session_of(tf)
    session.close()
    tf.train.Saver().save(session, os.path.abspath("k"))


@graph_row(2, "a variable without a value", Raises("FailedPreconditionError"))
def _(tf: Any) -> Any:
    two(tf)
    with tf.Session() as session:
        tf.train.Saver().save(session, os.path.abspath("k"))


@graph_row(
    2,
    "a variable without a value, and a bare name",
    Raises("ValueError", "Parent directory"),
    gpusaver=Raises("FailedPreconditionError", "uninitialized value a, b"),
    why="the real error, with all names",
)
def _(tf: Any) -> Any:
    two(tf)
    with tf.Session() as session:
        tf.train.Saver().save(session, "k")


@graph_row(2, "a step variable", "k-4")
def _(tf: Any) -> Any:
    step = tf.get_variable("step", initializer=tf.constant(4, tf.int64), trainable=False)
    with session_of(tf) as session:
        return os.path.basename(tf.train.Saver().save(session, os.path.abspath("k"), global_step=step))


@graph_row(2, "a step tensor", "k-6")
def _(tf: Any) -> Any:
    two(tf)
    with session_of(tf) as session:
        found = tf.train.Saver().save(session, os.path.abspath("k"), global_step=tf.constant(2) * 3)
        return os.path.basename(found)


@graph_row(2, "a step as float", Raises("TypeError"))
def _(tf: Any) -> Any:
    two(tf)
    with session_of(tf) as session:
        tf.train.Saver().save(session, os.path.abspath("k"), global_step=1.5)


@graph_row(2, "files", ["checkpoint", "k.data-00000-of-00001", "k.index", "k.meta"])
def _(tf: Any) -> Any:
    two(tf)
    with session_of(tf) as session:
        tf.train.Saver().save(session, os.path.abspath("k"))
    return sorted(os.listdir())


@graph_row(2, "without meta graph and state", ["k.data-00000-of-00001", "k.index"])
def _(tf: Any) -> Any:
    two(tf)
    with session_of(tf) as session:
        saver = tf.train.Saver()
        saver.save(session, os.path.abspath("k"), write_meta_graph=False, write_state=False)
        assert saver.last_checkpoints == []
    return sorted(os.listdir())


@graph_row(2, "meta_graph_suffix, and retention", ["checkpoint", "k-2.data-00000-of-00001", "k-2.graph", "k-2.index"])
def _(tf: Any) -> Any:
    two(tf)
    saver = tf.train.Saver(max_to_keep=1)
    with session_of(tf) as session:
        for step in (1, 2):
            saver.save(session, os.path.abspath("k"), step, meta_graph_suffix="graph")
    return sorted(os.listdir())


@graph_row(2, "all arguments by position", ["k-3.data-00000-of-00001", "k-3.index", "other"])
def _(tf: Any) -> Any:
    two(tf)
    with session_of(tf) as session:
        tf.train.Saver().save(session, os.path.abspath("k"), 3, "other", "meta", False, True)
    return sorted(os.listdir())


# 4. restore


@graph_row(4, "gives None, and needs no initializer", [None, [1.0, 2.0], 3])
def _(tf: Any) -> Any:
    a, b = two(tf)
    saver = tf.train.Saver()
    saved(tf, saver)
    with tf.Session() as session:
        return [saver.restore(session, os.path.abspath("k")), session.run(a).tolist(), int(session.run(b))]


@graph_row(4, "None as path", Raises("ValueError", "Can't load save_path when it is None"))
def _(tf: Any) -> Any:
    two(tf)
    with tf.Session() as session:
        tf.train.Saver().restore(session, None)


@graph_row(4, "no such checkpoint", Raises("ValueError", "not a valid checkpoint"))
def _(tf: Any) -> Any:
    two(tf)
    with tf.Session() as session:
        tf.train.Saver().restore(session, os.path.abspath("nowhere"))


@graph_row(4, "a name is missing", Raises("NotFoundError", "Key zz not found in checkpoint"))
def _(tf: Any) -> Any:
    a, _b = two(tf)
    saved(tf, tf.train.Saver())
    with tf.Session() as session:
        tf.train.Saver({"zz": a}).restore(session, os.path.abspath("k"))


@graph_row(
    4, "another dtype", Raises("InvalidArgumentError", "expected dtype int64 does not equal original dtype float")
)
def _(tf: Any) -> Any:
    two(tf)
    saved(tf, tf.train.Saver())
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("a", [2], tf.int64)
        tf.train.Saver().restore(session, os.path.abspath("k"))


def restored_with_another_shape(tf: Any, is_resource: bool) -> Any:
    two(tf)
    saved(tf, tf.train.Saver())
    with tf.Graph().as_default(), tf.Session() as session:
        other = tf.get_variable("a", [3], use_resource=is_resource)
        tf.train.Saver().restore(session, os.path.abspath("k"))
        return session.run(other).tolist()


@graph_row(4, "another shape, reference variable", Raises("InvalidArgumentError"))
def _(tf: Any) -> Any:
    return restored_with_another_shape(tf, False)


@graph_row(
    4,
    "another shape, resource variable",
    [1.0, 2.0],
    gpusaver=Raises("InvalidArgumentError", r"expected shape \[3\] does not equal stored shape \[2\]"),
    why="a variable of another shape is never meant",
)
def _(tf: Any) -> Any:
    return restored_with_another_shape(tf, True)


@graph_row(4, "reshape", [[1.0], [2.0]])
def _(tf: Any) -> Any:
    two(tf)
    saved(tf, tf.train.Saver())
    with tf.Graph().as_default(), tf.Session() as session:
        other = tf.get_variable("a", [2, 1])
        tf.train.Saver(reshape=True).restore(session, os.path.abspath("k"))
        return session.run(other).tolist()


@graph_row(4, "a variable of unknown shape takes the stored one", [1.0, 2.0])
def _(tf: Any) -> Any:
    two(tf)
    saved(tf, tf.train.Saver())
    with tf.Graph().as_default(), tf.Session() as session:
        other = tf.Variable(tf.placeholder(tf.float32), validate_shape=False, name="a", use_resource=False)
        tf.train.Saver().restore(session, os.path.abspath("k"))
        return session.run(other).tolist()


@graph_row(4, "nothing is assigned when a name is missing", [[5.0, 6.0], "NotFoundError"])
def _(tf: Any) -> Any:
    a, b = two(tf)
    saved(tf, tf.train.Saver([a]))
    with session_of(tf) as session:
        session.run(a.assign([5.0, 6.0]))
        try:
            tf.train.Saver([a, b]).restore(session, os.path.abspath("k"))
        except tf.errors.OpError as error:
            return [session.run(a).tolist(), type(error).__name__]


@graph_row(4, "nothing is assigned when the data is damaged", [[5.0, 6.0], "DataLossError", 15])
def _(tf: Any) -> Any:
    a, b = two(tf)
    saved(tf, tf.train.Saver())
    data = Path("k.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with session_of(tf) as session:
        session.run(a.assign([5.0, 6.0]))
        try:
            tf.train.Saver([a, b]).restore(session, os.path.abspath("k"))
        except tf.errors.OpError as error:
            return [session.run(a).tolist(), type(error).__name__, error.error_code]


@graph_row(4, "other partitions", [[[1.0, 1.0]] * 5, [[1.0, 1.0]] * 5])
def _(tf: Any) -> Any:
    saved(tf, tf.train.Saver([parts(tf)]))
    found = []
    for count in (1, 2):
        with tf.Graph().as_default(), tf.Session() as session:
            with tf.variable_scope("scope", partitioner=tf.fixed_size_partitioner(count, axis=1)):
                whole = tf.get_variable("p", [5, 2])
            tf.train.Saver().restore(session, os.path.abspath("k"))
            found.append(session.run(tf.convert_to_tensor(whole)).tolist())
    return found


@graph_row(4, "partitions of another whole", Raises("InvalidArgumentError"))
def _(tf: Any) -> Any:
    saved(tf, tf.train.Saver([parts(tf)]))
    with tf.Graph().as_default(), tf.Session() as session:
        with tf.variable_scope("scope", partitioner=tf.fixed_size_partitioner(2)):
            tf.get_variable("p", [6, 2])
        tf.train.Saver().restore(session, os.path.abspath("k"))


@graph_row(4, "a session of another graph", Raises("RuntimeError|TypeError"))
def _(tf: Any) -> Any:
    two(tf)
    saver = tf.train.Saver()
    saved(tf, saver)
    with tf.Session(graph=tf.Graph()) as session:
        try:
            saver.restore(session, os.path.abspath("k"))
        except (RuntimeError, TypeError):
            raise type("RuntimeError|TypeError", (Exception,), {})() from None


# 9. init_from_checkpoint


def initialized(tf: Any, build: Callable[[], Any], assignment_map: Any) -> Any:
    """Of a checkpoint with a, b and s/v, in a new graph."""
    two(tf)
    tf.get_variable("s/v", initializer=[7.0])
    saved(tf, tf.train.Saver())
    with tf.Graph().as_default():
        variables = build()
        chosen = assignment_map(variables) if callable(assignment_map) else assignment_map
        tf.train.init_from_checkpoint(os.path.abspath("k"), chosen)
        with session_of(tf) as session:
            return [value.tolist() for value in session.run(variables)]


@graph_row(9, "name to variable", [[1.0, 2.0]])
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("n", [2])], lambda found: {"a": found[0]})


@graph_row(9, "name to name", [[1.0, 2.0]])
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("n", [2])], {"a": "n"})


@graph_row(9, "scope to scope", [[7.0]])
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("other/v", [1])], {"s/": "other/"})


@graph_row(9, "root", [[1.0, 2.0], [7.0]])
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("a", [2]), tf.get_variable("s/v", [1])], {"/": "/"})


@graph_row(9, "no such variable", Raises("ValueError", "should map to scope only"))
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("n", [2])], {"a": "nn"})


@graph_row(9, "no such tensor", Raises("ValueError", "not found in"))
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("n", [2])], {"zz": "n"})


@graph_row(9, "another shape", Raises("ValueError", "Shape of variable"))
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("n", [3])], {"a": "n"})


@graph_row(
    9, "another dtype", Raises("InvalidArgumentError", "expected dtype int32 does not equal original dtype float")
)
def _(tf: Any) -> Any:
    return initialized(tf, lambda: [tf.get_variable("n", [2], tf.int32)], {"a": "n"})


@graph_row(9, "a partitioned variable", [[[1.0, 1.0]] * 5])
def _(tf: Any) -> Any:
    saved(tf, tf.train.Saver([parts(tf)]))
    with tf.Graph().as_default():
        with tf.variable_scope("other", partitioner=tf.fixed_size_partitioner(2)):
            whole = tf.get_variable("q", [5, 2])
        tf.train.init_from_checkpoint(os.path.abspath("k"), {"scope/p": "other/q"})
        with session_of(tf) as session:
            return [session.run(tf.convert_to_tensor(whole)).tolist()]


@graph_row(9, "no such checkpoint", Raises("NotFoundError"))
def _(tf: Any) -> Any:
    tf.get_variable("n", [2])
    tf.train.init_from_checkpoint(os.path.abspath("nowhere"), {"a": "n"})


# 12. meta graphs


def exported(tf: Any) -> str:
    a, b = two(tf)
    tf.add_to_collection("words", "hello")
    tf.add_to_collection("numbers", 3)
    tf.add_to_collection("numbers", 4)
    tf.add_to_collection("rates", 0.5)
    tf.add_to_collection("ends", tf.add(a, 1.0, name="y"))
    tf.add_to_collection("train_op", b.assign_add(1).op)
    saver = tf.train.Saver(max_to_keep=3)
    with session_of(tf) as session:
        return str(saver.save(session, os.path.abspath("k"), 9))


@graph_row(12, "import, restore, run", [[2.0, 3.0], 3, ["a", "b"], 3, []])
def _(tf: Any) -> Any:
    prefix = exported(tf)
    with tf.Graph().as_default(), tf.Session() as session:
        saver = tf.train.import_meta_graph(prefix + ".meta")
        saver.restore(session, prefix)
        names = [variable.op.name for variable in tf.global_variables()]
        b = int(session.run(tf.global_variables()[1]))
        return [session.run("y:0").tolist(), b, names, saver.saver_def.max_to_keep, saver.last_checkpoints]


@graph_row(12, "collections come back", [[3, 4], [0.5], ["y:0"], 2, [b"hello"]])
def _(tf: Any) -> Any:
    prefix = exported(tf)
    with tf.Graph().as_default():
        tf.train.import_meta_graph(prefix + ".meta")
        words = [word if isinstance(word, bytes) else word.encode() for word in tf.get_collection("words")]
        return [
            tf.get_collection("numbers"),
            tf.get_collection("rates"),
            [tensor.name for tensor in tf.get_collection("ends")],
            len(tf.trainable_variables()),
            words,
        ]


@graph_row(12, "import_scope", [[2.0, 3.0], ["in/a", "in/b"], "in/save/restore_all"])
def _(tf: Any) -> Any:
    prefix = exported(tf)
    with tf.Graph().as_default(), tf.Session() as session:
        saver = tf.train.import_meta_graph(prefix + ".meta", import_scope="in")
        saver.restore(session, prefix)
        names = [variable.op.name for variable in tf.global_variables()]
        return [session.run("in/y:0").tolist(), names, saver.saver_def.restore_op_name]


@graph_row(12, "import as text", [2.0, 3.0])
def _(tf: Any) -> Any:
    prefix = exported(tf)
    tf.train.Saver().export_meta_graph(os.path.abspath("text.meta"), as_text=True)
    with tf.Graph().as_default(), tf.Session() as session:
        saver = tf.train.import_meta_graph(os.path.abspath("text.meta"))
        saver.restore(session, prefix)
        return session.run("y:0").tolist()


@graph_row(12, "the message itself", [2.0, 3.0])
def _(tf: Any) -> Any:
    prefix = exported(tf)
    meta_graph = tf.train.export_meta_graph(saver_def=tf.train.Saver().as_saver_def())
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(meta_graph).restore(session, prefix)
        return session.run("y:0").tolist()


@graph_row(12, "without a SaverDef there is a new Saver", ["a", "b"])
def _(tf: Any) -> Any:
    two(tf)
    meta_graph = tf.train.export_meta_graph()
    with tf.Graph().as_default(), tf.Session() as session:
        saver = tf.train.import_meta_graph(meta_graph)
        session.run(tf.global_variables_initializer())
        saver.save(session, os.path.abspath("k"))
        return sorted(stored(tf, os.path.abspath("k")))


@graph_row(12, "without variables there is none", None)
def _(tf: Any) -> Any:
    tf.constant(1.0)
    meta_graph = tf.train.export_meta_graph()
    with tf.Graph().as_default():
        return tf.train.import_meta_graph(meta_graph)


@graph_row(12, "a missing file", Raises("OSError", "does not exist"))
def _(tf: Any) -> Any:
    tf.train.import_meta_graph("nowhere.meta")


@graph_row(
    12,
    "a file that is none",
    Raises("UnicodeDecodeError"),
    gpusaver=Raises("DataLossError", "expected a MetaGraphDef"),
    why="says which file, and what is wrong",
)
def _(tf: Any) -> Any:
    Path("k.meta").write_bytes(bytes(range(256)))
    tf.train.import_meta_graph("k.meta")


@graph_row(12, "collection_list", ["numbers"])
def _(tf: Any) -> Any:
    exported(tf)
    return sorted(tf.train.export_meta_graph(collection_list=["numbers"]).collection_def)


@graph_row(12, "clear_devices", [["/device:CPU:0"], [""]])
def _(tf: Any) -> Any:
    with tf.device("/cpu:0"):
        tf.get_variable("v", [2])
    found = []
    for clear in (False, True):
        nodes = tf.train.export_meta_graph(clear_devices=clear).graph_def.node
        found.append(sorted({node.device for node in nodes if node.name == "v"}))
    return found


@graph_row(12, "clear_extraneous_savers", [{"save", "save_1"}, {"save_1"}])
def _(tf: Any) -> Any:
    two(tf)
    tf.train.Saver()
    second = tf.train.Saver()
    found = []
    for clear in (False, True):
        meta_graph = second.export_meta_graph(clear_extraneous_savers=clear)
        scopes = {node.name.partition("/")[0] for node in meta_graph.graph_def.node}
        found.append({scope for scope in scopes if scope.startswith("save")})
    return found


@graph_row(12, "to_proto with a scope", [None, "restore_all"])
def _(tf: Any) -> Any:
    two(tf)
    saver = tf.train.Saver(name="s")
    return [saver.to_proto(export_scope="other"), saver.to_proto(export_scope="s").restore_op_name]


@graph_row(12, "an input that must be bound", Raises("ValueError", "unbound inputs"))
def _(tf: Any) -> Any:
    x = tf.constant([1.0], name="x")
    with tf.name_scope("part"):
        tf.negative(x, name="y")
    meta_graph = tf.train.export_meta_graph(export_scope="part")
    with tf.Graph().as_default():
        tf.train.import_meta_graph(meta_graph)


@graph_row(12, "and is bound", -3.0)
def _(tf: Any) -> Any:
    x = tf.constant(1.0, name="x")
    with tf.name_scope("part"):
        tf.negative(x, name="y")
    meta_graph = tf.train.export_meta_graph(export_scope="part")
    with tf.Graph().as_default(), tf.Session() as session:
        given = tf.constant(3.0)
        tf.train.import_meta_graph(meta_graph, input_map={"$unbound_inputs_x": given})
        return float(session.run("y:0"))


# 14. and what a session says


@graph_row(14, "fetches", [[1.0, 2.0], {"b": 3, "n": None}, (3, [3])])
def _(tf: Any) -> Any:
    a, b = two(tf)
    with session_of(tf) as session:
        found = session.run([a, {"b": b, "n": tf.no_op()}, (b, [b])])
    return [found[0].tolist(), found[1], found[2]]


@graph_row(14, "a missing feed", Raises("InvalidArgumentError", "must feed a value for placeholder tensor 'x'"))
def _(tf: Any) -> Any:
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    with tf.Session() as session:
        session.run(x + 1.0)


@graph_row(14, "a feed of another shape", Raises("ValueError", r"Cannot feed value of shape \(2,\) for Tensor '?x:0"))
def _(tf: Any) -> Any:
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    with tf.Session() as session:
        session.run(x, {x: [1.0, 2.0]})


@graph_row(14, "a fetch of another graph", Raises("ValueError", "not an element of this graph"))
def _(tf: Any) -> Any:
    with tf.Graph().as_default():
        other = tf.constant(1.0)
    tf.constant(2.0)
    with tf.Session() as session:
        session.run(other)


@graph_row(14, "a fetch of nothing", Raises("TypeError", "invalid type"))
def _(tf: Any) -> Any:
    tf.constant(1.0)
    with tf.Session() as session:
        session.run(None)


@graph_row(14, "an empty graph", Raises("RuntimeError", "The Session graph is empty"))
def _(tf: Any) -> Any:
    with tf.Session() as session:
        session.run([])


@graph_row(14, "an unknown name", Raises("ValueError", "cannot be interpreted as a Tensor"))
def _(tf: Any) -> Any:
    tf.constant(1.0)
    with tf.Session() as session:
        session.run("nothing:0")


@graph_row(14, "a closed session", Raises("RuntimeError", "closed Session"))
def _(tf: Any) -> Any:
    one = tf.constant(1.0)
    session = tf.Session()
    session.close()
    session.run(one)


@graph_row(14, "an uninitialized variable", Raises("FailedPreconditionError", "a"))
def _(tf: Any) -> Any:
    a, _b = two(tf)
    with tf.Session() as session:
        session.run(a)


@graph_row(14, "eval without a session", Raises("ValueError", "No default session"))
def _(tf: Any) -> Any:
    tf.constant(1.0).eval()


@graph_row(14, "shapes that do not fit", Raises("ValueError", "(?i)dimensions must be equal"))
def _(tf: Any) -> Any:
    tf.matmul(tf.zeros([2, 3]), tf.zeros([4, 5]))


@graph_row(14, "types that do not fit", Raises("TypeError|ValueError"))
def _(tf: Any) -> Any:
    try:
        tf.add(tf.constant(1.0), tf.constant(1))
    except (TypeError, ValueError):
        raise type("TypeError|ValueError", (Exception,), {})() from None


@graph_row(14, "get_variable again", Raises("ValueError", "already exists, disallowed"))
def _(tf: Any) -> Any:
    tf.get_variable("v", [2])
    tf.get_variable("v", [2])


@graph_row(14, "reuse", True)
def _(tf: Any) -> Any:
    with tf.variable_scope("s"):
        first = tf.get_variable("v", [2])
    with tf.variable_scope("s", reuse=True):
        second = tf.get_variable("v", [2])
    with tf.variable_scope("s", reuse=tf.AUTO_REUSE):
        third = tf.get_variable("v")
    return first is second is third


@graph_row(14, "reuse of what is not there", Raises("ValueError", "does not exist"))
def _(tf: Any) -> Any:
    with tf.variable_scope("s", reuse=True):
        tf.get_variable("v", [2])


@graph_row(14, "reuse with another shape", Raises("ValueError", "specified shape"))
def _(tf: Any) -> Any:
    tf.get_variable("v", [2])
    with tf.variable_scope("", reuse=True):
        tf.get_variable("v", [3])


@graph_row(
    14,
    "names",
    ["v:0", "v_1:0", "s/v:0", "s/w:0", "s_1/v:0", "s/x:0", "n/v:0", "t/u/v:0"],
)
def _(tf: Any) -> Any:
    names = [tf.Variable(1.0, name="v").name, tf.Variable(1.0, name="v").name]
    with tf.variable_scope("s"):
        names += [tf.Variable(1.0, name="v").name, tf.get_variable("w", [1]).name]
    with tf.variable_scope("s"):
        names += [tf.Variable(1.0, name="v").name, tf.get_variable("x", [1]).name]
    with tf.name_scope("n"):
        names.append(tf.Variable(1.0, name="v").name)
    with tf.variable_scope("t"), tf.variable_scope("u"):
        names.append(tf.get_variable("v", [1]).name)
    return names


@graph_row(14, "names of operations", ["Const:0", "Const_1:0", "a/x:0", "a/x_1:0", "a_1/x:0", "a/y:0", "add:0"])
def _(tf: Any) -> Any:
    names = [tf.constant(1.0).name, tf.constant(1.0).name]
    with tf.name_scope("a") as scope:
        names += [tf.constant(1.0, name="x").name, tf.constant(1.0, name="x").name]
    with tf.name_scope("a"):
        names.append(tf.constant(1.0, name="x").name)
    with tf.name_scope(scope):
        names.append(tf.constant(1.0, name="y").name)
    return [*names, (tf.zeros([1]) + tf.ones([1])).name]


@graph_row(14, "the global step", [0, 1, "global_step:0", "int64"])
def _(tf: Any) -> Any:
    step = tf.train.get_or_create_global_step()
    assert tf.train.get_global_step() is step
    assert tf.train.get_or_create_global_step() is step
    with session_of(tf) as session:
        before = tf.train.global_step(session, step)
        session.run(tf.assign_add(step, 1))
        return [before, tf.train.global_step(session, step), step.name, step.dtype.base_dtype.name]


@graph_row(14, "a control dependency", [1.0, 5.0])
def _(tf: Any) -> Any:
    v = tf.get_variable("v", initializer=1.0)
    change = v.assign(5.0)
    with session_of(tf) as session:
        before = session.run(v)
        with tf.control_dependencies([change]):
            after = v.read_value()
        return [float(before), float(session.run(after))]


@graph_row(14, "load", [9.0, 9.0])
def _(tf: Any) -> Any:
    v = tf.get_variable("v", initializer=1.0)
    with session_of(tf) as session:
        v.load(9.0, session)
        return [float(session.run(v)), float(v.eval(session))]


@graph_row(14, "Adam's variables", ["beta1_power", "beta2_power", "s/w", "s/w/Adam", "s/w/Adam_1", "step"])
def _(tf: Any) -> Any:
    with tf.variable_scope("s"):
        w = tf.get_variable("w", [2])
    step = tf.Variable(0, name="step", trainable=False)
    tf.train.AdamOptimizer().minimize(tf.reduce_sum(w * w), global_step=step)
    assert tf.trainable_variables() == [w]
    return sorted(variable.op.name for variable in tf.global_variables())


@graph_row(14, "no gradient", Raises("ValueError", "No gradients provided for any variable"))
def _(tf: Any) -> Any:
    w = tf.get_variable("w", [2])
    tf.train.GradientDescentOptimizer(0.1).minimize(tf.constant(1.0), var_list=[w])
