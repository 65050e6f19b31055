"""Five saves numbered by a Python int, of which the newest two stay."""

import os
import sys

import gpusaver.compat.v1 as tf

tf.disable_eager_execution()

directory = sys.argv[1] if len(sys.argv) > 1 else "checkpoints"

with tf.variable_scope("layer"):
    kernel = tf.get_variable("kernel", [4, 3])
    bias = tf.get_variable("bias", [3], initializer=tf.constant_initializer(0.25))
    calls = tf.get_variable("calls", [], tf.int64, tf.zeros_initializer(), trainable=False)
grow = tf.group(kernel.assign(kernel * 2.0), calls.assign_add(1))
saver = tf.train.Saver(max_to_keep=2)

with tf.Session() as sess:
    sess.run(tf.global_variables_initializer())
    for epoch in range(5):
        sess.run(grow)
        path = saver.save(sess, os.path.join(directory, "model"), global_step=epoch)
        print("saved", os.path.basename(path), "calls", sess.run(calls))
    print("kept", [os.path.basename(kept) for kept in saver.last_checkpoints])
    state = tf.train.get_checkpoint_state(directory)
    print("newest", os.path.basename(state.model_checkpoint_path))
    first = sess.run(kernel)
    saver.restore(sess, saver.last_checkpoints[0])
    print("older kernel is half:", (sess.run(kernel) * 2 == first).all(), "calls", sess.run(calls))
