"""Which runtime scores with a bundle, and that runtime opened."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from pathlib import Path

from safetensors.numpy import load_file

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import Bundle
from ercbatch.bundle.manifest import RUNTIME_OF_FORM
from ercbatch.errors import BundleError, MissingExtraError, UsageError
from ercbatch.prompts.answers import AnswerHead
from ercbatch.scoring.onnx_scorer import OnnxScorer, check_full_range
from ercbatch.scoring.optimum_scorer import OptimumScorer
from ercbatch.scoring.scorer import Scorer

AUTO = "auto"


def check_runtime(bundle: Bundle, runtime: str) -> None:
    """Check that a bundle's form is for a runtime: `onnx`, `bnb`, or `auto` for either.

    Raises:
        UsageError: it is not.
    """
    form = bundle.info.form
    form_runtime = RUNTIME_OF_FORM[form]
    if runtime not in (AUTO, form_runtime):
        forms = " or ".join(name for name, other in RUNTIME_OF_FORM.items() if other == runtime)
        raise UsageError(
            f"bundle {bundle.info.name!r} is {form}, which the runtime {form_runtime} runs: leave "
            f"--runtime at {AUTO}, or export with --quantize {forms}"
        )


def open_scorer(bundle: Bundle, threads: int) -> Scorer:
    """The scorer of a bundle, in the runtime that its form is for.

    Raises:
        BundleError: the runtime does not accept the model.
        MissingExtraError: the runtime is not installed.
    """
    head = AnswerHead.from_tensors(load_file(bundle.path(manifest.HEAD)))
    return open_model(bundle.folder, bundle.info.form, head, threads, bundle.info.files)


def open_model(
    folder: Path, form: str, head: AnswerHead, threads: int, file_names: Collection[str]
) -> Scorer:
    """The scorer of a model of this form in a folder, whose files are `file_names`.

    Raises:
        BundleError: the runtime does not accept the model.
        MissingExtraError: the runtime is not installed.
    """
    openers = {"onnx": _open_onnx, "bnb": _open_bnb}
    return openers[RUNTIME_OF_FORM[form]](folder, form, head, threads, file_names)


def _open_onnx(
    folder: Path, form: str, head: AnswerHead, threads: int, file_names: Collection[str]
) -> Scorer:
    if manifest.PROBE in file_names:
        check_full_range(folder / manifest.PROBE)
    if manifest.MODEL not in file_names:
        raise BundleError(f"{folder}: lacks {manifest.MODEL}: export it again")
    kind = OptimumScorer if form == "optimum" else OnnxScorer
    return kind(folder / manifest.MODEL, head, threads, file_names)


def _open_bnb(
    folder: Path, form: str, head: AnswerHead, threads: int, file_names: Collection[str]
) -> Scorer:
    try:
        from ercbatch.scoring.bnb_scorer import BnbScorer
    except ImportError as error:
        raise MissingExtraError(
            f"{folder}: a model in {form} is run by torch and bitsandbytes ({error}): "
            "pip install '.[bnb]' in a checkout of ercbatch"
        ) from error
    weights = sorted(fnmatch.filter(file_names, manifest.WEIGHTS))
    if not weights or manifest.CONFIG not in file_names:
        raise BundleError(
            f"{folder}: lacks {manifest.CONFIG} or {manifest.WEIGHTS}: export it again"
        )
    return BnbScorer(folder / manifest.CONFIG, [folder / name for name in weights], head, threads)
