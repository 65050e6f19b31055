"""Saves by all ranks of a communicator: everybody writes a part, rank 0 commits.

::

    save, save_async   every rank  describes what it holds (names, types, shapes, slices; no data)      -> rank 0
                       rank 0      refuses what does not fit together; says who writes what; takes the prefix's lock
                       every rank  captures; a thread writes this rank's data files, under temporary names, and syncs
    result, or the     every rank  its part of the index, or its error                                  -> rank 0
    next save          rank 0      merges the index
                       every rank  still here                                                           -> rank 0
                       rank 0      commits; state file, retention                     the verdict -> every rank

The question "still here" comes last, because a rank that has given up must not find its save committed.  The thread
that writes sends nothing: messages go out and come in only in calls of the user.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.arguments import make_directory, meta_graph_file
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.merge import merge_indexes
from gpusaver.distributed.group import Group, Message, check_agreement, error_of, facts_of
from gpusaver.distributed.planning import Assignment, assign, in_order
from gpusaver.errors import DeadlineExceededError, InternalError
from gpusaver.exporting import Described, Description, SaverOptions, trainable_names
from gpusaver.listing import CheckpointList
from gpusaver.pending import PendingSave
from gpusaver.pipeline.commit import BundleCommit, ShardFiles, differs_when_read_again
from gpusaver.pipeline.plan import Plan, Save, plan_save
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.workers import run_in_background
from gpusaver.saving import SaveRequest, Saving
from gpusaver.variables import Leaves


class _Share:
    """This rank's part of one save; on rank 0 also the commit of all of it."""

    def __init__(self, prefix: str, request: SaveRequest) -> None:
        self.prefix = prefix
        self.request = request
        self.files: ShardFiles | BundleCommit | None = None
        self.written = threading.Event()
        self.error: BaseException | None = None
        #: Of the tensors that this rank writes; empty without any.
        self.index = b""
        #: The rest is known on rank 0 alone.
        self.commit: BundleCommit | None = None
        self.first_shards: list[int] = []
        self.meta_graph: tuple[str, Description] | None = None
        self.merged = b""


class CollectiveSaving:
    """The saves of one Saver on this rank.  Its list of checkpoints is that of rank 0."""

    def __init__(self, group: Group, saving: Saving, options: SaverOptions, checkpoints: CheckpointList) -> None:
        self._group = group
        self._saving = saving
        self._options = options
        self._checkpoints = checkpoints
        #: Of all that this rank holds, and of what it writes: a plan, and the numbers of the leaves among those held.
        self._held: Plan | None = None
        self._kept: tuple[Plan, list[int]] | None = None
        #: The digest of what the plan holds and which of it is trainable.
        self._described: tuple[Plan, list[str], str] | None = None
        self._leader = _Leader(options)

    def refuse(self, error: BaseException) -> None:
        """This rank cannot begin the save that the others begin: raises the verdict."""
        self._group.exchange("save", error)

    def launch(
        self, prefix: str, request: SaveRequest, timeline: Timeline, leaves_now: Callable[[], Leaves]
    ) -> PendingSave:
        """``leaves_now()`` raises what keeps this rank from saving; that is everybody's error then."""
        share = _Share(prefix, request)
        leaves = Leaves()
        try:
            with timeline.span("plan"):
                try:
                    leaves = leaves_now()
                    self._held = plan_save(leaves, sharded=self._options.sharded, cached=self._held).plan
                    self._digest(leaves)
                except Exception as error:
                    self.refuse(error)
                    raise InternalError("rank 0 did not hear of an error") from error
                save, shards = self._agree(share, leaves)
            with timeline.span("capture"):
                return self._start(share, save, shards, timeline)
        except BaseException:
            if share.files is not None:
                share.files.abort()
            raise

    def _digest(self, leaves: Leaves) -> str:
        """Of what this rank holds; computed once for a plan."""
        import hashlib  # for ranks alone: it brings OpenSSL along

        assert self._held is not None
        trainable = trainable_names(leaves)
        if self._described is None or self._described[0] is not self._held or self._described[1] != trainable:
            digest = hashlib.blake2b(_describe(self._held, trainable), digest_size=16).hexdigest()
            self._described = self._held, trainable, digest
        return self._described[2]

    def _agree(self, share: _Share, leaves: Leaves) -> tuple[Save, range]:
        """What this rank writes, and into which shards; an error here is everybody's."""

        facts = {
            "prefix": share.prefix,
            "options": f"meta graph {share.request.meta_graph_suffix}, "
            f"state file {'no' if share.request.finish is None else 'yes'}",
            "digest": self._digest(leaves),
        }

        def begin(assignment: Assignment) -> list[bytes]:
            return self._begin(share, leaves, assignment)

        answer = self._group.exchange(
            "save", Message(facts).encode(), lambda messages: self._leader.hear(messages, begin)
        )
        reply = Message.decode(answer)
        if "asked" in reply.facts:
            assert self._described is not None
            has = _describe(*self._described[:2]) if self._group.rank in reply.facts["asked"] else b""
            answer = self._group.exchange("plan", has, lambda bodies: self._leader.plan(bodies, begin))
            reply = Message.decode(answer)
        first, count = reply.facts["first_shard"], reply.facts["shard_count"]
        save = self._part(share, leaves, _unpacked(reply.body, len(leaves)))
        if share.commit is None and count:
            sizes = dict(zip(range(first, first + count), save.plan.layout.shard_nbytes, strict=True))
            try:
                share.files = ShardFiles(
                    self._saving.storage,
                    share.prefix,
                    reply.facts["num_shards"],
                    reply.facts["token"],
                    sizes,
                    direct=self._saving.direct_io,
                )
            except Exception as error:
                share.error = error
        return save, range(first, first + count)

    def _part(self, share: _Share, leaves: Leaves, is_written: npt.NDArray[np.bool_]) -> Save:
        """A save of those leaves that this rank writes; ``is_written``: in the order of their keys."""
        assert self._held is not None
        numbers = sorted(self._held.order[place] for place in np.flatnonzero(is_written).tolist())
        cached = self._kept[0] if self._kept is not None and self._kept[1] == numbers else None
        save = plan_save(leaves.take(numbers), sharded=self._options.sharded, cached=cached)
        self._kept = save.plan, numbers
        return save

    def _begin(self, share: _Share, leaves: Leaves, assignment: Assignment) -> list[bytes]:
        """On rank 0, when all fits together: takes the prefix, and says to everybody what is theirs."""
        storage, prefix, request = self._saving.storage, share.prefix, share.request
        directory = os.path.dirname(prefix)
        make_directory(storage, directory, prefix)
        self._saving.preflight.check(prefix, assignment.nbytes, len(assignment.parts), request.copies)
        if request.meta_graph_suffix is not None:
            share.meta_graph = meta_graph_file(prefix, request.meta_graph_suffix), self._leader.description()
        own = range(assignment.shard_counts[0])
        sizes = [*self._part(share, leaves, assignment.is_written[0]).plan.layout.shard_nbytes[: len(own)]]
        sizes += [0] * (assignment.num_shards - len(own))
        elsewhere = range(len(own), assignment.num_shards)
        share.commit = share.files = BundleCommit(
            storage, prefix, sizes, direct=self._saving.direct_io, elsewhere=elsewhere
        )
        share.first_shards = assignment.first_shards
        return [
            Message(
                {
                    "first_shard": assignment.first_shards[rank],
                    "shard_count": assignment.shard_counts[rank],
                    "num_shards": share.commit.num_shards,
                    "token": share.commit.token,
                },
                np.packbits(assignment.is_written[rank]).tobytes(),
            ).encode()
            for rank in range(self._group.size)
        ]

    def _start(self, share: _Share, save: Save, shards: range, timeline: Timeline) -> PendingSave:
        """Captures, and writes in the background.  What fails from here on is told when the save is completed."""
        mode, reason = share.request.capture, ""
        if share.error is None:
            try:
                save, mode, reason = self._saving.capture(save, share.request.capture)  # type: ignore[assignment]
            except Exception as error:
                share.error = error
        pending = self._saving.begin(save, share.prefix, mode, reason, timeline, is_awaited=share.request.is_awaited)
        pending.complete = lambda timeout: self._complete(share, save, pending, timeout)
        if share.error is not None:
            pending.mark_captured()
        run_in_background(lambda: self._write(share, save, len(shards), pending))
        return pending

    def _write(self, share: _Share, save: Save, shard_count: int, pending: PendingSave) -> None:
        """In the background: this rank's files, complete and durable."""
        try:
            if share.error is None:
                self._saving.finish_capture(save, pending)
            if share.error is None and share.files is not None:
                with pending.timeline.in_background():
                    checksums = self._saving.write_data(save, pending, share.files, share.request.on_written)
                    if shard_count:
                        share.index = save.plan.index(shard_count, checksums)
                    if self._saving.strict and shard_count:
                        self._read_again(share, share.files)
        except BaseException as error:  # told to all when the save is completed
            share.error = error
        finally:
            pending.mark_captured()
            share.written.set()

    @staticmethod
    def _read_again(share: _Share, files: ShardFiles | BundleCommit) -> None:
        problem = files.damage(share.index)
        if problem is not None:
            raise differs_when_read_again(share.prefix, problem)

    def _complete(self, share: _Share, save: Save, pending: PendingSave, timeout: float | None) -> None:
        """In the thread of whoever waits: the end of the save, the same on every rank."""
        if not share.written.wait(timeout):
            raise TimeoutError
        try:
            self._finish(share, pending)
        except BaseException as error:
            pending.fail(error)
            if not isinstance(error, Exception):
                raise
            return
        pending.finish(len(save.plan.rows), int(save.plan.layout.nbytes.sum()))

    def _finish(self, share: _Share, pending: PendingSave) -> None:
        may_be_committed = False
        try:
            try:
                pending.begin_commit()
            except Exception as error:  # cancelled
                share.error = share.error or error
            self._group.exchange("written", share.error or share.index, lambda indexes: self._merge(share, indexes))
            may_be_committed = True
            answer = json.loads(self._group.exchange("commit", b"", lambda _: self._publish(share, pending)))
        except BaseException as error:
            if may_be_committed and isinstance(error, DeadlineExceededError) and error.ranks == (0,):
                error.add_note(f"Whether {share.prefix} was committed is not known here: checkpoint_exists() tells")
            elif share.files is not None:
                share.files.abort()
            raise
        if isinstance(share.files, ShardFiles):
            share.files.keep()
        if answer["error"] is not None:
            if share.commit is not None:
                share.commit.abort()  # of what is left of it
            raise error_of(answer["error"])
        if share.commit is None:
            self._checkpoints.replace_with_times([(path, time) for path, time in answer["listed"]])

    def _merge(self, share: _Share, indexes: Sequence[bytes]) -> list[bytes]:
        assert share.commit is not None
        inputs = [BundleIndex(data, f"the index of rank {rank}") for rank, data in enumerate(indexes) if data]
        first_shards = [first for first, data in zip(share.first_shards, indexes, strict=True) if data]
        share.merged = encode_index(share.commit.num_shards, merge_indexes(inputs, first_shards).entries)
        return [b""] * self._group.size

    def _publish(self, share: _Share, pending: PendingSave) -> list[bytes]:
        assert share.commit is not None
        failed = None
        with pending.timeline.span("commit"):
            try:
                self._saving.publish(share.commit, share.merged, share.meta_graph)
                if share.request.finish is not None:
                    share.request.finish(share.prefix)
            except Exception as error:
                if not share.commit.is_committed:
                    raise
                failed = facts_of(error)  # the checkpoint is there, and must stay
        answer = {"listed": self._checkpoints.with_times(), "error": failed}
        return [json.dumps(answer).encode()] * self._group.size


class _Leader:
    """What rank 0 remembers of the ranks' descriptions: they are sent again only when one has changed."""

    def __init__(self, options: SaverOptions) -> None:
        self._options = options
        self._digests: list[str] = []
        self._planned: list[str] = []
        self._assignment: Assignment | None = None
        self._trainable: set[str] = set()
        self._description: Description | None = None

    def hear(self, messages: Sequence[bytes], begin: Callable[[Assignment], list[bytes]]) -> list[bytes]:
        facts = [Message.decode(message).facts for message in messages]
        check_agreement("the prefix", [fact["prefix"] for fact in facts])
        check_agreement("the options of the save", [fact["options"] for fact in facts])
        self._digests = [fact["digest"] for fact in facts]
        if self._assignment is not None and self._digests == self._planned:
            return begin(self._assignment)
        asked = sorted(self._ranks_alike()[digest][0] for digest in self._ranks_alike())
        return [Message({"asked": asked}).encode()] * len(messages)

    def plan(self, descriptions: Sequence[bytes], begin: Callable[[Assignment], list[bytes]]) -> list[bytes]:
        alike = list(self._ranks_alike().values())
        described = [Message.decode(descriptions[ranks[0]]) for ranks in alike]
        indexes = [
            BundleIndex(message.body, f"the description of rank {ranks[0]}")
            for message, ranks in zip(described, alike, strict=True)
        ]
        self._assignment = assign(indexes, alike)
        self._planned = self._digests
        self._trainable = {name for message in described for name in message.facts["trainable"]}
        self._description = None
        return begin(self._assignment)

    def _ranks_alike(self) -> dict[str, list[int]]:
        alike: dict[str, list[int]] = {}
        for rank, digest in enumerate(self._digests):
            alike.setdefault(digest, []).append(rank)
        return alike

    def description(self) -> Description:
        """Of all that is saved, for the `.meta` file."""
        if self._description is None:
            assert self._assignment is not None
            variables = []
            for spec, key, part, full_shape in sorted(self._assignment.parts, key=in_order):
                name = key.decode("utf-8", "surrogateescape")
                variables.append(Described(name, spec, part, full_shape, None, name in self._trainable))
            self._description = Description(lambda: variables, self._options)
        return self._description


def _describe(plan: Plan, trainable: Sequence[str]) -> bytes:
    """What a rank holds: the index that it would write alone, without checksums."""
    return Message({"trainable": trainable}, plan.index(len(plan.layout.shard_nbytes), {})).encode()


def _unpacked(body: bytes, count: int) -> npt.NDArray[np.bool_]:
    bits: npt.NDArray[Any] = np.unpackbits(np.frombuffer(body, np.uint8), count=count)
    return bits.astype(np.bool_)
