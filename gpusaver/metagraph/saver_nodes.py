"""The nodes that a Saver adds to a graph, and the SaverDef that names three of them.

::

    save/filename/input -> save/filename -> save/Const          the prefix, fed by whoever saves or restores

    unsharded    save/SaveV2(save/Const, tensor_names, shape_and_slices, values...)
                 save/control_dependency                        = save/Const after SaveV2: fetch it to save
    sharded      per device: save/SaveV2[_i] to save/ShardedFilename[_i], part i of N below P_temp/
                 save/MergeV2Checkpoints                        one index, data files renamed
                 save/Identity                                  = save/Const after it: fetch it to save

    restore      save/RestoreV2(save/Const, tensor_names, shape_and_slices) -> [Reshape] -> an assign per variable
                 save/restore_all                               after all of them: run it to restore
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusaver.metagraph.nodes import colocated, constant, node_octets
from gpusaver.metagraph.tensors import tensor_proto
from gpusaver.metagraph.variables import GraphVariable, is_fully_known, slice_spec
from gpusaver.protos.saver_pb2 import SaverDef
from gpusaver.protos.types_pb2 import TensorProto
from gpusaver.tensor import DataType

_SHORT_DEVICE = re.compile(r"/(?:device:)?(cpu|gpu):", re.IGNORECASE)
_ANY_DEVICE = re.compile(r"/(?:device:)?(?:cpu|gpu|xla_cpu|xla_gpu|tpu):(?:\d+|\*)", re.IGNORECASE)


class Saveable(NamedTuple):
    """A variable of the graph and the name it has in checkpoints."""

    key: str
    variable: GraphVariable

    @property
    def value(self) -> str:
        """What is saved: a whole reference variable itself, as TensorFlow does, else what reads it."""
        variable = self.variable
        return variable.read if variable.is_resource or variable.part is not None else variable.name

    @property
    def device(self) -> str:
        """In one spelling, so that devices can be compared."""
        return _SHORT_DEVICE.sub(lambda match: f"/device:{match[1].upper()}:", self.variable.device)


def saver_nodes(
    saveables: Sequence[Saveable],
    *,
    scope: str = "save",
    sharded: bool = False,
    reshape: bool = False,
    filename: str = "model",
    clear_devices: bool = False,
    emit: Callable[[bytes], object],
) -> SaverDef:
    """Saves and restores ``saveables``, sorted by key, the parts of one variable side by side.

    ``emit`` gets one node after the other, serialized: as messages a large graph takes ten times the memory.
    ``clear_devices``: none says where it runs.  ``scope``: a prefix that no node of the graph has.  ``sharded``: one
    shard per distinct device, in the order of their names.  ``reshape``: stored shapes may differ from the variables'.
    The SaverDef has the three names, ``sharded`` and the version; retention is the caller's.
    """
    nodes = _Scope(scope, emit, clear_devices)
    prefix = nodes.constant("filename/input", filename)
    for name in ("filename", "Const"):
        prefix = nodes.add("PlaceholderWithDefault", name, [prefix], dtype=DataType.string, shape=())
    if sharded:
        in_order = sorted(saveables, key=lambda saveable: saveable.device)
        groups = itertools.groupby(in_order, key=lambda saveable: saveable.device)
        shards = [(device, list(members)) for device, members in groups]
        saved = _save_sharded(nodes, prefix, shards)
        restored = []
        for device, members in shards:
            assigns = _restore(nodes, prefix, members, reshape)
            restored.append(nodes.add("NoOp", "restore_shard", _controls(assigns), device))
    else:
        saved = _after(nodes, "control_dependency", prefix, [_save(nodes, prefix, saveables)])
        restored = _restore(nodes, prefix, saveables, reshape)
    restore_all = nodes.add("NoOp", "restore_all", _controls(restored))
    saver_def = names_of_saver(scope, sharded)
    assert [f"{prefix}:0", f"{saved}:0", restore_all] == [
        saver_def.filename_tensor_name,
        saver_def.save_tensor_name,
        saver_def.restore_op_name,
    ]
    return saver_def


def names_of_saver(scope: str, sharded: bool) -> SaverDef:
    """The SaverDef of the nodes that :func:`saver_nodes` makes."""
    return SaverDef(
        filename_tensor_name=f"{scope}/Const:0",
        save_tensor_name=f"{scope}/{'Identity' if sharded else 'control_dependency'}:0",
        restore_op_name=f"{scope}/restore_all",
        sharded=sharded,
        version=SaverDef.V2,
    )


class _Scope:
    """Makes nodes, all below one scope; clashes get a number, as in TensorFlow.

    No base is another one with a number, so that counting does: :class:`Names` would keep two names a variable.
    """

    def __init__(self, scope: str, emit: Callable[[bytes], object], clear_devices: bool) -> None:
        self._scope = scope
        self._counts: dict[str, int] = {}
        self._emit = emit
        self._clear_devices = clear_devices

    def name(self, base: str) -> str:
        count = self._counts[base] = self._counts.get(base, -1) + 1
        return f"{self._scope}/{base}_{count}" if count else f"{self._scope}/{base}"

    def add(self, op: str, base: str, inputs: Iterable[str], device: str = "", **attributes: Any) -> str:
        """``inputs``: names as this returned them.  Returns the node's."""
        name = self.name(base)
        self.node(op, name, inputs, device, **attributes)
        return name

    def node(self, op: str, name: str, inputs: Iterable[str], device: str = "", **attributes: Any) -> None:
        self._emit(node_octets(op, name, inputs, "" if self._clear_devices else device, **attributes))

    def const(self, name: str, value: Any, device: str = "") -> None:
        self._emit(constant(name, value, "" if self._clear_devices else device))

    def constant(self, base: str, value: Any, device: str = "") -> str:
        name = self.name(base)
        self.const(name, value, device)
        return name

    def checkpoint_op(
        self, op: str, first: str, saveables: Sequence[Saveable], values: Iterable[str], device: str
    ) -> str:
        """SaveV2 or RestoreV2, after the constants that name what it moves."""
        name = self.name(op)
        keys = [saveable.key for saveable in saveables]
        specs = [slice_spec(saveable.variable.part) for saveable in saveables]
        names, slices = f"{name}/tensor_names", f"{name}/shape_and_slices"
        self.const(names, _strings(keys), device)
        self.const(slices, _strings(specs), device)
        dtypes = [saveable.variable.dtype for saveable in saveables]
        self.node(op, name, itertools.chain((first, names, slices), values), device, dtypes=dtypes)
        return name


def _strings(items: Sequence[str]) -> TensorProto:
    return tensor_proto(np.array(items, object))


def _controls(names: Iterable[str]) -> Iterator[str]:
    return (f"^{name}" for name in names)


def _after(nodes: _Scope, name: str, value: str, befores: Sequence[str], device: str = "") -> str:
    """The string ``value``, once the ``befores`` have run."""
    return nodes.add("Identity", name, [value, *_controls(befores)], device, T=DataType.string)


def _save(nodes: _Scope, filename: str, saveables: Sequence[Saveable], device: str = "") -> str:
    values = (saveable.value for saveable in saveables)
    return nodes.checkpoint_op("SaveV2", filename, saveables, values, device)


def _save_sharded(nodes: _Scope, prefix: str, shards: Sequence[tuple[str, Sequence[Saveable]]]) -> str:
    suffix = nodes.constant("Const", "_temp/part")
    stem = nodes.add("StringJoin", "StringJoin", [prefix, suffix], N=2, separator="")
    count = nodes.constant("num_shards", np.int32(len(shards)))
    filenames, saved = [], []
    for number, (device, members) in enumerate(shards):
        host = on_host(device)
        filename = nodes.name("ShardedFilename")
        nodes.const(f"{filename}/shard", np.int32(number), host)
        nodes.node("ShardedFilename", filename, [stem, f"{filename}/shard", count], host)
        save = _save(nodes, filename, members, host)
        filenames.append(filename)
        saved.append(_after(nodes, "control_dependency", filename, [save], host))
    merge = nodes.name("MergeV2Checkpoints")
    pack = f"{merge}/checkpoint_prefixes"
    nodes.node("Pack", pack, [*filenames, *_controls(saved)], N=len(shards), T=DataType.string, axis=0)
    nodes.node("MergeV2Checkpoints", merge, [pack, prefix], delete_old_dirs=True)
    return _after(nodes, "Identity", prefix, [merge, *saved])


def _restore(nodes: _Scope, prefix: str, saveables: Sequence[Saveable], reshape: bool) -> list[str]:
    """The nodes that assign."""
    restore = nodes.checkpoint_op("RestoreV2", prefix, saveables, (), on_host(saveables[0].variable.device))
    assigns = []
    for number, (_, variable) in enumerate(saveables):
        value = f"{restore}:{number}" if number else restore
        name, dtype, device = variable.name, variable.dtype, variable.device
        has_shape = reshape and is_fully_known(variable.shape)
        if has_shape:
            reshaped = nodes.name("Reshape")
            nodes.const(f"{reshaped}/shape", np.array(variable.shape, np.int64), device)
            types = {"T": dtype, "Tshape": DataType.int64}
            nodes.node("Reshape", reshaped, [value, f"{reshaped}/shape"], device, **types)
            value = reshaped
        if variable.is_resource:
            value = nodes.add("Identity", "Identity", [value], device, T=dtype)
            assigns.append(nodes.add("AssignVariableOp", "AssignVariableOp", [name, value], device, dtype=dtype))
        else:
            # Without a known shape the variable takes the stored one.
            checks = is_fully_known(variable.shape)
            attributes = {"T": dtype, "validate_shape": checks, "use_locking": True, "_class": colocated(name)}
            assigns.append(nodes.add("Assign", "Assign", [name, value], device, **attributes))
    return assigns


def on_host(device: str) -> str:
    """The CPU of the same machine: where files are read and written."""
    return f"{_ANY_DEVICE.sub('', device)}/device:CPU:0"
