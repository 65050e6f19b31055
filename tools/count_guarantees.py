"""Writes into docs/guarantees.md how many cases each test went through.

    count_guarantees.py CI_OUTPUT... -- LONG_OUTPUT...

The outputs are those of pytest with GPUSAVER_FAULTS set, which ends with a section of counts: to "bounded" for the size
of `make test`, to "long" by `make test-faults`.  A row that names several tests gets their sum; one whose tests are not
all counted stays empty.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

GUARANTEES = Path(__file__).parents[1] / "docs" / "guarantees.md"
_COUNT = re.compile(r"^ *([\d,]+)  (tests/\S+::\w+)$", re.MULTILINE)
_ROW = re.compile(r"^(\| .*`(?:tests/[^`]+)`.*) \|[^|]*\|[^|]*\|$", re.MULTILINE)
_TEST = re.compile(r"`(tests/[\w/]+\.py::\w+)`")


def counts(outputs: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for output in outputs:
        for number, test in _COUNT.findall(Path(output).read_text()):
            found[test] = found.get(test, 0) + int(number.replace(",", ""))  # a run may come in parts
    return found


def main() -> None:
    divider = sys.argv.index("--")
    bounded, long = counts(sys.argv[1:divider]), counts(sys.argv[divider + 1 :])

    def filled(row: re.Match[str]) -> str:
        tests = _TEST.findall(row[1])
        columns = [
            f"{sum(found[test] for test in tests):,}" if found.keys() >= set(tests) else "" for found in (bounded, long)
        ]
        return f"{row[1]} | {' | '.join(columns)} |"

    GUARANTEES.write_text(_ROW.sub(filled, GUARANTEES.read_text()))


if __name__ == "__main__":
    main()
