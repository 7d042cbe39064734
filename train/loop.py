"""The training loop: packed steps, an evaluation after each epoch, the best epoch kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ercbatch.errors import RESUMABLE, ErcbatchError, UsageError
from ercbatch.prompts.tree import Task
from ercbatch.scoring.packed_model import PackedModel
from train.average import Average
from train.progress import EpochMetrics, Metrics, TrainingProgress, epoch_summary
from train.recipe import Recipe, Stage
from train.samples import TASKS, Epoch, Sampler, Step

_REPORT_EVERY = 15.0
"""Seconds between two lines of progress."""


class DivergedError(ErcbatchError):
    """The loss is no longer a number."""


class InterruptedFitError(ErcbatchError):
    """Training was asked to stop; what it came to is saved."""

    exit_code = RESUMABLE


class Objective(nn.Module):
    """The losses of a step, as one module: what spreads a module over devices spreads it all."""

    tokens: Tensor

    def __init__(self, model: PackedModel, answer_tokens: Sequence[int], smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("tokens", torch.tensor(answer_tokens), persistent=False)
        self._smoothing = smoothing

    def forward(self, step: Step) -> Tensor:
        """Losses [tasks]: the mean of -log P(answer) over each task's questions, 0 for none.

        P is as the scorer computes it.
        """
        states = self.model(*step.batch)
        logits = self.model.logits(states, self.tokens).float()
        log_probabilities = logits.masked_fill(~step.options, -torch.inf).log_softmax(-1)
        log_probabilities = log_probabilities.masked_fill(~step.options, 0.0)
        losses = -(step.targets * log_probabilities).sum(-1)
        if self._smoothing:
            spread = -log_probabilities.sum(-1) / step.options.sum(-1)
            losses = (1 - self._smoothing) * losses + self._smoothing * spread
        weights = step.weights * (
            step.tasks == torch.arange(len(TASKS), device=losses.device)[:, None]
        )
        return (weights * losses).sum(-1) / weights.sum(-1).clamp(min=1e-9)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls.

    `evaluate`, `keep`, `epoch_finished` and `save` are called in the main process only.
    """

    evaluate: Callable[[Collection[Task]], tuple[Metrics, Metrics]]
    """Validation and training metrics of these tasks."""
    keep: Callable[[EpochMetrics], None]
    """Called with the weights in place whenever an epoch is the best so far."""
    epoch_finished: Callable[[Sequence[EpochMetrics]], None]
    """Called after each epoch."""
    save: Callable[[Mapping[str, Any]], None]
    """Called with a state from which `Fitting` goes on."""
    report: Callable[[str], None]
    stopping: Callable[[], bool]
    """Whether the run should stop after this step."""


class Fitting:
    """One run of a recipe, from its beginning or from a saved state."""

    def __init__(
        self,
        model: PackedModel,
        sampler: Sampler,
        recipe: Recipe,
        hooks: Hooks,
        accelerator: Accelerator,
        *,
        save_every: float,
    ) -> None:
        self._recipe = recipe
        self._sampler = sampler
        self._hooks = hooks
        self._accelerator = accelerator
        self._save_every = save_every
        self._trained = [p for p in model.parameters() if p.requires_grad]
        objective = Objective(model, sampler.answer_tokens, recipe.label_smoothing)
        self._objective: Any = accelerator.prepare(objective)
        self._average = Average(self._trained, recipe.average) if recipe.average else None
        self._optimizer: Any = None
        self._progress = TrainingProgress()
        self._saved = time.monotonic()

    def run(self, state: Mapping[str, Any] | None = None) -> list[EpochMetrics]:
        """Train to the end; the metrics of all epochs.

        Raises:
            DivergedError: the loss is no longer a number; what `keep` saved stands.
            InterruptedFitError: `stopping` said so; the state is saved.
            UsageError: too little memory, or a stage without questions.
        """
        if state is not None:
            self._restore(state)
        first = 1
        for stage in self._recipe.stages:
            last = first + stage.epochs - 1
            if self._progress.epoch <= last:
                self._optimizer = self._new_optimizer()  # prepared, it would never be freed
                # A state between two stages has the optimizer of the one that is over.
                if state is not None and (self._progress.epoch > first or self._progress.steps):
                    self._optimizer.load_state_dict(state["optimizer"])
                state = None
                while self._progress.epoch <= last:
                    self._epoch(stage, first)
            first = last + 1
        return self.finished

    @property
    def finished(self) -> list[EpochMetrics]:
        """The metrics of the epochs so far."""
        return self._progress.finished

    def _new_optimizer(self) -> torch.optim.Optimizer:
        recipe = self._recipe
        matrices = [p for p in self._trained if p.ndim > 1]
        vectors = [p for p in self._trained if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        assert recipe.learning_rate is not None  # the recipe has filled it in
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )

    def _epoch(self, stage: Stage, first: int) -> None:
        progress, accelerator = self._progress, self._accelerator
        epoch = self._sampler.epoch(progress.epoch, stage.tasks)
        if not len(epoch):
            raise UsageError(
                f"the recipe's data has no question for the stage {stage}: speaker questions need "
                "dialogues of two speakers, impact questions a turn before; leave the task out"
            )
        workers = accelerator.num_processes
        steps = -(-len(epoch) // workers)
        weights = torch.tensor(
            [stage.weights.get(task, 0.0) for task in TASKS], device=accelerator.device
        )
        self._objective.train()
        if progress.epoch == first and not progress.steps:
            self._rehearse(epoch, weights)
        began = reported = time.monotonic() - progress.seconds
        while progress.steps < steps:
            self._set_rate((progress.epoch - first) * steps + progress.steps, stage.epochs * steps)
            step = epoch[(progress.steps * workers + accelerator.process_index) % len(epoch)]
            self._step(step.to(accelerator.device), weights)
            progress.seconds = time.monotonic() - began
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                self._hooks.report(self._status(stage, first, steps))
            stopping, due = self._poll_requests()
            if stopping or due:
                self._save()
            if stopping:
                raise InterruptedFitError(
                    f"stopped in epoch {progress.epoch} after {progress.steps} steps"
                )
        self._save()
        self._finish_epoch(stage)

    def _step(self, step: Step, weights: Tensor) -> None:
        accelerator, progress = self._accelerator, self._progress
        with accelerator.autocast():
            losses = self._objective(step)
            loss = (losses * weights).sum()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self._trained, self._recipe.clip)
        if not (math.isfinite(loss.item()) and math.isfinite(float(norm))):
            raise DivergedError(
                f"the loss is {loss.item():.4g} and the gradient's norm {float(norm):.4g} in epoch "
                f"{progress.epoch}, step {progress.steps + 1}: lower learning_rate"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average is not None:
            self._average.update()
        sums = zip(progress.sums, [loss.item(), *losses.tolist()], strict=True)
        progress.sums = [before + value for before, value in sums]
        progress.tokens += step.batch.tokens.numel()
        progress.steps += 1

    def _rehearse(self, epoch: Epoch, weights: Tensor) -> None:
        """The longest step, without consequences: memory that runs out does so here."""
        device = self._accelerator.device
        generators = _generators()
        # AdamW's moments, which come with the first update.
        moments = [torch.empty_like(p) for p in self._trained for _ in range(2)]
        with self._accelerator.autocast():
            loss = (self._objective(epoch[epoch.longest].to(device)) * weights).sum()
        self._accelerator.backward(loss)
        self._optimizer.zero_grad()
        del moments
        _set_generators(generators)

    def _set_rate(self, step: int, steps: int) -> None:
        """Warm up over the recipe's share of the stage's steps, then decay linearly to 0."""
        warmup_steps = max(1, round(self._recipe.warmup * steps))
        rate = min((step + 1) / warmup_steps, (steps - step) / max(1, steps - warmup_steps))
        assert self._recipe.learning_rate is not None  # the recipe has filled it in
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * min(1.0, rate)

    def _poll_requests(self) -> tuple[bool, bool]:
        """(whether to stop, whether to save), for all processes as for any: they act together."""
        local = (self._hooks.stopping(), time.monotonic() - self._saved > self._save_every)
        if self._accelerator.num_processes == 1:
            return local
        requests = torch.tensor(local, dtype=torch.float32, device=self._accelerator.device)
        stopping, due = self._accelerator.reduce(requests, "sum").tolist()
        return stopping > 0, due > 0

    def _finish_epoch(self, stage: Stage) -> None:
        progress, hooks = self._progress, self._hooks
        self._objective.eval()
        loss, *losses = progress.means
        metrics = EpochMetrics(
            progress.epoch,
            str(stage),
            loss,
            {task.value: losses[TASKS.index(task)] for task in stage.tasks},
            progress.seconds,
            progress.tokens,
        )
        with self._average.applied() if self._average is not None else nullcontext():
            if self._accelerator.is_main_process:
                valid, train = hooks.evaluate(stage.tasks)
                metrics = replace(metrics, valid=valid, train=train)
                rivals = [f for f in progress.finished if f.stage == metrics.stage and f.valid]
                if metrics.score >= max((f.score for f in rivals), default=0.0):
                    hooks.keep(metrics)
        self._progress = TrainingProgress([*progress.finished, metrics])
        if self._accelerator.is_main_process:
            hooks.epoch_finished(self._progress.finished)
            hooks.report(epoch_summary(metrics, sum(s.epochs for s in self._recipe.stages)))
        self._accelerator.wait_for_everyone()
        self._save()

    def _status(self, stage: Stage, first: int, steps: int) -> str:
        progress = self._progress
        mean, *means = progress.means
        tasks = ", ".join(f"{t.value} {means[TASKS.index(t)]:.3f}" for t in stage.tasks)
        speed = progress.tokens * self._accelerator.num_processes / progress.seconds
        remaining = (
            progress.seconds
            / progress.steps
            * (steps * (first + stage.epochs - progress.epoch) - progress.steps)
        )
        epochs = sum(s.epochs for s in self._recipe.stages)
        return (
            f"epoch {progress.epoch}/{epochs}, step {progress.steps}/{steps}: loss {mean:.3f} "
            f"({tasks}), {speed:,.0f} tokens/s, {remaining / 60:,.0f} min left of {stage}"
        )

    def _save(self) -> None:
        self._saved = time.monotonic()
        generators = gather_object([_generators()])  # each process draws its own dropout
        if not self._accelerator.is_main_process:
            return
        average = self._average
        self._hooks.save(
            {
                "progress": self._progress.to_json(),
                "weights": [p.detach() for p in self._trained],
                "optimizer": self._optimizer.state_dict(),
                "average": None if average is None else average.weights,
                "updates": 0 if average is None else average.updates,
                "generators": generators,
            }
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._progress = TrainingProgress.from_json(state["progress"])
        with torch.no_grad():
            for p, value in zip(self._trained, state["weights"], strict=True):
                p.copy_(value)
            if self._average is not None:
                for average, value in zip(self._average.weights, state["average"], strict=True):
                    average.copy_(value)
                self._average.updates = state["updates"]
        _set_generators(state["generators"][self._accelerator.process_index])


def _generators() -> list[Tensor]:
    """The states of torch's random generators: the CPU's, then each GPU's."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def _set_generators(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])
