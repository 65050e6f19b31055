"""Generated variables of every type and shape: TensorFlow reads what gpusaver wrote, and the reverse, to the bit."""

from __future__ import annotations

from typing import Any

import tensorflow_side as tensorflow
from generated import State, Tensor, differing, direct_io, everything, few, folder, save, states, tensors
from hypothesis import example, given
from hypothesis import strategies as st

import gpusaver

#: Files below this size are the same byte for byte; in larger ones gpusaver begins large tensors on a page.
SMALL = 128 * 1024
captures = st.sampled_from([None, "snapshot", "deferred", "blocking"])


def with_variables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype not in tensorflow.WITHOUT_VARIABLES}


@few
@example(everything(), None, None)
@given(states, direct_io, captures)
def test_tensorflow_reads_what_gpusaver_wrote(state: State, direct: Any, capture: Any) -> None:
    with folder() as directory:
        prefix = directory / "model.ckpt"
        save(prefix, state.live(), capture, direct_io=direct)
        expected = state.tensors
        assert tensorflow.specs(prefix) == {name: (t.dtype, t.shape) for name, t in expected.items()}
        assert not differing(expected, tensorflow.read(prefix))
        wanted = [(name.encode(), "", tensor.dtype) for name, tensor in expected.items()]
        assert not differing(expected, dict(zip(expected, tensorflow.restore_op(prefix, wanted), strict=True)))
        if held := with_variables(expected):
            with tensorflow.Variables(held) as variables:
                assert not differing(held, variables.restore(prefix))


@few
@example(everything(), True, "during")
@example(everything(), False, "during")
@given(states, st.booleans(), st.sampled_from(["during", "before"]))
def test_gpusaver_reads_what_tensorflow_wrote(state: State, by_op: bool, verify: Any) -> None:
    with folder() as directory:
        prefix = directory / "model.ckpt"
        expected = state.tensors if by_op else with_variables(state.tensors)
        if by_op:
            tensorflow.save_op(prefix, [(name.encode(), "", tensor) for name, tensor in expected.items()])
        elif expected:
            with tensorflow.Variables(expected) as variables:
                variables.save(prefix)
        else:
            return
        assert not differing(expected, gpusaver.load(prefix))
        live = state.live(garbage=True)
        report = gpusaver.Saver(live).restore(prefix, partial=True, verify=verify)
        assert report.restored == sorted(expected)
        found = state.values(live)
        assert not differing(expected, {name: found[name] for name in expected})


names = st.one_of(
    st.binary(min_size=1, max_size=6), st.sampled_from([b"\0", b"\xff", b"a\0\1b", b"\0p\0\1\0", b"n" * 17_000])
)


@few
@given(st.dictionaries(names, tensors(), min_size=1, max_size=5))
def test_names_of_any_bytes(stored: dict[bytes, Tensor]) -> None:
    """TensorFlow's Python cannot name them all, its ops can."""
    expected = {name.decode("utf-8", "surrogateescape"): tensor for name, tensor in stored.items()}
    by_op = [(name, "", tensor) for name, tensor in sorted(stored.items())]
    with folder() as directory:
        tensorflow.save_op(directory / "theirs", by_op)
        assert not differing(expected, gpusaver.load(directory / "theirs"))
        save(directory / "ours", {name: gpusaver.Variable(t.array, dtype=t.dtype) for name, t in expected.items()})
        wanted = [(name, "", tensor.dtype) for name, tensor in stored.items()]
        found = tensorflow.restore_op(directory / "ours", wanted)
        assert not differing(expected, dict(zip(expected, found, strict=True)))
        ours, theirs = (sorted(directory.glob(f"{writer}.[di]*")) for writer in ("ours", "theirs"))
        if theirs[0].stat().st_size < SMALL:
            assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


@few
@given(st.dictionaries(st.sampled_from("abcdefgh"), tensors(), min_size=1), direct_io)
def test_shards_by_gpusaver(expected: dict[str, Tensor], direct: Any) -> None:
    with folder() as directory:
        prefix = directory / "model.ckpt"
        state = [
            gpusaver.Variable(tensor.array, name, tensor.dtype, device=f"cpu:{number % 3}")
            for number, (name, tensor) in enumerate(expected.items())
        ]
        save(prefix, state, sharded=True, direct_io=direct)
        assert len(list(directory.glob("*.data-*"))) == min(3, len(expected))
        assert not differing(expected, tensorflow.read(prefix))
        if held := with_variables(expected):
            with tensorflow.Variables(held, devices=2) as variables:
                assert not differing(held, variables.restore(prefix))


@few
@given(st.dictionaries(st.sampled_from("abcdefgh"), tensors(), min_size=2))
def test_shards_by_tensorflow(stored: dict[str, Tensor]) -> None:
    with folder() as directory:
        if held := with_variables(stored):
            with tensorflow.Variables(held, devices=3) as variables:
                variables.save(directory / "saver")
            assert not differing(held, gpusaver.load(directory / "saver"))
        parts = [directory / "first", directory / "second"]
        names = sorted(stored)
        for part, half in zip(parts, (names[::2], names[1::2]), strict=True):
            tensorflow.save_op(part, [(name.encode(), "", stored[name]) for name in half])
        tensorflow.merge_op(parts, directory / "merged")
        assert not differing(stored, gpusaver.load(directory / "merged"))
        state = {name: gpusaver.Variable(tensor.garbage(), dtype=tensor.dtype) for name, tensor in stored.items()}
        gpusaver.Saver(state).restore(directory / "merged")
        assert not differing(stored, {name: variable.value for name, variable in state.items()})
