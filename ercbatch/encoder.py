"""Sentence embeddings under ONNX Runtime: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ercbatch.onnx_scorer import open_session

_MOST_TOKENS = 128
"""Tokens of a text that count, as all-MiniLM-L6-v2 was trained (its model card)."""
_BATCH_TOKENS = 2048
"""Padded tokens in one run of the encoder."""


class SentenceEncoder:
    """Texts to unit vectors; pooling and normalization are in the graph."""

    def __init__(self, model: Path, tokenizer: Path, *, threads: int = 1) -> None:
        self._session = open_session(model, threads)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MOST_TOKENS)
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings [texts, dim], each of length 1, in the order of the texts."""
        encoded = self._tokenizer.encode_batch([text[: 32 * _MOST_TOKENS] for text in texts])
        ids = [e.ids for e in encoded]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(ids)
        at = 0
        while at < len(order):
            stop = at + 1
            while stop < len(order) and len(ids[order[stop]]) * (stop + 1 - at) <= _BATCH_TOKENS:
                stop += 1
            batch = order[at:stop]
            tokens = np.zeros((len(batch), len(ids[batch[-1]])), dtype=np.int64)
            mask = np.zeros_like(tokens)
            for row, i in enumerate(batch):
                tokens[row, : len(ids[i])] = ids[i]
                mask[row, : len(ids[i])] = 1
            vectors = self._session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]
            for row, i in enumerate(batch):
                rows[i] = vectors[row]
            at = stop
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)
