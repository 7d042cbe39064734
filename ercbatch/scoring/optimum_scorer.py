"""The scorer of the standard graph, text generation with past: no torch, no transformers.

Such a graph knows sequences, not trees: each answer of a pack is computed from its own separate
prompt, so nothing is shared and the cost is that of separate prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from ercbatch.errors import BundleError
from ercbatch.prompts.answers import AnswerHead, FloatArray
from ercbatch.prompts.packs import Pack
from ercbatch.prompts.tree import IntArray
from ercbatch.scoring.scorer import Scorer
from ercbatch.scoring.sessions import LONGEST_PACK, open_session, run_session

_BATCH_TOKENS = 512
"""Tokens of a batch, padding included; a longer prompt is a batch of its own.

Short prompts together save calls; more than this was slower, not faster, on a CPU. And the graph
gives logits for every token: 4 bytes * vocabulary * the greater of this and the longest prompt.
"""
_PAST = "past_key_values."


class OptimumScorer(Scorer):
    """Scores packs with a standard `model.onnx`, prompt by prompt.

    The graph has the input `input_ids`, any of `attention_mask`, `position_ids` and
    `past_key_values.*`, and the output `logits` [batch, length, vocabulary], as optimum and
    others write it. Scale and softcap of the head are in those logits already.

    Raises:
        BundleError: the runtime does not accept the graph, or it is not such a one.
    """

    packages = ("onnxruntime",)
    longest_pack = LONGEST_PACK

    def __init__(
        self, path: Path, head: AnswerHead, threads: int, file_names: Collection[str] = ()
    ) -> None:
        self.head = head
        self._path = path
        self._session = open_session(path, threads, file_names)
        self._threads = threads
        self.placement = {"pack_threads": threads}
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self._past_shapes = {
            name: shape for name, shape in inputs.items() if name.startswith(_PAST)
        }
        self._token_inputs = inputs.keys() - self._past_shapes.keys()
        unknown_inputs = self._token_inputs - {"input_ids", "attention_mask", "position_ids"}
        outputs = {value.name for value in self._session.get_outputs()}
        if unknown_inputs or "input_ids" not in inputs or "logits" not in outputs:
            raise BundleError(
                f"{path}: is no text-generation graph with past (inputs {', '.join(inputs)}): "
                "export the bundle again"
            )

    def describe(self) -> str:
        """See `Scorer.describe`."""
        return (
            f"ONNX Runtime {onnxruntime.__version__}, CPU, {self._threads} threads, "
            "separate prompts"
        )

    def logits(self, pack: Pack) -> FloatArray:
        """See `Scorer.logits`."""
        prompts = separate(pack)
        rows = np.empty((len(prompts), len(self.head.tokens)), dtype=np.float32)
        for batch in batches([len(prompt) for prompt in prompts], _BATCH_TOKENS):
            tokens = np.zeros((len(batch), len(prompts[batch[-1]])), dtype=np.int64)
            for row, prompt in zip(tokens, (prompts[i] for i in batch), strict=True):
                row[: len(prompt)] = prompt
            last = [len(prompts[i]) - 1 for i in batch]
            logits = run_session(self._path, self._session, ["logits"], self._feed(tokens))[0]
            rows[batch] = logits[np.arange(len(batch)), last][:, self.head.tokens]
        return rows

    def _feed(self, tokens: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        """The graph's inputs for token ids [batch, length] that begin at the left.

        The mask hides nothing: what fills a row up stands behind its prompt, where a causal graph
        does not look, and no token is left that sees nothing.
        """
        values: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy(),
        }
        feed = {name: values[name] for name in self._token_inputs}
        for name, (_, *sizes) in self._past_shapes.items():
            # A size with a name is the length of the past, which is empty.
            fixed = (size if isinstance(size, int) else 0 for size in sizes)
            feed[name] = np.zeros((len(tokens), *fixed), dtype=np.float32)
        return feed


def separate(pack: Pack) -> list[IntArray]:
    """The ordinary prompt of each read of a pack, in the order of its reads."""
    return [pack.tokens[: index + 1][pack.ends[: index + 1] > index] for index, _, _ in pack.reads]


def batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of prompts to run together, those of like length: the longest of each is last.

    Filled up to its longest a batch has at most `limit` tokens, or one prompt.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
