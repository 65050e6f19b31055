"""Launches every kernel at every alignment and compares with the host; also a script, for compute-sanitizer::

compute-sanitizer --tool memcheck python tests/gpu/kernel_checks.py
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]

from gpusaver.bundle.crc import crc32c
from gpusaver.device.base import Transfer
from gpusaver.device.launch_plan import column

_FENCE = 0xA5
_LENGTHS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 70, 129, 1000)


def check_copies(cupy: Any, kernels: Any) -> None:
    """Pieces of many lengths, every alignment of array and image, gathered and scattered back."""
    from gpusaver.device.cuda_memory import Held

    stream = cupy.cuda.Stream(non_blocking=True)
    random = np.random.default_rng(0)
    for source_shift in range(16):
        octets = random.integers(0, 256, sum(_LENGTHS) + 33_000 + source_shift, np.uint8)
        array = cupy.asarray(octets)
        transfers, start, place = [], source_shift, 0
        for number, nbytes in enumerate((*_LENGTHS, 33_000)):
            place += (number * 5 - place) % 16
            transfers.append(Transfer(array, start, place, nbytes))
            start, place = start + nbytes, place + nbytes
        image, back = cupy.full(place + 7, _FENCE, np.uint8), cupy.full(len(octets), _FENCE, np.uint8)
        cupy.cuda.Device().synchronize()
        held = Held()
        kernels.gather(transfers, image.data.ptr, stream, held)
        kernels.scatter([t._replace(array=back) for t in transfers], image.data.ptr, stream, held)
        stream.synchronize()
        held.release()
        expected, expected_back = np.full(place + 7, _FENCE, np.uint8), np.full(len(octets), _FENCE, np.uint8)
        for _, start, offset, nbytes in transfers:
            expected[offset : offset + nbytes] = expected_back[start : start + nbytes] = octets[start : start + nbytes]
        assert np.array_equal(image.get(), expected), source_shift
        assert np.array_equal(back.get(), expected_back), source_shift


def check_strided(cupy: Any, kernels: Any) -> None:
    """Views of every item size that are not contiguous, whole and in part, also of more dimensions than one launch."""
    from gpusaver.device.cuda_memory import Held

    stream = cupy.cuda.Stream(non_blocking=True)
    random = np.random.default_rng(1)
    for itemsize in (1, 2, 4, 8):
        model = random.integers(0, 256, 6 * 5 * 4 * 3 * itemsize, np.uint8).view(f"u{itemsize}").reshape(6, 5, 4, 3)
        array = cupy.asarray(model)
        for view in (
            lambda a: a.T,
            lambda a: a[::2, :, 1::2],
            lambda a: a[::-1, 1:, ::-1],
            lambda a: a[2, :, 3],
            lambda a: a.transpose(0, 3, 1, 2)[..., 1:],
        ):
            flat = np.ascontiguousarray(view(model)).tobytes()
            for start, nbytes in ((0, len(flat)), (itemsize, len(flat) - 2 * itemsize), (1, len(flat) - 3)):
                image = cupy.full(nbytes + 8, _FENCE, np.uint8)
                cupy.cuda.Device().synchronize()
                held = Held()
                kernels.gather([Transfer(view(array), start, 5, nbytes)], image.data.ptr, stream, held)
                stream.synchronize()
                held.release()
                found = image.get().tobytes()
                assert found == bytes([_FENCE] * 5) + flat[start : start + nbytes] + bytes([_FENCE] * 3)
                target = cupy.zeros(model.shape, model.dtype)
                cupy.cuda.Device().synchronize()
                kernels.scatter([Transfer(view(target), start, 5, nbytes)], image.data.ptr, stream, held)
                stream.synchronize()
                held.release()
                found = np.ascontiguousarray(view(target.get())).tobytes()
                assert found[start : start + nbytes] == flat[start : start + nbytes]


def check_checksums(cupy: Any, kernels: Any, nbytes: int) -> None:
    """Every alignment and short length, and a piece of ``nbytes`` bytes."""
    from gpusaver.device.cuda_memory import Held

    stream = cupy.cuda.Stream(non_blocking=True)
    octets = np.random.default_rng(2).integers(0, 256, nbytes + 16, np.uint8)
    array = cupy.asarray(octets)
    cupy.cuda.Device().synchronize()
    ranges = [(start, length) for start in range(16) for length in _LENGTHS] + [(3, nbytes), (0, nbytes + 16)]
    held = Held()
    starts, sizes = column(ranges).T
    found = kernels.crc32c(array.data.ptr + starts, sizes, held)(stream)
    stream.synchronize()
    assert found.tolist() == [crc32c(octets[start : start + length]) for start, length in ranges]
    held.release()


def main() -> None:
    import cupy

    from gpusaver.device.cuda_kernels import load

    cupy.cuda.set_allocator(None)  # each array an allocation of its own: what is beyond its end belongs to nobody
    kernels, reason = load(0)
    if kernels is None:
        sys.exit(reason)
    check_copies(cupy, kernels)
    check_strided(cupy, kernels)
    check_checksums(cupy, kernels, 3_000_000)
    print("kernels agree with the host")


if __name__ == "__main__":
    main()
