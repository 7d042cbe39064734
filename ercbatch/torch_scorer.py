"""The torch scorer: any Hugging Face causal language model, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ercbatch.answers import FloatArray
from ercbatch.packs import Pack
from ercbatch.scoring import StateScorer
from ercbatch.torch_model import PackedModel, collate


class TorchScorer(StateScorer):
    """Scores packs with a `PackedModel` where that model lies."""

    def __init__(self, model: PackedModel, tokens: Sequence[int]) -> None:
        self._model = model
        self.head = model.answer_head(tokens)

    def describe(self) -> str:
        """See `Scorer.describe`."""
        device = next(self._model.parameters()).device
        return f"torch {torch.__version__}, {device}"

    @torch.inference_mode()
    def states(self, pack: Pack) -> FloatArray:
        """See `StateScorer.states`."""
        device = next(self._model.parameters()).device
        batch = collate([pack])
        states = self._model(*(tensor.to(device) for tensor in batch))
        result: FloatArray = states.float().cpu().numpy()
        return result
