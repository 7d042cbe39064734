"""A training run to a bundle: merge, quantize, calibrate, prove, write; or write nothing."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import encoder_files, wrap_file_errors, write_bundle
from ercbatch.bundle.folders import check_output, whole_folder
from ercbatch.bundle.manifest import BundleInfo
from ercbatch.errors import LossError, UsageError
from ercbatch.prompts.answers import AnswerHead
from ercbatch.prompts.templates import template
from ercbatch.retrieval.bank import build_bank, read_examples
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.retrieval.retriever import Retriever
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.runtimes import open_model
from ercbatch.scoring.scorer import Scorer
from ercbatch.scoring.threads import available_threads
from ercbatch.scoring.torch_scorer import TorchScorer
from export.forms import describe_form, need_libraries, sample_size, save_merged, write_form
from export.model import fitting_dtype, traced_attention
from export.proof.calibration import calibrate_sets
from export.proof.card import write_card
from export.proof.losses import UNMEASURED, LossLimits, compare, losses
from export.proof.measure import Measurement, ProofData, Say, f1_with_demonstrations, measure
from export.quantize.targets import SAFE_TARGET
from train.run import LoadedRun, load_run, run_files, untrained_run, wrap_model_errors
from train.sources import Source

_OTHER_FORM = (
    "choose another --quantize, or allow it by --max-loss, --min-agreement or --accept-loss"
)
_NO_DATA = "train with [[valid]] data, or give --accept-loss and run `export calibrate` afterwards"


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads what is exported, and knows the `inputs` that are read for it."""

    load: Callable[[bool, str | None], LoadedRun]
    attention: str
    inputs: tuple[Path, ...]

    def __call__(self, *, merged: bool) -> LoadedRun:
        """`merged`, with attention in the form that is traced; or as it was trained."""
        run: LoadedRun = self.load(merged, self.attention if merged else None)
        return run


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
    limits: LossLimits = field(default_factory=LossLimits)
    accept_loss: bool = False


def run_loader(
    source: str, data: Path | None, labels: str | None, wording: str, *, full_precision_base: bool
) -> Loader:
    """What loads a run folder or, where `data` is labelled dialogues, an untrained base.

    `full_precision_base` as for `load_run`.

    Raises:
        UsageError: neither a run nor a causal language model.
    """
    if data is None:
        folder = Path(source)
        checkpoint, data_files = run_files(folder)

        def load(merged: bool, attention: str | None) -> LoadedRun:
            return load_run(
                folder,
                merged=merged,
                full_precision_base=full_precision_base,
                attention=attention,
                dtype=dtype,
            )

    else:
        template(wording)  # see that there is such a one
        checkpoint, data_files = source, [str(data)]
        data_source = Source(str(data), labels or "")

        def load(merged: bool, attention: str | None) -> LoadedRun:  # noqa: ARG001
            return untrained_run(source, data_source, wording, attention=attention, dtype=dtype)

    with wrap_model_errors(source):
        dtype = fitting_dtype(checkpoint)
        attention = traced_attention(checkpoint)
    return Loader(load, attention, tuple(map(Path, (source, checkpoint, *data_files))))


def export_bundle(
    load: Loader,
    folder: Path,
    options: BundleOptions,
    *,
    force: bool = False,
    say: Say = lambda _: None,
) -> BundleInfo:
    """Write the bundle of what `load` loads, and describe it; `say` hears of each step.

    The model as it was trained answers the validation data; then it is merged and written; then
    what was written answers. Only one of the three is in memory at a time.

    Raises:
        UsageError: the folder exists, or the run cannot be made a bundle of.
        MissingExtraError: a library that the form needs is not installed.
        LossError: the bundle would fall short of the model by more than the limits.
        OutputError: it cannot be written.
    """
    need_libraries(options.form)
    _check_outputs(load, folder, options, force=force)
    checkpoint = options.also_checkpoint
    encoder = None if options.encoder is None else encoder_files(options.encoder)
    if encoder is not None:
        with wrap_file_errors(encoder[0].parent):
            SentenceEncoder(*encoder)
    _return_arrays_when_freed()
    say("loading the model as it was trained")
    run = load(merged=False)
    proof_data = ProofData(run)
    original = measure(proof_data, TorchScorer(run.model, proof_data.tokens), say)
    del run
    gc.collect()

    def fill(part: Path, checkpoint: Path | None) -> BundleInfo:
        retriever = None
        if encoder is not None and options.examples is not None:
            retriever = _write_bank(proof_data, part, encoder, options.examples)
        say(f"merging it, and writing it as {options.form}")
        info, head = _write_merged(load, proof_data, options, part, checkpoint, retriever)
        gc.collect()
        file_names = [path.name for path in part.iterdir()]
        scorer = open_model(part, options.form, head, available_threads(), file_names)
        info = _prove(info, original, measure(proof_data, scorer, say), options)
        if retriever is not None:
            info = _add_demonstration_f1(info, proof_data, scorer, retriever)
        write_card(info, part)
        return info

    with ExitStack() as stack:
        checkpoint_part = None
        if checkpoint is not None:
            checkpoint_part = stack.enter_context(
                whole_folder(checkpoint, manifest.CONFIG, force=force)
            )
        return write_bundle(folder, lambda part: fill(part, checkpoint_part), force=force)


def _check_outputs(load: Loader, folder: Path, options: BundleOptions, *, force: bool) -> None:
    """Check that the bundle and the checkpoint can be written where they should be."""
    checkpoint = options.also_checkpoint
    inputs = [p for p in (*load.inputs, options.encoder, options.examples) if p is not None]
    check_output(folder, manifest.MANIFEST, force=force, inputs=inputs)
    if checkpoint is not None:
        check_output(checkpoint, manifest.CONFIG, force=force, inputs=inputs)
        if _one_in_the_other(folder.resolve(), checkpoint.resolve()):
            raise UsageError(f"{checkpoint} is or holds {folder}, or lies in it: choose another")


def _one_in_the_other(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


_M_MMAP_THRESHOLD = -3
"""Of glibc's `malloc.h`."""


def _return_arrays_when_freed() -> None:
    """Have glibc give the memory of large arrays back as soon as they are freed.

    By itself it keeps that of arrays up to 32 MB for the next ones; what small ones lie between
    is then lost to larger ones, twice the size of the model in the end.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another libc
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _write_merged(
    load: Loader,
    proof_data: ProofData,
    options: BundleOptions,
    part: Path,
    checkpoint: Path | None,
    retriever: Retriever | None,
) -> tuple[BundleInfo, AnswerHead]:
    """Write the merged model's files; its description but what is measured, and its answer head."""
    run = load(merged=True)
    head = run.model.answer_head(proof_data.tokens)
    samples = proof_data.samples(sample_size(run.model))
    save_file(dict(head.tensors()), part / manifest.HEAD)
    run.tokenizer.save(part / manifest.TOKENIZER)
    write_form(run, part, options.form, options.target, samples)
    if checkpoint is not None:
        save_merged(run, checkpoint)
    return _describe(proof_data, options, run, retriever), head


def _write_bank(
    proof_data: ProofData, part: Path, encoder: tuple[Path, Path], examples: Path
) -> Retriever:
    for source, name in zip(encoder, (manifest.ENCODER, manifest.ENCODER_TOKENIZER), strict=True):
        shutil.copyfile(source, part / name)
    sentence_encoder = SentenceEncoder(part / manifest.ENCODER, part / manifest.ENCODER_TOKENIZER)
    demonstrations = read_examples(examples, proof_data.label_sets[0])
    retriever = Retriever(sentence_encoder, build_bank(demonstrations, sentence_encoder))
    retriever.bank.save(part)
    return retriever


def _describe(
    proof_data: ProofData,
    options: BundleOptions,
    run: LoadedRun,
    retriever: Retriever | None,
) -> BundleInfo:
    """All of a bundle's description but what is measured."""
    recipe = proof_data.recipe
    data = options.provenance
    if retriever is not None:
        data = (*data, f"demonstrations: {len(retriever.bank.demonstrations)} written examples")
    return BundleInfo(
        name=options.name,
        version=version("ercbatch"),
        label_sets=proof_data.label_sets,
        template=proof_data.wording.name,
        template_version=proof_data.wording.version,
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
        architecture=_architecture(run.model),
    )


def _prove(
    info: BundleInfo,
    original: Sequence[Measurement],
    measurements: Sequence[Measurement],
    options: BundleOptions,
) -> BundleInfo:
    """Add the metrics to the description.

    Raises:
        LossError: the bundle falls short by more than the limits, and that is not accepted.
    """
    quality = tuple(map(compare, measurements, original))
    shortfalls = [] if measurements else [UNMEASURED]
    for dataset_quality in quality:
        shortfalls += losses(dataset_quality, options.limits)
    if shortfalls and not options.accept_loss:
        raise LossError(
            "nothing is written, for the bundle cannot be vouched for: "
            f"{'; '.join(shortfalls)}: {_OTHER_FORM if measurements else _NO_DATA}"
        )
    calibration = calibrate_sets((m.label_set, m.predictions) for m in measurements)
    return replace(
        info,
        quality=quality,
        accepted_loss=tuple(shortfalls),
        calibration={labels: calibrated.metrics for labels, calibrated in calibration.items()},
        temperatures={k: calibrated.scaling.temperature for k, calibrated in calibration.items()},
    )


def _add_demonstration_f1(
    info: BundleInfo, proof_data: ProofData, scorer: Scorer, retriever: Retriever
) -> BundleInfo:
    """Add the weighted F1 of questions that show demonstrations."""
    scores = [
        f1_with_demonstrations(proof_data.engine(scorer, dataset), dataset, retriever)
        for _, dataset in proof_data.held_out
    ]
    quality = [
        replace(dataset_quality, weighted_f1_with_demonstrations=score)
        for dataset_quality, score in zip(info.quality, scores, strict=True)
    ]
    return replace(info, quality=tuple(quality))


def _architecture(model: PackedModel) -> dict[str, Any]:
    """The model's configuration, without what is of this machine or of how it was loaded."""
    config: dict[str, Any] = model.model.config.to_diff_dict()
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {k: v for k, v in config.items() if k not in (*left_out, "quantization_config")}


def summary(info: BundleInfo, folder: Path, label_sets: Collection[str] | None = None) -> str:
    """What was written and measured, for people; of all label sets, or of some."""
    size = sum(digest.size for digest in info.files.values()) / 1e6
    lines = [f"{folder}: {info.form}, {size:,.1f} MB"]
    for quality in info.quality:
        if label_sets is not None and quality.label_set not in label_sets:
            continue
        line = f"{quality.title}: weighted F1 {quality.weighted_f1:.2%}"
        if quality.weighted_f1_original is not None:
            line += (
                f" (the trained model's {quality.weighted_f1_original:.2%}), agreement "
                f"{quality.agreement:.1%}, largest difference of a probability "
                f"{quality.largest_difference:.4f}, {quality.speed_ratio:.2f} times as fast as "
                "the model in torch here"
            )
        lines.append(line)
    for name, calibration in info.calibration.items():
        if label_sets is None or name in label_sets:
            lines.append(
                f"{name}: calibration error {calibration.error_after} with a temperature of "
                f"{calibration.temperature} ({calibration.error_before} without; chance alone "
                f"gives {calibration.error_if_perfect})"
            )
    lines += [f"warning: accepted loss: {loss}" for loss in info.accepted_loss]
    return "\n".join(lines)
