"""Publishers' files to dialogue records, with gold labels under the label sets' own names."""

from __future__ import annotations

import ast
import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ercbatch.errors import InputError, UsageError
from ercbatch.labels import LabelSet, label_set

JsonRecord = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Publisher:
    """A publisher's format: the label set its labels belong to, and its reader."""

    labels: str
    read: Callable[[Path, LabelSet], Iterator[JsonRecord]]


def convert(name: str, source: Path) -> Iterator[JsonRecord]:
    """Dialogue records of a publisher's file (IEMOCAP: of its release folder).

    Raises:
        UsageError: no such format.
        InputError: the source is missing or not of that format.
    """
    if name not in PUBLISHERS:
        raise UsageError(f"no format {name!r}: choose from {', '.join(PUBLISHERS)}")
    publisher = PUBLISHERS[name]
    return publisher.read(source, label_set(publisher.labels))


def decode(data: bytes) -> str:
    """UTF-8 with stray Windows-1252: bytes that are no UTF-8, and C1 controls, become its signs."""
    text = data.decode("utf-8", "ercbatch-windows-1252")
    return re.sub("[\x80-\x9f]", lambda control: _windows_1252(control[0].encode("latin-1")), text)


def _windows_1252(data: bytes) -> str:
    # The five bytes that Windows-1252 leaves open become the replacement character.
    return data.decode("cp1252", "replace")


def _repair(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _windows_1252(error.object[error.start : error.end]), error.end


codecs.register_error("ercbatch-windows-1252", _repair)


def _text(path: Path) -> str:
    try:
        return decode(path.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}): name a file of the publisher's release"
        ) from error


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(line, row) of a CSV file that must have these columns."""
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}, line 1: no column {missing[0]!r}: is it the publisher's CSV?")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, line {reader.line_num}: more or fewer columns than in line 1: "
                    "fetch it again"
                )
            yield reader.line_num, row
    except csv.Error as error:
        line = reader.reader.line_num  # the row that broke: the dictionary reader lags behind
        raise InputError(f"{path}, line {line}: {error}: fetch it again") from error


def _label(labels: LabelSet, text: str, where: str) -> str:
    label = labels.canonical(text)
    if label is None:
        raise InputError(
            f"{where}: unknown label {text!r} (known: {', '.join(labels.labels)}): correct it, or "
            "fetch the file again"
        )
    return label


def _number(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{where}: {text!r} is not a number: fetch the file again") from error


def _scenes(rows: Iterator[tuple[tuple[Any, ...], int, JsonRecord]]) -> Iterator[tuple[Any, ...]]:
    """(key, utterances in order) of rows (key, utterance number, utterance), by first key."""
    scenes: dict[tuple[Any, ...], list[tuple[int, JsonRecord]]] = {}
    for key, number, utterance in rows:
        scenes.setdefault(key, []).append((number, utterance))
    for key, numbered in scenes.items():
        yield key, [utterance for _, utterance in sorted(numbered, key=lambda pair: pair[0])]


def _meld(path: Path, labels: LabelSet) -> Iterator[JsonRecord]:
    columns = (
        *("Dialogue_ID", "Utterance_ID", "Season", "Episode"),
        *("Speaker", "Utterance", "Emotion"),
    )

    episodes: dict[str, JsonRecord] = {}

    def utterances() -> Iterator[tuple[tuple[Any, ...], int, JsonRecord]]:
        for line, row in _rows(path, columns):
            where = f"{path}, line {line}"
            label = _label(labels, row["Emotion"], where)
            turn = {"speaker": row["Speaker"], "text": row["Utterance"], "label": label}
            episode = {name: _number(row[name.title()], where) for name in ("season", "episode")}
            episodes.setdefault(row["Dialogue_ID"], episode)
            yield (row["Dialogue_ID"],), _number(row["Utterance_ID"], where), turn

    for (dialogue,), turns in _scenes(utterances()):
        yield {"id": dialogue, **episodes[dialogue], "utterances": turns}


def _emorynlp(path: Path, labels: LabelSet) -> Iterator[JsonRecord]:
    columns = ("Season", "Episode", "Scene_ID", "Utterance_ID", "Speaker", "Utterance", "Emotion")

    def utterances() -> Iterator[tuple[tuple[Any, ...], int, JsonRecord]]:
        for line, row in _rows(path, columns):
            where = f"{path}, line {line}"
            try:
                speakers = ast.literal_eval(row["Speaker"])
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                speakers = None
            if not isinstance(speakers, list) or not all(isinstance(s, str) for s in speakers):
                raise InputError(
                    f"{where}: Speaker is not a list of names ({row['Speaker'][:80]!r}): fetch the "
                    "file again"
                )
            speaker = " & ".join(speakers)
            label = _label(labels, row["Emotion"], where)
            turn = {"speaker": speaker, "text": row["Utterance"], "label": label}
            key = tuple(_number(row[name], where) for name in ("Season", "Episode", "Scene_ID"))
            yield key, _number(row["Utterance_ID"], where), turn

    for (season, episode, scene), turns in _scenes(utterances()):
        name = f"s{season:02}e{episode:02}-{scene}"
        yield {"id": name, "season": season, "episode": episode, "utterances": turns}


def _tab_rows(path: Path, columns: int, reason: str) -> Iterator[tuple[int, list[str]]]:
    """(line, columns) of a file of tab-separated text without a header; blank lines are skipped."""
    for line, row in enumerate(_text(path).split("\n"), start=1):
        if not row.strip():
            continue
        cells = row.rstrip("\r\t").split("\t")
        if len(cells) != columns:
            raise InputError(f"{path}, line {line}: {reason}")
        yield line, cells


def _goemotions(path: Path, labels: LabelSet) -> Iterator[JsonRecord]:
    """A comment with one emotion (beside neutral or not) gets it as its label.

    One with several emotions is ambiguous for a task that asks for one: it has no `label`, and
    all of them in `labels`.
    """
    names_file = path.with_name("labels.txt")
    names = tuple(_text(names_file).split()) if names_file.exists() else labels.labels
    reason = "not text, label numbers and id: is it GoEmotions' TSV?"
    for line, columns in _tab_rows(path, 3, reason):
        where = f"{path}, line {line}"
        numbers = [_number(part, where) for part in columns[1].split(",")]
        if any(not 0 <= number < len(names) for number in numbers):
            raise InputError(
                f"{where}: label {columns[1]} is beyond the {len(names)} labels: put the release's "
                "labels.txt beside the file"
            )
        gold = [_label(labels, names[number], where) for number in numbers]
        emotions = [label for label in gold if label != "neutral"] or gold
        turn: JsonRecord = {"text": columns[0]}
        if len(emotions) == 1:
            turn["label"] = emotions[0]
        else:
            turn["labels"] = gold
        yield {"id": columns[2], "utterances": [turn]}


_PLUTCHIK = (
    *("anger", "anticipation", "disgust", "fear", "joy", "sadness", "surprise", "trust"),
    "neutral",
)
"""XED's labels by number, from 1 (its README)."""
_SPACE_BEFORE_MARK = re.compile(r" +(?=[!,.:;?]|'\w)|(?<=\w) +(?=n't\b)")


def _xed(path: Path, labels: LabelSet) -> Iterator[JsonRecord]:
    """A file of XED: text and label numbers (annotated lines), or 9 and text (neutral lines).

    Annotated lines have a space before each punctuation mark and neutral ones have not. The space
    is removed, because a model would learn it as the mark of an emotion. A line with several
    emotions has no `label`, and all of them in `labels`.
    """
    reason = "not text and label numbers: is it XED's TSV?"
    for line, columns in _tab_rows(path, 2, reason):
        where = f"{path}, line {line}"
        text, numbers = reversed(columns) if columns[0] == "9" else columns
        gold = []
        for part in numbers.split(","):
            number = _number(part, where)
            if not 1 <= number <= len(_PLUTCHIK):
                raise InputError(f"{where}: label {number} is not in 1 to 9: fetch the file again")
            gold.append(_label(labels, _PLUTCHIK[number - 1], where))
        turn: JsonRecord = {"text": _SPACE_BEFORE_MARK.sub("", text).strip()}
        turn |= {"label": gold[0]} if len(gold) == 1 else {"labels": gold}
        yield {"id": f"{path.stem}-{line}", "utterances": [turn]}


def _topical_chat(path: Path, labels: LabelSet) -> Iterator[JsonRecord]:
    where = str(path)
    try:
        chats = orjson.loads(_text(path))
        for name, chat in chats.items():
            where = f"{path}, chat {name}"
            turns = [
                {
                    "speaker": _string(turn["agent"]),
                    "text": _string(turn["message"]),
                    "label": _label(labels, _string(turn["sentiment"]), where),
                }
                for turn in chat["content"]
            ]
            yield {"id": name, "utterances": turns}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}: not Topical-Chat's JSON ({type(error).__name__}: {error}): fetch it again"
        ) from error


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not text")
    return value


_TURN = re.compile(r"^(Ses\d\d[FM]_\w+_([FM])[A-Z]*\d+) \[[^\]]*\]: ?(.*)$")
_EVALUATION = re.compile(r"^\[[^\]]*\]\t(Ses\d\d[FM]_\w+)\t(\w+)\t")
_UNUSED_EMOTIONS = frozenset({"xxx", "sur", "fea", "dis", "oth"})


def _iemocap(path: Path, labels: LabelSet) -> Iterator[JsonRecord]:
    """A release folder, or one of its Session folders; the unused labels become no label."""
    sessions = [path] if (path / "dialog").is_dir() else sorted(path.glob("Session*"))
    has_transcripts = False
    for session in sessions:
        number = re.search(r"\d+$", session.resolve().name)
        for transcript in sorted((session / "dialog" / "transcriptions").glob("Ses*.txt")):
            has_transcripts = True
            evaluation = session / "dialog" / "EmoEvaluation" / transcript.name
            emotions = {
                m[1]: m[2] for row in _text(evaluation).split("\n") if (m := _EVALUATION.match(row))
            }
            turns: list[JsonRecord] = []
            for line, row in enumerate(_text(transcript).split("\n"), start=1):
                match = _TURN.match(row.rstrip("\r"))
                if match is None:  # notes and the speakers' interjections carry no judgement
                    continue
                turn: JsonRecord = {"id": match[1], "speaker": match[2], "text": match[3]}
                emotion = emotions.get(match[1], "xxx")
                if emotion not in _UNUSED_EMOTIONS:
                    turn["label"] = _label(labels, emotion, f"{transcript}, line {line}")
                turns.append(turn)
            if turns:
                record: JsonRecord = {"id": transcript.stem, "utterances": turns}
                yield {**record, "session": int(number[0])} if number else record
    if not has_transcripts:
        raise InputError(
            f"{path}: no Session*/dialog/transcriptions/Ses*.txt in it: name the folder of the "
            "IEMOCAP release"
        )


PUBLISHERS: Mapping[str, Publisher] = {
    "meld": Publisher("meld", _meld),
    "emorynlp": Publisher("emorynlp", _emorynlp),
    "iemocap": Publisher("iemocap", _iemocap),
    "goemotions": Publisher("ekman", _goemotions),
    "topical-chat": Publisher("topical-chat", _topical_chat),
    "xed": Publisher("plutchik", _xed),
}
