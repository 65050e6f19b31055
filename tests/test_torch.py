"""The adapter for PyTorch: a run that is resumed goes on exactly as one that was never stopped.

Skipped where PyTorch is missing, as in `make test`; `.venv-bench` has it (docs/command.md says how to run these).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver

torch = pytest.importorskip("torch")

import gpusaver.torch  # noqa: E402
from gpusaver.conversion import convert  # noqa: E402

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


class Run:
    """A small network in training; ``unused`` never gets a gradient, ``frozen`` takes none."""

    def __init__(self, optimizer: str, scheduler: str = "step", seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1)]
        self.model = torch.nn.Sequential(*layers)
        self.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
        self.model.register_parameter("frozen", torch.nn.Parameter(torch.zeros(2), requires_grad=False))
        parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer]([{"params": parameters[:2]}, {"params": parameters[2:]}])
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.state = {
            **gpusaver.torch.variables(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler),
            "step": 0,
        }

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.state["step"] += 1
            inputs = torch.linspace(-1, 1, 15).reshape(5, 3) * self.state["step"]
            loss = (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            is_plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*[loss.item()] * is_plateau)

    def values(self) -> list[Any]:
        return [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict(), self.state["step"]]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.optim.lr_scheduler.LRScheduler):
        return same(first.state_dict(), second.state_dict())
    return bool(first == second)


def check_resumes(optimizer: str, scheduler: str, steps_before: int, folder: Path) -> None:
    straight, stopped, resumed = Run(optimizer, scheduler), Run(optimizer, scheduler), Run(optimizer, scheduler, seed=1)
    stopped.train(steps_before)
    tensors = {name: tensor.data_ptr() for name, tensor in resumed.model.state_dict().items()}
    with gpusaver.Saver(stopped.state) as saver, gpusaver.Saver(resumed.state) as other:
        other.restore(saver.save(folder / "model", 1))
    assert {name: tensor.data_ptr() for name, tensor in resumed.model.state_dict().items()} == tensors
    assert same(resumed.values(), stopped.values())
    resumed.train(5)
    straight.train(steps_before + 5)
    assert same(resumed.values(), straight.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(optimizer: str, steps_before: int, tmp_path: Path) -> None:
    check_resumes(optimizer, "step", steps_before, tmp_path)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler: str, tmp_path: Path) -> None:
    check_resumes("momentum", scheduler, 4, tmp_path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_making_a_saver_changes_nothing(optimizer: str) -> None:
    watched, other = Run(optimizer), Run(optimizer)
    with gpusaver.Saver(watched.state):
        watched.train(3)
    other.train(3)
    assert same(watched.values(), other.values())


def test_a_run_that_went_on_goes_back(tmp_path: Path) -> None:
    """To before its first step, too: then the optimizer has no state, as then."""
    run = Run("NAdam")
    with gpusaver.Saver(run.state) as saver:
        fresh = saver.save(tmp_path / "model", 0)
        run.train(2)
        later, values = saver.save(tmp_path / "model", 2), [{**v} if isinstance(v, dict) else v for v in run.values()]
        values[0] = {name: tensor.clone() for name, tensor in values[0].items()}
        run.train(2)
        saver.restore(later)
        assert same(run.values()[0], values[0])
        assert run.state["step"] == 2
        saver.restore(fresh)
    assert run.optimizer.state_dict()["state"] == {}
    assert same(run.values(), Run("NAdam").values())


def test_models_that_change_their_tensors(tmp_path: Path) -> None:
    run = Run("SGD")
    with gpusaver.Saver(run.state) as saver:
        run.model.half()
        expected = run.model[0].weight.detach().clone()
        prefix = saver.save(tmp_path / "model")
        assert (
            gpusaver.load_checkpoint(prefix).get_variable_to_dtype_map()["model/0.weight"] is gpusaver.DataType.float16
        )
        run.model.load_state_dict({k: torch.ones_like(v) for k, v in run.model.state_dict().items()}, assign=True)
        saver.restore(prefix)
    assert torch.equal(run.model[0].weight, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float64", "complex64", "int8", "bool"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    values = torch.tensor([1.0, 0.0, 2.0]).to(getattr(torch, dtype))
    module = torch.nn.Module()
    module.register_buffer("b", values.clone())
    with gpusaver.Saver(gpusaver.torch.variables(m=module)) as saver:
        prefix = saver.save(tmp_path / "model")
        module.b.view(torch.uint8).zero_()
        saver.restore(prefix)
    assert torch.equal(module.b.view(torch.uint8), values.view(torch.uint8))
    assert gpusaver.load_checkpoint(prefix).get_variable_to_dtype_map() == {"m/b": gpusaver.DataType[dtype]}


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x: expected a torch\.nn\.Module"):
        gpusaver.torch.variables(x=torch.ones(1))
    model = torch.nn.Linear(2, 2)
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(gpusaver.FailedPreconditionError, match="LBFGS does not tell"):
        gpusaver.Saver(gpusaver.torch.variables(optimizer=lbfgs))


def test_a_manager(tmp_path: Path) -> None:
    straight = Run("Adam")
    straight.train(5)
    for _ in range(2):
        run = Run("Adam", seed=1)
        if not (tmp_path / "run").exists():
            run = Run("Adam")
        with gpusaver.CheckpointManager(run.state, tmp_path / "run", save_every_n_steps=3) as manager:
            manager.restore_or_initialize()
            while run.state["step"] < (3 if not run.state["step"] else 5):
                run.train(1)
                manager.step(run.state["step"])
    assert same(run.values(), straight.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_on_a_device(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    run = Run("Adam")
    run.model.cuda()
    run.state |= gpusaver.torch.variables(model=run.model, optimizer=torch.optim.Adam(run.model.parameters()))
    del run.state["scheduler"]
    before = run.model[0].weight.detach().clone()
    with gpusaver.Saver(run.state) as saver:
        prefix = saver.save(tmp_path / "model")
        run.model[0].weight.data.zero_()
        saver.restore(prefix)
    assert torch.equal(run.model[0].weight, before)


def test_a_pt_file_is_converted(tmp_path: Path) -> None:
    run = Run("Adam")
    run.train(2)
    content = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "epoch": 3, "note": "text"}
    content["bits"] = {
        "bf16": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "f8": torch.ones(3).to(torch.float8_e5m2),
    }
    content["odd"] = [torch.arange(12).reshape(3, 4).T, torch.zeros(0, 2)]
    torch.save(content, tmp_path / "a.pt")
    torch.save({"model": run.model.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    done = convert(tmp_path / "a.pt", tmp_path / "model")
    assert "note, which is no tensor or number" in done.left_out
    found = gpusaver.load(tmp_path / "model")
    for name, tensor in run.model.state_dict().items():
        assert np.array_equal(found[f"model/{name}"], tensor.numpy())
    assert found["epoch"] == 3
    assert found["bits/bf16"].tobytes() == bytes.fromhex("c03f0080")
    assert found["bits/f8"].dtype == gpusaver.DataType.float8_e5m2.numpy_dtype
    assert np.array_equal(found["odd/0"], np.arange(12).reshape(3, 4).T)
    assert convert(tmp_path / "old.pth", tmp_path / "old.safetensors").tensors == len(run.model.state_dict())


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pt")
    with pytest.raises(gpusaver.DataLossError, match="safe loader does not take it") as caught:
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert "\x1b" not in str(caught.value)
    (tmp_path / "b.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(gpusaver.DataLossError):
        convert(tmp_path / "b.pt", tmp_path / "out")
    with pytest.raises(gpusaver.NotFoundError):
        convert(tmp_path / "none.pt", tmp_path / "out")
