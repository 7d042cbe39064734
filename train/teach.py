"""Teaching: what trained runs say of dialogues, as `scores` for another run to learn from.

A run's own training dialogues are no evidence: it has learnt their labels by heart, right or
wrong. So about dialogues that a run was fitted on it is not asked. Runs that each left out
another fold together speak of the whole dataset (cross-fitting), and of any other one all of them
do, which is how unlabelled dialogues, or those of another label set, come into training
(knowledge distillation, arXiv 1503.02531). What a run's base was fitted on before is not known
here: a base that has seen the folds makes what the runs say of them too sure.

With `in_sample` a run is asked about its own training dialogues too. One run of a few LoRA epochs
on all of the data is cheaper than one run for each fold. Its scores partly repeat the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ercbatch.dialogues import Dialogue, turns_key
from ercbatch.digests import file_sha256
from ercbatch.engine import Engine
from ercbatch.errors import UsageError
from ercbatch.inputs.records import dump_line, read_dialogues
from ercbatch.labels import LabelSet
from ercbatch.prompts.tree import Renderer
from ercbatch.scoring.torch_scorer import TorchScorer
from train.run import LoadedRun, load_run

_PACK_TOKENS = 1024
"""Long packs: in bfloat16 all weights are converted once a pack."""

_Rows = dict[int, npt.NDArray[np.float64]]


def teach(
    runs: Sequence[Path],
    source: Path,
    labels: LabelSet,
    output: Path,
    report: Callable[[str], None],
    *,
    bfloat16: bool = False,
    in_sample: bool = False,
) -> int:
    """Write the dialogues of `source` with the runs' mean `scores`, and return their number.

    Raises:
        UsageError: a dialogue that every run was fitted on, under this label set, and not
            `in_sample`.
        InputError: a bad line in `source`.
    """
    dialogues = [dialogue for _, dialogue in read_dialogues(source)]
    sha256 = file_sha256(source)
    sums: list[_Rows] = [{} for _ in dialogues]
    teachers = np.zeros(len(dialogues), dtype=int)
    for folder in runs:
        run = load_run(folder)
        numbers = [
            n
            for n, d in enumerate(dialogues)
            if in_sample or not _fitted_on(run, sha256, labels, n, d)
        ]
        report(f"{folder}: {len(numbers):,} of {len(dialogues):,} dialogues")
        teachers[numbers] += 1
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run.model.to(device)
        engine = _engine(run, labels, bfloat16=bfloat16)
        for entry in engine.run((n, dialogues[n]) for n in numbers):
            sum_ = sums[entry.origin]
            for t, row in entry.rows.items():
                sum_[t] = sum_.get(t, 0) + row
    if not teachers.all():
        raise UsageError(
            f"{source}: every run was fitted on its dialogue {int(teachers.argmin()) + 1}: add a "
            "run that left it out (`leave_out` in its recipe), or ask with --in-sample"
        )
    with output.open("wb") as file:
        for dialogue, rows, count in zip(dialogues, sums, teachers, strict=True):
            file.write(dump_line(_scored(dialogue, rows, int(count), labels)))
    return len(dialogues)


def _fitted_on(
    run: LoadedRun, sha256: str, labels: LabelSet, number: int, dialogue: Dialogue
) -> bool:
    labelled = any(u.label is not None for u in dialogue.utterances)
    return any(
        run.data.get(source.path) == sha256
        and source.label_set().name == labels.name
        and not source.left_out(number)
        and (labelled or source.soft > 0)  # else it has told who speaks at most
        for source in run.recipe.train
    )


def _engine(run: LoadedRun, labels: LabelSet, *, bfloat16: bool) -> Engine:
    recipe = run.recipe
    renderer = Renderer(run.tokenizer, recipe.wording, recipe.window, labels.labels)
    scorer = TorchScorer(run.model, renderer.trie.tokens, bfloat16=bfloat16)
    return Engine(scorer, renderer, 1.0, _PACK_TOKENS)


def _scored(dialogue: Dialogue, rows: _Rows, count: int, labels: LabelSet) -> Mapping[str, Any]:
    turns = []
    for t, turn in enumerate(dialogue.turns):
        scores = {
            name: round(float(value) / count, 5)
            for name, value in zip(labels.labels, rows.get(t, ()), strict=False)
        }
        turns.append({**turn, "scores": scores} if scores else turn)
    return {**dialogue.record, turns_key(dialogue.record): turns}
