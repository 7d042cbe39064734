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
from ercbatch.checked import (
    LARGEST,
    integer,
    mapping,
    number,
    printable_string,
    string,
    strings,
)
from ercbatch.errors import BundleError, MissingExtraError, UsageError, foreign_errors
from ercbatch.labels import LabelSet
from ercbatch.prompts.tokens import ControlTokens
from ercbatch.prompts.tree import Window

FORMAT = "1.4"
"""Version of the format: another major number is refused, a newer minor one too.

1.1 adds `form`, `architecture`, `calibration` and `accepted_loss`. 1.2: graphs may have attention
in tiles, and take more inputs. 1.3: `bundle.json` has a digest of itself.
1.4 adds `label_offsets`.
"""

RUNTIMES = {
    "fp32": "onnx",
    "int8": "onnx",
    "int4": "onnx",
    "optimum": "onnx",
    "nf4": "bnb",
    "bnb-int8": "bnb",
}
"""What runs a model of each form: ONNX Runtime, or torch with bitsandbytes."""

MOST_DEMONSTRATIONS = 8
"""That a question shows."""

_MEND = "get the bundle again, or write it anew with `python -m export`"
"""What to do about an altered one."""

MANIFEST = "bundle.json"
_OWN_DIGEST = "sha256"
"""Of all else in `bundle.json`: last in it, from format 1.3 on."""
_LARGEST_MANIFEST = 16 << 20
"""Bytes."""
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
"""Constants of a model that is too large for one ONNX file."""
CONFIG = "config.json"
WEIGHTS = "model*.safetensors"
"""The weights of a model that bitsandbytes runs: one file, or several where they are large."""
PROBE = "int8_probe.onnx"
"""A product at the limits of int8, in bundles for processors that add its sums in 32 bits."""
HEAD = "answer_head.safetensors"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.onnx"
ENCODER_TOKENIZER = "encoder_tokenizer.json"
CARD = "README.md"
CARD_JSON = "model_card.json"


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What `bundle.json` says."""

    name: str
    version: str
    """The ercbatch that wrote it."""
    label_sets: tuple[LabelSet, ...]
    """The first is the default."""
    template: str
    template_version: int
    controls: ControlTokens
    window: Window
    later_turns: int
    """Turns after the utterance that `--context both` shows."""
    pack_tokens: int
    demonstrations: int
    """Demonstrations a question shows by default."""
    temperatures: Mapping[str, float]
    """Label set name -> temperature fitted on validation data."""
    form: str
    """One of `RUNTIMES`."""
    quantization: str
    """The same for people, in more words."""
    base: str
    data: tuple[str, ...]
    """What it was trained on, with licences."""
    licence: str
    quality: Mapping[str, Any]
    """Figures measured with this very bundle."""
    label_offsets: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Label set name -> label -> offset of its log probability, in nats, added after the division
    by the temperature. `export calibrate --label-shift` fits it."""
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Label set name -> how far confidences can be trusted: see `python -m export`."""
    accepted_loss: tuple[str, ...] = ()
    """In what the bundle falls short of the model it was made from, where that was accepted."""
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The model's `config.json`, from which `python -m export checkpoint` builds it again. Bundles
    without it label all the same."""
    format: str = FORMAT
    files: Mapping[str, FileDigest] = dataclasses.field(default_factory=dict)

    def label_set(self, name: str | None) -> LabelSet:
        """The label set of that name; the default one for None.

        Raises:
            UsageError: the bundle has no such label set.
        """
        if name is None:
            return self.label_sets[0]
        for labels in self.label_sets:
            if labels.name == name:
                return labels
        names = ", ".join(labels.name for labels in self.label_sets)
        raise UsageError(f"bundle {self.name!r} has no label set {name!r}: choose from {names}")

    def offsets(self, labels: LabelSet) -> tuple[float, ...]:
        """The offset [labels] of each log probability, in nats; empty if none was fitted."""
        fitted = self.label_offsets.get(labels.name)
        return tuple(fitted.get(label, 0.0) for label in labels.labels) if fitted else ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `bundle.json` holds them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["label_sets"] = [labels.to_json() for labels in self.label_sets]
        values["controls"] = self.controls.to_json()
        values["window"] = dataclasses.asdict(self.window)
        values["files"] = {
            name: dataclasses.asdict(digest) for name, digest in sorted(self.files.items())
        }
        return {"format": values.pop("format"), **values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BundleInfo:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, UsageError: a missing or odd value.
        """
        # Earlier formats had none of these.
        before = {"form": "fp32" if string(value["quantization"]).startswith("none") else "int8"}
        value = {
            **{"architecture": {}, "calibration": {}, "accepted_loss": [], "label_offsets": {}},
            **before,
            **value,
        }
        texts = ("name", "version", "template", "form", "quantization", "base", "licence", "format")
        values: dict[str, Any] = {name: string(value[name]) for name in texts}
        printable_string(values["name"])
        for name, low, high in _NUMBERS:
            values[name] = integer(value[name], low, high)
        values["label_sets"] = tuple(LabelSet.from_json(v) for v in value["label_sets"])
        values["controls"] = ControlTokens.from_json(
            {name: [integer(i) for i in ids] for name, ids in mapping(value["controls"]).items()}
        )
        values["window"] = Window(**{k: integer(v) for k, v in mapping(value["window"]).items()})
        values["temperatures"] = {
            name: number(t, 0.01, 100) for name, t in mapping(value["temperatures"]).items()
        }
        values["label_offsets"] = {
            name: {label: number(b, -100, 100) for label, b in mapping(offsets).items()}
            for name, offsets in mapping(value["label_offsets"]).items()
        }
        values["data"] = strings(value["data"])
        values["accepted_loss"] = strings(value["accepted_loss"])
        values["quality"] = {
            name: {figure: number(v) for figure, v in mapping(figures).items()}
            for name, figures in mapping(value["quality"]).items()
        }
        values["calibration"] = {
            name: _calibration(mapping(v)) for name, v in mapping(value["calibration"]).items()
        }
        values["architecture"] = dict(mapping(value["architecture"]))
        values["files"] = {
            name: FileDigest(integer(f["size"], 0, 2**63), string(f["sha256"]))
            for name, f in mapping(value["files"]).items()
        }
        if not values["label_sets"]:
            raise KeyError("label_sets")
        if values["form"] not in RUNTIMES:
            raise ValueError(f"form {values['form']!r}")
        return cls(**values)


_NUMBERS = (
    ("template_version", 0, LARGEST),
    ("later_turns", 0, LARGEST),
    ("pack_tokens", 1, LARGEST),
    ("demonstrations", 0, MOST_DEMONSTRATIONS),
)
"""Field, and from what to what it may go."""


def _calibration(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `export.proof.calibration.calibrate` gives of a label set."""
    names = ("utterances", "temperature", "error_before", "error_after", "error_if_perfect")
    found: dict[str, Any] = {name: number(value[name]) for name in names}
    found["coverage"] = [
        {name: number(point[name]) for name in ("coverage", "risk", "confidence")}
        for point in value["coverage"]
    ]
    found["recommended"] = [
        {
            "precision": number(r["precision"]),
            **{k: None if r[k] is None else number(r[k]) for k in ("min_confidence", "coverage")},
            **{k: integer(r.get(k, 0)) for k in ("answered", "right")},
        }
        for r in value["recommended"]
    ]
    return found


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
    packaged = Path(str(resources.files("ercbatch").joinpath("bundles")))
    if os.sep not in name:
        if (packaged / name / MANIFEST).exists():
            return packaged / name
        if not Path(name, MANIFEST).exists():
            raise _no_bundle(name, packaged)
    return Path(name)


def encoder_files(source: str) -> tuple[Path, Path]:
    """(model, tokenizer) of a sentence encoder: a folder that `python -m export encoder` wrote, or
    a bundle, which has one too.

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


def _no_bundle(name: str, packaged: Path) -> BundleError:
    built_in = sorted(p.parent.name for p in packaged.glob(f"*/{MANIFEST}"))
    return BundleError(
        f"no bundle {name!r}: give a bundle folder (one with {MANIFEST} in it), or a bundle in "
        f"the package: {', '.join(built_in) or 'there is none'}"
    )


_ODD = (AttributeError, LookupError, RecursionError, TypeError, UsageError, ValueError)


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
        if _OWN_DIGEST in value and value != with_digest(value):
            raise BundleError(f"{path}: altered, its SHA-256 is not what it says: {_MEND}")
        if major != own_major or minor > own_minor:
            raise BundleError(
                f"{path}: format {major}.{minor} is not known here (this ercbatch reads "
                f"{own_major}.0 to {FORMAT}): upgrade ercbatch"
            )
        if _OWN_DIGEST not in value and minor >= 3:
            raise BundleError(f"{path}: altered, it has lost its own SHA-256: {_MEND}")
        info = BundleInfo.from_json(value)
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder}: not a bundle, it has no {MANIFEST}: name a folder that "
            "`python -m export` or `ercbatch bank build` wrote"
        ) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except _ODD as error:
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
    mend = _MEND
    if folder.parent == Path(str(resources.files("ercbatch").joinpath("bundles"))):
        mend = "run `pip install --force-reinstall --no-deps ercbatch`"
    for name, expected in info.files.items():
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size != expected.size:
                raise BundleError(
                    f"{path}: its size is not what {MANIFEST} says ({expected.size:,} bytes): "
                    f"{mend}"
                )
            if _sha256(path) != expected.sha256:
                raise BundleError(f"{path}: altered, its SHA-256 is not {MANIFEST}'s: {mend}")
        except FileNotFoundError as error:
            raise BundleError(f"{path}: missing: {mend}") from error
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}: {mend}") from error
    return Bundle(folder, info)


@contextmanager
def odd_files(folder: Path) -> Iterator[None]:
    """What libraries say of a bundle's files: digests tell only that they are those that were
    written, by whomever.

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
            path.name: FileDigest(path.stat().st_size, _sha256(path))
            for path in sorted(part.iterdir())
        }
        info = dataclasses.replace(info, format=FORMAT, files=files)
        text = json.dumps(with_digest(info.to_json()), indent=2, allow_nan=False)
        (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return info


def with_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `bundle.json` holds: a value, and the SHA-256 of it, however its JSON is laid out."""
    plain = {name: own for name, own in value.items() if name != _OWN_DIGEST}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return {**plain, _OWN_DIGEST: digest}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
