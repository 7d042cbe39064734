"""Run folders: what `python -m train` leaves, read again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel

from ercbatch import bundle as files
from ercbatch.errors import UsageError
from ercbatch.tokens import ControlTokens, SegmentTokenizer
from ercbatch.torch_model import PackedModel, load_causal_lm
from train.recipe import Recipe, recipe_from

DESCRIPTION = "run.json"
MODEL, ADAPTER = "model", "adapter"


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A finished run: its recipe, its data (path -> SHA-256), and the model, adapter merged."""

    recipe: Recipe
    data: Mapping[str, str]
    model: PackedModel
    tokenizer: SegmentTokenizer


def load_run(folder: Path, *, attention: str = "sdpa") -> TrainedRun:
    """Read a run folder; `attention` is the implementation that transformers should use.

    Raises:
        UsageError: not a run folder, or its base is missing.
    """
    path = folder / DESCRIPTION
    try:
        described: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recipe = recipe_from(path, described["recipe"])
        controls = ControlTokens.from_json(described["controls"])
        data = described["data"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{path}: not the description of a finished run ({error}): run `python -m train fit`"
        ) from error
    settings = {"attn_implementation": attention}
    if recipe.method == "full":
        model, _ = load_causal_lm(str(folder / MODEL), **settings)
    else:
        model, _ = load_causal_lm(recipe.base, **settings)
        model = PeftModel.from_pretrained(model, folder / ADAPTER).merge_and_unload()
    tokenizer = SegmentTokenizer.from_file(folder / files.TOKENIZER, controls)
    return TrainedRun(recipe, data, PackedModel(model.float().eval()), tokenizer)


def describe(
    folder: Path, recipe: Recipe, tokenizer: SegmentTokenizer, paths: Sequence[str], **rest: Any
) -> None:
    """Write the description of a finished run: from then on the folder is one."""
    described = {
        "recipe": recipe.to_json(),
        "controls": tokenizer.controls.to_json(),
        "versions": {n: version(n) for n in ("ercbatch", "torch", "transformers", "peft")},
        "data": {path: digest(path) for path in paths},
        **rest,
    }
    tokenizer.save(folder / files.TOKENIZER)
    text = json.dumps(described, indent=2, default=dataclasses.asdict)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def digest(path: str | Path) -> str:
    """The SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
