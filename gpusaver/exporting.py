"""Variables described as a MetaGraphDef: the `.meta` file beside a checkpoint, from which they can be made anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from gpusaver.metagraph.building import saver_scope, variables_meta_graph
from gpusaver.metagraph.nodes import Names, node_name
from gpusaver.metagraph.saver_nodes import Saveable, names_of_saver
from gpusaver.metagraph.variables import GraphVariable, Part
from gpusaver.pipeline.commit import Emit, FileVersion, MetaFile
from gpusaver.pipeline.plan import Plan
from gpusaver.protos.meta_graph_pb2 import MetaGraphDef
from gpusaver.storage.base import Storage
from gpusaver.tensor import TensorSlice, TensorSpec
from gpusaver.variables import Leaves, Variable

if TYPE_CHECKING:
    from gpusaver.protos.saver_pb2 import SaverDef

#: Other nodes of a variable: no variable may be called so.
_BELOW = ("Assign", "Read/ReadVariableOp")
#: TensorFlow's "never", as its default: 0 would mean that every checkpoint is kept.
_NO_HOURS = 10_000.0


class SaverOptions(NamedTuple):
    """What the graph says of the Saver itself."""

    name: str | None
    filename: str | None
    sharded: bool
    reshape: bool
    max_to_keep: int
    keep_checkpoint_every_n_hours: float | None

    @property
    def hours(self) -> float:
        return self.keep_checkpoint_every_n_hours or _NO_HOURS


class Described(NamedTuple):
    """A variable, or a part of one (``part`` of ``full_shape``), without its array."""

    name: str
    spec: TensorSpec
    part: TensorSlice | None
    full_shape: tuple[int, ...] | None
    device: str | None
    trainable: bool


class MetaContent:
    """What `.meta` files are to say, and the last one that got it.  Only the saving thread calls these."""

    _written: FileVersion | None = None

    def write(self, emit: Emit) -> None:
        """``emit`` gets the bytes of a `.meta` file, piece by piece."""
        raise NotImplementedError

    def file(self, path: str) -> MetaFile:
        return MetaFile(path, self.write, self._written)

    def mark_written(self, path: str, storage: Storage) -> None:
        self._written = FileVersion(path, storage.version(path))


class Description(MetaContent):
    """What the variables of one checkpoint are: in the order of their names, the parts of one side by side.

    The content of `.meta` files is made by the first :meth:`write`, and by the second, which keeps it: most file
    systems let later files be other names of the first, and never ask again.
    """

    def __init__(self, variables: Callable[[], Iterable[Described]], options: SaverOptions) -> None:
        self._variables = variables
        self._options = options
        self._content: bytearray | None = None
        self._was_asked = False

    def write(self, emit: Emit) -> None:
        """Without devices: one that is missing would keep TensorFlow from restoring."""
        if self._content is None and self._was_asked:
            content = bytearray()
            self._serialize(content.extend, None, None, clear_devices=True)
            self._content = content
        self._was_asked = True
        if self._content is not None:
            emit(self._content)
        else:
            self._serialize(emit, None, None, clear_devices=True)

    def meta_graph(
        self,
        *,
        collection_list: Collection[str] | None = None,
        export_scope: str | None = None,
        clear_devices: bool = False,
    ) -> MetaGraphDef:
        """See :meth:`gpusaver.Saver.export_meta_graph`."""
        octets = bytearray()
        self._serialize(octets.extend, collection_list, export_scope, clear_devices=clear_devices)
        return MetaGraphDef.FromString(bytes(octets))

    def _serialize(
        self, emit: Emit, collection_list: Collection[str] | None, export_scope: str | None, *, clear_devices: bool
    ) -> None:
        scope = f"{export_scope.rstrip('/')}/" if export_scope else ""
        saveables = self._saveables()
        if scope:
            saveables = [
                Saveable(key, variable._replace(name=variable.name.removeprefix(scope)))
                for key, variable in saveables
                if variable.name.startswith(scope)
            ]
        variables_meta_graph(
            saveables,
            scope=self._options.name,
            sharded=self._options.sharded,
            reshape=self._options.reshape,
            filename=self._options.filename or "model",
            collections=collection_list,
            max_to_keep=self._options.max_to_keep,
            keep_checkpoint_every_n_hours=self._options.hours,
            clear_devices=clear_devices,
            emit=emit,
        )

    def saver_def(self) -> SaverDef:
        names = [variable.name for _, variable in self._saveables()]
        saver_def = names_of_saver(saver_scope(names, self._options.name), self._options.sharded)
        saver_def.max_to_keep = self._options.max_to_keep
        saver_def.keep_checkpoint_every_n_hours = self._options.hours
        return saver_def

    def _saveables(self) -> list[Saveable]:
        names = _VariableNames()
        counts: dict[str, int] = {}
        saveables = []
        for key, spec, piece, full_shape, device, trainable in self._variables():
            base, part = key, None
            if piece is not None and full_shape is not None and not piece.is_whole(full_shape):
                number = counts[key] = counts.get(key, -1) + 1
                base, part = f"{key}/part_{number}", Part(key, full_shape, piece)
            variable = GraphVariable(
                names.unique(base), spec.dtype, spec.shape, trainable, device=_graph_device(device), part=part
            )
            saveables.append(Saveable(key, variable))
        return saveables


class _VariableNames:
    """Names that the nodes of a variable can have: those of TensorFlow where they are possible and free."""

    def __init__(self) -> None:
        self._names = Names()

    def unique(self, text: str) -> str:
        while True:
            name = self._names.unique(node_name(text))
            below = [f"{name}/{node}" for node in _BELOW]
            if not any(node in self._names for node in below):
                for node in below:
                    self._names.unique(node)
                return name


class PlanDescription(Description):
    """Of the variables of one plan; a Saver keeps it as long as it :meth:`fits`."""

    def __init__(self, plan: Plan, leaves: Leaves, options: SaverOptions) -> None:
        super().__init__(self._described, options)
        self._plan = plan
        self._trainable = set(trainable_names(leaves))
        holders = enumerate(leaves.holders)
        #: By number, of Variables that were given one.
        self._devices = {n: holder.device for n, holder in holders if isinstance(holder, Variable) and holder.device}

    def _described(self) -> Iterator[Described]:
        rows, is_sharded = self._plan.rows, self._options.sharded
        for number, row in enumerate(rows):
            device = row.device if is_sharded else self._devices.get(number)
            yield Described(row.name, row.spec, row.part, row.full_shape, device, row.name in self._trainable)

    def fits(self, plan: Plan, leaves: Leaves) -> bool:
        return plan.rows is self._plan.rows and self._trainable == set(trainable_names(leaves))


def trainable_names(leaves: Leaves) -> list[str]:
    """Of Variables that are."""
    if None not in leaves.keys:  # as a Variable has
        return []
    holders = zip(leaves.names, leaves.holders, strict=True)
    return [name for name, holder in holders if isinstance(holder, Variable) and holder.trainable]


def _graph_device(device: str | None) -> str:
    """As graphs spell it: "/device:GPU:0" for "cuda:0"."""
    if device is None:
        return ""
    kind, _, number = device.partition(":")
    return f"/device:{'GPU' if kind == 'cuda' else kind.upper()}:{number}"
