"""What the bytes of an output depend on: a run that is resumed must have the same."""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ercbatch.bundle.manifest import MANIFEST as BUNDLE_MANIFEST
from ercbatch.digests import file_sha256
from ercbatch.errors import InputError, UsageError
from ercbatch.inputs.files import shown
from ercbatch.labeler import Labeler
from ercbatch.runs.journal import FORMAT
from ercbatch.runs.output import Files
from ercbatch.runs.preflight import RunOptions, can_resume


class Inputs:
    """What the inputs are; those that can be read again are read for their digests."""

    def __init__(self, names: Sequence[str]) -> None:
        self.description: list[dict[str, str | int]] = []
        self._seen: list[tuple[str, os.stat_result]] = []
        for name in names:
            entry: dict[str, str | int] = {"file": shown(name)}
            if can_resume([name]):
                try:
                    with open(name, "rb") as file:
                        seen = os.fstat(file.fileno())
                        entry["bytes"] = seen.st_size
                        entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise InputError(
                        f"{shown(name)}: cannot be read ({error.strerror}): check its rights"
                    ) from error
                self._seen.append((name, seen))
            self.description.append(entry)

    def check(self) -> None:
        """See that they are still the same.

        Raises:
            InputError: one is not.
        """
        for name, seen in self._seen:
            try:
                now = os.stat(name)
            except OSError:
                continue  # it was there while it was read
            if (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
                raise InputError(
                    f"{shown(name)}: it was changed while it was labelled: label it anew with "
                    "--force"
                )


def identity_of(
    labeler: Labeler, options: RunOptions, files: Files, inputs: Inputs
) -> dict[str, Any]:
    """What the bytes of an output depend on: a run that goes on has the same."""
    bundle = labeler.bundle
    return {
        "journal": FORMAT,
        **labeler.releases(),
        "inputs": inputs.description,
        "bundle": {
            "name": bundle.info.name,
            "sha256": file_sha256(bundle.folder / BUNDLE_MANIFEST),
        },
        "options": {**labeler.options(), **asdict(options.limits)},
        "rejects": shown(str(files.rejects)),
    }


def check_same(was: dict[str, Any], now: dict[str, Any], files: Files) -> None:
    """Check that a run may resume another one.

    Raises:
        UsageError: they differ; the message says in what.
    """
    found = differences(was, now)
    if found:
        raise UsageError(
            f"{files.part} is of another run ({'; '.join(found)}): run it as it was, or begin anew "
            "with --force"
        )


def differences(was: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """What differs between two such values: `name: old, now new` for each."""
    found: list[str] = []
    for key in [*was, *(key for key in now if key not in was)]:
        old, new = was.get(key), now.get(key)
        name = f"{under}{key}"
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            names = [_entry(place, value) for place, value in enumerate(old, start=1)]
            old, new = dict(zip(names, old, strict=True)), dict(zip(names, new, strict=True))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {_said(old)}, now {_said(new)}")
    return found


def _entry(place: int, value: object) -> str:
    file = value.get("file") if isinstance(value, Mapping) else None
    return f"{place} ({file})" if file else str(place)


def _said(value: object) -> str:
    if value is None:
        return "missing"
    # Lists may be long, or lie deep inside each other.
    return str(value) if isinstance(value, str | int | float) else reprlib.repr(value)
