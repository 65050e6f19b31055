"""A MetaGraphDef of variables, serialized, in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpusaver.metagraph.building import variables_meta_graph
from gpusaver.metagraph.saver_nodes import Saveable


def octets_of(saveables: Sequence[Saveable], **options: Any) -> bytes:
    octets = bytearray()
    variables_meta_graph(saveables, **options, emit=octets.extend)
    return bytes(octets)
