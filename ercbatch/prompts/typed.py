"""Text as people type it, in words that a model knows.

Models are trained on prose. Their vocabularies have no emoji, or one token for all of them, and
what a chat or a mail adds to the words (links, mentions, quoted mail) only takes room in a prompt.
Each kind has one rule here. `ercbatch.prompts.templates` applies them from version 2 of the
templates on.
"""

from __future__ import annotations

import re
from typing import Any

_FACES = {
    "smiling face": ":) :-) =) :] ^^ ^_^ (:",
    "grinning face": ":D :-D =D",
    "face with tears of joy": "xD XD",
    "winking face": ";) ;-)",
    "face with tongue": ":P :-P :p :-p =P",
    "red heart": "<3",
    "broken heart": "</3",
    "frowning face": ":( :-( =( :[",
    "crying face": ":'( :’( ;(",
    "angry face": ">:( >:-(",
    "anguished face": "D:",
    "confused face": ":/ :-/ :\\ =/",
    "astonished face": ":O :-O :o :-o",
    "neutral face": ":| :-|",
    "expressionless face": "-_- -__-",
}
"""Name of an emoji -> the emoticons for it."""
_EMOTICONS = {emoticon: name for name, all_ in _FACES.items() for emoticon in all_.split()}
_LONGEST_FIRST = sorted(map(re.escape, _EMOTICONS), key=len, reverse=True)
# Between words or after one or its punctuation ("thanks:)"), but not in "3:0", "C:/x" or "a:(b".
_EMOTICON = re.compile(rf"(?<![^\s\w.,!?…])(?<!\d)(?:{'|'.join(_LONGEST_FIRST)})(?![\w/])")

_QUOTE = re.compile(r"(?:^.{1,200}\bwrote:[ \t]*\n)?(?:^[ \t]*>.*(?:\n|\Z))+", re.MULTILINE)
_LINK = re.compile(r"\b(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)\]]", re.IGNORECASE)
_ADDRESS = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,9}")
_MENTION = re.compile(r"(?<![\w@])@\w+")
_SHORT_CODE = re.compile(r"(?<!\w):([a-z][a-z_+-]{1,40}):(?!\w)")
_MAY_BE_EMOJI = re.compile(r"[\u203c-\u3299\U0001f000-\U0001faff]")
_SKIN_TONE = re.compile(r"_(?:medium-light|medium-dark|light|medium|dark)_skin_tone")
_EMOJI_ROW = re.compile(r"( :[^:\n]{2,80}: )\1{2,}")
_REPEATED = re.compile(r"([^\W\d_]|[!?])\1{2,}|([^\W\d_]{2})\2{2,}|\.{4,}", re.IGNORECASE)


def in_words(text: str) -> str:
    """The text with its emoji, links and the like written as words.

    - Quoted lines of a mail go, unless they are all there is.
    - A link becomes `link`, a mail address `address`, a mention `@user`.
    - Emoji, short codes and emoticons become the emoji's names between colons, `:party popper:`,
      without skin tones. Of a row of the same emoji two stay.
    - Of a letter, syllable, `!` or `?` that stands three times in a row or more, two stay
      (`noo`, `haha`). More than three dots become three.
    """
    body = _QUOTE.sub("", text) if ">" in text else text
    body = body if body.strip() else text
    body = _MENTION.sub("@user", _ADDRESS.sub("address", _LINK.sub("link", body)))
    body = _EMOTICON.sub(lambda match: _between_colons(_EMOTICONS[match[0]]), body)
    body = _SHORT_CODE.sub(lambda match: _between_colons(match[1]), body)
    if _MAY_BE_EMOJI.search(body):
        import emoji  # a tenth of a second, for the inputs that have any

        body = emoji.replace_emoji(body, _name)
    return _REPEATED.sub(_shorten, _EMOJI_ROW.sub(r"\1\1", body))


def _name(_emoji: str, data: dict[str, Any]) -> str:
    return _between_colons(_SKIN_TONE.sub("", data["en"].strip(":")))


def _between_colons(name: str) -> str:
    return f" :{name.replace('_', ' ')}: "


def _shorten(match: re.Match[str]) -> str:
    repeated = match[1] or match[2]
    return match[0][: 2 * len(repeated)] if repeated else "..."
