"""Figures of labelled files."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn import metrics

from ercbatch.errors import InputError
from ercbatch.evaluate import Evaluation, evaluate, expected_calibration_error, print_evaluation
from ercbatch.labels import label_set

Answer = tuple[str | None, str | None, float | None]
"""Gold, predicted, confidence."""


def record(answers: Sequence[Answer], text: str = "Hm.") -> dict[str, Any]:
    return {
        "utterances": [
            {"text": text, "label": gold, "emotion": predicted, "confidence": confidence}
            for gold, predicted, confidence in answers
        ]
    }


def random_answers(seed: int, count: int, labels: tuple[str, ...]) -> list[Answer]:
    noise = random.Random(seed)
    gold = noise.choices(labels, [2.0**-i for i in range(len(labels))], k=count)
    return [(g, g if noise.random() < 0.4 else noise.choice(labels), noise.random()) for g in gold]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("abstain", [0.0, 0.3])
def test_metrics_equal_those_of_scikit_learn(seed: int, abstain: float) -> None:
    # Few utterances over many labels, so that some labels have no gold, or no prediction.
    labels = label_set("unified").labels
    answers = [
        (gold, None if confidence < abstain else predicted, confidence)
        for gold, predicted, confidence in random_answers(seed, 5 * 3**seed // 2 + 3, labels)
        if confidence is not None
    ]
    result = evaluate([record(answers)], label_set("unified"))
    gold = [a[0] for a in answers]
    predicted = [a[1] or "(none)" for a in answers]
    present = [label for label in labels if label in gold]
    options = {"zero_division": 0}
    f1 = metrics.f1_score
    assert result.weighted_f1 == pytest.approx(
        f1(gold, predicted, labels=labels, average="weighted", **options)
    )
    assert result.macro_f1 == pytest.approx(
        f1(gold, predicted, labels=present, average="macro", **options)
    )
    assert result.accuracy == pytest.approx(metrics.accuracy_score(gold, predicted))
    table = metrics.precision_recall_fscore_support(gold, predicted, labels=labels, **options)
    for i, (label, figures) in enumerate(result.per_label.items()):
        assert label == labels[i]
        own = (figures.precision, figures.recall, figures.f1, figures.support)
        assert own == pytest.approx(tuple(column[i] for column in table))
    answered = [(g, p) for g, p in zip(gold, predicted, strict=True) if p != "(none)"]
    expected = metrics.confusion_matrix(*zip(*answered, strict=True), labels=labels)
    assert result.confusion.tolist() == expected.tolist()
    assert result.abstained == len(answers) - len(answered)


def test_json_has_the_names_of_the_contract() -> None:
    result = evaluate(
        [record([("sad", "sad", 0.9), ("angry", "sad", 0.6), ("sad", None, 0.2)])],
        label_set("meld"),
    ).to_json()
    assert {
        *("weighted_f1", "macro_f1", "accuracy", "ece", "per_label", "confusion", "labels"),
        *("utterances", "unlabelled", "abstained", "coverage"),
    } == set(result)
    assert result["utterances"] == 3
    assert result["abstained"] == 1
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["per_label"]["sad"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    sad, angry = label_set("meld").index("sad"), label_set("meld").index("angry")
    assert result["confusion"][angry][sad] == 1


def test_what_has_no_text_or_no_gold_is_left_out() -> None:
    result = evaluate(
        [
            record([("sad", "sad", 0.9), (None, "angry", 0.9), ("", "angry", 0.9)]),
            record([("sad", None, None)], text="  "),
        ]
    )
    assert (result.utterances, result.unlabelled, result.abstained) == (1, 3, 0)
    assert result.accuracy == 1.0


def test_gold_may_use_another_spelling() -> None:
    result = evaluate([record([("sadness", "sad", 0.9), ("JOY", "joyful", 0.9)])])
    assert result.labels == label_set("meld").labels
    assert result.accuracy == 1.0


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        ([("Peaceful", "joyful", 0.5)], label_set("emorynlp").labels),
        ([("excited", "neutral", 0.5)], label_set("iemocap").labels),
        ([("joy", "sadness", 0.5)], label_set("ekman").labels),
        ([("curious", "happy", 0.5)], label_set("topical-chat").labels),
        ([("calm", "tense", 0.5), ("Tense", "tense", 0.5)], ("calm", "tense")),
    ],
)
def test_guesses_the_label_set(answers: list[Answer], labels: tuple[str, ...]) -> None:
    assert evaluate([record(answers)]).labels == labels


def test_messages_are_evaluated_too() -> None:
    turn = {"role": "user", "content": "a", "label": "sad", "emotion": "sad", "confidence": 1.0}
    assert evaluate([{"messages": [turn]}]).accuracy == 1.0


def test_calibration_error_is_the_mean_gap_over_bins() -> None:
    # 0.70 and 0.72 share a bin: half right there, a gap of 0.21; 1.0 is in the last one, no gap.
    confidence = np.array([0.70, 0.72, 1.0, 1.0])
    right = np.array([True, False, True, True])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.21 / 2)


def test_coverage_against_risk() -> None:
    # The ten least sure of a hundred are wrong.
    answers: list[Answer] = [
        ("sad", "angry" if i < 10 else "sad", round(i / 100, 2)) for i in range(100)
    ]
    points = {p.coverage: (p.risk, p.confidence) for p in evaluate([record(answers)]).coverage}
    assert points == {
        1.0: (0.1, 0.0),
        0.95: (pytest.approx(5 / 95), 0.05),
        0.9: (0.0, 0.1),
        0.8: (0.0, 0.2),
        0.7: (0.0, 0.3),
        0.6: (0.0, 0.4),
        0.5: (0.0, 0.5),
        0.4: (0.0, 0.6),
        0.3: (0.0, 0.7),
        0.2: (0.0, 0.8),
        0.1: (0.0, 0.9),
    }


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no utterance has a gold `label`"),
        ([record([(None, "sad", 0.5)])], "no utterance has a gold `label`"),
        ([{"utterances": [{"text": "a", "label": "sad"}]}], "dialogue 1: .*run `ercbatch label`"),
        ([record([("sad", "sad", 0.5)]), {"id": 1}], "dialogue 2: the dialogue has no list"),
        ([record([("sad", "sad", 1.5)])], "confidence of an emotion is 1.5"),
        ([record([("sad", "sad", None)])], "confidence of an emotion is None"),
    ],
)
def test_says_what_cannot_be_evaluated(records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(records)


def test_a_label_outside_the_set_is_an_error() -> None:
    with pytest.raises(InputError, match="'peaceful' is not in the label set meld"):
        evaluate([record([("peaceful", "sad", 0.5)])], label_set("meld"))


def printed(result: Evaluation) -> str:
    stream = io.StringIO()
    print_evaluation(result, Console(file=stream, width=80, highlight=False, markup=False))
    return stream.getvalue()


def test_tables() -> None:
    result = evaluate(
        [record([("sad", "sad", 0.9), ("angry", "sad", 0.6), ("neutral", None, 0.2)])],
        label_set("meld"),
    )
    lines = [line.split() for line in printed(result).splitlines()]
    assert ["sad", "50.0%", "100.0%", "66.7%", "1"] in lines
    assert ["angry", "0", "0", "0", "1", "0", "0", "0"] in lines
    assert ["60%", "50.0%", "0.600"] in lines
    assert not any(line[:1] == ["100%"] for line in lines)  # only 67 % are answered
    assert "weighted F1 22.22%" in printed(result)
    assert "66.7% answered, 50.0% of them right; what is not answered counts" in printed(result)


def test_labels_of_a_file_are_printed_as_text_and_whole() -> None:
    names = [f"[red]a very long name of a label \x1b[31m{i}" for i in range(30)]
    text = printed(evaluate([record([(name, name, 0.5) for name in names])]))
    assert "\x1b" not in text
    assert "…" not in text
    assert "[red]a very long name of a label" in text
