"""Runs as a process of its own: a Saver whose saves take a while, and what the arguments ask for.

slow_script.py DIRECTORY MODE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np

import gpusaver
from gpusaver.errors import FailedPreconditionError
from gpusaver.storage.local import LocalStorage


class SlowStorage(LocalStorage):
    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        file = super().create(path, nbytes, direct=direct, target=target)
        if ".data-" in path and "k-1." not in path:
            print("under way", flush=True)
            time.sleep(0.5)
        return file


def exit_while_saving(saver: gpusaver.Saver, directory: str) -> None:
    saver.save_async(f"{directory}/k", 2)
    print("at the end", flush=True)


def exit_with_an_error(saver: gpusaver.Saver, directory: str) -> None:
    saver.save_async(f"{directory}/k", 2)
    sys.exit(3)


def save_at_exit(saver: gpusaver.Saver, directory: str) -> None:
    """When no thread can be started any more (Python 3.12)."""
    import atexit

    atexit.register(lambda: saver.save(f"{directory}/k", 2))


def interrupted_save(saver: gpusaver.Saver, directory: str) -> None:
    saver.save(f"{directory}/k", 2)


def interrupted_blocking(saver: gpusaver.Saver, directory: str) -> None:
    saver.save_async(f"{directory}/k", 2, capture="blocking")


def interrupted_with(saver: gpusaver.Saver, directory: str) -> None:
    with saver:
        saver.save(f"{directory}/k", 2)


def terminated(saver: gpusaver.Saver, directory: str) -> None:
    """A handler that saves, as preemption wants it, in the middle of a save."""

    def handler(number: int, frame: Any) -> None:
        saver.save(f"{directory}/k", 3)
        sys.exit(0)

    signal.signal(signal.SIGTERM, handler)
    saver.save(f"{directory}/k", 2)


def fork(saver: gpusaver.Saver, directory: str) -> None:
    pending = saver.save_async(f"{directory}/k", 2)
    assert pending is not None
    child = os.fork()
    if child:
        print(f"child: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
        assert pending.result() == f"{directory}/k-2"
        saver.close()
        return
    calls = [
        *(pending.result, pending.exception, pending.done, pending.cancelled, pending.cancel),
        *(pending.wait_captured, pending.fence, lambda: pending.add_done_callback(print)),
        *(lambda: saver.save(f"{directory}/child"), lambda: saver.save_async(f"{directory}/child")),
        *(lambda: saver.restore(f"{directory}/k-1"), lambda: saver.last_checkpoints, saver.build),
        *(lambda: saver.set_last_checkpoints([]), lambda: saver.recover_last_checkpoints([])),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except FailedPreconditionError:
            continue
        raise AssertionError(f"call {number} worked")
    saver.close()
    with saver:
        pass
    with gpusaver.Saver({"w": np.arange(3)}) as other:
        other.restore(other.save(f"{directory}/child"))
    sys.exit(7)


def fork_while_locked(saver: gpusaver.Saver, directory: str) -> None:
    """Another thread holds the Saver's lock at the time of the fork; in the child it is not there to let go."""
    import threading

    threading.Thread(target=lambda: saver.restore(f"{directory}/k-1")).start()
    saver.save_async(f"{directory}/k", 2, capture="deferred")
    restoring = threading.Thread(target=lambda: saver.restore(f"{directory}/k-1"))
    restoring.start()
    time.sleep(0.1)
    child = os.fork()
    if child:
        print(f"child: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
        restoring.join()
        saver.close()
        return
    try:
        saver.save(f"{directory}/child")
    except FailedPreconditionError:
        saver.close()
        os._exit(7)


def main() -> None:
    directory, mode = sys.argv[1:]
    state = {"w": np.arange(100_000), "step": 1}
    saver = gpusaver.Saver(state, storage=SlowStorage())
    saver.save(f"{directory}/k", 1)
    state["w"] += 1
    globals()[mode](saver, directory)


if __name__ == "__main__":
    main()
