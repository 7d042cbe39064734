"""Run folders: what `python -m train` leaves, read again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers.utils import logging

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import encoder_files
from ercbatch.digests import file_sha256
from ercbatch.errors import UsageError, foreign_errors
from ercbatch.prompts.tokens import ControlTokens, SegmentTokenizer
from ercbatch.prompts.tree import Window
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from train.model import quantization
from train.recipe import Recipe, recipe_from
from train.sources import Source

DESCRIPTION = "run.json"
MODEL, ADAPTER = "model", "adapter"


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A finished run.

    `data` and `files`, what else it depends on, map paths to SHA-256. `checkpoint` is the model
    that was loaded, a folder or a hub id; its tokenizer is the run's.
    """

    recipe: Recipe
    checkpoint: str
    data: Mapping[str, str]
    files: Mapping[str, str]
    model: PackedModel
    tokenizer: SegmentTokenizer


def load_run(
    folder: Path,
    *,
    merged: bool = True,
    full_precision_base: bool = False,
    attention: str | None = None,
    dtype: Any = torch.float32,
) -> LoadedRun:
    """Read a run folder.

    Args:
        folder: what `train fit` wrote.
        merged: the adapter merged into the base; otherwise the model as it was trained.
        full_precision_base: merge what was trained on a quantized base into the base as it is. By
            default it is merged into the dequantized weights, which the adapter was fitted to.
        attention: the implementation of attention that transformers should use.
        dtype: of the weights, as `from_pretrained` takes it.

    Raises:
        UsageError: not a run folder, one that diverged at once, or its base is missing or another.
    """
    with wrap_model_errors(folder):
        return _load(folder, merged, full_precision_base, attention, dtype)


def _load(
    folder: Path, merged: bool, full_precision_base: bool, attention: str | None, dtype: Any
) -> LoadedRun:
    recipe, described = _read_description(folder)
    controls = ControlTokens.from_json(described["controls"])
    data, file_digests = described["data"], described.get("files", {})
    settings: dict[str, Any] = {"attn_implementation": attention}
    quantized = recipe.load != "full" and not (merged and full_precision_base)
    if quantized:
        settings |= {"quantization_config": quantization(recipe), "device_map": {"": "cpu"}}
    else:
        settings["dtype"] = dtype
    checkpoint = _checkpoint(folder, recipe)
    if recipe.method == "lora":
        _check_base(folder, recipe, file_digests)
    try:
        model, _ = load_causal_lm(checkpoint, **settings)
    except UsageError as error:
        if Path(checkpoint).is_dir():
            raise
        raise UsageError(
            f"{error}: {folder / DESCRIPTION} names the base as seen from the folder that `train "
            "fit` was started in: start there, or give the path there"
        ) from error
    if recipe.method == "lora":
        if quantized and merged:
            logging.set_verbosity_error()  # it says that the model is multiplied out
            model = model.dequantize().to(_dequantized_dtype(dtype))
        model = _adapted(model, folder / ADAPTER)
        model = model.merge_and_unload() if merged else model.base_model.model
    tokenizer = SegmentTokenizer.from_file(folder / manifest.TOKENIZER, controls)
    return LoadedRun(recipe, checkpoint, data, file_digests, PackedModel(model.eval()), tokenizer)


def run_files(folder: Path) -> tuple[str, list[str]]:
    """What a run's model is loaded from, before its adapter; then its files of dialogues.

    Raises:
        UsageError: not a run folder, or one that diverged at once.
    """
    recipe, described = _read_description(folder)
    return _checkpoint(folder, recipe), list(described["data"])


def wrap_model_errors(source: str | Path) -> AbstractContextManager[None]:
    """See `foreign_errors`: of the files of a model, as UsageError."""
    problem = f"{source}: a file of its model is not what it should be"
    return foreign_errors(UsageError, problem, "train again, or get it again")


def _checkpoint(folder: Path, recipe: Recipe) -> str:
    return str(folder / MODEL) if recipe.method == "full" else recipe.base


def _read_description(folder: Path) -> tuple[Recipe, Mapping[str, Any]]:
    path = folder / DESCRIPTION
    try:
        described: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Runs from before there was a choice were trained with version 1.
        recipe = recipe_from(path, {"template_version": 1, **described["recipe"]})
        ControlTokens.from_json(described["controls"])
        described["data"]
        best_epoch = described.get("kept", 1)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: not the description of a finished run ({error}): run `python -m train fit`, "
            "or take a model that was not trained with `export bundle --zero-shot`"
        ) from error
    if described.get("diverged") and not best_epoch:
        raise UsageError(f"{folder} diverged in its first epoch: lower learning_rate, train again")
    return recipe, described


def _dequantized_dtype(dtype: Any) -> torch.dtype:
    """The type to multiply quantized weights out to: float32, or half where that is too large."""
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _check_base(folder: Path, recipe: Recipe, digests: Mapping[str, str]) -> None:
    for path in Path(recipe.base).glob("*.safetensors"):
        expected = digests.get(str(path))
        if expected is not None and file_sha256(path) != expected:
            raise UsageError(
                f"{path}: not the base that the adapter in {folder} was trained on (its SHA-256 "
                "is another): put that base back, or train again"
            )


_ADAPTER_SETTINGS = {
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha"),
    *("lora_dropout", "peft_version", "r", "target_modules", "task_type", "auto_mapping"),
}
"""What `add_lora` sets of an adapter's configuration, and peft on its own."""


def _check_adapter(path: Path) -> None:
    """Refuse an adapter's configuration that sets more than ours do.

    Other settings of peft name code to import, or patterns whose matching never ends.

    Raises:
        UsageError: it does.
    """
    with foreign_errors(UsageError, f"{path}: not the configuration of an adapter", "train again"):
        config = json.loads(path.read_bytes())
        defaults = LoraConfig().to_dict()
        targets = config["target_modules"]
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise TypeError("target_modules is no list of names")
        # Of another release of peft.
        defaults |= {key: None for key in config if key not in defaults}
        unexpected = [
            k for k, v in config.items() if k not in _ADAPTER_SETTINGS and v and v != defaults[k]
        ]
        if unexpected:
            raise ValueError(f"it sets {', '.join(unexpected)}")


def _adapted(model: Any, adapter: Path) -> PeftModel:
    _check_adapter(adapter / CONFIG_NAME)
    if not (adapter / SAFETENSORS_WEIGHTS_NAME).is_file():
        # peft would take a pickle in its place.
        raise UsageError(f"{adapter}: has no {SAFETENSORS_WEIGHTS_NAME}: train again")
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UsageError(
            f"{adapter}: not an adapter for this base ({str(error).splitlines()[0]}): train again"
        ) from error


def is_diverged(folder: Path) -> bool:
    """Whether the loss of a described run was no number in the end.

    Raises:
        UsageError: its description cannot be read.
    """
    path = folder / DESCRIPTION
    try:
        return "diverged" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}): start again with --force") from error


def untrained_run(
    base: str,
    source: Source,
    wording: str,
    *,
    attention: str | None = None,
    dtype: Any = torch.float32,
) -> LoadedRun:
    """A base as it is, as if it were a run: for zero-shot figures and bundles.

    `source` is the labelled data to measure on; `wording` the template's name.

    Raises:
        UsageError: not a causal language model, or no such template.
    """
    model, tokenizer = load_causal_lm(base, attn_implementation=attention, dtype=dtype)
    packed = PackedModel(model.eval())
    packed.check_packing()
    window = Window()
    tokens = min(window.max_tokens, packed.longest_prompt or window.max_tokens)
    recipe = Recipe(
        base=base,
        train=(source,),
        valid=(source,),
        method="full",
        template=wording,
        window=Window(
            max_tokens=tokens, max_utterance_tokens=min(window.max_utterance_tokens, tokens // 4)
        ),
    )
    return LoadedRun(recipe, base, {source.path: file_sha256(source.path)}, {}, packed, tokenizer)


def run_description(recipe: Recipe, tokenizer: SegmentTokenizer) -> dict[str, Any]:
    """What a run depends on: the resolved recipe, the tokenizer's controls, digests of files."""
    sources = (*recipe.train, *recipe.valid, *recipe.test)
    paths = {p for s in sources for p in (s.labels, s.written, s.mapping) if Path(p).is_file()}
    paths |= {str(path) for path in Path(recipe.base).glob("*.safetensors")}  # none: on the hub
    if recipe.encoder and (recipe.demonstrations or recipe.demonstrations_shown):
        paths |= set(map(str, encoder_files(recipe.encoder)))
    return {
        "recipe": recipe.to_json(),
        "controls": tokenizer.controls.to_json(),
        "data": {s.path: file_sha256(s.path) for s in sources},
        "files": {path: file_sha256(path) for path in sorted(paths)},
    }


def write_description(
    folder: Path, described: Mapping[str, Any], tokenizer: SegmentTokenizer, **outcome: Any
) -> None:
    """Write the description of a finished run: from then on the folder is one."""
    versions = {name: version(name) for name in ("ercbatch", "torch", "transformers", "peft")}
    tokenizer.save(folder / manifest.TOKENIZER)
    text = json.dumps(
        {**described, "versions": versions, **outcome}, indent=2, default=dataclasses.asdict
    )
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
