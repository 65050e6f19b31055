"""Trains a small network, kills it while it saves, resumes it, and compares with a run that was never killed.

    python examples/train_digits.py --output build/demo           the demonstration: three processes, a table, a plot
    python examples/train_digits.py --train DIR --epochs 20       one such process: trains and saves in DIR, or resumes

The first half is what a training script needs of gpusaver; the second half is what the demonstration does with it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpusaver
from gpusaver.storage.local import LocalStorage, LocalWritableFile

HIDDEN, BATCH = 896, 128
RATE, DECAY_MEAN, DECAY_SQUARE = 3e-4, 0.9, 0.999
TRAINING = 1437  # of the 1797 images; the others are for testing

# ---------------------------------------------------------------------------------------------- the training script


def array_module() -> tuple[Any, str]:
    """CuPy where it finds a GPU, else NumPy; and the device in words."""
    if importlib.util.find_spec("cupy"):
        cupy = importlib.import_module("cupy")
        if cupy.cuda.is_available():
            name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            return cupy, f"{name}, with CuPy {cupy.__version__}"
    return np, f"the CPU ({os.uname().machine}, {os.cpu_count()} cores), with NumPy {np.__version__}"


def new_state(xp: Any, shuffle: np.random.Generator) -> dict[str, Any]:
    """Everything the run depends on, under names: what is not in here starts afresh after a restart."""
    random, weights = np.random.Generator(np.random.Philox(key=1)), {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise([64, HIDDEN, HIDDEN, 10])):
        normal = random.standard_normal((inputs, outputs), np.float32)
        weights[f"w{layer}"] = xp.asarray(normal * np.float32(np.sqrt(2 / inputs)))
        weights[f"b{layer}"] = xp.zeros(outputs, np.float32)
    return {
        "weights": weights,
        "adam": {slot: {name: xp.zeros_like(w) for name, w in weights.items()} for slot in ("mean", "square")},
        "epoch": 0,
        "step": 0,
        "random": gpusaver.RandomStates(shuffle=shuffle),  # saved and restored like any other value
    }


def forward(xp: Any, weights: dict[str, Any], images: Any) -> list[Any]:
    """The activations of every layer; the last ones are the logits."""
    layers = [images]
    for layer in range(3):
        sums = layers[-1] @ weights[f"w{layer}"] + weights[f"b{layer}"]
        layers.append(xp.maximum(sums, 0) if layer < 2 else sums)
    return layers


def train_step(xp: Any, state: dict[str, Any], images: Any, labels: Any) -> float:
    """One step of Adam on the cross-entropy of a batch, in place; returns the loss before the step."""
    weights, mean, square = state["weights"], state["adam"]["mean"], state["adam"]["square"]
    layers = forward(xp, weights, images)
    exponents = xp.exp(layers[-1] - layers[-1].max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    truth = xp.eye(10, dtype=np.float32)[labels]
    error, gradients = (probabilities - truth) / len(images), {}
    for layer in (2, 1, 0):
        gradients[f"w{layer}"], gradients[f"b{layer}"] = layers[layer].T @ error, error.sum(axis=0)
        error = (error @ weights[f"w{layer}"].T) * (layers[layer] > 0)
    state["step"] += 1
    rate = RATE * np.sqrt(1 - DECAY_SQUARE ** state["step"]) / (1 - DECAY_MEAN ** state["step"])
    for name, gradient in gradients.items():
        mean[name] += (gradient - mean[name]) * np.float32(1 - DECAY_MEAN)
        square[name] += (gradient * gradient - square[name]) * np.float32(1 - DECAY_SQUARE)
        weights[name] -= mean[name] / (xp.sqrt(square[name]) + np.float32(1e-7)) * np.float32(rate)
    return float(-xp.log((probabilities * truth).sum(axis=1)).mean())


def train(directory: str, epochs: int, *, forget_shuffle: bool = False, storage: Any = None) -> None:
    """Trains up to ``epochs``, from the newest checkpoint in ``directory`` on, and saves after every epoch.

    SIGTERM ends it at the next of these saves.
    """
    from sklearn.datasets import load_digits

    xp, device = array_module()
    print("device", device, flush=True)
    data = load_digits()
    images, labels = xp.asarray(data.data / 16, np.float32), xp.asarray(data.target)
    shuffle = np.random.Generator(np.random.Philox(key=2))
    state = new_state(xp, shuffle)

    fresh = shuffle.bit_generator.state
    with gpusaver.CheckpointManager(
        state,
        directory,
        max_to_keep=3,
        checkpoint_name="digits.ckpt",
        save_every_n_steps=1,
        preemption_signals=(signal.SIGTERM,),
        storage=storage,
    ) as manager:
        resumed_from = manager.restore_or_initialize()  # into the same arrays; numbers are replaced in their dicts
        if resumed_from is not None:
            print("resumed", resumed_from, flush=True)
        if forget_shuffle:
            shuffle.bit_generator.state = fresh
        while state["epoch"] < epochs and not manager.preempted:
            order = shuffle.permutation(TRAINING)
            for start in range(0, TRAINING, BATCH):
                batch = xp.asarray(order[start : start + BATCH])
                loss = train_step(xp, state, images[batch], labels[batch])
                print("step", state["step"], "loss", np.float32(loss), flush=True)
            state["epoch"] += 1
            manager.step(state["epoch"])  # saves, and returns as soon as the values are copied
    answers = forward(xp, state["weights"], images[TRAINING:])[-1].argmax(axis=1)
    print("accuracy", float((answers == labels[TRAINING:]).mean()), flush=True)


# ------------------------------------------------------------------------------------------------ the demonstration


class DyingStorage(LocalStorage):
    """Kills its own process (SIGKILL) when half of a write is done: write number ``write`` of save number ``save``."""

    def __init__(self, save: int, write: int) -> None:
        super().__init__()
        self._save, self._write = save, write
        self._saves, self._writes = 0, itertools.count(1)

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> LocalWritableFile:
        file = super().create(path, nbytes, direct=direct, target=target)
        self._saves += ".data-" in path
        if self._saves == self._save:
            file.write_at = functools.partial(self._write_or_die, file.write_at)
        return file

    def _write_or_die(self, write_at: Callable[..., None], offset: int, buffers: Sequence[memoryview]) -> None:
        if next(self._writes) == self._write:
            data = memoryview(b"".join(buffers))
            write_at(offset, [data[: data.nbytes // 2]])
            os.kill(os.getpid(), signal.SIGKILL)
        write_at(offset, buffers)


class Run(NamedTuple):
    """How one process ended, and what it printed: ``losses`` by step, and other lines by their first word."""

    status: int
    losses: dict[int, float]
    said: dict[str, str]


def run(directory: Path, epochs: int, *more: str) -> Run:
    """Trains in a process of its own."""
    # A sum of floats depends on how many threads share it. One for all runs, which leaves a core for saving.
    threads = "OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS VECLIB_MAXIMUM_THREADS".split()
    command = [sys.executable, __file__, "--train", str(directory), "--epochs", str(epochs), *more]
    process = subprocess.run(command, env=os.environ | dict.fromkeys(threads, "1"), stdout=subprocess.PIPE, text=True)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"training in {directory} ended with status {process.returncode}, for the reason above")
    lines = [line.split(maxsplit=1) for line in process.stdout.splitlines()]
    losses = {int(text.split()[0]): float(text.split()[2]) for word, text in lines if word == "step"}
    return Run(process.returncode, losses, dict(lines))


def differences(whole: Run, parts: Sequence[Run], expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not bit for bit equal: losses by step, and tensors of the last checkpoints."""
    different = []
    for step in sorted({*whole.losses}.union(*(part.losses for part in parts))):
        if {part.losses[step] for part in parts if step in part.losses} != {whole.losses.get(step)}:
            different.append(f"loss of step {step}")
    for name in sorted({*expected, *found}):
        ours, theirs = (np.asarray(tensors.get(name)) for tensors in (expected, found))
        if (ours.dtype, ours.shape, ours.tobytes()) != (theirs.dtype, theirs.shape, theirs.tobytes()):
            different.append(name)
    return different


def plot(path: Path, whole: Run, killed: Run, resumed: Run, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for part, label, style in (
        (whole, "never killed", {"color": "#c9d3e0", "linewidth": 6}),
        (killed, "until SIGKILL", {"color": "#c0392b", "marker": "X", "markevery": [-1], "markersize": 11}),
        (resumed, "resumed", {"color": "#1b4f8a", "marker": "o", "markevery": [0], "linestyle": (0, (4, 1.5))}),
    ):
        axes.semilogy(list(part.losses), list(part.losses.values()), label=label, **style)
    axes.set(xlabel="step", ylabel="loss of the batch", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def demonstrate(output: Path, epochs: int, save: int, write: int, *to_resume: str) -> int:
    """The exit status: 0 if the killed and resumed run is equal to the undisturbed one, 1 if not."""
    calm, rough = output / "never-killed", output / "killed"
    for directory in (calm, rough):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    whole = run(calm, epochs)
    print(f"Training runs on {whole.said['device']}.\n")
    accuracy = float(whole.said["accuracy"])
    print(f"1. A run that nobody disturbs: {len(whole.losses)} steps, {accuracy:.1%} of the test images recognised.")
    killed = run(rough, epochs, "--kill", str(save), str(write))
    if killed.status == 0:
        raise SystemExit(f"nothing was killed: there is no write {write} of save {save}")
    print(f"2. The same, but killed (SIGKILL) half-way through write {write} of save {save}. It leaves, in bytes:")
    for path in sorted(rough.iterdir()):
        note = "  <- half-made" if path.name.endswith(".gpusaver-tmp") else ""
        note = "  <- of the dead process" if path.name.endswith(".gpusaver-lock") else note
        print(f"   {path.stat().st_size:>12,}  {path.name}{note}")
    print(
        "   What is half-made has a name that no reader takes for a part of a checkpoint; the next process removes it."
    )
    resumed = run(rough, epochs, *to_resume)
    start = resumed.said.get("resumed", "nothing, for there is no checkpoint yet")
    print(f"3. The same command again: resumes from {start}, at step {min(resumed.losses)}.\n")

    print(f"   epoch  {'never killed':<15}{'until SIGKILL':<15}resumed        (loss of the epoch's last step)")
    for epoch in range(1, epochs + 1):
        cells = [part.losses.get(epoch * len(whole.losses) // epochs, "") for part in (whole, killed, resumed)]
        print(f"   {epoch:>5}  {cells[0]:<15}{cells[1]:<15}{cells[2]}".rstrip())

    expected, found = gpusaver.load(calm), gpusaver.load(rough)
    different = differences(whole, (killed, resumed), expected, found)
    count = f"{len(killed.losses) + len(resumed.losses)} losses and {len(expected)} tensors"
    verdict = f"{count}: all bit for bit those of the run that was never killed"
    if different:
        verdict = f"{count}: {len(different)} differ from the run that was never killed; the first is {different[0]}"
    plot(output / "loss.png", whole, killed, resumed, verdict)
    print(f"\n{'FAILED' if different else 'OK'}: {verdict}.\nThe losses are drawn in {output / 'loss.png'}.")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default="build/demo", metavar="DIR", help="of the demonstration's files")
    parser.add_argument("--train", metavar="DIR", help="only train, with checkpoints in DIR")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--kill", type=int, nargs=2, metavar=("SAVE", "WRITE"), help="die in this write of this save")
    parser.add_argument("--forget-shuffle", action="store_true", help="when resuming, shuffle with a new generator")
    options = parser.parse_args()
    if options.train is None:
        kill = options.kill or (max(2, options.epochs // 2), 2)
        return demonstrate(options.output, options.epochs, *kill, *["--forget-shuffle"] * options.forget_shuffle)
    storage = DyingStorage(*options.kill) if options.kill else None
    train(options.train, options.epochs, forget_shuffle=options.forget_shuffle, storage=storage)
    return 0


if __name__ == "__main__":
    sys.exit(main())
