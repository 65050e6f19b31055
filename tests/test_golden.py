"""Every checkpoint by TensorFlow in tests/golden through the public functions: exactly the expected values.

What the bytes of their indexes mean is the matter of tests/bundle; here it is what a user gets.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bundle.bundle_tools import split_table
from bundle.golden_values import check_array

import gpusaver
from gpusaver import DataType, InvalidArgumentError, NotFoundError, PartitionedVariable, TensorSpec, UnimplementedError
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.entry import encode_entry
from gpusaver.bundle.index import BundleIndex

GOLDEN = Path(__file__).parent / "golden"
#: A checkpoint with thousands of tensors, of which the JSON has a digest.
BIG = GOLDEN / "big_index" / "big"


class Case(NamedTuple):
    prefix: Path
    #: Name (surrogateescape) -> what the JSON says of the tensor.
    tensors: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.prefix.parent.name}/{self.prefix.name}"

    def readable(self) -> dict[str, dict[str, Any]]:
        return {name: expected for name, expected in self.tensors.items() if "unreadable" not in expected}


def all_cases() -> Iterator[Case]:
    for path in sorted(GOLDEN.glob("*/expected-*.json")):
        content = json.loads(path.read_text())
        if isinstance(content.get("tensors"), list):
            yield Case(path.parent / content["prefix"], {name_of(tensor): tensor for tensor in content["tensors"]})


def name_of(tensor: dict[str, Any]) -> str:
    if "name_b64" in tensor:
        return base64.b64decode(tensor["name_b64"]).decode("utf-8", "surrogateescape")
    return str(tensor["name"])


CASES = list(all_cases())
every_case = pytest.mark.parametrize("case", CASES, ids=str)
PARTITIONED = [
    (str(next(GOLDEN.glob(f"{folder}/{stem}.index")).with_suffix("")), folder, name)
    for folder, stem, names in (
        ("partitioned_tf1", "part", ["big/i8", "boolish", "emb/cols", "emb/rows", "single", "t3", "whole"]),
        ("partitioned_tf2", "part", ["big/i8", "boolish", "emb/cols", "emb/rows", "single", "t3", "whole"]),
        ("sharded_tf1", "model-5", ["shared/table"]),
        ("sharded_tf2", "model-5", ["shared/table"]),
        ("odd_keys", "odd", ["part\0\udcffname"]),
    )
    for name in names
] + [(str(GOLDEN / "v1_tf1" / "legacy.ckpt"), "v1_tf1", "part")]


def case_of(prefix: Path) -> Case:
    return next(case for case in CASES if case.prefix == prefix)


def spec_of(expected: dict[str, Any]) -> TensorSpec:
    return TensorSpec(DataType[expected["dtype"]], tuple(expected["shape"]))


def check_value(expected: dict[str, Any], value: Any) -> None:
    """``value`` as the reader returns it, or an array that was restored."""
    spec = spec_of(expected)
    if isinstance(value, bytes):
        assert spec == TensorSpec(DataType.string, ())
        array = np.array(value, dtype=object)
    else:
        array = np.asarray(value)
    check_array(expected, spec, array)


def garbage(spec: TensorSpec, order: str = "C") -> np.ndarray:
    """An array that a restore must overwrite entirely."""
    if spec.dtype is DataType.string:
        return np.full(spec.shape, b"not restored", dtype=object)
    array = np.empty(spec.shape, spec.dtype.numpy_dtype, order)  # type: ignore[call-overload]
    array.ravel(order="K").view(np.uint8)[:] = 0xA5
    return array


def variables_for(case: Case, order: str = "C") -> dict[str, Any]:
    """What a Saver takes to restore every tensor of a checkpoint."""
    return {
        name: gpusaver.Variable(garbage(spec_of(expected), order), f"v{number}", DataType[expected["dtype"]])
        for number, (name, expected) in enumerate(case.readable().items())
    }


def test_every_folder_takes_part() -> None:
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert {case.prefix.parent.name for case in CASES} | {"big_index"} == folders


@every_case
def test_names_shapes_and_dtypes(case: Case) -> None:
    reader = gpusaver.load_checkpoint(case.prefix)
    names = sorted(case.tensors, key=lambda name: name.encode("utf-8", "surrogateescape"))
    assert list(reader) == names
    assert len(reader) == len(names)
    assert reader.get_variable_to_shape_map() == {name: case.tensors[name]["shape"] for name in names}
    assert reader.get_variable_to_dtype_map() == {name: DataType[case.tensors[name]["dtype"]] for name in names}
    assert gpusaver.list_variables(case.prefix) == sorted((name, case.tensors[name]["shape"]) for name in names)
    lines = reader.debug_string().decode("utf-8", "surrogateescape")
    for name in names:
        spec = spec_of(case.tensors[name])
        assert name in reader
        assert reader.has_tensor(name)
        assert f"{name} ({spec.dtype.enum_name}) [{','.join(map(str, spec.shape))}]\n" in lines
    assert not reader.has_tensor("no such tensor")
    with pytest.raises(NotFoundError, match="no such tensor"):
        reader.get_tensor("no such tensor")


@every_case
def test_every_value_one_by_one(case: Case) -> None:
    reader = gpusaver.load_checkpoint(case.prefix)
    for name, expected in case.readable().items():
        value = reader.get_tensor(name)
        check_value(expected, value)
        assert isinstance(value, np.ndarray) == bool(expected["shape"])
        check_value(expected, reader[name])
        check_value(expected, reader.get_tensor(name.encode("utf-8", "surrogateescape")))
        check_value(expected, gpusaver.load_variable(case.prefix, name))


@pytest.mark.parametrize("case", [case for case in CASES if case.readable() == case.tensors], ids=str)
def test_every_value_at_once(case: Case) -> None:
    values = gpusaver.load(case.prefix)
    assert list(values) == list(gpusaver.load_checkpoint(case.prefix))
    for name, value in values.items():
        check_value(case.tensors[name], value)
        assert not isinstance(value, np.ndarray) or (value.flags.writeable and value.flags.c_contiguous)


@every_case
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("verify", ["during", "before"])
def test_restored_into_arrays(case: Case, order: str, verify: Any) -> None:
    with gpusaver.variables():
        state = variables_for(case, order)
        arrays = {name: variable.value for name, variable in state.items()}
        with gpusaver.Saver(state) as saver:
            report = saver.restore(case.prefix, verify=verify)
    assert report.restored == sorted(state)
    assert report.unexpected == [name for name in gpusaver.load_checkpoint(case.prefix) if name not in state]
    for name, variable in state.items():
        check_value(case.tensors[name], variable.value)
        is_string = variable.dtype is DataType.string
        assert (variable.value is arrays[name]) != is_string
        assert (name in report.values) == is_string


def grids(shape: tuple[int, ...]) -> Iterator[list[tuple[slice, ...]]]:
    """Ways to cut a tensor: along each axis in 1 to 4 parts, and along all axes at once in 2."""
    for axis, size in enumerate(shape):
        for parts in range(1, min(size, 4) + 1):
            yield [
                tuple(cut if other == axis else slice(None) for other in range(len(shape))) for cut in cuts(size, parts)
            ]
    yield list(itertools.product(*(cuts(size, min(size, 2)) for size in shape)))


def cuts(size: int, parts: int) -> list[slice]:
    bounds = [size * number // parts for number in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


@pytest.mark.parametrize(("prefix", "folder", "name"), PARTITIONED, ids=lambda value: ascii(value).split("/")[-1])
def test_partitioned_tensors_cut_anew(prefix: str, folder: str, name: str) -> None:
    expected = case_of(Path(prefix)).tensors[name]
    spec = spec_of(expected)
    for grid in grids(spec.shape):
        whole = garbage(spec)
        # Views of one array: parts that are strided where the cut is not along the first axis.
        parts = [PartitionedVariable(spec.shape, index, whole[index]) for index in grid]
        gpusaver.Saver({name: parts}).restore(prefix)
        check_value(expected, whole)
        copies = [PartitionedVariable(spec.shape, index, garbage(spec)[index].copy()) for index in grid]
        gpusaver.Saver({name: copies}).restore(prefix)
        for index, part in zip(grid, copies, strict=True):
            assert part.value.tobytes() == whole[index].tobytes()


@pytest.mark.parametrize(("prefix", "folder", "name"), PARTITIONED, ids=lambda value: ascii(value).split("/")[-1])
def test_one_part_of_a_partitioned_tensor(prefix: str, folder: str, name: str) -> None:
    expected = case_of(Path(prefix)).tensors[name]
    spec = spec_of(expected)
    whole = gpusaver.load_variable(prefix, name)
    inner = tuple(slice(size // 3, size - size // 4) for size in spec.shape)
    part = PartitionedVariable(spec.shape, inner, garbage(spec)[inner].copy(), name)
    gpusaver.Saver([part]).restore(prefix)
    assert part.value.tobytes() == whole[inner].tobytes()


def test_thousands_of_tensors() -> None:
    expected = json.loads((BIG.parent / "expected-big.json").read_text())
    values = gpusaver.load(BIG)
    assert len(values) == expected["count"]
    assert {name: values[name].tolist() for name in expected["samples"]} == expected["samples"]
    state = {name: np.zeros(np.shape(value), np.float32) for name, value in values.items()}
    gpusaver.Saver(state).restore(BIG)
    for found in (values, state):
        digest = hashlib.sha256()
        for name in sorted(found):
            digest.update(name.encode() + b"\0" + found[name].tobytes())
        assert digest.hexdigest() == expected["sha256_of_sorted_name_nul_bytes"]


def test_variants_are_listed_and_refused() -> None:
    case = case_of(GOLDEN / "variant" / "var")
    variants = sorted(set(case.tensors) - set(case.readable()))
    assert len(variants) == 2
    reader = gpusaver.load_checkpoint(case.prefix)
    for name in variants:
        with pytest.raises(UnimplementedError, match=f"{name}.*variant"):
            reader.get_tensor(name)
        with pytest.raises(InvalidArgumentError, match=f"{name}.*float32.*variant"):
            gpusaver.Saver({name: np.zeros(case.tensors[name]["shape"], np.float32)}).restore(case.prefix)
    with pytest.raises(UnimplementedError, match=r"variant"):
        gpusaver.load(case.prefix)


OBJECT_BASED = [case for case in CASES if case.prefix.parent.name.startswith("object_based")]
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


@pytest.mark.parametrize("case", OBJECT_BASED, ids=str)
def test_object_based_checkpoints_under_readable_names(case: Case) -> None:
    keys = [name for name in case.tensors if name.endswith(SUFFIX)]
    paths = {key.removesuffix(SUFFIX).replace(".S", "/").replace("..", "."): key for key in keys}
    assert {"model/table/a/b", "model/table/k.x", "model/w/.OPTIMIZER_SLOT/opt/m", "step"} < set(paths)
    check_names(case, paths)


@pytest.mark.parametrize("case", OBJECT_BASED, ids=str)
def test_object_based_checkpoints_under_graph_names(case: Case) -> None:
    nodes = json.loads((case.prefix.parent / "expected-object-graph.json").read_text())["nodes"]
    keys = {attribute[1]: attribute[2] for node in nodes for attribute in node["attributes"]}
    assert {"w", "w/Adam", "beta1_power"} < set(keys)
    check_names(case, keys)


def check_names(case: Case, names: dict[str, str]) -> None:
    """Every name leads to the tensor under its key, for the reader as well as for a Saver."""
    reader = gpusaver.load_checkpoint(case.prefix)
    state = {name: garbage(spec_of(case.tensors[key])) for name, key in names.items()}
    report = gpusaver.Saver(state).restore(case.prefix)
    assert set(report.unexpected) == set(case.tensors) - set(names.values())
    for name, key in names.items():
        assert name in reader
        check_value(case.tensors[key], reader.get_tensor(name))
        check_value(case.tensors[key], gpusaver.load_variable(case.prefix, name))
        check_value(case.tensors[key], state[name])


def test_state_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    states = json.loads(Path("state_dir/expected-state.json").read_text())["states"]
    for name in ("checkpoint", "other_state"):
        found = gpusaver.get_checkpoint_state("state_dir", name)
        assert found is not None
        assert found.model_checkpoint_path == states[name]["model_checkpoint_path"]
        assert list(found.all_model_checkpoint_paths) == states[name]["all_model_checkpoint_paths"]
        assert gpusaver.latest_checkpoint("state_dir", name) == states[name]["latest_checkpoint"]
    # Written where the folder was before somebody moved it.  TensorFlow finds nothing: docs/differences.md.
    assert gpusaver.latest_checkpoint("state_dir", "abs_state") == "state_dir/model.ckpt-30"


@pytest.mark.parametrize(
    ("folder", "latest"),
    [
        ("basic_f32_tf1", "model.ckpt-1000"),
        ("basic_f32_tf2", "model.ckpt-1000"),
        ("object_based_tf1", "ckpt-3"),
        ("object_based_tf2", "ckpt-3"),
        ("sharded_tf1", "model-5"),
        ("state_dir", "model.ckpt-50"),
        ("v1_tf1", "sh.ckpt-?????-of-00002"),
    ],
)
def test_the_latest_checkpoint_of_a_directory(folder: str, latest: str) -> None:
    case = case_of(GOLDEN / folder / latest)
    assert gpusaver.latest_checkpoint(GOLDEN / folder) == str(case.prefix)
    values = gpusaver.load(GOLDEN / folder)
    assert set(values) == set(case.tensors)
    for name, value in values.items():
        check_value(case.tensors[name], value)


@pytest.mark.parametrize("case", [c for c in CASES if c.prefix.name in ("all", "part", "model-5")], ids=str)
def test_as_a_big_endian_machine_would_have_written_it(case: Case, tmp_path: Path) -> None:
    prefix = tmp_path / case.prefix.name
    write_big_endian(case.prefix, prefix)
    for name, value in gpusaver.load(prefix).items():
        check_value(case.tensors[name], value)
    with gpusaver.variables():
        state = variables_for(case, "F")
        gpusaver.Saver(state).restore(prefix, verify="before")
    for name, variable in state.items():
        check_value(case.tensors[name], variable.value)


def write_big_endian(source: Path, target: Path) -> None:
    """The same tensors with every number's bytes in the other order, and checksums to match."""
    for file in source.parent.glob(f"{source.name}.data-*"):
        shutil.copy(file, target.parent)
    index = BundleIndex(Path(f"{source}.index").read_bytes(), source.name)
    header = bytes((0x08, index.num_shards, 0x10, 1, 0x1A, 2, 0x08, 1))
    items = [(b"", header)]
    for key, entry in index.items():
        if entry.nbytes:
            path = Path(f"{target}.data-{entry.shard:05d}-of-{index.num_shards:05d}")
            data = bytearray(path.read_bytes())
            place = slice(entry.offset, entry.offset + entry.nbytes)
            width = entry.spec.dtype.swap_width
            data[place] = np.frombuffer(data[place], np.uint8).reshape(-1, width)[:, ::-1].tobytes()
            path.write_bytes(data)
            entry = entry._replace(crc=mask(crc32c(data[place])))
        items.append((key, encode_entry(entry)))
    Path(f"{target}.index").write_bytes(split_table(items, 100))
