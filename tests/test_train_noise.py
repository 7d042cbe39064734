"""Training texts rewritten as speech recognition and hurried typing have them."""

from __future__ import annotations

import numpy as np
import pytest

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import UsageError
from train.noise import hurried, rewritten, transcribed
from train.recipe import Recipe
from train.sources import Source


def test_a_transcript_has_no_case_and_no_punctuation() -> None:
    random = np.random.default_rng(1)
    said = transcribed("Well -- I DON'T know, Bo... (really)?", random)
    assert [w for w in said.split() if w not in ("um", "uh", "like", "you", "mean", "i")] == [
        *("well", "don't", "know", "bo", "really"),
    ]


def test_a_transcript_has_fillers() -> None:
    random = np.random.default_rng(1)
    words = transcribed("word " * 1000, random).split()
    assert 1010 < len(words) < 1080


def test_hurried_typing_keeps_what_shows_emotion() -> None:
    random = np.random.default_rng(1)
    assert hurried("No, WAIT! 😡 Really?", random) == "no wait! 😡 really?"


def test_hurried_typing_makes_mistakes_in_few_words() -> None:
    random = np.random.default_rng(1)
    typed = hurried("telephone " * 1000, random).split()
    wrong = [word for word in typed if word != "telephone"]
    assert 20 < len(wrong) < 70
    assert all(8 <= len(word) <= 10 for word in wrong)


def test_text_that_would_become_empty_is_kept() -> None:
    dialogue = Dialogue((Utterance("?!", "a", "surprise"), Utterance("Oh!", "b")))
    written = rewritten(dialogue, transcribed, np.random.default_rng(0))
    assert [u.text for u in written.utterances] == ["?!", "oh"]
    assert written.utterances[0].label == "surprise"


def test_shares_over_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 1 together"):
        Recipe(base="x", train=(Source("x", "meld"),), transcribed=0.7, hurried=0.4)
