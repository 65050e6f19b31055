"""What benchmarks/gpu_report.py makes of figures: ratios, and the acceptance lines at their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

DEVICE = {"pinned D2H": 50e9, "pinned H2D": 40e9, "D2D": 1000e9, "device crc32c": 600e9}


@pytest.fixture
def report(benchmarks: Path) -> Any:
    import gpu_report

    return gpu_report


def peer(is_ours: bool, **medians: float) -> dict[str, Any]:
    return {"is_ours": is_ours, "figures": {name: {"median": value} for name, value in medians.items()}}


def results(name: str, nbytes: int, tensors: int, peers: dict[str, Any], files: dict[str, float]) -> dict[str, Any]:
    places = {"/dev/shm": {"peers": peers, "skipped": {}}}
    workload = {"nbytes": nbytes, "tensors": tensors, "null_capture": {"rate": 45e9}, "places": places}
    return {"ceilings": {"device": DEVICE, "files": {"/dev/shm": {name: files}}}, "workloads": {name: workload}}


def lines(report: Any, found: dict[str, Any]) -> dict[str, bool]:
    return {one["line"].replace(" in /dev/shm", ""): one["holds"] for one in report.criteria(found)}


def test_gpt2(report):
    nbytes = 1_000_000_000
    peers = {
        "gpusaver recycle": {**peer(True, stall=0.0, durable=0.001, restore=0.001), "recycles": True},  # counts nowhere
        "gpusaver snapshot": peer(True, stall=0.0023, call=0.0018, durable=0.1 / 0.85, restore=0.05),
        "gpusaver deferred": peer(True, stall=0.0001, call=0.0019, durable=0.12, restore=0.06),
        "torch.save tuned": peer(False, stall=0.5, durable=0.5, restore=0.049),
        "safetensors": peer(False, stall=0.4, durable=0.6, restore=0.3),
    }
    found = results("gpt2", nbytes, 444, peers, {"write": 10e9, "read": 20e9})
    assert lines(report, found) == {
        "gpt2: capture into a null storage, of pinned D2H": True,  # 45 of 50 GB/s
        "gpt2: call of a snapshot, s": True,  # 1 ms + 2 us x 444 = 1.888 ms
        "gpt2: call of deferred, s": False,
        "gpt2: stall of a snapshot, s": True,  # 1.3 x 1 ms + 1 ms
        "gpt2: durable, of its ceiling": True,  # 0.1 s at 10 GB/s
        "gpt2: restore, of its ceiling": True,  # 0.05 s at 20 GB/s
        "gpt2: stall, of the best library's, s": True,
        "gpt2: durable, of the best library's, s": True,
        "gpt2: restore, of the best library's, s": False,
        "crc32c kernel on 1 GB, GB/s": True,
    }
    workload = found["workloads"]["gpt2"]
    place = workload["places"]["/dev/shm"]
    shares = report.ratios(place, report.bounds(found, workload, "gpt2", "/dev/shm"))
    assert shares["gpusaver snapshot"]["stall"] == pytest.approx(2.3)
    assert shares["gpusaver snapshot"]["durable to best"] == pytest.approx(0.1 / 0.85 / 0.5)
    assert shares["torch.save tuned"]["stall to best"] == pytest.approx(0.5 / 0.4)
    assert shares["safetensors"]["restore"] == pytest.approx(6.0)


def test_the_stall_to_expect_of_a_deferred_save(report):
    place = {
        "peers": {
            "ring": {"staging_nbytes": 100, "figures": {"step": {"median": 0.5}}},
            "staged": {"staging_nbytes": 2000, "figures": {"step": {"median": 0.5}}},
            "snapshot": {"staging_nbytes": None, "figures": {"step": {"median": 0.5}}},
        }
    }
    report.add_expected_stalls(place, 1000, 2.0)
    expected = {name: peer["figures"].get("expected_stall") for name, peer in place["peers"].items()}
    assert expected == {"ring": {"median": pytest.approx(1.3)}, "staged": {"median": 0.0}, "snapshot": None}


def test_small(report):
    peers = {
        "gpusaver snapshot": peer(True, stall=0.01, call=0.02, durable=0.05, restore=0.061),
        "safetensors tuned": peer(False, stall=0.1, durable=0.149, restore=0.2),
    }
    found = lines(report, results("small", 86_800_000, 10_000, peers, {"write": 10e9, "read": 20e9}))
    assert found["small: call of a snapshot, s"] is True  # 21 ms
    assert found["small: durable, s"] is True
    assert found["small: durable, times faster than the best library"] is False  # 2.98
    assert found["small: restore, s"] is False
    assert found["small: restore, times faster than the best library"] is True
    assert not any(line.startswith(("small: capture", "small: durable, of its")) for line in found)


def test_7b(report):
    for stall, holds in ((0.029, True), (0.031, False)):
        peers = {"gpusaver deferred": peer(True, stall=stall, step=0.3, steps=10, call=0.001, durable=2.0, restore=2.0)}
        found = lines(report, results("7b", 14_000_000_000, 291, peers, {"write": 10e9, "read": 20e9}))
        assert found["7b: stall of deferred, 1 % of its steps, s"] is holds
        assert "7b: stall, of the best library's, s" not in found  # there was none


def test_every_figure_can_be_read_however_narrow_the_terminal(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    figures = {figure: 12_345 * unit for _, figure, unit in report._COLUMNS if figure != "restore_cold"}
    found = results(
        "gpt2", 1_000_000_000, 444, {"gpusaver deferred, ring": peer(True, **figures)}, {"write": 1, "read": 1}
    )
    found["workloads"]["gpt2"] |= {"title": "GPT-2"}
    found["criteria"] = []
    report.print_gpu_tables(found)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "..." not in shown.replace("  ... as multiples", "")
    assert shown.count("12,345") == len(figures)
    assert "gpusaver deferred, ring" in shown
    assert "cold s" not in shown  # of no peer
    assert max(map(len, shown.splitlines())) <= 160


def test_what_was_not_measured_is_no_line(report):
    found = results("gpt2", 1_000_000, 4, {}, {"write": 1e9, "read": 1e9})
    found["workloads"]["7b"] = {"title": "7b", "skipped": "no room"}
    found["workloads"]["gpt2"]["places"]["/data"] = {"skipped": "3 bytes are free in /data"}
    assert set(lines(report, found)) == {
        "gpt2: capture into a null storage, of pinned D2H",
        "crc32c kernel on 1 GB, GB/s",
    }


def test_the_readme_has_the_newest_results(report, benchmarks):
    newest = report.newest_results("gpu/*")
    assert report.markdown(newest) in Path(benchmarks.parent, "README.md").read_text("utf-8")
    holding = [line for line in newest["criteria"] if line["holds"]]
    assert f"{len(holding)} of {len(newest['criteria'])} acceptance lines hold" in report.markdown(newest)
    owed = Path(benchmarks, "results", "OWED.md").read_text("utf-8")
    assert [line["line"] for line in newest["criteria"] if not line["holds"] and f"`{line['line']}`" not in owed] == []
