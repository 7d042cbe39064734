"""CTranslate2, with the state after the instruction that all prompts share kept."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter

from benchmarks.peers.engine import Generator, Order, Prompts, convert, serve, shared


class CTranslate2(Generator):
    """CTranslate2 in float32 or int8, one prompt at a time.

    A batch of prompts of different lengths would be computed together as far as the shortest goes,
    and from there token by token.
    """

    packages = ("ctranslate2",)

    def __init__(self, order: Order) -> None:
        def write(folder: Path) -> None:
            TransformersConverter(order.source).convert(str(folder), force=True)

        folder = convert(order, write)
        self._generator = ctranslate2.Generator(
            folder,
            compute_type={"fp32": "float32"}.get(order.form, order.form),
            intra_threads=order.threads,
        )
        self._words = json.loads(Path(folder, "vocabulary.json").read_text(encoding="utf-8"))

    def greedy(self, prompts: Prompts) -> list[int]:
        """See `Generator.greedy`."""
        flat = [prompt for dialogue in prompts for prompt in dialogue]
        first = min(flat)
        common = min(shared(first, max(flat)), len(first) - 1)
        words = [[self._words[token] for token in prompt] for prompt in flat]
        results = self._generator.generate_batch(
            [prompt[common:] for prompt in words],
            static_prompt=words[0][:common],
            include_prompt_in_result=False,
            max_batch_size=1,
            max_length=1,
            return_end_token=True,
        )
        return [result.sequences_ids[0][0] for result in results]


if __name__ == "__main__":
    serve(CTranslate2)
