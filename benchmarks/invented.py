"""Invented dialogues of any length, as JSON lines: calls that drag on, like IEMOCAP's scenes.

    python -m benchmarks.invented 12 --turns 50 200 > long.jsonl

The same seed gives the same dialogues. Their words are ours, and mean nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import click

_OPENINGS = ("Well,", "No,", "Listen,", "I know, but", "Wait,", "Honestly,", "You said", "And yet")
_MIDDLES = (
    "the parcel never came to this address",
    "I waited at the station until it was dark",
    "somebody has painted the door again",
    "my sister is moving back in June",
    "they want the money before Friday",
    "we could still ask the neighbours about it",
    "the garden looks wonderful this year",
    "nobody told me that the shop was closed",
)
_ENDINGS = (
    ".",
    "!",
    "?",
    ", and I am so tired of it.",
    ", isn't that great?",
    " and it scares me.",
    " and that is all there is to say, whatever your brother tells you about that evening.",
)
_SPEAKERS = "AB"


def dialogues(count: int, turns: tuple[int, int], seed: int) -> Iterator[dict[str, Any]]:
    """Records of dialogues between two speakers, each of `turns` (least, most) turns."""
    rng = random.Random(seed)
    for number in range(count):
        utterances = []
        for turn in range(rng.randint(*turns)):
            text = f"{rng.choice(_OPENINGS)} {rng.choice(_MIDDLES)}{rng.choice(_ENDINGS)}"
            if rng.random() < 0.25:  # people also just agree
                text = text.split()[0].strip(",") + "."
            utterances.append({"speaker": _SPEAKERS[turn % len(_SPEAKERS)], "text": text})
        yield {"id": f"invented-{seed}-{number}", "utterances": utterances}


@click.command()
@click.argument("count", type=click.IntRange(1))
@click.option(
    "--turns",
    type=(click.IntRange(1), click.IntRange(1)),
    default=(50, 200),
    show_default=True,
    help="Of a dialogue: at least, at most.",
)
@click.option("--seed", default=0, show_default=True)
def main(count: int, turns: tuple[int, int], seed: int) -> None:
    """Write COUNT dialogues to stdout."""
    if turns[0] > turns[1]:
        raise click.BadParameter("the least must not be above the most", param_hint="--turns")
    for record in dialogues(count, turns, seed):
        click.echo(json.dumps(record))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.invented")
