"""Fitting: one loop over packed steps, an evaluation after each epoch, the best epoch kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ercbatch.torch_model import PackedModel
from train.recipe import Recipe
from train.samples import Sampler, Step


@dataclass(frozen=True, slots=True)
class EpochFigures:
    """What one epoch came to; `valid` maps a label set's name to its figures."""

    epoch: int
    loss: float
    emotion_loss: float
    impact_loss: float
    seconds: float
    tokens: int
    valid: dict[str, dict[str, float]]

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: the mean weighted F1 over the validation sets."""
        return sum(f["weighted_f1"] for f in self.valid.values()) / max(1, len(self.valid))


def step_loss(
    model: PackedModel, step: Step, answer_tokens: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, emotion loss, impact loss) of a step: L_emotion + alpha * L_impact.

    Each is the mean of -log P(label) over its questions, with P as the scorer computes it.
    """
    states = model(*step.batch)
    logits = model.logits(states, answer_tokens).float()
    log_probabilities = logits.masked_fill(~step.options, -torch.inf).log_softmax(-1)
    log_probabilities = log_probabilities.masked_fill(~step.options, 0.0)
    gold = -(step.targets * log_probabilities).sum(-1)
    if recipe.label_smoothing:
        spread = -log_probabilities.sum(-1) / step.options.sum(-1)
        gold = (1 - recipe.label_smoothing) * gold + recipe.label_smoothing * spread
    losses = []
    for task in (0, 1):
        weights = step.weights * (step.tasks == task)
        losses.append((gold * weights).sum() / weights.sum().clamp(min=1e-9))
    return losses[0] + recipe.alpha * losses[1], losses[0], losses[1]


class Average:
    """A moving average of the trained weights."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._average = [p.detach().clone() for p in self._parameters]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in. The decay grows from 0, so early weights are forgotten."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the weights."""
        kept = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for p, value in zip(self._parameters, self._average, strict=True):
                p.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self._parameters, kept, strict=True):
                    p.copy_(value)


def fit(
    model: PackedModel,
    sampler: Sampler,
    recipe: Recipe,
    *,
    evaluate: Callable[[], dict[str, dict[str, float]]],
    keep: Callable[[EpochFigures], None],
    report: Callable[[str], None],
    bfloat16: bool,
) -> list[EpochFigures]:
    """Train; `keep` is called with the weights in place whenever an epoch is the best so far.

    Raises:
        FloatingPointError: the loss is no longer a number; what `keep` saved stands.
    """
    accelerator = Accelerator(mixed_precision="bf16" if bfloat16 else "no")
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        fused=True,
    )
    steps = len(list(sampler.epoch(0))) * recipe.epochs
    warm = max(1, round(steps * recipe.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / max(1, steps - warm)))
    )
    prepared: Any = accelerator.prepare(model, optimizer)
    network, optimizer = prepared
    average = Average(trained, recipe.average) if recipe.average else None
    answer_tokens = torch.tensor(sampler.answer_tokens, device=accelerator.device)
    figures: list[EpochFigures] = []
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        began, told, tokens, count = time.monotonic(), time.monotonic(), 0, 0
        sums = torch.zeros(3)
        for step in sampler.epoch(epoch):
            step = _to(step, accelerator.device)
            with accelerator.autocast():
                losses = step_loss(network, step, answer_tokens, recipe)
            if not math.isfinite(losses[0].item()):
                raise FloatingPointError(
                    f"the loss is {losses[0].item()} in epoch {epoch}: lower the learning rate"
                )
            accelerator.backward(losses[0])
            accelerator.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if average is not None:
                average.update()
            sums += torch.tensor([value.item() for value in losses])
            tokens += step.batch.tokens.numel()
            count += 1
            if time.monotonic() - told > 15:
                told = time.monotonic()
                speed = tokens / (told - began)
                mean = (sums / count).tolist()
                report(
                    f"epoch {epoch}/{recipe.epochs}, step {count}: loss {mean[0]:.3f} "
                    f"(emotion {mean[1]:.3f}, impact {mean[2]:.3f}), {speed:,.0f} tokens/s"
                )
        network.eval()
        if average is not None:
            with average.applied():
                figures.append(_figures(epoch, sums / max(1, count), began, tokens, evaluate()))
                _keep_if_best(figures, keep)
        else:
            figures.append(_figures(epoch, sums / max(1, count), began, tokens, evaluate()))
            _keep_if_best(figures, keep)
        report(_told(figures[-1], recipe.epochs))
    return figures


def _keep_if_best(figures: list[EpochFigures], keep: Callable[[EpochFigures], None]) -> None:
    last = figures[-1]
    if not last.valid or last.score >= max(f.score for f in figures):
        keep(last)


def _figures(
    epoch: int, losses: Tensor, began: float, tokens: int, valid: dict[str, dict[str, float]]
) -> EpochFigures:
    loss, emotion, impact = losses.tolist()
    return EpochFigures(epoch, loss, emotion, impact, time.monotonic() - began, tokens, valid)


def _told(figures: EpochFigures, epochs: int) -> str:
    valid = "; ".join(
        f"{name}: weighted F1 {100 * f['weighted_f1']:.2f}, macro {100 * f['macro_f1']:.2f}, "
        f"log loss {f['log_loss']:.3f}"
        for name, f in figures.valid.items()
    )
    return (
        f"epoch {figures.epoch}/{epochs}: loss {figures.loss:.4f} in {figures.seconds:.0f} s. "
        f"{valid}"
    )


def _to(step: Step, device: torch.device) -> Step:
    return Step(
        type(step.batch)(*(tensor.to(device) for tensor in step.batch)),
        step.options.to(device),
        step.targets.to(device),
        step.weights.to(device),
        step.tasks.to(device),
    )
