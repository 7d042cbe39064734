"""Sessions of ONNX Runtime: one home for their settings and errors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from ercbatch.bundle.onnx_file import check_onnx
from ercbatch.errors import BundleError


def open_session(
    path: Path, threads: int, file_names: Collection[str] = ()
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Args:
        path: the graph.
        threads: processor threads of the session.
        file_names: names of the files beside it that may hold its external data.

    Raises:
        BundleError: the graph asks for what a bundle must not (see `check_onnx`), or the runtime
            does not accept it.
    """
    check_onnx(path, file_names)
    options = session_options(threads)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own, undocumented types
        raise BundleError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}. "
            "Export the bundle again, or install the onnxruntime that its card names"
        ) from error


def run_session(
    path: Path,
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str] | None,
    inputs: Mapping[str, npt.NDArray[np.generic]],
) -> Any:
    """The outputs of the graph in a file, all of them for None.

    Raises:
        BundleError: the graph does not take the inputs, or fails on them.
    """
    try:
        return session.run(outputs, dict(inputs))
    except Exception as error:  # see `open_session`
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{path}: fails in ONNX Runtime {onnxruntime.__version__} ({reason}): export the "
            "bundle again"
        ) from error


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """The settings of every session here, on `threads` processor threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Errors are raised; their words would go past us to stderr, as a stranger chose them.
    options.log_severity_level = 4
    # Every pack has another length: memory planned for one shape would not fit the next.
    options.enable_mem_pattern = False
    # Waiting threads sleep, so that reading and tokenizing have the processor meanwhile.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


LONGEST_PACK = 512
"""Tokens of packs that dialogues share. In longer ones ONNX Runtime adds up over keys in an order
that depends on where they stand, and int8 probabilities moved by up to 0.002 with neighbours."""
