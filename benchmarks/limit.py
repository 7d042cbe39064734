"""How far labelling is from what the machine could do.

    python -m benchmarks.limit BUNDLE INPUT

An exact method must compute every token of every prompt, but each beginning that prompts share only
once; and of the last layer, all but keys and values only where an answer is read. That many rows go
through the model's matrix products. The limit is the time of these alone, at the speed that ONNX
Runtime reaches here on bare products of the same shapes and type, in the same run. What else a pass
does (attention, normalization, quantizing activations) is not in it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.graph import graph_file, measure
from benchmarks.packed import prompts
from ercbatch.errors import UsageError
from ercbatch.inputs.records import read_dialogues
from ercbatch.labeler import Labeler
from ercbatch.prompts.packs import Pack
from ercbatch.scoring.sessions import session_options
from ercbatch.terminal.stopping import exit_on_errors
from export.graph.nodes import MICROSOFT
from export.quantize.int4 import BLOCK

_FORMS = ("fp32", "int8", "int4")
_GATED = {"llama": True, "mistral": True, "qwen2": True, "qwen3": True, "bert": False}
"""Architecture -> whether its inner layer is two products of the same input."""
_REPEATS = 5
Matrices = Mapping[tuple[int, int], int]
"""(inputs, outputs) -> how many products there are of that shape."""


@dataclass(frozen=True, slots=True)
class Work:
    """What must go through a model: tokens, and how many of them are read."""

    tokens: int
    reads: int


def work(prompts: Iterable[Sequence[int]]) -> Work:
    """What prompts, each read at its end, need at the least: every beginning once."""
    nodes: dict[tuple[int, int], int] = {}
    ends = set()
    for prompt in prompts:
        node = 0
        for token in prompt:
            node = nodes.setdefault((node, token), len(nodes) + 1)
        ends.add(node)
    return Work(len(nodes), len(ends))


@dataclass(frozen=True, slots=True)
class Products:
    """The matrix products of a model: those of every token, and those of tokens that are read.

    Matrices that take the same input count as one, as they can be.
    """

    of_tokens: Matrices
    of_reads: Matrices

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> Products:
        """Those of a model with this `config.json`.

        Raises:
            UsageError: an architecture that is not known here.
        """
        kind = architecture.get("model_type")
        if kind not in _GATED:
            raise UsageError(f"no limit is known for {kind!r}: only for {', '.join(_GATED)}")
        hidden, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
        heads = architecture["num_attention_heads"]
        size = architecture.get("head_dim") or hidden // heads
        query_width = size * heads
        key_value_width = 2 * size * (architecture.get("num_key_value_heads") or heads)
        inner = architecture["intermediate_size"]
        tail = [
            (query_width, hidden),
            (hidden, inner * (2 if _GATED[kind] else 1)),
            (inner, hidden),
        ]
        layer_products = Counter([(hidden, query_width + key_value_width), *tail])
        return cls(
            Counter({shape: count * (layers - 1) for shape, count in layer_products.items()})
            + Counter([(hidden, key_value_width)]),
            Counter([(hidden, query_width), *tail]),
        )


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds that the products take for a token, and for one that is read."""

    token: float
    read: float

    def seconds(self, needed: Work) -> float:
        """The limit."""
        return self.token * needed.tokens + self.read * needed.reads


class Peak:
    """The machine's speed on bare products of a bundle's form and shapes.

    Args:
        form: fp32, int8 or int4.
        products: the shapes.
        packs: the packs, whose middle size gives the rows of a product.
        threads: processor threads.
    """

    def __init__(self, form: str, products: Products, packs: Sequence[Pack], threads: int) -> None:
        self._tokens = int(statistics.median(len(pack) for pack in packs))
        self._reads = int(statistics.median(len(pack.reads) for pack in packs))
        self._of_tokens = self._sessions(form, products.of_tokens, self._tokens, threads)
        self._of_reads = self._sessions(form, products.of_reads, self._reads, threads)

    @staticmethod
    def _sessions(form: str, matrices: Matrices, rows: int, threads: int) -> list[_Bare]:
        return [_Bare(form, rows, *shape, count, threads) for shape, count in matrices.items()]

    def rate(self) -> Rate:
        """Measured now."""
        return Rate(
            sum(bare.seconds() for bare in self._of_tokens) / self._tokens,
            sum(bare.seconds() for bare in self._of_reads) / self._reads,
        )


class _Bare:
    """One matrix product [rows, k] x [k, n], which the model has `count` times."""

    def __init__(self, form: str, rows: int, k: int, n: int, count: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        options: dict[str, Any] = {}
        constants: dict[str, npt.NDArray[Any]]
        if form == "fp32":
            operator, kind = "MatMul", TensorProto.FLOAT
            constants = {"w": rng.standard_normal((k, n), np.float32)}
            self._input: npt.NDArray[Any] = rng.standard_normal((rows, k), np.float32)
        elif form == "int8":
            operator, kind = "MatMulInteger", TensorProto.INT32
            weight = rng.integers(-63, 64, (k, n), np.int8)
            constants = {"w": weight, "zero": np.array(128, np.uint8)}
            self._input = rng.integers(0, 256, (rows, k), np.uint8)
        else:
            operator, kind = "MatMulNBits", TensorProto.FLOAT
            options = {"domain": MICROSOFT, "K": k, "N": n, "bits": 4, "block_size": BLOCK}
            options["accuracy_level"] = 4
            blocks = -(-k // BLOCK)
            packed = rng.integers(0, 256, (n, blocks, BLOCK // 2), np.uint8)
            constants = {"w": packed, "scales": np.ones(n * blocks, np.float32)}
            self._input = rng.standard_normal((rows, k), np.float32)
        input_type = helper.np_dtype_to_tensor_dtype(self._input.dtype)
        graph = helper.make_graph(
            [helper.make_node(operator, ["x", *constants], ["y"], **options)],
            "bare",
            [helper.make_tensor_value_info("x", input_type, (rows, k))],
            [helper.make_tensor_value_info("y", kind, (rows, n))],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._count = count

    def seconds(self) -> float:
        """The time of all `count` of them: the middle of a few, times that."""
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            self._session.run(None, {"x": self._input})
            times.append(time.perf_counter() - began)
        return self._count * statistics.median(times)


def open_peak(labeler: Labeler, packs: Sequence[Pack], threads: int) -> Peak:
    """The peak of a bundle on its packs.

    Raises:
        UsageError: a form or an architecture without a limit.
    """
    info = labeler.bundle.info
    if info.form not in _FORMS:
        raise UsageError(f"no limit is known for the form {info.form}: only for {_FORMS}")
    return Peak(info.form, Products.of(info.architecture), packs, threads)


@click.command()
@click.argument("bundle")
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def main(bundle: str, source: Path, threads: int, rounds: int) -> None:
    """Measure BUNDLE on the dialogues of SOURCE (JSONL)."""
    with exit_on_errors():
        result = hold_against_limit(bundle, source, threads, rounds)
    for name, value in result.items():
        click.echo(f"{name.replace('_', ' '):32}{value}")
    click.echo(json.dumps(result))


def hold_against_limit(bundle: str, source: Path, threads: int, rounds: int) -> dict[str, Any]:
    """The figures, by name. The time is that of the graph, without rendering.

    Raises:
        ErcbatchError: the bundle or the dialogues cannot be used.
    """
    labeler = Labeler(bundle, threads=threads)
    engine = labeler.engine
    dialogues = [dialogue for _, dialogue in read_dialogues(source)]
    packs = list(engine.packs(dialogues))
    if not packs:
        raise UsageError(f"{source}: has nothing to label")
    needed = work(ids for dialogue in dialogues for _, ids in prompts(engine, dialogue))
    peak = open_peak(labeler, packs, threads)
    before = peak.rate()
    profile = measure({bundle: graph_file(bundle)}, packs, threads, rounds)[bundle]
    limit = statistics.mean(rate.seconds(needed) for rate in (before, peak.rate()))
    computed = sum(len(pack) for pack in packs)
    return {
        "form": labeler.bundle.info.form,
        "utterances": sum(len(pack.reads) for pack in packs),
        "tokens_computed": computed,
        "tokens_needed": needed.tokens,
        "computed_of_needed": round(computed / needed.tokens, 3),
        "products_share": profile.to_json()["products_share"],
        "seconds": round(profile.seconds, 4),
        "limit_seconds": round(limit, 4),
        "time_of_limit": round(profile.seconds / limit, 2),
        "threads": threads,
        "rounds": rounds,
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.limit")
