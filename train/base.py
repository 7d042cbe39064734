"""Bases: a BERT sentence encoder turned into a causal decoder, and GGUF files as checkpoints."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel
from transformers.utils import logging

from ercbatch.bundle.folders import check_output, whole_folder
from ercbatch.bundle.manifest import CONFIG
from ercbatch.errors import InputError, MissingExtraError, foreign_errors
from ercbatch.scoring.checkpoints import check_config, save_tokenizer


def causal_decoder(source: Path) -> BertLMHeadModel:
    """A `BertLMHeadModel` with the encoder's weights, read left to right.

    The output embedding is tied to the input embedding. The head's transform, which a sentence
    encoder doesn't have, starts as the identity as far as it can: unit matrix, no bias.

    Raises:
        InputError: not a BERT checkpoint.
        UsageError: its config asks to run code.
    """
    kind = check_config(str(source)).get("model_type")
    if kind != "bert":
        raise InputError(
            f"{source}: a {kind or 'nameless'} model, not a BERT sentence encoder: a causal "
            "language model needs no turning, it is a base as it is"
        )
    config = BertConfig.from_pretrained(source)
    config.is_decoder = True
    config.tie_word_embeddings = True
    config.architectures = ["BertLMHeadModel"]
    logging.set_verbosity_error()  # it warns that the head is missing
    try:
        model, loading_info = BertLMHeadModel.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise InputError(f"{source}: {error}") from error
    missing = [name for name in loading_info["missing_keys"] if not name.startswith("cls.")]
    if missing:
        raise InputError(f"{source}: the weights lack {min(missing)}: not a whole BERT checkpoint")
    transform = model.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(torch.eye(config.hidden_size))
        transform.dense.bias.zero_()
        transform.LayerNorm.weight.fill_(1.0)
        transform.LayerNorm.bias.zero_()
        model.cls.predictions.bias.zero_()
    model.tie_weights()
    decoder: BertLMHeadModel = model
    return decoder


def write_base(source: Path, folder: Path, *, force: bool = False) -> None:
    """Write a checkpoint folder: of a sentence encoder's causal decoder, or of a GGUF file.

    Raises:
        InputError: not a BERT checkpoint, or a file that transformers cannot read as GGUF.
        UsageError: `folder` exists, and `force` is not given, or it may not be written.
        OutputError: it cannot be written.
    """
    check_output(folder, CONFIG, force=force, inputs=[source])
    with whole_folder(folder, CONFIG, force=force) as part:
        if source.is_file():
            _write_gguf(source, part)
        else:
            _write_decoder(source, part)


def _write_decoder(source: Path, folder: Path) -> None:
    decoder = causal_decoder(source)
    if not (source / "tokenizer.json").exists():
        raise InputError(f"{source}: has no tokenizer.json: convert its tokenizer first")
    decoder.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():  # transformers 5 writes no special_tokens_map.json
            shutil.copyfile(source / name, folder / name)


def _write_gguf(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file (llama.cpp's format), its weights as float32."""
    if find_spec("gguf") is None:
        raise MissingExtraError("GGUF files need gguf: pip install '.[train]' in a checkout")
    settings: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):  # from transformers 5 on weights stay packed without it
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with (
        TemporaryDirectory() as link_folder,  # what else is in its folder would be read as well
        foreign_errors(InputError, f"{source}: cannot be read as GGUF", "get it again"),
    ):
        (Path(link_folder) / "model.gguf").symlink_to(source.resolve())
        model = AutoModelForCausalLM.from_pretrained(
            link_folder, gguf_file="model.gguf", **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(
            link_folder, gguf_file="model.gguf", trust_remote_code=False
        )
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # it refuses to save
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
