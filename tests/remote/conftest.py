"""What the tests of object stores share."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator

import pytest
from proxy import Proxy

collect_ignore_glob = [] if importlib.util.find_spec("obstore") else ["test_*.py"]

_numbers = itertools.count()


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """An empty place in an object store."""
    if request.param == "memory":
        return f"memory://tests/{next(_numbers)}"
    request.getfixturevalue("s3")
    return f"s3://bucket/{next(_numbers)}"


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    with Proxy(s3_endpoint) as proxy:
        yield proxy
