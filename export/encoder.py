"""A sentence encoder as ONNX: pooling and normalization inside the graph."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn

from ercbatch.bundle import manifest
from ercbatch.bundle.folders import check_output, whole_folder
from ercbatch.errors import BundleError, UsageError, foreign_errors
from ercbatch.retrieval.encoder import SentenceEncoder
from export.graph.nodes import Graph
from export.graph.trace import trace
from export.quantize.int8 import quantize_lookups, quantize_products
from export.quantize.statistics import module_inputs
from export.sentence_model import NEEDED, export_tokenizer, load_sentence_model

_SAMPLES = (
    "I can't believe you did that!",
    "Okay.",
    "What is that smell?",
    "We won, we actually won!",
    "The meeting has been moved to Thursday at ten, so there is no need to hurry.",
    "I heard steps behind me the whole way home, and when I turned around there was nobody.",
    "Thanks for the quick reply; the parcel arrived this morning and everything is in it.",
    "I miss her. Every day.",
    "no no no, not again... why does it always happen to me?!",
    "She moved to Lisbon in 2019 with two suitcases, a cat and € 300.",
)
"""Sentences that tell which channels of the encoder stay in float32 (export/quantize/int8.py)."""
_CHECKED = (
    "I did not expect to see you here.",
    "ok",
    "Why would anyone do that?!",
    "We leave at 7:30, so be at the station by 7:15.",
    '"Not again", she said, and closed the door.',
    "(laughs) I know, right?",
    "Ça va, Größe 42, 日本語 🙂",
    "3 emails, 2 calls and no answer from the landlord.",
    "That makes me so happy, thank you!",
    "He left without a word and I have been waiting by the phone ever since. " * 20,
)
"""Sentences whose embeddings are compared with the library's; the last one is cut."""
_LEAST_FLOAT, _LEAST_INT8 = 0.99999, 0.98
"""Cosines between the graph's embeddings and the library's, at least."""

_Vectors = npt.NDArray[np.float32]


class PooledEncoder(nn.Module):
    """Token ids and their mask [batch, length] to unit vectors [batch, dim]."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The library's modules one after the other, cut to its dimensions, scaled to length 1."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors = self.model(features)["sentence_embedding"][:, : self.model.truncate_dim]
        return nn.functional.normalize(vectors, dim=-1)


def export_encoder(
    source: str | Path, folder: Path, *, quantize: bool = True, force: bool = False
) -> None:
    """Write a folder of `encoder.onnx` and `encoder_tokenizer.json`.

    The graph takes `input_ids` and `attention_mask` [batch, length] int64, and gives `embeddings`
    [batch, dim] float32, each of length 1. Embeddings of sample sentences are compared with those
    of sentence-transformers, in float32 and as they are written.

    Args:
        source: the folder of a sentence-transformers model, or of a plain transformers model, as
            sentence-transformers pools one: by the mean of the token states.
        folder: the folder to write.
        quantize: int8 weights; otherwise float32.
        force: replace an existing folder.

    Raises:
        UsageError: not such a model, its embeddings are others than the library's, or `folder`
            exists and `force` is not given.
        OutputError: it cannot be written.
    """
    check_output(folder, manifest.ENCODER, force=force, inputs=[source])
    with foreign_errors(UsageError, f"{source}: cannot be exported", NEEDED):
        model = load_sentence_model(Path(source))
        tokenizer = export_tokenizer(model, Path(source), _CHECKED)
        expected = model.encode(
            list(_CHECKED), batch_size=1, normalize_embeddings=True, show_progress_bar=False
        )
        encoder = PooledEncoder(model)
        graph = _traced(encoder)
    with whole_folder(folder, manifest.ENCODER, force=force) as part:
        _save(deepcopy(graph), tokenizer, part)
        _compare(source, part, expected, _LEAST_FLOAT)
        if quantize:
            inputs = module_inputs(encoder, lambda: _run(encoder, tokenizer))
            quantize_products(graph, sampler=inputs)
            quantize_lookups(graph)
            _save(graph, tokenizer, part)
            _compare(source, part, expected, _LEAST_INT8)


def _traced(encoder: PooledEncoder) -> Graph:
    ids = torch.ones((2, 7), dtype=torch.long)
    axes = {0: "batch", 1: "length"}
    return trace(
        encoder,
        (ids, ids),
        {"input_ids": axes, "attention_mask": axes},
        {"embeddings": {0: "batch"}},
    )


def _save(graph: Graph, tokenizer: Tokenizer, folder: Path) -> None:
    graph.save(folder / manifest.ENCODER)
    text = tokenizer.to_str(pretty=False)
    (folder / manifest.ENCODER_TOKENIZER).write_text(text, encoding="utf-8")


def _compare(source: str | Path, folder: Path, expected: _Vectors, least: float) -> None:
    """See that labelling would have the library's embeddings from a folder.

    Raises:
        UsageError: a cosine is below `least`, or labelling does not take the graph.
    """
    advice = "choose another sentence encoder"
    if least == _LEAST_INT8:
        advice += ", or give --quantize fp32"
    try:
        encoder = SentenceEncoder(folder / manifest.ENCODER, folder / manifest.ENCODER_TOKENIZER)
        embeddings = encoder.encode(_CHECKED)
    except BundleError as error:
        raise UsageError(f"{source}: labelling cannot run its graph ({error}): {advice}") from error
    if embeddings.shape != expected.shape:
        shapes = f"{embeddings.shape}, not {expected.shape}"
        raise UsageError(f"{source}: its graph gives {shapes}: {advice}")
    lowest = float((embeddings * expected).sum(axis=1).min())
    if not lowest >= least:  # nor is it NaN
        raise UsageError(
            f"{source}: a sentence has another embedding in the graph than in sentence-transformers"
            f" (cosine {lowest:.6f}, below {least}): {advice}"
        )


def _run(encoder: PooledEncoder, tokenizer: Tokenizer) -> None:
    for text in _SAMPLES:
        ids = torch.tensor([tokenizer.encode(text).ids])
        encoder(ids, torch.ones_like(ids))
