"""One call or more of every function of the front end that makes a tensor, in whichever `tf` is handed in.

Gathers the ops for ops.json, compares each op with TensorFlow, and checks gradients by finite differences.  Runs on
Python 3.7 too, for TensorFlow 1.15.
"""

from __future__ import annotations

import collections

import numpy as np

Case = collections.namedtuple("Case", "name build arrays differentiable")


def _f(*shape, **kwargs):
    """Values of both signs, none close to another, to 0 or to 1: no kink is near."""
    size = int(np.prod(shape))
    values = (np.random.RandomState(kwargs.get("seed", 7)).permutation(size) + 0.37) / max(size, 1) * 3 - 1.43
    return values.reshape(shape).astype(np.float32)


def _p(*shape, **kwargs):
    return np.abs(_f(*shape, **kwargs)) + np.float32(0.2)


_A, _B, _POS = _f(3, 4), _f(3, 4, seed=8) + np.float32(0.05), _p(3, 4)
_ROW, _COLUMN, _VECTOR = _f(4, seed=9), _f(3, 1, seed=10), _f(5, seed=11)
_CUBE = _f(2, 3, 4, seed=12)
_I, _J = np.array([[7, -3, 5], [2, 9, -8]], np.int32), np.array([[2, 4, -3], [5, -2, 3]], np.int32)
_T = np.array([[True, False, True], [False, False, True]])
_U = np.array([[True, True, False], [False, True, True]])

CASES = []


def _case(name, build, *arrays, **kwargs):
    """`differentiable` is said of float inputs; others are cases of values alone."""
    differentiable = kwargs.get("differentiable", all(a.dtype == np.float32 for a in arrays) and len(arrays) > 0)
    CASES.append(Case(name, build, arrays, differentiable))


for (
    _name
) in "negative abs sign square sqrt rsqrt exp log log1p sin cos floor ceil round reciprocal sigmoid tanh".split():
    _flat = _name in ("sign", "floor", "ceil", "round")
    _input = _POS if _name in ("sqrt", "rsqrt", "log", "log1p") else _A
    _case(_name, lambda tf, x, n=_name: getattr(tf, n)(x), _input, differentiable=not _flat)
for _name in "add subtract multiply divide maximum minimum squared_difference".split():
    _case(_name, lambda tf, x, y, n=_name: getattr(tf, n)(x, y), _A, _B)
    _case(_name + "/broadcast", lambda tf, x, y, n=_name: getattr(tf, n)(x, y), _A, _ROW)
    _case(_name + "/both", lambda tf, x, y, n=_name: getattr(tf, n)(x, y), _COLUMN, _ROW)
_case("pow", lambda tf, x, y: tf.pow(x, y), _POS, _B)
_case("pow/scalar", lambda tf, x: x**3.0, _A)
for _name in "truediv floordiv mod floormod".split():
    _case(_name + "/int", lambda tf, x, y, n=_name: getattr(tf, n)(x, y), _I, _J)
_case("floordiv/float", lambda tf, x, y: tf.floordiv(x, y), _A, _B, differentiable=False)
_case("mod/float", lambda tf, x, y: tf.mod(x, y), _A, _B, differentiable=False)
_case("operators", lambda tf, x, y: (x + y) * 2.0 - x / (y * y + 1.0) - (-x) + 1.0 / (1.0 + abs(x)), _A, _B)
_case("operators/int", lambda tf, x, y: (x + 3) * y - x // y + x % y, _I, _J)
for _name in "equal not_equal less less_equal greater greater_equal".split():
    _case(_name, lambda tf, x, y, n=_name: getattr(tf, n)(x, y), _I, np.abs(_J))
_case("comparisons", lambda tf, x: tf.stack([x < 0.5, x <= 0.5, x > 0.5, x >= 0.5]), _A, differentiable=False)
for _name in "logical_and logical_or logical_xor".split():
    _case(_name, lambda tf, x, y, n=_name: getattr(tf, n)(x, y), _T, _U)
_case("logical_not", lambda tf, x: tf.logical_not(x), _T)
_case("where", lambda tf, x, y: tf.where(x > 0.0, x, y), _A, _B)
_case("where_v2", lambda tf, x, y: tf.where_v2(x > 0.0, x, y), _A, _ROW)
_case("clip_by_value", lambda tf, x: tf.clip_by_value(x, -0.7, 0.9), _A)
_case("add_n", lambda tf, x, y: tf.add_n([x, y, x]), _A, _B)
_case("cast", lambda tf, x: tf.cast(x, tf.int32), _A, differentiable=False)
_case("cast/float", lambda tf, x: tf.cast(tf.cast(x, tf.float64) * 2.0, x.dtype), _A)
_case("identity", lambda tf, x: tf.identity(x), _A)
_case("stop_gradient", lambda tf, x: x * tf.stop_gradient(x), _A, differentiable=False)

_case("matmul", lambda tf, x, y: tf.matmul(x, y), _A, _f(4, 2, seed=3))
_case("matmul/at", lambda tf, x, y: tf.matmul(x, y, transpose_a=True), _A, _f(3, 2, seed=3))
_case("matmul/bt", lambda tf, x, y: tf.matmul(x, y, transpose_b=True), _A, _B)
_case("matmul/both", lambda tf, x, y: tf.matmul(x, y, transpose_a=True, transpose_b=True), _A, _f(2, 3, seed=3))
_case("matmul/batch", lambda tf, x, y: tf.matmul(x, y), _CUBE, _f(2, 4, 2, seed=3))
_case("tensordot", lambda tf, x, y: tf.reduce_sum(x * y, axis=1), _A, _B)

for _name in "reduce_sum reduce_mean reduce_max reduce_min reduce_prod".split():
    _case(_name, lambda tf, x, n=_name: getattr(tf, n)(x), _A)
    _case(_name + "/axis", lambda tf, x, n=_name: getattr(tf, n)(x, axis=1), _A)
    _case(_name + "/keepdims", lambda tf, x, n=_name: getattr(tf, n)(x, axis=[0, 2], keepdims=True), _CUBE)
_case("reduce_sum/negative", lambda tf, x: tf.reduce_sum(x, axis=-1), _CUBE)
_case("reduce_all", lambda tf, x: tf.reduce_all(x, axis=1), _T)
_case("reduce_any", lambda tf, x: tf.reduce_any(x), _T)
_case("argmax", lambda tf, x: tf.argmax(x, 1), _A, differentiable=False)
_case("argmin", lambda tf, x: tf.argmin(x, axis=0, output_type=tf.int32), _A, differentiable=False)

_case("reshape", lambda tf, x: tf.reshape(x, [2, -1]), _A)
_case("reshape/shape", lambda tf, x, y: tf.reshape(x, tf.shape(y)), _f(12), _B)
_case("transpose", lambda tf, x: tf.transpose(x), _A)
_case("transpose/perm", lambda tf, x: tf.transpose(x, [1, 2, 0]), _CUBE)
_case("expand_dims", lambda tf, x: tf.expand_dims(x, 1), _A)
_case("squeeze", lambda tf, x: tf.squeeze(x, [1]), _COLUMN)
_case("squeeze/all", lambda tf, x: tf.squeeze(x), _f(1, 3, 1))
_case("shape", lambda tf, x: tf.shape(x), _A, differentiable=False)
_case("rank", lambda tf, x: tf.rank(x), _CUBE, differentiable=False)
_case("size", lambda tf, x: tf.size(x), _A, differentiable=False)
_case("stack", lambda tf, x, y: tf.stack([x, y], axis=1), _A, _B)
_case("unstack", lambda tf, x: tf.unstack(x, axis=1)[2] * 2.0, _A)
_case("concat", lambda tf, x, y: tf.concat([x, y], 1), _A, _COLUMN)
_case("concat/0", lambda tf, x, y: tf.concat([x, y, x], 0), _A, _B)
_case("split", lambda tf, x: tf.split(x, 2, axis=1)[1], _A)
_case("split/sizes", lambda tf, x: tf.split(x, [1, 3], axis=1)[1], _A)
_case("slice", lambda tf, x: tf.slice(x, [1, 0], [2, 3]), _A)
_case("getitem", lambda tf, x: x[1:, ::2], _A)
_case("getitem/int", lambda tf, x: x[1, ..., -1], _CUBE)
_case("getitem/new", lambda tf, x: x[:, tf.newaxis, 1:3], _A)
_case("gather", lambda tf, x: tf.gather(x, [2, 0, 2]), _A)
_case("gather/axis", lambda tf, x: tf.gather(x, [[3, 0], [1, 1]], axis=1), _A)
_case("one_hot", lambda tf, x: tf.one_hot(x, 6), np.array([2, 0, 5, -1], np.int32))
_case("tile", lambda tf, x: tf.tile(x, [2, 3]), _A)
_case("pad", lambda tf, x: tf.pad(x, [[1, 2], [0, 1]]), _A)
_case("fill", lambda tf, x: tf.fill([2, 3], tf.cast(1.5, x.dtype)) * x, _COLUMN[:2])
_case("range", lambda tf, x: tf.range(2, 11, 3) + x, np.int32([1]))
_case("zeros", lambda tf, x: tf.zeros([3, 4], x.dtype) + x, _A)
_case("ones", lambda tf, x: tf.ones(tf.shape(x), x.dtype) - x, _A)
_case("zeros_like", lambda tf, x: tf.zeros_like(x), _A, differentiable=False)
_case("ones_like", lambda tf, x: tf.ones_like(x) * x, _A)
_case("broadcast_to", lambda tf, x: tf.broadcast_to(x, [3, 4]), _ROW)

for _name in "relu sigmoid tanh softmax log_softmax l2_loss softplus".split():
    _case("nn." + _name, lambda tf, x, n=_name: getattr(tf.nn, n)(x), _A)
_case("nn.softmax/axis", lambda tf, x: tf.nn.softmax(x, axis=1), _CUBE)
_case("nn.bias_add", lambda tf, x, y: tf.nn.bias_add(x, y), _A, _ROW)
_LABELS = (np.arange(12).reshape(3, 4) / np.arange(12).reshape(3, 4).sum(1, keepdims=True)).astype(np.float32)
_case(
    "nn.softmax_cross_entropy_with_logits",
    lambda tf, x: tf.nn.softmax_cross_entropy_with_logits(labels=tf.cast(_LABELS, x.dtype), logits=x),
    _A,
)
_case(
    "nn.softmax_cross_entropy_with_logits_v2",
    lambda tf, x, y: tf.nn.softmax_cross_entropy_with_logits_v2(labels=y, logits=x),
    _A,
    _LABELS,
)
_case(
    "nn.sparse_softmax_cross_entropy_with_logits",
    lambda tf, x: tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.constant([1, 3, 0]), logits=x),
    _A,
)
_case(
    "nn.sigmoid_cross_entropy_with_logits",
    lambda tf, x, y: tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.sigmoid(y), logits=x),
    _A,
    _B,
)


def variables(tf):
    """What variables and their neighbours emit; name -> tensor or operation to run, in this order."""
    plain = tf.Variable([1.0, 2.0], name="plain")
    counter = tf.get_variable("counter", [], tf.int64, tf.zeros_initializer(), trainable=False)
    drawn = tf.get_variable("drawn", [2, 3], initializer=tf.random_uniform_initializer(-1.0, 1.0))
    normal = tf.get_variable("normal", [2, 3], initializer=tf.random_normal_initializer(stddev=0.1))
    integers = tf.Variable(tf.random_uniform([4], 0, 9, tf.int32), name="integers")
    text = tf.Variable("word", name="text")
    flag = tf.Variable(True, name="flag")
    try:
        first = plain.initialized_value()
    except NotImplementedError:  # resource variables in TensorFlow 2.21
        first = tf.constant([1.0, 2.0])
    initialized = tf.Variable(first * 2.0, name="second")
    with tf.variable_scope("parts", partitioner=tf.fixed_size_partitioner(2)):
        parts = tf.get_variable("p", [5, 2], initializer=tf.ones_initializer())
    local = tf.Variable(3.0, name="local", collections=[tf.GraphKeys.LOCAL_VARIABLES])
    fetches = [
        ("report", tf.report_uninitialized_variables()),
        ("init", tf.global_variables_initializer()),
        ("init_local", tf.local_variables_initializer()),
        ("is_initialized", tf.is_variable_initialized(plain)),
        ("assign", plain.assign([3.0, 4.0])),
        ("assign_add", tf.assign_add(plain, [1.0, 1.0])),
        ("assign_sub", plain.assign_sub([0.5, 0.25])),
        ("count", counter.assign_add(1)),
        ("read", plain.read_value() + initialized),
        ("value", plain.value()),
        ("parts", tf.convert_to_tensor(parts) * 2.0),
        ("default", tf.placeholder_with_default([1.0], [None]) + local),
        ("nothing", tf.no_op()),
    ]
    for later in (drawn, normal, integers, text, flag):
        fetches.append((later.op.name, tf.shape(later)))
    return fetches
