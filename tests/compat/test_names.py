"""The public names, and the small modules."""

from __future__ import annotations

import logging
import sys

import pytest

import gpusaver
import gpusaver.compat.v1 as tf

#: Section 14 of saver-behaviour.md, core and expected, but for CheckpointManager, which is native alone.
TRAIN = """
Saver latest_checkpoint get_checkpoint_state load_checkpoint load_variable list_variables NewCheckpointReader
update_checkpoint_state checkpoint_exists remove_checkpoint checkpoints_iterator init_from_checkpoint import_meta_graph
export_meta_graph SaverDef CheckpointState generate_checkpoint_state_proto get_checkpoint_mtimes
""".split()


def test_every_public_name_is_there() -> None:
    assert len(set(tf.__all__)) == len(tf.__all__)
    assert all(hasattr(tf, name) for name in tf.__all__)
    assert set(TRAIN) <= set(tf.train.__all__)
    assert all(hasattr(tf.train, name) for name in tf.train.__all__)


def test_errors_are_those_of_the_native_saver() -> None:
    assert tf.errors.NotFoundError is gpusaver.NotFoundError
    assert issubclass(tf.errors.DataLossError, tf.errors.OpError)
    codes = [getattr(tf.errors, name).code for name in tf.errors.__all__ if name != "OpError"]
    assert sorted(codes) == [*range(1, 12), 12, 13, 14, 15, 16]


def test_saver_def_versions() -> None:
    assert (tf.train.SaverDef.LEGACY, tf.train.SaverDef.V1, tf.train.SaverDef.V2) == (0, 1, 2)


def test_app_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "x"])
    for arguments, expected in (({}, ["script", "x"]), ({"argv": ["a"]}, ["a"])):
        with pytest.raises(SystemExit) as caught:
            tf.app.run(lambda argv: argv, **arguments)
        assert caught.value.code == expected


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    before = tf.logging.get_verbosity()
    tf.logging.set_verbosity(tf.logging.INFO)
    with caplog.at_level(logging.INFO):
        tf.logging.info("step %d", 3)
        tf.logging.debug("not this")
    assert [record.getMessage() for record in caplog.records] == ["step 3"]
    tf.logging.set_verbosity(before)


def test_importing_needs_no_cupy_and_no_tensorflow() -> None:
    import subprocess

    script = "import sys, gpusaver.compat.v1; print(sorted({'cupy', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("dtype", "name", "numpy", "kind"),
    [
        (tf.float32, "float32", "float32", "is_floating"),
        (tf.bfloat16, "bfloat16", "bfloat16", "is_floating"),
        (tf.int64, "int64", "int64", "is_integer"),
        (tf.uint8, "uint8", "uint8", "is_integer"),
        (tf.bool, "bool", "bool", "is_bool"),
        (tf.complex64, "complex64", "complex64", "is_complex"),
        (tf.qint8, "qint8", "int8", "is_quantized"),
    ],
)
def test_dtypes(dtype: tf.DType, name: str, numpy: str, kind: str) -> None:
    assert dtype.name == name
    assert dtype == name
    assert dtype != "float64"
    assert tf.as_dtype(dtype.as_datatype_enum) is dtype
    assert tf.as_dtype(dtype.as_datatype_enum + 100) is dtype  # TensorFlow's reference type
    assert dtype.as_numpy_dtype.__name__.rstrip("_") == numpy
    assert getattr(dtype, kind)


def test_as_dtype() -> None:
    assert tf.as_dtype(float) is tf.float32
    with pytest.raises(TypeError, match="Cannot convert"):
        tf.as_dtype("nothing")


def test_shapes() -> None:
    shape = tf.placeholder(tf.float32, [None, 3]).get_shape()
    assert shape.as_list() == [None, 3]
    assert shape[1] == 3
    assert shape[1].value == 3
    assert shape[0] is None
    assert shape.ndims == len(shape) == 2
    assert not shape.is_fully_defined()
    assert shape.merge_with([2, None]) == [2, 3]
    assert shape.concatenate([4]) == [None, 3, 4]
    assert not shape.is_compatible_with([2, 4])
    assert tf.TensorShape(None).ndims is None
    with pytest.raises(ValueError, match="incompatible"):
        shape.assert_is_compatible_with([1, 2, 3])
    with pytest.raises(ValueError, match="unknown"):
        tf.TensorShape(None).as_list()


def test_graph_def_with_shapes() -> None:
    tf.placeholder(tf.float32, [None, 3], name="x")
    (node,) = tf.get_default_graph().as_graph_def(add_shapes=True).node
    assert [dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim] == [-1, 3]
    assert "_output_shapes" not in tf.get_default_graph().as_graph_def().node[0].attr


def test_a_second_derivative_that_is_not_there_says_so() -> None:
    x = tf.placeholder(tf.float32, [2, 3])
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=[0, 1], logits=x)
    (first,) = tf.gradients(loss, x)
    with pytest.raises(LookupError, match=r"second derivative.*SparseSoftmaxCrossEntropyWithLogits"):
        tf.gradients(first, x)


def test_gradients_stop_where_they_are_told() -> None:
    x = tf.Variable(3.0)
    y = x * x
    z = y * x
    stopped, through = tf.gradients(z, x, stop_gradients=[y])[0], tf.gradients(z, x)[0]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        assert session.run([stopped, through]) == [9, 27]
        assert session.run(tf.gradients([y, z], [x], grad_ys=[2.0, 1.0])[0]) == 2 * 6 + 27
    assert tf.gradients(z, tf.constant(1.0)) == [None]
