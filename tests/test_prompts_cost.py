"""What labelling computes may not grow unseen: counted, not timed."""

from __future__ import annotations

from pathlib import Path

import onnx
from conftest import CHAT, write_model
from onnx import ModelProto

from benchmarks.graph import PRODUCTS
from ercbatch import Labeler
from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle
from ercbatch.inputs.records import read_dialogues
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.tiles import cut
from export.forms import write_graph
from export.graph.tiles import TILES

MINI_NODES = 1253
"""Nodes outside matrix products in the graph of `mini`, including the floors under exponents."""
LAYER_NODES = 244
"""Nodes outside products in a layer of an int8 Llama. Each of the eight tiles has one for the floor
under exponents (`export/graph/attention.py`)."""
TOKENS = 19.6
"""Computed for an utterance of the example, with what mini's prompts have beside it."""
SCORES = 130
"""Of queries and keys, computed for each token in each head of a layer."""


def test_tokens_and_scores_of_an_utterance() -> None:
    engine = Labeler("mini", demonstrations=0).engine
    dialogues = [dialogue for _, dialogue in read_dialogues(Path(CHAT))]
    given = list(engine.packs(dialogues))
    tokens = sum(len(pack) for pack in given)
    tiles = [cut(pack.ends, TILES) for pack in given]
    scores = sum(int((t.row_counts * t.key_counts).sum()) for t in tiles)
    assert tokens / sum(len(dialogue.nonblank) for dialogue in dialogues) <= TOKENS
    assert scores / tokens <= SCORES


def test_nodes_outside_products(tmp_path: Path) -> None:
    assert outside(onnx.load(find_bundle("mini") / manifest.MODEL)) <= MINI_NODES
    model, _ = load_causal_lm(str(write_model(tmp_path, "llama")), attn_implementation="eager")
    write_graph(PackedModel(model.eval()), tmp_path, "int8", "avx2", [])
    layers = model.config.num_hidden_layers
    assert outside(onnx.load(tmp_path / manifest.MODEL)) / layers <= LAYER_NODES


def outside(model: ModelProto) -> int:
    """Nodes that are not products; a constant costs nothing."""
    return sum(node.op_type not in {*PRODUCTS, "Constant"} for node in model.graph.node)
