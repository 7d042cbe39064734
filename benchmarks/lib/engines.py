"""The engines that `benchmarks.throughput` compares, and the process of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.engine import Order

_ROOT = Path(__file__).resolve().parents[2]
_PEERS = "benchmarks.peers."


@dataclass(frozen=True, slots=True)
class Kind:
    """What an engine is."""

    module: str
    """What its process runs."""
    weights: str
    """In which form: one of `export bundle --quantize`, or a name that the engine has for it."""
    form: str = ""
    """What else its process is told; by default the form of its weights."""
    environment: str = ""
    """Which of `peers/setup.sh`; by default ours."""
    bits: int = 32
    """Of its weights."""
    usual: bool = True
    """Whether it is compared where nobody says which are."""

    @property
    def ours(self) -> bool:
        """Whether it is ercbatch."""
        return self.module == "benchmarks.ours"


def _ours(weights: str, form: str, **values: Any) -> Kind:
    return Kind("benchmarks.ours", weights, form, **values)


def _peer(module: str, weights: str, **values: Any) -> Kind:
    return Kind(_PEERS + module, weights, **values)


_TRANSFORMERS = "transformers_generate"
_CT2: Mapping[str, Any] = {"module": "ctranslate", "environment": "ct2"}
_OPENVINO: Mapping[str, Any] = {"module": "openvino_genai_cpu", "environment": "openvino"}
_GENAI: Mapping[str, Any] = {"module": "onnxruntime_genai_cpu", "environment": "ortgenai"}
_LLAMA: Mapping[str, Any] = {"module": "llama_cpp_python", "environment": "llamacpp"}
BASELINE = "transformers"
"""What agreement and speed are told against."""
KINDS: Mapping[str, Kind] = {
    "ours-fp32": _ours("fp32", "packed"),
    "ours-int8": _ours("int8", "packed", bits=8),
    "ours-int4": _ours("int4", "packed", bits=4),
    "ours-nf4": _ours("nf4", "packed", bits=4, usual=False),
    "ours-bnb-int8": _ours("bnb-int8", "packed", bits=8, usual=False),
    "ours-separate-fp32": _ours("fp32", "separate"),
    "ours-separate-int8": _ours("int8", "separate", bits=8),
    BASELINE: _peer(_TRANSFORMERS, "fp32"),
    "transformers-static": _peer(_TRANSFORMERS, "fp32", form="static", usual=False),
    "ctranslate2-fp32": _peer(weights="fp32", **_CT2),
    "ctranslate2-int8": _peer(weights="int8", bits=8, **_CT2),
    "openvino-int8": _peer(weights="int8", bits=8, **_OPENVINO),
    "openvino-int8-cached": _peer(weights="int8", form="cached", bits=8, **_OPENVINO),
    "ort-genai-fp32": _peer(weights="fp32", **_GENAI),
    "ort-genai-int8": _peer(weights="int8", bits=8, **_GENAI),
    "ort-genai-int4": _peer(weights="int4", bits=4, **_GENAI),
    "llama.cpp-fp32": _peer(weights="fp32", **_LLAMA),
    "llama.cpp-q8_0": _peer(weights="q8_0", bits=8, **_LLAMA),
    "llama.cpp-q4_0": _peer(weights="q4_0", bits=4, **_LLAMA),
}
"""Name -> engine. Those that are not usual are for a GPU."""


class EngineProcess:
    """An engine in a process of its own, on processors of its own.

    Args:
        kind: the engine.
        order: what it is to open.
        peers: the folder of the environments.
        processors: the numbers of those that it may use.
        log: where what it prints goes.

    Raises:
        RuntimeError: it cannot be started, or does not open the model; the message says why.
    """

    def __init__(
        self, kind: Kind, order: Order, peers: Path, processors: Collection[int], log: Path
    ) -> None:
        python = sys.executable
        if kind.environment:
            python = str(peers / kind.environment / "bin" / "python")
            if not Path(python).exists():
                raise RuntimeError(f"{python} is not there: bash benchmarks/peers/setup.sh {peers}")
        threads = str(order.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._log = log
        own_processors = os.sched_getaffinity(0)
        os.sched_setaffinity(0, processors)  # which the process takes over
        try:
            with log.open("w") as log_file:
                self._process = subprocess.Popen(
                    (python, "-m", kind.module, json.dumps(asdict(order))),
                    cwd=_ROOT,
                    env={**os.environ, **dict.fromkeys(names, threads), "HF_HUB_OFFLINE": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    text=True,
                )
        finally:
            os.sched_setaffinity(0, own_processors)
        self.versions: Mapping[str, str] = self._answer()["versions"]

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request, which is JSON.

        Raises:
            RuntimeError: it has none.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its last words say why
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line or "error" in answer:
            self.close()
            code = self._process.returncode
            raise RuntimeError(f"{answer.get('error', f'ended with {code}')} (see {self._log})")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
