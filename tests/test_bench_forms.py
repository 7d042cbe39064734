"""`python -m benchmarks.forms` and `benchmarks.graph`, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CHAT, EXAMPLES
from helpers.commands import python

from benchmarks.lib.shapes import SHAPES, write_checkpoint
from ercbatch.inputs.records import read_dialogues
from ercbatch.labeler import Labeler

pytestmark = pytest.mark.transformers

UTTERANCES = sum(len(d.utterances) for _, d in read_dialogues(CHAT))


@pytest.mark.slow
def test_every_form_is_exported_and_labels(tmp_path: Path) -> None:
    ask = ("-m", "benchmarks.forms", tmp_path, "--model", "tiny", "--template", "compact")
    done = python(*ask, "--forms", "fp32,int8,nf4", "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["failed"]
    assert result["float16_mb"] == pytest.approx(2e-6 * result["parameters"], abs=0.1)
    for form, figures in result["forms"].items():
        assert Labeler(str(tmp_path / form)).bundle.info.form == form
        assert figures["ratio"] == pytest.approx(
            figures["per_second"] / result["forms"]["fp32"]["per_second"], abs=0.01
        )
        for kind in ("export", "label"):
            resident, anonymous = (figures[f"{kind}_{k}_mb"] for k in ("resident", "anonymous"))
            assert 10 < anonymous < resident  # an interpreter alone takes that much
    assert result["forms"]["int8"]["bundle_mb"] < result["forms"]["fp32"]["bundle_mb"]


@pytest.mark.slow
def test_failing_form_is_reported_and_the_others_continue(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    done = python(
        *("-m", "benchmarks.forms", tmp_path, "--model", "tiny", "--dialogues", broken),
        *("--forms", "fp32,nf4", "--rounds", "0"),
    )
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"].keys() == {"fp32", "nf4"}
    assert str(broken) in result["failed"]["fp32"]


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    parameters = write_checkpoint(tmp_path, "tiny", [CHAT])
    sizes = SHAPES["tiny"]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys  # with Qwen2's biases
    layer = attention + 3 * hidden * inner + 2 * hidden
    tied = sizes["vocab_size"] * hidden
    assert parameters == tied + sizes["num_hidden_layers"] * layer + hidden
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_checkpoint(tmp_path, "tiny", [CHAT]) == parameters
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_graph_is_profiled_by_operator() -> None:
    done = python("-m", "benchmarks.graph", "mini", CHAT, "--rounds", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["utterances"] == UTTERANCES
    (profile,) = result["graphs"].values()
    operators = profile["operators"].values()
    assert profile["nodes_in_products"] + profile["nodes_outside"] == sum(
        operator["nodes"] for operator in operators
    )
    # A node's time is part of its run's.
    assert 0 < sum(operator["seconds"] for operator in operators) < profile["seconds"]
    assert 0 < profile["products_share"] < 1
    for name in profile["operators"]:
        assert name in done.stdout


def test_what_takes_no_packs_is_not_profiled() -> None:
    encoder = Labeler("mini").bundle.path("encoder.onnx")
    done = python("-m", "benchmarks.graph", "mini", encoder, EXAMPLES / "group_chat.jsonl")
    assert done.returncode == 2
    assert "takes no packs" in done.stderr
