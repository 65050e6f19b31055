"""TensorFlow's side of the tests of `.meta` files.  Needs TensorFlow alone, 1.15 or 2.21, so it runs on Python 3.7 too:

python meta_graph_side.py take DIRECTORY     imports, restores, runs and saves what gpusaver wrote: see `take`
python meta_graph_side.py write DIRECTORY    saves graphs of its own: see `WRITERS`
"""

import json
import os
import sys

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
DEVICES = 3


def session():
    return v1.Session(config=v1.ConfigProto(device_count={"CPU": DEVICES}))


def take(prefix, again, scope=None):
    """Imports ``prefix.meta``, restores, saves to ``again``, and then runs the initializers.

    Returns what the graph says: {variable: [dtype, shape]}, the trainable ones, the global step, the variables without
    a value before and after the restore, and whether the initial values are zeros.
    """
    with tf.Graph().as_default(), session() as running:
        saver = v1.train.import_meta_graph(prefix + ".meta", import_scope=scope)
        variables = {variable.op.name: variable for variable in v1.global_variables()}
        missing = v1.report_uninitialized_variables()
        before = len(running.run(missing))
        saver.restore(running, prefix)
        after = len(running.run(missing))
        step = v1.train.get_global_step()
        found = {
            "variables": {name: [v.dtype.base_dtype.name, v.shape.as_list()] for name, v in variables.items()},
            "trainable": [variable.op.name for variable in v1.trainable_variables()],
            "global_step": None if step is None else int(running.run(step)),
            "without_value": [before, after],
            "max_to_keep": saver.saver_def.max_to_keep,
        }
        saver.save(running, again, write_state=False)
        running.run(v1.global_variables_initializer())
        found["zeros"] = all(is_zero(value) for value in running.run(list(variables.values())))
        return found


def is_zero(value):
    array = np.asarray(value)
    return not array.size or bool((array == (b"" if array.dtype == object else array.dtype.type(0))).all())


def take_all(directory):
    """Every checkpoint in DIRECTORY/ours, saved again in DIRECTORY/again beside what the graph said."""
    for name in sorted(os.listdir(os.path.join(directory, "ours"))):
        if name.endswith(".meta"):
            case = name[: -len(".meta")]
            again = os.path.join(directory, "again", case)
            found = take(os.path.join(directory, "ours", case), again)
            with open(again + ".json", "w") as file:
                json.dump(found, file)
            print("TensorFlow {} took {}: {} variables".format(tf.__version__, case, len(found["variables"])))


# Graphs of its own


def write_plain(use_resource):
    """Types and shapes; trainable and not; an op that gpusaver does not run."""
    rng = np.random.RandomState(5)
    for name in "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 bool complex64 complex128".split():
        value = (rng.rand(2, 3) * 9).astype(name)
        v1.get_variable("plain/" + name, initializer=value, use_resource=use_resource, trainable=name == "float32")
    v1.get_variable("bfloat16", initializer=tf.cast(rng.rand(4), tf.bfloat16), use_resource=use_resource)
    v1.get_variable("text", initializer=np.array([b"a", b"\xff"], object), dtype=tf.string, use_resource=use_resource)
    v1.get_variable("empty", initializer=np.zeros((0, 2), np.float32), use_resource=use_resource)
    image = v1.get_variable("image", initializer=rng.rand(1, 4, 4, 1).astype("f"), use_resource=use_resource)
    v1.add_to_collection("pooled", v1.nn.max_pool(image, [1, 2, 2, 1], [1, 2, 2, 1], "SAME"))
    return v1.train.Saver(max_to_keep=7)


def write_renamed(use_resource):
    """Other names in the checkpoint than in the graph, shapes that may change, a Saver in a scope."""
    first = v1.get_variable("first", initializer=np.arange(6.0, dtype="f"), use_resource=use_resource)
    second = v1.get_variable("second", initializer=np.int64(8), use_resource=use_resource)
    return v1.train.Saver({"one": first, "zwei/drei": second}, reshape=True, name="mine")


def write_sharded(use_resource):
    """Parts on several devices."""
    with v1.variable_scope("s", partitioner=v1.fixed_size_partitioner(DEVICES), use_resource=use_resource):
        v1.get_variable("rows", [7, 3], initializer=v1.random_normal_initializer(seed=3))
    for number in range(DEVICES):
        with tf.device(f"/cpu:{number}"):
            v1.get_variable(f"on{number}", initializer=np.float64(number), use_resource=use_resource)
    return v1.train.Saver(sharded=True)


WRITERS = {
    "{}-{}".format(writer.__name__[len("write_") :], form): (writer, form == "resource")
    for writer in (write_plain, write_renamed, write_sharded)
    for form in ("reference", "resource")
}


def write(case, prefix):
    writer, use_resource = WRITERS[case]
    with tf.Graph().as_default(), session() as running:
        saver = writer(use_resource)
        running.run(v1.global_variables_initializer())
        saver.save(running, prefix, write_state=False)


def write_all(directory):
    for case in sorted(WRITERS):
        write(case, os.path.join(directory, "theirs", case))
        print(f"TensorFlow {tf.__version__} wrote {case}")


if __name__ == "__main__":
    if tf.__version__.startswith("2"):
        v1.disable_eager_execution()
    {"take": take_all, "write": write_all}[sys.argv[1]](sys.argv[2])
