"""LoRA adapters on the attention projections, found by architecture."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from ercbatch.errors import UsageError
from ercbatch.scoring.packed_model import PackedModel
from train.recipe import Recipe

_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma
    ("query_key_value",),  # BLOOM, Falcon, GPT-NeoX
    ("qkv_proj",),  # Phi-3
    ("c_attn",),  # GPT-2
    ("query", "key", "value"),  # BERT
)


def attention_projections(model: Any) -> tuple[str, ...]:
    """The names of a model's query, key and value projections.

    Raises:
        UsageError: none of the known names occurs.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for projections in _PROJECTIONS:
        if names.issuperset(projections):
            return projections
    raise UsageError(
        f"no attention projections found in a {model.config.model_type} model: name the modules "
        "in the recipe's lora_targets"
    )


def add_lora(packed: PackedModel, recipe: Recipe) -> Any:
    """Freeze the model and give it LoRA adapters, in place; the peft model that saves them."""
    packed.requires_grad_(False)  # the output embedding too, which peft does not see
    targets = recipe.lora_targets or attention_projections(packed.model)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        bias="none",
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in packed.model.modules()),
    )
    try:
        return get_peft_model(packed.model, config)
    except ValueError as error:
        raise UsageError(
            f"lora_targets {', '.join(targets)} match nothing in the model: {error}"
        ) from error
