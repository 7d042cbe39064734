"""transformers: `generate`, as InstructERC's own code calls it.

Batches of 16 prompts in their order, padded on the left to the longest, one new token.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.engine import Engine, Order, serve

_BATCH = 16


class Transformers(Engine):
    """transformers in float32, on a GPU where there is one; the form `static` keeps one cache."""

    packages = ("transformers", "torch")

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(order.source, dtype=torch.float32)
        self._model = model.to(self._device).eval()
        self._cache = {"cache_implementation": "static"} if order.form == "static" else {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """As `Generator.answer`; `logits` are those of the tokens `options`, for each prompt."""
        tokens: list[int] = []
        logits: list[list[float]] = []
        began = time.perf_counter()
        prompts = [prompt for dialogue in request["prompts"] for prompt in dialogue]
        for at in range(0, len(prompts), _BATCH):
            output = self._generate(prompts[at : at + _BATCH])
            tokens += output.sequences[:, -1].tolist()
            logits += output.logits[0][:, request["options"]].tolist()
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "logits": logits}

    def _generate(self, prompts: list[list[int]]) -> Any:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **self._cache,
        )


if __name__ == "__main__":
    serve(Transformers)
