"""The state of an unfinished run: what `--resume` goes on from."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ercbatch.errors import InputError, UsageError

STATE = "state.pt"


def save_state(folder: Path, described: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state, whole or not at all; `described` says what it belongs to."""
    part = folder / f"{STATE}.part"
    with part.open("wb") as file:
        torch.save({**state, "described": json.dumps(described)}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / STATE)


def load_state(folder: Path, described: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state that `save_state` wrote; None where there is none.

    Raises:
        UsageError: it belongs to another recipe or other data.
        InputError: it cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = json.loads(state["described"])
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: cannot be read ({error}): start again with --force") from error
    changed = _difference(before, json.loads(json.dumps(described)))
    if changed:
        raise UsageError(
            f"{folder}: cannot go on: {changed} is not what the run began with. "
            "Undo the change, or start again with --force"
        )
    return state


def _difference(before: Any, now: Any, name: str = "") -> str:
    """The name of the first value that differs; empty where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            difference = _difference(
                before.get(key), now.get(key), f"{name}.{key}" if name else key
            )
            if difference:
                return difference
        return ""
    return "" if before == now else name
