"""A placeholder, two variables and a linear model, saved and restored in one session under a fixed path."""

import os
import sys

import gpusaver.compat.v1 as tf

tf.disable_eager_execution()

directory = sys.argv[1] if len(sys.argv) > 1 else "checkpoints"

x = tf.placeholder(tf.float32, [None, 3], name="x")
w = tf.Variable(tf.random_normal([3, 2], stddev=0.5), name="w")
b = tf.Variable(tf.zeros([2]), name="b")
y = tf.add(tf.matmul(x, w), b, name="y")
saver = tf.train.Saver()

with tf.Session() as sess:
    sess.run(tf.global_variables_initializer())
    sess.run(b.assign([0.5, -0.5]))
    before = sess.run(y, feed_dict={x: [[1, 2, 3], [4, 5, 6]]})
    print("before", before)

    path = saver.save(sess, os.path.join(directory, "linear.ckpt"))
    print("saved", os.path.relpath(path, directory))

    sess.run([w.assign(tf.zeros_like(w)), b.assign_add([1.0, 1.0])])
    print("changed", sess.run(y, feed_dict={x: [[1, 2, 3]]}))

    saver.restore(sess, path)
    after = sess.run(y, feed_dict={x: [[1, 2, 3], [4, 5, 6]]})
    print("restored, as before:", (before == after).all())
    print("b", b.eval())
