"""Attention masks of packs, in the form that each architecture takes them. Needs torch."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor


class Masks:
    """What a model is told of which token sees which.

    It follows the architectures of transformers: sliding windows, of all layers or of some, reach
    back as far in the tree as they would in a separate prompt, and ALiBi's distances are those of
    positions, not of places in the pack.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._model = model
        # Before transformers 5 BERT's decoder takes a [batch, query, key] mask of zeros and ones;
        # all else takes a [batch, 1, query, key] one in the form of its attention implementation.
        self._flat = config.model_type == "bert" and int(version("transformers").split(".")[0]) < 5
        self._additive = config._attn_implementation == "eager"
        self._window: int | None = getattr(config, "sliding_window", None)
        kinds = frozenset(getattr(config, "layer_types", None) or ())
        self._kinds = kinds if len(kinds) > 1 else frozenset()
        if kinds == {"full_attention"}:
            self._window = None
        self._alibi = _Alibi(model.base_model) if _Alibi.used_by(model.base_model) else None

    def __call__(
        self, positions: Tensor, ends: Tensor, order: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The mask for packs with these positions and ends, each [packs, length].

        `order` [packs, length] says where in its pack each token stood, if not here.
        """
        index = torch.arange(ends.shape[1], device=ends.device)[None] if order is None else order
        sees = (index[:, None, :] <= index[:, :, None]) & (index[:, :, None] < ends[:, None, :])
        if self._alibi is not None:
            self._alibi.positions = positions
        if self._window is None:
            return self._form(sees)
        near = sees & (positions[:, :, None] - positions[:, None, :] < self._window)
        if not self._kinds:
            return self._form(near)
        return {
            kind: self._form(near if kind == "sliding_attention" else sees) for kind in self._kinds
        }

    def _form(self, sees: Tensor) -> Tensor:
        if self._flat:
            return sees.to(torch.float32)
        if not self._additive:
            return sees[:, None]
        dtype = self._model.get_input_embeddings().weight.dtype
        return (~sees[:, None]).to(dtype) * torch.finfo(dtype).min


class _Alibi:
    """BLOOM's attention bias, which grows with the position of the token that is looked at.

    The model itself counts the tokens of a two-dimensional mask.
    """

    positions: Tensor

    def __init__(self, model: Any) -> None:
        self._original = model.build_alibi_tensor
        model.build_alibi_tensor = self

    @staticmethod
    def used_by(model: Any) -> bool:
        """Whether a model asks itself for such a bias."""
        return hasattr(model, "build_alibi_tensor")

    def __call__(self, mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        """Bias [packs * heads, 1, length], as the model's own method gives it."""
        if mask.ndim == 2:  # not of packs
            bias: Tensor = self._original(mask, num_heads, dtype)
            return bias
        two = torch.ones((1, 2), device=mask.device)
        slopes = self._original(two, num_heads, torch.float32)[:, 0, 1]
        bias = slopes[None, :, None] * self.positions[:, None, :]
        return bias.reshape(-1, 1, bias.shape[-1]).to(dtype)
