"""Invented sentences, as many as are asked for: no dataset is needed to measure speed.

Each is a walk over the words of the sentences that were written for the bundle `mini`: a word is
followed by one that follows it there. They read oddly, but have the words, the lengths and the
variety of what people say, which random letters have not.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice

from ercbatch.bundle.bundle import find_bundle
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.retrieval.bank import TEXTS, Demonstration, read_examples

_MAX_WORDS = 40


def invent(count: int, seed: int = 0) -> list[Demonstration]:
    """So many distinct sentences, each with the label of the written one that it begins like."""
    return list(islice(_walks(random.Random(seed)), count))


def _walks(dice: random.Random) -> Iterator[Demonstration]:
    sentences = read_examples(find_bundle("mini") / TEXTS)
    follows: dict[str, list[str]] = {}
    for sentence in sentences:
        words = sentence.text.split()
        for word, after in zip(words, [*words[1:], ""], strict=True):
            follows.setdefault(word, []).append(after)
    texts: set[str] = set()
    while True:
        start = dice.choice(sentences)
        words = [start.text.split()[0]]
        while len(words) < _MAX_WORDS and (after := dice.choice(follows[words[-1]])):
            words.append(after)
        text = " ".join(words)
        if text not in texts:
            texts.add(text)
            yield Demonstration(text, start.label)


def converse(texts: Iterable[str], turns: int) -> Iterator[Dialogue]:
    """Dialogues of two speakers that say these texts in order.

    Each has `turns` turns; the last may have fewer.
    """
    remaining = iter(texts)
    while turn_texts := list(islice(remaining, turns)):
        yield Dialogue(tuple(Utterance(text, "AB"[t % 2]) for t, text in enumerate(turn_texts)))
