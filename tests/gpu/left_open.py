"""A program that ends without closing its Savers, one of them still saving; a script, for test_memory.py::

python tests/gpu/left_open.py DIRECTORY [simulated]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import gpusaver

if sys.argv[2:] == ["simulated"]:
    from sim.cupy_sim import modules
    from sim.engine import Engine
    from sim.state import activate

    engine = Engine()
    engine.has_nvrtc = False
    activate(engine)
    sys.modules.update(modules())

import cupy

state = {"w": cupy.asarray(np.arange(100_000)), "b": cupy.asarray(np.ones(7, np.float32))}
savers = [gpusaver.Saver(state) for _ in range(4)]
for number, saver in enumerate(savers):
    saver.restore(saver.save_async(Path(sys.argv[1]) / f"model{number}", capture="snapshot").result())
sys.left_open = savers.pop()  # a module that goes last
savers[0].itself = savers[0]
del savers[0], saver
savers[0].save_async(Path(sys.argv[1]) / "last", capture="deferred")
