"""What the activations of a model are like: they guide how its weights are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from export.graph.nodes import Array

_ROWS_PER_CHANNEL = 2
"""Sample rows for each input channel, at least, for the samples to guide the rounding of weights.
Fewer would fit the weights to those rows alone."""


@dataclass(slots=True)
class Statistics:
    """Statistics of an activation.

    Attributes:
        rows: number of rows that were seen.
        peaks: greatest magnitude of each channel [k].
        correlation: sum of the outer products of the rows [k, k].
    """

    rows: int
    peaks: Array
    correlation: Array

    @classmethod
    def of(cls, rows: Array) -> Statistics:
        """Those of rows [n, k]."""
        return cls(len(rows), np.abs(rows).max(axis=0), rows.T @ rows)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.rows + other.rows,
            np.maximum(self.peaks, other.peaks),
            self.correlation + other.correlation,
        )

    @property
    def sufficient(self) -> bool:
        """Whether the correlation says something of rows that were not seen."""
        return self.rows >= _ROWS_PER_CHANNEL * len(self.peaks)


Sampler = Callable[[Sequence[str]], Mapping[str, Statistics]]
"""Names of weight matrices -> what each is multiplied with, as far as that is known."""


def module_inputs(module: nn.Module, run: Callable[[], None]) -> Sampler:
    """A sampler that runs a model over samples, and looks at what goes into its modules.

    `run` makes all calls of `module`. A weight that is no module's own is not known.
    """

    def sample(weights: Sequence[str]) -> dict[str, Statistics]:
        statistics: dict[str, Statistics] = {}

        def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float().cpu().numpy()
                batch = Statistics.of(rows)
                statistics[name] = statistics[name] + batch if name in statistics else batch

            return hook

        owners = dict(module.named_modules())
        hooks = [
            owners[owner].register_forward_pre_hook(look(name))
            for name in weights
            for owner, _, kind in [name.rpartition(".")]
            if kind == "weight" and owner in owners
        ]
        try:
            with torch.inference_mode():
                run()
        finally:
            for hook in hooks:
                hook.remove()
        return statistics

    return sample
