"""The two-layer classifier that both libraries train: one description, in whichever `tf` is handed in.

Runs on Python 3.7 too, for TensorFlow 1.15.
"""

from __future__ import annotations

HIDDEN = 32


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
