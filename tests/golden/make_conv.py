"""Writes conv_tf1 or conv_tf2, whichever TensorFlow runs it: a convolutional network after two steps of training.

    python tests/golden/make_conv.py        with TensorFlow 1.15.5 (Python 3.7) or 2.21.0

Its graph has ops that gpusaver does not run: convolution, pooling, batch normalisation and their gradients.
"""

import base64
import json
import os

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
RELEASE = "tf" + tf.__version__[0]
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "conv_" + RELEASE)


def network(images):
    kernel = v1.get_variable("conv/kernel", [3, 3, 1, 2])
    scale = v1.get_variable("norm/scale", initializer=np.ones(2, np.float32))
    offset = v1.get_variable("norm/offset", initializer=np.zeros(2, np.float32))
    hidden = v1.nn.conv2d(images, kernel, strides=[1, 1, 1, 1], padding="SAME", name="conv/y")
    hidden = v1.nn.fused_batch_norm(hidden, scale, offset, name="norm/y")[0]
    hidden = v1.nn.max_pool(v1.nn.relu(hidden), [1, 2, 2, 1], [1, 2, 2, 1], "SAME", name="pool")
    weights = v1.get_variable("dense/w", [32, 3])
    return tf.matmul(tf.reshape(hidden, [-1, 32]), weights, name="logits")


def main():
    if RELEASE == "tf2":
        v1.disable_eager_execution()
    v1.set_random_seed(7)
    images = v1.placeholder(tf.float32, [None, 8, 8, 1], name="images")
    labels = v1.placeholder(tf.int64, [None], name="labels")
    logits = network(images)
    loss = v1.losses.sparse_softmax_cross_entropy(labels, logits)
    step = v1.train.get_or_create_global_step()
    train = v1.train.MomentumOptimizer(0.1, 0.9).minimize(loss, step, name="train")
    v1.add_to_collection("outputs", logits)
    v1.add_to_collection("train", train)
    saver = v1.train.Saver()
    batch = np.random.RandomState(3).rand(4, 8, 8, 1).astype(np.float32)
    os.makedirs(HERE, exist_ok=True)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        for _ in range(2):
            session.run(train, {images: batch, labels: [0, 1, 2, 0]})
        prefix = saver.save(session, os.path.join(HERE, "conv"), global_step=step)
        described = {
            "tf_version": tf.__version__,
            "ops": sorted({op.type for op in v1.get_default_graph().get_operations()}),
            "images_b64": encoded(batch),
            "logits_b64": encoded(session.run(logits, {images: batch})),
        }
    os.remove(os.path.join(HERE, "checkpoint"))  # it holds the path of this machine
    write("network.json", described)
    reader = tf.train.load_checkpoint(prefix)
    tensors = [
        {
            "name": name,
            "dtype": "float32" if shape else "int64",
            "shape": shape,
            "data_b64": encoded(reader.get_tensor(name)),
        }
        for name, shape in sorted(reader.get_variable_to_shape_map().items())
    ]
    write("expected-conv-2.json", {"tf_version": tf.__version__, "prefix": "conv-2", "kind": "v2", "tensors": tensors})


def encoded(array):
    return base64.b64encode(np.asarray(array).tobytes()).decode()


def write(name, content):
    with open(os.path.join(HERE, name), "w") as file:
        json.dump(content, file, indent=0, sort_keys=True)
        file.write("\n")


if __name__ == "__main__":
    main()
