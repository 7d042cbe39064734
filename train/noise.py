"""Training texts rewritten as they come from elsewhere: speech recognition, hurried typing.

Datasets are edited text. A model that has seen nothing else leans on punctuation, and is lost where
there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ercbatch.dialogues import Dialogue

_FILLERS = ("um", "uh", "like", "well", "you know", "i mean")
_FILLER_SHARE = 0.03
"""Share of the words that get a filler before them."""
_TYPO_SHARE = 0.04
"""Share of the words of more than three letters that get a typo."""
_NOT_SPOKEN = re.compile(r"[^\w\s'’]|_")

Rewrite = Callable[[str, np.random.Generator], str]


def rewritten(dialogue: Dialogue, rewrite: Rewrite, random: np.random.Generator) -> Dialogue:
    """The dialogue with all its texts rewritten; a text of which nothing is left stays."""
    utterances = [
        replace(u, text=rewrite(u.text, random).strip() or u.text) for u in dialogue.utterances
    ]
    return replace(dialogue, utterances=tuple(utterances))


def transcribed(text: str, random: np.random.Generator) -> str:
    """The text as speech recognition writes it: lower case, no punctuation, some fillers."""
    words = []
    for word in _NOT_SPOKEN.sub(" ", text.lower()).split():
        if random.random() < _FILLER_SHARE:
            words.append(str(random.choice(_FILLERS)))
        words.append(word)
    return " ".join(words)


def hurried(text: str, random: np.random.Generator) -> str:
    """The text as a chat message in a hurry: lower case, few commas and apostrophes, some typos."""
    words = []
    for word in text.lower().split():
        word = word.rstrip(".,;") or word
        if random.random() < 0.7:
            word = re.sub(r"(?<=\w)['’](?=\w)", "", word)
        if word.isalpha() and len(word) > 3 and random.random() < _TYPO_SHARE:
            word = _mistyped(word, random)
        words.append(word)
    return " ".join(words)


def _mistyped(word: str, random: np.random.Generator) -> str:
    """The word with two letters swapped, or one left out or doubled."""
    at = int(random.integers(1, len(word) - 1))
    match int(random.integers(3)):
        case 0:
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        case 1:
            return word[:at] + word[at + 1 :]
        case _:
            return word[: at + 1] + word[at:]
