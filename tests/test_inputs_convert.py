"""Publishers' formats; every line here was written for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import conftest
import pytest

from ercbatch import cli
from ercbatch.dialogues import parse_dialogue
from ercbatch.errors import InputError, UsageError
from ercbatch.inputs.convert import PUBLISHERS, convert, decode
from ercbatch.labels import label_set

# With Windows-1252 as a byte and as a C1 control, and with a dialogue out of order.
MELD = (
    b"Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    b"StartTime,EndTime\r\n"
    b'1,"It\x92s late, Bo.",Ana,neutral,neutral,7,0,2,3,"0","1"\r\n'
    b'2,"Late\xe2\x80\xa6 again!",Bo,anger,negative,7,2,2,3,"0","1"\r\n'
    b"3,Caf\xc3\xa9 first?,Ana,joy,positive,9,0,1,4,0,1\r\n"
    b'4,"So\xc2\x92 what?",Ana,sadness,negative,7,1,2,3,0,1\r\n'
)


def records(format: str, source: Path) -> list[dict[str, Any]]:
    result = list(convert(format, source))
    own = set(label_set(PUBLISHERS[format].labels).labels)
    for record in result:
        labels = {u.label for u in parse_dialogue(record).utterances}
        assert labels <= own | {None}
    return result


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_the_command_line_offers_the_formats() -> None:
    # The command line may not import the converters before it runs one, so it names them itself.
    assert tuple(PUBLISHERS) == cli._PUBLISHERS


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"it\x92s \x93so\x94 \x96 so\x85", "it’s “so” – so…"),
        (b"it\xe2\x80\x99s \x97 caf\xc3\xa9 caf\xe9", "it’s — café café"),
        (b"C1: \xc2\x92 \xc2\x85", "C1: ’ …"),
        (b"cut short: \xe2\x80", "cut short: â€"),
        (b"in no table: \x81", "in no table: \ufffd"),
        ("as it should be: 😀 é".encode(), "as it should be: 😀 é"),
    ],
)
def test_windows_1252_inside_utf_8_is_repaired(data: bytes, text: str) -> None:
    assert decode(data) == text


def test_meld(tmp_path: Path) -> None:
    # Utterances come in the order of their numbers; dialogues in that of the file.
    assert records("meld", write(tmp_path / "meld.csv", MELD)) == [
        {
            "id": "7",
            "season": 2,
            "episode": 3,
            "utterances": [
                {"speaker": "Ana", "text": "It’s late, Bo.", "label": "neutral"},
                {"speaker": "Ana", "text": "So’ what?", "label": "sad"},
                {"speaker": "Bo", "text": "Late… again!", "label": "angry"},
            ],
        },
        {
            "id": "9",
            "season": 1,
            "episode": 4,
            "utterances": [{"speaker": "Ana", "text": "Café first?", "label": "joyful"}],
        },
    ]


EMORY = (
    "Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode,Start_Time,End_Time\n"
    'We won!,"[\'Ana Roe\', ""Bo O\'Hara""]",Powerful,4,1,1,15,0,1\n'
    "\"Well, yes.\",['Ana Roe'],Peaceful,4,2,1,15,0,1\n"
    "Elsewhere.,['Cy'],Mad,4,1,2,1,0,1\n"
)


def test_emorynlp(tmp_path: Path) -> None:
    assert records("emorynlp", write(tmp_path / "emory.csv", EMORY)) == [
        {
            "id": "s01e15-4",
            "season": 1,
            "episode": 15,
            "utterances": [
                {"speaker": "Ana Roe & Bo O'Hara", "text": "We won!", "label": "powerful"},
                {"speaker": "Ana Roe", "text": "Well, yes.", "label": "peaceful"},
            ],
        },
        {
            "id": "s02e01-4",
            "season": 2,
            "episode": 1,
            "utterances": [{"speaker": "Cy", "text": "Elsewhere.", "label": "mad"}],
        },
    ]


def test_goemotions_of_several_emotions_get_no_single_label(tmp_path: Path) -> None:
    rows = 'One "quote\t4\ta1\nBoth neutral and glad\t3,4\ta2\nGlad and angry\t0,3\ta3\n'
    assert records("goemotions", write(tmp_path / "dev.tsv", rows)) == [
        {"id": "a1", "utterances": [{"text": 'One "quote', "label": "neutral"}]},
        {"id": "a2", "utterances": [{"text": "Both neutral and glad", "label": "joy"}]},
        {"id": "a3", "utterances": [{"text": "Glad and angry", "labels": ["anger", "joy"]}]},
    ]


def test_goemotions_reads_the_labels_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "labels.txt", "joy\nneutral\n")
    (record,) = records("goemotions", write(tmp_path / "dev.tsv", "Fine\t0\ta1\r\n"))
    assert record["utterances"] == [{"text": "Fine", "label": "joy"}]


def test_topical_chat(tmp_path: Path) -> None:
    turn = {"message": "Why so? ", "agent": "agent_1", "sentiment": "Curious to dive deeper"}
    chats = {"t_1": {"config": "A", "content": [turn]}}
    assert records("topical-chat", write(tmp_path / "chat.json", json.dumps(chats))) == [
        {
            "id": "t_1",
            "utterances": [{"speaker": "agent_1", "text": "Why so? ", "label": "curious"}],
        }
    ]


def test_xed_annotated_and_neutral_lines(tmp_path: Path) -> None:
    annotated = "This is not , uh , what I do n't want !\t6\nToo late .\t1, 3\nHe 's in\t8\n"
    assert records("xed", write(tmp_path / "en.tsv", annotated)) == [
        {
            "id": "en-1",
            "utterances": [{"text": "This is not, uh, what I don't want!", "label": "sadness"}],
        },
        {"id": "en-2", "utterances": [{"text": "Too late.", "labels": ["anger", "disgust"]}]},
        {"id": "en-3", "utterances": [{"text": "He's in", "label": "trust"}]},
    ]
    neutral = "9\tTwo pair.\n9\tStray tabs\t\t\n"
    assert records("xed", write(tmp_path / "neu.txt", neutral)) == [
        {"id": "neu-1", "utterances": [{"text": "Two pair.", "label": "neutral"}]},
        {"id": "neu-2", "utterances": [{"text": "Stray tabs", "label": "neutral"}]},
    ]


def iemocap(folder: Path, session: int, name: str) -> None:
    dialog = folder / f"Session{session}" / "dialog"
    write(
        dialog / "transcriptions" / f"{name}.txt",
        f"{name}_F000 [006.2901-008.2357]: Hello?\n"
        "F: [MM-hmm]\n"
        f"{name}_M000 [007.5712-010.4750]: Yes: [LAUGHTER] here.\n"
        f"{name}_FXX0 [010.5000-010.9000]: Oh.\n"
        f"{name}_M001 [011.0000-012.0000]: Who\u2028is it?\n",
    )
    write(
        dialog / "EmoEvaluation" / f"{name}.txt",
        "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        f"[6.2901 - 8.2357]\t{name}_F000\tfru\t[2.5000, 2.5000, 2.5000]\n"
        "C-E2:\tNeutral;\t()\n"
        f"[7.5712 - 10.4750]\t{name}_M000\thap\t[2.5000, 2.5000, 2.5000]\n"
        f"[11.0000 - 12.0000]\t{name}_M001\txxx\t[2.5000, 2.5000, 2.5000]\n",
    )


def test_iemocap(tmp_path: Path) -> None:
    iemocap(tmp_path, 5, "Ses05M_script01_1b")
    iemocap(tmp_path, 1, "Ses01F_impro01")
    result = records("iemocap", tmp_path)
    assert [(r["id"], r["session"]) for r in result] == [
        ("Ses01F_impro01", 1),
        ("Ses05M_script01_1b", 5),
    ]
    name = "Ses01F_impro01"
    # Notes are left out; a turn that was not judged, or has no used label, is context.
    assert result[0]["utterances"] == [
        {"id": f"{name}_F000", "speaker": "F", "text": "Hello?", "label": "frustrated"},
        {"id": f"{name}_M000", "speaker": "M", "text": "Yes: [LAUGHTER] here.", "label": "happy"},
        {"id": f"{name}_FXX0", "speaker": "F", "text": "Oh."},
        {"id": f"{name}_M001", "speaker": "M", "text": "Who\u2028is it?"},
    ]
    assert records("iemocap", tmp_path / "Session5") == result[1:]


def test_iemocap_needs_the_judgements(tmp_path: Path) -> None:
    iemocap(tmp_path, 1, "Ses01F_impro01")
    missing = tmp_path / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    missing.unlink()
    with pytest.raises(InputError, match=r"EmoEvaluation.Ses01F_impro01\.txt: cannot be read"):
        list(convert("iemocap", tmp_path))


HEADER = MELD.split(b"\n")[0] + b"\n"
TOPICAL = b'{"t_1": {"content": [{"message": %s, "agent": "a", "sentiment": %s}]}}'
BROKEN = {
    "another CSV": ("meld", b"a,b\n1,2\n", r"in\.csv, line 1: no column 'Dialogue_ID'"),
    "empty": ("meld", b"", "line 1: no column"),
    "short row": ("meld", HEADER + b"1,Hello\n", "line 2: more or fewer columns"),
    "long row": (
        "meld",
        MELD + b"1,a,A,joy,x,1,1,1,1,0,0,extra\n",
        "line 6: more or fewer columns",
    ),
    "open quote": ("meld", HEADER + b'1,"Hello', "line 2: unexpected end of data"),
    "unknown label": (
        "meld",
        HEADER + b"1,a,A,glee,x,1,1,1,1,0,0\n",
        "line 2: unknown label 'glee'",
    ),
    "no number": ("meld", HEADER + b"1,a,A,joy,x,1,one,1,1,0,0\n", "line 2: 'one' is not a number"),
    "speaker is no list": (
        "emorynlp",
        EMORY.replace("['Cy']", "'Cy'").encode(),
        "line 4: Speaker is not a list",
    ),
    "speaker is code": (
        "emorynlp",
        EMORY.replace("['Cy']", "[print(1)]").encode(),
        "line 4: Speaker is not a list",
    ),
    "speaker is deep": (
        "emorynlp",
        EMORY.replace("['Cy']", "[" * 5000 + "]" * 5000).encode(),
        "line 4: Speaker is not a list",
    ),
    "another TSV": ("goemotions", b"a\t1\n", "line 1: not text, label numbers and id"),
    "label beyond": ("goemotions", b"a\t1\tx\nb\t7\ty\n", "line 2: label 7 is beyond the 7 labels"),
    "labels no number": ("goemotions", b"a\tjoy\tx\n", "line 1: 'joy' is not a number"),
    "no label number": ("xed", b"a\tjoy\n", "line 1: 'joy' is not a number"),
    "no such number": ("xed", b"a\t1\nb\t10\n", "line 2: label 10 is not in 1 to 9"),
    "no columns": ("xed", b"a\n", "line 1: not text and label numbers"),
    "no JSON": ("topical-chat", b"{", "not Topical-Chat's JSON"),
    "another JSON": ("topical-chat", b"[1]", "not Topical-Chat's JSON"),
    "chat without content": ("topical-chat", b'{"t_1": {}}', r"chat t_1: not Topical-Chat's JSON"),
    "text is null": ("topical-chat", TOPICAL % (b"null", b'"Sad"'), "chat t_1: .*null|None"),
    "unknown sentiment": ("topical-chat", TOPICAL % (b'"a"', b'"Odd"'), "chat t_1: unknown label"),
}


@pytest.mark.parametrize(("format", "data", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, format: str, data: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(convert(format, write(tmp_path / "in.csv", data)))
    assert str(tmp_path / "in.csv") in str(caught.value)


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        list(convert("meld", tmp_path / "none.csv"))
    with pytest.raises(InputError, match="name the folder of the IEMOCAP release"):
        list(convert("iemocap", tmp_path))
    with pytest.raises(UsageError, match="choose from meld, emorynlp, iemocap"):
        convert("friends", tmp_path)


def test_convert_writes_over_nothing_that_it_reads(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "meld.csv", MELD)
    done = conftest.cli("convert", "meld", source, "-o", source, "--force")
    assert done.returncode == 2
    assert "is read: choose another" in done.stderr
    part = write(tmp_path / "out.jsonl.part", "of a run")
    asked = ("convert", "meld", source, "-o", tmp_path / "out.jsonl")
    done = conftest.cli(*asked)
    assert done.returncode == 2
    assert "out.jsonl.part exists" in done.stderr
    assert (source.read_bytes(), part.read_text()) == (MELD, "of a run")
    assert conftest.cli(*asked, "--force").returncode == 0
    assert not part.exists()
