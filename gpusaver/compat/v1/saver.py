"""``tf.train.Saver``: variables of a graph and their arrays in a session, saved and restored by the native Saver."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

import gpusaver
from gpusaver.arguments import checkpoint_prefix, meta_graph_file
from gpusaver.bundle.filenames import temporary_path
from gpusaver.compat.v1.graph import Graph, Operation, Tensor, get_default_graph
from gpusaver.compat.v1.importing import import_nodes
from gpusaver.compat.v1.ops.state import slot_key
from gpusaver.compat.v1.saveables import all_saveables, saveables_of
from gpusaver.compat.v1.session import BaseSession
from gpusaver.errors import FailedPreconditionError
from gpusaver.exporting import MetaContent
from gpusaver.metagraph.reading import saved_variables
from gpusaver.metagraph.rewriting import encoded, with_scope, without_scope
from gpusaver.metagraph.saver_nodes import Saveable, saver_nodes
from gpusaver.pending import PendingSave
from gpusaver.protos import MetaGraphDef, SaverDef
from gpusaver.protos.convert import adopt
from gpusaver.protos.graph_pb2 import NodeDef
from gpusaver.reader import CheckpointReader
from gpusaver.retention import Retention
from gpusaver.storage.base import write_bytes
from gpusaver.storage.routing import RoutedStorage
from gpusaver.tensor import DataType

#: Seconds since the epoch, for retention.
clock = time.time


class _Content(MetaContent):
    """What the native Saver writes into a `.meta` file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def write(self, emit: Callable[[bytes], object]) -> None:
        emit(self.data)


class _NativeSaver(gpusaver.Saver):
    """With TensorFlow's retention, and in its `.meta` files the graph of the front end: ``meta_graph``."""

    meta_graph = _Content(b"")

    def __init__(self, var_list: Any, saver_def: SaverDef, **options: Any) -> None:
        super().__init__(var_list, max_to_keep=None, clock=lambda: clock(), **options)
        hours = saver_def.keep_checkpoint_every_n_hours
        self._list.retention = Retention(saver_def.max_to_keep, hours, clock(), like_tensorflow=True)

    def _describe(self, leaves: Any, plan: Any) -> MetaContent:
        return self.meta_graph


class Saver:
    """Saves and restores the variables of a graph, with the arguments of ``tf.train.Saver``.

    ``var_list``: variables, or a dict from names in the checkpoint to variables, or to lists of the parts of one; None:
    all global variables of the default graph.  ``builder`` and ``write_version`` other than V2 are refused: V1 is read,
    never written.  See :class:`gpusaver.Saver` and ``docs/differences.md``.

    Raises ValueError for no variables (unless ``allow_empty``) and for names given twice, TypeError for other objects.
    """

    def __init__(
        self,
        var_list: Any = None,
        reshape: bool = False,
        sharded: bool = False,
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = 10000.0,
        name: str | None = None,
        restore_sequentially: bool = False,
        saver_def: Any = None,
        builder: Any = None,
        defer_build: bool = False,
        allow_empty: bool = False,
        write_version: int = SaverDef.V2,
        pad_step_number: bool = False,
        save_relative_paths: bool = False,
        filename: str | None = None,
    ) -> None:
        if defer_build and var_list is not None:
            raise ValueError(
                "If `var_list` is provided then build cannot be deferred: set defer_build=False, or var_list=None."
            )
        if builder is not None or write_version != SaverDef.V2:
            raise ValueError(
                "Saver: expected builder=None and write_version=V2; V1 checkpoints are read, never written"
            )
        self._var_list = var_list
        self._reshape, self._sharded, self._name, self._filename = reshape, sharded, name, filename or "model"
        self._allow_empty = allow_empty
        self._retention = (max_to_keep, keep_checkpoint_every_n_hours)
        self._options: dict[str, Any] = {
            "reshape": reshape,
            "sharded": sharded,
            "restore_sequentially": restore_sequentially,
            "pad_step_number": pad_step_number,
            "save_relative_paths": save_relative_paths,
        }
        Retention(max_to_keep, keep_checkpoint_every_n_hours, 0.0, like_tensorflow=True)  # refuses wrong numbers
        self.saver_def: SaverDef | None = None
        self._graph: Graph = get_default_graph()
        self._saveables: list[Saveable] = []
        self._state: dict[str, Any] = {}
        self._native: _NativeSaver | None = None
        self._meta_graph: tuple[Any, _Content] | None = None
        self._lock = threading.Lock()
        if saver_def is not None:
            self._take(checked_saver_def(saver_def))
        elif not defer_build:
            self.build()

    # -- building

    def build(self) -> None:
        """Adds the Saver's nodes to the default graph; only needed after ``defer_build=True``."""
        if self.saver_def is not None or self._native is not None:
            return
        self._graph = get_default_graph()
        var_list = all_saveables() if self._var_list is None else self._var_list
        self._saveables = saveables_of(var_list)
        if not self._saveables:
            if not self._allow_empty:
                raise ValueError(
                    "No variables to save: the graph has none. tf.train.import_meta_graph(path + '.meta') rebuilds the "
                    "graph of a checkpoint, variables included."
                )
            self._make_native(SaverDef())
            return
        scope = self._graph.unique_name(self._name or "save")
        nodes: list[NodeDef] = []
        saver_def = saver_nodes(
            self._saveables,
            scope=scope,
            sharded=self._sharded,
            reshape=self._reshape,
            filename=self._filename,
            emit=lambda octets: nodes.append(NodeDef.FromString(octets)),
        )
        self._graph.check_open()
        import_nodes(self._graph, nodes)
        saver_def.max_to_keep = self._retention[0] or 0
        saver_def.keep_checkpoint_every_n_hours = self._retention[1] or 0
        self.saver_def = saver_def
        self._make_native(saver_def)

    def _take(self, saver_def: SaverDef) -> None:
        """The variables that the nodes of ``saver_def`` restore."""
        self.saver_def = saver_def
        self._sharded = self._options["sharded"] = saver_def.sharded
        meta_graph = MetaGraphDef(graph_def=self._graph.as_graph_def(), saver_def=saver_def)
        self._saveables = saved_variables(meta_graph)
        self._make_native(saver_def)

    def _make_native(self, saver_def: SaverDef) -> None:
        for saveable in self._saveables:
            self._state[saveable.key] = self._leaf_list(saveable.key, None)
        self._native = _NativeSaver(
            self._state, saver_def, allow_empty=self._allow_empty or not self._saveables, **self._options
        )

    def _leaf_list(self, key: str, arrays: dict[str, Any] | None) -> Any:
        """What the native Saver gets under ``key``: an array, or the parts of one.  Without arrays: stand-ins."""
        leaves = []
        for saveable in self._saveables:
            if saveable.key == key:
                array = _stand_in(saveable) if arrays is None else arrays[saveable.variable.name]
                leaves.append(_leaf(saveable, array, placed=self._sharded))
        return leaves[0] if len(leaves) == 1 and self._part_of(key) is None else leaves

    def _part_of(self, key: str) -> Any:
        return next(saveable.variable.part for saveable in self._saveables if saveable.key == key)

    def _set_state(self, arrays: dict[str, Any] | None) -> None:
        for key in self._state:
            self._state[key] = self._leaf_list(key, arrays)

    # -- saving

    def save(
        self,
        sess: Any,
        save_path: Any,
        global_step: Any = None,
        latest_filename: str | None = None,
        meta_graph_suffix: str = "meta",
        write_meta_graph: bool = True,
        write_state: bool = True,
        strip_default_attrs: bool = False,
        save_debug_info: bool = False,
    ) -> str | None:
        """Saves and returns the prefix when the checkpoint is durable.

        ``global_step``: an int, or a variable or tensor that ``sess`` evaluates.  Raises TypeError if ``sess`` is no
        session, RuntimeError if it is closed, FailedPreconditionError for variables without a value; for the rest see
        :meth:`gpusaver.Saver.save`.
        """
        found: str | None = self._save(
            "save",
            sess,
            save_path,
            global_step,
            strip_default_attrs,
            latest_filename=latest_filename,
            meta_graph_suffix=meta_graph_suffix,
            write_meta_graph=write_meta_graph,
            write_state=write_state,
        )
        return found

    def save_async(
        self,
        sess: Any,
        save_path: Any,
        global_step: Any = None,
        latest_filename: str | None = None,
        meta_graph_suffix: str = "meta",
        write_meta_graph: bool = True,
        write_state: bool = True,
    ) -> PendingSave | None:
        """An extension: starts a save, and returns while it goes on in the background; TensorFlow has none.

        The values saved are those of this moment: arrays in a session are replaced, never written to, so that nothing
        needs to be copied first.
        """
        pending: PendingSave | None = self._save(
            "save_async",
            sess,
            save_path,
            global_step,
            False,
            capture="deferred",
            latest_filename=latest_filename,
            meta_graph_suffix=meta_graph_suffix,
            write_meta_graph=write_meta_graph,
            write_state=write_state,
        )
        return pending

    def _save(
        self, method: str, sess: Any, save_path: Any, global_step: Any, strip_default_attrs: bool, **options: Any
    ) -> Any:
        """By the native Saver's ``method``."""
        native = self._built("save")
        if not isinstance(sess, BaseSession):
            raise TypeError(f"'sess' must be a Session; {sess}")
        sess.check_open()
        self._check_graph(sess)
        step = _evaluated(sess, global_step)
        meta_graph = self._encoded(strip_default_attrs) if options["write_meta_graph"] else _Content(b"")
        if not self._saveables:
            return self._save_nothing(save_path, step, meta_graph, options)
        arrays = self._arrays(sess)
        with self._lock:
            native.meta_graph = meta_graph
            self._set_state(arrays)
            try:
                return getattr(native, method)(save_path, step, **options)
            finally:
                self._set_state(None)

    def _save_nothing(self, save_path: Any, step: Any, meta_graph: _Content, options: dict[str, Any]) -> None:
        """As TensorFlow does with ``allow_empty``: the graph alone."""
        if options["write_meta_graph"]:
            prefix = checkpoint_prefix(save_path, step, padded=self._options["pad_step_number"])
            path = meta_graph_file(prefix, options["meta_graph_suffix"])
            write_bytes(RoutedStorage(), path, temporary_path(path, secrets.token_hex(8)), meta_graph.data)

    def _encoded(self, strip_default_attrs: bool) -> _Content:
        """Of a `.meta` file; kept as long as nothing is added to graph or collections."""
        items = tuple((key, *map(id, self._graph.get_collection(key))) for key in self._graph.get_all_collection_keys())
        key = (self._graph.version, items, strip_default_attrs)
        if self._meta_graph is None or self._meta_graph[0] != key:
            data = encoded(self.export_meta_graph(strip_default_attrs=strip_default_attrs))
            self._meta_graph = key, _Content(data)
        return self._meta_graph[1]

    def _arrays(self, sess: BaseSession) -> dict[str, Any]:
        """By node.  FailedPreconditionError names all variables that have no value."""
        found, missing = {}, []
        for _, variable in self._saveables:
            value = sess.variables.get(slot_key(self._node(variable.name)))
            if value is None:
                missing.append(variable.name)
            found[variable.name] = value
        if missing:
            raise FailedPreconditionError(f"Attempting to use uninitialized value {', '.join(missing)}")
        return found

    def _node(self, name: str) -> Operation:
        return self._graph.get_operation_by_name(name)

    def _built(self, what: str) -> _NativeSaver:
        if self._native is None:
            raise RuntimeError(f"`build()` should be called before {what} if defer_build==True")
        return self._native

    def _check_graph(self, sess: BaseSession) -> None:
        if sess.graph is not self._graph and self._saveables:
            raise RuntimeError("The session is one of another graph than the Saver's: make it in the same graph.")

    # -- restoring

    def restore(self, sess: Any, save_path: Any) -> None:
        """Gives the variables the values of the checkpoint; they need no other initialization.

        Arrays are read into new memory and taken over when all of them are there and verified: an error changes
        nothing.  Raises ValueError if there is no such checkpoint, NotFoundError for missing names,
        InvalidArgumentError for other shapes or types, DataLossError for damage.
        """
        native = self._built("restore")
        if not self._saveables:
            return
        if save_path is None:
            raise ValueError("Can't load save_path when it is None.")
        if not isinstance(sess, BaseSession):
            raise TypeError(f"'sess' must be a Session; {sess}")
        sess.check_open()
        self._check_graph(sess)
        stored = self._stored_shapes(save_path)
        fresh = {v.name: _empty(sess, v.dtype, stored.get(key) or _known(v.shape)) for key, v in self._saveables}
        self._set_state(fresh)
        try:
            native.restore(save_path)
            for key, variable in self._saveables:
                value = self._state[key]
                if isinstance(value, gpusaver.Variable):
                    value = value.value
                if variable.part is not None:
                    value = fresh[variable.name]
                sess.variables[slot_key(self._node(variable.name))] = value
        finally:
            self._set_state(None)

    def _stored_shapes(self, save_path: Any) -> dict[str, tuple[int, ...]]:
        """Of variables whose own shape is unknown: they take the stored one."""
        open_ended = [key for key, variable in self._saveables if _known(variable.shape) is None]
        if not open_ended or not gpusaver.checkpoint_exists(save_path):
            return {}
        shapes = CheckpointReader(save_path).get_variable_to_shape_map()
        return {key: tuple(shapes[key]) for key in open_ended if key in shapes}

    # -- the list of checkpoints

    @property
    def last_checkpoints(self) -> list[str]:
        return self._built("last_checkpoints").last_checkpoints

    def set_last_checkpoints(self, last_checkpoints: Sequence[str]) -> None:
        assert isinstance(last_checkpoints, list)
        self._built("set_last_checkpoints").set_last_checkpoints(last_checkpoints)

    def set_last_checkpoints_with_time(self, last_checkpoints_with_time: Iterable[tuple[str, float]]) -> None:
        assert isinstance(last_checkpoints_with_time, list)
        self._built("set_last_checkpoints_with_time").set_last_checkpoints_with_time(last_checkpoints_with_time)

    def recover_last_checkpoints(self, checkpoint_paths: Iterable[Any]) -> None:
        self._built("recover_last_checkpoints").recover_last_checkpoints(checkpoint_paths)

    # -- the graph

    def as_saver_def(self) -> SaverDef | None:
        return self.saver_def

    def to_proto(self, export_scope: str | None = None) -> SaverDef | None:
        """The SaverDef; under a scope with the names inside it, None if they do not all lie there."""
        if export_scope is None or self.saver_def is None:
            return self.saver_def
        return without_scope(self.saver_def, export_scope)

    @staticmethod
    def from_proto(saver_def: Any, import_scope: str | None = None) -> Saver:
        return Saver(saver_def=with_scope(checked_saver_def(saver_def), import_scope))

    def export_meta_graph(
        self,
        filename: str | None = None,
        collection_list: Sequence[str] | None = None,
        as_text: bool = False,
        export_scope: str | None = None,
        clear_devices: bool = False,
        clear_extraneous_savers: bool = False,
        strip_default_attrs: bool = False,
        save_debug_info: bool = False,
    ) -> MetaGraphDef:
        """The graph, this Saver and the collections as a MetaGraphDef; written too if ``filename`` is given."""
        from gpusaver.compat.v1.meta_graphs import export_meta_graph

        return export_meta_graph(
            filename=filename,
            saver_def=self.saver_def,
            collection_list=collection_list,
            as_text=as_text,
            graph=self._graph,
            export_scope=export_scope,
            clear_devices=clear_devices,
            clear_extraneous_savers=clear_extraneous_savers,
            strip_default_attrs=strip_default_attrs,
        )

    def close(self) -> None:
        """An extension: waits for a save in the background, and raises its error if nobody has seen it."""
        if self._native is not None:
            self._native.close()


def checked_saver_def(saver_def: Any) -> SaverDef:
    try:
        adopted = adopt(saver_def, SaverDef)
    except TypeError as error:
        raise ValueError(f"saver_def must be a saver_pb2.SaverDef: {error}") from None
    if not adopted.save_tensor_name:
        raise ValueError(f"saver_def must specify the save_tensor_name: {adopted}")
    if not adopted.restore_op_name:
        raise ValueError(f"saver_def must specify the restore_op_name: {adopted}")
    return adopted


def _known(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if shape is None or -1 in shape else shape


def _empty(sess: BaseSession, dtype: DataType, shape: tuple[int, ...] | None) -> Any:
    if dtype is DataType.string:
        strings = np.empty(shape or (), object)
        strings.fill(b"")
        return strings
    return sess.xp.empty(shape or (), dtype.numpy_dtype)


def _stand_in(saveable: Saveable) -> Any:
    """An array of the variable's type and shape that takes no memory."""
    dtype, shape = saveable.variable.dtype, _known(saveable.variable.shape) or ()
    zero = np.array(b"", object) if dtype is DataType.string else np.zeros((), dtype.numpy_dtype)
    return np.broadcast_to(zero, shape)


def _leaf(saveable: Saveable, array: Any, *, placed: bool) -> Any:
    variable = saveable.variable
    if variable.part is not None:
        return gpusaver.PartitionedVariable(variable.part.full_shape, variable.part.slice, array)
    device = _device(variable.device) if placed else None
    needs_type = variable.dtype.name.startswith(("qint", "quint"))
    if device is None and not needs_type:
        return array
    with gpusaver.variables():
        return gpusaver.Variable(array, "v", dtype=variable.dtype if needs_type else None, device=device)


def _device(device: str) -> str | None:
    """ "/device:CPU:1" as the native Saver says it.  A GPU is left to the array, which knows its own."""
    kind, _, number = device.rpartition("device:")[2].partition(":")
    return f"cpu:{int(number or 0)}" if kind.upper() == "CPU" else None


def _evaluated(sess: BaseSession, global_step: Any) -> Any:
    """The step as an int; of a name, that of the tensor, as in TensorFlow 1.15."""
    if isinstance(global_step, str):
        try:
            global_step = sess.graph.as_graph_element(global_step, allow_operation=False)
        except KeyError as error:
            raise ValueError(f"global_step: {error.args[0]}") from None
    if isinstance(global_step, Tensor) or hasattr(global_step, "as_graph_element"):
        return int(sess.run(global_step))
    if isinstance(global_step, float | np.ndarray):
        raise TypeError(f"global_step: expected an int, a variable or a tensor, found {global_step!r:.60}")
    return global_step
