"""Gathers the ops that TensorFlow emits for the example scripts, the classifier and the cases.

    python tests/compat/gather_ops.py v1|v2 tests/compat/ops.json

``v1`` calls disable_v2_behavior first (reference variables), ``v2`` disable_eager_execution alone (resource variables).
TensorFlow 1.15.5 (Python 3.7) and 2.21 (.venv-tf) were run with both; each run replaces its own column.
"""

import contextlib
import io
import json
import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow.compat.v1 as tf

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import cases  # noqa: E402
import classifier  # noqa: E402


def build_script(name):
    path = os.path.join(HERE, "..", "..", "examples", "tf1", name)
    with open(path) as file:
        source = file.read().replace("gpusaver.compat.v1", "tensorflow.compat.v1")
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        argv, sys.argv = sys.argv, [path, os.path.join(directory, "d")]
        try:
            exec(compile(source, path, "exec"), {"__name__": "__main__"})
        finally:
            sys.argv = argv


def build_cases():
    for case in cases.CASES:
        inputs = [tf.placeholder(array.dtype, array.shape) for array in case.arrays]
        output = case.build(tf, *inputs)
        if case.differentiable:
            [tf.convert_to_tensor(gradient) for gradient in tf.gradients(output, inputs) if gradient is not None]


def build_unknown(is_rank_known):
    """Gradients of what has unknown sizes go through other ops."""
    for case in cases.CASES:
        inputs = [tf.placeholder(array.dtype, [None] * array.ndim if is_rank_known else None) for array in case.arrays]
        try:
            output = case.build(tf, *inputs)
        except (ValueError, TypeError):  # needs a size, as unstack does
            continue
        if case.differentiable:
            [tf.convert_to_tensor(gradient) for gradient in tf.gradients(output, inputs) if gradient is not None]


def build_descent():
    classifier.build(tf, optimizer=tf.train.GradientDescentOptimizer(0.1))
    tf.train.Saver(sharded=True)


def build_classifier():
    classifier.build(tf)
    tf.train.Saver()


BUILDERS = {
    "linear.py": lambda: build_script("linear.py"),
    "counter.py": lambda: build_script("counter.py"),
    "keep_two.py": lambda: build_script("keep_two.py"),
    "classifier": build_classifier,
    "classifier, gradient descent": build_descent,
    "cases": build_cases,
    "cases, unknown sizes": lambda: build_unknown(is_rank_known=True),
    "cases, unknown ranks": lambda: build_unknown(is_rank_known=False),
    "variables": lambda: cases.variables(tf),
}


def attr_kinds(node):
    return {name: value.WhichOneof("value") for name, value in node.attr.items() if not name.startswith("_")}


def main():
    mode, path = sys.argv[1:]
    if mode == "v1":
        tf.disable_v2_behavior()
    else:
        tf.disable_eager_execution()
        tf.enable_resource_variables()
    found = {}
    for name, build in BUILDERS.items():
        with tf.Graph().as_default() as graph:
            build()
            graph_def = graph.as_graph_def()
        nodes = list(graph_def.node) + [node for function in graph_def.library.function for node in function.node_def]
        for node in nodes:
            entry = found.setdefault(node.op, {"attrs": {}, "from": set()})
            entry["attrs"].update(attr_kinds(node))
            entry["from"].add(name)
    ops = {
        op: {"attrs": dict(sorted(entry["attrs"].items())), "from": sorted(entry["from"])}
        for op, entry in sorted(found.items())
    }
    table = {}
    if os.path.exists(path):
        with open(path) as file:
            table = json.load(file)
    table[f"TensorFlow {tf.__version__}, {mode}"] = ops
    with open(path, "w") as file:
        json.dump(dict(sorted(table.items())), file, indent=1)
        file.write("\n")
    print("TensorFlow", tf.__version__, mode, len(ops), "ops")


main()
