"""The states of random generators as variables: JSON in string scalars, never pickle.

::

    {"class": "PCG64", "state": {...}}          a NumPy Generator, by its bit generator, or a RandomState
    {"class": "random.Random", "state": [...]}  Python's
    arrays inside                               {"dtype": "uint64", "values": [...]}
"""

from __future__ import annotations

import json
import random
import types
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from gpusaver.errors import InvalidArgumentError

_PYTHON = "random.Random"


class RandomStates(MutableMapping[str, str]):
    """Random generators under names, as variables: a save stores their states, a restore sets them.

    >>> generator = np.random.default_rng(7)
    >>> state = {"w": w, "random": gpusaver.RandomStates(python=random, data=generator)}
    >>> saver = gpusaver.Saver(state)

    Values given: a NumPy Generator, BitGenerator or RandomState, ``numpy.random`` (its global one), a
    :class:`random.Random`, or the module ``random``.  They are held, not copied.  As a mapping, it gives each one's
    state as text, and setting an item sets the state; the set of names is fixed.

    CuPy's generators have no state that could be read: see :func:`step_seed`.

    Raises TypeError for any other value; setting raises InvalidArgumentError for text that is no such state.
    """

    def __init__(self, **generators: Any) -> None:
        self._generators = {name: _holder(name, value) for name, value in generators.items()}

    def __getitem__(self, name: str) -> str:
        return _to_text(self._generators[name])

    def __setitem__(self, name: str, text: str) -> None:
        if name not in self._generators:
            raise KeyError(f"{name}: the set of generators is fixed: {sorted(self._generators)}")
        _set_text(name, self._generators[name], text)

    def __delitem__(self, name: str) -> None:
        raise TypeError("the set of generators is fixed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._generators)

    def __len__(self) -> int:
        return len(self._generators)

    def __repr__(self) -> str:
        return f"<gpusaver.RandomStates {', '.join(self._generators)}>"


def step_seed(seed: int, step: int) -> int:
    """A seed for this step alone, below 2^63, for generators whose state cannot be stored, such as CuPy's.

    Seeded anew at the beginning of each step, a run that resumes at a step draws what it would have drawn:
    ``cupy.random.seed(gpusaver.step_seed(7, step))``.  Different steps and seeds give independent streams.  Neither
    number may be negative (ValueError).
    """
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1


def _holder(name: str, value: Any) -> Any:
    """The object that has the state."""
    if value is np.random:
        return np.random.mtrand._rand
    if isinstance(value, np.random.Generator):
        return value.bit_generator
    if value is random:
        return random._inst
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value
    if isinstance(value, np.random.BitGenerator | np.random.RandomState):
        return value
    what = value.__name__ if isinstance(value, types.ModuleType) else type(value).__name__
    raise TypeError(
        f"{name}: expected a generator of NumPy or of the module random, found {what}; for CuPy's, whose state cannot "
        "be read, see gpusaver.step_seed"
    )


def _to_text(holder: Any) -> str:
    if isinstance(holder, random.Random):
        return json.dumps({"class": _PYTHON, "state": holder.getstate()})
    state = holder.get_state(legacy=False) if isinstance(holder, np.random.RandomState) else holder.state
    return json.dumps({"class": state["bit_generator"], "state": _plain(state)})


def _set_text(name: str, holder: Any, text: str) -> None:
    try:
        stored = json.loads(text)
        kind, state = stored["class"], stored["state"]
        if isinstance(holder, random.Random):
            expected = _PYTHON
        elif isinstance(holder, np.random.RandomState):
            expected = holder.get_state(legacy=False)["bit_generator"]
        else:
            expected = holder.state["bit_generator"]
        if kind != expected:
            raise InvalidArgumentError(f"{name}: the stored state is of {kind}, the generator is {expected}")
        if isinstance(holder, random.Random):
            version, numbers, gauss = state
            holder.setstate((version, tuple(numbers), gauss))
            return
        _check_positions(state)
        if isinstance(holder, np.random.RandomState):
            holder.set_state(_with_arrays(state))
        else:
            holder.state = _with_arrays(state)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{name}: this is no state of a random generator: {text!r:.100}: {error}") from error


def _check_positions(state: Any) -> None:
    """NumPy believes them, and would read beyond the arrays that they are positions in."""
    for found in (state, state["state"]):
        if not isinstance(found, dict):
            raise TypeError(f"expected a dict, found {type(found).__name__}")
        if not (0 <= found.get("pos", 0) <= 624 and 0 <= found.get("buffer_pos", 0) <= 4):
            raise ValueError("a position outside of its array")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "values"}:
        if value["dtype"] not in ("uint32", "uint64"):
            raise ValueError(f"arrays of {value['dtype']} are in no state")
        return np.array(value["values"], value["dtype"])
    return {key: _with_arrays(item) for key, item in value.items()}
