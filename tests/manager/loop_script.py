"""A training loop for test_signals.py: ``loop_script.py DIRECTORY MODE``; says "step 3" after each step.

Modes: ``plain`` (no handler of its own), ``chained`` (one that was there before), ``raising`` (one that ends the
process), ``ignoring`` (the loop does not look at ``preempted``), ``closed`` (two managers, closed in the order in which
they were made).
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np

import gpusaver


def say(text: str) -> None:
    print(text, flush=True)


def note(number: int, frame: FrameType | None) -> None:
    say(f"previous handler of {signal.Signals(number).name}")


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(7)


def manager_of(state: dict[str, object], directory: Path) -> gpusaver.CheckpointManager:
    return gpusaver.CheckpointManager(
        state,
        directory,
        max_to_keep=2,
        save_every_n_steps=1000,
        preemption_signals=(signal.SIGTERM, signal.SIGUSR1),
    )


def main(directory: Path, mode: str) -> None:
    if mode == "chained":
        signal.signal(signal.SIGTERM, note)
    if mode == "raising":
        signal.signal(signal.SIGTERM, leave)
    state = {"w": np.zeros(50_000), "step": 0}
    if mode == "closed":
        first, second = manager_of(state, directory / "first"), manager_of(state, directory / "second")
        first.close()
        second.close()
        say("step 0")
        time.sleep(30)
        return
    with manager_of(state, directory) as manager:
        manager.restore_or_initialize()
        before = signal.getsignal(signal.SIGTERM)
        while not (manager.preempted and mode != "ignoring"):
            state["step"] += 1  # type: ignore[operator]
            state["w"] += 1  # type: ignore[operator]
            say(f"step {state['step']}")
            time.sleep(0.02)
            manager.step(state["step"])  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGTERM) == before
    say(f"handler now: {signal.getsignal(signal.SIGTERM)!r}")


main(Path(sys.argv[1]), sys.argv[2])
