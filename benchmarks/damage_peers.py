"""``make bench-damage``: what becomes of a checkpoint when its bytes are damaged, or the process that saves is killed.

The same cases for every library, each through the saves and restores of :mod:`peers`, as its documentation shows them::

    damage   one file, drawn by size, is changed; then everything is restored and compared, bit by bit
    kills    a process saves three versions in turn, again and again, and is killed at a random moment; the newest
             acknowledged version, or the one after it, is to be found

Verdicts: ``exact`` the restored arrays are right; ``refused`` the restore failed, loudly; ``SILENT`` it worked, but
values are wrong; ``CRASHED`` the process died of it.  After a kill: ``kept``, ``older`` (an acknowledged save is gone),
``LOST`` (nothing can be restored), ``SILENT`` (a mixture).

    damage_peers.py [--cases N] [--kills N]      drives all libraries and writes the table into docs/guarantees.md
    damage_peers.py work|save LIBRARY DIRECTORY  one library, in its own interpreter (started by the above)
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from machine import ROOT, commit
from peers import PEERS, Peer

GUARANTEES = os.path.join(ROOT, "docs", "guarantees.md")
VERSIONS = 3
#: Small ones, and some that are large enough for a save to take a while.
SHAPES = [(1000 * number,) for number in range(1, 21)] + [(1024, 1024)] * 4


class Orbax(Peer):
    """``CheckpointManager`` that keeps one checkpoint: its documentation's way to save again and again."""

    environment = "orbax"
    distributions = ("orbax-checkpoint", "jax")

    def __init__(self, arrays: dict[str, np.ndarray], block: memoryview, directory: str) -> None:
        super().__init__(arrays, block, directory)
        import orbax.checkpoint

        self._library = orbax.checkpoint
        options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=1)
        self._manager = orbax.checkpoint.CheckpointManager(directory, options=options)

    def save(self) -> None:
        self._manager.reload()
        step = (self._manager.latest_step() or 0) + 1
        self._manager.save(step, args=self._library.args.StandardSave(self.arrays))
        self._manager.wait_until_finished()

    def restore(self) -> None:
        self._manager.reload()
        abstract = self._library.args.StandardRestore(self.arrays)
        loaded = self._manager.restore(self._manager.latest_step(), args=abstract)
        for name, array in self.arrays.items():
            np.copyto(array, loaded[name])


LIBRARIES: dict[str, type[Peer]] = {
    name: PEERS[name] for name in ("gpusaver", "TensorFlow", "torch.save", "safetensors", "np.savez")
} | {"Orbax": Orbax}

PYTHONS = {"bench": ".venv-bench", "tensorflow": ".venv-tf", "orbax": ".venv-orbax"}


def peer_of(library: str, version: int, directory: str) -> Peer:
    draw = np.random.default_rng(version)
    arrays = {f"t{number:02d}": draw.random(shape, np.float32) for number, shape in enumerate(SHAPES)}
    if library != "TensorFlow":
        return LIBRARIES[library](arrays, memoryview(b""), directory)
    import tensorflow

    tensorflow.compat.v1.disable_eager_execution()
    with tensorflow.Graph().as_default():  # several sets of variables with the same names
        return LIBRARIES[library](arrays, memoryview(b""), directory)


# In the interpreter of a library: orders on standard input, verdicts on standard output.


def work(library: str, directory: str) -> None:
    """Orders: ``save VERSION``; ``restore``: answers with the version that was read, "refused ..." or "SILENT"."""
    peers = [peer_of(library, version, directory) for version in range(VERSIONS)]
    digests = [peer.digest() for peer in peers]
    print("ready", flush=True)
    for line in sys.stdin:
        order, *rest = line.split()
        if order == "save":
            peers[int(rest[0])] = peer_of(library, int(rest[0]), directory)  # a restore has changed its arrays
            peers[int(rest[0])].save()
            answer = "saved"
        else:
            peers[0].clear()
            try:
                peers[0].restore()
            except Exception as error:
                answer = f"refused {type(error).__name__}"
            else:
                digest = peers[0].digest()
                answer = str(digests.index(digest)) if digest in digests else "SILENT"
        print(answer, flush=True)


def save_on(library: str, directory: str) -> None:
    """Saves for ever; a line for every save that has returned."""
    peers = [peer_of(library, version, directory) for version in range(VERSIONS)]
    print("ready", flush=True)
    number = 0
    while True:
        peers[number % VERSIONS].save()
        print(number, flush=True)
        number += 1


# The driver.


def python_of(library: str) -> str:
    """The interpreter that has it; GPUSAVER_ORBAX_PYTHON and the like name another."""
    environment = LIBRARIES[library].environment
    named = os.environ.get(f"GPUSAVER_{environment.upper()}_PYTHON")
    return named or os.path.join(ROOT, PYTHONS[environment], "bin", "python")


class Process:
    def __init__(self, action: str, library: str, directory: str, log: Any) -> None:
        environment = PYTHONS[LIBRARIES[library].environment]
        python = os.environ.get(f"GPUSAVER_{LIBRARIES[library].environment.upper()}_PYTHON")
        self._command = [
            python or os.path.join(ROOT, environment, "bin", "python"),
            __file__,
            action,
            library,
            directory,
        ]
        self._log = log
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"},
        )
        if self.read() != "ready":
            raise RuntimeError(f"{self._command} does not start; see {self._log.name}")

    def read(self) -> str:
        """The next line; empty if the process has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, order: str) -> str:
        assert self.process.stdin is not None
        print(order, file=self.process.stdin, flush=True)
        answer = self.read()
        if not answer:
            self.close()
            self._start()
        return answer or "CRASHED"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def flipped_bit(draw: random.Random, data: bytearray, other: bytes) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zeroed_page(draw: random.Random, data: bytearray, other: bytes) -> None:
    at = draw.randrange(-(-len(data) // 4096)) * 4096
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))


def swapped_sectors(draw: random.Random, data: bytearray, other: bytes) -> None:
    first, second = (draw.randrange(max(1, len(data) // 512)) * 512 for _ in range(2))
    data[first : first + 512], data[second : second + 512] = data[second : second + 512], data[first : first + 512]


def lost_write(draw: random.Random, data: bytearray, other: bytes) -> None:
    """A page holds what the save before had written there."""
    at = draw.randrange(-(-len(data) // 4096)) * 4096
    data[at : at + 4096] = other[at : at + 4096].ljust(len(data[at : at + 4096]), b"\0")


def truncated(draw: random.Random, data: bytearray, other: bytes) -> None:
    del data[draw.randrange(len(data)) :]


def stale_file(draw: random.Random, data: bytearray, other: bytes) -> None:
    """One file is that of the save before."""
    data[:] = other


DAMAGE: dict[str, Callable[[random.Random, bytearray, bytes], None]] = {
    "one bit flipped": flipped_bit,
    "a page zeroed": zeroed_page,
    "two sectors swapped": swapped_sectors,
    "a page of the save before": lost_write,
    "cut short": truncated,
    "a file of the save before": stale_file,
}


def snapshot(directory: str) -> dict[str, bytes]:
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, directory)] = file.read()
    return found


def restore_snapshot(directory: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        os.makedirs(os.path.dirname(os.path.join(directory, name)), exist_ok=True)
        with open(os.path.join(directory, name), "wb") as file:
            file.write(data)


def damage(library: str, directory: str, cases: int, log: Any) -> dict[str, Counter[str]]:
    worker = Process("work", library, directory, log)
    with contextlib.closing(worker):
        saves = []
        for version in (1, 2):
            shutil.rmtree(directory)
            os.makedirs(directory)
            assert worker.ask(f"save {version}") == "saved"
            saves.append(snapshot(directory))
        before, files = saves
        assert worker.ask("restore") == "2"
        verdicts = {}
        for kind, change in DAMAGE.items():
            draw = random.Random(kind)
            verdicts[kind] = Counter[str]()
            for _ in range(cases):
                name = draw.choices(list(files), [len(data) for data in files.values()])[0]
                data = bytearray(files[name])
                change(draw, data, before.get(name, b""))
                if data == files[name] or (change is stale_file and len(files) == 1):
                    continue  # no damage; one whole file is a checkpoint, and which one nobody can tell
                restore_snapshot(directory, {name: bytes(data)})
                answer = worker.ask("restore").split()[0]
                # An older version that was read as a whole is not what was saved either.
                verdicts[kind]["exact" if answer == "2" else "SILENT" if answer.isdigit() else answer] += 1
                shutil.rmtree(directory)
                restore_snapshot(directory, files)
            assert worker.ask("restore") == "2"
    return verdicts


def kills(library: str, directory: str, count: int, log: Any) -> Counter[str]:
    worker = Process("work", library, directory, log)
    verdicts = Counter[str]()
    draw = random.Random(library)
    with contextlib.closing(worker):
        for _ in range(count):
            shutil.rmtree(directory)
            os.makedirs(directory)
            saver = Process("save", library, directory, log)
            assert saver.read() == "0"
            started = time.perf_counter()
            assert saver.read() == "1"
            time.sleep(draw.uniform(0, 3) * (time.perf_counter() - started))
            saver.process.kill()
            acknowledged = [0, 1, *map(int, saver.process.communicate()[0].split())][-1]
            answer = worker.ask("restore").split()[0]
            if answer.isdigit():
                later = (int(answer) - acknowledged) % VERSIONS  # 0 or 1 later, or one earlier
                verdicts["kept" if later < 2 else "older"] += 1
            else:
                verdicts["LOST" if answer == "refused" else answer] += 1
    return verdicts


def versions(library: str) -> str:
    kind = LIBRARIES[library]
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    done = subprocess.run(
        [python_of(library), "-c", code, *kind.distributions], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def table(results: dict[str, dict[str, Counter[str]]], cases: int, count: int) -> str:
    told = [text for text in map(versions, results) if text]
    kinds = next(iter(results.values()))
    lines = [
        f"{datetime.date.today()}, commit {commit()}; {', '.join(told)}. Up to {cases} cases of each kind of damage, "
        f"{count} kills, per library. Capitals: bad ends.",
        "",
        f"| | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    for kind in kinds:
        cells = []
        for by_kind in results.values():
            verdicts = by_kind[kind]
            cells.append(", ".join(f"{verdicts[name]} {name}" for name in sorted(verdicts)) or "none possible")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drive(libraries: list[str], cases: int, count: int, directory: str) -> None:
    results: dict[str, dict[str, Counter[str]]] = {}
    for library in libraries:
        place = tempfile.mkdtemp(prefix="gpusaver-damage-", dir=directory)
        try:
            with open(os.path.join(tempfile.gettempdir(), f"damage-{library}.log"), "w") as log:
                results[library] = damage(library, place, cases, log)
                results[library]["killed while saving"] = kills(library, place, count, log)
        finally:
            shutil.rmtree(place)
        print(library, json.dumps(results[library]), flush=True)
    with open(GUARANTEES, encoding="utf-8") as file:
        text = file.read()
    head, rest = text.split("<!-- peers -->\n")
    tail = rest.split("<!-- /peers -->")[1]
    with open(GUARANTEES, "w", encoding="utf-8") as file:
        file.write(f"{head}<!-- peers -->\n{table(results, cases, count)}\n<!-- /peers -->{tail}")


def main() -> None:
    if sys.argv[1:2] in (["work"], ["save"]):
        {"work": work, "save": save_on}[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--directory", help="where the files go, default the system's for temporary files")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    arguments = parser.parse_args()
    drive(arguments.libraries, arguments.cases, arguments.kills, arguments.directory)


if __name__ == "__main__":
    main()
