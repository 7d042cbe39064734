"""Options that several benchmarks have."""

from __future__ import annotations

from collections.abc import Callable

import click


def numbers(minimum: int) -> Callable[[click.Context, click.Parameter, str], list[int]]:
    """A callback that reads an option like `1,10,100`, of numbers from `minimum` on."""

    def read(_: click.Context, __: click.Parameter, value: str) -> list[int]:
        try:
            values = [int(number) for number in value.split(",")]
        except ValueError:
            values = [minimum - 1]
        if min(values) < minimum:
            raise click.BadParameter(f"{value!r} is not a list of numbers from {minimum} on")
        return values

    return read
