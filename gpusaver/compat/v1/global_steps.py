"""The variable that counts training steps."""

from __future__ import annotations

from typing import Any

from gpusaver.compat.v1.graph import Graph, Tensor, get_default_graph
from gpusaver.compat.v1.initializers import Zeros
from gpusaver.compat.v1.names import GraphKeys
from gpusaver.compat.v1.scopes import get_variable


def get_global_step(graph: Graph | None = None) -> Any:
    """The one of the collection ``global_step``, else the tensor "global_step:0"; None if there is none.

    TypeError if it is no integer scalar.
    """
    graph = graph or get_default_graph()
    found = graph.get_collection(GraphKeys.GLOBAL_STEP)
    if len(found) > 1:
        return None
    step: Any = found[0] if found else None
    if step is None:
        try:
            tensor = graph.get_tensor_by_name("global_step:0")
        except KeyError:
            return None
        step = next((v for v in graph.get_collection(GraphKeys.GLOBAL_VARIABLES) if v.op is tensor.op), tensor)
    assert_global_step(step)
    return step


def assert_global_step(global_step_tensor: Any) -> None:
    if not global_step_tensor.dtype.is_integer:
        raise TypeError(f"Existing 'global_step' does not have integer type: {global_step_tensor.dtype}")
    if global_step_tensor.get_shape().ndims not in (0, None):
        raise TypeError(f"Existing 'global_step' is not scalar: {global_step_tensor.get_shape()}")


def create_global_step(graph: Graph | None = None) -> Any:
    """ValueError if there is one."""
    graph = graph or get_default_graph()
    if get_global_step(graph) is not None:
        raise ValueError('"global_step" already exists.')
    with graph.as_default(), graph.name_scope(None):
        return get_variable(
            "global_step",
            [],
            "int64",
            Zeros(),
            trainable=False,
            collections=[GraphKeys.GLOBAL_VARIABLES, GraphKeys.GLOBAL_STEP],
        )


def get_or_create_global_step(graph: Graph | None = None) -> Any:
    graph = graph or get_default_graph()
    found = get_global_step(graph)
    return create_global_step(graph) if found is None else found


def global_step(sess: Any, global_step_tensor: Any) -> int:
    """Its value in ``sess``, an int."""
    if isinstance(global_step_tensor, Tensor) or hasattr(global_step_tensor, "as_graph_element"):
        return int(sess.run(global_step_tensor))
    raise TypeError(f"global_step_tensor: expected a tensor or a variable, found {global_step_tensor!r:.60}")
