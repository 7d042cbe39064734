"""Attention in exported graphs: the same sums wherever a token stands."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import write_model

from benchmarks.packed import packed as label_packed
from benchmarks.packed import separate
from ercbatch import Labeler
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.onnx_scorer import feed
from ercbatch.packs import join
from ercbatch.torch_model import PackedModel, load_causal_lm
from ercbatch.tree import Question, Read, Segment, Task, lay_out
from export.attention import sum_softmax_in_double
from export.model import trace_scorer


def test_an_int8_answer_is_that_of_its_separate_prompt(bundle_folder: Path) -> None:
    """To the last bits: a sum in another order would move int8 activations by whole steps."""
    labeler = Labeler(str(bundle_folder), demonstrations=0)
    chance = random.Random(3)
    words = "it is gone thank you where my door late again happy fridge no !".split()
    turns = [Utterance(" ".join(chance.choices(words, k=9)), "AB"[t % 2]) for t in range(90)]
    dialogues = [Dialogue(tuple(turns[at : at + 9])) for at in range(0, len(turns), 9)]
    together, _ = label_packed(labeler, dialogues)
    alone, _ = separate(labeler, dialogues)
    temperature = labeler.engine.temperature
    assert len(together) == len(turns)
    for key, row in together.items():
        other = alone[key] ** (1 / temperature)
        assert np.abs(other / other.sum() - row).max() < 1e-6


@pytest.mark.parametrize("kind", ["bert", "bloom", "llama", "gemma3_text"])
def test_attention_is_the_softmax_that_it_was(kind: str, tmp_path: Path) -> None:
    model, _ = load_causal_lm(str(write_model(tmp_path, kind)), attn_implementation="eager")
    tree = lay_out(Segment(list(range(7, 60)), read=Read(Question(Task.EMOTION, 0), 0)))
    packed = PackedModel(model.eval())
    states = []
    for rewritten in (False, True):
        graph = trace_scorer(packed)
        if rewritten:
            sum_softmax_in_double(graph)
            assert "Softmax" not in {node.op_type for node in graph.nodes}
            with pytest.raises(ValueError, match="no attention"):
                sum_softmax_in_double(graph)
        session = onnxruntime.InferenceSession(graph.finish().SerializeToString())
        states.append(session.run(None, feed(join([(0, tree)])))[0])
    one, other = states
    assert np.allclose(one, other, atol=1e-5)
