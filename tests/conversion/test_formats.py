"""Conversion among TensorFlow's checkpoints, safetensors and .npz: every bit, what is refused, and damage."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from failing_storage import FailingStorage
from hypothesis import given, settings
from hypothesis import strategies as st

import gpusaver
from gpusaver import DataLossError, DataType, Error, InvalidArgumentError, NotFoundError, conversion
from gpusaver.conversion import convert
from gpusaver.conversion import safetensors as own
from gpusaver.conversion.npz import has_dtype
from gpusaver.finding import prefix_of

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
PREFIXES = sorted(str(path).removesuffix(".index") for path in GOLDEN.glob("*/*.index"))
PREFIXES += [f"{GOLDEN}/v1_tf1/legacy.ckpt", f"{GOLDEN}/v1_tf1/sh.ckpt-?????-of-00002"]
PREFIXES.remove(f"{GOLDEN}/variant/var")
READABLE = [dtype for dtype in DataType if dtype.is_fixed_size]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, bytes) or first.dtype.hasobject:
        return bool(np.array_equal(first, second))
    first, second = np.asarray(first), np.asarray(second)
    return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())


def check_same(first: str, second: str, names: set[str] | None = None) -> None:
    a, b = gpusaver.load(first), gpusaver.load(second)
    assert set(b) == (set(a) if names is None else names)
    assert [name for name in b if not same(a[name], b[name])] == []


def dtypes_of(prefix: str) -> dict[str, DataType]:
    return gpusaver.load_checkpoint(prefix).get_variable_to_dtype_map()


def random_bits(dtype: DataType, shape: tuple[int, ...]) -> Any:
    """Any bits there can be: NaNs of all kinds, negative zeros; of bool and sub-byte types only those that exist."""
    bits = np.random.default_rng(dtype).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if dtype is DataType.bool:
        bits &= 1
    if dtype.sub_byte_bits:
        bits &= 2**dtype.sub_byte_bits - 1
    return np.ascontiguousarray(bits).reshape(-1).view(dtype.numpy_dtype).reshape(shape)


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.removeprefix(f"{GOLDEN}/"))
def test_a_checkpoint_of_any_kind_becomes_a_v2_checkpoint(prefix: str, tmp_path: Path) -> None:
    """Names that are not UTF-8, partitioned tensors, strings, the graph of objects: all of it."""
    copy = str(tmp_path / "copy")
    done = convert(prefix, copy)
    check_same(prefix, copy)
    assert (done.tensors, done.left_out) == (len(gpusaver.load_checkpoint(prefix)), [])
    assert list(gpusaver.verify(copy)) == []
    assert dtypes_of(copy) == dtypes_of(prefix)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", READABLE, ids=lambda dtype: dtype.name)
def test_every_dtype_goes_there_and_back_or_is_refused_by_name(dtype: DataType, ending: str, tmp_path: Path) -> None:
    with gpusaver.variables():
        values = [random_bits(dtype, shape) for shape in ((3, 5), (), (0, 2))]
        state = [gpusaver.Variable(value, f"a/{n}", dtype) for n, value in enumerate(values)]
        prefix = gpusaver.save(tmp_path / "model", state)
    path = tmp_path / f"model.{ending}"
    if dtype not in own._NAMES if ending == "safetensors" else not has_dtype(dtype):
        with pytest.raises(InvalidArgumentError, match=rf"a/0 \({dtype.name}\), a/1 \({dtype.name}\)"):
            convert(prefix, path)
        assert not path.exists()
        return
    convert(prefix, path)
    other = tmp_path / ("model.npz" if ending == "safetensors" else "model.safetensors")
    back = str(tmp_path / "back")
    convert(path, back)
    check_same(prefix, back)
    if dtype in own._NAMES and has_dtype(dtype):  # all the way round
        convert(path, other)
        convert(other, back, overwrite=True)
        check_same(prefix, back)


def test_what_the_formats_lack() -> None:
    """Nothing more is refused than these."""
    lacking = {dtype.name for dtype in READABLE if dtype not in own._NAMES}
    quantized = {"qint8", "quint8", "qint16", "quint16", "qint32"}
    low = {"int4", "uint4", "int2", "uint2", "float4_e2m1fn", "float8_e4m3b11fnuz"}
    assert lacking == quantized | low | {"complex128"}
    bare = {dtype.name for dtype in READABLE if not has_dtype(dtype)}
    ml = {"bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"}
    assert bare == quantized | low | ml


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    names = {name: dtype for name, dtype in own._DTYPES.items() if not name.startswith("F8")}
    state = {name: random_bits(dtype, (3, 2)) for name, dtype in names.items()} | {"ünï/cöde": np.zeros(0)}
    prefix = gpusaver.save(tmp_path / "model", state)
    convert(prefix, tmp_path / "ours.safetensors")
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    assert set(theirs) == set(state)
    assert [name for name in state if not same(theirs[name], state[name])] == []
    f8 = {name: random_bits(dtype, (7,)) for name, dtype in own._DTYPES.items() if name.startswith("F8")}
    safetensors.numpy.save_file(state | f8, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    done = convert(tmp_path / "theirs.safetensors", tmp_path / "back")
    assert done.left_out == ["the metadata __metadata__"]
    back = gpusaver.load(tmp_path / "back")
    assert [name for name, value in (state | f8).items() if not same(back[name], value)] == []
    convert(tmp_path / "back", tmp_path / "again.safetensors")
    assert safetensors.safe_open(tmp_path / "again.safetensors", "np").keys()  # float8 it opens, at least


def test_numpy_reads_our_npz_and_we_read_its(tmp_path: Path) -> None:
    state = {dtype.name: random_bits(dtype, (3, 2)) for dtype in READABLE if has_dtype(dtype)} | {"a/b.npy": np.ones(1)}
    prefix = gpusaver.save(tmp_path / "model", state)
    convert(prefix, tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as theirs:
        assert set(theirs) == set(state)
        assert [name for name in state if not same(theirs[name], state[name])] == []
    odd = {
        "fortran": np.arange(12.0).reshape(3, 4).T,
        "big": np.arange(3, dtype=">i4"),
        "bigf": np.ones((2, 2), ">f8").T,
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", **state, **odd)
        convert(tmp_path / "theirs.npz", tmp_path / "back", overwrite=True)
        back = gpusaver.load(tmp_path / "back")
        assert [name for name, value in state.items() if not same(back[name], value)] == []
        assert all(np.array_equal(back[name], value) for name, value in odd.items())


def test_equal_checkpoints_give_equal_files(tmp_path: Path) -> None:
    for ending in ("npz", "safetensors"):
        paths = [tmp_path / f"{n}.{ending}" for n in range(2)]
        for path in paths:
            convert(GOLDEN / "basic_f32_tf2" / "model.ckpt-1000", path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", {"o": np.array([{}], dtype=object)}),
        ("a.npz", {"o": np.zeros(2, "M8[s]")}),
        ("a.npz", {"o": np.array(["text"])}),
        ("a.npz", {"o": np.zeros(2, [("x", "f4")])}),
        ("a.npz", {"o": np.zeros(2, ml_dtypes.bfloat16)}),
    ],
    ids=["object", "time", "text", "structured", "bfloat16"],
)
def test_arrays_that_no_checkpoint_can_take_are_named(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / name, **content)
    with pytest.raises(InvalidArgumentError, match=r"o \("):
        convert(tmp_path / name, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_that_a_format_cannot_hold(tmp_path: Path) -> None:
    for name in ("a\udcff", "a\0b"):
        prefix = gpusaver.save(tmp_path / "model", {name: np.ones(1)})
        with pytest.raises(InvalidArgumentError, match="name"):
            convert(prefix, tmp_path / "a.npz")
    prefix = gpusaver.save(tmp_path / "model", {"a\udcff": np.ones(1)})
    with pytest.raises(InvalidArgumentError, match="name"):
        convert(prefix, tmp_path / "a.safetensors")
    prefix = gpusaver.save(tmp_path / "model", {"__metadata__": np.ones(1)})
    with pytest.raises(InvalidArgumentError, match="__metadata__"):
        convert(prefix, tmp_path / "a.safetensors")
    np.savez(tmp_path / "empty.npz", **{"": np.ones(1)})
    with pytest.raises(InvalidArgumentError, match="empty name"):
        convert(tmp_path / "empty.npz", tmp_path / "out")


def test_include_exclude_overwrite_and_progress(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "model", {"a/w": np.ones(3), "a/b": np.ones(2), "c": np.ones(1)})
    seen: list[tuple[int, int]] = []
    path = tmp_path / "a.npz"
    done = convert(prefix, path, include="^a/", exclude="b$", on_written=lambda *args: seen.append(args))
    assert (done.tensors, done.nbytes, seen) == (1, 24, [(24, 24)])
    with pytest.raises(InvalidArgumentError, match="exists"):
        convert(prefix, path)
    with pytest.raises(InvalidArgumentError, match="exists"):
        convert(path, prefix)
    assert convert(prefix, path, overwrite=True).tensors == 3
    with pytest.raises(InvalidArgumentError, match="safetensors instead"):
        convert(prefix, tmp_path / "a.pt")


def test_the_graph_of_objects_stays_behind(tmp_path: Path) -> None:
    done = convert(GOLDEN / "object_based_tf2", tmp_path / "a.npz")
    assert done.left_out == ["_CHECKPOINTABLE_OBJECT_GRAPH, TensorFlow's graph of objects"]
    with np.load(tmp_path / "a.npz") as archive:
        assert len(archive.files) == done.tensors == 16


def test_a_saved_model_a_directory_and_one_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    gpusaver.save(tmp_path / "variables" / "variables", {"w": np.ones(3)})
    assert prefix_of(tmp_path) == str(tmp_path / "variables" / "variables")
    assert prefix_of(GOLDEN / "state_dir") == str(GOLDEN / "state_dir" / "model.ckpt-50")
    assert prefix_of(GOLDEN / "big_index") == str(GOLDEN / "big_index" / "big")  # without a state file
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no checkpoint in the directory"):
        prefix_of(tmp_path / "empty")


@pytest.mark.parametrize("target", ["b", "b.npz", "b.safetensors"])
@pytest.mark.parametrize("damage", ["bit", "cut"])
@pytest.mark.parametrize("source", ["a", "a.npz", "a.safetensors"])
def test_damage_of_the_source_leaves_the_destination_as_it_was(
    source: str, damage: str, target: str, tmp_path: Path
) -> None:
    gpusaver.save(tmp_path / "a", {"w": np.arange(1000.0), "v": np.ones(3, np.int32)}, write_meta_graph=False)
    convert(tmp_path / "a", tmp_path / "a.npz")
    convert(tmp_path / "a", tmp_path / "a.safetensors")
    gpusaver.save(tmp_path / "b", {"old": np.ones(1)}, write_meta_graph=False)
    for ending in ("npz", "safetensors"):
        convert(tmp_path / "b", tmp_path / f"b.{ending}")
    file = tmp_path / (source if "." in source else "a.data-00000-of-00001")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[-900:]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if source == "a.safetensors" and damage == "bit":
        convert(tmp_path / source, tmp_path / target, overwrite=True)  # the format has no checksum: nobody can tell
        return
    with pytest.raises((DataLossError, EOFError)):
        convert(tmp_path / source, tmp_path / target, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("target", ["b", "b.npz", "b.safetensors"])
def test_any_failing_operation_leaves_the_old_or_the_new(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th operation of the storage fails, for every n; never is anything half written, or left lying about."""
    old = gpusaver.save(tmp_path / "old", {"v": np.ones(3)}, write_meta_graph=False)
    new = gpusaver.save(tmp_path / "new", {"w": np.arange(1000.0)}, write_meta_graph=False)
    (folder := tmp_path / "out").mkdir()
    storage = FailingStorage()
    for module in (conversion.tensorflow, conversion.tensors):
        monkeypatch.setattr(module, "RoutedStorage", lambda: storage)
    for step in range(100):
        storage.arm(None)
        convert(old, folder / target, overwrite=True)
        storage.arm(step)
        try:
            convert(new, folder / target, overwrite=True)
            break
        except gpusaver.UnknownError:
            storage.arm(None)
            convert(folder / target, tmp_path / "check", overwrite=True)
            assert set(gpusaver.load(tmp_path / "check")) in ({"v"}, {"w"})
            assert not [path.name for path in folder.iterdir() if path.name.endswith("-tmp")]
    assert 0 < step < 99


def headers() -> Iterator[bytes]:
    for content in (
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}',
        b'{"a": {"shape": [0], "data_offsets": [0, 0]}}',
        b"[" * 100_000,
        b"\xff\xff",
    ):
        yield len(content).to_bytes(8, "little") + content + bytes(8)
    yield b""
    yield bytes(8)
    yield (2**63).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("content", list(headers()), ids=lambda content: repr(content[8:50]))
def test_headers_made_to_hurt(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DataLossError, match=r"a\.safetensors"):
        convert(tmp_path / "a.safetensors", tmp_path / "out")


def test_a_safetensors_dtype_that_we_lack_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(InvalidArgumentError, match=r"x \(F6_E2M3\)"):
        convert(tmp_path / "a.safetensors", tmp_path / "out")


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_change_of_an_npz_is_an_error_of_ours_or_harmless(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("npz")
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(4, dtype=np.float32), b=np.zeros((2, 0)))
    content = bytearray(stream.getvalue())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / "a.npz").write_bytes(content)
    try:
        convert(folder / "a.npz", folder / "out")
    except Error:
        assert not (folder / "out.index").exists()


def test_a_member_with_more_than_its_array(tmp_path: Path) -> None:
    member = io.BytesIO()
    np.save(member, np.ones(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", member.getvalue() + b"more")
    with pytest.raises(DataLossError, match="longer"):
        convert(tmp_path / "a.npz", tmp_path / "out")
