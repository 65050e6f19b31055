"""ls, latest, show, get: for programs (tabs, JSON, .npy) and on checkpoints of every kind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from command_tools import GOLDEN, Command

import gpusaver

PREFIXES = sorted(str(path).removesuffix(".index") for path in GOLDEN.glob("*/*.index"))
PREFIXES += [f"{GOLDEN}/v1_tf1/legacy.ckpt", f"{GOLDEN}/v1_tf1/sh.ckpt-?????-of-00002"]


def rows(text: str) -> list[dict[str, str]]:
    header, *lines = text.splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.removeprefix(f"{GOLDEN}/"))
def test_show_says_what_the_reader_says(prefix: str, cli: Command) -> None:
    reader = gpusaver.load_checkpoint(prefix)
    dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
    code, out, err = cli("show", prefix, "--json")
    found = json.loads(out)
    assert (code, err, found["prefix"]) == (0, "", prefix)
    assert [row["name"] for row in found["tensors"]] == sorted(reader)
    assert all(row["dtype"] == dtypes[row["name"]].name for row in found["tensors"])
    assert all(row["shape"] == shapes[row["name"]] for row in found["tensors"])
    assert found["totals"]["tensors"] == len(reader)
    assert found["totals"]["nbytes"] == sum(row["nbytes"] for row in found["tensors"])
    assert len(rows(cli("show", prefix).out)) == len(reader)
    tree = cli("show", prefix, "--tree").out.splitlines()
    assert sum("tensor" not in line.split("\t")[1] for line in tree) == len(reader)


def test_show_selects_and_sorts(golden: Path, cli: Command) -> None:
    def names(*arguments: str) -> list[str]:
        return [row["name"] for row in rows(cli("show", "partitioned_tf2", *arguments).out)]

    everything = names()
    assert names("--filter", "^emb/") == ["emb/cols", "emb/rows"]
    assert names("--reverse") == everything[::-1]
    assert names("--sort", "size")[-1] == "big/i8"
    for key in ("dtype", "shape", "shard"):
        assert sorted(names("--sort", key)) == everything
    parts = {row["name"]: row for row in json.loads(cli("show", "sharded_tf2", "--json").out)["tensors"]}
    assert (parts["shared/table"]["shards"], parts["shared/table"]["slices"]) == ([0, 1, 2], 3)
    assert rows(cli("show", "v1_tf1/legacy.ckpt", "--sort", "shard").out)[0]["shards"] == ""


def test_statistics(tmp_path: Path, cli: Command) -> None:
    state = {
        "f": np.array([1.5, np.nan, -2.0, np.nan], np.float32),
        "i": np.array([2**63 - 1, -(2**63)]),
        "u": np.array([2**64 - 1], np.uint64),
        "b": np.array([True, False, True, True]),
        "bf": np.array([1, 2, 6], ml_dtypes.bfloat16),
        "low": np.array([-8, 7], ml_dtypes.int4),
        "c": np.array([1 + 1j, np.nan]),
        "none": np.zeros(0),
        "nan": np.array(np.nan),
        "text": "x",
    }
    prefix = gpusaver.save(tmp_path / "model", state)
    found = {row["name"]: row for row in json.loads(cli("show", prefix, "--stats", "--json").out)["tensors"]}
    values = {name: tuple(row[key] for key in ("min", "max", "mean", "nan")) for name, row in found.items()}
    assert values == {
        "f": (-2.0, 1.5, -0.25, 2),
        "i": (-(2**63), 2**63 - 1, 0.0, 0),
        "u": (2**64 - 1, 2**64 - 1, float(2**64), 0),
        "b": (0, 1, 0.75, 0),
        "bf": (1.0, 6.0, 3.0, 0),
        "low": (-8, 7, -0.5, 0),
        "c": (None, None, None, 1),
        "none": (None, None, None, 0),
        "nan": (None, None, None, 1),
        "text": (None, None, None, None),
    }


def test_scopes_without_end(tmp_path: Path, cli: Command) -> None:
    prefix = gpusaver.save(tmp_path / "model", {"a/" * 5000 + "w": np.ones(1), "//": np.ones(1), "a": np.ones(1)})
    code, out, _ = cli("show", prefix, "--tree")
    assert code == 0
    assert sum("float64[1] 8 B" in line for line in out.splitlines()) == 3


def test_statistics_need_whole_data(tmp_path: Path, cli: Command) -> None:
    prefix = gpusaver.save(tmp_path / "model", {"w": np.arange(5.0)})
    Path(f"{prefix}.data-00000-of-00001").write_bytes(bytes(40))
    code, out, err = cli("show", prefix, "--stats")
    assert (code, out) == (3, "")
    assert "tensor w: checksum" in err


def test_ls(golden: Path, cli: Command) -> None:
    found = json.loads(cli("ls", "state_dir", "--json").out)["checkpoints"]
    assert [(c["name"], c["step"], c["state"]) for c in found] == [
        ("model.ckpt-30", 30, ["listed"]),
        ("model.ckpt-40", 40, ["listed"]),
        ("model.ckpt-50", 50, ["latest"]),
        ("padded-00000007", 7, []),
    ]
    assert all(7000 < time.time() - c["modified"] < 8000 for c in found)
    files = [f"state_dir/model.ckpt-30{suffix}" for suffix in (".index", ".data-00000-of-00001")]
    assert found[0]["nbytes"] == sum(map(os.path.getsize, files))
    assert [c["name"] for c in json.loads(cli("ls", "v1_tf1", "--json").out)["checkpoints"]] == [
        "legacy.ckpt",
        "sh.ckpt-?????-of-00002",
    ]


def test_ls_tells_what_is_not_whole(golden: Path, cli: Command) -> None:
    os.remove("state_dir/model.ckpt-40.data-00000-of-00001")
    Path("state_dir/model.ckpt-30.index").write_bytes(b"nothing of the kind")
    states = {row["name"]: row["state"] for row in rows(cli("ls", "state_dir").out)}
    assert states["model.ckpt-40"] == "listed,1 of 1 data files missing"
    assert states["model.ckpt-30"] == "listed,index damaged"


def test_ls_of_nothing(tmp_path: Path, cli: Command) -> None:
    assert rows(cli("ls", tmp_path).out) == []
    code, _, err = cli("ls", tmp_path / "none")
    assert (code, err) == (3, f"gpusaver: there is no directory {tmp_path / 'none'}\n")


def test_latest(golden: Path, tmp_path: Path, cli: Command) -> None:
    assert cli("latest", "state_dir")[:2] == (0, "state_dir/model.ckpt-50\n")
    os.remove("state_dir/model.ckpt-50.data-00000-of-00001")
    code, out, err = cli("latest", "state_dir", "--verify", "structure")
    assert (code, out) == (0, "state_dir/model.ckpt-40\n")
    assert "warning: the checkpoint state_dir/model.ckpt-50 is damaged" in err
    (tmp_path / "empty").mkdir()
    assert cli("latest", tmp_path / "empty").code == 1
    assert cli("latest", tmp_path / "empty", "--json")[:2] == (1, '{\n "prefix": null\n}\n')


def test_get(tmp_path: Path, cli: Command) -> None:
    state = {
        "m": np.array([[1.5, np.nan], [np.inf, -0.0]]),
        "c": np.array([1 + 2j]),
        "s": np.array([b"a\xff", b"b"], object),
        "t": "text",
        "n": 3,
        "bf": np.array([1.5], ml_dtypes.bfloat16),
        "flag": np.array([True]),
    }
    prefix = gpusaver.save(tmp_path / "model", state)

    def value(name: str) -> Any:
        return json.loads(cli("get", prefix, name, "--json").out)["value"]

    assert value("m") == [[1.5, "nan"], ["inf", -0.0]]
    assert value("c") == [[1.0, 2.0]]
    assert value("s") == ["a\udcff", "b"]
    assert (value("t"), value("n"), value("bf"), value("flag")) == ("text", 3, [1.5], [True])
    assert cli("get", prefix, "n").out == "3\n"
    assert cli("get", prefix, "t").out == "b'text'\n"
    assert cli("get", prefix, "m", "-o", tmp_path / "m.npy") == (0, "", "")
    assert np.load(tmp_path / "m.npy").tobytes() == state["m"].tobytes()
    code, _, err = cli("get", prefix, "bf", "-o", tmp_path / "bf.npy")
    assert code == 3
    assert "bf (bfloat16)" in err
    assert not (tmp_path / "bf.npy").exists()
    code, _, err = cli("get", prefix, "nothing")
    assert code == 3
    assert "has no tensor nothing" in err


def test_a_readable_name_of_tf2(golden: Path, cli: Command) -> None:
    assert json.loads(cli("get", "object_based_tf2", "model/w", "--json").out)["shape"] == [2, 3]
