"""A training run to a bundle: merge, quantize, calibrate, prove, write; or write nothing."""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from safetensors.numpy import save_file

from ercbatch import bundle as files
from ercbatch.bank import build_bank, read_examples
from ercbatch.bundle import (
    BundleInfo,
    encoder_files,
    refuse_existing,
    whole_folder,
    write_bundle,
)
from ercbatch.encoder import SentenceEncoder
from ercbatch.errors import LossError, UsageError
from ercbatch.labels import LabelSet
from ercbatch.onnx_scorer import available_threads
from ercbatch.packs import Pack, join
from ercbatch.pipeline import Engine, Retriever
from ercbatch.prompts import template
from ercbatch.scorers import open_model
from ercbatch.scoring import Scorer
from ercbatch.torch_model import PackedModel
from ercbatch.torch_scorer import TorchScorer
from ercbatch.tree import Question, Renderer, Task
from export.card import write_card
from export.forms import (
    describe_form,
    need_libraries,
    sample_size,
    save_merged,
    write_form,
)
from export.model import fitting_dtype, traced_attention
from export.proof import Limits, calibrate_sets, compare, losses, temperatures
from export.targets import SAFE_TARGET
from train.datasets import Dataset, read_dataset
from train.recipe import Recipe, Source
from train.run import TrainedRun, load_run, run_checkpoint, untrained_run
from train.validate import Predictions, distinct_dataset_names, predict

_SHOWN = 3
"""Demonstrations a question shows where their effect is measured: what `bank build` gives it."""


class Loader(Protocol):
    """Loads what is exported."""

    def __call__(self, *, merged: bool) -> TrainedRun:
        """`merged`, with attention in the form that is traced; or as it was trained."""
        ...


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """What the run does not say about its bundle."""

    name: str
    form: str
    licence: str
    target: str = SAFE_TARGET
    encoder: str | None = None
    examples: Path | None = None
    demonstrations: int = 0
    provenance: tuple[str, ...] = ()
    base_name: str | None = None
    also_checkpoint: Path | None = None
    limits: Limits = field(default_factory=Limits)
    accept_loss: bool = False


def run_loader(
    source: str, data: Path | None, labels: str | None, wording: str, *, original: bool
) -> Loader:
    """What loads a run folder or, where `data` is labelled dialogues, an untrained base.

    `original` as for `load_run`.

    Raises:
        UsageError: neither a run nor a causal language model.
    """
    if data is None:
        folder = Path(source)
        checkpoint = run_checkpoint(folder)

        def load(*, merged: bool, attention: str | None) -> TrainedRun:
            return load_run(
                folder, merged=merged, original=original, attention=attention, dtype=dtype
            )

    else:
        checkpoint = source
        given = Source(str(data), labels or "")

        def load(*, merged: bool, attention: str | None) -> TrainedRun:
            return untrained_run(source, given, wording, attention=attention, dtype=dtype)

    dtype = fitting_dtype(checkpoint)
    exported = traced_attention(checkpoint)

    def loader(*, merged: bool) -> TrainedRun:
        return load(merged=merged, attention=exported if merged else None)

    return loader


class _Questions:
    """What a run was taught to answer, and the data to hold a bundle of it against."""

    def __init__(self, run: TrainedRun) -> None:
        recipe = run.recipe
        self.recipe: Recipe = recipe
        self.wording = template(recipe.template)
        taught = [s for s in recipe.train if read_dataset(s, labelled=False).has_targets]
        if not taught:
            raise UsageError("the run has learnt no labels: there is nothing to label with")
        sets = {source.labels: source.label_set() for source in taught}
        self.label_sets: tuple[LabelSet, ...] = tuple(sets.values())
        self.shown = taught[0]
        self.renderers = {
            s.name: Renderer(run.tokenizer, self.wording, recipe.window, s.labels)
            for s in self.label_sets
        }
        self.tokens = sorted({t for r in self.renderers.values() for t in r.trie.tokens})
        held_out = [read_dataset(source) for source in recipe.valid]
        for dataset in held_out:
            if dataset.labels.name not in self.renderers:
                raise UsageError(
                    f"{dataset.source.path}: the run has not learnt the labels of "
                    f"{dataset.labels.name}: a bundle is measured on labels that it has"
                )
        names = distinct_dataset_names(held_out)
        self.held_out: dict[str, Dataset] = {
            f"{name}, validation split": dataset
            for name, dataset in zip(names, held_out, strict=True)
        }

    def engine(self, scorer: Scorer, dataset: Dataset) -> Engine:
        """What answers a dataset's questions, uncalibrated."""
        renderer = self.renderers[dataset.labels.name]
        return Engine(scorer, renderer, 1.0, self.recipe.pack_tokens)

    def samples(self, count: int) -> list[Pack]:
        """Packs of a few training dialogues."""
        renderer = self.renderers[self.label_sets[0].name]
        return [
            join([(0, tree)])
            for scene in read_dataset(self.shown).scenes[:count]
            for tree in renderer.trees(
                scene.dialogue,
                [Question(Task.EMOTION, t) for t in range(len(scene.dialogue.utterances))],
            )
        ]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a scorer says of each dataset, and how long it took, in seconds."""

    predictions: dict[str, Predictions]
    seconds: dict[str, float]


def _measure(questions: _Questions, scorer: Scorer) -> _Measured:
    measured = _Measured({}, {})
    for name, dataset in questions.held_out.items():
        began = time.perf_counter()
        measured.predictions[name] = predict(questions.engine(scorer, dataset), dataset)
        measured.seconds[name] = time.perf_counter() - began
    return measured


def export_bundle(
    load: Loader, folder: Path, options: BundleOptions, *, force: bool = False
) -> BundleInfo:
    """Write the bundle of what `load` loads, and say what it is.

    The model as it was trained answers the validation data first; then it is merged, and only one
    of the two is in memory at a time.

    Raises:
        UsageError: the folder exists, or the run cannot be made a bundle of.
        MissingExtraError: a library that the form needs is not installed.
        LossError: the bundle would fall short of the model by more than the limits.
        OutputError: it cannot be written.
    """
    for path in (folder, options.also_checkpoint):
        if path is not None:
            refuse_existing(path, force=force)
    need_libraries(options.form)
    encoder = None if options.encoder is None else encoder_files(options.encoder)
    run = load(merged=False)
    questions = _Questions(run)
    original = _measure(questions, TorchScorer(run.model, questions.tokens))
    del run
    gc.collect()
    run = load(merged=True)
    head = run.model.answer_head(questions.tokens)

    def fill(part: Path) -> BundleInfo:
        samples = questions.samples(sample_size(run.model))
        save_file(dict(head.tensors()), part / files.HEAD)
        run.tokenizer.save(part / files.TOKENIZER)
        write_form(run, part, options.form, options.target, samples)
        retriever = None
        if encoder is not None and options.examples is not None:
            retriever = _write_bank(questions, part, encoder, options.examples)
        listed = [path.name for path in part.iterdir()]
        scorer = open_model(part, options.form, head, available_threads(), listed)
        info = _describe(questions, options, run, retriever)
        info = _prove(info, questions, original, _measure(questions, scorer), options)
        if retriever is not None:
            quality = {
                name: {
                    **info.quality[name],
                    **with_demonstrations(questions.engine(scorer, dataset), dataset, retriever),
                }
                for name, dataset in questions.held_out.items()
            }
            info = replace(info, quality=quality)
        write_card(info, part)
        return info

    info = write_bundle(folder, fill, force=force)
    if options.also_checkpoint is not None:
        with whole_folder(options.also_checkpoint, force=force) as part:
            save_merged(run, part)
    return info


def _write_bank(
    questions: _Questions, part: Path, encoder: tuple[Path, Path], examples: Path
) -> Retriever:
    for source, name in zip(encoder, (files.ENCODER, files.ENCODER_TOKENIZER), strict=True):
        shutil.copyfile(source, part / name)
    opened = SentenceEncoder(part / files.ENCODER, part / files.ENCODER_TOKENIZER)
    found = read_examples(examples, questions.label_sets[0])
    retriever = Retriever(opened, build_bank(found, opened))
    retriever.bank.save(part)
    return retriever


def _describe(
    questions: _Questions,
    options: BundleOptions,
    run: TrainedRun,
    retriever: Retriever | None,
) -> BundleInfo:
    """All of a bundle's description but what is measured."""
    recipe = questions.recipe
    data = options.provenance
    if retriever is not None:
        data = (*data, f"demonstrations: {len(retriever.bank.demonstrations)} written examples")
    return BundleInfo(
        name=options.name,
        version=version("ercbatch"),
        label_sets=questions.label_sets,
        template=questions.wording.name,
        template_version=questions.wording.version,
        controls=run.tokenizer.controls,
        window=recipe.window,
        later_turns=recipe.later_window if recipe.later_turns else 0,
        pack_tokens=recipe.pack_tokens,
        demonstrations=options.demonstrations,
        temperatures={},
        form=options.form,
        quantization=describe_form(options.form, options.target),
        base=options.base_name or recipe.base,
        data=data,
        licence=options.licence,
        quality={},
        architecture=_architecture(run.model),
    )


def _prove(
    info: BundleInfo,
    questions: _Questions,
    original: _Measured,
    found: _Measured,
    options: BundleOptions,
) -> BundleInfo:
    """The description with what was measured.

    Raises:
        LossError: the bundle falls short by more than the limits, and that is not accepted.
    """
    quality: dict[str, dict[str, float]] = {}
    lost = [] if found.predictions else ["no validation data: nothing is measured"]
    for name, predictions in found.predictions.items():
        speed = original.seconds[name] / found.seconds[name]
        quality[name] = compare(predictions, original.predictions[name], speed)
        lost += losses(name, quality[name], options.limits)
    if lost and not options.accept_loss:
        raise LossError(
            "nothing is written, for the bundle cannot be vouched for: "
            + "; ".join(lost)
            + ": choose another --quantize, give more [[valid]] data, or --accept-loss"
        )
    calibration = calibrate_sets(
        (dataset.labels.name, found.predictions[name])
        for name, dataset in questions.held_out.items()
    )
    return replace(
        info,
        quality=quality,
        accepted_loss=tuple(lost),
        calibration=calibration,
        temperatures=temperatures(calibration),
    )


def with_demonstrations(engine: Engine, dataset: Dataset, retriever: Retriever) -> dict[str, float]:
    """What an engine's weighted F1 is where questions show demonstrations."""
    showing = replace(engine, retriever=retriever.restricted(dataset.labels), demonstrations=_SHOWN)
    found = predict(showing, dataset).figures()["weighted_f1"]
    return {"weighted_f1_with_demonstrations": round(found, 4)}


def _architecture(model: PackedModel) -> dict[str, Any]:
    """The model's configuration, without what is of this machine or of how it was loaded."""
    config: dict[str, Any] = model.model.config.to_diff_dict()
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {k: v for k, v in config.items() if k not in (*left_out, "quantization_config")}


def summary(info: BundleInfo, folder: Path) -> str:
    """What was written and measured, for people."""
    size = sum(digest.size for digest in info.files.values()) / 1e6
    lines = [f"{folder}: {info.form}, {size:,.1f} MB"]
    for name, figures in info.quality.items():
        line = f"{name}: weighted F1 {figures['weighted_f1']:.2%}"
        if "weighted_f1_original" in figures:
            line += (
                f" (the original's {figures['weighted_f1_original']:.2%}), "
                f"{figures['agreement']:.1%} of the labels its labels, probabilities within "
                f"{figures['largest_difference']:.4f}, {figures['speed_ratio']:.2f} times as fast"
            )
        lines.append(line)
    for name, found in info.calibration.items():
        lines.append(
            f"{name}: calibration error {found['error_after']} (before {found['error_before']}; "
            f"of true probabilities {found['error_if_perfect']})"
        )
    lines += [f"warning: accepted loss: {loss}" for loss in info.accepted_loss]
    return "\n".join(lines)
