"""``tf.app``."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def run(main: Callable[[Sequence[str]], Any] | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """Calls ``main(argv)``, by default the one of the script that is run, and exits with what it returns."""
    function = main or sys.modules["__main__"].main
    sys.exit(function(list(sys.argv if argv is None else argv)))
