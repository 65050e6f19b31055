"""What each command looks like on a terminal of 100 columns: tests/cli/screens, one file a screen.

``GPUSAVER_SCREENS=write`` writes them anew; look at the difference before you commit it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from command_tools import on_terminal, screen_of

import gpusaver

SCREENS = Path(__file__).parent / "screens"

#: What differs from run to run and from machine to machine.
MASKS = [
    (r"\d+\.\d\d GB/s", "#.## GB/s"),
    (r"\d+(\.\d+)? [kMGT]?B free", "# GB free"),
    (r"fastcrc [\d.]+", "fastcrc #"),
    (r"cramjam [\d.]+", "cramjam #"),
    (r"Python [\d.]+, NumPy [\d.]+", "Python #, NumPy #"),
    (r"(?m)^gpusaver( +)\S+, Python", r"gpusaver\1#, Python"),
]

CASES = {
    "ls": ["ls", "state_dir"],
    "ls-v1": ["ls", "v1_tf1"],
    "latest": ["latest", "state_dir"],
    "show": ["show", "conv_tf2"],
    "show-long-names": ["show", "object_based_tf2"],
    "show-odd-names": ["show", "odd_keys"],
    "show-sorted": ["show", "partitioned_tf2", "--sort", "size", "--reverse", "--filter", "^[a-w]"],
    "show-tree": ["show", "sharded_tf2", "--tree"],
    "show-stats": ["show", "dtypes", "--stats"],
    "get": ["get", "dtypes", "float/float32"],
    "verify": ["verify", "dtypes", "sharded_tf1"],
    "verify-damaged": ["verify", "damaged"],
    "diff": ["diff", "old", "new"],
    "diff-equal": ["diff", "sharded_tf1", "sharded_tf2"],
    "convert": ["convert", "object_based_tf2", "out.npz"],
    "convert-refused": ["convert", "lowbit_quant", "out.safetensors"],
    "rename": ["rename", "sharded_tf2", "renamed", "-e", "^dev(.)/", r"device_\1/"],
    "prune": ["prune", "state_dir", "--keep", "1", "--dry-run"],
    "no-checkpoint": ["show", "state_dir/model.ckpt-60"],
    "wrong-usage": ["show", "state_dir", "--sort", "colour"],
}


def check(name: str, text: str) -> None:
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    path = SCREENS / f"{name}.txt"
    if os.environ.get("GPUSAVER_SCREENS") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_screen(name: str, golden: Path) -> None:
    base = {"same": np.arange(4.0), "w": np.arange(6, dtype=np.float32), "step": 1, "text": "a"}
    gpusaver.save("old", base | {"gone": np.ones(2)}, write_meta_graph=False)
    changed = base["w"] + np.array([0, 0, 0.5, 0, 0, 0], np.float32)
    changes = {"w": changed, "step": 2, "text": "b", "new": np.ones((2, 2))}
    gpusaver.save("new", base | changes | {"same": np.arange(4.0)}, write_meta_graph=False)
    prefix = gpusaver.save("damaged", {"w": np.arange(1000), "v": np.zeros(3)}, write_meta_graph=False)
    with open(f"{prefix}.data-00000-of-00001", "r+b") as file:
        file.write(b"\1")
    code, sent = on_terminal(CASES[name])
    check(name, f"{screen_of(sent)}exit code {code}\n")


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if gpusaver.devices():
        pytest.skip("this machine has a GPU")
    code, sent = on_terminal(["doctor"])
    text = re.sub(r"(pinned memory +)[^(]*\(ulimit -l\).*", r"\1# (ulimit -l)", screen_of(sent))
    text = re.sub(r"(CuPy +)\S.*", r"\1#", re.sub(r"(NVML +|devices +|NVRTC +)\S.*", r"\1#", text))
    text = re.sub(r" {2,}", "  ", re.sub("─+", "─", text))  # columns are as wide as what is masked
    check("doctor", f"{text}exit code {code}\n")


def test_colours_and_their_absence(golden: Path) -> None:
    _, coloured = on_terminal(["ls", "state_dir"])
    _, plain = on_terminal(["ls", "state_dir"], NO_COLOR="1")
    assert b"\x1b[1m" in coloured
    assert screen_of(coloured) == screen_of(plain)
    _, verified = on_terminal(["verify", "dtypes"])
    _, without = on_terminal(["verify", "dtypes"], NO_COLOR="1")
    assert b"\x1b[1;32m" in verified
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]", without)  # bold is no colour
