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


KINDS = ["attribute", "no attribute", "input", "fewer inputs", "more inputs", "op", "name", "gone"]
#: What to do, to which node, and with what: numbers that are taken modulo the choices there are.
EDITS = st.tuples(st.sampled_from(KINDS), st.integers(0, NODES - 1), st.integers(0, 999), st.integers(0, 999))


def damaged(whole: MetaGraphDef, edits: list[tuple[str, int, int, int]]) -> MetaGraphDef:
    copy = MetaGraphDef()
    copy.CopyFrom(whole)
    nodes = copy.graph_def.node
    for kind, place, first, second in edits:
        node = nodes[place % len(nodes)]
        if kind == "attribute":
            node.attr[ATTRIBUTES[first % len(ATTRIBUTES)]].CopyFrom(VALUES[second % len(VALUES)])
        elif kind == "no attribute" and node.attr:
            del node.attr[sorted(node.attr)[first % len(node.attr)]]
        elif kind == "input" and node.input:
            other = nodes[second % len(nodes)].name
            choices = [*INPUTS, other, f"^{other}"]
            node.input[0] = choices[first % len(choices)]
        elif kind == "fewer inputs" and node.input:
            del node.input[-1]
        elif kind == "more inputs":
            node.input.append(nodes[first % len(nodes)].name)
        elif kind == "op":
            node.op = [*sorted(TABLE), "Nothing"][first % (len(TABLE) + 1)]
        elif kind == "name":
            node.name = ["", "-", "a b", nodes[second % len(nodes)].name][first % 4]
        elif kind == "gone":
            nodes.remove(node)
    return copy


@settings(max_examples=settings.default.max_examples // 4)  # each imports a whole graph
@given(st.sampled_from([0, 1]), st.lists(EDITS, min_size=1, max_size=3))
def test_refused_by_name_or_when_run(which: int, edits: list[tuple[str, int, int, int]]) -> None:
    with tf.Graph().as_default() as graph:
        refused = None
        try:
            tf.train.import_meta_graph(damaged(WHOLE[which], edits))
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
