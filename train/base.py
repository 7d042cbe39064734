"""Bases: a BERT sentence encoder turned into a causal decoder, and GGUF files as checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from ercbatch.errors import InputError


def causal_decoder(source: Path) -> BertLMHeadModel:
    """A `BertLMHeadModel` with the encoder's weights, read left to right.

    The output embedding is tied to the input embedding. The head's transform, which a sentence
    encoder doesn't have, starts as the identity as far as it can: unit matrix, no bias.
    """
    config = BertConfig.from_pretrained(source)
    config.is_decoder = True
    config.tie_word_embeddings = True
    config.architectures = ["BertLMHeadModel"]
    model: BertLMHeadModel = BertLMHeadModel.from_pretrained(source, config=config)
    transform = model.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(torch.eye(config.hidden_size))
        transform.dense.bias.zero_()
        transform.LayerNorm.weight.fill_(1.0)
        transform.LayerNorm.bias.zero_()
        model.cls.predictions.bias.zero_()
    model.tie_weights()
    return model


def write_base(source: Path, folder: Path) -> None:
    """Write a checkpoint folder: of a sentence encoder's causal decoder, or of a GGUF file.

    Raises:
        InputError: a file that transformers cannot read as GGUF.
    """
    if source.is_file():
        _dequantize(source, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    causal_decoder(source).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, folder / name)


def _dequantize(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file (llama.cpp's format), its weights as float32."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: cannot be read as GGUF: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
