"""Bundles: one folder that labels. Written complete or not at all, checked before it is used.

A bundle from a stranger is data. Only the files that `bundle.json` lists are ever opened, each
after its size and SHA-256 have been compared (`bundle.json` has its own SHA-256 in it), and their
formats (JSON, JSONL, safetensors, tokenizer.json, ONNX) carry no code. What a graph asks for
(operators, other files) is checked before it is parsed (`onnx_file.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ercbatch.bundle.folders import whole_folder
from ercbatch.bundle.manifest import (
    ENCODER,
    ENCODER_TOKENIZER,
    FORMAT,
    MANIFEST,
    BundleInfo,
    FileDigest,
)
from ercbatch.digests import file_sha256
from ercbatch.errors import BundleError, MissingExtraError, UsageError, foreign_errors

_ADVICE = "get the bundle again, or export it again with `python -m export`"
"""Next step in errors about an altered bundle."""
_DIGEST_KEY = "sha256"
"""Key of the SHA-256 of all other keys in `bundle.json`; the last key, from format 1.3 on."""
_LARGEST_MANIFEST = 16 << 20
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files have been verified."""

    folder: Path
    info: BundleInfo

    def path(self, name: str) -> Path:
        """The path of a listed file.

        Raises:
            BundleError: the bundle does not list it.
        """
        if name not in self.info.files:
            raise BundleError(f"{self.folder}: the bundle has no {name}: export it again")
        return self.folder / name

    def size(self) -> int:
        """Bytes of all files."""
        return sum(digest.size for digest in self.info.files.values())


def find_bundle(name: str) -> Path:
    """The folder of a bundle: the name of a bundle in the package, or a folder as it is.

    A folder that happens to be called like one in the package is `./NAME`: what `mini` means must
    not depend on where it is said.

    Raises:
        BundleError: neither.
    """
    bundles = Path(str(resources.files("ercbatch").joinpath("bundles")))
    if os.sep not in name:
        if (bundles / name / MANIFEST).exists():
            return bundles / name
        if not Path(name, MANIFEST).exists():
            raise _no_bundle(name, bundles)
    return Path(name)


def encoder_files(source: str) -> tuple[Path, Path]:
    """Paths of the model and the tokenizer of a sentence encoder.

    `source` is a folder that `python -m export encoder` wrote, or a bundle.

    Raises:
        BundleError: neither.
    """
    folder = Path(source)
    if (folder / ENCODER).exists() and not (folder / MANIFEST).exists():
        for name in (ENCODER, ENCODER_TOKENIZER):
            if not (folder / name).is_file():
                raise BundleError(f"{folder}: has no file {name}: run `export encoder` again")
        return folder / ENCODER, folder / ENCODER_TOKENIZER
    bundle = open_bundle(find_bundle(source))
    return bundle.path(ENCODER), bundle.path(ENCODER_TOKENIZER)


def _no_bundle(name: str, bundles: Path) -> BundleError:
    built_in = sorted(p.parent.name for p in bundles.glob(f"*/{MANIFEST}"))
    return BundleError(
        f"no bundle {name!r}: give a bundle folder (one with {MANIFEST} in it), or a bundle in "
        f"the package: {', '.join(built_in) or 'there is none'}"
    )


_MALFORMED_ERRORS = (AttributeError, LookupError, RecursionError, TypeError, UsageError, ValueError)


def read_info(folder: Path) -> BundleInfo:
    """Read `bundle.json` alone.

    Raises:
        BundleError: missing, not readable, or of a format that this program does not know.
    """
    path = folder / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_MANIFEST:
            raise BundleError(f"{path}: is no ordinary small file: do not use this bundle")
        value = json.loads(path.read_bytes())
        major, minor = (int(part) for part in value["format"].split("."))
        own_major, own_minor = (int(part) for part in FORMAT.split("."))
        if _DIGEST_KEY in value and value != with_digest(value):
            raise BundleError(f"{path}: altered, its SHA-256 is not what it says: {_ADVICE}")
        if major != own_major or minor > own_minor:
            raise BundleError(
                f"{path}: format {major}.{minor} is not known here (this ercbatch reads "
                f"{own_major}.0 to {FORMAT}): upgrade ercbatch"
            )
        if _DIGEST_KEY not in value and minor >= 3:
            raise BundleError(f"{path}: altered, it has lost its own SHA-256: {_ADVICE}")
        info = BundleInfo.from_json(value)
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder}: not a bundle, it has no {MANIFEST}: name a folder that "
            "`python -m export` or `ercbatch bank build` wrote"
        ) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except _MALFORMED_ERRORS as error:
        raise BundleError(
            f"{path}: not a bundle description ({type(error).__name__}: {error}): "
            "export the bundle again"
        ) from error
    for name in info.files:
        if Path(name).name != name or name.startswith(".") or not name.isprintable():
            raise BundleError(f"{path}: {name!r} is not a plain file name: do not use this bundle")
    return info


def open_bundle(folder: Path) -> Bundle:
    """Verify every file of a bundle against `bundle.json`, then hand it out.

    Raises:
        BundleError: a file is missing or altered; the message names it and the mending command.
    """
    info = read_info(folder)
    advice = _ADVICE
    if folder.parent == Path(str(resources.files("ercbatch").joinpath("bundles"))):
        advice = "run `pip install --force-reinstall --no-deps ercbatch`"
    for name, expected in info.files.items():
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size != expected.size:
                raise BundleError(
                    f"{path}: its size is not what {MANIFEST} says ({expected.size:,} bytes): "
                    f"{advice}"
                )
            if file_sha256(path) != expected.sha256:
                raise BundleError(f"{path}: altered, its SHA-256 is not {MANIFEST}'s: {advice}")
        except FileNotFoundError as error:
            raise BundleError(f"{path}: missing: {advice}") from error
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}: {advice}") from error
    return Bundle(folder, info)


@contextmanager
def wrap_file_errors(folder: Path) -> Iterator[None]:
    """Raise errors of libraries about a bundle's files as errors of the bundle.

    Digests only say that the files are those that were written, not that they are sound.

    Raises:
        BundleError: in place of every exception that is not ours.
    """
    try:
        with foreign_errors(
            BundleError,
            f"{folder}: a file in it is not what it should be",
            "export the bundle again",
        ):
            yield
    except UsageError as error:
        if isinstance(error, MissingExtraError):
            raise
        raise BundleError(f"{folder}: {error}; or upgrade ercbatch") from error


def write_bundle(
    folder: Path, fill: Callable[[Path], BundleInfo], *, force: bool = False
) -> BundleInfo:
    """Write a bundle: `fill` writes its files into the folder it is given and describes them.

    The bundle appears as `folder` when it is complete, or not at all.

    Raises:
        UsageError: `folder` exists, and `force` is not given.
        OutputError: it cannot be written.
    """
    with whole_folder(folder, MANIFEST, force=force) as part:
        info = fill(part)
        files = {
            path.name: FileDigest(path.stat().st_size, file_sha256(path))
            for path in sorted(part.iterdir())
        }
        info = dataclasses.replace(info, format=FORMAT, files=files)
        text = json.dumps(with_digest(info.to_json()), indent=2, allow_nan=False)
        (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return info


def with_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `bundle.json` holds: a value, and the SHA-256 of it, however its JSON is laid out."""
    content = {name: item for name, item in value.items() if name != _DIGEST_KEY}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**content, _DIGEST_KEY: digest}
