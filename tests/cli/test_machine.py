"""doctor, bench and trace: on this machine, and on machines that are told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_tools import Command
from PIL import Image
from sim.fixture import simulated_cupy  # noqa: F401

import gpusaver
from gpusaver.cli import machine
from gpusaver.cli.tracing import read_trace
from gpusaver.device.nvml import DeviceInfo


def checks(cli: Command, *arguments: object) -> dict[str, tuple[str, str]]:
    _, out, _ = cli("doctor", *arguments, "--json")
    return {row["what"]: (row["found"], row["verdict"]) for row in json.loads(out)["checks"]}


def test_doctor_of_a_directory(tmp_path: Path, cli: Command) -> None:
    found = checks(cli, tmp_path)
    assert {"gpusaver", "CuPy", "devices", "NVML", "CRC-32C", "directory", "locks", "page cache"} <= set(found)
    assert "used" in " ".join(found)
    assert os.listdir(tmp_path) == []
    assert cli("doctor", tmp_path).code == 0
    assert cli("doctor", tmp_path / "none").code == 1
    assert checks(cli, tmp_path / "none")["directory"] == (f"{tmp_path / 'none'} does not exist", "problem")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_doctor_of_a_directory_that_is_not_ours(tmp_path: Path, cli: Command) -> None:
    tmp_path.chmod(0o500)
    assert cli("doctor", tmp_path).code == 1


def test_doctor_where_a_disk_is_full(tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpusaver.storage.local.LocalStorage.free_nbytes", lambda *_: 1000)
    assert checks(cli, tmp_path)["space"][1] == "problem"
    code, _, err = cli("bench", tmp_path)
    assert code == 3
    assert "three times 512 MB are needed" in err


def test_doctor_on_a_machine_with_devices(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    info = DeviceInfo("cuda:0", "0000:1B:00.0", "NVIDIA H200", 140 * 10**9, 100 * 10**9)
    infos = [
        DeviceInfo(*[getattr(info, name) for name in ("name", "pci_bus_id", "model", "memory_nbytes", "free_nbytes")]),
        DeviceInfo(
            "cuda:1", "", "NVIDIA H200", 1, 1, max_pcie_generation=5, pcie_width=8, max_pcie_width=16, link_rate=3e10
        ),
    ]
    software = {"cupy": "14.2.0", "cuda": "13.0", "driver": "13.1", "nvml": "590.1", "nvrtc": "", "cupy problem": ""}
    monkeypatch.setattr(machine, "software", lambda: software | {"nvrtc problem": "libnvrtc.so.13 not found"})
    monkeypatch.setattr(machine, "devices", lambda: infos)
    found = checks(cli)
    assert found["CuPy"] == ("14.2.0 for CUDA 13.0; the driver runs up to 13.1", "ok")
    assert found["NVRTC"] == ("none: arrays are copied one by one (libnvrtc.so.13 not found)", "note")
    assert found["cuda:0"] == ("NVIDIA H200, 100 GB of 140 GB free, link unknown", "ok")
    assert found["cuda:1"][0].endswith("PCIe 5 x8, 30.00 GB/s; 16 lanes are possible")
    assert found["cuda:1"][1] == "note"


def test_doctor_finds_two_wheels_of_cupy(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def __init__(self, name: str) -> None:
            self.name = name

    wheels = [Distribution("cupy-cuda12x"), Distribution("cupy-cuda13x"), Distribution("numpy")]
    monkeypatch.setattr(machine.metadata, "distributions", lambda: wheels)
    assert checks(cli)["CuPy wheels"][1] == "problem"
    assert cli("doctor").code == 1


def test_bench(tmp_path: Path, cli: Command) -> None:
    code, out, _ = cli("bench", tmp_path, "--size", "4MB", "--json")
    rows = {row["what"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    assert {"memory copy", "raw write, page cache", "save, until durable", "restore, verified"} <= set(rows)
    save = rows["save, until durable"]
    assert save["share"] == save["rate"] / rows[save["ceiling"]]["rate"]
    assert os.listdir(tmp_path) == []
    assert cli("bench", tmp_path, "--size", "1MB").out.count("\n") == 1 + len(rows)


def test_trace_of_a_save_made_here(tmp_path: Path, cli: Command) -> None:
    code, out, _ = cli("trace", tmp_path, "-o", tmp_path / "t", "--size", "20MB", "--json")
    assert code == 0
    stages = {row["stage"]: row for row in json.loads(out)["stages"]}
    assert {"write", "sync", "commit"} <= set(stages)
    assert stages["write"]["nbytes"] >= 20_000_000 - 16 * 4
    assert sorted(os.listdir(tmp_path)) == ["t.json", "t.png"]
    spans = read_trace(str(tmp_path / "t.json"))
    assert {span.stage for span in spans} >= {"write", "commit"}
    assert cli("trace", tmp_path / "t.json", "-o", tmp_path / "again").code == 0
    with Image.open(tmp_path / "again.png") as picture:
        colours = {colour for count, colour in picture.convert("RGB").getcolors(1 << 20) if count > 100}
    assert {(0x3A, 0x9D, 0x5D), (0x5B, 0x4A, 0x3F)} <= colours  # write and commit are to be seen


def test_trace_of_a_save_of_ones_own(tmp_path: Path, cli: Command) -> None:
    with gpusaver.Saver({"$x$": np.ones(1 << 20)}) as saver:
        pending = saver.save_async(tmp_path / "model", 1)
        assert pending is not None
        pending.result()
        assert pending.report is not None
        pending.report.write_trace(tmp_path / "own.json")
    assert cli("trace", tmp_path / "own.json", "-o", tmp_path / "own").code == 0
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"traceEvents": []}',
        b'{"traceEvents": [1]}',
        b'{"traceEvents": [{"ph": "X"}]}',
        b'{"traceEvents": [{"ph": "M", "name": "thread_name", "tid": 1, "args": {"name": "a"}},'
        b' {"ph": "X", "tid": 1, "name": "write", "ts": 1e300, "dur": 1}]}',
        b'{"traceEvents": [{"ph": "M", "name": "thread_name", "tid": 1, "args": {"name": "a"}},'
        b' {"ph": "X", "tid": 1, "name": "other", "ts": 1, "dur": 1}]}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_trace_of_anything_else(content: bytes, tmp_path: Path, cli: Command) -> None:
    (tmp_path / "t.json").write_bytes(content)
    code, out, err = cli("trace", tmp_path / "t.json", "-o", tmp_path / "t")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert not (tmp_path / "t.png").exists()


def test_software_without_cupy() -> None:
    from gpusaver.device.inventory import software

    found: dict[str, Any] = software()
    assert set(found) == {"cupy", "cuda", "driver", "nvml", "nvrtc", "cupy problem", "nvrtc problem"}
    assert bool(found["cupy"]) != bool(found["cupy problem"])


def test_bench_with_devices(sim: Any, tmp_path: Path, cli: Command) -> None:
    """Under the simulated CuPy: the rows are there; their figures mean nothing."""
    code, out, _ = cli("bench", tmp_path, "--size", "4MB", "--json")
    assert code == 0
    rows = {row["what"]: row for row in json.loads(out)["rows"]}
    for name in ("cuda:0", "cuda:1"):
        assert rows[f"save from {name}, until durable"]["rate"] > 0
        assert rows[f"restore to {name}, verified"]["ceiling"] == "raw read, page cache"
    assert os.listdir(tmp_path) == []
