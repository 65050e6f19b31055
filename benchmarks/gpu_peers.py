"""The libraries that are compared on a GPU, each at its defaults and tuned as its documents advise.

All share the same device memory: PyTorch and JAX see the CuPy arrays by DLPack.  Every restore ends in the arrays that
were there before.  Libraries are imported when their peer is made; one that cannot be is left out, with its reason.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from gpu_state import State

_RING_NBYTES = 32 << 20
_WRITERS = 8


class Pending:
    """A save under way; this one has ended.  ``report``: gpusaver's, None of other libraries."""

    report: Any = None

    def fence(self) -> None:
        """Before the update that changes the arrays."""

    def done(self) -> bool:
        return True

    def result(self) -> None:
        """Returns when the library says that it is done."""


class GpuPeer:
    """``state``: what is saved, into files in ``directory``.

    ``is_tuned``: as the library's documents advise, else at its defaults.  ``is_ours``: gpusaver.  ``staging_nbytes``:
    pinned memory that a save which leaves the arrays in place, until the fence, may fill ahead of its writers.
    ``report``: of the last save of gpusaver that was measured, None of other libraries.  ``recycles``: writes over the
    files that it finds, which stay there between its saves, and so is no measure of others, or of acceptance lines.
    """

    distributions: ClassVar[tuple[str, ...]] = ()
    is_tuned: ClassVar[bool] = False
    is_ours: ClassVar[bool] = False
    recycles: ClassVar[bool] = False

    def __init__(self, state: State, directory: str) -> None:
        self.state = state
        self.directory = directory
        self.staging_nbytes: int | None = None
        self.report: Any = None

    def begin(self) -> Pending:
        """The call, after which training goes on."""
        raise NotImplementedError

    def restore(self) -> None:
        """Queues or does whatever gives the arrays the values of the last save."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives memory and threads back."""

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in cls.distributions}


class _Begun(Pending):
    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def fence(self) -> None:
        self._pending.fence()

    def done(self) -> bool:
        return bool(self._pending.done())

    def result(self) -> None:
        self._pending.result()
        self.report = self._pending.report


class Gpusaver(GpuPeer):
    is_ours = True
    capture: ClassVar[str] = "snapshot"
    is_staged: ClassVar[bool] = False

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        import gpusaver

        staging = state.nbytes + _RING_NBYTES if self.is_staged else _RING_NBYTES
        self.staging_nbytes = staging if self.capture == "deferred" else None
        self._saver = gpusaver.Saver(dict(state.arrays), staging_bytes=staging, recycle=self.recycles)
        self._saver.warmup(self.path("model.ckpt"))

    def begin(self) -> Pending:
        pending = self._saver.save_async(self.path("model.ckpt"), capture=self.capture)  # type: ignore[arg-type]
        return _Begun(pending)

    def restore(self) -> None:
        self._saver.restore(self.path("model.ckpt"))

    def close(self) -> None:
        self._saver.close()

    @classmethod
    def versions(cls) -> dict[str, str]:
        import gpusaver

        return {"gpusaver": gpusaver.__version__}


class GpusaverDeferred(Gpusaver):
    """With as much pinned memory as the state: copies run at the link's speed."""

    capture = "deferred"
    is_staged = True


class GpusaverRing(Gpusaver):
    """Through the default ring of 32 MiB: copies run at the writers' speed."""

    capture = "deferred"


class GpusaverRecycle(Gpusaver):
    """A snapshot, written over the files of the checkpoint before the last one."""

    recycles = True

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        for _ in range(2):  # the third save has a file to write over
            self._saver.save(self.path("model.ckpt"))


class GpusaverBlocking(Gpusaver):
    """``save()``."""

    capture = "blocking"

    def begin(self) -> Pending:
        self._saver.save(self.path("model.ckpt"))
        return Pending()


class CupySavez(GpuPeer):
    """Its documents know no tuning."""

    def begin(self) -> Pending:
        self.state.cupy.savez(self.path("state.npz"), **self.state.plain)
        return Pending()

    def restore(self) -> None:
        with np.load(self.path("state.npz")) as file:
            for name, array in self.state.plain.items():
                array.set(file[name])

    @classmethod
    def versions(cls) -> dict[str, str]:
        import cupy

        return {"cupy": cupy.__version__}


class _Torch(GpuPeer):
    """Tensors on the arrays' own memory."""

    distributions = ("torch",)

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        import torch

        self.torch = torch
        self.tensors = {name: torch.from_dlpack(array) for name, array in state.plain.items()}
        if state.workload.dtype != np.float32:
            self.tensors = {name: tensor.view(torch.bfloat16) for name, tensor in self.tensors.items()}

    def copy_back(self, loaded: dict[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(loaded[name], non_blocking=True)


class TorchSave(_Torch):
    def begin(self) -> Pending:
        self.torch.save(self.tensors, self.path("state.pt"))
        return Pending()

    def restore(self) -> None:
        self.copy_back(self.torch.load(self.path("state.pt"), weights_only=True))


class TorchSaveTuned(TorchSave):
    """Copies through pinned memory, without checksums; back through a mapped file."""

    is_tuned = True

    def begin(self) -> Pending:
        from torch.utils.serialization import config

        with config.patch({"save.use_pinned_memory_for_d2h": self.torch.cuda.is_available()}):
            before = self.torch.serialization.get_crc32_options()
            self.torch.serialization.set_crc32_options(False)
            try:
                return super().begin()
            finally:
                self.torch.serialization.set_crc32_options(before)

    def restore(self) -> None:
        self.copy_back(self.torch.load(self.path("state.pt"), weights_only=True, mmap=True, map_location="cpu"))


class Dcp(_Torch):
    """torch.distributed.checkpoint, in one process."""

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        import torch.distributed.checkpoint as dcp

        self.dcp = dcp

    def writer(self) -> Any:
        return self.dcp.FileSystemWriter(self.path("dcp"))

    def begin(self) -> Pending:
        self.dcp.save(self.tensors, storage_writer=self.writer(), no_dist=True)
        return Pending()

    def restore(self) -> None:
        self.dcp.load(self.tensors, checkpoint_id=self.path("dcp"), no_dist=True)


class DcpTuned(Dcp):
    """Several writers, each with more copies under way."""

    is_tuned = True

    def writer(self) -> Any:
        return self.dcp.FileSystemWriter(self.path("dcp"), thread_count=_WRITERS, per_thread_copy_ahead=64 << 20)


class _Future(Pending):
    def __init__(self, future: Any, staged: Any = None) -> None:
        self._future, self._staged = future, staged

    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def done(self) -> bool:
        return bool(self._future.done())

    def result(self) -> None:
        self._future.result()


class DcpAsync(Dcp):
    def begin(self) -> Pending:
        return _Future(self.dcp.async_save(self.tensors, storage_writer=self.writer(), no_dist=True))


class DcpAsyncTuned(DcpTuned):
    """Staged into pinned memory that is kept, asynchronously, until the update; several writers.

    PyTorch 2.11 closes the inner stager after every save: its memory is lost, and the next save fails with KeyError
    (pytorch#183413, repaired since).  Here it is closed at the end, as its documents have it.
    """

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        on_gpu = self.torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(on_gpu, False, True, on_gpu))
        self._inner = self._stager._state_dict_stager
        self._inner.close = lambda: None

    def begin(self) -> Pending:
        response = self.dcp.async_save(
            self.tensors, storage_writer=self.writer(), async_stager=self._stager, no_dist=True
        )
        return _Future(response.upload_completion, response.staging_completion)

    def close(self) -> None:
        del self._inner.close
        self._stager.close()


class Safetensors(_Torch):
    distributions = ("safetensors", "torch")

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        import safetensors
        import safetensors.torch

        self.safetensors = safetensors

    def begin(self) -> Pending:
        self.safetensors.torch.save_file(self.tensors, self.path("state.safetensors"))
        return Pending()

    def restore(self) -> None:
        self.copy_back(self.safetensors.torch.load_file(self.path("state.safetensors")))


class SafetensorsTuned(Safetensors):
    """Read straight to the device, tensor by tensor."""

    is_tuned = True

    def restore(self) -> None:
        device = "cuda" if self.torch.cuda.is_available() else "cpu"
        with self.safetensors.safe_open(self.path("state.safetensors"), framework="pt", device=device) as file:
            for name, tensor in self.tensors.items():
                tensor.copy_(file.get_tensor(name), non_blocking=True)


class Orbax(GpuPeer):
    """``AsyncCheckpointer`` over a flat tree of JAX arrays."""

    distributions = ("orbax-checkpoint", "jax")

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import orbax.checkpoint as ocp

        self._jax, self._ocp = jax, ocp
        self._checkpointer = ocp.AsyncCheckpointer(self.handler())
        self._number = 0

    def handler(self) -> Any:
        return self._ocp.PyTreeCheckpointHandler()

    def tree(self) -> dict[str, Any]:
        """Made anew for each save: JAX takes arrays for constant, and keeps what it once copied to the host."""
        self.state.synchronize()
        return {name.replace("/", "."): self._jax.dlpack.from_dlpack(a) for name, a in self.state.plain.items()}

    def begin(self) -> Pending:
        self._number += 1
        self._checkpointer.save(self.path(f"orbax-{self._number}"), args=self._ocp.args.PyTreeSave(self.tree()))
        return _Checkpointing(self._checkpointer)

    def restore(self) -> None:
        arguments = self._ocp.checkpoint_utils.construct_restore_args(self.tree())
        restored = self._checkpointer.restore(
            self.path(f"orbax-{self._number}"),
            args=self._ocp.args.PyTreeRestore(self.tree(), restore_args=arguments),
        )
        for name, array in self.state.plain.items():
            values = restored[name.replace("/", ".")]
            values.block_until_ready()
            array[...] = values if isinstance(array, np.ndarray) else self.state.cupy.from_dlpack(values)

    def close(self) -> None:
        self._checkpointer.close()


class OrbaxTuned(Orbax):
    """More bytes on the way at once, and Zarr 3."""

    is_tuned = True

    def handler(self) -> Any:
        return self._ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, save_concurrent_gb=64, restore_concurrent_gb=64
        )


class _Checkpointing(Pending):
    """Orbax tells the end by returning from a call, which a thread waits for."""

    def __init__(self, checkpointer: Any) -> None:
        self._checkpointer = checkpointer
        self._waiting = threading.Thread(target=checkpointer.wait_until_finished)
        self._waiting.start()

    def done(self) -> bool:
        return not self._waiting.is_alive()

    def result(self) -> None:
        self._waiting.join()
        self._checkpointer.check_for_errors()


GPU_PEERS: dict[str, type[GpuPeer]] = {
    "gpusaver snapshot": Gpusaver,
    "gpusaver deferred": GpusaverDeferred,
    "gpusaver deferred, ring": GpusaverRing,
    "gpusaver recycle": GpusaverRecycle,
    "gpusaver blocking": GpusaverBlocking,
    "cupy.savez": CupySavez,
    "torch.save": TorchSave,
    "torch.save tuned": TorchSaveTuned,
    "torch DCP": Dcp,
    "torch DCP tuned": DcpTuned,
    "torch DCP async": DcpAsync,
    "torch DCP async tuned": DcpAsyncTuned,
    "safetensors": Safetensors,
    "safetensors tuned": SafetensorsTuned,
    "Orbax async": Orbax,
    "Orbax async tuned": OrbaxTuned,
}


@contextlib.contextmanager
def peer_of(name: str, state: State, directory: str) -> Iterator[GpuPeer]:
    peer = GPU_PEERS[name](state, directory)
    try:
        yield peer
    finally:
        peer.close()
