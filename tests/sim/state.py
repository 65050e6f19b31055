"""The engine that the installed module belongs to."""

from __future__ import annotations

from sim.engine import Engine

_active: list[Engine] = []


def activate(engine: Engine) -> None:
    _active.append(engine)


def deactivate() -> None:
    _active.pop()


def active() -> Engine:
    if not _active:
        raise RuntimeError("the simulated CuPy is used outside of the test that installed it")
    return _active[-1]
