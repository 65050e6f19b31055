"""Results of bench_gpu.py: figures as ratios, what the acceptance lines say of them, tables and a plot."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from machine import ROOT
from report import load, markdown_table, newest_results, print_table, title, update_document

_MB, _GB = 1e6, 1e9
_COLUMNS = (
    ("call ms", "call", 1e-3),
    ("stall ms", "stall", 1e-3),
    ("noise ms", "stall_noise", 1e-3),
    ("expected", "expected_stall", 1e-3),
    ("worst ms", "worst_step", 1e-3),
    ("get ms", "get_p99", 1e-3),
    ("capture s", "capture", 1.0),
    ("durable s", "durable", 1.0),
    ("restore s", "restore", 1.0),
    ("cold s", "restore_cold", 1.0),
    ("CPU s", "cpu", 1.0),
    ("host MB", "host_peak", _MB),
    ("dev. MB", "device_peak", _MB),
)
_SHORT_COLUMNS = [
    column
    for column in _COLUMNS
    if column[1] in ("call", "stall", "durable", "restore", "restore_cold", "cpu", "host_peak", "device_peak")
]
_RANKED = ("stall", "durable", "restore")


def summarize_peers(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least, most and all values of every figure that was measured."""
    figures = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if None not in values:
            middle = statistics.median(values)
            figures[name] = {"median": middle, "min": min(values), "max": max(values), "values": values}
    return {"figures": figures}


# ------------------------------------------------------------------------------------------------------------- ceilings


def bounds(results: dict[str, Any], workload: dict[str, Any], name: str, place: str) -> dict[str, float]:
    """The seconds that each figure could take at best, by the ceilings of the same run."""
    device = results["ceilings"]["device"]
    files = results["ceilings"]["files"].get(place, {}).get(name)
    nbytes = workload["nbytes"]
    best = {"stall": nbytes / device["D2D"], "capture": nbytes / device["pinned D2H"]}
    if files is not None:
        best["durable"] = nbytes / min(device["pinned D2H"], files["write"])
        best["restore"] = best["restore_cold"] = nbytes / min(device["pinned H2D"], files["read"])
    return best


def ratios(place: dict[str, Any], best: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of every peer's medians, to the ceiling ("durable") and to the best other library ("durable to best")."""
    found: dict[str, dict[str, float]] = {}
    for name, peer in place.get("peers", {}).items():
        found[name] = {}
        for figure, bound in best.items():
            if figure in peer["figures"]:
                found[name][figure] = peer["figures"][figure]["median"] / bound
        for figure in _RANKED:
            others = [
                other["figures"][figure]["median"]
                for other_name, other in place["peers"].items()
                if not other["is_ours"] and other_name != name and figure in other["figures"]
            ]
            if others and figure in peer["figures"] and min(others) > 0:
                found[name][f"{figure} to best"] = peer["figures"][figure]["median"] / min(others)
    return found


def add_expected_stalls(place: dict[str, Any], nbytes: int, durable: float | None) -> None:
    """Of deferred saves: what their pinned memory does not hold comes at the writers' speed (``durable``: seconds for
    all bytes), and one step's worth of it is hidden before the fence."""
    for peer in place.get("peers", {}).values():
        staging = peer.get("staging_nbytes")
        if staging is not None and durable is not None:
            beyond = max(0, nbytes - staging) / nbytes * durable
            peer["figures"]["expected_stall"] = {"median": max(0.0, beyond - peer["figures"]["step"]["median"])}


# ------------------------------------------------------------------------------------------------------------- criteria


def criteria(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The acceptance lines of the GPU path that this run can tell of: value, limit, and whether it holds."""
    found: list[dict[str, Any]] = []

    def at_most(line: str, value: float | None, limit: float | None) -> None:
        if value is not None and limit is not None:
            found.append({"line": line, "value": value, "at most": limit, "holds": value <= limit})

    def at_least(line: str, value: float | None, limit: float | None) -> None:
        if value is not None and limit is not None:
            found.append({"line": line, "value": value, "at least": limit, "holds": value >= limit})

    device = results["ceilings"]["device"]
    for name, workload in results["workloads"].items():
        if "skipped" in workload:
            continue
        nbytes, tensors = workload["nbytes"], workload["tensors"]
        if name != "small":  # 87 MB take less time than their 10,000 tensors
            rate = workload["null_capture"]["rate"]
            at_least(f"{name}: capture into a null storage, of pinned D2H", rate / device["pinned D2H"], 0.9)
        for place, measured in workload["places"].items():
            figure = _figures(measured)
            best = bounds(results, workload, name, place)
            where = f"{name} in {place}"
            snapshot, deferred = "gpusaver snapshot", "gpusaver deferred"
            at_most(f"{where}: call of a snapshot, s", figure(snapshot, "call"), 1e-3 + 2e-6 * tensors)
            at_most(f"{where}: call of deferred, s", figure(deferred, "call"), 1e-3 + 2e-6 * tensors)
            if name == "gpt2":
                limit = 1.3 * nbytes / device["D2D"] + 1e-3
                at_most(f"{where}: stall of a snapshot, s", figure(snapshot, "stall"), limit)
            if name == "7b":
                step, steps = figure(deferred, "step"), figure(deferred, "steps")
                limit = 0.01 * step * steps if step is not None and steps is not None else None
                at_most(f"{where}: stall of deferred, 1 % of its steps, s", figure(deferred, "stall"), limit)
            if name == "small":
                _small_criteria(where, measured, at_most, at_least)
            elif "durable" in best:
                fastest = _least(measured, "durable", ours=True)
                at_least(f"{where}: durable, of its ceiling", fastest and best["durable"] / fastest, 0.85)
                fastest = _least(measured, "restore", ours=True)
                at_least(f"{where}: restore, of its ceiling", fastest and best["restore"] / fastest, 0.8)
            for ranked in _RANKED:
                others = _least(measured, ranked, ours=False)
                at_most(f"{where}: {ranked}, of the best library's, s", _least(measured, ranked, ours=True), others)
    if device:
        at_least("crc32c kernel on 1 GB, GB/s", device["device crc32c"] / _GB, 500.0)
    return found


def _small_criteria(where: str, measured: dict[str, Any], at_most: Callable[..., None], at_least: Any) -> None:
    for figure in ("durable", "restore"):
        ours, others = _least(measured, figure, ours=True), _least(measured, figure, ours=False)
        at_most(f"{where}: {figure}, s", ours, 0.06)
        at_least(f"{where}: {figure}, times faster than the best library", ours and others and others / ours, 3.0)


def _figures(place: dict[str, Any]) -> Callable[[str, str], float | None]:
    def median(peer: str, figure: str) -> float | None:
        found = place.get("peers", {}).get(peer, {}).get("figures", {}).get(figure)
        return None if found is None else float(found["median"])

    return median


def _least(place: dict[str, Any], figure: str, *, ours: bool) -> float | None:
    values = [
        float(peer["figures"][figure]["median"])
        for peer in place.get("peers", {}).values()
        if peer["is_ours"] is ours and not peer.get("recycles") and figure in peer["figures"]
    ]
    return min(values, default=None)


# --------------------------------------------------------------------------------------------------------- for people


def print_gpu_tables(results: dict[str, Any]) -> None:
    rates = [[name, f"{rate / _GB:.2f}"] for name, rate in results["ceilings"]["device"].items()]
    for place, workloads in results["ceilings"]["files"].items():
        for name, files in workloads.items():
            rates += [[f"raw {what} of {name} in {place}", f"{files[what] / _GB:.2f}"] for what in ("write", "read")]
    print_table("Ceilings, GB/s", ["", "GB/s"], rates)
    for workload in results["workloads"].values():
        for place, measured in workload.get("places", {}).items():
            if isinstance(measured["skipped"], str):
                print(f"{workload['title']} in {place}: {measured['skipped']}")
                continue
            print_table(f"{title(workload)}, in {place}", *_figures_table(measured))
            print_table("  ... as multiples of the ceilings, and of the best other library", *_ratios_table(measured))
            for peer, reason in measured["skipped"].items():
                print(f"  without {peer}: {reason}")
    rows = []
    for one in results["criteria"]:
        limit = f"<= {one['at most']:.4g}" if "at most" in one else f">= {one['at least']:.4g}"
        rows.append([one["line"], f"{one['value']:.4g}", limit, "holds" if one["holds"] else "DOES NOT HOLD"])
    print_table("Acceptance lines", ["", "found", "wanted", ""], rows)


def markdown(results: dict[str, Any]) -> str:
    """A table for each workload and folder, and how many of the acceptance lines hold."""
    versions: dict[str, str] = {}
    for workload in results["workloads"].values():
        for place in workload.get("places", {}).values():
            for peer in place.get("peers", {}).values():
                versions |= peer["versions"]
    machine, driver, lines = results["machine"], results["driver"], results["criteria"]
    parts = [
        f"{results['date'][:10]}, {results['model']} (driver {driver}), {machine['cores']} cores, {machine['system']} "
        f"{machine['kernel']}, Python {results['python']}, cupy {results['cupy']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + f"; commit {results['commit']}. Medians. *Stall*: what a save and all it does cost the training steps, "
        "until durable. *Restore*: from the page cache. *Host*, *dev. MB*: most memory beyond the state. "
        f"{sum(line['holds'] for line in lines)} of {len(lines)} acceptance lines hold."
    ]
    for workload in results["workloads"].values():
        for where, place in workload.get("places", {}).items():
            if place.get("peers"):
                table = markdown_table(*_figures_table(place, _SHORT_COLUMNS))
                parts += [f"**{title(workload)}, in {where}**", table]
    return "\n\n".join(parts)


def _figures_table(
    place: dict[str, Any], columns: Sequence[tuple[str, str, float]] = _COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Columns that are empty are left out."""
    peers = place.get("peers", {})
    columns = [column for column in columns if any(column[1] in peer["figures"] for peer in peers.values())]
    body = []
    for name, peer in peers.items():
        found = [(peer["figures"].get(figure), unit) for _, figure, unit in columns]
        body.append([name, *("" if one is None else _short(one["median"] / unit) for one, unit in found)])
    return ["", *(heading for heading, _, _ in columns)], body


def _ratios_table(place: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["stall", "capture", "durable", "restore", "restore_cold", *(f"{ranked} to best" for ranked in _RANKED)]
    body = []
    for name, shares in place.get("ratios", {}).items():
        body.append([name, *("" if column not in shares else _short(shares[column]) for column in columns)])
    return ["", *columns], body


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(results: dict[str, Any], path: str) -> str:
    """Writes a PNG with stall, durable and restore of every peer; says so, or why not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        return f"No plot: {error}"
    panels = [
        (f"{workload['title']}, {place}", measured["peers"])
        for workload in results["workloads"].values()
        for place, measured in workload.get("places", {}).items()
        if measured.get("peers")
    ]
    if not panels:
        return "No plot: nothing was measured"
    figure, axes = plt.subplots(len(panels), 3, figsize=(15, 1 + 4 * len(panels)), squeeze=False)
    for (caption, peers), row in zip(panels, axes, strict=True):
        names = list(peers)[::-1]
        for ranked, axis in zip(_RANKED, row, strict=True):
            values = [max(peers[name]["figures"][ranked]["median"], 1e-5) for name in names]
            colors = ["tab:green" if peers[name]["is_ours"] else "tab:gray" for name in names]
            axis.barh(names, values, color=colors)
            axis.set_xscale("log")
            axis.set_xlabel("s")
            axis.set_title(f"{caption}\n{ranked}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"Written: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts the results of bench_gpu.py into the README.")
    parser.add_argument("results", nargs="?", help="default: the newest in benchmarks/results/gpu")
    options = parser.parse_args()
    results = load(options.results) if options.results else newest_results("gpu/*")
    if results is None:
        raise SystemExit("benchmarks/results/gpu is empty: make bench-gpu first")
    update_document(os.path.join(ROOT, "README.md"), markdown(results), "gpu results")


if __name__ == "__main__":
    main()
