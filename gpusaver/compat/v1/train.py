"""``tf.train``."""

from gpusaver.checkpoint_files import checkpoint_exists, get_checkpoint_mtimes
from gpusaver.checkpoint_files import remove_checkpoint as _remove_checkpoint
from gpusaver.checkpoint_state import (
    checkpoints_iterator,
    generate_checkpoint_state_proto,
    get_checkpoint_state,
    latest_checkpoint,
    update_checkpoint_state,
    wait_for_new_checkpoint,
)
from gpusaver.compat.v1.global_steps import (
    assert_global_step,
    create_global_step,
    get_global_step,
    get_or_create_global_step,
    global_step,
)
from gpusaver.compat.v1.initializing import init_from_checkpoint
from gpusaver.compat.v1.meta_graphs import export_meta_graph, import_meta_graph
from gpusaver.compat.v1.optimizers import AdamOptimizer, GradientDescentOptimizer, Optimizer
from gpusaver.compat.v1.saver import Saver
from gpusaver.protos import CheckpointState, MetaGraphDef, SaverDef
from gpusaver.reader import CheckpointReader, list_variables, load_checkpoint, load_variable


def NewCheckpointReader(filepattern: str) -> CheckpointReader:  # TensorFlow's name
    """A reader of the checkpoint with this prefix."""
    return CheckpointReader(filepattern)


def remove_checkpoint(
    checkpoint_prefix: str, checkpoint_format_version: int = SaverDef.V2, meta_graph_suffix: str = "meta"
) -> None:
    """Removes the files of a checkpoint, of either format whatever ``checkpoint_format_version`` says."""
    _remove_checkpoint(checkpoint_prefix, meta_graph_suffix)


__all__ = [
    "AdamOptimizer",
    "CheckpointState",
    "GradientDescentOptimizer",
    "MetaGraphDef",
    "NewCheckpointReader",
    "Optimizer",
    "Saver",
    "SaverDef",
    "assert_global_step",
    "checkpoint_exists",
    "checkpoints_iterator",
    "create_global_step",
    "export_meta_graph",
    "generate_checkpoint_state_proto",
    "get_checkpoint_mtimes",
    "get_checkpoint_state",
    "get_global_step",
    "get_or_create_global_step",
    "global_step",
    "import_meta_graph",
    "init_from_checkpoint",
    "latest_checkpoint",
    "list_variables",
    "load_checkpoint",
    "load_variable",
    "remove_checkpoint",
    "update_checkpoint_state",
    "wait_for_new_checkpoint",
]
