"""Streaming: dialogues in, label probabilities out, in input order, in constant memory.

Rendering (tokenizing, retrieving, packing) runs in a thread of its own, a few packs ahead of those
that score; the matrix products release Python's lock. Which dialogues share a pack depends on
nothing but their order, so a run over the same input computes the same packs; and with each
dialogue that is answered comes the place from which a later run must read to go on with those.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ercbatch.dialogues import Dialogue
from ercbatch.errors import BundleError, foreign_errors
from ercbatch.labels import LabelSet
from ercbatch.prompts.packs import Pack, Packer
from ercbatch.prompts.tree import Question, Renderer, Task
from ercbatch.retrieval.bank import DemonstrationBank
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.scoring.scorer import Scorer, calibrated

T = TypeVar("T")
R = TypeVar("R")
Answer = tuple[int, int, npt.NDArray[np.float64]]
"""(owner, utterance, probabilities [labels])."""

_MEND = "export the bundle again"
_AHEAD = 4
"""Packs rendered ahead of those that are scored or wait for it."""
RETRIEVED_TOGETHER = 64
"""Utterances embedded in one call of the sentence encoder, at least."""
_BEGUN = 256
"""Items that wait at most for a pack, or a group of texts, to fill: bad and blank ones never do."""
_HELD = 4 << 20
"""Bytes of their lines, at most (but for a single one)."""


def prefetch(source: Iterable[T], depth: int) -> Iterator[T]:
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


def in_order(act: Callable[[T], R], source: Iterable[T], threads: int) -> Iterator[R]:
    """`act` on each item in one of some threads; the results in the order of the items.

    The caller's thread only waits, for signals are handled in no other.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ercbatch-score")
    running: deque[Future[R]] = deque()
    patient = True
    ahead = threads if threads > 1 else 0  # one waits, so that no thread does
    try:
        for item in source:
            running.append(pool.submit(act, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BaseException as error:
        # Who stops a run wants to commit now, not after a long pack.
        patient = isinstance(error, Exception | GeneratorExit)
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Retriever:
    """Finds demonstrations for utterances."""

    encoder: SentenceEncoder
    bank: DemonstrationBank

    def restricted(self, labels: LabelSet) -> Retriever:
        """The retriever over the demonstrations that have a label in this set."""
        return Retriever(self.encoder, self.bank.restricted(labels))

    def demonstrations(self, texts: list[str], count: int) -> list[tuple[tuple[str, str], ...]]:
        """(text, label) pairs for each text, `count` of them where the bank has as many."""
        several = list(dict.fromkeys(texts))
        own = [[text] for text in several]
        found = self.bank.nearest(self.encoder.encode(several), count, exclude=own)
        shown = [tuple((d.text, d.label) for d in few) for few in found]
        of_text = dict(zip(several, shown, strict=True))
        return [of_text[text] for text in texts]


@dataclass(frozen=True, slots=True)
class Restart(Generic[T]):
    """Where a run that goes on after an item must begin, so that it computes the same packs.

    It reads the item `origin`, and of the items from there on replays so many: their answers are
    known. The first `trees` of them went into packs that are done with.
    """

    origin: T
    items: int
    trees: int


@dataclass(frozen=True, slots=True)
class Answered(Generic[T]):
    """An item, with the probabilities [labels] of its utterances by index."""

    origin: T
    dialogue: Dialogue | None
    rows: Mapping[int, npt.NDArray[np.float64]]
    restart: Restart[T]


@dataclass(slots=True)
class _Entry(Generic[T]):
    """A dialogue under way, with what the caller knows it by.

    `group` are the number and the origin of the first item whose demonstrations are retrieved with
    its own: it cannot be replayed without those.
    """

    origin: T
    dialogue: Dialogue | None
    group: tuple[int, T]
    restart: Restart[T] | None = None
    waiting: int = 0
    """Questions not yet answered."""
    rows: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)


@dataclass(slots=True)
class _Held:
    """Items that wait, and the bytes of their lines."""

    items: int = 0
    size: int = 0

    def full_with(self, dialogue: Dialogue | None) -> bool:
        """Count one more item; whether no more should wait."""
        self.items += 1
        self.size += dialogue.size if dialogue is not None else 0
        return self.items >= _BEGUN or self.size >= _HELD


@dataclass(frozen=True, slots=True)
class _Step(Generic[T]):
    """A pack, whose owners' numbers are those of its reads, and the entries that begin since the
    last one."""

    begun: list[_Entry[T]]
    owners: Mapping[int, _Entry[T]] = field(default_factory=dict)
    pack: Pack | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """All that turns dialogues into probabilities over one label set."""

    scorer: Scorer
    renderer: Renderer
    temperature: float
    pack_tokens: int
    retriever: Retriever | None = None
    demonstrations: int = 0
    offsets: tuple[float, ...] = ()
    """Added to each label's log probability after the temperature; none, or one a label."""

    def run(
        self, items: Iterable[tuple[T, Dialogue | None]]
    ) -> Iterator[tuple[T, Dialogue | None, dict[int, npt.NDArray[np.float64]]]]:
        """Probabilities [labels] by utterance index, for each (origin, dialogue), in order.

        Utterances with blank text are not asked about. An item without a dialogue passes through
        in its place.
        """
        for answered in self.answered(items):
            yield answered.origin, answered.dialogue, dict(answered.rows)

    def answered(
        self, items: Iterable[tuple[T, Dialogue | None]], replayed: int = 0, trees: int = 0
    ) -> Iterator[Answered[T]]:
        """The same, going on after the first `replayed` items: see `Restart`."""
        waiting: deque[_Entry[T]] = deque()
        packs = prefetch(self._packs(items, replayed, trees), _AHEAD)
        for begun, owners, answers in in_order(self._answered, packs, self.scorer.at_once):
            waiting.extend(begun)
            for owner, utterance, probabilities in answers:
                entry = owners.get(owner)
                if entry is not None:
                    entry.rows[utterance] = probabilities
                    entry.waiting -= 1
            while waiting and not waiting[0].waiting:
                done = waiting.popleft()
                assert done.restart is not None  # it was packed
                yield Answered(done.origin, done.dialogue, done.rows, done.restart)

    def _answered(
        self, step: _Step[T]
    ) -> tuple[list[_Entry[T]], Mapping[int, _Entry[T]], list[Answer]]:
        """The entries and owners of a step, and its answers."""
        if step.pack is None:
            return step.begun, step.owners, []
        with foreign_errors(BundleError, "the model is not what it should be", _MEND):
            found = list(self.scorer.answers(step.pack, self.renderer.trie))
        answers = [
            (owner, t, calibrated(logs, self.temperature, self.offsets)) for owner, t, logs in found
        ]
        return step.begun, step.owners, answers

    def _packs(
        self, items: Iterable[tuple[T, Dialogue | None]], replayed: int, done: int
    ) -> Iterator[_Step[T]]:
        """Packs in order, but those that hold replayed items alone, or the first `done` trees."""
        packer = Packer(self.pack_tokens, len(self.renderer.head))
        begun: list[_Entry[T]] = []
        held = _Held()
        """The items since the first of the open pack, or, where none is, since the last step."""
        open_: dict[int, _Entry[T]] = {}

        def step(packed: Pack | None) -> _Step[T]:
            if packed is None:
                return _Step(begun)
            named = {owner for _, owner, _ in packed.reads}
            mine = {owner: open_[owner] for owner in named if owner in open_}
            # A dialogue's trees follow each other: those before this pack's last are complete.
            for number in [n for n in open_ if n < max(named)]:
                del open_[number]
            return _Step(begun, mine, packed if mine else None)

        first: tuple[tuple[int, T], int] | None = None
        """The group of the first item in the open pack, and the group's trees before that pack."""
        group, trees = -1, 0
        for number, (entry, questions) in enumerate(self._questions(items)):
            if entry.group[0] != group:
                group, trees = entry.group[0], 0
            if number >= replayed:
                entry.waiting = len(questions)
                begun.append(entry)
            if entry.dialogue is not None and questions:
                if number >= replayed:
                    open_[number] = entry
                for tree in self.renderer.trees(entry.dialogue, questions):
                    if done:
                        done -= 1
                    else:
                        full = packer.add(number, tree)
                        if full is not None:
                            yield step(full)
                            begun = []
                        if full is not None or first is None:
                            first = entry.group, trees
                            held = _Held()
                    trees += 1
            (at, origin), before = first or (entry.group, trees)
            entry.restart = Restart(origin, number - at + 1, before)
            if held.full_with(entry.dialogue):
                yield step(packer.rest())
                begun, first, held = [], None, _Held()
        yield step(packer.rest())

    def _questions(
        self, items: Iterable[tuple[T, Dialogue | None]]
    ) -> Iterator[tuple[_Entry[T], list[Question]]]:
        group: list[tuple[_Entry[T], list[int]]] = []
        size, held = 0, _Held()
        head: tuple[int, T] | None = None
        for number, (origin, dialogue) in enumerate(items):
            asked = (
                [t for t, u in enumerate(dialogue.utterances) if u.text.strip()]
                if dialogue is not None
                else []
            )
            head = head or (number, origin)
            group.append((_Entry(origin, dialogue, head), asked))
            size += len(asked)
            full = held.full_with(dialogue) or size >= RETRIEVED_TOGETHER
            if self.retriever is None or full:
                yield from self._asked(group)
                group, size, head, held = [], 0, None, _Held()
        yield from self._asked(group)

    def _asked(
        self, group: list[tuple[_Entry[T], list[int]]]
    ) -> Iterator[tuple[_Entry[T], list[Question]]]:
        shown: Iterator[tuple[tuple[str, str], ...]] = iter(())
        if self.retriever is not None and self.demonstrations:
            texts = [
                entry.dialogue.utterances[t].text
                for entry, asked in group
                if entry.dialogue is not None
                for t in asked
            ]
            if texts:
                with foreign_errors(BundleError, "the encoder is not what it should be", _MEND):
                    shown = iter(self.retriever.demonstrations(texts, self.demonstrations))
        for entry, asked in group:
            yield entry, [Question(Task.EMOTION, t, next(shown, ())) for t in asked]
