"""Names and sizes for people to look at: text that anybody may have written, made harmless."""

from __future__ import annotations

import html
from collections.abc import Iterable

from gpusaver.tensor import TensorSpec

_MAX_ROWS = 200


def shown(text: str) -> str:
    """Printable characters alone: any other as ``\\x1b`` or ``\\u202e``, a byte that is not UTF-8 as ``\\xff``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8, by surrogateescape
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def size(nbytes: float) -> str:
    """``1.5 MB``; decimal, as disks are sold and as the benchmarks count."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if nbytes < 999.5 or unit == "TB":
            break
    return f"{nbytes:.3g} {unit}" if nbytes < 99.95 else f"{nbytes:.0f} {unit}"


def html_table(title: str, specs: Iterable[tuple[str, TensorSpec]]) -> str:
    """A table of tensors for a notebook, the first 200 of them."""
    everything = list(specs)
    cells = [
        (name, spec.dtype.name, str(list(spec.shape)), size(spec.nbytes) if spec.dtype.is_fixed_size else "")
        for name, spec in everything[:_MAX_ROWS]
    ]
    rows = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in cells)
    head = "".join(f"<th>{name}</th>" for name in ("name", "dtype", "shape", "size"))
    total = f"{len(everything):,} tensors, {size(sum(spec.nbytes for _, spec in everything))}"
    more = f", the first {_MAX_ROWS} shown" if len(everything) > _MAX_ROWS else ""
    return (
        f"<table><caption>{_safe(title)}: {total}{more}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _safe(text: str) -> str:
    return html.escape(shown(text))
