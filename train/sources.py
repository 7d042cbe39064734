"""Sources: the datasets that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ercbatch.errors import UsageError
from ercbatch.labels import LabelSet, find_label_set, mapping_to


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset: a dialogue JSONL with `label`, and the label set that its labels belong to."""

    path: str
    labels: str
    """The label set to learn: a built-in name, or a JSON file with name, labels and aliases. A file
    without any label teaches who speaks, and nothing else."""
    written: str = ""
    """The label set that the file's labels belong to, where it is another one: they are mapped."""
    mapping: str = ""
    """JSON file for that: label set name -> its label -> the label to learn, or null to leave the
    utterance out. Empty: the built-in mapping to `unified`."""
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
        if self.mapping and not self.written:
            raise UsageError(
                f"recipe: {self.path} has a mapping: name the label set it is `written` in"
            )
        if not 0 <= self.soft <= 1:
            raise UsageError(f"recipe: soft of {self.path} must be in [0, 1]")
        if self.leave_out is not None:
            fold, folds = self.leave_out
            if not 0 <= fold < folds:
                raise UsageError(f"recipe: leave_out of {self.path} must be [k, n], k below n")

    def label_set(self) -> LabelSet:
        """The label set to learn."""
        return find_label_set(self.labels)

    def learnt(self) -> Mapping[str, str | None] | None:
        """The file's label -> the label to learn; None where they are the same.

        Raises:
            UsageError: no such mapping, or one that leads out of the label set.
        """
        if not self.written or (self.written == self.labels and not self.mapping):
            return None
        return mapping_to(self.label_set(), find_label_set(self.written), self.mapping)

    def left_out(self, number: int) -> bool:
        """Whether the number-th dialogue of the file (from 0) is left out."""
        return self.leave_out is not None and number % self.leave_out[1] == self.leave_out[0]


def source_names(sources: Sequence[Source]) -> list[str]:
    """What to call datasets: as short an end of their paths as tells them apart.

    Raises:
        UsageError: two are the same file under the same label set.
    """
    paths = [Path(source.path).resolve() for source in sources]
    longest = max((len(path.parts) for path in paths), default=1)
    for length in range(1, 1 + longest):
        names = ["/".join(path.with_suffix("").parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    names = [f"{path}, {source.labels}" for path, source in zip(paths, sources, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"recipe: {name} is named twice: name it once")
    return names
