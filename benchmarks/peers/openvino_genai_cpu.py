"""OpenVINO GenAI with int8 weights, with what prompts begin with in common kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.engine import Generator, Order, Prompts, convert, serve

_CACHE_GB = 2


class OpenVino(Generator):
    """OpenVINO GenAI: `LLMPipeline`, or `ContinuousBatchingPipeline` with the form `cached`.

    The first keeps prefixes by default, the second is set to keep them.

    The second one too is given one prompt at a time: of prompts that it computes together none can
    find what another one has left.
    """

    packages = ("openvino-genai", "openvino", "optimum-intel")

    def __init__(self, order: Order) -> None:
        def write(folder: Path) -> None:
            from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

            OVModelForCausalLM.from_pretrained(
                order.source,
                export=True,
                compile=False,
                quantization_config=OVWeightQuantizationConfig(bits=8),
            ).save_pretrained(folder)

        folder = convert(order, write)
        properties = {"INFERENCE_NUM_THREADS": order.threads}
        self._settings = openvino_genai.GenerationConfig(
            max_new_tokens=1, do_sample=False, ignore_eos=True
        )
        self._settings.set_eos_token_id(0)  # a checkpoint may name none: then -1, which is refused
        if order.form != "cached":
            self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", properties)
        else:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = True
            scheduler.cache_size = _CACHE_GB
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                folder, scheduler, "CPU", properties
            )
        self._cached = order.form == "cached"

    def greedy(self, prompts: Prompts) -> list[int]:
        """See `Generator.greedy`."""
        return [self._next(prompt) for dialogue in prompts for prompt in dialogue]

    def _next(self, prompt: list[int]) -> int:
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        if self._cached:
            tokens = self._pipeline.generate([ids], [self._settings])[0].m_generation_ids[0]
        else:
            tokens = self._pipeline.generate(ids, self._settings).tokens[0]
        return int(tokens[0])


if __name__ == "__main__":
    serve(OpenVino)
