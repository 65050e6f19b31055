"""The classifier between gpusaver and another TensorFlow, such as 1.15.5, which needs a Python of its own.

    python tests/compat/both_ways.py PYTHON          PYTHON: the interpreter that has TensorFlow

Each library trains and saves, with variables of either kind; the other one goes on from the `.meta` file.  The greatest
difference of losses and logits over three further training steps is printed; above 1e-5 it fails.  What it printed for
1.15.5 is in tensorflow-1.15.5.log.
"""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import classifier  # noqa: E402

MOST = 1e-5


def library(name):
    if name == "gpusaver":
        import gpusaver.compat.v1 as tf
    else:
        import tensorflow.compat.v1 as tf

        tf.disable_eager_execution()
        tf.logging.set_verbosity(tf.logging.ERROR)
    return tf


def part(role, name, kind, prefix):
    """In one process: `save` trains and saves, `go_on` compares."""
    tf = library(name)
    (tf.enable_resource_variables if kind == "resource" else tf.disable_resource_variables)()
    with np.load(os.path.join(os.path.dirname(prefix), "data.npz")) as stored:
        data = list(zip(stored["images"], stored["labels"]))
    if role == "save":
        expected = classifier.train_and_save(tf, prefix, data)
        losses, logits = zip(*expected)
        np.savez(prefix + ".expected.npz", losses=losses, logits=logits)
        return
    losses, logits = map(np.array, zip(*classifier.go_on(tf, prefix, data)))
    with np.load(prefix + ".expected.npz") as expected:
        found = [float(np.abs(losses - expected["losses"]).max()), float(np.abs(logits - expected["logits"]).max())]
    print(json.dumps(found))


def run(python, *arguments):
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", PYTHONWARNINGS="ignore")
    command = [python, os.path.abspath(__file__)] + list(arguments)
    return subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL).decode()


def main(python):
    script = "import tensorflow, numpy, sys; print(tensorflow.__version__, numpy.__version__, sys.version.split()[0])"
    version = (
        subprocess.check_output([python, "-W", "ignore", "-c", script], stderr=subprocess.DEVNULL).decode().split()
    )
    print("TensorFlow {} (NumPy {}, Python {}) and gpusaver".format(*version))
    pythons = {"gpusaver": sys.executable, "TensorFlow": python}
    with tempfile.TemporaryDirectory() as directory:
        images, labels = zip(*classifier.batches())
        np.savez(os.path.join(directory, "data.npz"), images=images, labels=labels)
        for kind in ("resource", "reference"):
            for writer, reader in (("gpusaver", "TensorFlow"), ("TensorFlow", "gpusaver")):
                prefix = os.path.join(directory, kind + writer)
                run(pythons[writer], "save", writer, kind, prefix)
                loss, logits = json.loads(run(pythons[reader], "go_on", reader, kind, prefix).splitlines()[-1])
                print(
                    "{} variables, {} saves, {} goes on: losses differ by {:.1e}, logits by {:.1e}".format(
                        kind, writer, reader, loss, logits
                    )
                )
                if max(loss, logits) > MOST:
                    sys.exit("that is more than {}".format(MOST))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        part(*sys.argv[1:])
