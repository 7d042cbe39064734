"""A recipe: everything that a training run depends on, as a TOML file.

Every default is the paper's (arXiv 2309.11911, section 4), except where a comment says why not.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ercbatch.errors import UsageError
from ercbatch.labels import label_set
from ercbatch.prompts import template
from ercbatch.tree import Window


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset: a dialogue JSONL with `label`, and the label set that its labels belong to."""

    path: str
    labels: str
    fraction: float = 1.0
    """Share of the dialogues that each epoch draws anew."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to train, on what, and how."""

    base: str
    """A Hugging Face checkpoint folder or hub id."""
    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    method: str = "lora"
    """`lora` or `full`."""
    template: str = "paper"
    window: Window = field(default_factory=Window)
    tasks: tuple[str, ...] = ("emotion", "impact")
    alpha: float = 0.1
    """Weight of the emotion-impact loss."""
    epochs: int = 6
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    lora_rank: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ()
    """Module names; empty: the attention projections, found by architecture."""
    pack_tokens: int = 512
    """Length of a pack."""
    packs_per_step: int = 4
    demonstrations: float = 0.0
    """Share of the dialogues whose questions carry one to `demonstrations_most` of them."""
    demonstrations_most: int = 3
    encoder: str = ""
    """Folder with an exported sentence encoder, for demonstrations: `python -m export encoder`."""
    bank_per_label: int = 200
    """Demonstrations of each label in a training bank; the bank is balanced over labels."""
    same_label: bool = True
    """Demonstrate with the gold label only. The paper does, and measures a gain from it."""
    later_turns: float = 0.0
    """Share of the dialogues read with `later_window` later turns in view (not in the paper)."""
    later_window: int = 4
    label_smoothing: float = 0.0
    class_balance: float = 0.0
    """Class weights: (label frequency) ** -class_balance, mean 1; 0 is none."""
    average: float = 0.0
    """Decay of the moving average of the weights that is evaluated and kept; 0 is none."""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise UsageError(f"recipe: method is {self.method!r}: choose lora or full")
        if not self.train:
            raise UsageError("recipe: no training data: add a [[train]] table")
        for task in self.tasks:
            if task not in ("emotion", "impact"):
                raise UsageError(f"recipe: no task {task!r}: choose from emotion, impact")
        template(self.template)
        if self.demonstrations and not self.encoder:
            raise UsageError("recipe: demonstrations need an encoder: name its folder")
        for source in (*self.train, *self.valid):
            label_set(source.labels)
            if not 0 < source.fraction <= 1:
                raise UsageError(f"recipe: fraction of {source.path} must be in (0, 1]")
        for name in ("epochs", "pack_tokens", "packs_per_step", "lora_rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"recipe: {name} must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as written beside the adapter."""
        return dataclasses.asdict(self)


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe file; paths in it are relative to its folder.

    Raises:
        UsageError: unreadable, unknown keys, or values out of range.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe: {error}") from error
    for key in ("train", "valid"):
        values[key] = tuple(
            _source(path, table) for table in values.get(key, ()) if isinstance(table, Mapping)
        )
    if "window" in values:
        values["window"] = _build(path, Window, values["window"])
    for key in ("base", "encoder"):
        if key in values and (path.parent / values[key]).exists():
            values[key] = str(path.parent / values[key])
    for key in ("tasks", "betas", "lora_targets"):
        if key in values:
            values[key] = tuple(values[key])
    values.update({key: value for key, value in overrides.items() if value is not None})
    recipe: Recipe = _build(path, Recipe, values)
    return recipe


def _source(path: Path, table: Mapping[str, Any]) -> Source:
    values = dict(table)
    if "path" in values:
        values["path"] = str(path.parent / values["path"])
    source: Source = _build(path, Source, values)
    return source


def _build(path: Path, kind: Any, values: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(
            f"{path}: unknown key {unknown[0]!r} for {kind.__name__.lower()}: "
            f"it takes {', '.join(sorted(known))}"
        )
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{path}: {error}") from error
