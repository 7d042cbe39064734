"""Label sets: which emotions there are, under which names. The sets themselves are data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ercbatch.checked import printable_string
from ercbatch.errors import UsageError

_MAX_LABELS, _MAX_ALIASES = 1000, 10_000


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A named, ordered set of labels, and other spellings (`aliases`) of them.

    Raises:
        UsageError: fewer than two labels or too many, a blank one, two that differ in case only,
            or an alias of a label that is not in the set.
    """

    name: str
    labels: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        folded = {label.strip().casefold() for label in self.labels} - {""}
        if len(folded) != len(self.labels) or len(self.labels) < 2:
            raise UsageError(
                f"label set {self.name!r}: needs two or more labels, none blank, all different"
            )
        if len(self.labels) > _MAX_LABELS or len(self.aliases) > _MAX_ALIASES:
            raise UsageError(
                f"label set {self.name!r}: over {_MAX_LABELS:,} labels, or {_MAX_ALIASES:,} aliases"
            )
        known = frozenset(self.labels)
        for alias, label in self.aliases.items():
            if label not in known:
                raise UsageError(
                    f"label set {self.name!r}: alias {alias!r} stands for {label!r}, "
                    "which is not one of its labels"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def index(self, label: str) -> int:
        """The place of a canonical label in the set."""
        return self.labels.index(label)

    def canonical(self, label: str) -> str | None:
        """The set's own name for a label in any case or known spelling; None if it has none."""
        folded = label.strip().casefold()
        for name in self.labels:
            if name.casefold() == folded:
                return name
        return next(
            (target for alias, target in self.aliases.items() if alias.casefold() == folded), None
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `bundle.json` and label-set files hold them."""
        return {"name": self.name, "labels": list(self.labels), "aliases": dict(self.aliases)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LabelSet:
        """Read what `to_json` wrote.

        Raises:
            UsageError: a key is missing or of the wrong type.
        """
        try:
            labels, aliases = value["labels"], value.get("aliases", {})
            if not isinstance(labels, list) or not isinstance(aliases, Mapping):
                raise TypeError("labels is a list of strings, aliases maps strings to strings")
            for text in (value["name"], *labels, *aliases, *aliases.values()):
                printable_string(text)
            return cls(value["name"], tuple(labels), dict(aliases))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"not a label set (an object with name, labels, aliases): {error}"
            ) from error


@cache
def _data() -> Mapping[str, Any]:
    text = resources.files("ercbatch").joinpath("data/label_sets.json").read_text("utf-8")
    data: Mapping[str, Any] = json.loads(text)
    return data


def label_set_names() -> tuple[str, ...]:
    """The names of the built-in label sets."""
    return tuple(_data()["sets"])


@cache
def label_set(name: str) -> LabelSet:
    """A built-in label set.

    Raises:
        UsageError: there is none of that name.
    """
    sets = _data()["sets"]
    if name not in sets:
        raise UsageError(f"no label set {name!r}: choose from {', '.join(sets)}")
    return LabelSet.from_json({"name": name, **sets[name]})


def find_label_set(name: str) -> LabelSet:
    """A built-in label set by its name, or the one in a JSON file (what `to_json` gives).

    Raises:
        UsageError: neither, or a file that does not hold a label set.
    """
    path = Path(name)
    if path.suffix != ".json":
        return label_set(name)
    return LabelSet.from_json(_read_json(path, "label set"))


def mapping_to(to: LabelSet, written: LabelSet, path: str = "") -> Mapping[str, str | None]:
    """Each label of `written` -> the label of `to` that it counts as, None for none.

    The mapping is that of a JSON file (label set name -> its label -> label or null), or the
    built-in one to the unified set.

    Raises:
        UsageError: a label of `written` is not mapped, or to a label that `to` doesn't have.
    """
    where = path or "the built-in mapping to the unified label set"
    tables = _read_json(Path(path), "mapping") if path else unified_mapping()
    table = tables.get(written.name)
    if not isinstance(table, Mapping):
        raise UsageError(f"{where}: has nothing for the label set {written.name!r}: add it")
    mapping: dict[str, str | None] = {}
    for label in written.labels:
        if label not in table:
            raise UsageError(f"{where}: {written.name!r} lacks the label {label!r}: add it")
        target = table[label]
        mapping[label] = None if target is None else to.canonical(str(target))
        if target is not None and mapping[label] is None:
            raise UsageError(
                f"{where}: {label!r} of {written.name!r} is mapped to {target!r}, which is not in "
                f"the label set {to.name!r}: {', '.join(to.labels)}"
            )
    return mapping


def _read_json(path: Path, what: str) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a {what}: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a {what} is a JSON object")
    return value


def unified_mapping() -> Mapping[str, Mapping[str, str]]:
    """Label set name -> its label -> the unified label (InstructERC's Feeling Wheel table).

    frustrated -> fear and surprise -> powerful are the paper's own choice and doubtful.
    """
    mapping: Mapping[str, Mapping[str, str]] = _data()["unified_mapping"]
    return mapping
