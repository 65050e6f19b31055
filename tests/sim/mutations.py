"""What keeps copies right, taken away one at a time: each wait, each ordering and each reference of the CUDA path.

The simulated suite must fail without any of them.  Left out is what is there twice: a snapshot's image is not held,
since whoever frees device memory waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

CUDA = "device/cuda.py"
STREAMS = "device/cuda_streams.py"
MEMORY = "device/cuda_memory.py"
KERNELS = "device/cuda_kernels.py"
STAGING = "pipeline/staging.py"
RESTORE = "pipeline/restore.py"


class Mutation(NamedTuple):
    """``old``, which is in the file once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    # -- waits of the host
    Mutation("event-copy", CUDA, "            self._event.synchronize()\n", "            pass\n"),
    Mutation(
        "checksums",
        CUDA,
        "        self._ended.synchronize()\n        assert self._held.results",
        "        assert self._held.results",
    ),
    Mutation(
        "event-failure", CUDA, "            self._runtime.synchronize()\n            raise\n", "            raise\n"
    ),
    Mutation(
        "queueing-failure",
        CUDA,
        "                self.synchronize()\n                self.land([held])\n",
        "                self.land([held])\n",
    ),
    Mutation("all-copies", CUDA, "_has_ended(self._copies.synchronize, self._checks", "_has_ended(self._checks"),
    Mutation("all-checks", CUDA, "self._copies.synchronize, self._checks.synchronize", "self._copies.synchronize"),
    Mutation("device-if-not-stream", CUDA, "(*waits,), (cupy.cuda.runtime.deviceSynchronize,)", "((*waits,),)"),
    Mutation(
        "trim", CUDA, "    def trim(self) -> None:\n        self.synchronize()\n", "    def trim(self) -> None:\n"
    ),
    Mutation("settle", STAGING, "        filled.event.synchronize()\n", ""),
    Mutation("abandon", STAGING, "            self._runtime.synchronize()\n", "            pass\n"),
    Mutation("restore", RESTORE, "        event.synchronize()\n", ""),
    Mutation("join", STAGING, "            thread.join()\n", "            pass\n"),
    Mutation("few-chunks", STAGING, "MAX_QUEUED = 4\n", "MAX_QUEUED = 5\n"),
    Mutation(
        "hand-over",
        STAGING,
        "            self._settle()\n        return self._ring",
        "            break\n        return self._ring",
    ),
    Mutation("fence-recorded", "pending.py", "        self._recorded.wait()\n", ""),
    Mutation(
        "fence-failure", "pending.py", "            self._captured.wait()\n            raise\n", "            raise\n"
    ),
    # -- orders of streams
    Mutation(
        "caller-first",
        CUDA,
        "                wait_for(self._copies.ptr, record(handle))\n\n    def free",
        "                pass\n\n    def free",
    ),
    Mutation(
        "caller-before-snapshot",
        CUDA,
        "                wait_for(self._copies.ptr, record(handle))\n            filling",
        "                pass\n            filling",
    ),
    Mutation("caller-after-snapshot", CUDA, "                wait_for(handle, filled)\n", "                pass\n"),
    Mutation(
        "snapshot-mark",
        CUDA,
        "            filling = self._fill(snapshot, arrays, places, sizes, held)\n"
        "            filled = record(self._copies.ptr)\n",
        "            filled = record(self._copies.ptr)\n"
        "            filling = self._fill(snapshot, arrays, places, sizes, held)\n",
    ),
    Mutation(
        "checks-after-copies",
        CUDA,
        "            wait_for(self._checks.ptr, record(self._copies.ptr))\n",
        "            pass\n",
    ),
    Mutation("fence", CUDA, "                wait_for(handle, self._event)\n", "                pass\n"),
    Mutation("recorded", STREAMS, "    cupy.cuda.runtime.eventRecord(event.ptr, handle)\n", ""),
    Mutation("waited", STREAMS, "    cupy.cuda.runtime.streamWaitEvent(handle, event.ptr)\n", "    pass\n"),
    Mutation("torch", STREAMS, "torch is not None and torch.is_initialized()", "False"),
    Mutation("save-after-caller", "saving.py", "            runtime.order_after_caller()\n", "            pass\n"),
    Mutation("restore-after-caller", "restoring.py", "        runtime.order_after_caller()\n", "        pass\n"),
    Mutation("load-after-caller", "reader.py", "        runtime.order_after_caller()", "        pass"),
    # -- references and loans
    Mutation("snapshot-arrays", CUDA, "            held.keep(arrays)", "            pass"),
    Mutation(
        "save-arrays",
        CUDA,
        "            held.keep(slot, transfers.arrays)\n            if",
        "            held.keep(slot)\n            if",
    ),
    Mutation(
        "save-slot",
        CUDA,
        "            held.keep(slot, transfers.arrays)\n            if",
        "            held.keep(transfers.arrays)\n            if",
    ),
    Mutation(
        "restore-arrays",
        CUDA,
        "            held.keep(slot, transfers.arrays)\n            copies",
        "            held.keep(slot)\n            copies",
    ),
    Mutation(
        "restore-slot",
        CUDA,
        "            held.keep(slot, transfers.arrays)\n            copies",
        "            held.keep(transfers.arrays)\n            copies",
    ),
    Mutation("kernel-arrays", KERNELS, "        held.keep(transfers.arrays)\n", ""),
    Mutation(
        "scatter-buffer",
        CUDA,
        "buffer = held.borrow(self._buffers, end)\n            self._memcpy(buffer",
        "self._buffers.give_back(buffer := self._buffers.borrow(end))\n            self._memcpy(buffer",
    ),
    Mutation(
        "kernel-table",
        KERNELS,
        "        table = held.borrow(self.tables, max(octets.nbytes, 1))\n",
        "        table = self.tables.borrow(max(octets.nbytes, 1))\n        self.tables.give_back(table)\n",
    ),
    Mutation("in-flight", CUDA, "            self._in_flight.add(held)\n", ""),
    Mutation("snapshot-waited", "saving.py", "            event.synchronize()\n", "            pass\n"),
    Mutation("landed", CUDA, "                self._in_flight.discard(held)\n", ""),
    Mutation("released", CUDA, "                held.release()\n", "                pass\n"),
    Mutation("lent-once", MEMORY, "return self._free.pop(number)", "return self._free[number]"),
    Mutation("results", MEMORY, "            self.results = self.results.copy()\n", "            pass\n"),
    Mutation("loans-back", MEMORY, "            self._loans.pop()()\n", "            self._loans.pop()\n"),
    Mutation(
        "unregistered", MEMORY, "                cupy.cuda.runtime.hostUnregister(address)\n", "                pass\n"
    ),
    Mutation("unregistered-when-dropped", MEMORY, "                self.free()\n", "                pass\n"),
    Mutation("unregistered-in-child", MEMORY, "os.getpid() != self._process", "False"),
    Mutation(
        "failed-slot",
        STAGING,
        "                except BaseException:\n                    self._ring.release(slot)\n",
        "                except BaseException:\n",
    ),
    Mutation("restored-slot", RESTORE, "        ring.release(buffer)\n", "        pass\n"),
    Mutation("trimmed", "pipeline/workers.py", "            runtime.trim()\n", "            pass\n"),
    # -- devices, threads, captures
    Mutation(
        "current-device", STREAMS, "        with cupy.cuda.Device(device):\n            yield\n", "        yield\n"
    ),
    Mutation(
        "landed-when-queued",
        CUDA,
        "            try:\n                yield held\n",
        "            self._in_flight.add(held)\n            try:\n                yield held\n",
    ),
    Mutation("relaxed", STREAMS, "_RELAXED = 2", "_RELAXED = 0"),
    Mutation("mode-restored", STREAMS, "            exchange(ctypes.byref(mode))\n", "            pass\n"),
    Mutation("capture-refused", STREAMS, "    if is_capturing:\n", "    if False:\n"),
    Mutation("capture-implicit", STREAMS, "error.status != _CAPTURE_IMPLICIT", "True"),
    Mutation("capture-named", STREAMS, "    return _not_captured(int(handle))\n", "    return int(handle)\n"),
    Mutation("half-free", "saving.py", "(free + reusable) // 2", "(free + reusable)"),
]

#: Those that `make test` tries, a wait, an order and a reference, and the tests that notice them first.
EVERYDAY = {"event-copy": "references", "caller-after-snapshot": "cuda_runtime", "restore-arrays": "references"}
