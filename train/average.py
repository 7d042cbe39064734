"""Averages of weights: over the steps of a run, and over runs that began alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from ercbatch.errors import UsageError
from ercbatch.scoring.checkpoints import save_tokenizer
from train.run import MODEL, load_run, write_description


class Average:
    """A moving average of the trained weights."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self.weights = [p.detach().clone() for p in self._parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in. The decay grows from 0, so early weights are forgotten."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the weights."""
        originals = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for p, value in zip(self._parameters, self.weights, strict=True):
                p.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self._parameters, originals, strict=True):
                    p.copy_(value)


def average_runs(runs: Sequence[Path], folder: Path) -> None:
    """Write a run folder whose weights are the mean of the runs' (arXiv 2203.05482).

    The recipe and the data are the first's.

    Raises:
        UsageError: runs that trained adapters, or models of different shapes.
    """
    loaded = [load_run(run) for run in runs]
    first = loaded[0]
    if any(run.recipe.method != "full" for run in loaded):
        raise UsageError("only full-parameter runs are averaged: an adapter is not a sum of others")
    states = [run.model.state_dict() for run in loaded]  # the output embedding is in it
    averaged: set[int] = set()
    with torch.no_grad():
        for name, value in states[0].items():
            if any(name not in s or s[name].shape != value.shape for s in states):
                raise UsageError(f"the runs' models differ in {name}: they have no average")
            if value.is_floating_point() and value.data_ptr() not in averaged:  # tied weights: once
                averaged.add(value.data_ptr())
                value.copy_(torch.stack([state[name] for state in states]).mean(0))
    with first.model.whole() as whole:
        whole.save_pretrained(folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(runs[0] / MODEL, trust_remote_code=False)
    save_tokenizer(tokenizer, folder / MODEL)
    described = {
        "recipe": first.recipe.to_json(),
        "controls": first.tokenizer.controls.to_json(),
        "data": first.data,
        "files": first.files,
    }
    write_description(folder, described, first.tokenizer, averaged=[str(run) for run in runs])
