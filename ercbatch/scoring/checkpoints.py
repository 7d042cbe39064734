"""Checkpoint folders of Hugging Face models: checks, loading, the tokenizer. Needs torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ercbatch.errors import UsageError, foreign_errors
from ercbatch.prompts.tokens import SegmentTokenizer, check_tokenizer, control_tokens


def check_config(source: str) -> Mapping[str, Any]:
    """A checkpoint's `config.json`, which asks for no code.

    Raises:
        UsageError: it does, or there is none.
    """
    from transformers import PretrainedConfig
    from transformers.utils import find_adapter_config_file

    if Path(source).is_dir():
        check_model_folder(Path(source))
    try:
        adapter = find_adapter_config_file(source)
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: no model there: {error}") from error
    if adapter is not None:
        # transformers would go on with whatever model that names, and look at no other file here.
        raise UsageError(f"{source}: has an adapter_config.json: merge the adapter into its base")
    refuse_code(f"{source}: config.json", config)
    checked: Mapping[str, Any] = config
    return checked


def check_model_folder(folder: Path) -> None:
    """See that nothing in a stranger's model folder leads out of it.

    Raises:
        UsageError: a link, a shard or a tokenizer's file does.
        BundleError: its tokenizer is one that `check_tokenizer` refuses.
    """
    home = folder.resolve()
    # A hub's cache keeps the files of all snapshots in one place, with links to them.
    home = next((p for p in home.parents if p.name.startswith("models--")), home)
    for path in folder.rglob("*"):
        if path.is_symlink() and not _within(path, home):
            raise UsageError(f"{path}: a link that leads out of its folder: refused")
        if not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path}: no file: refused")
    for path in folder.glob("*.index.json"):
        shards = _json_object(path).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise UsageError(f"{path}: a shard is {shard!a}, no file of its folder: refused")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        for key, value in _json_object(settings).items():
            # special_tokens_map_file is not read.
            names_file = key.endswith("_file") and key != "special_tokens_map_file"
            if names_file and isinstance(value, str) and Path(value).name != value:
                raise UsageError(f"{settings}: {key} is {value!a}, no file of its folder: refused")
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder / "tokenizer.json")


def _within(link: Path, home: Path) -> bool:
    try:
        return link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # it leads in a circle
        return False


def _json_object(path: Path) -> dict[str, Any]:
    with foreign_errors(UsageError, f"{path}: not what it should be", "get it again"):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise TypeError("it is no object")
        return value


_BOUNDS = (("layer", 1000), ("expert", 10_000), ("num_labels", 100_000))
"""What a key contains -> its largest number: to make more of them takes for ever."""


def refuse_code(place: str, config: Mapping[str, Any]) -> None:
    """Refuse a model's configuration that runs code, or that asks for absurd sizes.

    `place` is where the configuration was read from.

    Raises:
        UsageError: it does.
    """
    for key, value in config.items():
        for part, limit in _BOUNDS:
            is_count = part in key and not key.endswith("_size")  # one is the width of an expert
            if is_count and isinstance(value, int) and value > limit:
                raise UsageError(f"{place} asks for {key} = {value}: refused")
        # `auto_map` names code to import, `attn_implementation` a kernel to fetch and run
        # (CVE-2026-4372), in the configuration of a part too. Neither has a place in a file of
        # data; a flag names nothing.
        kernel = key.lstrip("_").startswith("attn_implementation")
        if key == "auto_map" or (kernel and not isinstance(value, bool | None)):
            raise UsageError(f"{place} has {key!r}, which asks to run code: refused")
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Mapping):
                refuse_code(place, part)


def load_causal_lm(source: str, **settings: Any) -> tuple[Any, SegmentTokenizer]:
    """A causal language model and its tokenizer, from a checkpoint folder or a hub id.

    Weights come from safetensors only, and no code comes with them. They are float32 unless
    `settings` (of `from_pretrained`) say otherwise: transformers 5 would keep what the file has.

    Raises:
        UsageError: not a causal language model, or a config that asks to run code.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = check_config(source)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"{source}: {f'a {kind} model' if kind else 'config.json without model_type'}, not a "
            "causal language model: take one such as Llama, Qwen, Mistral, Gemma, Phi or BLOOM"
        )
    if kind == "bert" and not config.get("is_decoder"):
        raise UsageError(
            f"{source}: an encoder reads both ways: make it a causal language model with "
            "`python -m train base`"
        )
    if "quantization_config" not in settings:
        settings.setdefault("dtype", torch.float32)
    draw_no_bars()
    what = f"{source}: cannot be loaded as a causal language model"
    with foreign_errors(UsageError, what, "check the name, or get it again"):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if loading_info["missing_keys"]:  # transformers would make them up
        missing = ", ".join(sorted(loading_info["missing_keys"])[:3])
        raise UsageError(f"{source}: its weights lack {missing}: get it again")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{source}: has no fast tokenizer (tokenizer.json): convert it first")
    controls = control_tokens(backend, tokenizer.special_tokens_map)
    return model, SegmentTokenizer(backend, controls)


def draw_no_bars() -> None:
    """Let transformers draw its progress on terminals alone."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write transformers' tokenizer, as a checkpoint has it, into a folder.

    Chat templates become files of the names that a stranger gave them, wherever those lead
    (CVE-2026-9856): only the one without a name is written.
    """
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    tokenizer.save_pretrained(folder)
