"""A plate that is heated at its rim: a simulation that can be killed at any moment and run again.

    python examples/heat.py run --steps 2000       simulates, or goes on from the newest checkpoint in `run`

On CuPy where it finds a GPU, else on NumPy.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
from typing import Any

import numpy as np

import gpusaver

POINTS, DIFFUSION = 128, 0.2  # of the grid in each direction; in grid spacings squared per step, stable up to 0.25


def array_module() -> Any:
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.cuda.is_available():
            return cupy
    return np


def start(xp: Any) -> dict[str, Any]:
    """A cold plate, hot along one side: all that the next step depends on."""
    temperature = xp.zeros((POINTS, POINTS))
    temperature[0] = 1.0
    return {"temperature": temperature, "step": 0}


def advance(state: dict[str, Any]) -> None:
    """One explicit step of dT/dt = D (d2T/dx2 + d2T/dy2), in place; the rim keeps its temperature."""
    t = state["temperature"]
    laplacian = t[:-2, 1:-1] + t[2:, 1:-1] + t[1:-1, :-2] + t[1:-1, 2:] - 4 * t[1:-1, 1:-1]
    t[1:-1, 1:-1] += DIFFUSION * laplacian
    state["step"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps from one checkpoint to the next")
    options = parser.parse_args()

    state = start(array_module())
    with gpusaver.CheckpointManager(
        state, options.directory, save_every_n_steps=options.every, preemption_signals=(signal.SIGTERM,)
    ) as manager:
        if prefix := manager.restore_or_initialize():
            print("resumed", prefix, flush=True)
        while state["step"] < options.steps and not manager.preempted:
            advance(state)
            manager.step(state["step"])
    mean = float(state["temperature"].mean())
    print(f"step {state['step']}: mean temperature {mean:.12f}")


if __name__ == "__main__":
    main()
