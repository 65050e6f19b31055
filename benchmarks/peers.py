"""The libraries that are compared, and the raw writes that bound them: one class each, the same four operations.

Every restore ends in the arrays that were there before, which is what a training job needs; each library gets there
by the fastest way that its documentation shows.  Libraries are imported when their peer is made, so that each can
live in an environment of its own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
from workloads import ARRAY_ALIGNMENT, Arrays

_PIECE_NBYTES = 8 << 20
_BATCH_NBYTES = 64 << 20
_MAX_BUFFERS = 128


_WHOLE = frozenset({"save", "next", "restore", "cold"})
_PARTS = _WHOLE | {"list", "some"}


class Peer:
    """Saves ``arrays`` into files in ``directory`` and gets them back from there.

    ``environment``: which of the driver's Pythons has the library.  ``process``: peers that name the same share one.
    ``distributions``: whose versions are reported.  ``is_ceiling``: not a library but what bounds them, and
    ``is_written`` whether by a file.  ``orders``: what can be measured, as :mod:`worker` names it.  ``keeps_one``:
    saves remove the checkpoint before, of which the third is the first to be like all that follow.
    """

    environment: ClassVar[str] = "bench"
    process: ClassVar[str | None] = None
    distributions: ClassVar[tuple[str, ...]] = ()
    is_ceiling: ClassVar[bool] = False
    is_written: ClassVar[bool] = True
    keeps_one: ClassVar[bool] = False
    orders: ClassVar[frozenset[str]] = _WHOLE

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        self.arrays = arrays
        self.some = dict(itertools.islice(arrays.items(), 0, None, 100))
        self.block = block
        self.directory = directory

    def save(self) -> None:
        """Returns when the library says that it is done."""
        raise NotImplementedError

    def wait(self) -> None:
        """For the end of the last save, if :meth:`save` did not."""

    def restore(self) -> None:
        """Returns when the arrays have the values of the last save."""
        raise NotImplementedError

    def list_names(self) -> int:
        """How many there are, with their shapes, in a file that has yet to be opened."""
        raise NotImplementedError

    def restore_some(self, arrays: Arrays) -> None:
        """The same as :meth:`restore` of some of the arrays."""
        raise NotImplementedError

    def clear(self) -> None:
        for array in self.arrays.values():
            array.fill(0)

    def digest(self) -> int:
        value = 0
        for array in self.arrays.values():
            value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), value)
        return value

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in cls.distributions}


class Gpusaver(Peer):
    """As documented: one Saver for the job, which also keeps the state file and syncs everything.

    Without a `.meta` file, which no other has: TensorFlow's Saver writes none here either.
    """

    process = "gpusaver"
    orders = _PARTS
    direct_io: ClassVar[Any] = None
    write_meta_graph: ClassVar[bool] = False

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        import gpusaver

        self._gpusaver = gpusaver
        self._saver = gpusaver.Saver(dict(arrays), direct_io=self.direct_io)

    def save(self) -> None:
        self._saver.save(self.path("model.ckpt"), write_meta_graph=self.write_meta_graph)

    def restore(self) -> None:
        self._saver.restore(self.path("model.ckpt"))

    def list_names(self) -> int:
        return len(self._gpusaver.list_variables(self.path("model.ckpt")))

    def restore_some(self, arrays: Arrays) -> None:
        self._gpusaver.Saver(dict(arrays)).restore(self.path("model.ckpt"))

    @classmethod
    def versions(cls) -> dict[str, str]:
        import gpusaver

        return {"gpusaver": gpusaver.__version__}


class GpusaverCached(Gpusaver):
    direct_io = False


class GpusaverDirect(Gpusaver):
    direct_io = True


class GpusaverTwoFiles(Gpusaver):
    """A data file each for two devices, as TensorFlow has them: here numbered CPU devices, which are one memory."""

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        half, position = sum(array.nbytes for array in arrays.values()) / 2, 0
        variables = []
        with self._gpusaver.variables():
            for name, array in arrays.items():
                variables.append(self._gpusaver.Variable(array, name, device="cpu:0" if position < half else "cpu:1"))
                position += array.nbytes
        self._saver = self._gpusaver.Saver(variables, sharded=True)


class GpusaverMeta(Gpusaver):
    """Each save finds an empty folder, and so writes a `.meta` file; in a training job only the first one does."""

    write_meta_graph = True


class GpusaverRecycle(Gpusaver):
    """Keeps one checkpoint, and writes over the file of the one before that."""

    orders = frozenset({"save", "next"})
    keeps_one = True

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        self._saver = self._gpusaver.Saver(dict(arrays), max_to_keep=1, recycle=True)
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._last = self._saver.save(self.path("model.ckpt"), self._step, write_meta_graph=self.write_meta_graph)

    def restore(self) -> None:
        self._saver.restore(self._last)


class GpusaverAsync(Gpusaver):
    """The arrays may change when the call returns."""

    orders = frozenset({"save"})

    def save(self) -> None:
        self._pending = self._saver.save_async(
            self.path("model.ckpt"), capture="snapshot", write_meta_graph=self.write_meta_graph
        )

    def wait(self) -> None:
        self._pending.result()


class Torch(Peer):
    """``torch.save`` of a state dict; back through a mapped file, so that no second state is ever allocated."""

    process = "torch"
    orders = _PARTS
    distributions = ("torch",)

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        import torch

        self._torch = torch
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def save(self) -> None:
        self._torch.save(self._tensors, self.path("state.pt"))

    def restore(self) -> None:
        self._copy_from(self._open(), self._tensors)

    def restore_some(self, arrays: Arrays) -> None:
        self._copy_from(self._open(), arrays)

    def list_names(self) -> int:
        return len([(name, tensor.shape) for name, tensor in self._open().items()])

    def _open(self) -> Any:
        return self._torch.load(self.path("state.pt"), mmap=True, weights_only=True)

    def _copy_from(self, loaded: Any, wanted: Iterable[str]) -> None:
        for name in wanted:
            self._tensors[name].copy_(loaded[name])


class Dcp(Torch):
    """``torch.distributed.checkpoint`` in one process, which loads in place."""

    orders = _WHOLE
    threads: ClassVar[int] = 1

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        import torch.distributed.checkpoint

        self._dcp = torch.distributed.checkpoint

    def save(self) -> None:
        writer = self._dcp.FileSystemWriter(self.path("dcp"), thread_count=self.threads)
        self._dcp.save(self._tensors, storage_writer=writer, no_dist=True)

    def restore(self) -> None:
        self._dcp.load(self._tensors, checkpoint_id=self.path("dcp"), no_dist=True)


class DcpThreads(Dcp):
    threads = 4


class DcpAsync(DcpThreads):
    """The arrays may change when the call returns: they are copied, into memory that is kept for the next time."""

    orders = frozenset({"save"})

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        staging = importlib.import_module("torch.distributed.checkpoint.staging")
        self._stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))

    def save(self) -> None:
        writer = self._dcp.FileSystemWriter(self.path("dcp"), thread_count=self.threads)
        self._future = self._dcp.async_save(
            self._tensors, storage_writer=writer, async_stager=self._stager, no_dist=True
        )

    def wait(self) -> None:
        self._future.result()


class Orbax(Peer):
    """``StandardCheckpointer``, which writes in the background: the call returns when the arrays may change."""

    environment = "orbax"
    distributions = ("orbax-checkpoint", "jax")

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        import orbax.checkpoint

        self._checkpointer = orbax.checkpoint.StandardCheckpointer()

    def save(self) -> None:
        self._checkpointer.save(self.path("orbax"), self.arrays)

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def restore(self) -> None:
        loaded = self._checkpointer.restore(self.path("orbax"), self.arrays)
        for name, array in self.arrays.items():
            np.copyto(array, loaded[name])


class Safetensors(Peer):
    """``safetensors.numpy``; back tensor by tensor."""

    orders = _PARTS
    distributions = ("safetensors",)

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        import safetensors
        import safetensors.numpy

        self._open = safetensors.safe_open
        self._save_file = safetensors.numpy.save_file

    def save(self) -> None:
        self._save_file(self.arrays, self.path("state.safetensors"))

    def restore(self) -> None:
        self.restore_some(self.arrays)

    def restore_some(self, arrays: Arrays) -> None:
        with self._open(self.path("state.safetensors"), framework="numpy") as file:
            for name, array in arrays.items():
                np.copyto(array, file.get_tensor(name))

    def list_names(self) -> int:
        with self._open(self.path("state.safetensors"), framework="numpy") as file:
            return len([(name, file.get_slice(name).get_shape()) for name in file.keys()])  # noqa: SIM118


class Npz(Peer):
    """Names can be listed, but not shapes."""

    orders = _WHOLE | {"some"}
    distributions = ("numpy",)

    def save(self) -> None:
        np.savez(self.path("state.npz"), **self.arrays)  # type: ignore[arg-type]

    def restore(self) -> None:
        self.restore_some(self.arrays)

    def restore_some(self, arrays: Arrays) -> None:
        with np.load(self.path("state.npz")) as file:
            for name, array in arrays.items():
                np.copyto(array, file[name])


class TensorFlow(Peer):
    """``tf.compat.v1.train.Saver`` over variables of its own."""

    environment = "tensorflow"
    distributions = ("tensorflow-cpu",)

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow

        v1 = tensorflow.compat.v1
        v1.disable_eager_execution()
        v1.logging.set_verbosity(v1.logging.ERROR)
        variables = [
            v1.get_variable(name, array.shape, initializer=v1.zeros_initializer(), use_resource=True)
            for name, array in arrays.items()
        ]
        values = [variable.value() for variable in variables]
        self._clear = v1.global_variables_initializer()
        self._saver = v1.train.Saver()
        self._session = v1.Session()
        # A run costs by the size of the graph, and what a run fetches is in memory at once.
        self._batches = []
        for batch in _batches([array.nbytes for array in arrays.values()]):
            self._batches.append([values[number] for number in batch])
            initializers = [variables[number].initializer for number in batch]
            fed = {op.inputs[1]: arrays[variables[n].op.name] for op, n in zip(initializers, batch, strict=True)}
            self._session.run(initializers, fed)

    def save(self) -> None:
        self._saver.save(self._session, self.path("model.ckpt"), write_meta_graph=False)

    def restore(self) -> None:
        self._saver.restore(self._session, self.path("model.ckpt"))

    def clear(self) -> None:
        self._session.run(self._clear)

    def digest(self) -> int:
        value = 0
        for batch in self._batches:
            for array in self._session.run(batch):
                value = zlib.crc32(array, value)
        return value


def _batches(sizes: list[int]) -> list[list[int]]:
    """The numbers of the sizes, in runs of about 64 MB."""
    batches: list[list[int]] = [[]]
    total = 0
    for number, size in enumerate(sizes):
        if batches[-1] and total + size > _BATCH_NBYTES:
            batches.append([])
            total = 0
        batches[-1].append(number)
        total += size
    return batches


class Raw(Peer):
    """The bytes alone, in one file: reserved, written by ``threads`` threads in pieces of 8 MiB.

    From memory that lies as the device likes it best: in huge pages, aligned, so that around the page cache nothing
    is copied.
    """

    process = "raw"
    is_ceiling = True
    threads: ClassVar[int] = 1
    files: ClassVar[int] = 1
    flags: ClassVar[int] = 0
    copy: ClassVar[memoryview | None] = None

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        Raw.copy = Raw.copy or _in_huge_pages(block)
        super().__init__(arrays, Raw.copy, directory)
        # The arrays and what lies between them in the block, in pieces.
        self._buffers: list[memoryview] = []
        for array in arrays.values():
            octets = array.reshape(-1).view(np.uint8).data
            padding = -octets.nbytes % ARRAY_ALIGNMENT
            self._buffers += [octets[i : i + _PIECE_NBYTES] for i in range(0, octets.nbytes, _PIECE_NBYTES)]
            self._buffers += [memoryview(bytearray(padding))] if padding else []

    def save(self) -> None:
        """With several files, each in a thread of its own."""
        if self.files == 1:
            self._write_file("raw", self.block, self.threads)
            return
        size = -(-len(self.block) // self.files)
        parts = [(f"raw{n}", self.block[n * size : (n + 1) * size], 1) for n in range(self.files)]
        _run_all([functools.partial(self._write_file, *part) for part in parts])

    def _write_file(self, name: str, block: memoryview, threads: int) -> None:
        is_new = 0 if self.keeps_one else os.O_EXCL
        fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT | is_new | self.flags, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, len(block))
            starts = iter(range(0, len(block), _PIECE_NBYTES))
            _run_all([functools.partial(self._write, fd, block, starts)] * threads)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _write(self, fd: int, block: memoryview, starts: Any) -> None:
        for start in starts:  # the GIL makes each start go to one thread
            end = min(start + _PIECE_NBYTES, len(block))
            while start < end:
                start += os.pwrite(fd, block[start:end], start)

    def restore(self) -> None:
        """With one thread, into the arrays themselves."""
        fd = os.open(self.path("raw"), os.O_RDONLY)
        try:
            position = 0
            for first in range(0, len(self._buffers), _MAX_BUFFERS):
                batch = self._buffers[first : first + _MAX_BUFFERS]
                wanted = sum(map(len, batch))
                if os.preadv(fd, batch, position) != wanted:
                    raise OSError(f"{self.path('raw')} was read in part")  # nothing like it was seen for 2 GB and less
                position += wanted
        finally:
            os.close(fd)


class Memcpy(Peer):
    """No file, but a copy of the arrays in memory that was in use before: an asynchronous save cannot do without."""

    process = "raw"
    is_ceiling = True
    orders = frozenset({"save"})
    is_written = False

    def __init__(self, arrays: Arrays, block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        self._copies = {name: array.copy() for name, array in arrays.items()}

    def save(self) -> None:
        for name, array in self.arrays.items():
            np.copyto(self._copies[name], array)

    def restore(self) -> None:
        for name, array in self.arrays.items():
            np.copyto(array, self._copies[name])


def _run_all(calls: list[Callable[[], None]]) -> None:
    """At a time, the last one in this thread."""
    others = [threading.Thread(target=call) for call in calls[:-1]]
    for other in others:
        other.start()
    calls[-1]()
    for other in others:
        other.join()


def _in_huge_pages(block: memoryview) -> memoryview:
    memory = mmap.mmap(-1, len(block), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    np.copyto(np.frombuffer(memory, np.uint8), np.frombuffer(block, np.uint8))
    return memoryview(memory)


def _raw(threads: int, direct: bool) -> type[Raw]:
    orders = frozenset({"save", "next"}) if threads > 1 or direct else _WHOLE
    attributes = {"threads": threads, "flags": os.O_DIRECT if direct else 0, "orders": orders}
    return type("Raw", (Raw,), attributes)


class RawTwoFiles(Raw):
    orders = frozenset({"save", "next"})
    files = 2


class RawOver(Raw):
    """Writes over its own file: a bound, and no checkpoint while it does."""

    orders = frozenset({"save", "next"})
    threads = 4
    keeps_one = True


class RawOverDirect(RawOver):
    flags = getattr(os, "O_DIRECT", 0)


_RAW_MODES = (False, True) if hasattr(os, "O_DIRECT") else (False,)

PEERS: dict[str, type[Peer]] = {
    "gpusaver": Gpusaver,
    "gpusaver page cache": GpusaverCached,
    "gpusaver O_DIRECT": GpusaverDirect,
    "gpusaver x2 files": GpusaverTwoFiles,
    "gpusaver and .meta": GpusaverMeta,
    "gpusaver recycle": GpusaverRecycle,
    "gpusaver async": GpusaverAsync,
    "torch.save": Torch,
    "PyTorch DCP": Dcp,
    "PyTorch DCP x4": DcpThreads,
    "PyTorch DCP x4 async": DcpAsync,
    "safetensors": Safetensors,
    "np.savez": Npz,
    "TensorFlow": TensorFlow,
    "Orbax": Orbax,
    "memcpy": Memcpy,
    **{
        f"raw {'O_DIRECT' if direct else 'page cache'} x{threads}": _raw(threads, direct)
        for direct, threads in itertools.product(_RAW_MODES, (1, 4))
    },
    "raw page cache x2 files": RawTwoFiles,
    "raw page cache x4 over": RawOver,
    **({"raw O_DIRECT x4 over": RawOverDirect} if True in _RAW_MODES else {}),
}
