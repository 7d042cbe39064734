"""Labels of training data: other label sets, own ones, several for an utterance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ercbatch.errors import UsageError
from ercbatch.labels import label_set
from train.datasets import one_hot, read_dataset
from train.sources import Source


def test_labels_are_learnt_under_another_set(tmp_path: Path) -> None:
    turns = [{"text": "a", "label": "joy"}, {"text": "b", "label": "surprise"}, {"text": "c"}]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"utterances": turns}) + "\n")
    (read,) = read_dataset(Source(str(path), "unified", written="meld")).scenes
    assert [u.label for u in read.dialogue.utterances] == ["joyful", "powerful", None]
    own = dict.fromkeys(label_set("meld").labels, "neutral") | {"surprise": None}
    mapping = tmp_path / "own.json"
    mapping.write_text(json.dumps({"meld": own}))
    source = Source(str(path), "unified", written="meld", mapping=str(mapping))
    (read,) = read_dataset(source).scenes
    assert [u.label for u in read.dialogue.utterances] == ["neutral", None, None]
    assert read.target_utterances == [0]
    for table, words in (
        ({"meld": own | {"sad": "sleepy"}}, "'sad' of 'meld' is mapped to 'sleepy'"),
        ({"meld": {"sad": "sad"}}, "lacks the label 'neutral'"),
        ({}, "nothing for the label set 'meld'"),
    ):
        mapping.write_text(json.dumps(table))
        with pytest.raises(UsageError, match=words):
            read_dataset(source)


def test_custom_label_set_is_read_from_a_file(tmp_path: Path) -> None:
    path, labels = tmp_path / "d.jsonl", tmp_path / "moods.json"
    path.write_text('{"utterances": [{"text": "a", "label": "calm"}]}\n')
    labels.write_text('{"name": "moods", "labels": ["tense", "calm"]}')
    read = read_dataset(Source(str(path), str(labels)))
    assert read.labels.name == "moods"
    assert read.scenes[0].targets[0] is not None
    assert read.scenes[0].targets[0].tolist() == [0, 1]
    labels.write_text("[]")
    with pytest.raises(UsageError, match="a label set is a JSON object"):
        read_dataset(Source(str(path), str(labels)))


def test_several_labels_are_learnt_in_equal_shares(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [
        {"text": "a", "labels": ["anger", "trust"]},
        {"text": "b", "labels": ["anger", "joy"]},
        {"text": "c", "labels": ["trust"]},
        {"text": "d", "label": "fear", "labels": ["joy"]},
    ]
    path.write_text(json.dumps({"utterances": turns}) + "\n")
    mapping = tmp_path / "mapping.json"
    same = {label: label for label in label_set("ekman").labels}
    mapping.write_text(json.dumps({"plutchik": {**same, "trust": None, "anticipation": None}}))
    source = Source(str(path), "ekman", written="plutchik", mapping=str(mapping))
    (scene,) = read_dataset(source).scenes
    anger, joy, fear = (one_hot(label_set("ekman").index(x), 7) for x in ("anger", "joy", "fear"))
    assert scene.targets[2] is None
    learnt = [target for target in scene.targets if target is not None]
    assert np.array_equal(learnt, [anger, (anger + joy) / np.float32(2), fear])
    assert [u.label for u in scene.dialogue.utterances] == [None, None, None, "fear"]
