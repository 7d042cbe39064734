"""onnxruntime-genai, with what successive prompts begin with in common kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai

from benchmarks.peers.engine import LONGEST, Generator, Order, Prompts, convert, serve, shared

_BUILDER = "onnxruntime_genai.models.builder"


class OnnxRuntimeGenAi(Generator):
    """onnxruntime-genai in float32, int8 or int4; the vocabulary is scored at a prompt's end only.

    Its generator is taken back to where the next prompt parts from the last one.
    """

    packages = ("onnxruntime-genai",)

    def __init__(self, order: Order) -> None:
        def write(folder: Path) -> None:
            command = (
                *(sys.executable, "-m", _BUILDER, "-i", order.source, "-o", str(folder)),
                *("-p", order.form, "-e", "cpu", "-c", str(folder / "cache")),
                *("--extra_options", "prune_lm_head=true"),
            )
            subprocess.run(command, check=True, stdout=sys.stderr)

        config = onnxruntime_genai.Config(convert(order, write))
        threads = {"intra_op_num_threads": order.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        model = onnxruntime_genai.Model(config)
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=LONGEST, do_sample=False)
        self._generator = onnxruntime_genai.Generator(model, settings)
        self._last: list[int] = []

    def greedy(self, prompts: Prompts) -> list[int]:
        """See `Generator.greedy`."""
        return [self._next(prompt) for dialogue in prompts for prompt in dialogue]

    def _next(self, prompt: list[int]) -> int:
        common = min(shared(self._last, prompt), len(prompt) - 1)
        if self._last:
            self._generator.rewind_to(common)
        self._last = prompt
        self._generator.append_tokens(np.array([prompt[common:]], dtype=np.int32))
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


if __name__ == "__main__":
    serve(OnnxRuntimeGenAi)
