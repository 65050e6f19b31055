"""Messages over MPI: non-blocking calls on a duplicate of the user's communicator.

The duplicate keeps our messages apart from the program's own.  It is made once for a communicator, found again by an
attribute of that, and never freed: freeing is collective, and would wait for ranks that are gone.
"""

from __future__ import annotations

import time
from typing import Any

from mpi4py import MPI

from gpusaver.errors import DeadlineExceededError, InvalidArgumentError, UnknownError

_TAG = 1
#: How long a duplicate is waited for: until every rank has made its Saver.
_CONNECT_SECONDS = 600.0
#: Between two looks; twice as long each time, so that a message of milliseconds is not missed by more than itself.
_SHORTEST_SLEEP, _LONGEST_SLEEP = 20e-6, 2e-3

_keyval = MPI.KEYVAL_INVALID


class MpiTransport:
    """See :class:`gpusaver.distributed.transport.Transport`."""

    def __init__(self, comm: Any) -> None:
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.given_up: str | None = None
        self._comm = comm
        self._sending: list[tuple[Any, bytes]] = []
        self._arriving: list[tuple[Any, int, bytearray]] = []

    @classmethod
    def of(cls, comm: Any) -> MpiTransport:
        """Collective.  Raises DeadlineExceededError if another rank makes no Saver of this communicator."""
        global _keyval
        if comm.Is_inter():
            raise InvalidArgumentError("comm: expected an intra-communicator, found one between two groups")
        if _keyval == MPI.KEYVAL_INVALID:
            _keyval = MPI.Comm.Create_keyval()
        transport = comm.Get_attr(_keyval)
        if transport is None:
            transport = cls(_duplicate(comm))
            comm.Set_attr(_keyval, transport)
        return transport  # type: ignore[no-any-return]

    def send(self, message: bytes, to: int) -> None:
        try:
            self._sending.append((self._comm.Isend([message, MPI.BYTE], to, _TAG), message))
        except MPI.Exception as error:
            raise UnknownError(f"cannot send to rank {to}: {error}") from error

    def is_sent(self) -> bool:
        # A message to a rank that has died is an error with some libraries; it counts as one that never leaves.
        self._sending = [sending for sending in self._sending if not _is_done(sending[0])]
        return not self._sending

    def receive(self) -> tuple[int, bytes] | None:
        status = MPI.Status()
        try:
            message = self._comm.Improbe(MPI.ANY_SOURCE, _TAG, status)
            if message is not None:
                buffer = bytearray(status.Get_count(MPI.BYTE))
                self._arriving.append((message.Irecv([buffer, MPI.BYTE]), status.Get_source(), buffer))
        except MPI.Exception:
            return None  # of a rank that has died: the deadline says which
        for number, (request, source, buffer) in enumerate(self._arriving):
            if _is_done(request):
                del self._arriving[number]
                return source, bytes(buffer)
        return None

    def now(self) -> float:
        return time.monotonic()

    def wait(self, until: float) -> None:
        sleep = _SHORTEST_SLEEP
        while time.monotonic() < until:
            self.is_sent()  # has the library go on with what is under way
            if self._arriving or self._has_message():
                return
            time.sleep(min(sleep, max(0.0, until - time.monotonic())))
            if sleep >= _LONGEST_SLEEP:
                return
            sleep *= 2

    def _has_message(self) -> bool:
        try:
            return bool(self._comm.Iprobe(MPI.ANY_SOURCE, _TAG))
        except MPI.Exception:
            return False


def _duplicate(comm: Any) -> Any:
    duplicate, request = comm.Idup()
    deadline = time.monotonic() + _CONNECT_SECONDS
    while not request.Test():
        if time.monotonic() > deadline:
            raise DeadlineExceededError(
                f"comm: not every rank has made a Saver of this communicator within {_CONNECT_SECONDS:g} s"
            )
        time.sleep(_LONGEST_SLEEP)
    duplicate.Set_errhandler(MPI.ERRORS_RETURN)
    return duplicate


def _is_done(request: Any) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:
        return False
