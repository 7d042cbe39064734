"""The engine: dialogues in, label probabilities out, in input order, in constant memory.

Dialogues are taken in chunks, and no pack holds dialogues of two chunks. So a chunk always has the
same packs, and a run can resume at its start. Rendering (tokenizing, retrieving, packing) runs in
its own thread, a few packs ahead of scoring; the matrix products release Python's lock.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ercbatch.dialogues import Dialogue
from ercbatch.errors import BundleError, foreign_errors
from ercbatch.prompts.packs import Pack, Packer
from ercbatch.prompts.tree import Question, Renderer, Task
from ercbatch.retrieval.retriever import Retriever
from ercbatch.scoring.scorer import Scorer, calibrated

T = TypeVar("T")
R = TypeVar("R")
Answer = tuple[int, int, npt.NDArray[np.float64]]
"""(number of the item, utterance, probabilities [labels])."""

_ADVICE = "export the bundle again"
_PREFETCHED_PACKS = 4
"""Packs that are rendered before they can be scored."""
RETRIEVED_TOGETHER = 64
"""Utterances that the sentence encoder embeds in one call, at least."""
_CHUNK_ITEMS = 256
_CHUNK_BYTES = 4 << 20
"""A chunk ends with the item at which its input lines reach this size."""


def _prefetch(source: Iterable[T], depth: int) -> Iterator[T]:
    """Run an iterable in a thread, at most `depth` items ahead; its errors are raised here."""
    items: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                items.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in source:
                if not put((True, item)):
                    return
        except BaseException as error:  # it is raised again where the items are taken
            put((False, error))
        else:
            put((False, None))

    thread = threading.Thread(target=run, name="ercbatch-render", daemon=True)
    thread.start()
    try:
        while True:
            more, value = items.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join(timeout=0.2)  # unless it waits for input


def in_order(act: Callable[[T], R], source: Iterable[T], threads: int) -> Generator[R, None, None]:
    """`act` on each item in one of some threads; the results in the order of the items.

    The caller's thread only waits, for signals are handled in no other.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ercbatch-score")
    futures: deque[Future[R]] = deque()
    wait = True
    ahead = threads if threads > 1 else 0  # one waits, so that no thread does
    try:
        for item in source:
            futures.append(pool.submit(act, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BaseException as error:
        # Who stops a run wants to commit now, not after a long pack.
        wait = isinstance(error, Exception | GeneratorExit)
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


@dataclass(slots=True)
class Entry(Generic[T]):
    """An item on its way through the engine.

    Attributes:
        origin: what the caller knows the item by.
        dialogue: None for an item that only passes through in its place.
        first_in_chunk: origin of the first item of the chunk.
        index: the item's index in the chunk.
        ends_chunk: whether it is the last item of the chunk.
        unanswered: number of questions without an answer.
        rows: probabilities [labels] by utterance index; blank utterances have none.
    """

    origin: T
    dialogue: Dialogue | None
    first_in_chunk: T
    index: int
    ends_chunk: bool
    unanswered: int = 0
    rows: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Step(Generic[T]):
    """A pack, or None at the end of a chunk, and the entries that began since the last one."""

    entries: list[Entry[T]]
    pack: Pack | None


@dataclass(frozen=True, slots=True)
class Engine:
    """Turns dialogues into probabilities over one label set.

    Attributes:
        scorer: computes log probabilities.
        renderer: makes the prompt trees of a dialogue.
        temperature: divides the log probabilities.
        pack_tokens: most tokens of a pack that holds several trees, if the scorer takes as many.
        retriever: finds demonstrations; None if no question shows any.
        demonstrations: number of demonstrations that a question shows.
        offsets: added to each label's log probability after the temperature; one a label, or none.
    """

    scorer: Scorer
    renderer: Renderer
    temperature: float
    pack_tokens: int
    retriever: Retriever | None = None
    demonstrations: int = 0
    offsets: tuple[float, ...] = ()

    @property
    def longest_pack(self) -> int:
        """Most tokens of a pack that holds several trees: `pack_tokens`, or the scorer's limit."""
        return min(self.pack_tokens, self.scorer.longest_pack or self.pack_tokens)

    def run(
        self, items: Iterable[tuple[T, Dialogue | None]], written: int = 0
    ) -> Iterator[Entry[T]]:
        """Yield an answered entry for each (origin, dialogue), in order.

        To resume, pass the items from the start of a chunk. The first `written` of them are not
        yielded, and packs that hold nothing else are not scored.
        """
        pending: dict[int, Entry[T]] = {}
        next_number = written
        packs = _prefetch(self._steps(items, written), _PREFETCHED_PACKS)
        for entries, answers in in_order(self._score, packs, self.scorer.parallel_packs):
            for entry in entries:
                pending[next_number] = entry
                next_number += 1
            for number, utterance, probabilities in answers:
                if number >= written:
                    pending[number].rows[utterance] = probabilities
                    pending[number].unanswered -= 1
            while pending and not pending[first := next(iter(pending))].unanswered:
                yield pending.pop(first)

    def questions(self, dialogue: Dialogue) -> list[Question]:
        """The questions that labelling asks about a dialogue, with their demonstrations."""
        ((_, questions),) = self._questions(_entries([(None, dialogue)]))
        return questions

    def packs(self, dialogues: Iterable[Dialogue]) -> Iterator[Pack]:
        """The packs that labelling makes of dialogues."""
        for step in self._steps(((None, dialogue) for dialogue in dialogues), 0):
            if step.pack is not None:
                yield step.pack

    def _score(self, step: _Step[T]) -> tuple[list[Entry[T]], list[Answer]]:
        if step.pack is None:
            return step.entries, []
        with foreign_errors(BundleError, "the model is not what it should be", _ADVICE):
            answers = list(self.scorer.answers(step.pack, self.renderer.trie))
        return step.entries, [
            (number, t, calibrated(log_probabilities, self.temperature, self.offsets))
            for number, t, log_probabilities in answers
        ]

    def _steps(
        self, items: Iterable[tuple[T, Dialogue | None]], written: int
    ) -> Iterator[_Step[T]]:
        packer = Packer(self.longest_pack, len(self.renderer.head))
        entries: list[Entry[T]] = []
        for number, (entry, questions) in enumerate(self._questions(_entries(items))):
            entry.unanswered = len(questions)
            if number >= written:
                entries.append(entry)
            if entry.dialogue is not None and questions:
                for tree in self.renderer.trees(entry.dialogue, questions):
                    pack = _unwritten(packer.add(number, tree), written)
                    if pack is not None:
                        yield _Step(entries, pack)
                        entries = []
            if entry.ends_chunk:
                yield _Step(entries, _unwritten(packer.flush(), written))
                entries = []
        yield _Step(entries, _unwritten(packer.flush(), written))

    def _questions(self, entries: Iterable[Entry[T]]) -> Iterator[tuple[Entry[T], list[Question]]]:
        """Entries, each with the questions about its utterances.

        Demonstrations are retrieved for several entries of a chunk at once.
        """
        group: list[tuple[Entry[T], list[int]]] = []
        for entry in entries:
            group.append((entry, entry.dialogue.nonblank if entry.dialogue is not None else []))
            size = sum(len(utterances) for _, utterances in group)
            if self.retriever is None or entry.ends_chunk or size >= RETRIEVED_TOGETHER:
                yield from self._attach_demonstrations(group)
                group = []
        yield from self._attach_demonstrations(group)

    def _attach_demonstrations(
        self, group: Iterable[tuple[Entry[T], list[int]]]
    ) -> Iterator[tuple[Entry[T], list[Question]]]:
        demonstrations: Iterator[tuple[tuple[str, str], ...]] = iter(())
        if self.retriever is not None and self.demonstrations:
            texts = [
                entry.dialogue.utterances[t].text
                for entry, utterances in group
                if entry.dialogue is not None
                for t in utterances
            ]
            if texts:
                with foreign_errors(BundleError, "the encoder is not what it should be", _ADVICE):
                    demonstrations = iter(self.retriever.demonstrations(texts, self.demonstrations))
        for entry, utterances in group:
            yield entry, [Question(Task.EMOTION, t, next(demonstrations, ())) for t in utterances]


def _entries(items: Iterable[tuple[T, Dialogue | None]]) -> Iterator[Entry[T]]:
    """Divide items into chunks."""
    index = size = 0
    for origin, dialogue in items:
        if index == 0:
            first_in_chunk = origin
        size += dialogue.size if dialogue is not None else 0
        ends_chunk = index + 1 == _CHUNK_ITEMS or size >= _CHUNK_BYTES
        yield Entry(origin, dialogue, first_in_chunk, index, ends_chunk)
        index, size = (0, 0) if ends_chunk else (index + 1, size)


def _unwritten(pack: Pack | None, written: int) -> Pack | None:
    """The pack, or None if all of its items are written."""
    if pack is None or all(number < written for _, number, _ in pack.reads):
        return None
    return pack
