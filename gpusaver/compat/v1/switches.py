"""What scripts call before they begin."""

from __future__ import annotations

from gpusaver.compat.v1.variables import disable_resource_variables, enable_resource_variables


def disable_eager_execution() -> None:
    """Nothing to do: there is no eager execution."""


def executing_eagerly() -> bool:
    return False


def disable_v2_behavior() -> None:
    """Variables made from now on are reference variables, as in TensorFlow."""
    disable_resource_variables()


def enable_v2_behavior() -> None:
    enable_resource_variables()
