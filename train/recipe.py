"""A recipe: everything that a training run depends on, as a TOML file.

Every default is the paper's (arXiv 2309.11911, section 4), except where a comment says why not.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ercbatch.errors import UsageError
from ercbatch.prompts.templates import TEMPLATE_VERSION, Template, template
from ercbatch.prompts.tree import Task, Window
from train.sources import Source

_DATA = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to train, on what, and how."""

    base: str
    """A Hugging Face checkpoint folder or hub id."""
    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    """Choose the epoch that is kept."""
    test: tuple[Source, ...] = ()
    """Measured once, at the end, with the epoch that is kept."""
    method: str = "lora"
    """`lora` or `full`."""
    template: str = "paper"
    template_version: int = TEMPLATE_VERSION
    window: Window = field(default_factory=Window)
    """The paper's moves with every turn (stride 1); in blocks, prompts share the turns they see."""
    tasks: tuple[str, ...] = ("speaker", "emotion", "impact")
    """Any of them together."""
    speaker_epochs: int = 3
    """Epochs of a first stage on speaker identification alone; 0 mixes it in with the others."""
    epochs: int = 6
    """Epochs of the other tasks. The paper has 8 with demonstrations."""
    alpha: float = 0.1
    """Weight of the emotion-impact loss."""
    speaker_weight: float = 1.0
    """Weight of the speaker loss where it is mixed in."""
    learning_rate: float | None = None
    """At its highest, in each stage. None: 2e-4 for LoRA, 2e-5 for all parameters."""
    weight_decay: float = 0.0
    warmup: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    lora_rank: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ()
    """Module names; empty: the attention projections, found by architecture."""
    load: str = "full"
    """Weights of a base under LoRA: `full` as they are, `nf4` or `int8` through bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, in much less memory."""
    pack_tokens: int = 512
    """Length of a pack."""
    packs_per_step: int = 4
    demonstrations: float = 0.0
    """Share of the dialogues whose questions carry one to `demonstrations_most` of them."""
    demonstrations_most: int = 3
    demonstrations_shown: int = 0
    """Demonstrations that each question shows in validation, of whichever labels."""
    encoder: str = ""
    """What finds demonstrations: a folder that `python -m export encoder` wrote, or a bundle."""
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
    transcribed: float = 0.0
    """Share of the dialogues read as speech recognition would write them (`train.noise`)."""
    hurried: float = 0.0
    """Share of the dialogues read as somebody in a hurry would type them (`train.noise`)."""
    exclude_overlap: int = 0
    """Leave out training dialogues that share a line of at least this many letters with a
    validation or test dataset (series are cut differently by different datasets); 0 keeps all."""
    label_smoothing: float = 0.0
    class_balance: float = 0.0
    """Class weights: (label frequency) ** -class_balance, mean 1; 0 is none."""
    fraction: float = 1.0
    """Share of all training dialogues that the run has, the same in each epoch (data scaling)."""
    mix: str = "ratio"
    """How that share is taken of several datasets: `ratio` takes it of each, `total` of all
    merged."""
    train_sample: int = 0
    """Training dialogues that are evaluated after each epoch beside the validation datasets."""
    average: float = 0.0
    """Decay of the moving average of the weights that is evaluated and kept; 0 is none."""
    seed: int = 42

    def __post_init__(self) -> None:
        _choose("method", self.method, ("lora", "full"))
        _choose("load", self.load, ("full", "nf4", "int8"))
        _choose("mix", self.mix, ("ratio", "total"))
        if self.method == "full" and self.load != "full":
            raise UsageError(f"recipe: load {self.load!r} is for LoRA: its weights are not trained")
        if not self.train:
            raise UsageError("recipe: no training data: add a [[train]] table")
        if not self.tasks:
            raise UsageError("recipe: no tasks: name some of speaker, emotion, impact")
        for task in self.tasks:
            _choose("a task", task, tuple(t.value for t in Task))
        template(self.template, self.template_version)
        if (self.demonstrations or self.demonstrations_shown) and not self.encoder:
            raise UsageError("recipe: demonstrations need an encoder: name its folder, or a bundle")
        for source in (*self.train, *self.valid, *self.test):
            source.label_set()
        if self.transcribed + self.hurried > 1:
            raise UsageError("recipe: transcribed and hurried are shares: at most 1 together")
        if self.window.future:
            raise UsageError(
                "recipe: window.future is for labelling: later_turns and later_window train on them"
            )
        for allowed, names in _RANGES.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not _within(value, allowed):
                    raise UsageError(f"recipe: {name} must be in {allowed}, not {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"recipe: betas must be in [0, 1), not {self.betas}")
        if self.learning_rate is None:
            rate = 2e-4 if self.method == "lora" else 2e-5
            object.__setattr__(self, "learning_rate", rate)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run: one, or speaker identification first and then the rest."""
        tasks = tuple(task for task in Task if task.value in self.tasks)
        other_tasks = tuple(task for task in tasks if task is not Task.SPEAKER)
        weights = {Task.EMOTION: 1.0, Task.IMPACT: self.alpha, Task.SPEAKER: self.speaker_weight}
        if other_tasks == tasks or not other_tasks or not self.speaker_epochs:
            single_weights = dict.fromkeys(tasks, 1.0) if len(tasks) == 1 else None
            epochs = self.epochs if other_tasks else self.speaker_epochs or self.epochs
            return (Stage(tasks, epochs, single_weights or weights),)
        first = Stage((Task.SPEAKER,), self.speaker_epochs, {Task.SPEAKER: 1.0})
        return first, Stage(other_tasks, self.epochs, weights)

    @property
    def wording(self) -> Template:
        """The prompt template."""
        return template(self.template, self.template_version)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as written beside the adapter."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Stage:
    """Epochs with the same tasks, under a learning rate that warms up and decays over them.

    The loss is the sum of the tasks' losses, each times its weight.
    """

    tasks: tuple[Task, ...]
    epochs: int
    weights: Mapping[Task, float]

    def __str__(self) -> str:
        return " + ".join(task.value for task in self.tasks)


_RANGES = {
    "[0, 1)": (
        *("dropout", "attention_dropout", "token_dropout", "lora_dropout", "label_smoothing"),
        "average",
    ),
    "[0, 1]": ("warmup", "demonstrations", "later_turns", "transcribed", "hurried"),
    "(0, 1]": ("fraction",),
    "(0, inf)": ("learning_rate", "clip"),
    "[0, inf)": (
        *("alpha", "speaker_weight", "weight_decay", "class_balance", "exclude_overlap"),
        *("speaker_epochs", "train_sample", "demonstrations_shown", "later_window"),
    ),
    "[0, 4294967295]": ("seed",),
    "[1, inf)": (
        *("epochs", "pack_tokens", "packs_per_step", "lora_rank", "lora_alpha"),
        *("demonstrations_most", "bank_per_label"),
    ),
}
"""Interval -> the settings that must lie in it."""


def _within(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low < value or (interval[0] == "[" and low == value)) and (
        value < high or (interval[-1] == "]" and high == value)
    )


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"recipe: {name} is {value!r}: choose from {', '.join(choices)}")


def read_recipe(path: Path, settings: Sequence[str] = (), **overrides: Any) -> Recipe:
    """Read a recipe file; paths in it are relative to its folder.

    `settings` are `KEY=VALUE` in TOML, `window.turns=5` say; a VALUE that is none is a string.
    They and `overrides` (None: not given) stand in place of what the file says.

    Raises:
        UsageError: unreadable, unknown keys, or values out of range.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe: {error}") from error
    for key in ("base", "encoder"):
        name = values.get(key)
        if isinstance(name, str) and name and (path.parent / name).exists():
            values[key] = os.path.join(path.parent, name)  # "./mini" is not "mini"
    _check_tables(path, values)
    for table in (table for kind in _DATA for table in values.get(kind, ())):
        for key in ("path", "labels", "written", "mapping"):
            if table.get(key) and isinstance(table[key], str):
                candidate = path.parent / table[key]
                # A label set is a built-in name or a file; data is always a file.
                if key in ("path", "mapping") or candidate.is_file():
                    table[key] = str(candidate)
    for setting in settings:
        for key, value in _setting(setting).items():
            inner = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **value} if inner else value
    values.update({key: value for key, value in overrides.items() if value is not None})
    return recipe_from(path, values)


def _setting(text: str) -> dict[str, Any]:
    """The values of one `KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not (equals and key.strip()):
        raise UsageError(f"--set {text}: give KEY=VALUE, as in the recipe")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        pass
    try:
        return tomllib.loads(f"{key} = {json.dumps(value.strip(), ensure_ascii=False)}")
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--set {text}: give KEY=VALUE, as in the recipe: {error}") from error


def recipe_from(path: Path, values: Mapping[str, Any]) -> Recipe:
    """The recipe of plain values, as TOML or `Recipe.to_json` give them; `path` is for messages.

    Raises:
        UsageError: unknown keys, or values of another type or out of range.
    """
    values = {"train": (), **values}  # so that what is missing is told in our words
    _check_tables(path, values)
    for table in (table for kind in _DATA for table in values.get(kind, ())):
        _check_keys(path, Source, table)
    _check_keys(path, Window, values.get("window", {}))
    _check_keys(path, Recipe, values)
    try:
        # As JSON, so that lists are tuples while true is no number and "no" no truth value.
        text = json.dumps(values, default=str)
        return TypeAdapter(Recipe).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: {key}: {first['msg']}") from error


_TABLES = {Recipe: "a recipe", Source: "[[train]], [[valid]] or [[test]]", Window: "[window]"}


def _check_tables(path: Path, values: Mapping[str, Any]) -> None:
    for key in _DATA:
        tables = values.get(key, ())
        if not isinstance(tables, (list, tuple)) or not all(isinstance(t, dict) for t in tables):
            raise UsageError(f"{path}: {key} is not a list of tables: write [[{key}]]")
    if not isinstance(values.get("window", {}), dict):
        raise UsageError(f"{path}: window is not a table: write [window]")


def _check_keys(path: Path, kind: Any, values: Mapping[str, Any]) -> None:
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in sorted(set(values) - fields):
        matches = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean {matches[0]}?" if matches else f"it takes {', '.join(sorted(fields))}"
        raise UsageError(f"{path}: unknown key {key!r} for {_TABLES[kind]}: {hint}")
