"""What a prompt says: the templates, by name and version, and the cleaning of what they quote.

A template yields *pieces*: its own text (`Text`), what somebody said (`Content`), and control
marks (`Control`). `ercbatch.prompts.tree` turns pieces into tokens and arranges them; it knows no
wording. The templates follow InstructERC (arXiv 2309.11911, section 3 and figure 2).
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ercbatch.errors import UsageError
from ercbatch.prompts.typed import in_words


class Control(Enum):
    """A mark that stands for the tokenizer's own control tokens."""

    START = "start"
    SEPARATOR = "separator"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Text:
    """Words of the template."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Words of the data, cleaned."""

    text: str


Piece = Text | Content | Control

_FAKE_SPEAKER = re.compile(r"^(?:\s*<?\s*speaker[_ ]?\d+\s*:\s*)+", re.IGNORECASE)
_FAKE_TURN = re.compile(r"(speaker[_ ]?\d+)\s*:[\s:]*", re.IGNORECASE)
_HASHES = re.compile(r"#{3,}")
_SPACE = re.compile(r"\s+")


def clean(text: str) -> str:
    """Text as a prompt may quote it: one line, without the templates' delimiters.

    Line breaks, tabs and control characters become a space, invisible format characters (zero
    width, direction marks) go, `###` goes, and so does a `Speaker_3:` at the start. Elsewhere it
    loses its colon.
    """
    characters = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cf" or category == "Cs":
            continue
        characters.append(" " if category == "Cc" else character)
    line = _SPACE.sub(" ", _HASHES.sub(" ", "".join(characters)))
    return _FAKE_TURN.sub(r"\1 ", _FAKE_SPEAKER.sub("", line)).strip()


TEMPLATE_VERSION = 2
"""The newest version of the templates. Version 1 quotes texts as they are typed and keeps only the
beginning of one that is too long. Version 2 writes emoji and the like as words
(`ercbatch.prompts.typed`) and keeps the beginning and the end."""


class Template(ABC):
    """How the three tasks are worded. Speakers are numbers, in order of first appearance."""

    name: ClassVar[str]

    def __init__(self, version: int = TEMPLATE_VERSION) -> None:
        self.version = version

    def quote(self, text: str) -> str:
        """The text of an utterance as prompts quote it."""
        return clean(in_words(text) if self.version > 1 else text)

    @property
    def keeps_ends(self) -> bool:
        """Whether a text over the token limit loses its middle, instead of its end."""
        return self.version > 1

    @abstractmethod
    def head(self, labels: Sequence[str]) -> list[Piece]:
        """What opens the trunk of a dialogue."""

    @abstractmethod
    def turn(self, speaker: int, text: str) -> list[Piece]:
        """One turn of the trunk."""

    @abstractmethod
    def emotion(
        self,
        speaker: int,
        text: str,
        labels: Sequence[str],
        demonstrations: Sequence[tuple[str, str]],
        *,
        later: bool,
    ) -> list[Piece]:
        """The question for a turn's emotion.

        `demonstrations` are (text, label) pairs. `later` says that turns after the one in
        question are in view, so that the question must name its turn.
        """

    @abstractmethod
    def impact(self, speaker: int, labels: Sequence[str]) -> list[Piece]:
        """The question for the emotion of the next, unseen turn of `speaker`."""

    @abstractmethod
    def speaker_head(self) -> list[Piece]:
        """What opens the trunk of the speaker-identification task."""

    @abstractmethod
    def speaker(self, text: str, speakers: int) -> list[Piece]:
        """The question who of `speakers` speakers said `text`."""

    def answer(self, label: str) -> str:
        """A label as it follows a question. The space is what makes it a word of its own."""
        return " " + label

    @abstractmethod
    def speaker_label(self, speaker: int) -> str:
        """The answer that names a speaker."""


class PaperTemplate(Template):
    """The paper's retrieval template: the label list stands in every question."""

    name = "paper"

    _INSTRUCTION = "Now you are expert of sentiment and emotional analysis. "
    _ask: ClassVar[str] = " ### Please select the emotional label of < "

    def head(self, labels: Sequence[str]) -> list[Piece]:
        frame = "The following conversation noted between '### ###' involves several speakers. ### "
        return [Control.START, Text(self._INSTRUCTION), Text(frame)]

    def turn(self, speaker: int, text: str) -> list[Piece]:
        return [Text(f'\t Speaker_{speaker}:"'), Content(text), Text('"')]

    def emotion(
        self,
        speaker: int,
        text: str,
        labels: Sequence[str],
        demonstrations: Sequence[tuple[str, str]],
        *,
        later: bool,
    ) -> list[Piece]:
        pieces: list[Piece] = [
            Text(f'{self._ask}Speaker_{speaker}:"'),
            Content(text),
            Text(f'"> from <{", ".join(labels)}>:'),
        ]
        for example, label in demonstrations:
            pieces += [Text(' < "'), Content(example), Text(f'">: {label}\n')]
        return [*pieces, Control.ANSWER]

    def impact(self, speaker: int, labels: Sequence[str]) -> list[Piece]:
        name = f"Speaker_{speaker}"
        return [
            Text(
                " ### Based on the above historical utterances, next utterance is spoken by "
                f"<{name}>, please predict the emotion states of <{name}> from "
                f"<{', '.join(labels)}>:"
            ),
            Control.ANSWER,
        ]

    def speaker_head(self) -> list[Piece]:
        return [Control.START, Text(self._INSTRUCTION)]

    def speaker(self, text: str, speakers: int) -> list[Piece]:
        names = ", ".join(self.speaker_label(k) for k in range(speakers))
        return [
            Text("Please select the Speaker label of the utterance <Speaker: "),
            Content(text),
            Text(f"> from <{names}>:"),
            Control.ANSWER,
        ]

    def speaker_label(self, speaker: int) -> str:
        return f"Speaker_{speaker}"


class PlainTemplate(PaperTemplate):
    """The paper's baseline: the label statement alone, no instruction and no history."""

    name = "plain"

    _ask = ""

    def head(self, labels: Sequence[str]) -> list[Piece]:
        return [Control.START, Text("Please select the emotional label of < ")]

    def turn(self, speaker: int, text: str) -> list[Piece]:
        return []


class CompactTemplate(Template):
    """The label list once, in the trunk; a question is a separator and a short cue."""

    name = "compact"

    def head(self, labels: Sequence[str]) -> list[Piece]:
        return [Control.START, Text(f"emotions: {', '.join(labels)}.")]

    def turn(self, speaker: int, text: str) -> list[Piece]:
        return [Control.SEPARATOR, Text(f"{speaker}:"), Content(text)]

    def emotion(
        self,
        speaker: int,
        text: str,
        labels: Sequence[str],
        demonstrations: Sequence[tuple[str, str]],
        *,
        later: bool,
    ) -> list[Piece]:
        pieces: list[Piece] = []
        for example, label in demonstrations:
            pieces += [Control.SEPARATOR, Text("like:"), Content(example), Text(f" = {label}")]
        pieces += [Control.SEPARATOR]
        if later:
            pieces += [Text(f"{speaker}:"), Content(text), Control.SEPARATOR]
        return [*pieces, Text("emotion:"), Control.ANSWER]

    def impact(self, speaker: int, labels: Sequence[str]) -> list[Piece]:
        return [Control.SEPARATOR, Text(f"next {speaker}:"), Control.ANSWER]

    def speaker_head(self) -> list[Piece]:
        return [Control.START, Text("speakers.")]

    def speaker(self, text: str, speakers: int) -> list[Piece]:
        return [
            Control.SEPARATOR,
            Content(text),
            Control.SEPARATOR,
            Text(f"speaker of {speakers}:"),
            Control.ANSWER,
        ]

    def speaker_label(self, speaker: int) -> str:
        return str(speaker)


_TEMPLATES: dict[str, type[Template]] = {
    t.name: t for t in (PaperTemplate, PlainTemplate, CompactTemplate)
}


def template(name: str, version: int = TEMPLATE_VERSION) -> Template:
    """The template of that name and version.

    Raises:
        UsageError: this program has no such template, or not that version of it.
    """
    template_class = _TEMPLATES.get(name)
    if template_class is None:
        raise UsageError(f"no prompt template {name!r}: choose from {', '.join(_TEMPLATES)}")
    if not 1 <= version <= TEMPLATE_VERSION:
        raise UsageError(
            f"prompt template {name!r} has the versions 1 to {TEMPLATE_VERSION} here, but version "
            f"{version} is asked for: install the ercbatch that the bundle names"
        )
    return template_class(version)
