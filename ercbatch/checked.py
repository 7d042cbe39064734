"""Plain values from a file that anybody may have written, each seen to be what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INT32_MAX = 2**31 - 1
_LONGEST_NAME = 200


def string(value: object) -> str:
    """A string that can be written.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no string")
    value.encode()  # half of a surrogate pair can't be
    return value


def printable_string(value: object) -> str:
    """A string that stands in messages and on terminals.

    Raises:
        TypeError, ValueError: it is none, is long, or has control characters.
    """
    text = string(value)
    if not text.isprintable() or len(text) > _LONGEST_NAME:
        raise ValueError(f"{text!a:.80} is no name")
    return text


def strings(value: object) -> tuple[str, ...]:
    """A list of strings, see `string`."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return tuple(map(string, value))


def integer(value: object, low: int = 0, high: int = INT32_MAX) -> int:
    """An integer from low to high.

    Raises:
        TypeError, ValueError: it is none, or beyond.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is no integer")
    if not low <= value <= high:
        raise ValueError(f"an integer is not from {low} to {high}")
    return value


def number(value: object, low: float = -INT32_MAX, high: float = INT32_MAX) -> float:
    """A number from low to high, an integer or not.

    Raises:
        TypeError, ValueError: it is none, or beyond.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is no number")
    if not low <= value <= high:
        raise ValueError(f"a number is not from {low} to {high}")
    return value


def mapping(value: object) -> Mapping[str, Any]:
    """An object whose keys are strings, see `string`.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40} is no object")
    for key in value:
        string(key)
    return value
