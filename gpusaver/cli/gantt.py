"""The timeline of a save as a picture: a lane for each thread and device, a bar for each span."""

from __future__ import annotations

from collections.abc import Sequence

from gpusaver.pipeline.timeline import STAGES, Span, busy_seconds

_COLOURS = {
    "plan": "#9aa0a6",
    "capture": "#8e63ce",
    "copy": "#3b7dd8",
    "compare": "#d98cb3",
    "checksum": "#e8a33d",
    "write": "#3a9d5d",
    "link": "#7fc7c0",
    "sync": "#c8553d",
    "commit": "#5b4a3f",
}
#: A trace of thousands of chunks is drawn with bars this much of the width at least, or they would vanish.
_MIN_SHARE = 0.0008


def draw(spans: Sequence[Span], title: str, path: str) -> None:
    """Writes a PNG.  Requires: at least one span; matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    total = max(span.end for span in spans) or 1e-9
    scale, unit = (1e3, "ms") if total < 2 else (1.0, "s")
    tracks = list(dict.fromkeys(span.track for span in sorted(spans, key=lambda span: span.start)))
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(tracks)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for stage in STAGES:
        for lane, track in enumerate(tracks):
            bars = [
                (span.start * scale, max(span.end - span.start, _MIN_SHARE * total) * scale)
                for span in spans
                if span.stage == stage and span.track == track
            ]
            if bars:
                axes.broken_barh(
                    bars, (lane - 0.36, 0.72), facecolors=_COLOURS[stage], edgecolor="white", linewidth=0.3
                )
    axes.set_yticks(range(len(tracks)), [track.replace("$", r"\$") for track in tracks])
    axes.set_ylim(len(tracks) - 0.4, -0.6)
    axes.set_xlim(0, total * scale)
    axes.set_xlabel(f"{unit} since the call")
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    stages = [stage for stage in STAGES if any(span.stage == stage for span in spans)]
    labels = [f"{stage}  {busy_seconds(spans, stage) * scale:.3g} {unit}" for stage in stages]
    handles = [Patch(color=_COLOURS[stage], label=label) for stage, label in zip(stages, labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, format="png")
