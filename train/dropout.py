"""A recipe's dropout under the names that the architectures have for it."""

from __future__ import annotations

from ercbatch.errors import UsageError
from train.recipe import Recipe

_HIDDEN = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "resid_dropout")
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def dropout_settings(recipe: Recipe) -> dict[str, float]:
    """Config settings that give a recipe's base its dropout; those that it leaves out are absent.

    Raises:
        UsageError: the architecture has no such dropout.
    """
    from transformers import AutoConfig

    settings: dict[str, float] = {}
    config = None
    for name, value, names in (
        ("dropout", recipe.dropout, _HIDDEN),
        ("attention_dropout", recipe.attention_dropout, _ATTENTION),
    ):
        if value is None:
            continue
        config = config or AutoConfig.from_pretrained(recipe.base, trust_remote_code=False)
        keys = [key for key in names if hasattr(config, key)]
        if not keys and value:
            raise UsageError(f"recipe: a {config.model_type} model has no {name}: leave it out")
        settings.update(dict.fromkeys(keys, value))
    return settings
