"""A bundle's weights come back as a checkpoint that computes what the bundle does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import EXAMPLES, UNTRAINED, edit_manifest, export_bundle, write_model
from helpers.commands import python
from transformers import AutoConfig, AutoModelForCausalLM

from ercbatch import Labeler
from ercbatch.bundle.bundle import read_info
from ercbatch.inputs.records import read_dialogues
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from export.__main__ import main

pytestmark = pytest.mark.transformers


def write(bundle: str | Path, folder: Path, *options: str) -> Any:
    return python("-m", "export", "checkpoint", str(bundle), "-o", folder, *options)


def untrained(base: Path, encoder: Path, folder: Path, quantize: str) -> Path:
    examples = ("--encoder", encoder, "--examples", EXAMPLES / "my_examples.jsonl")
    done = export_bundle(
        base, folder, *UNTRAINED, *examples, "--quantize", quantize, "--accept-loss"
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_checkpoint_of_mini_labels_as_mini_does(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    done = write("mini", folder)
    assert done.returncode == 0, done.stderr
    assert "mini" in done.stderr
    assert "shard" not in done.stderr  # as a bar of transformers 5 says
    labeler = Labeler("mini", scores=True)
    model, tokenizer = load_causal_lm(str(folder))
    assert tokenizer.controls == labeler.bundle.info.controls
    said = [d for _, d in read_dialogues(EXAMPLES / "group_chat.jsonl")]
    given = list(labeler.label(said))
    rows = labeler.engine.scorer.head.tokens.tolist()
    scorer = TorchScorer(PackedModel(model.eval()), rows)
    labeler.engine = replace(labeler.engine, scorer=scorer)
    own = list(labeler.label(said))
    for mine, theirs in zip(own, given, strict=True):
        for a, b in zip(mine.labels, theirs.labels, strict=True):
            assert a.scores is not None
            assert a.scores == pytest.approx(b.scores, abs=0.05)
    assert "exists" in write("mini", folder).stderr
    assert write("mini", folder, "--force").returncode == 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_float32_weights_come_back_as_they_were(
    kind: str, encoder_folder: Path, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", kind)
    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    bundle = untrained(base, encoder_folder, tmp_path / "bundle", "fp32")
    done = write(bundle, tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    before, _ = load_causal_lm(str(base))
    after, _ = load_causal_lm(str(tmp_path / "checkpoint"))
    for (name, old), (_, new) in zip(
        before.named_parameters(), after.named_parameters(), strict=True
    ):
        assert torch.equal(old, new), name


def test_quantized_weights_come_back_rounded(bundle_folder: Path, tmp_path: Path) -> None:
    assert write(bundle_folder, tmp_path / "checkpoint").returncode == 0


def test_folder_without_a_checkpoint_is_refused(
    bundle_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "llama", "llama")
    untied = untrained(base, encoder_folder, tmp_path / "untied", "int8")
    done = write(untied, tmp_path / "no")
    assert done.returncode == 4
    assert "output embedding is not its input embedding: train from its base" in done.stderr

    def altered(folder: Path, architecture: dict[str, object]) -> None:
        shutil.copytree(bundle_folder, folder)
        whole = architecture and {**read_info(folder).architecture, **architecture}
        edit_manifest(folder, lambda value: value.update(architecture=whole))

    cases: list[tuple[dict[str, object], int, str]] = [
        ({}, 4, "its architecture is not in it"),
        ({"auto_map": {"AutoModel": "x.Y"}}, 2, "asks to run code"),
        ({"model_type": "nothing"}, 4, "nothing"),
        ({"num_hidden_layers": 3}, 4, "layer.2"),
        ({"intermediate_size": 10**9}, 4, "weight is not in its graph"),
    ]
    for number, (architecture, code, words) in enumerate(cases):
        folder = tmp_path / str(number)
        altered(folder, architecture)
        asked = ["checkpoint", str(folder), "-o", str(tmp_path / "no")]
        refused = CliRunner().invoke(main, asked)
        assert refused.exit_code == code, refused.output
        assert words in refused.output
    assert not (tmp_path / "no").exists()
    assert read_info(bundle_folder).architecture["model_type"] == "bert"
