"""What the TensorFlow-1 front end costs: a training step of the classifier, beside the same written directly on `xp`.

    python benchmarks/bench_compat.py

Prints a table for several widths of the hidden layer, at batch 256: building the graph, the first ``Session.run``
(which makes the plan), a later one, and the direct step.  The fastest of many: neighbours on the machine only add.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "compat"))
import classifier

import gpusaver.compat.v1 as tf
from gpusaver.device.arrays import array_module

BATCH, ROUNDS, STEPS = 256, 5, 100
RATE, BETA1, BETA2, EPSILON = 0.01, 0.9, 0.999, 1e-8


def direct_step(xp: Any, state: dict[str, Any], images: Any, labels: Any) -> Any:
    """The classifier's forward and backward pass and Adam, on arrays; returns the loss."""
    w1, b1, w2, b2 = (state["weights"][name] for name in ("w1", "b1", "w2", "b2"))
    hidden = xp.maximum(images @ w1 + b1, 0)
    logits = hidden @ w2 + b2
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponents = xp.exp(shifted)
    total = exponents.sum(axis=1, keepdims=True)
    loss = (labels * (xp.log(total) - shifted)).sum(axis=1).mean()
    error = (exponents / total - labels) / np.float32(len(images))
    back = (error @ w2.T) * (hidden > 0)
    gradients = {
        "w1": images.T @ back,
        "b1": back.sum(axis=0),
        "w2": hidden.T @ error,
        "b2": error.sum(axis=0),
    }
    state["step"] += 1
    rate = np.float32(RATE * np.sqrt(1 - BETA2 ** state["step"]) / (1 - BETA1 ** state["step"]))
    for name, gradient in gradients.items():
        mean, square = state["mean"][name], state["square"][name]
        mean += (gradient - mean) * np.float32(1 - BETA1)
        square += (gradient * gradient - square) * np.float32(1 - BETA2)
        state["weights"][name] -= mean * rate / (xp.sqrt(square) + np.float32(EPSILON))
    return loss


def direct_state(xp: Any, hidden: int) -> dict[str, Any]:
    random = np.random.RandomState(0)
    shapes = {"w1": (64, hidden), "b1": (hidden,), "w2": (hidden, 10), "b2": (10,)}
    weights = {
        name: xp.asarray(random.standard_normal(shape).astype(np.float32) * 0.1) for name, shape in shapes.items()
    }
    zeros = [{name: xp.zeros(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)]
    return {"weights": weights, "mean": zeros[0], "square": zeros[1], "step": 0}


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_session(images: Any, labels: Any, hidden: int) -> tuple[float, float, float]:
    """Seconds for building the graph, the first run, and a later one."""
    with tf.Graph().as_default() as graph:
        built = seconds(lambda: classifier.build(tf, hidden))
        fetches = [graph.get_operation_by_name("train"), graph.get_tensor_by_name("loss:0")]
        feed = {graph.get_tensor_by_name("x:0"): images, graph.get_tensor_by_name("y:0"): labels}
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            first = seconds(lambda: session.run(fetches, feed))
            return built, first, min(seconds(lambda: session.run(fetches, feed)) for _ in range(STEPS))


def directly(xp: Any, images: Any, labels: Any, hidden: int) -> float:
    """Seconds for a step; as in a session the batch comes from the host, and the loss goes back."""
    state = direct_state(xp, hidden)
    return min(seconds(lambda: float(direct_step(xp, state, xp.array(images), xp.array(labels)))) for _ in range(STEPS))


def measure(xp: Any, hidden: int) -> list[float]:
    """Milliseconds: building, first run, later run, direct step; the fastest of rounds taken in turn."""
    random = np.random.RandomState(1)
    images = random.random_sample((BATCH, 64)).astype(np.float32)
    labels = np.eye(10, dtype=np.float32)[random.randint(0, 10, BATCH)]
    rounds = [(*in_session(images, labels, hidden), directly(xp, images, labels, hidden)) for _ in range(ROUNDS)]
    return [1e3 * min(column) for column in zip(*rounds, strict=True)]


def main() -> None:
    xp = array_module()
    print(f"{xp.__name__} {xp.__version__}, batch {BATCH}, milliseconds")
    print(f"{'hidden':>8} {'build':>8} {'first run':>10} {'run':>8} {'direct':>8} {'run / direct':>13}")
    for hidden in (32, 128, 512):
        built, first, later, direct = measure(xp, hidden)
        print(f"{hidden:8} {built:8.2f} {first:10.2f} {later:8.3f} {direct:8.3f} {later / direct:13.2f}")


if __name__ == "__main__":
    main()
