"""Ranks as threads of one process: every message, wait and death in an order that can be repeated.

Time is simulated.  It stands still while any rank does something, and jumps to the earliest deadline when all that live
wait and nothing has arrived: a deadline of ten minutes costs nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

#: A rank that is still busy then hangs.
REAL_SECONDS = 60.0


class Killed(BaseException):
    """A rank ends in the middle of whatever it does, and sends nothing any more."""


class World:
    """``before(rank, operation)`` is called before each send and receive, in the rank's thread; it may raise."""

    def __init__(self, size: int, before: Callable[[int, str], object] = lambda rank, operation: None) -> None:
        self.size = size
        self.before = before
        self.time = 0.0
        self.boxes: list[deque[tuple[int, bytes]]] = [deque() for _ in range(size)]
        self.alive = set(range(size))
        self.waiting: dict[int, float] = {}
        self.changed = threading.Condition()

    def ended(self, rank: int) -> None:
        with self.changed:
            self.alive.discard(rank)
            self.advance()

    def advance(self) -> None:
        """Requires: ``changed`` is held."""
        if self.alive and self.alive == set(self.waiting) and not any(self.boxes[rank] for rank in self.alive):
            self.time = max(self.time, min(self.waiting.values()))
        self.changed.notify_all()


class SimulatedTransport:
    """See :class:`gpusaver.distributed.transport.Transport`."""

    def __init__(self, world: World, rank: int) -> None:
        self.rank, self.size = rank, world.size
        self.given_up: str | None = None
        self._world = world

    def send(self, message: bytes, to: int) -> None:
        self._world.before(self.rank, "send")
        with self._world.changed:
            self._world.boxes[to].append((self.rank, message))
            self._world.changed.notify_all()

    def is_sent(self) -> bool:
        return True

    def receive(self) -> tuple[int, bytes] | None:
        box = self._world.boxes[self.rank]
        if not box:
            return None
        self._world.before(self.rank, "receive")
        return box.popleft()

    def now(self) -> float:
        return self._world.time

    def wait(self, until: float) -> None:
        world = self._world
        with world.changed:
            world.waiting[self.rank] = until
            world.advance()
            try:
                while not world.boxes[self.rank] and world.time < until:
                    assert world.changed.wait(REAL_SECONDS), f"rank {self.rank} has waited too long"
            finally:
                del world.waiting[self.rank]


def run(
    size: int,
    work: Callable[[SimulatedTransport], Any],
    before: Callable[[int, str], object] = lambda rank, operation: None,
) -> list[Any]:
    """What ``work(transport)`` returned on each rank, or the exception that it raised."""
    world = World(size, before)
    outcomes: list[Any] = [None] * size

    def run_rank(rank: int) -> None:
        try:
            outcomes[rank] = work(SimulatedTransport(world, rank))
        except BaseException as error:
            outcomes[rank] = error
        finally:
            world.ended(rank)

    threads = [threading.Thread(target=run_rank, args=(rank,), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * REAL_SECONDS)
        assert not thread.is_alive(), f"{thread.name} hangs"
    return outcomes
