"""A causal language model as one ONNX graph over packs."""

from __future__ import annotations

import onnx
import torch

from ercbatch.torch_model import PackedModel
from export.encoder import trace


def export_scorer(model: PackedModel) -> onnx.ModelProto:
    """The float32 graph: tokens, positions, ends [packs, length], reads -> states [reads, hidden].

    The mask is built inside the graph from `ends`; no vocabulary-sized product is in it.
    """
    length = 9
    tokens = torch.arange(2 * length).reshape(2, length) % 50
    positions = torch.arange(length).repeat(2, 1)
    ends = torch.full((2, length), length)
    reads = torch.tensor([3, length + 4])
    axes = {0: "packs", 1: "length"}
    return trace(
        model.eval(),
        (tokens, positions, ends, reads),
        {"tokens": axes, "positions": axes, "ends": axes, "reads": {0: "reads"}},
        {"states": {0: "reads"}},
    )
