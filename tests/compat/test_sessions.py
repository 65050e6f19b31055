"""Graphs, sessions and variables: what neither an op's case nor a row of the tables covers."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver.compat.v1 as tf
from gpusaver.compat.v1 import session as session_module

KINDS = pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])


def started() -> Any:
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    return session


# -- values


@KINDS
def test_what_is_fetched_is_a_copy(is_resource: bool) -> None:
    v = tf.Variable([1.0, 2.0], use_resource=is_resource)
    with started() as session:
        first = session.run(v)
        first[:] = 9
        assert session.run(v).tolist() == [1, 2]


@KINDS
def test_what_is_fed_may_change_afterwards(is_resource: bool) -> None:
    x = tf.placeholder(tf.float32, [2])
    v = tf.Variable([1.0, 2.0], use_resource=is_resource)
    assign = v.assign(x)
    with started() as session:
        fed = np.array([5, 6], np.float32)
        session.run(assign, {x: fed})
        fed[:] = 0
        assert session.run(v).tolist() == [5, 6]


@KINDS
def test_a_read_before_an_assignment_keeps_what_it_read(is_resource: bool) -> None:
    v = tf.Variable([1.0, 2.0], use_resource=is_resource)
    before = tf.identity(v.read_value() * 1.0)
    with tf.control_dependencies([before]):
        after = v.assign_add([10.0, 10.0])
    with started() as session:
        found = session.run([before, after])
        assert [value.tolist() for value in found] == [[1, 2], [11, 12]]


def test_sessions_have_values_of_their_own() -> None:
    v = tf.Variable(1.0)
    with started() as one, started() as other:
        one.run(v.assign(5.0))
        assert (one.run(v), other.run(v)) == (5, 1)


def test_a_closed_session_and_its_graph_hold_no_arrays() -> None:
    v = tf.Variable(np.zeros(1000, np.float32) + tf.ones([1000]))
    session = started()
    array = weakref.ref(session.variables[v.key])
    session.close()
    session.close()
    gc.collect()
    assert array() is None


def test_random_numbers_with_a_seed_are_the_same_in_each_session() -> None:
    drawn = [tf.random_normal([3], seed=4), tf.random_uniform([3], seed=4), tf.truncated_normal([50], seed=4)]
    free = tf.random_normal([3])
    with tf.Session() as one, tf.Session() as other:
        first, second = one.run([*drawn, free]), other.run([*drawn, free])
        for mine, theirs in zip(first[:3], second[:3], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert (first[3] != second[3]).any()
        assert (one.run(drawn[0]) != first[0]).any()  # the next numbers of the stream
        assert np.abs(first[2]).max() <= 2


def test_the_graph_seed_seeds_every_operation() -> None:
    tf.set_random_seed(3)
    a, b = tf.random_normal([4]), tf.random_normal([4])
    with tf.Session() as one, tf.Session() as other:
        first = one.run([a, b])
        np.testing.assert_array_equal(first, other.run([a, b]))
        assert (first[0] != first[1]).any()


def test_strings() -> None:
    v = tf.Variable(["one", "zwölf"])
    x = tf.placeholder(tf.string, [None])
    with started() as session:
        assert session.run(v).tolist() == [b"one", "zwölf".encode()]
        assert session.run(x, {x: ["a", b"\xff"]}).tolist() == [b"a", b"\xff"]
        assert session.run(tf.constant("text")) == b"text"


# -- fetches and feeds


def test_forms_of_fetches() -> None:
    Pair = namedtuple("Pair", "x y")
    a, b = tf.constant(1, name="a"), tf.constant(2.0)
    with tf.Session() as session:
        assert session.run(a) == 1
        assert session.run("a:0") == 1
        assert session.run("a") is None  # the operation
        assert session.run([]) == []
        assert session.run(Pair(a, [b])) == Pair(1, [2.0])
        assert session.run({"k": (a, {"n": b})}) == {"k": (1, {"n": 2.0})}
        assert session.run([a, a]) == [1, 1]


def test_a_feed_replaces_any_tensor() -> None:
    a = tf.constant(1.0)
    b = a + 1.0
    v = tf.Variable(3.0)
    with started() as session:
        assert session.run(b * 2.0, {b: 10.0}) == 20
        assert session.run(b, {a: 5.0}) == 6
        assert session.run([b, b + 1.0], {b: 7.0}) == [7, 8]
        assert session.run(v.value() * 2.0 + b) == 8


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        ("x:0", object(), TypeError, "float"),
        ("nothing:0", 1.0, TypeError, "Cannot interpret feed_dict key"),
        ("x:0", "text", ValueError, "could not convert"),
        ("x:0", [[1.0]], ValueError, "Cannot feed value of shape"),
    ],
)
def test_feeds_that_are_none(key: str, value: Any, error: type[Exception], text: str) -> None:
    tf.placeholder(tf.float32, [2], name="x")
    with tf.Session() as session, pytest.raises(error, match=text):
        session.run("x:0", {key: value})


def test_a_tensor_cannot_be_fed() -> None:
    x = tf.placeholder(tf.float32)
    with tf.Session() as session, pytest.raises(TypeError, match=r"cannot be a tf\.Tensor object"):
        session.run(x, {x: tf.constant(1.0)})


def test_an_error_names_the_node_and_says_what_it_is() -> None:
    a, b = tf.placeholder(tf.float32, [None], name="a"), tf.placeholder(tf.float32, [None], name="b")
    total = tf.add(a, b, name="total")
    with tf.Session() as session, pytest.raises(tf.errors.InvalidArgumentError, match=r"\[\[node total") as caught:
        session.run(total, {a: [1.0, 2.0], b: [1.0, 2.0, 3.0]})
    assert caught.value.op is total.op
    assert caught.value.node_def.name == "total"
    assert caught.value.code == caught.value.error_code == 3
    assert "total" in caught.value.message


def test_default_sessions() -> None:
    v = tf.constant(3.0)
    session = tf.InteractiveSession()
    assert v.eval() == 3
    session.close()
    with tf.Session() as outer:
        with tf.Session().as_default() as inner:
            assert tf.get_default_session() is inner
        assert tf.get_default_session() is outer
        assert v.eval() == 3
    assert inner.run(v) == 3
    assert tf.get_default_session() is None


def test_each_thread_has_its_default_graph() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(tf.get_default_graph()))
    thread.start()
    thread.join(10)
    assert found
    assert found[0] is not tf.get_default_graph()


def test_a_long_chain_needs_no_deep_stack() -> None:
    x = first = tf.Variable(0.0)
    for _ in range(5000):
        x = x + 1.0
    (gradient,) = tf.gradients(x, first)
    with started() as session:
        assert session.run([x, gradient]) == [5000, 1]


def test_values_and_branches() -> None:
    v = tf.Variable(2.0)
    later = tf.Variable(v.initialized_value() * 3.0)
    with tf.Session() as session:
        session.run(later.initializer)  # v has no value yet: the initial one is taken
        assert session.run(later) == 6
        session.run(v.initializer)
        session.run(v.assign(5.0))
        session.run(later.initializer)
        assert session.run(later) == 15


# -- graphs


def test_control_dependencies_reach_into_what_is_made_inside() -> None:
    v = tf.Variable(0.0)
    add = v.assign_add(1.0)
    with tf.control_dependencies([add]):
        inside = tf.constant(1.0) * 2.0
        with tf.control_dependencies(None):
            outside = tf.constant(1.0) * 3.0
    with started() as session:
        session.run(outside)
        assert session.run(v) == 0
        session.run(inside)
        assert session.run(v) == 1


def test_devices_nest() -> None:
    with tf.device("/gpu:1"):
        a = tf.constant(1.0)
        with tf.device("/cpu:0"):
            b = tf.constant(1.0)
        with tf.device(lambda op: "/device:CPU:1" if op.type == "Const" else None):
            c = tf.constant(1.0)
        with tf.device(None):
            d = tf.constant(1.0)
    assert [x.device for x in (a, b, c, d)] == ["/device:GPU:1", "/device:CPU:0", "/device:CPU:1", ""]


def test_lists_with_tensors_are_stacked() -> None:
    x = tf.placeholder(tf.float32, [])
    with tf.Session() as session:
        assert session.run(tf.reshape([x, 1.0, [2.0, x][1]], [3, 1]), {x: 5.0}).tolist() == [[5], [1], [5]]
        assert session.run(tf.zeros([2, tf.shape([x, x])[0]])).shape == (2, 2)


def test_types_of_python_values() -> None:
    assert tf.constant(1).dtype == tf.int32
    assert tf.constant(1.0).dtype == tf.float32
    assert tf.constant(2**40).dtype == tf.int64
    assert tf.constant(np.float64(1)).dtype == tf.float64
    assert tf.constant([True]).dtype == tf.bool
    assert tf.constant("a").dtype == tf.string
    assert tf.constant([1.5, 2], tf.float64).dtype == tf.float64
    with pytest.raises(TypeError, match="Expected int32"):
        tf.constant(1.5, tf.int32)
    with pytest.raises(ValueError, match="None values"):
        tf.constant(None)


def test_a_meta_graph_has_no_values(tmp_path: Path) -> None:
    v = tf.Variable([1.0], name="v")
    saver = tf.train.Saver()
    with started() as session:
        v.load([123456.789], session)
        prefix = saver.save(session, str(tmp_path / "k"))
    assert np.float32(123456.789).tobytes() not in Path(prefix + ".meta").read_bytes()


# -- saving


def test_save_async_keeps_the_values_of_its_moment(tmp_path: Path) -> None:
    v = tf.Variable(np.zeros(100_000, np.float32), name="v")
    add = v.assign_add(np.ones(100_000, np.float32))
    saver = tf.train.Saver(max_to_keep=10)
    with started() as session:
        pending = []
        for step in range(4):
            pending.append(saver.save_async(session, str(tmp_path / "k"), global_step=step))
            session.run(add)
        saver.close()
    for step, save in enumerate(pending):
        prefix = save.result()
        assert (tf.train.load_variable(prefix, "v") == step).all()
        assert Path(prefix + ".meta").exists()


def test_a_failed_restore_leaves_all_values(tmp_path: Path) -> None:
    a = tf.get_variable("a", initializer=np.zeros(50_000, np.float32))
    b = tf.get_variable("b", initializer=np.zeros(50_000, np.float32))
    saver = tf.train.Saver()
    with started() as session:
        prefix = saver.save(session, str(tmp_path / "k"))
        session.run([a.assign(tf.ones([50_000])), b.assign(tf.ones([50_000]))])
        data = tmp_path / "k.data-00000-of-00001"
        content = bytearray(data.read_bytes())
        content[-1] ^= 1  # of b; a could be read
        data.write_bytes(content)
        with pytest.raises(tf.errors.DataLossError):
            saver.restore(session, prefix)
        assert (session.run(a) == 1).all()
        assert (session.run(b) == 1).all()


def test_nodes_of_the_saver_run_by_themselves(tmp_path: Path) -> None:
    """As TensorFlow's own programs in other languages do: by the names in the SaverDef."""
    for sharded in (False, True):
        with tf.Graph().as_default():
            with tf.device("/cpu:0"):
                a = tf.get_variable("a", initializer=[1.0, 2.0])
            with tf.device("/cpu:1"), tf.variable_scope("s", partitioner=tf.fixed_size_partitioner(2)):
                tf.get_variable("p", [4], initializer=tf.ones_initializer())
            names = tf.train.Saver(sharded=sharded).saver_def
            prefix = str(tmp_path / f"k{sharded}")
            (tmp_path / f"k{sharded}_temp").mkdir()
            with started() as session:
                feed = {names.filename_tensor_name: prefix}
                assert session.run(names.save_tensor_name, feed) == prefix.encode()
                session.run(a.assign([0.0, 0.0]))
                session.run(names.restore_op_name, feed)
                assert session.run(a).tolist() == [1, 2]
            assert tf.train.list_variables(prefix) == [("a", [2]), ("s/p", [4])]


def test_sharded_saves_have_a_file_for_each_device(tmp_path: Path) -> None:
    for number in range(3):
        with tf.device(f"/cpu:{number}"):
            tf.get_variable(f"v{number}", [2])
    with started() as session:
        saver = tf.train.Saver(sharded=True)
        prefix = saver.save(session, str(tmp_path / "k"))
        assert len(list(tmp_path.glob("k.data-*-of-00003"))) == 3
        saver.restore(session, prefix)


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_MAX_PLANS", 4)
    with tf.Session() as session:
        for _ in range(10):
            session.run(tf.constant(1.0))
        assert len(session._plans) <= 4


# -- where arrays are


class Elsewhere(np.ndarray):
    """An array that pretends to be on a device: operations with plain arrays of rank 1 and more are refused."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(type(given) is np.ndarray for given in inputs):
            raise TypeError("an array of the host met one of the device")
        plain = [given.view(np.ndarray) if isinstance(given, Elsewhere) else given for given in inputs]
        return there(getattr(ufunc, method)(*plain, **kwargs))


def there(value: Any) -> Any:
    return np.asarray(value).view(Elsewhere)


class Module:
    """NumPy with its arrays elsewhere, as CuPy has them."""

    ndarray = Elsewhere

    def asnumpy(self, value: Any) -> Any:
        return np.array(value).view(np.ndarray)

    def asarray(self, value: Any, dtype: Any = None) -> Any:
        return there(np.array(value, dtype))

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            for given in args:
                assert type(given) is not np.ndarray, f"{name} of the device got an array of the host"
            return there(found(*args, **kwargs))

        return function


def test_sizes_stay_on_the_host_and_values_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session_module, "array_module", Module)
    x = tf.placeholder(tf.float32, [None, 3])
    w = tf.get_variable("w", [3, 2])
    flat = tf.reshape(tf.matmul(x, w), [-1, tf.shape(w)[1]])
    mean = tf.reduce_sum(flat) / tf.cast(tf.size(flat), tf.float32)
    train = tf.train.AdamOptimizer().minimize(mean)
    saver = tf.train.Saver()
    with started() as session:
        feed = {x: np.ones((4, 3), np.float32)}
        before = session.run([flat, mean], feed)
        assert [type(value) for value in before] == [np.ndarray, np.float32]
        session.run(train, feed)
        assert {type(value) for value in session.variables.values()} == {Elsewhere}
        assert session.run(mean, feed) < before[1]
        assert saver is not None
