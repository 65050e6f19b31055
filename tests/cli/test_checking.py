"""verify and diff: what they find, and that they find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from command_tools import GOLDEN, Command
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpusaver
from gpusaver.cli.statistics import Difference, side_by_side

PREFIXES = sorted(str(path).removesuffix(".index") for path in GOLDEN.glob("*/*.index"))
PREFIXES += [f"{GOLDEN}/v1_tf1/legacy.ckpt"]


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.removeprefix(f"{GOLDEN}/"))
def test_golden_checkpoints_are_whole_and_equal_to_themselves(prefix: str, cli: Command) -> None:
    assert cli("verify", prefix) == (0, "", "")
    assert cli("diff", prefix, prefix, "--exact") == (0, "", "")


def test_verify_lists_the_problems_of_all(tmp_path: Path, cli: Command) -> None:
    good = gpusaver.save(tmp_path / "good", {"w": np.arange(3.0)})
    bad = gpusaver.save(tmp_path / "bad", {"v": np.arange(3.0), "w": np.arange(9.0)})
    data = Path(f"{bad}.data-00000-of-00001")
    data.write_bytes(bytes(96))
    code, out, _ = cli("verify", good, bad)
    assert code == 1
    assert [line.split(": ")[1] for line in out.splitlines()] == ["tensor v", "tensor w"]
    assert cli("verify", bad, "--structure").code == 0
    data.write_bytes(bytes(50))
    assert cli("verify", bad, "--structure").code == 1
    found = json.loads(cli("verify", good, bad, "--json").out)["checkpoints"]
    assert [len(checked["problems"]) for checked in found] == [0, 2]
    assert cli("verify", tmp_path / "none")[:1] == (1,)  # no checkpoint is a problem as well


def diff(cli: Command, first: str, second: str, *arguments: str) -> dict[str, dict[str, Any]]:
    code, out, _ = cli("diff", first, second, "--json", *arguments)
    found = json.loads(out)
    assert code == (1 if found["tensors"] else 0)
    return {row["name"]: row for row in found["tensors"]}


def test_diff(tmp_path: Path, cli: Command) -> None:
    one = {
        "same": np.arange(3.0),
        "w": np.array([1.0, 2.0, np.nan]),
        "gone": 1,
        "kind": np.zeros(2),
        "z": np.array(0.0),
    }
    other = {
        "same": np.arange(3.0),
        "w": np.array([1.0, 3.0, np.nan]),
        "new": 1,
        "kind": np.zeros(3),
        "z": np.array(-0.0),
    }
    a, b = gpusaver.save(tmp_path / "a", one), gpusaver.save(tmp_path / "b", other)
    rows = diff(cli, a, b)
    assert {name: row["change"] for name, row in rows.items()} == {
        "gone": "removed",
        "kind": "changed",
        "new": "added",
        "w": "changed",
    }
    assert (rows["w"]["differing"], rows["w"]["max_abs"], rows["w"]["max_rel"]) == (1, 1.0, 1 / 3)
    assert (rows["kind"]["first"], rows["kind"]["second"]) == ("float64[2]", "float64[3]")
    exact = diff(cli, a, b, "--exact", "--filter", "^[a-z]$")
    assert {name: (row["differing"], row["max_abs"]) for name, row in exact.items()} == {"w": (1, 1.0), "z": (1, 0.0)}


def low_bits(values: list[int]) -> Any:
    return np.array(values, ml_dtypes.int4)


def test_diff_of_what_is_not_finite_and_of_large_integers(tmp_path: Path, cli: Command) -> None:
    low, high = -(2**63), 2**63 - 1
    one = {"i": np.array([low]), "f": np.array([np.inf, 1.0]), "u": np.array([0], np.uint64), "c": np.array([1j])}
    other = {"i": np.array([high]), "f": np.array([np.inf, np.nan]), "u": np.array([7], np.uint64), "c": np.array([0j])}
    one |= {"s": "a", "b": np.array([True]), "h": np.array([1], ml_dtypes.bfloat16), "l": low_bits([1])}
    other |= {
        "s": "b",
        "b": np.array([False]),
        "h": np.array([3], ml_dtypes.bfloat16),
        "l": low_bits([-8]),
    }
    rows = diff(cli, gpusaver.save(tmp_path / "a", one), gpusaver.save(tmp_path / "b", other))
    found = {name: (row["differing"], row["max_abs"], row["max_rel"]) for name, row in rows.items()}
    assert found == {
        "i": (1, 2.0**64, 2.0),
        "f": (1, "inf", "inf"),
        "u": (1, 7.0, 1.0),
        "c": (1, 1.0, 1.0),
        "s": (1, None, None),
        "b": (1, 1.0, 1.0),
        "h": (1, 2.0, 2 / 3),
        "l": (1, 9.0, 9 / 8),
    }


def test_diff_reads_all_of_both(tmp_path: Path, cli: Command) -> None:
    a = gpusaver.save(tmp_path / "a", {"w": np.arange(5.0)})
    b = gpusaver.save(tmp_path / "b", {"w": np.arange(5.0)})
    Path(f"{b}.data-00000-of-00001").write_bytes(np.array([0, 1, 2, 3, 5.0]).tobytes())
    code, _, err = cli("diff", a, b)
    assert code == 3
    assert "checksum" in err
    assert cli("diff", b, a).code == 3


@given(
    pair=st.sampled_from(["f4", "f8", "i1", "i8", "u8", "?", "c8"]).flatmap(
        lambda dtype: st.tuples(*[arrays.arrays(dtype, 5)] * 2)
    )
)
@settings(deadline=None)
def test_differing_elements_are_counted_as_numpy_does(pair: tuple[Any, Any]) -> None:
    first, second = pair
    difference, exact = Difference(exact=False), Difference(exact=True)
    difference.add(first, second)
    exact.add(first, second)
    equal = (first == second) | ((first != first) & (second != second))
    assert difference.count == (~equal).sum()
    bits = [a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)]
    assert exact.count == len(bits) - sum(bits)
    assert (difference.max_abs > 0) == (difference.count > 0)


@given(lengths=st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=2, max_size=2))
def test_blocks_of_any_length_side_by_side(lengths: list[list[int]]) -> None:
    total = min(map(sum, lengths))

    def blocks(sizes: list[int]) -> Any:
        start = 0
        for size in [*sizes, total]:
            yield np.arange(start, min(start + size, total))
            start = min(start + size, total)

    pieces = list(side_by_side(blocks(lengths[0]), blocks(lengths[1])))
    assert all(np.array_equal(a, b) for a, b in pieces)
    assert sum(len(a) for a, _ in pieces) == total
