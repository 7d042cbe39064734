"""Labelling in Python: what `ercbatch label` runs on."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import Bundle, find_bundle, open_bundle, wrap_file_errors
from ercbatch.dialogues import Dialogue, LabeledDialogue, UtteranceLabel, dialogue_from
from ercbatch.engine import Engine, Entry
from ercbatch.errors import BundleError, UsageError
from ercbatch.prompts.templates import template
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Renderer
from ercbatch.retrieval.retriever import open_retriever
from ercbatch.scoring.runtimes import AUTO, check_runtime, open_scorer
from ercbatch.scoring.threads import available_threads

T = TypeVar("T")
_PACKAGES = ("emoji", "numpy", "orjson", "tokenizers", "zstandard")
"""What inputs and outputs go through, whatever the bundle."""


class Labeler:
    """Labels dialogues with a bundle.

    Args:
        bundle: the name of a bundle in the package, or a bundle folder.
        label_set: one of the bundle's label sets; by default its first.
        demonstrations: how many similar labelled examples each question shows; by default what
            the bundle was found best with.
        context: `past`, or `both` to show each question some later turns too.
        min_confidence: below it an utterance's emotion is None.
        scores: give the probability of every label.
        threads: processor threads of the model; by default all that the process may use.
        runtime: `onnx` or `bnb`; by default the one that the bundle's form is for.

    Raises:
        BundleError: the bundle is missing, altered, or not for this program.
        UsageError: a setting out of range.
    """

    def __init__(
        self,
        bundle: str | Bundle = "mini",
        *,
        label_set: str | None = None,
        demonstrations: int | None = None,
        context: str = "past",
        min_confidence: float = 0.0,
        scores: bool = False,
        threads: int | None = None,
        runtime: str = AUTO,
    ) -> None:
        if context not in ("past", "both"):
            raise UsageError(f"context is {context!r}: choose past or both")
        if not 0.0 <= min_confidence <= 1.0:
            raise UsageError("the least confidence must be between 0 and 1")
        if demonstrations is not None and not 0 <= demonstrations <= manifest.MAX_DEMONSTRATIONS:
            raise UsageError(
                f"the number of demonstrations must be between 0 and {manifest.MAX_DEMONSTRATIONS}"
            )
        if threads is not None and threads < 1:
            raise UsageError("the number of threads must be at least 1")
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(find_bundle(bundle))
        info = opened.info
        if context == "both" and not info.later_turns:
            raise UsageError(
                f"bundle {info.name!r} was not trained with later turns in view: leave --context "
                "at past, or train with later_turns in the recipe"
            )
        self.bundle = opened
        check_runtime(opened, runtime)
        self.labels = info.label_set(label_set)
        self._min_confidence = min_confidence
        self._scores = scores
        self._context = context
        self._threads = threads = threads or available_threads()
        count = info.demonstrations if demonstrations is None else demonstrations
        with wrap_file_errors(opened.folder):
            self.engine = self._engine(count, threads)

    def _engine(self, count: int, threads: int) -> Engine:
        bundle, info = self.bundle, self.bundle.info
        renderer = Renderer(
            SegmentTokenizer.from_file(bundle.path(manifest.TOKENIZER), info.controls),
            template(info.template, info.template_version),
            replace(info.window, future=info.later_turns if self._context == "both" else 0),
            self.labels.labels,
        )
        scorer = open_scorer(bundle, threads)
        if not set(renderer.trie.tokens) <= set(scorer.head.tokens.tolist()):
            raise BundleError(
                f"{bundle.folder}: {manifest.HEAD} has no rows for the labels of "
                f"{self.labels.name}: export the bundle again"
            )
        return Engine(
            scorer=scorer,
            renderer=renderer,
            temperature=info.temperatures.get(self.labels.name, 1.0),
            pack_tokens=info.pack_tokens,
            retriever=open_retriever(bundle, threads).restricted(self.labels) if count else None,
            demonstrations=count,
            offsets=info.offsets(self.labels),
        )

    def options(self) -> dict[str, str | int | float | bool]:
        """The settings that the labels depend on, as a run's manifest records them."""
        return {
            "label_set": self.labels.name,
            "demonstrations": self.engine.demonstrations,
            "context": self._context,
            "min_confidence": self._min_confidence,
            "scores": self._scores,
            **self.engine.scorer.placement,
            **({"encoder_threads": self._threads} if self.engine.retriever else {}),
        }

    def releases(self) -> dict[str, str]:
        """Package -> release, of those that an output depends on, as a run's manifest records."""
        packages = {*_PACKAGES, *self.engine.scorer.packages}
        if self.engine.retriever is not None:
            packages |= set(self.engine.retriever.packages)
        installed = {name: version(name) for name in ("ercbatch", *sorted(packages))}
        return {
            **installed,
            "unicode": unicodedata.unidata_version,
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
        }

    def describe(self) -> str:
        """Which model labels, and what runs it."""
        return f"{self.bundle.info.name} ({self.bundle.info.form}): {self.engine.scorer.describe()}"

    def label(self, dialogues: Iterable[Dialogue | Mapping[str, Any]]) -> Iterator[LabeledDialogue]:
        """Label dialogues (or records of the contract's form) lazily, in order.

        Raises:
            RecordError: a record is not a dialogue.
        """
        stream = ((None, dialogue_from(dialogue)) for dialogue in dialogues)
        for _, labeled in self.label_items(stream):
            assert labeled is not None  # every item of this stream is a dialogue
            yield labeled

    def label_items(
        self, items: Iterable[tuple[T, Dialogue | None]], written: int = 0
    ) -> Generator[tuple[Entry[T], LabeledDialogue | None], None, None]:
        """Label (origin, dialogue) pairs; a pair without a dialogue passes through in its place.

        The entry of each says in which chunk it is. To resume, pass the items from the start of a
        chunk; the first `written` of them are not yielded again.
        """
        for entry in self.engine.run(items, written):
            labeled = None
            if entry.dialogue is not None:
                count = len(entry.dialogue.utterances)
                answers = tuple(self._utterance_label(entry.rows.get(t)) for t in range(count))
                labeled = LabeledDialogue(entry.dialogue, answers)
            yield entry, labeled

    def _utterance_label(self, probabilities: npt.NDArray[np.float64] | None) -> UtteranceLabel:
        if probabilities is None:
            return UtteranceLabel(None, None)
        if not np.isfinite(probabilities).all():
            raise BundleError(
                f"{self.bundle.folder}: its model answers with what is no number: do not use it"
            )
        best = int(probabilities.argmax())
        confidence = round(float(probabilities[best]), 6)
        scores = None
        if self._scores:
            rounded = (round(float(p), 6) for p in probabilities)
            scores = dict(zip(self.labels.labels, rounded, strict=True))
        emotion = self.labels.labels[best] if confidence >= self._min_confidence else None
        return UtteranceLabel(emotion, confidence, scores)


def smoke_test(bundle: Bundle) -> None:
    """See that a bundle labels, with a demonstration if it has any.

    Raises:
        BundleError: it doesn't.
        MissingExtraError: what runs it is not installed.
    """
    labeler = Labeler(bundle, demonstrations=int(manifest.ENCODER in bundle.info.files))
    next(labeler.label([{"utterances": [{"text": "Yes."}]}]))
