"""Who speaks: learnt from any dialogue of two, measured as it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT, export_bundle, write_recipe
from helpers.commands import python
from helpers.scenes import dataset, recipe, scene

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.inputs.records import read_dialogues
from ercbatch.labels import label_set
from ercbatch.prompts.packs import join
from ercbatch.prompts.templates import template
from ercbatch.prompts.tree import Renderer, Task, Window, speaker_numbers
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from train.datasets import Scene
from train.samples import TASKS, Sampler, speaker_questions
from train.validate import speaker_accuracy

pytestmark = pytest.mark.transformers


def test_a_speaker_question_is_answered_with_its_speaker(bert: Path) -> None:
    _, tokenizer = load_causal_lm(str(bert))
    sampler = Sampler(recipe(), [dataset(scene("oh no", "yes", "my train"))], tokenizer, {})
    (step,) = sampler.epoch(1, [Task.SPEAKER])
    assert [TASKS[i] for i in step.tasks] == [Task.SPEAKER] * 3
    answers = [sampler.answer_tokens[i] for i in step.targets.argmax(1)]
    zero, one = (tokenizer.encode_template(f" {name}")[0] for name in "01")
    assert answers == [zero, one, zero]
    assert (step.options.sum(1) == 2).all()


def test_the_accuracy_of_the_speakers_is_that_of_single_prompts(bert: Path) -> None:
    model, tokenizer = load_causal_lm(str(bert))
    packed = PackedModel(model.eval())
    scenes = [scene("oh no", "yes", "my train"), scene("thank you"), scene("late again", "where ?")]
    three = Dialogue(
        tuple(Utterance(text, name) for text, name in zip("abcd", "ABCA", strict=True))
    )
    scenes.append(Scene(three, (None,) * 4))
    renderer = Renderer(tokenizer, template("compact"), Window(), label_set("meld").labels)
    right = []
    for one in scenes:
        for question in speaker_questions(one):
            (tree,) = renderer.trees(one.dialogue, [question])
            trie = renderer.trie_for(question, one.dialogue)
            scorer = TorchScorer(packed, trie.tokens)
            ((_, t, logs),) = scorer.answers(join([(0, tree)]), trie)
            right.append(int(logs.argmax()) == speaker_numbers(one.dialogue)[t])
    assert len(right) == 3 + 0 + 2 + 4
    result = speaker_accuracy(packed, renderer, dataset(*scenes), pack_tokens=64)
    assert result is not None
    assert result == pytest.approx(np.mean(right))
    assert 0 < result < 1
    assert speaker_accuracy(packed, renderer, dataset(scene("thank you")), pack_tokens=64) is None


@pytest.mark.slow
def test_dialogues_without_labels_teach_who_speaks(bert: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    with chat.open("w") as file:
        for _, dialogue in read_dialogues(CHAT):
            said = [{"speaker": u.speaker, "text": u.text} for u in dialogue.utterances]
            file.write(json.dumps({"utterances": said}) + "\n")
    path = write_recipe(tmp_path, bert, tasks=["speaker"], speaker_epochs=2)
    text = path.read_text()
    path.write_text(text.replace(str(CHAT), str(chat)))
    alone = python("-m", "train", "fit", path, "-o", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    run = json.loads((tmp_path / "alone" / "run.json").read_text())
    reached = [e["valid"]["meld"]["speaker_accuracy"] for e in run["epochs"]]
    assert reached[run["kept"] - 1] == max(reached)

    table = f"[[train]]\npath = {json.dumps(str(chat))}\nlabels = 'meld'\n"
    mixed = text.replace("[[train]]", f"{table}[[train]]", 1)
    path.write_text(mixed.replace('["speaker"]', '["speaker", "emotion"]'))
    beside = python("-m", "train", "fit", path, "-o", tmp_path / "beside")
    assert beside.returncode == 0, beside.stderr
    assert f"{chat}: no utterance has a `label`: for speakers alone" in beside.stderr
    path.write_text(path.read_text().replace('["speaker", "emotion"]', '["emotion"]'))
    examples = ("--encoder", "mini", "--examples", CHAT)
    made = export_bundle(tmp_path / "beside", tmp_path / "b", *examples, "--accept-loss")
    assert made.returncode == 0, made.stderr
    none = export_bundle(tmp_path / "alone", tmp_path / "no", *examples)
    assert none.returncode == 2
    assert "has learnt no labels" in none.stderr
    refused = python("-m", "train", "fit", path, "-o", tmp_path / "refused")
    assert refused.returncode == 4
    assert "training needs labelled dialogues" in refused.stderr


def test_speakers_need_two_of_them(bert: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, bert)
    data = tmp_path / "d.jsonl"
    data.write_text('{"utterances": [{"text": "a", "label": "sad"}]}\n')
    path.write_text(path.read_text().replace(str(CHAT), str(data)))
    done = python("-m", "train", "fit", path, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "no question for the stage speaker" in done.stderr
