"""A sentence encoder as ONNX: mean pooling and normalization inside the graph."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import onnx
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from ercbatch import bundle
from ercbatch.errors import UsageError
from export.quantize import quantize_graph

OPSET = 18


class PooledEncoder(nn.Module):
    """Token ids and their mask [batch, length] to unit vectors [batch, dim]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the token states under the mask, scaled to length 1."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def check_pooling(source: Path) -> None:
    """See that a sentence-transformers folder pools by the mean.

    Raises:
        UsageError: it pools otherwise.
    """
    path = source / "1_Pooling" / "config.json"
    if path.exists():
        modes = json.loads(path.read_text(encoding="utf-8"))
        used = [k for k, on in modes.items() if k.startswith("pooling_mode") and on is True]
        if used and used != ["pooling_mode_mean_tokens"]:
            raise UsageError(
                f"{path}: the encoder pools by {', '.join(used)}; only mean pooling is "
                "supported: choose another sentence encoder"
            )


def export_encoder(source: Path, folder: Path, *, quantize: bool = True) -> None:
    """Write `encoder.onnx` and `encoder_tokenizer.json` into `folder`.

    `source` is the folder of a sentence-transformers model with mean pooling.
    """
    check_pooling(source)
    model = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    if hasattr(model, "pooler"):
        model.pooler = None
    ids = torch.ones((2, 7), dtype=torch.long)
    traced = trace(
        PooledEncoder(model),
        (ids, ids),
        {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}},
        {"embeddings": {0: "batch"}},
    )
    onnx.save(quantize_graph(traced) if quantize else traced, folder / bundle.ENCODER)
    Tokenizer.from_file(str(source / "tokenizer.json")).save(str(folder / bundle.ENCODER_TOKENIZER))


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: dict[str, dict[int, str]],
    outputs: dict[str, dict[int, str]],
) -> onnx.ModelProto:
    """Export a module; `inputs` and `outputs` name the dynamic axes of each."""
    buffer = io.BytesIO()
    with torch.inference_mode():
        torch.onnx.export(
            module,
            example,
            buffer,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={**inputs, **outputs},
            opset_version=OPSET,
            do_constant_folding=True,
            dynamo=False,
        )
    return onnx.load_from_string(buffer.getvalue())
