"""Which runtime scores with a bundle, and that runtime opened."""

from __future__ import annotations

import fnmatch

from safetensors.numpy import load_file

from ercbatch import bundle as files
from ercbatch.answers import AnswerHead
from ercbatch.bundle import RUNTIMES, Bundle
from ercbatch.errors import BundleError, MissingExtraError, UsageError
from ercbatch.onnx_scorer import OnnxScorer
from ercbatch.scoring import Scorer

AUTO = "auto"


def choose_runtime(bundle: Bundle, runtime: str) -> str:
    """`onnx` or `bnb`; `auto` is the one that the bundle's form is for.

    Raises:
        UsageError: the bundle's form is not for this runtime.
    """
    form = bundle.info.form
    fitting = RUNTIMES[form]
    if runtime not in (AUTO, fitting):
        others = " or ".join(name for name, other in RUNTIMES.items() if other == runtime)
        raise UsageError(
            f"bundle {bundle.info.name!r} is {form}, which the runtime {fitting} runs: leave "
            f"--runtime at {AUTO}, or export with --quantize {others}"
        )
    return fitting


def open_scorer(bundle: Bundle, threads: int) -> Scorer:
    """The scorer of a bundle, in the runtime that its form is for.

    Raises:
        BundleError: the runtime does not accept the model.
        MissingExtraError: the runtime is not installed.
    """
    info = bundle.info
    head = AnswerHead.from_tensors(load_file(bundle.path(files.HEAD)))
    if RUNTIMES[info.form] == "onnx":
        return OnnxScorer(bundle.path(files.MODEL), head, threads)
    try:
        from ercbatch.bnb_scorer import BnbScorer
    except ImportError as error:
        raise MissingExtraError(
            f"bundle {info.name!r} is {info.form}, which torch and bitsandbytes run ({error}): "
            "pip install 'ercbatch[bnb]'"
        ) from error
    weights = [bundle.path(name) for name in sorted(fnmatch.filter(info.files, files.WEIGHTS))]
    if not weights:
        raise BundleError(f"{bundle.folder}: the bundle has no weights: export it again")
    return BnbScorer(bundle.path(files.CONFIG), weights, head, threads)
