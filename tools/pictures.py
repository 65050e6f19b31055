"""Makes docs/pictures/: what `show`, `diff` and `doctor` look like on a terminal, and the picture of `trace`.

``python tools/pictures.py [DIRECTORY]``: DIRECTORY (default /tmp) is where checkpoints are saved meanwhile.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

import gpusaver
from gpusaver.cli import screen
from gpusaver.cli.app import run

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
WIDTH = 96


def model(seed: int) -> dict[str, object]:
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) / 20

    layers = {f"layer_{n}": {"kernel": weights(256, 256), "bias": weights(256)} for n in range(2)}
    return {
        "embedding": weights(1000, 256),
        "encoder": layers,
        "head": {"kernel": weights(256, 10)},
        "step": 1000 * seed,
    }


def take(name: str, arguments: Sequence[str]) -> None:
    """An SVG of the command line and what it prints."""
    terminal = Console(record=True, width=WIDTH, force_terminal=True, file=io.StringIO(), highlight=False, markup=False)
    quiet = Console(file=io.StringIO())
    screen.console = lambda *, stderr=False: quiet if stderr else terminal
    terminal.print(Text.assemble(("$ ", "dim"), " ".join(["gpusaver", *arguments])))
    run(arguments)
    svg = terminal.export_svg(title=f"gpusaver {name}", theme=MONOKAI)
    # Nothing from elsewhere: any monospaced font of the reader's will do.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    (PICTURES / f"{name}.svg").write_text(re.sub(r"terminal-\d+", f"terminal-{name}", svg))


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        os.chdir(folder)
        os.environ["COLUMNS"] = str(WIDTH)
        first, second = model(1), model(1) | {"step": 2000}
        second["head"] = {"kernel": first["head"]["kernel"] * 1.01, "bias": np.zeros(10, np.float32)}  # type: ignore[index]
        gpusaver.Saver(first).save("run/model.ckpt", 1000)
        gpusaver.Saver(second).save("run/model.ckpt", 2000)
        take("show", ["show", "run", "--stats"])
        take("diff", ["diff", "run/model.ckpt-1000", "run/model.ckpt-2000"])
        take("doctor", ["doctor", "run"])
        code = run(["trace", ".", "--size", "512MB", "-o", str(PICTURES / "trace")])
        (PICTURES / "trace.json").unlink()
        sys.exit(code)


if __name__ == "__main__":
    main()
