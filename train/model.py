"""The model that a recipe trains: its base, as it is loaded, and what of it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from ercbatch.errors import MissingExtraError, UsageError
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.scoring.checkpoints import check_config, load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from train.adapter import add_lora
from train.dropout import dropout_settings
from train.recipe import Recipe

_GIB = 2**30


def load_trainable(
    recipe: Recipe, device: torch.device, *, bfloat16: bool
) -> tuple[PackedModel, Any, SegmentTokenizer]:
    """(model, peft model that saves the adapter or None, tokenizer).

    Raises:
        UsageError: not a causal language model, or LoRA targets that match nothing.
        MissingExtraError: bitsandbytes is asked for and missing.
    """
    check_config(recipe.base)
    settings: dict[str, Any] = dropout_settings(recipe)
    frozen = recipe.method == "lora"
    if recipe.load != "full":
        settings |= {"quantization_config": quantization(recipe), "device_map": {"": device}}
    elif frozen and bfloat16:
        settings["dtype"] = torch.bfloat16  # weights that are not trained lose nothing by it here
    model, tokenizer = load_causal_lm(recipe.base, **settings)
    for module in model.modules():
        # In evaluation bitsandbytes would pack its weights for a CPU's inference kernel, through
        # which no gradient passes when training goes on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if recipe.load != "full":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed = PackedModel(model)
    packed.check_packing()
    limit = packed.longest_prompt
    if limit is not None and recipe.window.max_tokens > limit:
        raise UsageError(
            f"recipe: window.max_tokens is {recipe.window.max_tokens}, but {recipe.base} reads at "
            f"most {limit} tokens: under [window], set max_tokens = {limit} or less, and "
            "max_utterance_tokens to a quarter of it or less"
        )
    torch.manual_seed(recipe.seed)  # before the adapters: their weights are drawn too
    return packed, add_lora(packed, recipe) if frozen else None, tokenizer


def quantization(recipe: Recipe) -> Any:
    """How transformers should load the recipe's base through bitsandbytes.

    Raises:
        MissingExtraError: it isn't installed.
    """
    try:
        from ercbatch.scoring.bnb_scorer import nf4_config
    except ImportError as error:
        raise MissingExtraError(
            f"recipe: load = {recipe.load!r} needs bitsandbytes: pip install '.[bnb]' in a "
            "checkout of ercbatch"
        ) from error
    from transformers import BitsAndBytesConfig

    if recipe.load == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return nf4_config()


def check_memory(recipe: Recipe, *, bfloat16: bool) -> None:
    """See, before anything is loaded, that the weights and what AdamW keeps of them fit.

    A base on the hub is not measured: it isn't here yet.

    Raises:
        UsageError: they don't.
    """
    if recipe.load != "full" or not Path(recipe.base).is_dir():
        return
    cuda = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    # float32 weights; where they are trained, their gradient and AdamW's two moments beside them.
    width = 16 if recipe.method == "full" else 2 if cuda and bfloat16 else 4
    need = width * sum(_sizes(Path(recipe.base)))
    if need > free:
        raise UsageError(
            f"too little memory: {recipe.base} takes {need / _GIB:.1f} GiB with method "
            f"{recipe.method!r}, and {free / _GIB:.1f} GiB are free: take "
            f"{'LoRA' if recipe.method == 'full' else 'load nf4, or a smaller base'}"
        )


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # it has no __iter__
                    yield math.prod(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UsageError(f"{path}: no whole file of weights ({error}): get it again") from error
