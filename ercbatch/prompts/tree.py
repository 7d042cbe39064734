"""The prompt tree: every question about a dialogue in one packed sequence.

The prompts of one dialogue differ only at their ends. So the turns are laid out once, as a
*trunk*, and each question hangs on it as a *branch*, right after the trunk token that is the last
one it may see. Tokens stand depth first: a branch follows the token it hangs on, before the
trunk's next token. With end[k] the index just past everything that hangs on token k's own segment

    token q sees token k  exactly when  k <= q < end[k]

and position ids go on from the attachment point, so each answer is computed from exactly the
tokens, at exactly the positions, of the ordinary separate prompt. `separate_prompt` renders that
ordinary prompt; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from ercbatch.dialogues import Dialogue
from ercbatch.errors import UsageError
from ercbatch.prompts.answers import AnswerTrie, answer_trie
from ercbatch.prompts.templates import Control, Piece, Template, Text
from ercbatch.prompts.tokens import SegmentTokenizer

IntArray = npt.NDArray[np.int32]


class Task(Enum):
    """What is asked of an utterance."""

    EMOTION = "emotion"
    IMPACT = "impact"
    SPEAKER = "speaker"


@dataclass(frozen=True, slots=True)
class Question:
    """One question: a task, the index of the utterance, and (text, label) demonstrations."""

    task: Task
    utterance: int
    demonstrations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a dialogue a prompt sees.

    Turns are answered in blocks of `stride`; the trunk of a block starts `turns` turns before the
    block's first turn, so a prompt sees between `turns` and `turns + stride - 1` earlier turns
    and `stride=1` is the paper's window exactly. `future` later turns are in view (0: the past
    only). A prompt has at most `max_tokens` tokens, an utterance at most `max_utterance_tokens`.
    """

    turns: int = 12
    stride: int = 24
    future: int = 0
    max_tokens: int = 1024
    max_utterance_tokens: int = 160

    def __post_init__(self) -> None:
        if self.turns < 0 or self.stride < 1 or self.future < 0:
            raise UsageError("window: turns and future must be at least 0, stride at least 1")
        if self.max_utterance_tokens < 1 or self.max_tokens < 4 * self.max_utterance_tokens:
            # A question quotes at most: its turn in the trunk, the turn again, and template text.
            raise UsageError("window: max_tokens must be at least 4 * max_utterance_tokens")


@dataclass(frozen=True, slots=True)
class Read:
    """Where an answer is read: the choice-th choice of a question's trie."""

    question: Question
    choice: int


@dataclass(slots=True)
class Segment:
    """Tokens, and the segments that hang on them: `children` are (offset, segment) pairs.

    A child is attached after the token at its offset. `read` is read at the last token.
    """

    tokens: list[int]
    children: list[tuple[int, Segment]] = field(default_factory=list)
    read: Read | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """A laid-out tree: `tokens`, `positions` and `ends` are [n]; reads are (index, Read)."""

    tokens: IntArray
    positions: IntArray
    ends: IntArray
    reads: tuple[tuple[int, Read], ...]

    def __len__(self) -> int:
        return len(self.tokens)


def lay_out(trunk: Segment) -> Tree:
    """Lay a tree out depth first."""
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    reads: list[tuple[int, Read]] = []

    def place(segment: Segment, position: int) -> None:
        children = sorted(segment.children, key=lambda pair: pair[0])
        indices: list[int] = []
        next_child = 0
        for offset, token in enumerate(segment.tokens):
            indices.append(len(tokens))
            tokens.append(token)
            positions.append(position + offset)
            ends.append(0)
            while next_child < len(children) and children[next_child][0] == offset:
                place(children[next_child][1], position + offset + 1)
                next_child += 1
        for index in indices:
            ends[index] = len(tokens)
        if segment.read is not None:
            reads.append((indices[-1], segment.read))

    place(trunk, 0)
    return Tree(
        np.array(tokens, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(ends, dtype=np.int32),
        tuple(reads),
    )


def visible(ends: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """The mask [..., n, n] of `ends` [..., n]: entry (q, k) says whether token q sees token k."""
    index = np.arange(ends.shape[-1])
    return (index[None, :] <= index[:, None]) & (index[:, None] < ends[..., None, :])


class Renderer:
    """Dialogues to prompt trees, for one tokenizer, template, window and label set."""

    def __init__(
        self,
        tokenizer: SegmentTokenizer,
        template: Template,
        window: Window,
        labels: Sequence[str],
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.window = window
        self.labels = tuple(labels)
        self.trie = self._trie([template.answer(label) for label in labels])
        self.head = tuple(self._ids(template.head(self.labels)))
        self.speaker_head = tuple(self._ids(template.speaker_head()))
        self._speaker_tries: dict[int, AnswerTrie] = {}

    def _trie(self, answers: Sequence[str]) -> AnswerTrie:
        sequences = [self.tokenizer.encode_template(answer) for answer in answers]
        return answer_trie(sequences, self.tokenizer.controls.separator)

    def trie_for(self, question: Question, dialogue: Dialogue) -> AnswerTrie:
        """The trie that a question of this dialogue is answered from."""
        if question.task is not Task.SPEAKER:
            return self.trie
        count = len(set(speaker_numbers(dialogue)))
        if count not in self._speaker_tries:
            names = [self.template.speaker_label(k) for k in range(count)]
            self._speaker_tries[count] = self._trie([self.template.answer(n) for n in names])
        return self._speaker_tries[count]

    def _ids(self, pieces: Iterable[Piece]) -> list[int]:
        controls: Mapping[Control, tuple[int, ...]] = {
            Control.START: self.tokenizer.controls.start,
            Control.SEPARATOR: self.tokenizer.controls.separator,
            Control.ANSWER: self.tokenizer.controls.answer,
        }
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, Control):
                ids += controls[piece]
            elif isinstance(piece, Text):
                ids += self.tokenizer.encode_template(piece.text)
            else:
                limit, ends = self.window.max_utterance_tokens, self.template.keeps_ends
                ids += self.tokenizer.encode_content(piece.text, limit, both_ends=ends)
        return ids

    def trees(self, dialogue: Dialogue, questions: Sequence[Question]) -> list[Tree]:
        """The trees that answer `questions`, which may be in any order.

        An impact question needs a turn before it, a speaker question two speakers.

        Raises:
            UsageError: a question that cannot be asked.
        """
        scene = _DialoguePrompts(self, dialogue)
        turn_questions = sorted(
            (q for q in questions if q.task is not Task.SPEAKER),
            key=_by_prompt_end,
        )
        trees = [scene.block(start, block) for start, block in scene.blocks(turn_questions)]
        speaker_questions = [q for q in questions if q.task is Task.SPEAKER]
        size = self.window.stride  # no tree should grow with the dialogue
        groups = [
            speaker_questions[at : at + size] for at in range(0, len(speaker_questions), size)
        ]
        return trees + [scene.speaker_tree(group) for group in groups]

    def separate_prompt(
        self, dialogue: Dialogue, question: Question, choice: int = 0, start: int | None = None
    ) -> list[int]:
        """The ordinary prompt of one question, by itself: what a branch must be equal to.

        `start` is the first turn in view; by default the window's rule gives it (which a prompt
        over `max_tokens` overrides: see `Renderer.starts`).
        """
        path = self.trie_for(question, dialogue).choices[choice].path
        scene = _DialoguePrompts(self, dialogue)
        if question.task is Task.SPEAKER:
            return [*self.speaker_head, *scene.branch(question), *path]
        first = question.utterance - question.utterance % self.window.stride
        if start is None:
            start = max(0, first - self.window.turns)
        ids = list(self.head)
        for turn in range(start, scene.last_visible(question) + 1):
            ids += scene.turns[turn]
        return ids + scene.branch(question) + list(path)

    def starts(self, dialogue: Dialogue, questions: Sequence[Question]) -> dict[Question, int]:
        """The first turn that each (emotion or impact) question has in view."""
        ordered = sorted(questions, key=_by_prompt_end)
        blocks = _DialoguePrompts(self, dialogue).blocks(ordered)
        return {question: start for start, block in blocks for question, _ in block}


def _by_prompt_end(question: Question) -> tuple[int, bool]:
    """An utterance's impact question, which ends a turn earlier, comes before its emotion's."""
    return question.utterance, question.task is Task.EMOTION


def speaker_numbers(dialogue: Dialogue) -> list[int]:
    """Each utterance's speaker as a number, in order of first appearance in the dialogue."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(u.speaker, len(numbers)) for u in dialogue.utterances]


_Block = list[tuple[Question, list[int]]]


class _DialoguePrompts:
    """One dialogue, its turns tokenized once."""

    def __init__(self, renderer: Renderer, dialogue: Dialogue) -> None:
        self._renderer = renderer
        self._window = renderer.window
        self._dialogue = dialogue
        self._speakers = speaker_numbers(dialogue)
        self._texts = [renderer.template.quote(u.text) for u in dialogue.utterances]
        turn = renderer.template.turn
        self.turns = [
            renderer._ids(turn(k, text))
            for k, text in zip(self._speakers, self._texts, strict=True)
        ]

    def last_visible(self, question: Question) -> int:
        """The index of the last turn that a question may see."""
        if question.task is Task.IMPACT:
            return question.utterance - 1
        return min(question.utterance + self._window.future, len(self.turns) - 1)

    def branch(self, question: Question) -> list[int]:
        """The tokens of a question."""
        template, t = self._renderer.template, question.utterance
        if question.task is Task.EMOTION:
            pieces = template.emotion(
                self._speakers[t],
                self._texts[t],
                self._renderer.labels,
                [(template.quote(text), label) for text, label in question.demonstrations],
                later=self.last_visible(question) > t,
            )
        elif question.task is Task.IMPACT:
            if t == 0:
                raise UsageError("an impact question needs a turn before it")
            pieces = template.impact(self._speakers[t], self._renderer.labels)
        else:
            pieces = template.speaker(self._texts[t], len(set(self._speakers)))
        return self._renderer._ids(pieces)

    def _hang(self, question: Question, branch: list[int]) -> Segment:
        """The segment of a question, with a sub-branch for every further choice of its trie."""
        choices = self._renderer.trie_for(question, self._dialogue).choices
        if not choices:
            raise UsageError("a question needs at least two possible answers")
        root = Segment(branch + list(choices[0].path), read=Read(question, 0))
        segments = [root]
        for i, choice in enumerate(choices[1:], start=1):
            parent_path = choices[choice.parent].path
            child = Segment(list(choice.path[len(parent_path) :]), read=Read(question, i))
            parent = segments[choice.parent]
            parent.children.append((len(parent.tokens) - 1, child))
            segments.append(child)
        return root

    def blocks(self, questions: Sequence[Question]) -> list[tuple[int, _Block]]:
        """Questions (ascending) grouped by the trunk that they share: (first turn, questions).

        A block starts where the window says, unless a prompt would not fit from there: then that
        question opens another, which starts at the oldest turn that fits. Where questions of the
        same stride follow, it takes up half of the room, so that they fit into it as well: else
        each would need a full block of its own.
        """
        head = len(self._renderer.head)
        longest_path = max((len(c.path) for c in self._renderer.trie.choices), default=0)
        offsets = np.concatenate([[0], np.cumsum([len(turn) for turn in self.turns])])
        blocks: list[tuple[int, _Block]] = []
        last_window_start = -1
        for question in questions:
            branch = self.branch(question)
            room = self._window.max_tokens - head - len(branch) - longest_path
            stop = self.last_visible(question) + 1
            while question.demonstrations and room < offsets[stop] - offsets[question.utterance]:
                question = Question(question.task, question.utterance, question.demonstrations[:-1])
                branch = self.branch(question)
                room = self._window.max_tokens - head - len(branch) - longest_path
            first = question.utterance - question.utterance % self._window.stride
            window_start = max(0, first - self._window.turns)
            start = blocks[-1][0] if blocks and window_start == last_window_start else window_start
            if offsets[stop] - offsets[start] > room:
                follow = (question.utterance + 1) % self._window.stride != 0
                start = int(
                    np.searchsorted(offsets, offsets[stop] - (room // 2 if follow else room))
                )
                start = max(min(start, stop - 1), window_start)
            if blocks and window_start == last_window_start and start == blocks[-1][0]:
                blocks[-1][1].append((question, branch))
            else:
                blocks.append((start, [(question, branch)]))
            last_window_start = window_start
        return blocks

    def block(self, start: int, block: _Block) -> Tree:
        """The tree of one block."""
        trunk = Segment(list(self._renderer.head))
        ends_at: dict[int, int] = {}
        for turn in range(start, max(self.last_visible(q) for q, _ in block) + 1):
            trunk.tokens += self.turns[turn]
            ends_at[turn] = len(trunk.tokens) - 1
        head = len(self._renderer.head) - 1
        for question, branch in block:
            # A window of no turns leaves an impact question nothing but the head to hang on.
            at = ends_at.get(self.last_visible(question), head)
            trunk.children.append((at, self._hang(question, branch)))
        return lay_out(trunk)

    def speaker_tree(self, questions: Sequence[Question]) -> Tree:
        """The tree of the speaker questions, whose trunk is the instruction alone."""
        trunk = Segment(list(self._renderer.speaker_head))
        for question in questions:
            segment = self._hang(question, self.branch(question))
            trunk.children.append((len(trunk.tokens) - 1, segment))
        return lay_out(trunk)
