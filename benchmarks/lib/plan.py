"""What `benchmarks.throughput` asks of every engine: the same dialogues, or prompts, in rounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import invented
from benchmarks.limit import Work, work
from benchmarks.packed import prompts
from ercbatch.dialogues import Dialogue, parse_dialogue
from ercbatch.engine import Engine
from ercbatch.errors import UsageError
from ercbatch.labeler import Labeler
from ercbatch.prompts.answers import AnswerTrie

_WARM_UP = (20, 20)
"""Turns: least and most."""


@dataclass(frozen=True, slots=True)
class Round:
    """Dialogues that every engine labels once."""

    request: str
    utterances: int
    needed: Work
    computed: int
    """Tokens in ercbatch's packs."""
    separate: int
    """Tokens in separate prompts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every engine is asked, and what its answers are read with."""

    first: str
    """The request that warms it up."""
    rounds: Sequence[Round]
    trie: AnswerTrie


def plan(bundle: Path, dialogues: Sequence[Dialogue], count: int) -> Plan:
    """The dialogues dealt out to `count` rounds, rendered as a bundle of ours does it.

    Raises:
        UsageError: there are fewer dialogues than rounds.
    """
    engine = Labeler(str(bundle), threads=1).engine
    asked = [
        (dialogue, ids)
        for dialogue in dialogues
        if (ids := [ids for _, ids in prompts(engine, dialogue)])
    ]
    if len(asked) < count:
        raise UsageError(f"{len(asked)} dialogues to label in {count} rounds: have more, or fewer")
    return Plan(
        _warm_up(engine),
        [_round(engine, asked[number::count]) for number in range(count)],
        engine.renderer.trie,
    )


def _round(engine: Engine, asked: Sequence[tuple[Dialogue, list[list[int]]]]) -> Round:
    given = [ids for _, every in asked for ids in every]
    dialogues = [dialogue for dialogue, _ in asked]
    return Round(
        _request(engine, dialogues, [every for _, every in asked], limit=True),
        len(given),
        work(given),
        sum(len(one) for one in engine.packs(dialogues)),
        sum(map(len, given)),
    )


def _request(
    engine: Engine,
    dialogues: Sequence[Dialogue],
    given: Sequence[Sequence[Sequence[int]]],
    *,
    limit: bool,
) -> str:
    return json.dumps(
        {
            "records": [dialogue.record for dialogue in dialogues],
            "prompts": given,
            "options": engine.renderer.trie.choices[0].options,
            "limit": limit,
        }
    )


def _warm_up(engine: Engine) -> str:
    """Its prompts are backwards, and so begin as no other does."""
    dialogues = [parse_dialogue(record) for record in invented.dialogues(1, _WARM_UP, seed=-1)]
    given = [[ids[::-1] for _, ids in prompts(engine, dialogue)] for dialogue in dialogues]
    return _request(engine, dialogues, given, limit=False)
