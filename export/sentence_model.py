"""Sentence-transformers models: their folders are checked, then the library loads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, normalizers, processors

from ercbatch.errors import UsageError
from ercbatch.retrieval.encoder import MAX_TOKENS
from ercbatch.scoring.checkpoints import check_config, check_model_folder, draw_no_bars

_MODULES = ("Transformer", "Pooling", "Normalize")
"""The modules that can be exported, in their order; the last may be missing."""
_TYPES = {
    f"sentence_transformers.{package}.{file}{name}": name
    for package in ("models", "base.modules", "sentence_transformer.modules")
    for name in _MODULES
    for file in ("", f"{name}.", f"{name.lower()}.")
}
"""What releases of the library write for them into `modules.json` -> their names."""
_TEXTS = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
"""The library's description of a transformer that reads nothing but texts."""
_FREE_SETTINGS = frozenset(
    ("max_seq_length", "do_lower_case", "unpad_inputs", "query_length", "document_length")
)
_FIXED_SETTINGS = {
    "transformer_task": "feature-extraction",
    "modality_config": _TEXTS,
    "module_output_name": "token_embeddings",
}
NEEDED = "it needs config.json, model.safetensors and tokenizer.json of a sentence encoder"
_ADVICE = "choose another sentence encoder"
_ONLY = "only a Transformer, a Pooling and a Normalize module can be exported"


def load_sentence_model(source: Path) -> SentenceTransformer:
    """A sentence-transformers model, or a plain transformers model as that library pools one.

    It is in float32, on the CPU, and cuts texts where labelling cuts them. No code comes with it,
    and nothing outside of the folder is read.

    Raises:
        UsageError: no such model, one that cannot be exported, or one that asks to run code.
    """
    check_model_folder(source)
    names, folder = list(_MODULES[:2]), source
    if (source / "modules.json").exists():
        names, folder = _check_modules(source)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: has no {name}: {NEEDED}")
    check_config(str(folder))
    if (source / "adapter_config.json").exists():  # the library looks there too
        raise UsageError(f"{source}: has an adapter_config.json: merge the adapter into its base")
    _check_settings(folder)
    draw_no_bars()
    model = SentenceTransformer(
        str(source),
        device="cpu",
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={
            "attn_implementation": "eager",
            "use_safetensors": True,
            "dtype": torch.float32,
        },
    )
    if [type(module).__name__ for module in model] != names:
        # The library makes a model of another kind, a cross-encoder say, into one of its own.
        raise UsageError(f"{source}: is made for other tasks than sentence embeddings: {_ADVICE}")
    if getattr(model[0], "modality_config", _TEXTS) != _TEXTS:
        raise UsageError(f"{source}: reads chat messages or more than texts: {_ADVICE}")
    _check_weights(model, folder)
    model.max_seq_length = MAX_TOKENS
    return model


def _check_modules(source: Path) -> tuple[list[str], Path]:
    """The names of a model's modules and the folder of its transformer.

    The library imports the classes that `modules.json` names: releases up to 5 import any, also
    from files of the folder, later ones whatever the library itself contains. So they are checked
    before it reads them.

    Raises:
        UsageError: a module that cannot be exported, or one that is not of the library.
    """
    path = source / "modules.json"
    names, folder = [], source
    for module in json.loads(path.read_text(encoding="utf-8")):
        kind, place = module["type"], source / module["path"]
        if not place.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{path}: names {module['path']!a}, outside of its folder: refused")
        package, _, name = kind.rpartition(".")
        if kind not in _TYPES and package.partition(".")[0] == "sentence_transformers":
            raise UsageError(f"{source}: has the module {name:.100}; {_ONLY}: {_ADVICE}")
        if kind not in _TYPES:
            raise UsageError(
                f"{path}: the module {kind[:100]!a} is not of sentence-transformers: refused"
            )
        names.append(_TYPES[kind])
        if names[-1] == "Transformer":
            folder = place
    if names not in (list(_MODULES), list(_MODULES[:2])):
        listed = ", ".join(names[:5]) or "none"
        raise UsageError(f"{source}: its modules are {listed}; {_ONLY}, in this order: {_ADVICE}")
    return names, folder


def _check_settings(folder: Path) -> None:
    """See that the library's settings of a transformer change nothing but its tokenizer's case.

    Others are arguments for transformers, which name files, or methods to call.

    Raises:
        UsageError: they do.
    """
    for path in sorted(folder.glob("sentence_*_config.json")):
        for key, value in json.loads(path.read_text(encoding="utf-8")).items():
            fixed = key in _FIXED_SETTINGS and value == _FIXED_SETTINGS[key]
            if value and not fixed and key not in _FREE_SETTINGS:
                raise UsageError(f"{path}: the setting {key[:100]!a} is not supported: {_ADVICE}")


def _check_weights(model: SentenceTransformer, folder: Path) -> None:
    """See that a checkpoint has all weights: transformers makes up what one lacks.

    The library does not pass on which these are, so the names are compared once more, without
    their values. A pooler is taken out, because nothing reads it.

    Raises:
        UsageError: it lacks some.
    """
    transformer = model[0].auto_model
    _, loading_info = type(transformer).from_pretrained(
        folder,
        config=transformer.config,
        use_safetensors=True,
        device_map="meta",
        output_loading_info=True,
    )
    missing = sorted(
        name for name in loading_info["missing_keys"] if not name.startswith("pooler.")
    )
    if missing:
        raise UsageError(
            f"{folder}: its weights lack {', '.join(sorted(missing)[:3])}: get it again"
        )
    if hasattr(transformer, "pooler"):
        transformer.pooler = None


def export_tokenizer(model: SentenceTransformer, source: Path, samples: Sequence[str]) -> Tokenizer:
    """The model's tokenizer, which puts the tokens of its default prompt before each text.

    That is what the library's `encode` does. Demonstrations are found by comparing utterances with
    utterances: prompts for queries or documents, which only `encode_query` and `encode_document`
    use, would set the two sides apart.

    Raises:
        UsageError: there is no fast tokenizer, or the prompt has no tokens of its own before each
            of the samples.
    """
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{source}: has no fast tokenizer (tokenizer.json): convert it first")
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    prompt = model.prompts[model.default_prompt_name] if model.default_prompt_name else ""
    if not prompt:
        return tokenizer
    advice = f"{_ADVICE}, or take default_prompt_name out of config_sentence_transformers.json"
    if not model[1].include_prompt:
        raise UsageError(f"{source}: its pooling leaves the default prompt out: {advice}")
    # Byte-level tokenizers take the space after a prompt for a part of the text's first word.
    for lead in ("", prompt[len(prompt.rstrip()) :]):
        prompting = _led(tokenizer, lead)
        around = _around_texts(tokenizer, prompting, prompt, samples)
        if around is not None:
            break
    else:
        raise UsageError(
            f"{source}: its tokenizer joins the default prompt {prompt[:100]!a} with the text that "
            f"follows: {advice}"
        )
    if sum(map(len, around)) > MAX_TOKENS // 2:
        raise UsageError(
            f"{source}: its default prompt takes over half of {MAX_TOKENS} tokens: {advice}"
        )
    prompting.post_processor = _template(tokenizer, *around)
    return prompting


def _led(tokenizer: Tokenizer, lead: str) -> Tokenizer:
    """A copy of a tokenizer that puts white space before each text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    if lead:
        first, own = normalizers.Prepend(lead), copy.normalizer
        copy.normalizer = first if own is None else normalizers.Sequence([first, own])
    return copy


def _around_texts(
    tokenizer: Tokenizer, prompting: Tokenizer, prompt: str, samples: Sequence[str]
) -> tuple[list[int], list[int]] | None:
    """The tokens before and after each sample that follows a prompt, with the tokenizer's marks.

    None where they depend on the sample, or it has other tokens than `prompting` gives it.
    """
    around: list[tuple[list[int], list[int]]] = []
    for text in samples:
        whole = tokenizer.encode(prompt + text).ids
        alone = prompting.encode(text, add_special_tokens=False).ids
        places = range(len(whole) - len(alone), -1, -1)
        start = next((i for i in places if whole[i : i + len(alone)] == alone), None)
        if start is None:
            return None
        around.append((whole[:start], whole[start + len(alone) :]))
    return around[0] if all(pair == around[0] for pair in around) else None


def _template(
    tokenizer: Tokenizer, before: list[int], after: list[int]
) -> processors.TemplateProcessing:
    """A post-processor that puts tokens before and after a text.

    It is a part of `tokenizer.json`, so labelling knows nothing of prompts.
    """
    tokens = [
        {"id": name, "ids": ids, "tokens": list(map(tokenizer.id_to_token, ids))}
        for name, ids in (("before", before), ("after", after))
        if ids
    ]
    # A template may name only what stands for tokens.
    single = f"{'before ' * bool(before)}$A{' after' * bool(after)}"
    return processors.TemplateProcessing(single=single, special_tokens=tokens)
