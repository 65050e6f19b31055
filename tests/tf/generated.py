"""Hypothesis strategies for what can be in a checkpoint: tensors of every type and shape, in nested variables."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import gpusaver
from gpusaver import DataType

FIXED = [dtype for dtype in DataType if dtype.is_fixed_size]
QUANTIZED = [dtype for dtype in FIXED if dtype.name.startswith("q")]
# A graph and a session for each example are slow: few examples, each with many variables.
few = settings(max_examples=max(1, settings.default.max_examples // 3))
direct_io = st.sampled_from([None, True, False])
#: One index per dimension; several make up a tensor.
Index = tuple[slice, ...]


class Tensor(NamedTuple):
    """What is stored: ``array`` is row-major; strings are an array of bytes objects."""

    dtype: DataType
    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def garbage(self) -> Any:
        """An array for the tensor that a restore has to overwrite entirely."""
        if self.dtype is DataType.string:
            return np.full(self.shape, b"not restored", object)
        return random_bits(self.dtype, self.shape, 999)

    def matches(self, found: Any) -> bool:
        """Whether a value from any reader is this tensor, to the bit."""
        if self.dtype is DataType.string:
            # NumPy's own bytes type would drop zeros at an element's end.
            items = [found] if isinstance(found, bytes) else np.asarray(found).reshape(-1).tolist()
            items = [item.encode() if isinstance(item, str) else item for item in items]
            return np.shape(found) == self.shape and items == self.array.reshape(-1).tolist()
        array = np.asarray(found)
        array = array.astype(array.dtype.newbyteorder("="))
        same_type = array.dtype == self.array.dtype
        return same_type and array.shape == self.shape and array.tobytes() == self.array.tobytes()


def random_bits(dtype: DataType, shape: Sequence[int], seed: int) -> np.ndarray:
    """Any bit pattern of the type; with odd seeds many NaNs, infinities, denormals, both zeros, extreme integers."""
    rng = np.random.default_rng(seed)
    nbytes = math.prod(shape) * dtype.itemsize
    edges = np.array([0x00, 0x01, 0x7F, 0x80, 0xFF], np.uint8)
    octets = rng.choice(edges, nbytes) if seed % 2 else rng.integers(0, 256, nbytes, np.uint8)
    if dtype is DataType.bool:
        octets &= 1
    elif dtype.sub_byte_bits:
        octets &= (1 << dtype.sub_byte_bits) - 1
    return octets.view(dtype.numpy_dtype).reshape(shape)


def string_array(items: Sequence[bytes | str], shape: Sequence[int]) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


#: Small ones of every rank, and some that cross the limits between copied and direct, between small and large.
shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.lists(st.integers(0, 2), min_size=5, max_size=8).map(tuple),
    st.sampled_from([(127,), (3, 4099), (20_011, 5), (2, 1, 150_001)]),
)
_words = st.one_of(
    st.binary(max_size=9),
    st.text(max_size=5).map(str.encode),
    st.sampled_from([b"", b"\0", b"x\0", bytes(127), bytes(128), b"\xff" * 16_384]),
)


@st.composite
def tensors(draw: st.DrawFn, dtypes: Sequence[DataType] = (*FIXED, DataType.string)) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(shapes)
    if dtype is not DataType.string:
        return Tensor(dtype, random_bits(dtype, shape, draw(st.integers(0, 2**32 - 1))))
    count = math.prod(shape)
    words = [word[: 2**16 // max(count, 1)] for word in draw(st.lists(_words, min_size=1, max_size=8))]
    return Tensor(dtype, string_array([words[n % len(words)] for n in range(count)], shape))


def _interleaved(array: Any) -> Any:
    return np.zeros((*array.shape, 3), array.dtype)[..., 1]


def _backwards(array: Any) -> Any:
    return np.empty_like(array)[(*[slice(None, None, -1)] * array.ndim, ...)]


def _unaligned(array: Any) -> Any:
    return np.frombuffer(bytearray(array.nbytes + 1), array.dtype, offset=1).reshape(array.shape)


def _byte_swapped(array: Any) -> Any:
    return np.empty(array.shape, array.dtype.newbyteorder(">"))


#: Memory of which NumPy makes an array of the given shape and type.
_MEMORY: dict[str, Callable[[Any], Any]] = {
    "row-major": np.empty_like,
    "column-major": lambda array: np.empty(array.shape, array.dtype, "F"),
    "interleaved": _interleaved,
    "backwards": _backwards,
    "unaligned": _unaligned,
    "byte-swapped": _byte_swapped,
}


def layouts(tensor: Tensor) -> list[str]:
    """The kinds of value that can hold a tensor."""
    if tensor.dtype in QUANTIZED:
        return ["variable"]  # to NumPy they are plain integers
    if tensor.dtype is DataType.string:
        is_text = all(_is_text(item) for item in tensor.array.reshape(-1))
        names = ["row-major", "column-major", "variable"] + ["text"] * is_text
        return names if tensor.shape else [*names, "number"]
    names = ["row-major", "column-major", "interleaved", "backwards", "unaligned", "variable", "read-only"]
    if tensor.array.dtype.isbuiltin == 1:
        names += ["byte-swapped", "memoryview"]
    return names if tensor.shape else [*names, "number"]


def _is_text(item: bytes) -> bool:
    try:
        item.decode()
    except UnicodeDecodeError:
        return False
    return True


def placed(tensor: Tensor, array: Any, layout: str) -> Any:
    """``array``, which has the tensor's type and shape, as a value of this kind."""
    if layout == "variable":
        return gpusaver.Variable(array.copy(), dtype=tensor.dtype)
    if layout == "number":
        return array[()].item() if array.dtype in (np.bool_, np.int64, np.float64, np.complex128) else array[()]
    if layout == "text":
        return string_array([item.decode() for item in array.reshape(-1)], tensor.shape)
    if layout == "memoryview":
        return memoryview(array.copy())
    if layout == "read-only":
        copy = array.copy()
        copy.flags.writeable = False
        return copy
    memory = _MEMORY[layout](array)
    memory[...] = array
    return memory


def held(value: Any) -> Any:
    """The array in a value that :func:`placed` made, or that replaced one."""
    return value.value if isinstance(value, gpusaver.Variable) else value


_segments = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6),
    st.sampled_from(["w", "b", "layer/kernel", "a:0", "..", " ", "\x01", "é中", "p" * 300, "x\0y", "%s", "*?[a]"]),
)


class Place(NamedTuple):
    tensor: Tensor
    layout: str


@st.composite
def _places(draw: st.DrawFn) -> Place:
    tensor = draw(tensors())
    return Place(tensor, draw(st.sampled_from(layouts(tensor))))


class State:
    """Nested variables: ``tree`` has a Place for every leaf; :meth:`live` makes values of them."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.places = dict(_walk(tree, ""))
        self.count = sum(1 for _ in _walk(tree, ""))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: place.tensor for name, place in self.places.items()}

    def live(self, *, garbage: bool = False) -> dict[str, Any]:
        """Containers and values as a user has them, with the tensors' values or with others."""
        return _live(self.tree, garbage)

    @staticmethod
    def values(live: dict[str, Any]) -> dict[str, Any]:
        """What the leaves of :meth:`live` hold by now."""
        return {name: held(value) for name, value in _walk(live, "")}

    def __repr__(self) -> str:
        leaves = (f"{n!r}: {p.tensor.dtype.name}{list(p.tensor.shape)} {p.layout}" for n, p in self.places.items())
        return f"State({', '.join(leaves)})"


def _walk(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            yield from _walk(child, f"{name}/{key}" if name else str(key))
    else:
        yield name, node


def _live(node: Any, garbage: bool) -> Any:
    if isinstance(node, dict):
        return {key: _live(child, garbage) for key, child in node.items()}
    if isinstance(node, list):
        return [_live(child, garbage) for child in node]
    tensor, layout = node
    return placed(tensor, tensor.garbage() if garbage else tensor.array, layout)


#: Nested dicts and lists in which every leaf has a name of its own.
states = (
    st.dictionaries(
        _segments,
        st.recursive(
            _places(),
            lambda children: st.dictionaries(_segments, children, max_size=3) | st.lists(children, max_size=3),
            max_leaves=5,
        ),
        min_size=1,
        max_size=6,
    )
    .map(State)
    .filter(lambda state: state.places and state.count == len(state.places))
)


def everything() -> State:
    """Every type in every kind of value, and every type in shapes with an edge to them."""
    tree: dict[str, Any] = {}
    for dtype in (*FIXED, DataType.string):
        by_shape = {str(shape): _example(dtype, shape) for shape in ((), (0,), (2, 0, 3), (1,), (3, 5), (70_001,))}
        tree[dtype.name] = {
            "shapes": [Place(tensor, layouts(tensor)[0]) for tensor in by_shape.values()],
            "matrix": {layout: Place(by_shape["(3, 5)"], layout) for layout in layouts(by_shape["(3, 5)"])},
            "scalar": {layout: Place(by_shape["()"], layout) for layout in layouts(by_shape["()"])},
        }
    return State(tree)


def _example(dtype: DataType, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if dtype is DataType.string:
        return Tensor(dtype, string_array([b"%d" % n for n in range(count)], shape))
    return Tensor(dtype, random_bits(dtype, shape, count))


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[Index]:
    """Parts that make up a tensor of this shape, none of them empty: cut along some of its axes."""
    axes: list[list[slice]] = []
    for size in shape:
        # Every part is a variable in a graph: 4, 9, 8 or 16 at most.
        most = {1: 3, 2: 2}.get(len(shape), 1)
        cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=most))) if size > 1 else []
        if cuts:
            axes.append([slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, size], strict=True)])
        else:
            axes.append([draw(st.sampled_from([slice(None), slice(0, size)]))])
    parts: list[Index] = [()]
    for choices in axes:
        parts = [(*part, choice) for part in parts for choice in choices]
    return draw(st.permutations(parts))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Of its own for each example, and variables of its own."""
    with tempfile.TemporaryDirectory() as name, gpusaver.variables():
        yield Path(name)


def save(prefix: Path, state: Any, capture: Any = None, **options: Any) -> None:
    with gpusaver.Saver(state, **options) as saver:
        if capture is None:
            saver.save(prefix)
        else:
            saver.save_async(prefix, capture=capture).result()


def differing(tensors: dict[str, Tensor], found: dict[str, Any]) -> list[str]:
    """Names of tensors that are not what they should be."""
    assert set(found) == set(tensors)
    return [name for name, tensor in tensors.items() if not tensor.matches(found[name])]
