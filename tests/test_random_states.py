"""Random generators as variables."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.errors import InvalidArgumentError

BIT_GENERATORS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]

MAKERS: dict[str, Any] = {
    **{kind.__name__: lambda kind=kind: np.random.Generator(kind(7)) for kind in BIT_GENERATORS},
    "RandomState": lambda: np.random.RandomState(7),
    "random.Random": lambda: random.Random(7),
}


def draws(generator: Any, count: int = 5) -> list[float]:
    """An odd number of 32-bit draws, and of normal ones, which both leave something in the generator's buffers."""
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(count)] + [generator.random()]
    integers = generator.integers if isinstance(generator, np.random.Generator) else generator.randint
    return [*generator.standard_normal(count).tolist(), int(integers(1 << 31)), *generator.random(3).tolist()]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_generator_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    generator = MAKERS[kind]()
    draws(generator)
    state = {"w": np.zeros(2), "random": gpusaver.RandomStates(data=generator)}
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "k")
        expected = draws(generator, 50)
        assert draws(generator, 50) != expected
        saver.restore(prefix)
        assert draws(generator, 50) == expected
    other = MAKERS[kind]()  # a process that was started anew
    with gpusaver.Saver({"random": gpusaver.RandomStates(data=other)}) as saver:
        saver.restore(prefix)
    assert draws(other, 50) == expected
    assert json.loads(gpusaver.load(prefix)["random/data"])["class"] == {"RandomState": "MT19937"}.get(kind, kind)


def test_the_global_ones(tmp_path: Path) -> None:
    states = gpusaver.RandomStates(python=random, numpy=np.random)
    with gpusaver.Saver(states) as saver:
        prefix = saver.save(tmp_path / "k")
        expected = (random.random(), np.random.standard_normal(3).tolist())
        saver.restore(prefix)
        assert (random.random(), np.random.standard_normal(3).tolist()) == expected


def test_the_mapping() -> None:
    states = gpusaver.RandomStates(a=random.Random(1), b=np.random.default_rng(2))
    assert list(states) == ["a", "b"]
    assert len(states) == 2
    assert repr(states) == "<gpusaver.RandomStates a, b>"
    with pytest.raises(KeyError, match="fixed"):
        states["c"] = "{}"
    with pytest.raises(TypeError, match="fixed"):
        del states["a"]


@pytest.mark.parametrize("value", [np, 7, random.SystemRandom(), None, "text"])
def test_what_has_no_state(value: Any) -> None:
    with pytest.raises(TypeError, match="step_seed"):
        gpusaver.RandomStates(x=value)


def changed(text: str, **changes: Any) -> str:
    stored = json.loads(text)
    where = stored["state"]
    for key, value in changes.items():
        for found in (where, where["state"]):
            if key in found:
                found[key] = value
    return json.dumps(stored)


MT = gpusaver.RandomStates(x=np.random.MT19937(1))["x"]
PHILOX = gpusaver.RandomStates(x=np.random.Philox(1))["x"]
HOSTILE = {
    "no JSON": (np.random.MT19937, "no"),
    "deep": (np.random.MT19937, "[" * 100_000),
    "a number": (np.random.MT19937, "7"),
    "nothing in it": (np.random.MT19937, "{}"),
    "of another class": (np.random.PCG64, MT),
    "position beyond the array": (np.random.MT19937, changed(MT, pos=10**6)),
    "position before the array": (np.random.MT19937, changed(MT, pos=-5)),
    "position of a buffer": (np.random.Philox, changed(PHILOX, buffer_pos=-1)),
    "a short array": (np.random.MT19937, changed(MT, key={"dtype": "uint32", "values": [1, 2]})),
    "a strange dtype": (np.random.MT19937, changed(MT, key={"dtype": "object", "values": [1]})),
    "no array": (np.random.MT19937, changed(MT, key="x")),
    "a huge number": (np.random.PCG64, changed(gpusaver.RandomStates(x=np.random.PCG64(1))["x"], state=1 << 200)),
}


@pytest.mark.parametrize(("kind", "text"), HOSTILE.values(), ids=HOSTILE)
def test_text_that_is_no_state(kind: Any, text: str) -> None:
    generator = kind(1)
    states = gpusaver.RandomStates(x=generator)
    with pytest.raises(InvalidArgumentError, match="x: "):
        states["x"] = text
    np.random.Generator(generator).random(5)  # still works


def test_text_that_is_no_state_of_python() -> None:
    states = gpusaver.RandomStates(x=random.Random(1))
    before = states["x"]
    for text in ("{}", MT, json.dumps({"class": "random.Random", "state": [3, [1] * 625, None, 4]}), "null"):
        with pytest.raises(InvalidArgumentError):
            states["x"] = text
    assert states["x"] == before


def test_seeds_of_steps() -> None:
    seeds = {gpusaver.step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert gpusaver.step_seed(7, 3) == 2530781778362038830  # resumed runs depend on it
    with pytest.raises(ValueError, match="non-negative"):
        gpusaver.step_seed(7, -1)
