"""The protocol-buffer messages of the checkpoint formats, wire-compatible with TensorFlow's of the same name.

Three are public: `SaverDef`, `CheckpointState` and `MetaGraphDef`. Every function of gpusaver that takes one of them
takes TensorFlow's object too (see `gpusaver.protos.convert`). The modules `*_pb2` are generated from `proto/` by
`make protos` and may change in any release.

The messages live in the protobuf package `gpusaver` and in files registered as `gpusaver/protos/*.proto`, so TensorFlow
may be imported before or after. They are imported on first use: that needs protobuf's runtime, `import gpusaver` should
not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpusaver.protos.checkpoint_state_pb2 import CheckpointState
    from gpusaver.protos.meta_graph_pb2 import MetaGraphDef
    from gpusaver.protos.saver_pb2 import SaverDef

__all__ = ["CheckpointState", "MetaGraphDef", "SaverDef"]

_MODULES = {"CheckpointState": "checkpoint_state_pb2", "MetaGraphDef": "meta_graph_pb2", "SaverDef": "saver_pb2"}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = message  # the next access does not come here
    return message


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
