"""The torch scorer: any Hugging Face causal language model, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ercbatch.prompts.answers import AnswerHead, FloatArray
from ercbatch.prompts.packs import Pack
from ercbatch.scoring.packed_model import PackedModel, collate
from ercbatch.scoring.scorer import StateScorer


class TorchScorer(StateScorer):
    """Scores packs with a `PackedModel` where that model lies. Variant: `BnbScorer`.

    `rows` is the head that answers, or the vocabulary ids whose rows of the model's own output
    embedding are to answer. With `bfloat16` it computes in that where torch finds it safe.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    def __init__(
        self, model: PackedModel, rows: Sequence[int] | AnswerHead, *, bfloat16: bool = False
    ) -> None:
        self._model = model
        self._bfloat16 = bfloat16
        device = next(model.parameters()).device
        if device.type == "cuda":
            self.placement = {"device": torch.cuda.get_device_name(device)}
        else:
            self.placement = {"pack_threads": torch.get_num_threads()}
        self.head = rows if isinstance(rows, AnswerHead) else model.answer_head(rows)

    def describe(self) -> str:
        """See `Scorer.describe`."""
        device = next(self._model.parameters()).device
        return f"torch {torch.__version__}, {device}"

    @torch.inference_mode()
    def states(self, pack: Pack) -> FloatArray:
        """See `StateScorer.states`."""
        device = next(self._model.parameters()).device
        batch = collate([pack])
        # Scorers run in threads, and what autocast is told holds in one.
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            states = self._model(*(tensor.to(device) for tensor in batch))
        result: FloatArray = states.float().cpu().numpy()
        return result
