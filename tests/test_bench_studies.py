"""`python -m benchmarks.studies` and `benchmarks.training`, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHAT, EXAMPLES, write_recipe
from helpers.commands import python

from benchmarks.studies import STUDIES
from ercbatch.errors import UsageError
from train.recipe import Recipe, read_recipe
from train.sources import Source

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def recipe_file(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    path = write_recipe(folder, bert, speaker_epochs=0)
    test = f"[[test]]\npath = {json.dumps(str(CHAT))}\nlabels = 'meld'\n"
    path.write_text(path.read_text() + test)
    return path


@pytest.mark.slow
def test_a_study_is_a_table_and_goes_on_where_it_stopped(recipe_file: Path, tmp_path: Path) -> None:
    ask = ("-m", "benchmarks.studies", "lora-vs-full", recipe_file, "-o", tmp_path, "--seeds")
    first = python(*ask, "1")
    assert first.returncode == 0, first.stderr
    second = python(*ask, "2")
    assert second.returncode == 0, second.stderr
    trained = [line for line in second.stderr.splitlines() if line.startswith("studies: ")]
    assert [line.split("/")[-2:] for line in trained] == [["LoRA", "43"], ["full", "43"]]
    result = json.loads(second.stdout.splitlines()[-1])["variants"]
    for name in ("LoRA", "full"):
        run = json.loads((tmp_path / "lora-vs-full" / name / "43" / "run.json").read_text())
        assert (
            result[name]["figures"]["meld"]["weighted_f1"][1] == run["test"]["meld"]["weighted_f1"]
        )
        kept = run["epochs"][run["kept"] - 1]
        gap = kept["train"]["meld"]["weighted_f1"] - kept["valid"]["meld"]["weighted_f1"]
        assert result[name]["gaps"][str(run["kept"])][1] == pytest.approx(gap)
        assert (run["recipe"]["method"] == "full") == (name == "full")
    assert "±" in second.stdout
    one = python(*ask, "2", "--variant", "full")
    assert list(json.loads(one.stdout.splitlines()[-1])["variants"]) == ["full"]
    unknown = python(*ask, "2", "--variant", "both")
    assert unknown.returncode == 2
    assert "has no variant 'both': choose from 'LoRA', 'full'" in unknown.stderr
    other = python(*ask, "1", "--epochs", "2")
    assert other.returncode == 2
    assert "trained by another recipe" in other.stderr
    path = tmp_path / "lora-vs-full" / "LoRA" / "42" / "run.json"
    run = json.loads(path.read_text())
    for changes, words in (
        ({"files": dict.fromkeys(run["files"], "")}, "is not what"),
        ({"diverged": True}, "diverged: lower learning_rate"),
    ):
        path.write_text(json.dumps({**run, **changes}))
        refused = python(*ask, "1")
        assert refused.returncode == 2
        assert words in refused.stderr


def test_each_study_varies_what_it_says(recipe_file: Path) -> None:
    recipe = Recipe(
        base="x",
        train=(Source("a.jsonl", "meld"), Source("b.jsonl", "emorynlp")),
        valid=(Source("c.jsonl", "meld"), Source("d.jsonl", "emorynlp")),
        encoder="e",
    )
    with pytest.raises(UsageError, match="demonstrations_shown"):
        STUDIES["ablation"](replace(recipe, demonstrations=0.5))
    variants = {name: study(recipe) for name, study in STUDIES.items()}
    assert {
        name: (v.tasks, v.demonstrations_shown, v.same_label, v.template)
        for name, v in variants["ablation"].items()
    } == {
        "InstructERC": (("speaker", "emotion", "impact"), 0, True, "paper"),
        "without impact": (("speaker", "emotion"), 0, True, "paper"),
        "without speaker": (("emotion", "impact"), 0, True, "paper"),
        "without both": (("emotion",), 0, True, "paper"),
        "with demonstrations": (("speaker", "emotion", "impact"), 1, True, "paper"),
        "demonstrations of any label": (("speaker", "emotion", "impact"), 1, False, "paper"),
        "plain prompt": (("emotion",), 0, True, "plain"),
    }
    assert "without demonstrations" in STUDIES["ablation"](replace(recipe, demonstrations_shown=2))
    windows = [v.window for v in variants["window"].values()]
    assert [(w.turns, w.stride) for w in windows] == [(1, 1), (5, 1), (12, 1), (20, 1)]
    assert [v.learning_rate for v in variants["lora-vs-full"].values()] == [2e-4, 2e-5]
    scaling = variants["scaling"]
    assert len(scaling) == 7 * 4
    assert scaling["1/64 of a"].fraction == 1 / 64
    assert [s.path for s in scaling["1/64 of a"].valid] == ["c.jsonl"]
    assert scaling["1/2, total mix"].mix == "total"
    alike = replace(recipe, train=(Source("a/t.jsonl", "meld"), Source("b/t.jsonl", "emorynlp")))
    assert len(scaling) == len(STUDIES["scaling"](alike))
    assert list(STUDIES["transfer"](alike)) == ["from a/t", "from b/t"]
    with pytest.raises(UsageError, match="under its label set"):
        STUDIES["scaling"](replace(recipe, valid=recipe.valid[:1]))
    over = variants["transfer"]["from b"]
    assert [(s.path, s.labels, s.written) for s in (*over.train, *over.valid)] == [
        ("b.jsonl", "unified", "emorynlp"),
        ("c.jsonl", "unified", "meld"),
        ("d.jsonl", "unified", "emorynlp"),
    ]
    assert [v.demonstrations_shown for v in variants["demos"].values()] == [0, 1, 3, 5]
    done = python("-m", "benchmarks.studies", "demos", recipe_file, "-o", recipe_file.parent / "x")
    assert done.returncode == 2
    assert "name an `encoder`" in done.stderr


def test_packs_train_on_the_loss_of_separate_prompts(recipe_file: Path) -> None:
    done = python("-m", "benchmarks.training", recipe_file, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["first_step_loss_difference"] < 1e-4
    assert result["tokens_per_utterance_separate"] > 2 * result["tokens_per_utterance_packed"]


def test_demonstrations_are_shown_in_validation(
    bert: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    figures = []
    for shown in (0, 2):
        folder = tmp_path / str(shown)
        folder.mkdir()
        settings = {"demonstrations_shown": shown, "encoder": str(encoder_folder)}
        path = write_recipe(folder, bert, tasks=["emotion"], **settings)
        assert read_recipe(path).demonstrations_shown == shown
        done = python("-m", "train", "fit", path, "-o", folder / "run")
        assert done.returncode == 0, done.stderr
        run = json.loads((folder / "run" / "run.json").read_text())
        figures.append(run["epochs"][0]["valid"]["meld"]["log_loss"])
    assert figures[0] != figures[1]  # the model is the same


def test_a_base_is_bundled_untrained(bert: Path, encoder_folder: Path, tmp_path: Path) -> None:
    ask = (
        *("-m", "export", "bundle", bert, "-o", tmp_path / "zero", "--name", "zero"),
        *("--encoder", encoder_folder, "--examples", EXAMPLES / "my_examples.jsonl"),
        *("--licence", "Apache-2.0", "--zero-shot", CHAT),
    )
    done = python(*ask)
    assert done.returncode == 2
    assert "needs --labels" in done.stderr
    done = python(*ask, "--labels", "meld", "--template", "compact", "--accept-loss")
    assert done.returncode == 0, done.stderr
    labelled = tmp_path / "out.jsonl"
    done = python(
        *("-m", "ercbatch", "label", CHAT, "-o", labelled, "--bundle", f"{tmp_path / 'zero'}/")
    )
    assert done.returncode == 0, done.stderr
    assert len(labelled.read_text().splitlines()) == len(CHAT.read_text().splitlines())
