"""The ONNX Runtime scorer: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from ercbatch.errors import BundleError
from ercbatch.prompts.answers import AnswerHead, FloatArray
from ercbatch.prompts.packs import Pack
from ercbatch.scoring import tiles
from ercbatch.scoring.scorer import StateScorer
from ercbatch.scoring.sessions import LONGEST_PACK, open_session, run_session

PROBE_SHAPE = (4, 64)
"""Of the input of a bundle's probe, whose weights are all 127."""


def check_full_range(path: Path) -> None:
    """See that this processor adds the products of full-range int8 weights without saturation.

    Raises:
        BundleError: it doesn't.
    """
    session = open_session(path, 1)
    products = run_session(path, session, None, {"x": np.full(PROBE_SHAPE, 255, np.uint8)})[0]
    if not (products == 255 * 127 * PROBE_SHAPE[1]).all():
        raise BundleError(
            f"{path.parent}: its int8 weights use the full range, and this processor's integer "
            "products saturate there: export it with --target avx2"
        )


_LARGE_MODEL = 2 << 30
"""Bytes of weights from which a pack takes so long that all threads should work on one."""


class OnnxScorer(StateScorer):
    """Scores packs with `model.onnx`, whose external data may stand in `file_names` beside it.

    Several packs at a time, one thread each, are faster than several threads on one pack: between
    its products stand hundreds of operations too small to be shared. And what a thread computes
    doesn't depend on how many there are.
    """

    packages = ("onnxruntime",)
    longest_pack = LONGEST_PACK

    def __init__(
        self, path: Path, head: AnswerHead, threads: int, file_names: Collection[str] = ()
    ) -> None:
        self.head = head
        self._path = path
        data_files = (
            path.with_name(name) for name in file_names if name.startswith(f"{path.name}.")
        )
        size = sum(file.stat().st_size for file in (path, *data_files))
        self.parallel_packs = 1 if size >= _LARGE_MODEL else threads
        self.placement = {"pack_threads": threads // self.parallel_packs}
        self._session = open_session(path, threads // self.parallel_packs, file_names)
        self._tiles = tiles_of(path, self._session)
        self._threads = threads

    def describe(self) -> str:
        """See `Scorer.describe`."""
        return f"ONNX Runtime {onnxruntime.__version__}, CPU, {self._threads} threads"

    def states(self, pack: Pack) -> FloatArray:
        """See `StateScorer.states`."""
        inputs = feed(pack, self._tiles)
        states: FloatArray = run_session(self._path, self._session, None, inputs)[0]
        return states[:1] if len(pack.reads) == 1 else states


_MAX_TILES = 64


def tiles_of(path: Path, session: onnxruntime.InferenceSession) -> int:
    """Into how many tiles the graph in a file divides attention; 0 for one that knows of none.

    Raises:
        BundleError: too many, or not said.
    """
    for value in session.get_inputs():
        if value.name == tiles.ROW_COUNTS:
            count = value.shape[0] if value.shape else None
            if not isinstance(count, int) or not 0 < count <= _MAX_TILES:
                raise BundleError(
                    f"{path}: its attention has {count} tiles, not 1 to {_MAX_TILES}: export the "
                    "bundle again"
                )
            return count
    return 0


def feed(pack: Pack, tile_count: int) -> dict[str, npt.NDArray[np.int64]]:
    """A pack as the inputs of a graph with `tile_count` tiles.

    `reads` is [reads], inputs for each token are [1, length], those of the tiles as in `Tiles`.

    A lone answer is read twice: what is computed in one row alone is rounded in another way.
    """
    tokens, positions, ends = pack.tokens, pack.positions, pack.ends
    reads = np.array([index for index, _, _ in pack.reads], dtype=np.int64)
    if len(reads) == 1:
        reads = reads.repeat(2)
    inputs = {}
    if tile_count:
        layout = tiles.cut(ends, tile_count)
        order = layout.order
        tokens, positions, ends = tokens[order], positions[order], ends[order]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        reads = place[reads]
        inputs = {
            tiles.ORDER: order[None],
            tiles.ROW_COUNTS: layout.row_counts,
            tiles.KEYS: layout.keys,
            tiles.KEY_COUNTS: layout.key_counts,
        }
    return {
        "tokens": tokens[None].astype(np.int64),
        "positions": positions[None].astype(np.int64),
        "ends": ends[None].astype(np.int64),
        "reads": reads,
        **inputs,
    }
