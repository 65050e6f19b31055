"""A loop that counts in `global_step`, a variable that is not trained; run it again and it goes on counting."""

import os
import sys

import gpusaver.compat.v1 as tf

tf.disable_eager_execution()

directory = sys.argv[1] if len(sys.argv) > 1 else "checkpoints"

global_step = tf.Variable(0, name="global_step", trainable=False)
increment = tf.assign(global_step, global_step + 1)
total = tf.get_variable("total", shape=[], initializer=tf.zeros_initializer())
with tf.control_dependencies([increment]):
    step = total.assign_add(tf.cast(global_step, tf.float32) * 0.5)
saver = tf.train.Saver()

with tf.Session() as sess:
    sess.run(tf.global_variables_initializer())
    latest = tf.train.latest_checkpoint(directory)
    if latest is not None:
        saver.restore(sess, latest)
        print("restored", os.path.basename(latest), "at step", tf.train.global_step(sess, global_step))
    for _ in range(3):
        print("total", sess.run(step))
        path = saver.save(sess, os.path.join(directory, "counter"), global_step=global_step)
        print("saved", os.path.basename(path))
    print("trained:", [variable.name for variable in tf.trainable_variables()])
