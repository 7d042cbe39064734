"""Other searches, each in a process of its own: `python peer_search.py KIND VECTORS EF`.

Run as a file by whichever Python has what it needs: NumPy, and for `flat` and `hnsw` faiss. Vectors
are a .npy file [n, dim] of unit length. Requests and answers are JSON lines:

    {"queries": FILE, "count": 3, "batch": 64} -> {"ids": [[...]], "seconds": 0.1}

The first answer, before any request, is {"build_seconds", "disk_mb", "version"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]

_LINKS, _CONSTRUCTION = 16, 200
"""M and efConstruction of faiss's graph: those of the package's."""


class Exact:
    """All similarities in one product, and the best of each row."""

    version = f"numpy {np.__version__}"

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    def disk_mb(self) -> float:
        """What is searched, as a file."""
        return self._vectors.nbytes / 1e6

    def search(self, queries: Vectors, count: int) -> Places:
        """(queries [n, dim], count) -> places [n, count], the most similar first."""
        similarities = queries @ self._vectors.T
        best = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similarities, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)


class Faiss:
    """faiss's IndexFlatIP, or its IndexHNSWFlat by the inner product, on one thread."""

    def __init__(self, kind: str, vectors: Vectors, ef: int) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self.version = f"faiss {faiss.__version__}"
        self._write = faiss.write_index
        dim = vectors.shape[1]
        self._index: Any = faiss.IndexFlatIP(dim)
        if kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = _CONSTRUCTION
            self._index.hnsw.efSearch = ef
        self._index.add(vectors)

    def disk_mb(self) -> float:
        """See `Exact.disk_mb`."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "index")
            self._write(self._index, str(path))
            return path.stat().st_size / 1e6

    def search(self, queries: Vectors, count: int) -> Places:
        """See `Exact.search`."""
        places: Places = self._index.search(queries, count)[1]
        return places


def main(kind: str, file: str, ef: int) -> None:
    """Build, and answer until the requests end."""
    vectors: Vectors = np.load(file, mmap_mode="r")  # the processes share its pages
    began = time.perf_counter()
    peer = Exact(vectors) if kind == "exact" else Faiss(kind, vectors, ef)
    seconds = time.perf_counter() - began
    say({"build_seconds": seconds, "disk_mb": peer.disk_mb(), "version": peer.version})
    for line in sys.stdin:
        request = json.loads(line)
        queries: Vectors = np.load(request["queries"])
        batch = request["batch"]
        began = time.perf_counter()
        places = [
            peer.search(queries[at : at + batch], request["count"])
            for at in range(0, len(queries), batch)
        ]
        seconds = time.perf_counter() - began
        say({"ids": np.concatenate(places).tolist(), "seconds": seconds})


def say(answer: dict[str, Any]) -> None:
    """One line to whoever asks."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
