"""ercbatch: an emotion for every utterance of a conversation, in bulk, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ercbatch.errors import (
    BundleError,
    ErcbatchError,
    InputError,
    MissingExtraError,
    RecordError,
    UsageError,
)

if TYPE_CHECKING:
    from ercbatch.dialogues import Dialogue, LabeledDialogue, Utterance, UtteranceLabel
    from ercbatch.labeler import Labeler

__all__ = [
    "BundleError",
    "Dialogue",
    "ErcbatchError",
    "InputError",
    "LabeledDialogue",
    "Labeler",
    "MissingExtraError",
    "RecordError",
    "UsageError",
    "Utterance",
    "UtteranceLabel",
]

_LAZY = {
    "Dialogue": "ercbatch.dialogues",
    "LabeledDialogue": "ercbatch.dialogues",
    "Utterance": "ercbatch.dialogues",
    "UtteranceLabel": "ercbatch.dialogues",
    "Labeler": "ercbatch.labeler",
}


def __getattr__(name: str) -> Any:
    # The command line imports this package for its errors; the runtime comes when asked for.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
