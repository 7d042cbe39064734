"""What the bytes of an output depend on: a run that is resumed must have the same."""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ercbatch.bundle.manifest import MANIFEST as MANIFEST
from ercbatch.digests import file_sha256
from ercbatch.errors import InputError, UsageError
from ercbatch.inputs.files import decode_name
from ercbatch.labeler import Labeler
from ercbatch.runs.journal import FORMAT
from ercbatch.runs.output import Files
from ercbatch.runs.preflight import RunOptions, can_reread


class InputSnapshot:
    """The inputs as they are now; those that can be read again are read for their digests."""

    def __init__(self, names: Sequence[str]) -> None:
        self.description: list[dict[str, str | int]] = []
        self._statuses: list[tuple[str, os.stat_result]] = []
        for name in names:
            entry: dict[str, str | int] = {"file": decode_name(name)}
            if can_reread([name]):
                try:
                    with open(name, "rb") as file:
                        status = os.fstat(file.fileno())
                        entry["bytes"] = status.st_size
                        entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise InputError(
                        f"{decode_name(name)}: cannot be read ({error.strerror}): check its rights"
                    ) from error
                self._statuses.append((name, status))
            self.description.append(entry)

    @property
    def rereadable(self) -> bool:
        """Whether all of them can be read again."""
        return len(self._statuses) == len(self.description)

    def check_unchanged(self) -> None:
        """See that they are still the same.

        Raises:
            InputError: one is not.
        """
        for name, status in self._statuses:
            try:
                current = os.stat(name)
            except OSError:
                continue  # it was there while it was read
            if (current.st_size, current.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                raise InputError(
                    f"{decode_name(name)}: it was changed while it was labelled: label it anew "
                    "with --force"
                )


def identity_of(
    labeler: Labeler, options: RunOptions, files: Files, inputs: InputSnapshot
) -> dict[str, Any]:
    """What the bytes of an output depend on: a run that goes on has the same."""
    bundle = labeler.bundle
    return {
        "journal": FORMAT,
        **labeler.releases(),
        "inputs": inputs.description,
        "bundle": {
            "name": bundle.info.name,
            "sha256": file_sha256(bundle.folder / MANIFEST),
        },
        "options": {**labeler.options(), **asdict(options.limits)},
        "rejects": decode_name(str(files.rejects)),
    }


def check_same(recorded: dict[str, Any], current: dict[str, Any], files: Files) -> None:
    """Check that a run may resume another one.

    Raises:
        UsageError: they differ; the message says in what.
    """
    differences = find_differences(recorded, current)
    if differences:
        raise UsageError(
            f"{files.part} is of another run ({'; '.join(differences)}): run it as it was, or "
            "begin anew with --force"
        )


def find_differences(
    recorded: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """What differs between two such values: `name: old, now new` for each."""
    differences: list[str] = []
    for key in [*recorded, *(key for key in current if key not in recorded)]:
        old, new = recorded.get(key), current.get(key)
        name = f"{prefix}{key}"
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            names = [_entry_name(place, value) for place, value in enumerate(old, start=1)]
            old, new = dict(zip(names, old, strict=True)), dict(zip(names, new, strict=True))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += find_differences(old, new, f"{name}.")
        elif old != new:
            differences.append(f"{name}: {_format_value(old)}, now {_format_value(new)}")
    return differences


def _entry_name(place: int, value: object) -> str:
    file = value.get("file") if isinstance(value, Mapping) else None
    return f"{place} ({file})" if file else str(place)


def _format_value(value: object) -> str:
    if value is None:
        return "missing"
    # Lists may be long, or lie deep inside each other.
    return str(value) if isinstance(value, str | int | float) else reprlib.repr(value)
