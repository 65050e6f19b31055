"""Tables of a benchmark's results: on the screen, and as Markdown between two marks of the README.

``python benchmarks/report.py [RESULTS.json]`` puts the newest results into README.md and docs/performance.md, and a
plot of them into docs/pictures.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
from collections.abc import Sequence
from typing import Any

from machine import ROOT

#: Workloads whose tables are in the README; the others are in docs/performance.md.
_MAIN = ("gpt2", "small")

#: Heading, figure, unit, whether its range and its ratio to the raw write or read are shown.
_COLUMNS = (
    ("return s", "return", 1.0, False),
    ("durable s", "durable", 1.0, True),
    ("next s", "next", 1.0, True),
    ("restore s", "restore", 1.0, True),
    ("cold s", "cold", 1.0, True),
    ("open, list s", "list", 1.0, False),
    ("1 % s", "some", 1.0, False),
    ("CPU s save", "save_cpu", 1.0, False),
    ("restore", "restore_cpu", 1.0, False),
    ("MB more save", "save_peak", 1e6, False),
    ("restore", "restore_peak", 1e6, False),
)


def table(workload: dict[str, Any], *, with_range: bool) -> tuple[list[str], list[list[str]]]:
    """The heading; a row per peer, and for the best raw write and the best raw reads; fastest to durable first."""
    peers = workload["peers"]
    no_file = {name for name, peer in peers.items() if not {"durable", "next"} & peer["figures"].keys()}
    shown = [name for name, peer in peers.items() if not peer["is_ceiling"] or name in no_file]
    shown += dict.fromkeys(workload["ceilings"].values())
    shown.sort(key=lambda name: _seconds(peers[name]["figures"]))
    columns = [column for column in _COLUMNS if any(column[1] in peer["figures"] for peer in peers.values())]
    head = [""]
    for title, _, _, is_main in columns:
        head += [title, "x raw"] if is_main else [title]
    body = []
    for name in shown:
        row = [name]
        for _, figure, unit, is_main in columns:
            found = peers[name]["figures"].get(figure)
            row.append(_cell(found, unit, with_range and is_main))
            if is_main:
                row.append(f"{found['ratio']:.2f}" if found and "ratio" in found else "")
        body.append(row)
    return head, body


def _seconds(figures: dict[str, Any]) -> float:
    """By which rows are sorted."""
    return float(next(figures[one]["median"] for one in ("durable", "return", "next") if one in figures))


def _cell(figure: dict[str, Any] | None, unit: float, with_range: bool) -> str:
    if figure is None:
        return ""
    low, middle, high = (figure[key] / unit for key in ("min", "median", "max"))
    if unit > 1:
        return f"{middle:,.0f}"
    digits = 3 if middle < 0.3 else 2
    return f"{middle:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if with_range else "")


def title(workload: dict[str, Any]) -> str:
    return f"{workload['title']}: {workload['tensors']:,} tensors, {workload['nbytes'] / 1e6:,.1f} MB"


def print_tables(results: dict[str, Any]) -> None:
    for workload in results["workloads"].values():
        print_table(title(workload), *table(workload, with_range=True))


def print_table(caption: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
        print(f"\n{caption}")
        for row in [head, *body]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=caption, title_justify="left")
    for column, name in enumerate(head):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    Console(width=10_000).print(table)  # as wide as its rows are: no figure is cut


def markdown(results: dict[str, Any], *, is_main: bool) -> str:
    """Of the workloads of the README, or of the others."""
    machine = results["machine"]
    versions = {}
    for workload in results["workloads"].values():
        for peer in workload["peers"].values():
            versions |= peer["versions"]
    count = next(iter(results["workloads"].values()))["rounds"]
    parts = [
        f"{results['date'][:10]}, {machine['cores']} cores ({machine['cpu']}), {machine['file_system']}, "
        f"{machine['system']} {machine['kernel']}, Python {results['python']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + f"; commit {results['commit']}. Medians of {count} rounds taken in turn. *Durable*: all files and folders "
        "synced. *Next*: the same while the checkpoint before lies beside it, and until that is removed. *Restore*: "
        "into the existing arrays, from the page cache or *cold*. *MB more*: peak memory beyond the arrays, pages of "
        "mapped files included. *x raw*: against the fastest plain write, or read, of the same bytes."
    ]
    for workload in [workload for name, workload in results["workloads"].items() if (name in _MAIN) == is_main]:
        parts += [f"**{title(workload)}**", markdown_table(*table(workload, with_range=False))]
    return "\n\n".join(parts)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [head, *body]]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines)


def plot(results: dict[str, Any], path: str) -> None:
    """Writes a PNG: how long each peer takes until the files are durable, and to restore them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads = list(results["workloads"].values())
    figure, axes = plt.subplots(len(workloads), 2, figsize=(13, 3.2 * len(workloads)), squeeze=False)
    for workload, row in zip(workloads, axes, strict=True):
        for measured, axis in zip(("durable", "restore"), row, strict=True):
            found = {name: peer["figures"] for name, peer in workload["peers"].items() if measured in peer["figures"]}
            if not found:
                axis.set_axis_off()
                continue
            medians = {name: figures[measured]["median"] for name, figures in found.items()}
            names = sorted(medians, key=lambda name: -medians[name])
            bars = axis.barh(names, [medians[name] for name in names], color=[_color(name) for name in names])
            axis.bar_label(bars, [_cell(found[name][measured], 1.0, False) for name in names], padding=3, fontsize=7)
            axis.set_xscale("log")
            axis.margins(x=0.15)
            axis.tick_params(labelsize=7)
            axis.set_title(f"{workload['title']}: {measured}, seconds", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _color(name: str) -> str:
    return "tab:green" if name.startswith("gpusaver") else "lightgray" if name.startswith("raw") else "tab:gray"


def replace_between_marks(text: str, content: str, name: str = "results") -> str:
    """``<!-- name -->`` and ``<!-- /name -->``; raises ValueError if the text lacks them."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise ValueError(f"expected {first} and, after it, {last}")
    return f"{before}{first}\n{content}\n{last}{after}"


def newest_results(ending: str) -> Any:
    """Of the files whose names below benchmarks/results end so, by the date inside; None if there are none."""
    found = map(load, glob.glob(os.path.join(ROOT, "benchmarks", "results", f"{ending}.json")))
    return max(found, key=lambda results: str(results["date"]), default=None)


def load(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def update_document(path: str, content: str, name: str = "results") -> None:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(replace_between_marks(text, content, name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts benchmark results into the documents.")
    parser.add_argument("results", nargs="?", help="default: the newest in benchmarks/results")
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    options = parser.parse_args()
    results = load(options.results) if options.results else newest_results("*core")
    if results is None:
        raise SystemExit("benchmarks/results is empty: make bench first")
    if options.print:
        print_tables(results)
    else:
        update_document(os.path.join(ROOT, "README.md"), markdown(results, is_main=True))
        others = [markdown(found, is_main=False) for found in (results, newest_results("*core-more")) if found]
        update_document(os.path.join(ROOT, "docs", "performance.md"), "\n\n".join(others))
        plot(results, os.path.join(ROOT, "docs", "pictures", "bench.png"))


if __name__ == "__main__":
    main()
