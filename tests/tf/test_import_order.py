"""Our messages and TensorFlow's in one process. Needs TensorFlow, so `make test` leaves this folder out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

OURS = """
from gpusaver.protos import (
    checkpoint_state_pb2, graph_pb2, meta_graph_pb2, saved_tensor_slice_pb2, saver_pb2, tensor_bundle_pb2,
    trackable_object_graph_pb2, types_pb2,
)
"""
THEIRS = """
import tensorflow as tf
"""
USE = """
from tensorflow.core.protobuf import meta_graph_pb2 as theirs_meta
from tensorflow.core.protobuf import saver_pb2 as theirs_saver
from tensorflow.python.training import checkpoint_state_pb2 as theirs_state

from gpusaver.protos import CheckpointState, MetaGraphDef, SaverDef
from gpusaver.protos.convert import adopt

given = theirs_saver.SaverDef(
    filename_tensor_name="save/Const:0", max_to_keep=7, sharded=True, keep_checkpoint_every_n_hours=0.25,
    version=theirs_saver.SaverDef.V2,
)
assert adopt(given, SaverDef) == SaverDef(
    filename_tensor_name="save/Const:0", max_to_keep=7, sharded=True, keep_checkpoint_every_n_hours=0.25,
    version=SaverDef.V2,
)

given = theirs_state.CheckpointState(
    model_checkpoint_path="b", all_model_checkpoint_paths=["a", "b"], all_model_checkpoint_timestamps=[1.5, 2.5],
    last_preserved_timestamp=0.5,
)
assert adopt(given, CheckpointState) == CheckpointState(
    model_checkpoint_path="b", all_model_checkpoint_paths=["a", "b"], all_model_checkpoint_timestamps=[1.5, 2.5],
    last_preserved_timestamp=0.5,
)

with tf.Graph().as_default():
    v = tf.compat.v1.get_variable("v", initializer=[1.0, 2.0])
    saver = tf.compat.v1.train.Saver(max_to_keep=3)
    given = tf.compat.v1.train.export_meta_graph(saver_def=saver.as_saver_def())
assert type(given) is theirs_meta.MetaGraphDef
adopted = adopt(given, MetaGraphDef)
assert adopted.saver_def.max_to_keep == 3
assert [node.name for node in adopted.graph_def.node] == [node.name for node in given.graph_def.node]
assert theirs_meta.MetaGraphDef.FromString(adopted.SerializeToString()) == given

for cls, wrong in [(SaverDef, theirs_state.CheckpointState()), (CheckpointState, given)]:
    try:
        adopt(wrong, cls)
    except TypeError as error:
        assert wrong.DESCRIPTOR.full_name in str(error) and cls.DESCRIPTOR.full_name in str(error)
    else:
        raise AssertionError("taken")
"""


@pytest.mark.parametrize("program", [OURS + THEIRS + USE, THEIRS + OURS + USE], ids=["ours-first", "tensorflow-first"])
def test_one_process_holds_both_in_either_order(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
