"""``tf.errors``: gpusaver's own classes under TensorFlow's names, so that ``except`` clauses of scripts catch them."""

from gpusaver.errors import (
    CancelledError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnimplementedError,
    UnknownError,
)
from gpusaver.errors import Error as OpError


class AlreadyExistsError(OpError):
    """Never raised here; there for ``except`` clauses."""

    code = 6


class AbortedError(OpError):
    """Never raised here; there for ``except`` clauses."""

    code = 10


class UnavailableError(OpError):
    """Never raised here; there for ``except`` clauses."""

    code = 14


class DeadlineExceededError(OpError):
    """Never raised here; there for ``except`` clauses."""

    code = 4


class UnauthenticatedError(OpError):
    """Never raised here; there for ``except`` clauses."""

    code = 16


__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "CancelledError",
    "DataLossError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OpError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
]
