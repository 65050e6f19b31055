"""Trains a PyTorch model that goes on where it was killed: parameters, optimizer, schedule and shuffling.

    python examples/pytorch.py run --epochs 30       trains, or goes on from the newest checkpoint in `run`

On a GPU where PyTorch finds one.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import gpusaver.torch


def data(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane, and whether they lie in a ring."""
    points = np.random.default_rng(0).uniform(-2, 2, (2000, 2)).astype(np.float32)
    inside = np.abs(np.hypot(*points.T) - 1.2) < 0.5
    return torch.from_numpy(points).to(device), torch.from_numpy(inside.astype(np.float32)).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()

    torch.manual_seed(1)
    torch.set_num_threads(1)  # a sum of floats depends on how many threads share it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points, inside = data(device)
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    shuffle = np.random.default_rng(2)

    state = gpusaver.torch.variables(model=model, optimizer=optimizer, schedule=schedule)
    state |= {"epoch": 0, "random": gpusaver.RandomStates(shuffle=shuffle)}
    with gpusaver.CheckpointManager(state, options.directory, save_every_n_steps=1) as manager:
        if prefix := manager.restore_or_initialize():  # into the tensors that the model and the optimizer hold
            print("resumed", prefix, flush=True)
        while state["epoch"] < options.epochs:
            for batch in np.split(shuffle.permutation(2000), 20):
                optimizer.zero_grad()
                scores = model(points[batch]).squeeze(1)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, inside[batch])
                loss.backward()
                optimizer.step()
            schedule.step()
            state["epoch"] += 1
            print(f"epoch {state['epoch']}: loss {loss.item()!r}", flush=True)
            manager.step(state["epoch"])


if __name__ == "__main__":
    main()
