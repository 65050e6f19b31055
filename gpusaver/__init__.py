"""GPU-aware checkpointing in TensorFlow's V2 format: tf.train.Saver for jobs that do not run TensorFlow.

>>> import gpusaver, numpy as np
>>> state = {"w": np.zeros(3, np.float32), "step": 0}
>>> saver = gpusaver.Saver(state)
>>> prefix = saver.save("/tmp/model.ckpt", 1)      # writes /tmp/model.ckpt-1.index, .data-..., .meta
>>> report = saver.restore(prefix)                 # into the same array

Log records go to the logger ``gpusaver``.
"""

import logging

from gpusaver.checkpoint_files import checkpoint_exists, get_checkpoint_mtimes, remove_checkpoint
from gpusaver.checkpoint_state import (
    checkpoints_iterator,
    generate_checkpoint_state_proto,
    get_checkpoint_state,
    update_checkpoint_state,
    wait_for_new_checkpoint,
)
from gpusaver.device.inventory import devices
from gpusaver.device.nvml import DeviceInfo
from gpusaver.errors import (
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    Error,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnimplementedError,
    UnknownError,
)
from gpusaver.finding import latest_checkpoint, verify
from gpusaver.importing import import_meta_graph
from gpusaver.manager import CheckpointManager, SaveProgress
from gpusaver.pending import PendingSave, SaveReport
from gpusaver.random_states import RandomStates, step_seed
from gpusaver.reader import CheckpointReader, list_variables, load, load_checkpoint, load_variable
from gpusaver.restoring import RestoreReport
from gpusaver.saver import Saver, save
from gpusaver.tensor import DataType, TensorSlice, TensorSpec
from gpusaver.variables import (
    PartitionedVariable,
    Variable,
    current_variables,
    reset_default_variables,
    variables,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "CancelledError",
    "CheckpointManager",
    "CheckpointReader",
    "DataLossError",
    "DataType",
    "DeadlineExceededError",
    "DeviceInfo",
    "Error",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "PartitionedVariable",
    "PendingSave",
    "PermissionDeniedError",
    "RandomStates",
    "ResourceExhaustedError",
    "RestoreReport",
    "SaveProgress",
    "SaveReport",
    "Saver",
    "TensorSlice",
    "TensorSpec",
    "UnimplementedError",
    "UnknownError",
    "Variable",
    "checkpoint_exists",
    "checkpoints_iterator",
    "current_variables",
    "devices",
    "generate_checkpoint_state_proto",
    "get_checkpoint_mtimes",
    "get_checkpoint_state",
    "import_meta_graph",
    "latest_checkpoint",
    "list_variables",
    "load",
    "load_checkpoint",
    "load_variable",
    "remove_checkpoint",
    "reset_default_variables",
    "save",
    "step_seed",
    "update_checkpoint_state",
    "variables",
    "verify",
    "wait_for_new_checkpoint",
]

logging.getLogger("gpusaver").addHandler(logging.NullHandler())
