"""Graphs that somebody has tampered with: refused by name, or imported and refused when run; never another error."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import gpusaver.compat.v1 as tf
from gpusaver.compat.v1.table import TABLE
from gpusaver.metagraph.reading import read_meta_graph
from gpusaver.protos import MetaGraphDef
from gpusaver.protos.graph_pb2 import AttrValue

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WHOLE = [read_meta_graph(GOLDEN / folder / "net-3.meta") for folder in ("meta_graph_tf1", "meta_graph_tf2")]
NODES = max(len(meta_graph.graph_def.node) for meta_graph in WHOLE)
VALUES = [
    AttrValue(),
    AttrValue(i=-3),
    AttrValue(i=2**40),
    AttrValue(type=1),  # type: ignore[arg-type]
    AttrValue(type=3),  # type: ignore[arg-type]
    AttrValue(type=99),  # type: ignore[arg-type]
    AttrValue(s=b"\xff"),
    AttrValue(b=True),
    AttrValue(f=0.5),
    AttrValue(list=AttrValue.ListValue(i=[1, 2])),
    AttrValue(list=AttrValue.ListValue(type=[1, 3])),  # type: ignore[list-item]
]
ATTRIBUTES = ["T", "dtype", "N", "shape", "value", "dtypes", "axis", "transpose_a", "keep_dims", "shared_name", "num"]
INPUTS = ["", "^", ":", "^net/w:1", "net/w:7", "net/w:-1", "net/w:x", "nothing", "save/Const"]


@st.composite
def damages(draw: st.DrawFn) -> MetaGraphDef:
    damaged = MetaGraphDef()
    damaged.CopyFrom(draw(st.sampled_from(WHOLE)))
    nodes = damaged.graph_def.node
    for _ in range(draw(st.integers(1, 3))):
        node = nodes[draw(st.integers(0, NODES - 1)) % len(nodes)]
        kind = draw(st.sampled_from(["attr", "drop", "input", "less", "more", "op", "name", "gone"]))
        if kind == "attr":
            node.attr[draw(st.sampled_from(ATTRIBUTES))].CopyFrom(draw(st.sampled_from(VALUES)))
        elif kind == "drop" and node.attr:
            del node.attr[draw(st.sampled_from(sorted(node.attr)))]
        elif kind == "input" and node.input:
            other = nodes[draw(st.integers(0, NODES - 1)) % len(nodes)].name
            node.input[0] = draw(st.sampled_from([*INPUTS, other, f"^{other}"]))
        elif kind == "less" and node.input:
            del node.input[-1]
        elif kind == "more":
            node.input.append(nodes[0].name)
        elif kind == "op":
            node.op = draw(st.sampled_from([*sorted(TABLE), "Nothing"]))
        elif kind == "name":
            node.name = draw(st.sampled_from(["", "-", "a b", nodes[0].name]))
        elif kind == "gone":
            nodes.remove(node)
    return damaged


@settings(max_examples=settings.default.max_examples // 4)  # each imports a whole graph
@given(damages())
def test_refused_by_name_or_when_run(damaged: MetaGraphDef) -> None:
    with tf.Graph().as_default() as graph:
        refused = None
        try:
            tf.train.import_meta_graph(damaged)
        except (ValueError, OSError, KeyError, tf.errors.OpError) as error:
            refused = str(error)
        if refused is not None:
            assert refused
            return
        with tf.Session() as session:
            for name in ("init", "net/y", "Adam"):
                op = graph.find(name)
                if op is not None:
                    with contextlib.suppress(tf.errors.OpError):
                        session.run(op)
        assert graph.as_graph_def().node
