"""A tiny sentence-transformers model, and its embeddings by the library and by our export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from conftest import write_tokenizer
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, processors
from transformers import AutoModel, BertConfig, BertModel

from ercbatch.retrieval.encoder import SentenceEncoder

LINES = [
    "We won, we won!",
    "",
    "Where is my parcel? It was at the door an hour ago, and now it is gone again.",
    "oh",
    "   ",
    "No. Please, not today: I was up all night with a sick cat and two happy children.",
    "The train is late",
    "Thank you so much!",
    "Größe 42 — 日本語 🙂",
] + [f"this is line {number}{' and so on' * (number % 7)}" for number in range(30)]


POOLINGS: list[dict[str, object]] = [
    {"pooling_mode_mean_tokens": True},
    {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
    {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    {"pooling_mode": "max"},
]
"""Both forms of the config that sentence-transformers has written."""


def write_sentence_model(folder: Path) -> Path:
    """A tiny model in sentence-transformers' layout, with random weights."""
    torch.manual_seed(2)
    write_tokenizer(folder, "bert")
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, marks)
    tokenizer.enable_truncation(9)  # the file's own settings must not count
    tokenizer.enable_padding(length=9)
    tokenizer.save(path)
    BertModel(
        BertConfig(
            vocab_size=600,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            initializer_range=0.1,
        )
    ).save_pretrained(folder)
    write_modules(
        folder, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True}
    )
    return folder


def write_modules(
    folder: Path,
    modules: Sequence[str],
    pooling: dict[str, object],
    types: str = "sentence_transformers.models.{}",
) -> None:
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if name == "Transformer" else f"{i}_{name}",
            "type": types.format(name),
        }
        for i, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": 64, **pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def change(path: Path, **values: object) -> None:
    """Give keys of a JSON file other values; it may be missing."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


def copy_model(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def original(source: Path, lines: Sequence[str]) -> npt.NDArray[np.float32]:
    """The embeddings of the PyTorch model, one line at a time, pooled here."""
    model = AutoModel.from_pretrained(source).eval()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    with torch.inference_mode():
        means = [
            model(torch.tensor([tokenizer.encode(line).ids])).last_hidden_state[0].mean(0).numpy()
            for line in lines
        ]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


def library(source: Path, lines: Sequence[str]) -> npt.NDArray[np.float32]:
    """The embeddings of sentence-transformers itself, one line at a time."""
    model = SentenceTransformer(str(source), device="cpu", local_files_only=True)
    model.max_seq_length = 128
    result: npt.NDArray[np.float32] = model.encode(
        list(lines), batch_size=1, normalize_embeddings=True, show_progress_bar=False
    )
    return result


def open_encoder(folder: Path, **settings: int) -> SentenceEncoder:
    return SentenceEncoder(folder / "encoder.onnx", folder / "encoder_tokenizer.json", **settings)
