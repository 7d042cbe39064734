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


def make_plan(bundle: Path, dialogues: Sequence[Dialogue], count: int) -> Plan:
    """The dialogues dealt out to `count` rounds, rendered as a bundle of ours does it.

    Raises:
        UsageError: there are fewer dialogues than rounds.
    """
    engine = Labeler(str(bundle), threads=1).engine
    prompted = [
        (dialogue, ids)
        for dialogue in dialogues
        if (ids := [ids for _, ids in prompts(engine, dialogue)])
    ]
    if len(prompted) < count:
        raise UsageError(
            f"{len(prompted)} dialogues to label in {count} rounds: have more, or fewer"
        )
    return Plan(
        _warm_up(engine),
        [_round(engine, prompted[number::count]) for number in range(count)],
        engine.renderer.trie,
    )


def _round(engine: Engine, prompted: Sequence[tuple[Dialogue, list[list[int]]]]) -> Round:
    prompt_ids = [ids for _, dialogue_ids in prompted for ids in dialogue_ids]
    dialogues = [dialogue for dialogue, _ in prompted]
    return Round(
        _request(engine, dialogues, [dialogue_ids for _, dialogue_ids in prompted], limit=True),
        len(prompt_ids),
        work(prompt_ids),
        sum(len(pack) for pack in engine.packs(dialogues)),
        sum(map(len, prompt_ids)),
    )


def _request(
    engine: Engine,
    dialogues: Sequence[Dialogue],
    prompt_ids: Sequence[Sequence[Sequence[int]]],
    *,
    limit: bool,
) -> str:
    return json.dumps(
        {
            "records": [dialogue.record for dialogue in dialogues],
            "prompts": prompt_ids,
            "options": engine.renderer.trie.choices[0].options,
            "limit": limit,
        }
    )


def _warm_up(engine: Engine) -> str:
    """Its prompts are backwards, and so begin as no other does."""
    dialogues = [parse_dialogue(record) for record in invented.dialogues(1, _WARM_UP, seed=-1)]
    prompt_ids = [[ids[::-1] for _, ids in prompts(engine, dialogue)] for dialogue in dialogues]
    return _request(engine, dialogues, prompt_ids, limit=False)
