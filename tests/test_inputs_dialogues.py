"""Records to dialogues and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ercbatch.dialogues import (
    Dialogue,
    LabeledDialogue,
    Utterance,
    UtteranceLabel,
    dialogue_from,
    parse_dialogue,
)
from ercbatch.errors import RecordError


def test_reads_utterances() -> None:
    dialogue = parse_dialogue(
        {
            "utterances": [
                {"speaker": "Ana", "text": "It's gone!", "label": "sad"},
                {"speaker": None, "text": " "},
                {"text": "What is?", "label": None},
            ]
        }
    )
    assert dialogue.utterances == (
        Utterance("It's gone!", "Ana", "sad"),
        Utterance(" "),
        Utterance("What is?"),
    )


def test_reads_the_chat_form() -> None:
    dialogue = parse_dialogue({"messages": [{"role": "user", "content": "Hello?"}]})
    assert dialogue.utterances == (Utterance("Hello?", "user"),)


def test_utterances_win_over_messages() -> None:
    record = {"messages": [{"role": "user", "content": "b"}], "utterances": [{"text": "a"}]}
    dialogue = parse_dialogue(record)
    assert dialogue.utterances == (Utterance("a"),)
    labeled = LabeledDialogue(dialogue, (UtteranceLabel("sad", 0.5),)).to_record()
    assert labeled["messages"] == record["messages"]
    assert labeled["utterances"] == [{"text": "a", "emotion": "sad", "confidence": 0.5}]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "not_object"),
        ([{"text": "a"}], "not_object"),
        ("text", "not_object"),
        ({}, "no_utterances"),
        ({"utterances": []}, "no_utterances"),
        ({"utterances": {"text": "a"}}, "no_utterances"),
        ({"utterances": None, "messages": [{"content": "a"}]}, "no_utterances"),
        ({"messages": "a"}, "no_utterances"),
        ({"utterances": ["a"]}, "bad_utterance"),
        ({"utterances": [{}]}, "bad_text"),
        ({"utterances": [{"text": None}]}, "bad_text"),
        ({"utterances": [{"content": "a"}]}, "bad_text"),
        ({"utterances": [{"text": "half a pair: \ud83d"}]}, "bad_text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "bad_text"),
        ({"utterances": [{"text": "a", "speaker": 1}]}, "bad_speaker"),
        ({"utterances": [{"text": "a", "label": ["sad"]}]}, "bad_label"),
    ],
)
def test_says_what_is_wrong(value: object, code: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_dialogue(value)
    assert caught.value.code == code


def test_the_reason_names_the_turn() -> None:
    with pytest.raises(RecordError, match="`text` of utterances 2"):
        parse_dialogue({"utterances": [{"text": "a"}, {"text": 7}]})


def test_output_is_the_record_with_labels_and_the_input_stays_as_it_was() -> None:
    record: dict[str, Any] = {
        "id": ["any", {"value": 1}],
        "utterances": [{"time": 0.5, "text": "a", "speaker": "A"}, {"text": "", "label": "sad"}],
        "source": {"nested": [None, True]},
    }
    before = copy.deepcopy(record)
    labels = (UtteranceLabel("sad", 0.75, {"sad": 0.75, "angry": 0.25}), UtteranceLabel(None, None))
    labeled = LabeledDialogue(parse_dialogue(record), labels).to_record()
    assert record == before
    assert list(labeled) == list(record)
    assert labeled == {
        **before,
        "utterances": [
            {
                **before["utterances"][0],
                "emotion": "sad",
                "confidence": 0.75,
                "scores": {"sad": 0.75, "angry": 0.25},
            },
            {**before["utterances"][1], "emotion": None, "confidence": None},
        ],
    }


def test_messages_are_labelled_in_place() -> None:
    dialogue = parse_dialogue({"messages": [{"role": "user", "content": "a", "name": "x"}]})
    labeled = LabeledDialogue(dialogue, (UtteranceLabel("sad", 0.5),)).to_record()
    assert labeled == {
        "messages": [
            {"role": "user", "content": "a", "name": "x", "emotion": "sad", "confidence": 0.5}
        ]
    }


def test_a_dialogue_made_in_python_is_written_as_utterances() -> None:
    dialogue = Dialogue((Utterance("a", "Ana", "angry"), Utterance("b")))
    assert dialogue_from(dialogue) is dialogue
    labeled = LabeledDialogue(dialogue, (UtteranceLabel("sad", 0.5), UtteranceLabel(None, 0.1)))
    assert labeled.to_record() == {
        "utterances": [
            {
                "speaker": "Ana",
                "text": "a",
                "label": "angry",
                "emotion": "sad",
                "confidence": 0.5,
            },
            {"speaker": "", "text": "b", "emotion": None, "confidence": 0.1},
        ]
    }


def test_a_dialogue_made_in_python_has_turns() -> None:
    dialogue = Dialogue((Utterance("Hi.", "Ana"), Utterance("Hello.", "", "joy")))
    assert dialogue.turns == [
        {"speaker": "Ana", "text": "Hi."},
        {"speaker": "", "text": "Hello.", "label": "joy"},
    ]
