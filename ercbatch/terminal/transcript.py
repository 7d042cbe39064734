"""A labelled dialogue as a person reads it, on a terminal."""

from __future__ import annotations

import zlib

from rich.console import Console
from rich.text import Text

from ercbatch.dialogues import LabeledDialogue
from ercbatch.terminal.streams import printable

_COLOURS = {
    "neutral": "white",
    "joyful": "yellow",
    "joy": "yellow",
    "happy": "yellow",
    "excited": "bright_yellow",
    "peaceful": "green",
    "powerful": "bright_magenta",
    "surprise": "magenta",
    "surprised": "magenta",
    "curious": "bright_cyan",
    "sad": "blue",
    "sadness": "blue",
    "fear": "cyan",
    "scared": "cyan",
    "fearful": "cyan",
    "angry": "red",
    "anger": "red",
    "mad": "red",
    "frustrated": "bright_red",
    "disgust": "bright_green",
    "disgusted": "bright_green",
}
_FALLBACK_COLOURS = ("magenta", "cyan", "yellow", "green", "blue", "red")


def colour(label: str) -> str:
    """The colour of a label; the same for the same name, everywhere."""
    fallback = _FALLBACK_COLOURS[zlib.crc32(label.encode()) % len(_FALLBACK_COLOURS)]
    return _COLOURS.get(label, fallback)


def print_dialogue(console: Console, labeled: LabeledDialogue) -> None:
    """Print one line for each utterance: emotion, confidence, speaker, text."""
    name = labeled.dialogue.record.get("id")
    if name is not None:
        console.print(Text(printable(str(name)), style="bold underline"))
    for utterance, label in zip(labeled.dialogue.utterances, labeled.labels, strict=True):
        line = Text()
        emotion = printable(label.emotion or "–")
        confidence = "    " if label.confidence is None else f"{label.confidence:4.0%}"
        line.append(f"{emotion:>11} ", style=colour(emotion) if label.emotion else "dim")
        line.append(f"{confidence}  ", style="dim")
        if utterance.speaker:
            line.append(f"{printable(utterance.speaker)}: ", style="bold")
        line.append(printable(utterance.text))
        console.print(line)
    console.print()
