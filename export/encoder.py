"""A sentence encoder as ONNX: mean pooling and normalization inside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from ercbatch.bundle import manifest as bundle
from ercbatch.bundle.folders import check_output, whole_folder
from ercbatch.errors import UsageError, foreign_errors
from ercbatch.prompts.tokens import load_tokenizer
from ercbatch.scoring.packed_model import check_config
from export.graph.nodes import Graph
from export.graph.trace import trace
from export.quantize.int8 import quantize_lookups, quantize_products
from export.quantize.statistics import module_inputs

_SAMPLES = (
    "I can't believe you did that!",
    "Okay.",
    "What is that smell?",
    "We won, we actually won!",
    "The meeting has been moved to Thursday at ten, so there is no need to hurry.",
    "I heard steps behind me the whole way home, and when I turned around there was nobody.",
    "Thanks for the quick reply; the parcel arrived this morning and everything is in it.",
    "I miss her. Every day.",
    "no no no, not again... why does it always happen to me?!",
    "She moved to Lisbon in 2019 with two suitcases, a cat and € 300.",
)
"""Sentences that tell which channels of the encoder stay in float32 (export/quantize/int8.py)."""


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


def export_encoder(
    source: str | Path, folder: Path, *, quantize: bool = True, force: bool = False
) -> None:
    """Write a folder of `encoder.onnx` and `encoder_tokenizer.json`.

    The graph takes `input_ids` and `attention_mask` [batch, length] int64, and gives `embeddings`
    [batch, dim] float32, each of length 1.

    Args:
        source: the folder of a sentence-transformers model with mean pooling, or of a plain
            transformers model, which sentence-transformers pools by the mean too.
        folder: the folder to write.
        quantize: int8 weights; otherwise float32.
        force: replace an existing folder.

    Raises:
        UsageError: not such a model, or `folder` exists and `force` is not given.
        OutputError: it cannot be written.
    """
    check_output(folder, bundle.ENCODER, force=force, inputs=[source])
    needed = "it needs config.json, model.safetensors and tokenizer.json of a sentence encoder"
    with foreign_errors(UsageError, f"{source}: cannot be exported", needed):
        graph, tokenizer = _traced(Path(source), quantize)
    with whole_folder(folder, bundle.ENCODER, force=force) as part:
        graph.save(part / bundle.ENCODER)
        text = tokenizer.to_str(pretty=False)
        (part / bundle.ENCODER_TOKENIZER).write_text(text, encoding="utf-8")


def _traced(source: Path, quantize: bool) -> tuple[Graph, Tokenizer]:
    inner = transformer_folder(source)
    check_config(str(inner))
    tokenizer = load_tokenizer(inner / "tokenizer.json")
    model, found = AutoModel.from_pretrained(
        inner,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise UsageError(f"{inner}: its weights lack {', '.join(missing[:3])}: get it again")
    model.eval()
    if hasattr(model, "pooler"):
        model.pooler = None
    pooled = PooledEncoder(model)
    ids = torch.ones((2, 7), dtype=torch.long)
    axes = {0: "batch", 1: "length"}
    graph = trace(
        pooled,
        (ids, ids),
        {"input_ids": axes, "attention_mask": axes},
        {"embeddings": {0: "batch"}},
    )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if quantize:
        quantize_products(graph, sampler=module_inputs(pooled, lambda: _run(pooled, tokenizer)))
        quantize_lookups(graph)
    return graph, tokenizer


def transformer_folder(source: Path) -> Path:
    """The folder of the transformer within a sentence-transformers folder.

    Raises:
        UsageError: the model does more than pool the transformer's states by their mean.
    """
    if not (source / "modules.json").exists():
        return source
    inner = source
    for module in json.loads((source / "modules.json").read_text(encoding="utf-8")):
        kind, path = module["type"].rpartition(".")[2], source / module["path"]
        if not path.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{source}: modules.json names {module['path']}, outside it: refused")
        if kind == "Transformer":
            inner = path
        elif kind == "Pooling":
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            modes = _pooling_modes(config)
            if modes != ["mean"]:
                raise UsageError(
                    f"{path}: the encoder pools by {' and '.join(modes)}; only mean pooling is "
                    "supported: choose another sentence encoder"
                )
        elif kind != "Normalize":
            raise UsageError(
                f"{source}: the encoder has a {kind} module; only a transformer with mean pooling "
                "is supported: choose another sentence encoder"
            )
    return inner


def _pooling_modes(config: dict[str, Any]) -> list[str]:
    """What a pooling module's config asks for: in one key, or (older files) a flag a mode."""
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        return [modes] if isinstance(modes, str) else list(modes)
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    return [flag.removeprefix("pooling_mode_").removesuffix("_tokens") for flag in flags]


def _run(encoder: PooledEncoder, tokenizer: Tokenizer) -> None:
    for text in _SAMPLES:
        ids = torch.tensor([tokenizer.encode(text).ids])
        encoder(ids, torch.ones_like(ids))
