"""What the ranks of a job need of each other: messages that never block."""

from __future__ import annotations

from typing import Any, Protocol


class Transport(Protocol):
    """Messages between ``size`` ranks, numbered from 0.

    Everything returns at once but for :meth:`wait`, and is called by one thread at a time.  Any method may raise a
    :class:`gpusaver.errors.Error`; the transport is not used again then.
    """

    rank: int
    size: int
    #: Why it must not be used any more; None while it may.
    given_up: str | None

    def send(self, message: bytes, to: int) -> None:
        """Begins to send it.  Messages to one rank arrive in the order in which they were sent."""

    def is_sent(self) -> bool:
        """Whether all messages have left this rank; those to a dead one may never."""

    def receive(self) -> tuple[int, bytes] | None:
        """The sender and its message, None if there is none."""

    def now(self) -> float:
        """In seconds, from whenever."""

    def wait(self, until: float) -> None:
        """Returns when something may have been received or sent, at the latest at the time ``until``."""


def connect(comm: Any) -> Transport:
    """For a communicator of mpi4py; a Transport is taken as it is.  All ranks call it together."""
    if hasattr(comm, "Idup"):
        from gpusaver.distributed.mpi import MpiTransport

        return MpiTransport.of(comm)
    missing = [name for name in ("rank", "size", "send", "receive", "wait") if not hasattr(comm, name)]
    if missing:
        raise TypeError(f"comm: expected a communicator of mpi4py, found {type(comm).__name__}: {comm!r:.80}")
    transport: Transport = comm
    return transport
