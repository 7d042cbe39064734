"""Averaging the weights of runs that began from the same weights (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ercbatch.errors import UsageError
from train.run import MODEL, describe, load_run


def average_runs(runs: Sequence[Path], folder: Path) -> None:
    """Write a run folder whose weights are the mean of the runs', recipe and data the first's.

    Raises:
        UsageError: runs that trained adapters, or models of different shapes.
    """
    loaded = [load_run(run) for run in runs]
    first = loaded[0]
    if any(run.recipe.method != "full" for run in loaded):
        raise UsageError("only full-parameter runs are averaged: an adapter is not a sum of others")
    states = [run.model.model.state_dict() for run in loaded]
    with torch.no_grad():
        for name, value in states[0].items():
            if any(name not in s or s[name].shape != value.shape for s in states):
                raise UsageError(f"the runs' models differ in {name}: they have no average")
            if value.is_floating_point():
                value.copy_(torch.stack([state[name] for state in states]).mean(0))
    with first.model.whole() as whole:
        whole.save_pretrained(folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(runs[0] / MODEL, trust_remote_code=False)
    tokenizer.save_pretrained(folder / MODEL)
    paths = list(first.data)
    describe(folder, first.recipe, first.tokenizer, paths, averaged=[str(run) for run in runs])
