"""Reading what may be damaged: an error of ours, or exactly what was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpusaver import Error


def exact(arrays: dict[str, Any]) -> dict[str, Any]:
    """For comparing every bit, NaN's too."""
    return {
        name: np.array(array, object).tolist() if array.dtype == object else array.tobytes()
        for name, array in ((name, np.asarray(value)) for name, value in arrays.items())
    }


def outcome(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the error of ours that it raises; any other fails the test."""
    try:
        return call()
    except Error as error:
        return error


def is_refused(read: Callable[[], dict[str, Any]], expected: dict[str, Any], *named: str) -> bool:
    """Whether ``read`` raised an error of ours with these words in it; if it did not, it must have read rightly."""
    found = outcome(read)
    if not isinstance(found, Error):
        assert found == expected, "wrong values were read silently"
        return False
    for word in named:
        assert word in str(found)
    return True
