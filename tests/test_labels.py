"""Label sets and their spellings."""

from __future__ import annotations

import pytest

from ercbatch.errors import UsageError
from ercbatch.labels import LabelSet, label_set, label_set_names, unified_mapping


def test_orders_are_those_of_the_method() -> None:
    # A bundle stores answers by place: another order would silently swap labels.
    orders = {name: " ".join(label_set(name).labels) for name in label_set_names()}
    assert orders == {
        "meld": "neutral surprise fear sad joyful disgust angry",
        "emorynlp": "joyful mad peaceful neutral sad powerful scared",
        "iemocap": "happy sad neutral angry excited frustrated",
        "ekman": "anger disgust fear joy neutral sadness surprise",
        "plutchik": "anger anticipation disgust fear joy neutral sadness surprise trust",
        "topical-chat": "angry curious disgusted fearful happy neutral sad surprised",
        "unified": "joyful sad neutral mad excited fear disgust peaceful powerful",
    }


@pytest.mark.parametrize(
    ("name", "spelling", "label"),
    [
        ("meld", "sadness", "sad"),
        ("meld", " Joy ", "joyful"),
        ("meld", "ANGER", "angry"),
        ("emorynlp", "Peaceful", "peaceful"),
        ("emorynlp", "fear", "scared"),
        ("iemocap", "fru", "frustrated"),
        ("iemocap", "neu", "neutral"),
        ("ekman", "scared", "fear"),
        ("ekman", "no emotion", "neutral"),
        ("topical-chat", "Curious to dive deeper", "curious"),
        ("unified", "angry", "mad"),
    ],
)
def test_knows_publishers_and_other_sets_spellings(name: str, spelling: str, label: str) -> None:
    assert label_set(name).canonical(spelling) == label


@pytest.mark.parametrize(
    ("name", "spelling"),
    [("meld", "peaceful"), ("iemocap", "surprise"), ("emorynlp", "disgust"), ("meld", "unhappy")],
)
def test_a_label_without_a_counterpart_has_none(name: str, spelling: str) -> None:
    # "unhappy" holds "happy": labels are compared whole, never by parts.
    assert label_set(name).canonical(spelling) is None


def test_index_is_the_place_in_the_order() -> None:
    labels = label_set("meld")
    assert [labels.index(label) for label in labels.labels] == list(range(len(labels)))


def test_json_keeps_a_set_whole() -> None:
    for name in label_set_names():
        assert LabelSet.from_json(label_set(name).to_json()) == label_set(name)


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(UsageError, match=r"choose from meld, emorynlp"):
        label_set("melt")


def test_unified_mapping_covers_every_label_of_the_papers_sets() -> None:
    unified = set(label_set("unified").labels)
    mapping = unified_mapping()
    assert set(mapping) == {"iemocap", "meld", "emorynlp"}
    for name, table in mapping.items():
        assert set(table) == set(label_set(name).labels)
        assert set(table.values()) <= unified
    assert mapping["iemocap"]["frustrated"] == "fear"
    assert mapping["meld"]["surprise"] == "powerful"


@pytest.mark.parametrize(
    "value",
    [
        {"name": "x", "labels": ["calm"]},
        {"name": "x", "labels": ["calm", "calm"]},
        {"name": "x", "labels": ["calm", "Calm "]},
        {"name": "x", "labels": ["calm", " "]},
        {"name": "x", "labels": "sad"},
        {"name": "x", "labels": ["calm", 1]},
        {"name": "x", "labels": ["calm", "tense"], "aliases": {"quiet": "silent"}},
        {"name": "x", "labels": ["calm", "tense"], "aliases": ["quiet"]},
        {"labels": ["calm", "tense"]},
    ],
)
def test_a_custom_set_that_cannot_work_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="label set"):
        LabelSet.from_json(value)


def test_custom_set() -> None:
    labels = LabelSet.from_json(
        {"name": "calls", "labels": ["calm", "tense"], "aliases": {"At ease": "calm"}}
    )
    assert labels.canonical("at EASE") == "calm"
    assert labels.canonical("Tense") == "tense"
