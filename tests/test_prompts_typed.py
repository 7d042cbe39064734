"""Emoji, links and other things that people type, as prompts quote them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ercbatch.prompts.templates import template
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.typed import in_words


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("🎉", ":party popper:"),
        ("😡😡😡😡 wtf", ":enraged face: :enraged face: wtf"),
        ("ok 👍🏽", "ok :thumbs up:"),
        ("🤦🏻‍♀️", ":woman facepalming:"),
        ("I ❤️ it", "I :red heart: it"),
        ("cake :cake: :+1:", "cake :cake: :+1:"),
        ("thanks:) =( xD", "thanks :smiling face: :frowning face: :face with tears of joy:"),
        ("at 10:00, ratio 3:0, C:/x", "at 10:00, ratio 3:0, C:/x"),
        ("nooooo!!!!! whaaat???", "noo!! whaat??"),
        ("hahahahaha", "haha"),
        ("well......", "well..."),
        ("it costs 1000000", "it costs 1000000"),
        ("see https://example.com/a?b=1, ok?", "see link, ok?"),
        ("www.example.org/track.", "link."),
        ("@kari ask a.b@example.com", "@user ask address"),
        ("On Monday, Bo wrote:\n> Hello\n> there\nNo, I won't.", "No, I won't."),
        ("> only a quote", "> only a quote"),
    ],
)
def test_version_2_reads_what_people_type_as_words(typed: str, read: str) -> None:
    assert template("compact").quote(typed) == read


def test_version_1_quotes_texts_as_they_are_typed() -> None:
    assert template("compact", 1).quote("nooo 🎉 :) www.example.org") == (
        "nooo 🎉 :) www.example.org"
    )


@given(st.text(max_size=100) | st.text(alphabet=":;)(<3->DPox/ 😂🎉a@.w\n", max_size=60))
def test_in_words_never_returns_an_empty_text(text: str) -> None:
    read = in_words(text)
    assert bool(read.strip()) == bool(text.strip())


def test_a_long_text_keeps_its_beginning_and_its_end(tokenizer: SegmentTokenizer) -> None:
    whole = tokenizer.encode_content("one two three four five six seven", 100)
    assert tokenizer.encode_content("one two three four five six seven", 4) == whole[:4]
    assert tokenizer.encode_content("one two three four five six seven", 5, both_ends=True) == (
        *whole[:3],
        *whole[-2:],
    )
    assert tokenizer.encode_content("one two", 100, both_ends=True) == tokenizer.encode_content(
        "one two", 100
    )


def test_a_very_long_text_is_cut_before_it_is_tokenized(tokenizer: SegmentTokenizer) -> None:
    filling = "word " * 100_000
    ids = tokenizer.encode_content(f"first {filling} last", 8, both_ends=True)
    assert ids[0] == tokenizer.encode_content("first", 8)[0]
    assert ids[-1] == tokenizer.encode_content("last", 8)[-1]
    assert len(ids) == 8
