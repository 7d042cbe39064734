"""Models of known sizes with random weights: what speed and memory depend on, and nothing to fetch.

Written tensor after tensor, so that a model larger than the memory can be made too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle
from ercbatch.errors import UsageError

_QWEN: Mapping[str, Any] = {
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_BERT_WORDS = 30522
"""Tokens of BERT's vocabulary, which is that of the bundle `mini` too."""
_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": _BERT_WORDS,
    "max_position_embeddings": 2048,
    # With tied ones a random model mostly repeats its last token: nothing to compare answers by.
    "tie_word_embeddings": False,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        **_QWEN,
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    },
    "tiny-llama": {
        **_LLAMA,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
    "mini": {
        **_LLAMA,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "llama-8x384": {
        **_LLAMA,
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "intermediate_size": 1024,
    },
    "qwen2.5-0.5b": {
        **_QWEN,
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "tie_word_embeddings": False,
    },
}
"""Name -> what its configuration says. Those of Qwen2.5 are the published ones; `mini` is a Llama
as large as the bundle of that name, which is a BERT."""
_INDEX = "model.safetensors.index.json"
_TOKENS = 4000
"""Of the tokenizer at most: enough for the words of a template and of a few dialogues."""
_SPREAD = 0.02
"""Standard deviation of the weights: transformers' own for a fresh model."""


def write_checkpoint(folder: Path, name: str, texts: Sequence[Path] = ()) -> int:
    """Write the model of that name in bfloat16 where it isn't yet; how many parameters it has.

    Its tokenizer is byte-level BPE, trained on `texts`; without any, that of the bundle `mini`,
    which makes as many tokens of a text as a real one.

    Raises:
        UsageError: no such model, or without texts one that has fewer tokens.
    """
    if name not in SHAPES:
        raise UsageError(f"no model {name!r}: choose from {', '.join(SHAPES)}")
    if not texts and SHAPES[name]["vocab_size"] < _BERT_WORDS:
        raise UsageError(f"model {name!r} has fewer tokens than this tokenizer: choose another")
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    if not (folder / _INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        config.architectures = [type(model).__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        tokenizer = (
            _trained_tokenizer(min(_TOKENS, config.vocab_size), texts)
            if texts
            else _bundled_tokenizer()
        )
        tokenizer.save_pretrained(folder)
        _write_weights(folder, shapes)
    return int(sum(p.numel() for p in model.parameters()))


def _write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A file for each layer and each other part; their index, by which it is complete, is last."""
    parts: dict[str, list[str]] = {}
    for key in shapes:
        parts.setdefault(".".join(key.split(".")[:3]), []).append(key)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {key: _random_tensor(key, shapes[key]) for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    (folder / _INDEX).write_text(index + "\n", encoding="utf-8")


def _random_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers; ones where a normalization scales by them."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.fill_(1) if key.endswith("norm.weight") else tensor.normal_(0, _SPREAD)


def _trained_tokenizer(size: int, texts: Sequence[Path]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in texts], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _bundled_tokenizer() -> PreTrainedTokenizerFast:
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")
    }
    special |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}  # some converters ask for them
    path = find_bundle("mini") / manifest.TOKENIZER
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
