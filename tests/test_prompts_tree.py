"""The heart of the design: a packed answer sees exactly its own separate prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import UsageError
from ercbatch.prompts.packs import Pack, graft, join, pack
from ercbatch.prompts.templates import clean, template
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Question, Renderer, Segment, Task, Window, lay_out, visible
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel, collate

pytestmark = pytest.mark.transformers

LABELS = ("neutral", "joyful", "sad", "sadder", "joyless")
SAID = st.text(
    st.sampled_from("abc is not gone!?'#<>\n\t\u202e[]:0123 SEPMAKL_Speaker é"), max_size=30
)
DIALOGUES = st.lists(
    st.builds(Utterance, SAID, st.sampled_from(["Ana", "Bo", "", "Kim"])), min_size=1, max_size=14
).map(lambda turns: Dialogue(tuple(turns)))
WINDOWS = st.builds(
    Window,
    turns=st.integers(0, 5),
    stride=st.integers(1, 5),
    future=st.integers(0, 3),
    max_tokens=st.just(2000),
    max_utterance_tokens=st.sampled_from([4, 40]),
)


def questions(dialogue: Dialogue, shown: tuple[tuple[str, str], ...]) -> list[Question]:
    turns = range(len(dialogue.utterances))
    asked = [Question(Task.EMOTION, t, shown if t % 2 else ()) for t in turns]
    asked += [Question(Task.IMPACT, t) for t in turns if t]
    if len({u.speaker for u in dialogue.utterances}) > 1:
        asked += [Question(Task.SPEAKER, t) for t in turns]
    return asked


@pytest.mark.parametrize("wording", ["compact", "paper", "plain"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dialogue=DIALOGUES,
    window=WINDOWS,
    shown=st.lists(st.tuples(SAID, st.sampled_from(LABELS)), max_size=3).map(tuple),
)
def test_each_answer_sees_the_tokens_and_positions_of_its_separate_prompt(
    wording: str,
    tokenizer: SegmentTokenizer,
    dialogue: Dialogue,
    window: Window,
    shown: tuple[tuple[str, str], ...],
) -> None:
    renderer = Renderer(tokenizer, template(wording), window, LABELS)
    asked = questions(dialogue, shown)
    packed = join(list(enumerate(renderer.trees(dialogue, asked))))
    check_against_separate_prompts(renderer, dialogue, asked, packed)
    # Training lays the trees' common beginning out once; speaker trees begin otherwise.
    asked = [q for q in asked if q.task is not Task.SPEAKER]
    trees = list(enumerate(renderer.trees(dialogue, asked)))
    grafted = graft(trees, len(renderer.head))
    check_against_separate_prompts(renderer, dialogue, asked, grafted)
    heads = (len(trees) - 1) * len(renderer.head)
    assert len(grafted) == sum(len(tree) for _, tree in trees) - heads


def check_against_separate_prompts(
    renderer: Renderer, dialogue: Dialogue, asked: list[Question], packed: Pack
) -> None:
    sees = visible(packed.ends)
    answered = set()
    for index, _, read in packed.reads:
        alone = renderer.separate_prompt(dialogue, read.question, read.choice)
        assert packed.tokens[sees[index]].tolist() == alone
        assert packed.positions[sees[index]].tolist() == list(range(len(alone)))
        answered.add((read.question, read.choice))
    expected = {(q, c) for q in asked for c in range(len(renderer.trie_for(q, dialogue).choices))}
    assert answered == expected


def test_a_later_turn_never_reaches_an_earlier_answer(checkpoint: Path) -> None:
    model, tokenizer = load_causal_lm(str(checkpoint))
    packed_model = PackedModel(model.eval())
    renderer = Renderer(tokenizer, template("compact"), Window(4, 8), LABELS)

    def states(last: str) -> dict[tuple[str, int, int], torch.Tensor]:
        texts = ["it is gone", "what is", "oh no", last]
        dialogue = Dialogue(tuple(Utterance(t, "AB"[i % 2]) for i, t in enumerate(texts)))
        asked = [Question(Task.EMOTION, t) for t in range(4)] + [Question(Task.IMPACT, 3)]
        packed = join(list(enumerate(renderer.trees(dialogue, asked))))
        with torch.no_grad():
            result = packed_model(*collate([packed]))
        keyed = [(r.question.task.value, r.question.utterance, r.choice) for *_, r in packed.reads]
        return dict(zip(keyed, result, strict=True))

    one, other = states("thank you"), states("my fridge !")
    for key in one:
        same = torch.allclose(one[key], other[key], atol=1e-5)
        assert same == (key[0] == "impact" or key[1] < 3), key


def test_stride_one_is_the_papers_window(tokenizer: SegmentTokenizer) -> None:
    dialogue = Dialogue(tuple(Utterance(f"turn {n}") for n in range(20)))
    renderer = Renderer(tokenizer, template("paper"), Window(12, 1), LABELS)
    starts = renderer.starts(dialogue, [Question(Task.EMOTION, t) for t in range(20)])
    assert [starts[Question(Task.EMOTION, t)] for t in range(20)] == [
        max(0, t - 12) for t in range(20)
    ]


def test_too_long_a_prompt_loses_its_oldest_turns_never_the_question(
    tokenizer: SegmentTokenizer,
) -> None:
    window = Window(12, 4, max_tokens=200, max_utterance_tokens=30)
    renderer = Renderer(tokenizer, template("compact"), window, LABELS)
    dialogue = Dialogue(tuple(Utterance("door " * 25 + str(n)) for n in range(12)))
    asked = [Question(Task.EMOTION, t) for t in range(12)]
    starts = renderer.starts(dialogue, asked)
    packed = join(list(enumerate(renderer.trees(dialogue, asked))))
    sees = visible(packed.ends)
    for index, _, read in packed.reads:
        start = starts[read.question]
        alone = renderer.separate_prompt(dialogue, read.question, read.choice, start)
        assert packed.tokens[sees[index]].tolist() == alone
        assert len(alone) <= 200
        assert start <= read.question.utterance
    assert starts[asked[-1]] > 4  # some turns were dropped


def test_questions_after_one_that_was_too_long_share_its_block(tokenizer: SegmentTokenizer) -> None:
    window = Window(12, 8, max_tokens=200, max_utterance_tokens=30)
    renderer = Renderer(tokenizer, template("compact"), window, LABELS)
    dialogue = Dialogue(tuple(Utterance("door " * 9 + str(n)) for n in range(40)))
    asked = [Question(Task.EMOTION, t) for t in range(40)]
    trees = renderer.trees(dialogue, asked)
    assert len(trees) <= 40 / 2
    for tree in trees:
        assert max(tree.positions) < 200
    # With the paper's window nobody follows, and one turn more would be too much.
    alone = Renderer(tokenizer, template("compact"), replace(window, stride=1), LABELS)
    for question, start in alone.starts(dialogue, asked[20:]).items():
        assert start > question.utterance - 12
        assert len(alone.separate_prompt(dialogue, question, start=start)) <= 200
        assert len(alone.separate_prompt(dialogue, question, start=start - 1)) > 200


def test_ends_follow_the_rule_of_the_design() -> None:
    deep = Segment([5, 6], children=[(0, Segment([7]))])
    tree = lay_out(Segment([1, 2, 3], children=[(0, Segment([4])), (1, deep)]))
    assert tree.tokens.tolist() == [1, 4, 2, 5, 7, 6, 3]
    assert tree.positions.tolist() == [0, 1, 1, 2, 3, 3, 2]
    assert tree.ends.tolist() == [7, 2, 7, 6, 5, 6, 7]


def test_packs_keep_order_and_never_split_a_tree() -> None:
    sizes = [4, 6, 50, 1, 2]
    trees = [(i, lay_out(Segment([i + 1] * size))) for i, size in enumerate(sizes)]
    packs = list(pack(trees, 10, 0))
    assert [p.tokens.tolist() for p in packs] == [[1] * 4 + [2] * 6, [3] * 50, [4, 5, 5]]
    assert visible(packs[0].ends).sum(1).tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]


def test_packs_hold_once_what_all_trees_begin_with() -> None:
    trees = [(i, lay_out(Segment([7, 8] + [i] * size))) for i, size in enumerate((2, 3, 50, 4, 1))]
    packs = list(pack(trees, 8, 2))
    assert [p.tokens.tolist()[2:] for p in packs] == [[0, 0, 1, 1, 1], [2] * 50, [3] * 4 + [4]]
    assert all(p.tokens.tolist()[:2] == [7, 8] and p.shared == 2 for p in packs)
    assert visible(packs[0].ends).sum(1).tolist() == [1, 2, 3, 4, 3, 4, 5]


def test_an_impact_question_needs_a_turn_before_it(tokenizer: SegmentTokenizer) -> None:
    renderer = Renderer(tokenizer, template("compact"), Window(), LABELS)
    with pytest.raises(UsageError, match="a turn before it"):
        renderer.trees(Dialogue((Utterance("hi"),)), [Question(Task.IMPACT, 0)])


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=80)
    | st.lists(st.sampled_from(["Speaker", "_", "1", ":", " ", "<", "##", "\t", "a"])).map("".join)
)
def test_clean_leaves_no_delimiter(text: str) -> None:
    cleaned = clean(text)
    assert "###" not in cleaned
    assert not re.search(r"speaker[_ ]?\d+\s*:", cleaned, re.IGNORECASE)
    assert not set("\n\r\t\x00\u202e\u200b") & set(cleaned)
    assert clean(cleaned) == cleaned


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=60) | SAID | st.sampled_from(["[SEP][MASK]", "</s> <s>", "[CLS]"]))
def test_content_never_yields_a_control_token(tokenizer: SegmentTokenizer, text: str) -> None:
    controls = tokenizer.controls
    ids = set(tokenizer.encode_content(clean(text), 200))
    assert not ids & {*controls.start, *controls.separator, *controls.answer}
