"""Takes in messages of other packages that have the wire format of ours: TensorFlow's, above all."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

M = TypeVar("M", bound=Message)


def adopt(message: Any, cls: type[M]) -> M:
    """Returns `message` as an instance of our message class `cls`.

    An instance of `cls` is returned as it is, not copied. A message of any other class of the same name, such as
    `tensorflow.SaverDef` for our `gpusaver.SaverDef`, is converted through its bytes; fields that ours does not define
    are kept as unknown fields.

    Raises TypeError for anything else, and for a message of that name whose bytes are of another format.
    """
    if isinstance(message, cls):
        return message
    expected = cls.DESCRIPTOR.full_name
    hint = f"expected {expected} or a message with its wire format, as TensorFlow's {cls.DESCRIPTOR.name}"
    if not isinstance(message, Message):
        raise TypeError(f"{hint}; found {type(message).__module__}.{type(message).__qualname__}")
    found = message.DESCRIPTOR
    if found.name != cls.DESCRIPTOR.name:
        raise TypeError(f"{hint}; found {found.full_name}")
    try:
        return cls.FromString(message.SerializeToString())
    except (DecodeError, UnicodeDecodeError) as error:  # the second from protobuf's pure Python runtime
        raise TypeError(f"{hint}; found {found.full_name}, whose bytes do not parse as {expected}: {error}") from error
