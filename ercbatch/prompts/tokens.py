"""Segments of text to token ids, one segment at a time, with no way for text to become control.

Every piece of a prompt is tokenized alone and the ids are concatenated. So two prompts that share
a piece share its ids, token for token, whatever stands behind it; and what a speaker says can
neither merge with the template's tokens nor turn into one of the tokenizer's special tokens.
"""

from __future__ import annotations

import base64
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import orjson
from tokenizers import Tokenizer

from ercbatch.checked import INT32_MAX
from ercbatch.errors import BundleError, foreign_errors

CHARACTERS_PER_TOKEN = 32
"""Characters read for each token that counts, so that a text of megabytes need not be tokenized
whole. Tokens of ordinary text rarely cover more."""

_LARGEST_FILE = 128 << 20
"""Bytes of a `tokenizer.json`; 34 MB is the largest known (Gemma 3's, of 262,144 tokens)."""
_LONGEST_STRING = 4096
"""Characters of a token or a pattern: the library compiles longer ones too, but for minutes."""
_MAX_GROWTH = 64
"""Characters that its normalizers may put in the place of one."""
_MAX_STEPS = 64
_CHARACTER_MAP = "precompiled_charsmap"
"""SentencePiece's normalization table, the one string that is long: hundreds of thousands."""


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The ids that a template's control marks stand for with one tokenizer.

    `start` opens a trunk, `separator` stands between its parts, and the answer is read at the
    last of `answer`. A tokenizer without such tokens has none (`start`, `answer`), or a line
    break (`separator`).
    """

    start: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    def to_json(self) -> dict[str, list[int]]:
        """The three lists of ids, as `bundle.json` holds them."""
        return {
            "start": list(self.start),
            "separator": list(self.separator),
            "answer": list(self.answer),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[int]]) -> ControlTokens:
        """Read what `to_json` wrote."""
        return cls(tuple(value["start"]), tuple(value["separator"]), tuple(value["answer"]))


def control_tokens(tokenizer: Tokenizer, special: Mapping[str, str]) -> ControlTokens:
    """The control tokens of a tokenizer, from its Hugging Face special-token map.

    `special` maps names such as `bos_token` and `mask_token` to token texts.
    """

    def ids(*names: str) -> tuple[int, ...]:
        for name in names:
            token = tokenizer.token_to_id(special[name]) if name in special else None
            if token is not None:
                return (token,)
        return ()

    line_break = tuple(tokenizer.encode("\n", add_special_tokens=False).ids)
    return ControlTokens(
        start=ids("bos_token", "cls_token"),
        separator=ids("sep_token") or line_break,
        answer=ids("mask_token"),
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        BundleError: it is no tokenizer, or one that `check_tokenizer` refuses.
    """
    data = check_tokenizer(path)
    with foreign_errors(BundleError, f"{path}: not a tokenizer", "get it again"):
        return Tokenizer.from_buffer(data)


def check_tokenizer(path: Path) -> bytes:
    """The content of a `tokenizer.json` whose size and strings the library can take.

    Raises:
        BundleError: it is too large, a string in it is too long, or texts would grow too much.
        FileNotFoundError: there is none.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
        raise BundleError(f"{path}: no file, or over {_LARGEST_FILE:,} bytes: do not use it")
    data = path.read_bytes()
    with foreign_errors(BundleError, f"{path}: not a tokenizer", "get it again"):
        value = orjson.loads(data)
        longest = _longest_string(value)
        steps = list(_steps((value.get("normalizer"), value.get("pre_tokenizer"))))
        growth = math.prod(map(_growth, steps[:_MAX_STEPS]))
    if longest > _LONGEST_STRING:
        raise BundleError(
            f"{path}: a string in it is over {_LONGEST_STRING:,} characters long: do not use it"
        )
    if growth > _MAX_GROWTH or len(steps) > _MAX_STEPS:
        raise BundleError(
            f"{path}: it makes up to {growth:,} characters of one, in {len(steps)} steps: do not "
            "use it"
        )
    return data


def _steps(value: object) -> Iterator[Mapping[str, Any]]:
    """The objects anywhere in a JSON value that have a type."""
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, dict):
            if "type" in inner:
                yield inner
            stack += inner.values()
        elif isinstance(inner, list | tuple):
            stack += inner


def _growth(step: Mapping[str, Any]) -> int:
    """How many characters a step of a tokenizer makes of one."""
    match step.get("type"):
        case "Replace":
            return max(1, len(step.get("content") or ""))
        case "Prepend":
            return 1 + len(step.get("prepend") or "")
        case "ByteLevel":  # its own letters are two bytes each
            return 2
        case "Precompiled":
            table = base64.b64decode(step.get(_CHARACTER_MAP) or "")
            # The size of a trie, the trie, and what it points to: texts that end with NUL.
            texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
            return max(1, *(len(text.decode("utf-8", "replace")) for text in texts))
    return 1


def _longest_string(value: object) -> int:
    """Characters of the longest key or string anywhere in a JSON value, but for character maps."""
    longest, stack = 0, [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, str):
            longest = max(longest, len(inner))
        elif isinstance(inner, dict):
            longest = max([longest, *map(len, inner)])
            # A vocabulary's numbers are most of a tokenizer.
            stack += [v for k, v in inner.items() if k != _CHARACTER_MAP and type(v) is not int]
        elif isinstance(inner, list):
            stack += inner
    return longest


class SegmentTokenizer:
    """A `tokenizers.Tokenizer` that encodes segments without special tokens."""

    def __init__(
        self, tokenizer: Tokenizer, controls: ControlTokens, source: str = "tokenizer.json"
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Text that looks like a special token is split like any other text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._source = source
        self.controls = controls
        # Added tokens that are not special (`<tool_call>` in some chat models) are still matched
        # in text; their ids never leave `encode_content`. Text may yield the unknown token.
        unknown_token = getattr(tokenizer.model, "unk_token", None)
        self._forbidden_ids = frozenset(
            id_
            for id_, token in tokenizer.get_added_tokens_decoder().items()
            if token.content != unknown_token
        )
        self.encode_template = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def from_file(cls, path: Path, controls: ControlTokens) -> SegmentTokenizer:
        """Load a `tokenizer.json`.

        Raises:
            BundleError: see `load_tokenizer` and `check_tokenizer`.
        """
        return cls(load_tokenizer(path), controls, str(path))

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def _encode(self, text: str) -> tuple[int, ...]:
        with foreign_errors(BundleError, f"{self._source}: fails on a text", "get it again"):
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if ids and max(ids) > INT32_MAX:
            raise BundleError(
                f"{self._source}: a token has the id {max(ids)}, which no model has: get it again"
            )
        return ids

    def encode_content(self, text: str, limit: int, *, both_ends: bool = False) -> tuple[int, ...]:
        """Ids of a speaker's text, at most `limit` of them, none a control token.

        A longer text loses its end, or with `both_ends` its middle.
        """
        text = _truncate(text, limit * CHARACTERS_PER_TOKEN, both_ends)
        ids = tuple(id_ for id_ in self._encode(text) if id_ not in self._forbidden_ids)
        return _truncate(ids, limit, both_ends)


_Sequence = TypeVar("_Sequence", str, tuple[int, ...])


def _truncate(sequence: _Sequence, limit: int, both_ends: bool) -> _Sequence:
    if len(sequence) <= limit:
        return sequence
    end = limit // 2 if both_ends else 0
    return sequence[: limit - end] + sequence[len(sequence) - end :]
