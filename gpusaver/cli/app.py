"""The group of commands, and their exit codes.

::

    0    done; for latest, verify and diff: yes (there is one, it is whole, they are equal)
    1    no: there is none, it is not whole, they differ; doctor: something must be repaired
    2    wrong usage
    3    an error: no such checkpoint, damage, no permission, a full disk
    4    an extra is missing
    130  interrupted;  141  whoever read the output went away
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from gpusaver import __version__
from gpusaver.cli import changing, checking, looking, machine, tracing
from gpusaver.cli.screen import complain, flush
from gpusaver.errors import Error
from gpusaver.storage.routing import UrlError

ERROR, MISSING_EXTRA, INTERRUPTED, BROKEN_PIPE = 3, 4, 130, 141


class _Failure(Exception):
    """Ends the command.  Click has ideas of its own about EOFError and OSError, which some of our errors are, too."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            flush()
            return result
        except KeyboardInterrupt as error:
            raise _Failure(INTERRUPTED, "interrupted") from error
        except BrokenPipeError as error:
            raise _Failure(BROKEN_PIPE, "") from error
        except ModuleNotFoundError as error:
            raise _Failure(MISSING_EXTRA, str(error)) from error
        except (Error, UrlError, OSError, MemoryError) as error:
            raise _Failure(ERROR, str(error) or "not enough memory") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gpusaver")
def command() -> None:
    """Looks at, checks and changes checkpoints in TensorFlow's format.

    PREFIX is what a checkpoint's files begin with; a directory stands for its newest checkpoint, a SavedModel for its
    variables.
    """


for _module in (looking, checking, changing, machine, tracing):
    for _command in _module.COMMANDS:
        command.add_command(_command)
command.add_command(changing.rename, "rewrite")


class _Warnings(logging.Handler):
    """What the library warns of, as what it is: text of others."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {record.getMessage()}")


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code; ``arguments``: those of the process if None."""
    log, handler = logging.getLogger("gpusaver"), _Warnings(logging.WARNING)
    log.addHandler(handler)
    try:
        code = command.main(arguments and list(arguments), prog_name="gpusaver", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        complain(f"gpusaver: {error.format_message()}")
        return error.exit_code
    except click.Abort:  # before the command began
        complain("gpusaver: interrupted")
        return INTERRUPTED
    except _Failure as failure:
        if failure.code == BROKEN_PIPE:  # else Python complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            complain(f"gpusaver: {failure}")
        return failure.code
    finally:
        log.removeHandler(handler)
