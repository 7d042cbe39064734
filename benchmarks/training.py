"""Training in packs against one prompt for each sample: same model, same questions, same loss.

    python -m benchmarks.training RECIPE

The first step's loss is compared with dropout off; then whole steps (forward, backward, update)
of both kinds are timed in turn. The separate prompts are those that the packs' answers see, in
batches of 32, padded to the longest of each batch; batches are of prompts of like length.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from accelerate import Accelerator

from ercbatch.errors import UsageError
from ercbatch.prompts.packs import Pack
from ercbatch.prompts.tree import Task, visible
from ercbatch.scoring.packed_model import Batch, collate
from ercbatch.terminal.stopping import exit_on_errors
from train.datasets import read_dataset
from train.loop import Objective
from train.model import load_trainable
from train.recipe import read_recipe
from train.samples import TASKS, Sampler, Step

_BATCH = 32
"""Prompts in a batch, as in the paper."""


def separate(step: Step) -> list[Step]:
    """The step's questions as ordinary prompts, in batches; where the step lies."""
    device = step.batch.tokens.device
    step = step.to(torch.device("cpu"))
    tokens, _, ends, reads = (tensor.numpy() for tensor in step.batch)
    sees = visible(ends)
    prompts = []
    for read in reads:
        row, index = divmod(int(read), tokens.shape[1])
        prompts.append(tokens[row, sees[row, index]].astype(np.int32))
    order = np.argsort([len(p) for p in prompts], kind="stable")
    steps = []
    for at in range(0, len(order), _BATCH):
        rows = order[at : at + _BATCH]
        batch = collate([_chain(prompts[i]) for i in rows])
        ends_at = [j * batch.tokens.shape[1] + len(prompts[i]) - 1 for j, i in enumerate(rows)]
        batch = Batch(batch.tokens, batch.positions, batch.ends, torch.tensor(ends_at))
        fields = (step.options, step.targets, step.weights, step.tasks)
        part = Step(batch, *(tensor[torch.from_numpy(rows)] for tensor in fields))
        steps.append(part.to(device))
    return steps


def _chain(prompt: np.ndarray) -> Pack:
    length = len(prompt)
    positions = np.arange(length, dtype=np.int32)
    return Pack(prompt, positions, np.full(length, length, dtype=np.int32), ())


def step_loss(objective: Objective, step: Step, weights: torch.Tensor) -> float:
    """The step's loss from its batches, each counted as much as its questions count."""
    objective.eval()
    with torch.no_grad():
        packed_loss = float((objective(step) * weights).sum())
        totals = torch.zeros(2, len(TASKS), device=weights.device)
        for part in separate(step):
            task_weights = torch.stack(
                [(part.weights * (part.tasks == i)).sum() for i in range(len(TASKS))]
            )
            totals += torch.stack([objective(part) * task_weights, task_weights])
    separate_loss = float((totals[0] / totals[1].clamp(min=1e-9) * weights).sum())
    return abs(packed_loss - separate_loss)


def train_on(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    steps: list[Step],
    weights: torch.Tensor,
    accelerator: Accelerator,
) -> float:
    """Seconds of forward, backward and update over these steps."""
    objective.train()
    began = time.perf_counter()
    for step in steps:
        with accelerator.autocast():
            loss = (objective(step) * weights).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a GPU has finished only then
    return time.perf_counter() - began


@click.command()
@click.argument("recipe_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base", help="Another base than the recipe's.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Packed steps of each round.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--bf16/--no-bf16", default=False)
def main(recipe_file: Path, base: str | None, steps: int, rounds: int, bf16: bool) -> None:
    """Measure with the last stage of RECIPE_FILE, on a GPU where there is one."""
    with exit_on_errors():
        result = measure(recipe_file, base, steps, rounds, bf16)
    for name, value in result.items():
        click.echo(f"{name.replace('_', ' '):32}{value}")
    click.echo(json.dumps(result))


def measure(
    recipe_file: Path, base: str | None, steps: int, rounds: int, bf16: bool
) -> Mapping[str, int | float | str]:
    """The figures, by name.

    Raises:
        ErcbatchError: what `train fit` refuses.
    """
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    device = accelerator.device
    recipe = replace(read_recipe(recipe_file, base=base), demonstrations=0.0)
    stage = recipe.stages[-1]
    packed, _, tokenizer = load_trainable(recipe, device, bfloat16=bf16)
    sampler = Sampler(
        recipe, [read_dataset(s, need_targets=False) for s in recipe.train], tokenizer, {}
    )
    epoch = sampler.epoch(1, stage.tasks)
    chosen: Iterator[Step] = (epoch[i].to(device) for i in range(min(steps, len(epoch))))
    together = list(chosen)
    emotion = TASKS.index(Task.EMOTION)
    count = sum(int((step.tasks == emotion).sum()) for step in together)
    if not count:
        raise UsageError("no utterance to count by: have emotion among the recipe's tasks")
    apart = [part for step in together for part in separate(step)]
    objective = Objective(packed, sampler.answer_tokens, 0.0).to(device)
    weights = torch.tensor([stage.weights.get(task, 0.0) for task in TASKS], device=device)
    difference = step_loss(objective, together[0], weights)
    optimizer = torch.optim.AdamW([p for p in packed.parameters() if p.requires_grad], lr=0.0)
    seconds: dict[str, list[float]] = {"packed": [], "separate": []}
    for part in (together[:1], apart[:1]):
        train_on(objective, optimizer, part, weights, accelerator)
    for _ in range(rounds):
        for kind, kind_steps in (("packed", together), ("separate", apart)):
            seconds[kind].append(train_on(objective, optimizer, kind_steps, weights, accelerator))
    ratios = [s / p for s, p in zip(seconds["separate"], seconds["packed"], strict=True)]
    return {
        "utterances": count,
        "tasks": str(stage),
        "packed_per_second": round(count / statistics.median(seconds["packed"]), 1),
        "separate_per_second": round(count / statistics.median(seconds["separate"]), 1),
        "speed_ratio": round(statistics.median(ratios), 2),
        "tokens_per_utterance_packed": round(_tokens(together) / count, 1),
        "tokens_per_utterance_separate": round(_tokens(apart) / count, 1),
        "first_step_loss_difference": difference,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }


def _tokens(steps: list[Step]) -> int:
    return sum(step.batch.tokens.numel() for step in steps)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.training")
