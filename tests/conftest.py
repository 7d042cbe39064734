"""Small real models, trained or made on the spot."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT, python

from ercbatch.bundle.bundle import with_digest
from ercbatch.bundle.manifest import MANIFEST
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.scoring.checkpoints import load_causal_lm

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Each worker has its share of the processors.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

EXAMPLES = ROOT / "examples"
CHAT = EXAMPLES / "labelled_chat.jsonl"
WORDS = """
emotions speakers emotion next speaker of like neutral surprise fear sad joyful disgust angry mad
peaceful powerful scared the a i you we it is was not my your door train parcel fridge where what
who when no yes oh please thank sorry happy gone here there now today again late lost found
0 1 2 3 4 5 6 7 8 9 : . , ! ? = ' " < > # _ - select label from conversation
""".split()


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `ercbatch`."""
    return python("-m", "ercbatch", *arguments, **environment)


def export_bundle(
    source: Path, folder: Path, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run `python -m export bundle` on a run or a base."""
    named = ("--name", "x", "--licence", "MIT")
    return python("-m", "export", "bundle", source, "-o", folder, *named, *options)


UNTRAINED = ("--zero-shot", CHAT, "--labels", "meld", "--template", "compact")
"""What a base is exported with as it is."""


def write_tokenizer(folder: Path, kind: str) -> None:
    """A tokenizer of WORDS and letters: WordPiece with BERT's marks, or byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bert":
        letters = [chr(c) for c in range(33, 127)]
        marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        units = dict.fromkeys([*marks, *WORDS, *letters, *(f"##{c}" for c in letters)])
        vocabulary = {unit: i for i, unit in enumerate(units)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(marks)
        special = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([" " + " ".join(WORDS)] * 3, trainer)
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a bundle says of itself, and its own digest with it."""
    path = folder / MANIFEST
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(with_digest(value)))


def sign(folder: Path) -> None:
    """Make a bundle list the files that are there, with the digests that they have."""
    paths = [path for path in folder.iterdir() if path.name != MANIFEST]
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(paths)
    }
    edit_manifest(folder, lambda value: value.update(files=files))


SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 20},
    "gpt2": {"n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    # At least a block of NF4 wide.
    "llama": {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128},
    "mamba": {"state_size": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "phi": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}
"""Tiny models: transformers' name of each architecture, and what sets it apart from `SIZES`."""
REFUSED = ("mamba", "mpt")
"""Architectures that cannot be packed."""
ACCEPTED = tuple(kind for kind in ARCHITECTURES if kind not in REFUSED)


def write_model(folder: Path, kind: str) -> Path:
    """A tiny causal language model with random weights, as a checkpoint folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    write_tokenizer(folder, "bert" if kind == "bert" else "bpe")
    # Where an architecture has a name of its own for a size, transformers translates only one way.
    own = ARCHITECTURES[kind]
    sizes = SIZES if "n_layer" not in own else {k: SIZES[k] for k in ("vocab_size", "hidden_size")}
    config = AutoConfig.for_model(kind, **{**sizes, "initializer_range": 0.3, **own})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, base: Path, **values: Any) -> Path:
    """A small recipe for the labelled example."""
    settings = {
        "base": str(base),
        "template": "compact",
        "learning_rate": 1e-2,
        "epochs": 1,
        "speaker_epochs": 1,
        "pack_tokens": 128,
        "packs_per_step": 2,
        **values,
    }
    window = "turns = 3\nstride = 2\nmax_tokens = 400\nmax_utterance_tokens = 60"
    table = f"path = {json.dumps(str(CHAT))}\nlabels = 'meld'"
    path = folder / "recipe.toml"
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    path.write_text(f"{lines}\n[window]\n{window}\n[[train]]\n{table}\n[[valid]]\n{table}\n")
    return path


def write_sentence_encoder(folder: Path) -> Path:
    """A tiny BERT with random weights, which stands in for all-MiniLM-L6-v2."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    write_tokenizer(folder, "bert")
    BertModel(
        BertConfig(
            vocab_size=600,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    return folder


Shared = Callable[[str, Callable[[Path], object]], Path]
"""(name, what fills a folder) -> the folder of that name."""


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Folders that are filled once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own in it

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        path = base / "shared" / name
        path.mkdir(parents=True, exist_ok=True)
        complete = path.with_name(f"{name}.complete")
        with path.with_name(f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                fill(path)
                complete.touch()
        return path

    return folder


@pytest.fixture(scope="session", params=["bert", "llama", "gpt_neox"])
def checkpoint(request: pytest.FixtureRequest, shared: Shared) -> Path:
    """A tiny checkpoint of each architecture."""
    return shared(request.param, lambda folder: write_model(folder, request.param))


@pytest.fixture(scope="session")
def bert(shared: Shared) -> Path:
    """The tiny BERT decoder."""
    return shared("bert", lambda folder: write_model(folder, "bert"))


@pytest.fixture(scope="session")
def tokenizer(bert: Path) -> SegmentTokenizer:
    return load_causal_lm(str(bert))[1]


@pytest.fixture(scope="session")
def llama(shared: Shared) -> Path:
    """A checkpoint of random weights, whose answers four bits change."""
    return shared("llama", lambda folder: write_model(folder, "llama"))


@pytest.fixture(scope="session")
def encoder_folder(shared: Shared) -> Path:
    """A tiny sentence encoder, exported by the real command."""
    source = shared("sbert", write_sentence_encoder)

    def export(folder: Path) -> None:
        done = python("-m", "export", "encoder", source, "-o", folder / "encoder")
        assert done.returncode == 0, done.stderr

    return shared("encoder", export) / "encoder"


@pytest.fixture(scope="session")
def trained(bert: Path, encoder_folder: Path, shared: Shared) -> Path:
    """A run folder of the real `python -m train fit`: LoRA, all tasks, demonstrations."""
    data = EXAMPLES / "labelled_chat.jsonl"

    def fit(folder: Path) -> None:
        recipe = folder / "recipe.toml"
        recipe.write_text(
            f"""
base = {json.dumps(str(bert))}
encoder = {json.dumps(str(encoder_folder))}
template = "compact"
epochs = 3
speaker_epochs = 1
learning_rate = 1e-2
pack_tokens = 128
packs_per_step = 2
demonstrations = 0.5
later_turns = 0.3

[window]
turns = 3
stride = 2
max_tokens = 400
max_utterance_tokens = 60

[[train]]
path = {json.dumps(str(data))}
labels = "meld"

[[valid]]
path = {json.dumps(str(data))}
labels = "meld"
""",
            encoding="utf-8",
        )
        done = python("-m", "train", "fit", recipe, "-o", folder / "run")
        assert done.returncode == 0, done.stderr

    return shared("train", fit) / "run"


@pytest.fixture(scope="session")
def bundle_folder(trained: Path, encoder_folder: Path, shared: Shared) -> Path:
    """A bundle of the real `python -m export bundle`."""

    def export(folder: Path) -> None:
        done = python(
            *("-m", "export", "bundle", trained, "-o", folder / "tiny", "--name", "tiny"),
            *("--encoder", encoder_folder, "--examples", EXAMPLES / "my_examples.jsonl"),
            *("--licence", "Apache-2.0", "--provenance", "dialogues of this project"),
            "--accept-loss",  # half trained, it is sure of nothing: a rounding changes labels
        )
        assert done.returncode == 0, done.stderr

    return shared("bundle", export) / "tiny"


GOOD = b'{"utterances": [{"text": "it is gone", "scores": {"old": 1}}]}\n'
BAD = b"[]\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of a bad line and a good one."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(BAD + GOOD)
    return path


@pytest.fixture(scope="session")
def faults(shared: Shared) -> Path:
    """The library that lets system calls fail."""
    source = ROOT / "tests" / "faults" / "faults.c"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "no C compiler: hnswlib needs one too"

    def build(folder: Path) -> None:
        library = folder / "faults.so"
        subprocess.run(
            (compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"), check=True
        )

    return shared("faults", build) / "faults.so"
