"""A model quantized by bitsandbytes, as files that `ercbatch.scoring.bnb_scorer` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ercbatch.bundle import manifest
from ercbatch.errors import UsageError
from ercbatch.scoring.bnb_scorer import (
    INT8_SCALES,
    NF4_BLOCK,
    bnb,
    nf4_config,
    quantizable,
    shape_of,
)
from ercbatch.scoring.packed_model import PackedModel


def write_bnb(model: PackedModel, folder: Path, form: str) -> list[Path]:
    """Write `config.json` and safetensors in transformers' form of bitsandbytes models.

    The output embedding is not in them (the bundle's answer head has the rows that are needed),
    and the model is left as it is: matrix after matrix is quantized on its way to the file.

    Args:
        model: float32 or bfloat16, no adapter beside its weights.
        folder: where to.
        form: `nf4` or `bnb-int8`.

    Returns:
        The files of weights: one, or several of at most 5 GB.

    Raises:
        UsageError: no matrix of the model can be had in this form.
    """
    inner = model.model
    matrices = quantizable(inner)
    skipped = sorted(
        name
        for name, module in matrices.items()
        # A block of NF4 that begins in one row and ends in the next is more than kernels promise.
        if form == "nf4" and shape_of(module)[1] % NF4_BLOCK
    )
    if len(skipped) == len(matrices):
        raise UsageError(
            f"no matrix of this model has a width that is a multiple of {NF4_BLOCK}, as {form} "
            "needs: take --quantize bnb-int8"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in inner.state_dict().items():
        name, _, kind = key.rpartition(".")
        if kind != "weight" or name not in matrices or name in skipped:
            tensors[key] = _to_stored_dtype(tensor)
            continue
        weight = _orient(matrices[name], tensor).contiguous()
        if form == "nf4":
            tensors[key], state = bnb.functional.quantize_4bit(
                weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
            )
            parts = state.as_dict(packed=True)
            tensors |= {f"{key}.{part}": value for part, value in parts.items()}
        else:
            quantized = bnb.functional.int8_vectorwise_quant(weight.half())
            tensors[key], tensors[f"{name}.{INT8_SCALES}"], _ = quantized
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    config = json.dumps(_config(inner, form, skipped), indent=2, sort_keys=True)
    (folder / manifest.CONFIG).write_text(config + "\n", encoding="utf-8")
    return sorted(folder.glob(manifest.WEIGHTS))


def _orient(module: Any, weight: Tensor) -> Tensor:
    """A weight as [outputs, inputs]."""
    return weight.T if isinstance(module, Conv1D) else weight


def _to_stored_dtype(tensor: Tensor) -> Tensor:
    """A tensor that is not quantized, in the type that is stored.

    Tables are stored in bfloat16: they are most of a small model's file, and bfloat16 rounds far
    finer than the quantized matrices. Vectors (norms, biases) stay as they are.
    """
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.ndim > 1 else tensor


def _config(model: Any, form: str, skipped: list[str]) -> dict[str, Any]:
    """The model's `config.json`, without what is of this machine."""
    if form == "nf4":
        settings = nf4_config(llm_int8_skip_modules=skipped or None)
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("_name_or_path", None)
    return {**config, "quantization_config": json.loads(settings.to_json_string(use_diff=False))}
