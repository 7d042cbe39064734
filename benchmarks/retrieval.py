"""How well and how fast demonstrations are found in banks of many sizes, and how others do it.

    python -m benchmarks.retrieval [--faiss PYTHON]

The bank is the package's own, saved and loaded, and searched by `DemonstrationBank.nearest` with
the 64 utterances at once that labelling looks up together; one thread. It is searched as

- `ercbatch`: every entry under one label, so that the results are the plain nearest ones, which
  the others are compared with: the texts asked about are not in the bank;
- `ercbatch, balanced`: as labelling does it: results take turns over the labels, and the texts
  asked about are entries of the bank, which must not be shown to themselves;
- `ercbatch, one label`: training's same-label rule, which is always exact.

The others are exact search by a matrix product of NumPy (`exact`; `exact, alone` is asked one text
at a time), and faiss where there is one: `faiss, exact` (IndexFlatIP), and `faiss, hnsw`
(IndexHNSWFlat, as many links and candidates at construction, and as broad a search). They all take
turns, the others each in a process of its own.

Recall@k is the share of the k results that exact search gives; as usual, a result as similar as
the k-th one counts (for balanced results: the one of the same label).

Texts are invented, or those of a JSONL file. To embed a million of them takes the better part of an
hour, so beyond `--embedded` vectors are mixtures of two embedded ones, with noise of a tenth of
their length, made unit vectors again. They take the label of the one that weighs more (0.5 to
0.75): heavier, and all that share it would be much nearer to each other than sentences are. The
plain search finds as much in such a bank as in one of real comments; the balanced search less, as
the bank grows by more mixtures of each. Random vectors would be far harder, and like no text.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.lib.options import numbers
from benchmarks.lib.searches import COUNTS, Engine, OwnBank, Peer, Queries, Truth, open_bank
from benchmarks.lib.sentences import invent
from ercbatch.bundle.bundle import encoder_files
from ercbatch.engine import RETRIEVED_TOGETHER
from ercbatch.errors import UsageError
from ercbatch.labels import LabelSet
from ercbatch.retrieval.bank import (
    CANDIDATES,
    Demonstration,
    Vectors,
    read_examples,
    search_breadth,
    text_key,
)
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.scoring.threads import available_threads
from ercbatch.terminal.stopping import exit_on_errors

_TIMED_RESULTS = 3
"""Results, where speed is told."""
_HEAVIER = (0.5, 0.75)
_NOISE = 0.1
"""Of a mixture: the weight of its first part, from and to, and the length of its noise."""
_COLUMNS = {
    "recall_at_1": "recall@1",
    "recall_at_3": "recall@3",
    "recall_at_5": "recall@5",
    "queries_per_second": "queries/s",
    "times_exact": "times exact",
    "times_exact_alone": "of one by one",
    "build_seconds": "build, s",
    "load_seconds": "load, s",
    "disk_mb": "disk, MB",
}
"""Metric -> its heading."""

_PEERS = {
    "exact": ("exact", "queries.npy", RETRIEVED_TOGETHER),
    "exact, alone": ("exact", "few.npy", 1),
    "faiss, exact": ("flat", "queries.npy", RETRIEVED_TOGETHER),
    "faiss, hnsw": ("hnsw", "queries.npy", RETRIEVED_TOGETHER),
}
"""Name -> its kind in `peer_search.py`, the file of its queries, how many it is asked at once."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What banks are made of: demonstrations with vectors [n, dim], and texts outside of them."""

    demonstrations: list[Demonstration]
    vectors: Vectors
    outside: Queries


def embed(demonstrations: Sequence[Demonstration], bundle: str, outside: int) -> Corpus:
    """Embed all; the first `outside` of them are the texts to look up."""
    encoder = SentenceEncoder(*encoder_files(bundle), threads=available_threads())
    texts = [d.text for d in demonstrations]
    vectors = encoder.encode(texts)
    queries = Queries(texts[:outside], vectors[:outside])
    return Corpus(list(demonstrations[outside:]), vectors[outside:], queries)


def grow(corpus: Corpus, size: int) -> tuple[list[Demonstration], Vectors]:
    """The first `size` entries of a corpus, and beyond its end mixtures of them."""
    corpus_size = len(corpus.demonstrations)
    if size <= corpus_size:
        return corpus.demonstrations[:size], corpus.vectors[:size]
    random = np.random.default_rng(size)
    mixture_count, dim = size - corpus_size, corpus.vectors.shape[1]
    vectors = np.empty((size, dim), np.float32)
    vectors[:corpus_size] = corpus.vectors
    first, second = random.integers(0, corpus_size, (2, mixture_count))
    for at in range(0, mixture_count, 10_000):
        place = slice(at, at + 10_000)
        weight = random.uniform(*_HEAVIER, (len(first[place]), 1))
        mixed = weight * corpus.vectors[first[place]] + (1 - weight) * corpus.vectors[second[place]]
        mixed += random.normal(0, _NOISE / dim**0.5, mixed.shape)
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        vectors[corpus_size + at : corpus_size + at + len(mixed)] = mixed
    mixtures = [
        Demonstration(f"{corpus.demonstrations[i].text} ({number})", corpus.demonstrations[i].label)
        for number, i in enumerate(first.tolist())
    ]
    return corpus.demonstrations + mixtures, vectors


@dataclass(frozen=True, slots=True)
class Trial:
    """What is measured: bank sizes, texts looked up, rounds, and a Python with faiss, if any."""

    sizes: list[int]
    queries: int
    rounds: int
    faiss: str | None


def measure(trial: Trial, corpus: Corpus, versions: dict[str, str]) -> dict[str, Any]:
    """The metrics of every engine, for each size; `versions` gets those of the peers.

    Raises:
        RuntimeError: a peer fails.
    """
    metrics: dict[str, Any] = {}
    for size in trial.sizes:
        with TemporaryDirectory() as folder, ExitStack() as peers:
            engines, truths = _open(trial, corpus, size, Path(folder), peers, versions)
            metrics[str(size)] = {
                "embedded": min(size, len(corpus.demonstrations)),
                "engines": _compare(engines, truths, trial.rounds),
            }
        click.echo(f"{size}: {json.dumps(metrics[str(size)])}", err=True)
    return metrics


def _open(
    trial: Trial,
    corpus: Corpus,
    size: int,
    folder: Path,
    peers: ExitStack,
    versions: dict[str, str],
) -> tuple[dict[str, Engine], dict[str, Truth]]:
    """The engines by name, and what those should find of whom recall is asked."""
    demonstrations, vectors = grow(corpus, size)
    bank, build_metrics = open_bank(demonstrations, vectors)
    labels = [d.label for d in demonstrations]
    merged = bank.restricted(LabelSet("one", ("any", "none"), dict.fromkeys(labels, "any")))
    places = np.random.default_rng(0).permutation(size)[: trial.queries]
    inside = Queries([demonstrations[i].text for i in places], vectors[places])
    golds = [labels[i] for i in places]
    outside = corpus.outside
    engines: dict[str, Engine] = {
        "ercbatch": OwnBank(merged, outside, build_metrics),
        "ercbatch, balanced": OwnBank(bank, inside, {}),
        "ercbatch, one label": OwnBank(bank, inside, {}, golds),
    }
    plain = Truth(["any"] * size, vectors, outside.vectors, [None] * len(outside.texts))
    truths = dict.fromkeys(("ercbatch", *_PEERS), plain)
    truths["ercbatch, balanced"] = Truth(labels, vectors, inside.vectors, places.tolist())
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", outside.vectors)
    np.save(folder / "few.npy", outside.vectors[:RETRIEVED_TOGETHER])
    ef = search_breadth(_TIMED_RESULTS * CANDIDATES, size)
    for name, (kind, queries, batch) in _PEERS.items():
        python = sys.executable if kind == "exact" else trial.faiss
        if python is not None:
            peer = Peer(kind, python, folder / "vectors.npy", folder / queries, ef, batch)
            peers.callback(peer.close)
            library, _, release = peer.version.partition(" ")
            versions[library] = release
            engines[name] = peer
    return engines, truths


def _compare(
    engines: dict[str, Engine], truths: dict[str, Truth], rounds: int
) -> dict[str, dict[str, Any]]:
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            speeds[name].append(engine.find(_TIMED_RESULTS)[1])
    metrics: dict[str, dict[str, Any]] = {}
    for name, engine in engines.items():
        metrics[name] = dict(engine.metrics)
        if name in truths:
            for count in COUNTS:
                recall = truths[name].recall(engine.find(count)[0], count)
                metrics[name][f"recall_at_{count}"] = round(recall, 4)
        metrics[name]["queries_per_second"] = round(statistics.median(speeds[name]), 1)
        for metric, exact in (("times_exact", "exact"), ("times_exact_alone", "exact, alone")):
            pairs = zip(speeds[name], speeds[exact], strict=True)
            metrics[name][metric] = round(statistics.median(speed / e for speed, e in pairs), 2)
    return metrics


def distinct(demonstrations: Sequence[Demonstration]) -> list[Demonstration]:
    """Those whose texts are no other's: a bank leaves out what differs in case alone, too."""
    return list({text_key(d.text): d for d in reversed(demonstrations)}.values())[::-1]


@click.command()
@click.option("--sizes", default="1000,100000,1000000", show_default=True, callback=numbers(100))
@click.option(
    "--embedded", type=click.IntRange(200), default=100_000, show_default=True, help="At most."
)
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL of labelled examples or dialogues to embed; default: invented sentences.",
)
@click.option("--queries", type=click.IntRange(1), default=512, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--faiss",
    envvar="FAISS_PYTHON",
    show_envvar=True,
    metavar="PYTHON",
    help="A Python with faiss; default: this one, if it has it.",
)
@click.option("--bundle", default="mini", show_default=True, help="Whose encoder embeds.")
def main(
    sizes: list[int],
    embedded: int,
    texts: Path | None,
    queries: int,
    rounds: int,
    faiss: str | None,
    bundle: str,
) -> None:
    """Measure the search in banks of some sizes."""
    if faiss is None and importlib.util.find_spec("faiss"):
        faiss = sys.executable
    if faiss is None:
        click.echo("no faiss: give --faiss PYTHON to compare with it", err=True)
    with exit_on_errors():
        limit = min(embedded, max(sizes)) + queries
        examples = distinct(read_examples(texts) if texts else invent(limit))[:limit]
        if len(examples) < 2 * queries:
            raise UsageError(f"{len(examples)} distinct texts: ask for fewer --queries")
        corpus = embed(examples, bundle, queries)
    versions = {name: version(name) for name in ("ercbatch", "hnswlib")}
    metrics = measure(Trial(sizes, queries, rounds, faiss), corpus, versions)
    for line in show(metrics):
        click.echo(line)
    result = {
        "texts": texts.name if texts else "invented",
        "dim": corpus.vectors.shape[1],
        "queries": queries,
        "retrieved_together": RETRIEVED_TOGETHER,
        "threads": 1,
        "rounds": rounds,
        "versions": versions,
        "sizes": metrics,
    }
    click.echo(json.dumps(result))


def show(metrics: dict[str, Any]) -> Iterator[str]:
    """The lines of a table for each size."""
    for size, size_metrics in metrics.items():
        headings = "".join(f"{heading:>15}" for heading in _COLUMNS.values())
        yield f"{int(size):<22,}{headings}"
        for name, row in size_metrics["engines"].items():
            yield f"{name:22}" + "".join(f"{row.get(metric, ''):>15}" for metric in _COLUMNS)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.retrieval")
