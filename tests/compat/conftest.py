from __future__ import annotations

from collections.abc import Iterator

import pytest

import gpusaver.compat.v1 as tf


@pytest.fixture(autouse=True)
def fresh_graph() -> Iterator[None]:
    """Each test has a default graph of its own, and resource variables unless it says otherwise."""
    with tf.Graph().as_default():
        yield
    tf.enable_resource_variables()
