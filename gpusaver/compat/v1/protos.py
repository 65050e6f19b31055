"""The messages that scripts name: ``tf.GraphDef`` and its kin."""

from gpusaver.protos.graph_pb2 import GraphDef, NodeDef
from gpusaver.protos.meta_graph_pb2 import MetaGraphDef

__all__ = ["GraphDef", "MetaGraphDef", "NodeDef"]
