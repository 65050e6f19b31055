"""Steps that all ranks of a job take together, each with one verdict for all.

::

    every rank    what it has: bytes, or the error that it has met          -> rank 0
    rank 0        has heard of all, or the deadline has come
                  an error of any rank, or ranks that are missing: that      -> every rank
                  else ``answer(what each rank has)``: one answer a rank     -> every rank

So a rank that has failed still takes part, and all return or raise the same.  Rank 0 waits for the others as long as
the deadline says; the others wait for rank 0 twice as long, since it may have begun to wait later than they.  Whoever
has waited in vain gives the transport up: what comes later would be taken for something else.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gpusaver import errors
from gpusaver.distributed.transport import Transport
from gpusaver.errors import (
    DataLossError,
    DeadlineExceededError,
    Error,
    FailedPreconditionError,
    InvalidArgumentError,
    UnknownError,
)

Answer = Callable[[list[bytes]], Sequence[bytes]]


class Message(NamedTuple):
    """Facts, which go as JSON, and bytes.  ::  u32 size of the JSON | JSON | bytes"""

    facts: dict[str, Any]
    body: bytes = b""

    def encode(self) -> bytes:
        facts = json.dumps(self.facts).encode()
        return len(facts).to_bytes(4, "little") + facts + self.body

    @classmethod
    def decode(cls, data: bytes) -> Message:
        end = 4 + int.from_bytes(data[:4], "little")
        return cls(json.loads(data[4:end]), data[end:])


class Group:
    """The ranks of one Saver.  Methods are collective: every rank calls them in the same order.

    ``seconds``: the deadline.  Not for several threads at a time.
    """

    def __init__(self, transport: Transport, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"comm_deadline: expected more than 0 seconds, found {seconds!r}")
        self._transport = transport
        self._seconds = seconds
        self.rank, self.size = transport.rank, transport.size
        #: What rank 0 met itself when it judged, for the chain of exceptions.
        self._met: Exception | None = None

    def exchange(self, step: str, has: bytes | BaseException, answer: Answer | None = None) -> bytes:
        """This rank's answer.  ``answer`` runs on rank 0 alone; None: nobody needs one.

        Raises the same error on every rank: that of the lowest rank that met one, that of ``answer``,
        InvalidArgumentError if ranks take different steps, or DeadlineExceededError naming the ranks that are missing.
        """
        if self._transport.given_up is not None:
            raise FailedPreconditionError(
                f"{step}: the communicator was given up, because {self._transport.given_up}. Make a new one of the "
                "ranks that are left, and a new Saver"
            )
        facts: dict[str, Any] = {"step": step}
        if isinstance(has, BaseException):
            facts["error"] = facts_of(has)
        message = Message(facts, b"" if isinstance(has, BaseException) else has)
        try:
            reply = self._lead(message, answer) if self.rank == 0 else self._follow(message)
        except BaseException as error:
            self._transport.given_up = self._transport.given_up or f"{step} failed: {error!r}"
            raise
        if "error" not in reply.facts:
            return reply.body
        verdict = error_of(reply.facts["error"])
        if isinstance(verdict, DeadlineExceededError):
            self._transport.given_up = str(verdict)
        if isinstance(verdict, DataLossError) and isinstance(has, DataLossError):
            verdict.modified = has.modified  # what this rank has overwritten
        met, self._met = self._met, None
        raise verdict from (has if isinstance(has, BaseException) else met)

    @contextlib.contextmanager
    def step(self, name: str, agreed: str = "") -> Iterator[None]:
        """The body is this rank's part of the step; an error in it is raised on all.

        Raises InvalidArgumentError if ``agreed`` is not the same everywhere.
        """
        has: bytes | BaseException = agreed.encode("utf-8", "surrogateescape")
        try:
            yield
        except Exception as error:
            has = error
        except BaseException as error:  # Ctrl-C and the like: the others wait in vain
            self._transport.given_up = self._transport.given_up or f"{name} was interrupted: {error!r}"
            raise

        def answer(texts: list[bytes]) -> list[bytes]:
            check_agreement(name, [text.decode("utf-8", "surrogateescape") for text in texts])
            return [b""] * self.size

        self.exchange(name, has, answer)

    def share(self, name: str, facts: Any) -> Any:
        """What rank 0 passes, on all ranks."""
        data = self.exchange(name, b"", lambda _: [json.dumps(facts).encode()] * self.size)
        return json.loads(data)

    def _lead(self, own: Message, answer: Answer | None) -> Message:
        heard: dict[int, Message] = {0: own}
        deadline = self._transport.now() + self._seconds
        while len(heard) < self.size:
            arrived = self._transport.receive()
            if arrived is not None:
                heard[arrived[0]] = Message.decode(arrived[1])
            elif self._transport.now() >= deadline:
                break
            else:
                self._transport.wait(deadline)
        replies = self._judge(own.facts["step"], heard, answer)
        for rank, reply in enumerate(replies[1:], 1):
            self._transport.send(reply.encode(), rank)
        # Large messages go only while somebody looks after them; if one stays, its rank misses the next step.
        deadline = self._transport.now() + self._seconds
        while not self._transport.is_sent() and self._transport.now() < deadline and len(heard) == self.size:
            self._transport.wait(deadline)
        return replies[0]

    def _judge(self, step: str, heard: dict[int, Message], answer: Answer | None) -> list[Message]:
        try:
            missing = [rank for rank in range(self.size) if rank not in heard]
            if missing:
                raise DeadlineExceededError(
                    f"{step}: {ranks_text(missing)} of {self.size} did not take part within {self._seconds:g} s. They "
                    "have ended, or do something else; raise comm_deadline if they only need longer",
                    ranks=tuple(missing),
                )
            messages = [heard[rank] for rank in range(self.size)]
            failed = {rank: message.facts["error"] for rank, message in heard.items() if "error" in message.facts}
            if failed:
                return [Message({"error": _common(failed)})] * self.size
            check_agreement("what is called", [message.facts["step"] for message in messages])
            if answer is None:
                return [Message({})] * self.size
            return [Message({}, body) for body in answer([message.body for message in messages])]
        except Exception as error:
            self._met = error
            return [Message({"error": facts_of(error)})] * self.size

    def _follow(self, own: Message) -> Message:
        self._transport.send(own.encode(), 0)
        deadline = self._transport.now() + 2 * self._seconds
        while True:
            arrived = self._transport.receive()
            if arrived is not None:
                return Message.decode(arrived[1])
            if self._transport.now() >= deadline:
                raise DeadlineExceededError(
                    f"{own.facts['step']}: rank 0 of {self.size} did not answer within {2 * self._seconds:g} s. It has "
                    "ended, or does something else; raise comm_deadline if it only needs longer",
                    ranks=(0,),
                )
            self._transport.wait(deadline)


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {text}"


def check_agreement(what: str, said: Sequence[str]) -> None:
    """Raises InvalidArgumentError, naming the ranks, unless all of them said the same."""
    groups: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        groups.setdefault(text, []).append(rank)
    if len(groups) > 1:
        shown = itertools.islice(groups.items(), 4)
        views = "; ".join(f"{ranks_text(ranks)}: {text:.300}" for text, ranks in shown)
        raise InvalidArgumentError(f"the ranks disagree on {what}: {views}")


def facts_of(error: BaseException) -> dict[str, Any]:
    """An error as it goes to other ranks."""
    text = str(error) or type(error).__name__
    facts = {"kind": type(error).__name__, "text": text, "notes": list(getattr(error, "__notes__", []))}
    if isinstance(error, DeadlineExceededError):
        facts["ranks"] = list(error.ranks)
    return facts


def _common(failed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One error for those of several ranks: the lowest one's, which says who else has met the same or another."""
    lowest = failed[min(failed)]
    same = [rank for rank, facts in failed.items() if facts["text"] == lowest["text"]]
    notes = lowest["notes"] + [
        f"rank {rank}: {facts['kind']}: {facts['text']}" for rank, facts in sorted(failed.items()) if rank not in same
    ]
    return {**lowest, "text": f"{ranks_text(same)}: {lowest['text']}", "notes": notes[:20]}


def error_of(facts: dict[str, Any]) -> BaseException:
    """The inverse of :func:`facts_of`; UnknownError for classes that are neither ours nor what callers expect."""
    kind = getattr(errors, facts["kind"], None) or getattr(builtins, facts["kind"], None)
    error: BaseException
    if kind is DeadlineExceededError:
        error = DeadlineExceededError(facts["text"], ranks=tuple(facts["ranks"]))
    elif isinstance(kind, type) and (issubclass(kind, Error) or kind in (TypeError, ValueError, RuntimeError)):
        error = kind(facts["text"])
    else:
        error = UnknownError(f"{facts['kind']}: {facts['text']}")
    for note in facts["notes"]:
        error.add_note(note)
    return error
