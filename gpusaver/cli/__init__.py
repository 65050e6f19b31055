"""The ``gpusaver`` command, described in docs/command.md.  Imported by its two entry points alone.

::

    app         the group of commands, and what every outcome is as an exit code
    screen      tables, JSON, sizes, bars; the one place that prints
    listing     the checkpoints of a directory
    looking, checking, changing, machine, tracing       the commands
"""

from __future__ import annotations

import sys

#: For a missing extra; the other exit codes are in app.
_MISSING_EXTRA = 4


def main() -> int:
    """Runs the command with the arguments of the process; its exit code."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(f"gpusaver: the command needs the extra: pip install 'gpusaver[cli]' ({error})", file=sys.stderr)
        return _MISSING_EXTRA
    from gpusaver.cli.app import run

    return run()
