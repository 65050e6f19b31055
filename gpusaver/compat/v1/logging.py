"""``tf.logging``: messages to the logger ``gpusaver.compat``."""

import logging as _logging

DEBUG, INFO, WARN, ERROR, FATAL = 10, 20, 30, 40, 50

_log = _logging.getLogger("gpusaver.compat")
debug, info, warning, error, fatal = _log.debug, _log.info, _log.warning, _log.error, _log.critical
warn = warning


def set_verbosity(v: int) -> None:
    _log.setLevel(v)


def get_verbosity() -> int:
    return _log.getEffectiveLevel()
