"""CheckpointManager: what a training loop needs around a Saver."""

from gpusaver.manager.manager import CheckpointManager
from gpusaver.manager.progress import SaveProgress

__all__ = ["CheckpointManager", "SaveProgress"]
