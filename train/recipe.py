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
    leave_out: tuple[int, int] | None = None
    """(k, n): leave out every n-th dialogue, from the k-th (from 0) on: a fold."""
    soft: float = 0.0
    """Share of an utterance's `scores` (as `python -m train teach` writes them) in what is learnt;
    the rest is its `label`'s. At 1 the labels are not read: they may be another set's."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"recipe: fraction of {self.path} must be in (0, 1]")
        if not 0 <= self.soft <= 1:
            raise UsageError(f"recipe: soft of {self.path} must be in [0, 1]")
        if self.leave_out is not None:
            fold, folds = self.leave_out
            if not 0 <= fold < folds:
                raise UsageError(f"recipe: leave_out of {self.path} must be [k, n], k below n")

    def left_out(self, number: int) -> bool:
        """Whether the number-th dialogue of the file (from 0) is left out."""
        return self.leave_out is not None and number % self.leave_out[1] == self.leave_out[0]


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
    dropout: float | None = None
    """Dropout of hidden states; None: what the base's own config says."""
    attention_dropout: float | None = None
    """Dropout of attention weights, likewise."""
    token_dropout: float = 0.0
    """Share of what people say that is left out, token by token, each time it is drawn."""
    exclude_overlap: int = 0
    """Leave out training dialogues that share a line of at least this many letters with a
    validation dataset (series are cut differently by different datasets); 0 keeps all."""
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
        for name in ("dropout", "attention_dropout", "token_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"recipe: {name} must be in [0, 1)")
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
    for key in ("base", "encoder"):
        if key in values and (path.parent / values[key]).exists():
            values[key] = str(path.parent / values[key])
    for table in (*values.get("train", ()), *values.get("valid", ())):
        if isinstance(table, dict) and "path" in table:
            table["path"] = str(path.parent / table["path"])
    values.update({key: value for key, value in overrides.items() if value is not None})
    return recipe_from(path, values)


def recipe_from(path: Path, values: Mapping[str, Any]) -> Recipe:
    """The recipe of plain values, as TOML or `Recipe.to_json` give them; `path` is for messages.

    Raises:
        UsageError: unknown keys, or values out of range.
    """
    values = dict(values)
    for key in ("train", "valid"):
        tables = values.get(key, ())
        if not all(isinstance(table, Mapping) for table in tables):
            raise UsageError(f"{path}: {key} is not a list of tables: write [[{key}]]")
        values[key] = tuple(_source(path, table) for table in tables)
    if "window" in values:
        values["window"] = _build(path, Window, values["window"])
    for key in ("tasks", "betas", "lora_targets"):
        if key in values:
            values[key] = tuple(values[key])
    recipe: Recipe = _build(path, Recipe, values)
    return recipe


def _source(path: Path, table: Mapping[str, Any]) -> Source:
    values = dict(table)
    if values.get("leave_out") is not None:
        values["leave_out"] = tuple(values["leave_out"])
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
