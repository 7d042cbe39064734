"""A causal language model as one ONNX graph over packs."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ercbatch.scoring.checkpoints import check_config
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.tiles import ORDER
from export.graph.narrow import narrow
from export.graph.nodes import Graph
from export.graph.shapes import settle_shapes
from export.graph.tiles import tile_attention
from export.graph.trace import trace

EXPORTED_ATTENTION = "eager"
"""The form of attention that is traced. GPT-2's eager one has a table of its own, as long as its
positions: it is traced as torch's fused attention."""
_FUSED_ATTENTION = ("gpt2",)


def traced_attention(source: str) -> str:
    """The form of attention in which a checkpoint is traced."""
    return (
        "sdpa" if check_config(source).get("model_type") in _FUSED_ATTENTION else EXPORTED_ATTENTION
    )


def trace_scorer(model: PackedModel, data: Path | None = None) -> Graph:
    """Trace the float32 graph that computes the states [reads, hidden] of a pack.

    Its inputs are tokens, positions, ends and order [1, length], reads, and those of the tiles.

    The mask is built inside the graph from `ends` and `order`; no vocabulary-sized product is in
    it. `data` as for `Graph`.
    """
    length = 9
    tokens = torch.arange(length)[None]
    positions = torch.arange(length)[None]
    ends = torch.full((1, length), length)
    reads = torch.tensor([3, length - 1])
    axes = {1: "length"}
    graph = trace(
        model,
        (tokens, positions, ends, reads, positions.clone()),
        {
            "tokens": axes,
            "positions": axes,
            "ends": axes,
            "reads": {0: "reads"},
            ORDER: axes,
        },
        {"states": {0: "reads"}},
        data,
    )
    settle_shapes(graph)
    narrow(graph)
    tile_attention(graph)
    narrow(graph)  # the mask of the last layer, which no other needs whole any more
    return graph


def fitting_dtype(source: str) -> torch.dtype | str:
    """The type to load a checkpoint's weights in.

    It is float32 if that takes at most half of the free memory, and otherwise the type they have.
    """
    check_config(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    size = 4 * sum(p.numel() for p in model.parameters())
    return torch.float32 if size <= psutil.virtual_memory().available / 2 else "auto"
