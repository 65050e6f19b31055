"""The two-layer classifier that both libraries train: one description, in whichever `tf` is handed in.

Runs on Python 3.7 too, for TensorFlow 1.15.
"""

from __future__ import annotations

import numpy as np

HIDDEN = 32
BATCH, FIRST, FURTHER = 64, 8, 3


def batches():
    """Pairs of images and one-hot labels of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    labels = np.eye(10, dtype=np.float32)[digits.target]
    order = np.random.RandomState(1).permutation(len(images))
    chosen = [order[start : start + BATCH] for start in range(0, BATCH * (FIRST + FURTHER), BATCH)]
    return [(images[rows], labels[rows]) for rows in chosen]


def build(tf, hidden=HIDDEN, optimizer=None):
    """Names of what a test needs: x:0, y:0, logits:0, loss:0, train (operation), accuracy:0."""
    x = tf.placeholder(tf.float32, [None, 64], name="x")
    y = tf.placeholder(tf.float32, [None, 10], name="y")
    with tf.variable_scope("hidden"):
        w = tf.get_variable("w", [64, hidden], initializer=tf.truncated_normal_initializer(stddev=0.1))
        b = tf.get_variable("b", [hidden], initializer=tf.zeros_initializer())
        h = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, w), b))
    with tf.variable_scope("output"):
        w = tf.get_variable("w", [hidden, 10])
        b = tf.get_variable("b", [10], initializer=tf.zeros_initializer())
    logits = tf.add(tf.matmul(h, w), b, name="logits")
    loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=y, logits=logits), name="loss")
    hits = tf.equal(tf.argmax(logits, 1), tf.argmax(y, 1))
    tf.reduce_mean(tf.cast(hits, tf.float32), name="accuracy")
    step = tf.train.get_or_create_global_step()
    optimizer = optimizer or tf.train.AdamOptimizer(0.01)
    return optimizer.minimize(loss, global_step=step, name="train")


def steps(session, data):
    """The loss before, and the logits after, of a training step for each pair in `data`."""
    found = []
    for images, labels in data:
        feed = {"x:0": images, "y:0": labels}
        loss, _ = session.run(["loss:0", "train"], feed)
        found.append((loss, session.run("logits:0", feed)))
    return found


def train_and_save(tf, prefix, data, sharded=False):
    """Trains, saves, and returns what the further steps give."""
    with tf.Graph().as_default():
        build(tf)
        saver = tf.train.Saver(sharded=sharded)
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            steps(session, data[:FIRST])
            saver.save(session, prefix)
            return steps(session, data[FIRST:])


def go_on(tf, prefix, data):
    """What the further steps give after restoring the graph and the variables from files."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(prefix + ".meta").restore(session, prefix)
        assert tf.train.global_step(session, tf.train.get_global_step()) == FIRST
        names = {variable.op.name for variable in tf.global_variables()}
        assert {"hidden/w", "hidden/w/Adam", "hidden/w/Adam_1", "beta1_power", "global_step"} <= names
        assert len(tf.trainable_variables()) == 4
        return steps(session, data[FIRST:])
