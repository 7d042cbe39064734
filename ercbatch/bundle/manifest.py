"""The description of a bundle: what `bundle.json` says, and the names of the files beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ercbatch.bundle.metrics import Calibration, Quality, quality_from_json
from ercbatch.checked import INT32_MAX, integer, mapping, number, printable_string, string, strings
from ercbatch.errors import UsageError
from ercbatch.labels import LabelSet
from ercbatch.prompts.tokens import ControlTokens
from ercbatch.prompts.tree import Window

FORMAT = "1.5"
"""Version of the format: another major number is refused, a newer minor one too.

1.1 adds `form`, `architecture`, `calibration` and `accepted_loss`. 1.2: graphs may have attention
in tiles, and take more inputs. 1.3: `bundle.json` has a digest of itself.
1.4 adds `label_offsets`. 1.5: `quality` is a list, in which label set and dataset are apart.
"""

RUNTIME_OF_FORM = {
    "fp32": "onnx",
    "int8": "onnx",
    "int4": "onnx",
    "optimum": "onnx",
    "nf4": "bnb",
    "bnb-int8": "bnb",
}
"""What runs a model of each form: ONNX Runtime, or torch with bitsandbytes."""

MAX_DEMONSTRATIONS = 8
"""That a question shows."""

MANIFEST = "bundle.json"
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
    """A key of `RUNTIME_OF_FORM`."""
    quantization: str
    """The same for people, in more words."""
    base: str
    data: tuple[str, ...]
    """What it was trained on, with licences."""
    licence: str
    quality: tuple[Quality, ...] = ()
    """What was measured with this very bundle."""
    label_offsets: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Label set name -> label -> offset of its log probability, in nats, added after the division
    by the temperature. `export calibrate --label-shift` fits it."""
    calibration: Mapping[str, Calibration] = dataclasses.field(default_factory=dict)
    """Label set name -> how far its confidences can be trusted."""
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
        offsets = self.label_offsets.get(labels.name)
        return tuple(offsets.get(label, 0.0) for label in labels.labels) if offsets else ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `bundle.json` holds them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["label_sets"] = [labels.to_json() for labels in self.label_sets]
        values["controls"] = self.controls.to_json()
        values["window"] = dataclasses.asdict(self.window)
        values["quality"] = [quality.to_json() for quality in self.quality]
        values["calibration"] = {k: dataclasses.asdict(v) for k, v in self.calibration.items()}
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
        form = {"form": "fp32" if string(value["quantization"]).startswith("none") else "int8"}
        value = {
            **{"architecture": {}, "calibration": {}, "accepted_loss": [], "label_offsets": {}},
            **form,
            **value,
        }
        texts = ("name", "version", "template", "form", "quantization", "base", "licence", "format")
        values: dict[str, Any] = {name: string(value[name]) for name in texts}
        printable_string(values["name"])
        for name, low, high in _INTEGER_BOUNDS:
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
        values["quality"] = quality_from_json(value["quality"])
        values["calibration"] = {
            name: Calibration.from_json(v) for name, v in mapping(value["calibration"]).items()
        }
        values["architecture"] = dict(mapping(value["architecture"]))
        values["files"] = {
            name: FileDigest(integer(f["size"], 0, 2**63), string(f["sha256"]))
            for name, f in mapping(value["files"]).items()
        }
        if not values["label_sets"]:
            raise KeyError("label_sets")
        if values["form"] not in RUNTIME_OF_FORM:
            raise ValueError(f"form {values['form']!r}")
        return cls(**values)


_INTEGER_BOUNDS = (
    ("template_version", 0, INT32_MAX),
    ("later_turns", 0, INT32_MAX),
    ("pack_tokens", 1, INT32_MAX),
    ("demonstrations", 0, MAX_DEMONSTRATIONS),
)
"""Field, and from what to what it may go."""
