"""Options that several benchmarks have."""

from __future__ import annotations

from collections.abc import Callable

import click


def numbers(least: int) -> Callable[[click.Context, click.Parameter, str], list[int]]:
    """A callback that reads an option like `1,10,100`, of numbers from `least` on."""

    def read(_: click.Context, __: click.Parameter, value: str) -> list[int]:
        try:
            found = [int(number) for number in value.split(",")]
        except ValueError:
            found = [least - 1]
        if min(found) < least:
            raise click.BadParameter(f"{value!r} is not a list of numbers from {least} on")
        return found

    return read
