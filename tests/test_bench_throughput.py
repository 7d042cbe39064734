"""`python -m benchmarks.throughput`, `benchmarks.limit` and `benchmarks.invented`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CHAT
from helpers.commands import python

from benchmarks.invented import dialogues
from benchmarks.limit import Products, Work, work
from ercbatch.errors import UsageError


@pytest.mark.slow
def test_engines_agree_and_a_missing_one_is_reported(tmp_path: Path) -> None:
    done = python(
        *("-m", "benchmarks.throughput", tmp_path, CHAT, "--model", "tiny-llama", "--rounds", "2"),
        *("--dialogues", "4", "--engines", "ours-fp32,transformers,llama.cpp-fp32"),
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert "setup.sh" in result["failed"].pop("llama.cpp-fp32")
    assert not result["failed"], done.stderr
    ours, theirs = result["engines"]["ours-fp32"], result["engines"]["transformers"]
    assert result["different_tokens"] > 1  # else agreement would say nothing
    assert ours["agreement"] == theirs["agreement"] == 1.0
    assert ours["largest_difference"] < 1e-5
    assert ours["best_peer"] == "transformers"
    assert ours["of_best_peer"] == ours["of_baseline"] > 0
    assert 0 < ours["of_limit"] < 1
    assert result["tokens_needed"] <= result["tokens_computed"] < result["tokens_separate"]


def test_bundle_speed_is_compared_with_the_limit() -> None:
    done = python("-m", "benchmarks.limit", "mini", CHAT, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["form"] == "int8"
    assert 0 < result["limit_seconds"] < result["seconds"]
    assert result["tokens_needed"] <= result["tokens_computed"]


def test_what_prompts_begin_with_is_needed_once() -> None:
    assert work([[1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 4], [2, 1]]) == Work(tokens=6, reads=4)


def test_the_products_of_a_model_are_its_matrices() -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 10,
    }
    products = Products.of(config)
    # Two layers whole, and keys and values of the last; the rest of that only where it is read.
    assert products.of_tokens == {(8, 12): 2, (8, 8): 2, (8, 20): 2, (10, 8): 2, (8, 4): 1}
    assert products.of_reads == {(8, 8): 2, (8, 20): 1, (10, 8): 1}
    with pytest.raises(UsageError, match="gpt2"):
        Products.of({"model_type": "gpt2"})


def test_invented_dialogues_are_the_same_for_a_seed() -> None:
    first, again, other = (list(dialogues(3, (50, 60), seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(50 <= len(record["utterances"]) <= 60 for record in first)
