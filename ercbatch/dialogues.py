"""Dialogues: what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ercbatch.errors import RecordError


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn. `label` is a gold label, where the record has one."""

    text: str
    speaker: str = ""
    label: str | None = None

    @property
    def blank(self) -> bool:
        """Whether the text is empty: then the utterance gets no label."""
        return not self.text.strip()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Utterances in order.

    Attributes:
        record: the parsed input record, which is carried through to the output.
        size: bytes of the line that it was read from.
    """

    utterances: tuple[Utterance, ...]
    record: Mapping[str, Any] = field(compare=False, repr=False, default_factory=dict)
    size: int = field(compare=False, repr=False, default=0)

    @property
    def nonblank(self) -> list[int]:
        """Indices of the utterances that are not blank."""
        return [t for t, u in enumerate(self.utterances) if not u.blank]

    @property
    def turns(self) -> list[Mapping[str, Any]]:
        """The utterances of the record."""
        record = self.to_record()
        turns: list[Mapping[str, Any]] = record[turns_key(record)]
        return turns

    def to_record(self) -> dict[str, Any]:
        """The record that the dialogue was read from, or one that says the same."""
        if self.record:
            return dict(self.record)
        turns: list[dict[str, Any]] = []
        for u in self.utterances:
            turn: dict[str, Any] = {"speaker": u.speaker, "text": u.text}
            turns.append(turn if u.label is None else {**turn, "label": u.label})
        return {"utterances": turns}


@dataclass(frozen=True, slots=True)
class UtteranceLabel:
    """What labelling says of one utterance.

    `emotion` is None for a blank text or a confidence below the threshold; `confidence` (0 to 1,
    of the best label) is None for a blank text. `scores` maps every label to its probability.
    """

    emotion: str | None
    confidence: float | None
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class LabeledDialogue:
    """A dialogue and its labels, one for each utterance."""

    dialogue: Dialogue
    labels: tuple[UtteranceLabel, ...]

    def to_record(self) -> dict[str, Any]:
        """The input record, with `emotion`, `confidence` and `scores` in each utterance.

        Scores that an earlier labelling gave are not those of these labels: they are left out.
        """
        record = self.dialogue.to_record()
        key = turns_key(record)
        record[key] = [
            {
                **{name: value for name, value in turn.items() if name != "scores"},
                "emotion": label.emotion,
                "confidence": label.confidence,
                **({} if label.scores is None else {"scores": dict(label.scores)}),
            }
            for turn, label in zip(record[key], self.labels, strict=True)
        ]
        return record


def turns_key(record: Mapping[str, Any]) -> str:
    """The key of a record under which its utterances are."""
    return "utterances" if "utterances" in record else "messages"


def dialogue_from(value: Dialogue | Mapping[str, Any]) -> Dialogue:
    """A dialogue as it is, or from a record."""
    return value if isinstance(value, Dialogue) else parse_dialogue(value)


def parse_dialogue(value: object) -> Dialogue:
    """A dialogue from a parsed record of either shape (`utterances` or `messages`).

    Raises:
        RecordError: not_object, no_utterances, bad_utterance, bad_text, bad_speaker, bad_label.
    """
    if not isinstance(value, Mapping):
        raise RecordError("not_object", "the line is not a JSON object")
    key = turns_key(value)
    speaker_key, text_key = ("speaker", "text") if key == "utterances" else ("role", "content")
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        raise RecordError(
            "no_utterances", "the dialogue has no list of `utterances` (or `messages`)"
        )
    utterances = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RecordError("bad_utterance", f"{key} {number} is not an object")
        text, speaker, label = turn.get(text_key), turn.get(speaker_key), turn.get("label")
        if not isinstance(text, str) or not _is_unicode(text):
            raise RecordError("bad_text", f"`{text_key}` of {key} {number} is not a text string")
        if speaker is not None and not isinstance(speaker, str):
            raise RecordError("bad_speaker", f"`{speaker_key}` of {key} {number} is not a string")
        if label is not None and not isinstance(label, str):
            raise RecordError("bad_label", f"`label` of {key} {number} is not a string")
        utterances.append(Utterance(text, speaker or "", label))
    return Dialogue(tuple(utterances), value)


def _is_unicode(text: str) -> bool:
    # Half a surrogate pair can come from Python code; no tokenizer or JSON writer takes it.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
