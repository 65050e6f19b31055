"""``make bench-growth``: how saves and restores grow with the number of tensors and their size, beside safetensors.

Each point is a process of its own, with arrays of one size::

    10^2 .. 10^6 tensors of 256 bytes           what a tensor costs
    16 tensors, together 1 MB .. 8 GB           what a byte costs

Durable: files and folders synced, the median of ``--rounds`` saves after a first one, which does not count (it lays out
and allocates).  *new*: a Saver's first save, with its `.meta` file.  Restores are warm, into the same arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import read_into_page_cache
from machine import ROOT, commit, describe_machine
from report import print_table
from worker import sync_tree

COUNTS = tuple(10**power for power in range(2, 7))
SIZES = tuple(int(megabytes * 1e6) for megabytes in (1, 10, 100, 1000, 8000))
LIBRARIES = ("gpusaver", "safetensors")
_SMALL_NBYTES, _LARGE_COUNT = 256, 16


def measure(library: str, count: int, nbytes: int, rounds: int, directory: str) -> dict[str, float]:
    """In the child process: seconds."""
    import numpy as np

    random = np.random.default_rng(0).standard_normal(min(nbytes, 1 << 24) // 4, dtype=np.float32)
    arrays = {f"layer_{i // 100:04d}/tensor_{i % 100:02d}": np.resize(random, nbytes // 4) for i in range(count)}
    path = os.path.join(directory, "state")
    save: Callable[[], object]
    if library == "gpusaver":
        import gpusaver

        saver = gpusaver.Saver(arrays, max_to_keep=1)
        save, restore = lambda: saver.save(path), lambda: saver.restore(path)
    else:
        import safetensors
        import safetensors.numpy

        def restore() -> None:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name, array in arrays.items():
                    np.copyto(array, file.get_tensor(name))

        save = lambda: safetensors.numpy.save_file(arrays, path)  # noqa: E731
    saves, restores = [], []
    for _ in range(rounds + 1):
        for array in arrays.values():
            array += 1
        start = time.perf_counter()
        save()
        sync_tree(directory)
        saves.append(time.perf_counter() - start)
        read_into_page_cache(directory)
        start = time.perf_counter()
        restore()
        restores.append(time.perf_counter() - start)
    return {"new": saves[0], "durable": statistics.median(saves[1:]), "restore": statistics.median(restores[1:])}


def run(library: str, count: int, nbytes: int, options: argparse.Namespace) -> dict[str, Any]:
    directory = os.path.join(os.path.abspath(options.directory), "growth")
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    point = ["--point", library, str(count), str(nbytes), "--directory", directory, "--rounds", str(options.rounds)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    try:
        child = subprocess.run(
            [sys.executable, __file__, *point], check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
    finally:
        shutil.rmtree(directory)
    return {"library": library, "tensors": count, "nbytes": count * nbytes, **json.loads(child.stdout)}


def rows(points: list[dict[str, Any]], divisor: str, unit: float) -> list[list[str]]:
    """One a library and point, with the seconds and what they are for each tensor or gigabyte."""
    body = []
    for point in points:
        row = [point["library"], f"{point['tensors']:,}", f"{point['nbytes'] / 1e6:,.0f}"]
        for figure in ("new", "durable", "restore"):
            row += [f"{point[figure]:.4g}", f"{point[figure] / point[divisor] * unit:.3g}"]
        body.append(row)
    return body


def plot(curves: dict[str, list[dict[str, Any]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(12, 4.5))
    for (title, points), axis in zip(curves.items(), axes, strict=True):
        across = "tensors" if len({point["tensors"] for point in points}) > 1 else "nbytes"
        for library, color in zip(LIBRARIES, ("tab:green", "tab:gray"), strict=True):
            mine = [point for point in points if point["library"] == library]
            for measured, style in (("durable", "-o"), ("restore", "--s")):
                x, y = [point[across] for point in mine], [point[measured] for point in mine]
                axis.loglog(x, y, style, color=color, label=f"{library} {measured}")
        axis.set(title=title, xlabel="tensors" if across == "tensors" else "bytes", ylabel="seconds")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=os.path.join(ROOT, "build", "bench"), help="where the files go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=os.path.join(ROOT, "benchmarks", "results", "growth.json"))
    parser.add_argument("--picture", default=os.path.join(ROOT, "docs", "pictures", "growth.png"))
    parser.add_argument("--point", nargs=3, metavar=("LIBRARY", "COUNT", "NBYTES"), help="in this process, as JSON")
    options = parser.parse_args()
    if options.point:
        library, count, nbytes = options.point
        print(json.dumps(measure(library, int(count), int(nbytes), options.rounds, options.directory)))
        return
    os.makedirs(options.directory, exist_ok=True)
    found = {"commit": commit(), "machine": describe_machine(options.directory)}
    by_count = [run(library, count, _SMALL_NBYTES, options) for count in COUNTS for library in LIBRARIES]
    by_size = [run(library, _LARGE_COUNT, size // _LARGE_COUNT, options) for size in SIZES for library in LIBRARIES]
    for caption, each, points, divisor, unit in (
        ("More tensors, of 256 bytes", "us each", by_count, "tensors", 1e6),
        ("More bytes, in 16 tensors", "s/GB", by_size, "nbytes", 1e9),
    ):
        head = ["", "tensors", "MB", "new s", each, "durable s", each, "restore s", each]
        print_table(caption, head, rows(points, divisor, unit))
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({**found, "by_count": by_count, "by_size": by_size}, file, indent=1)
        file.write("\n")
    plot({"Tensors of 256 bytes": by_count, "16 tensors": by_size}, options.picture)


if __name__ == "__main__":
    main()
