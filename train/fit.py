"""A recipe to a run folder: data, model, loop, and what is written on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from ercbatch import bundle as files
from ercbatch.encoder import SentenceEncoder
from ercbatch.errors import UsageError
from ercbatch.onnx_scorer import available_threads
from ercbatch.pipeline import Retriever
from ercbatch.torch_model import check_config
from train.curves import write_curves
from train.datasets import Dataset, read_dataset, share, without_overlap
from train.loop import DivergedError, EpochFigures, Figures, Fitting, Hooks, told
from train.model import check_memory, load_trainable
from train.recipe import Recipe
from train.run import ADAPTER, DESCRIPTION, MODEL, describe, description, load_run
from train.samples import Sampler, TrainingBank, training_bank
from train.state import STATE, load_state, save_state
from train.validate import Validation


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How a recipe is run: what does not change what it learns.

    `bfloat16` None is: where the device is a GPU that has it. The state is saved every
    `save_every` seconds.
    """

    bfloat16: bool | None = None
    resume: bool = False
    save_every: float = 300.0


def fit_recipe(
    recipe: Recipe, folder: Path, options: FitOptions, report: Callable[[str], None]
) -> None:
    """Fit the model of a recipe; the folder is then a run.

    Raises:
        ErcbatchError: see `Fitting.run`, `read_dataset` and `load_causal_lm`.
    """
    datasets, held_out = _read(recipe, report)
    tests = [read_dataset(source) for source in recipe.test]
    check_config(recipe.base)
    check_memory(recipe)
    bfloat16 = options.bfloat16
    if bfloat16 is None:
        bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(mixed_precision="bf16" if bfloat16 else "no")
    packed, adapter, tokenizer = load_trainable(recipe, accelerator.device, bfloat16=bfloat16)
    banks: dict[int, TrainingBank] = {}
    retrievers: dict[str, Retriever] = {}
    if recipe.demonstrations or recipe.demonstrations_shown:
        source = Path(recipe.encoder)
        encoder = SentenceEncoder(
            source / files.ENCODER, source / files.ENCODER_TOKENIZER, threads=available_threads()
        )
        banks = {i: training_bank(d, encoder, recipe) for i, d in enumerate(datasets)}
        for i, dataset in enumerate(datasets):
            retrievers.setdefault(dataset.labels.name, Retriever(encoder, banks[i].bank))
    sampler = Sampler(recipe, datasets, tokenizer, banks)
    validation = Validation(packed, tokenizer, recipe, held_out, retrievers)
    sampled = [dataset.first(recipe.train_sample) for dataset in datasets]
    sample = Validation(
        packed, tokenizer, recipe, sampled if recipe.train_sample else (), retrievers
    )
    paths = [source.path for source in (*recipe.train, *recipe.valid, *recipe.test)]
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        **description(recipe, tokenizer, paths),
        "bfloat16": bfloat16,
        "processes": accelerator.num_processes,
    }
    state = load_state(folder, described) if options.resume else None
    if state is None:
        for name in (DESCRIPTION, STATE):  # of a run that this one replaces
            (folder / name).unlink(missing_ok=True)
    kept = 0 if state is None else int(state["kept"])

    def evaluate() -> tuple[Figures, Figures]:
        return validation.figures(), sample.figures()

    def keep(figures: EpochFigures) -> None:
        nonlocal kept
        kept = figures.epoch
        write()

    def write() -> None:
        if adapter is not None:
            adapter.save_pretrained(folder / ADAPTER)
            return
        with packed.whole() as whole:
            whole.save_pretrained(folder / MODEL)
        original = AutoTokenizer.from_pretrained(recipe.base, trust_remote_code=False)
        original.save_pretrained(folder / MODEL)  # so that it is a base like any other

    def finished(epochs: Sequence[EpochFigures]) -> None:
        write_curves(folder, epochs)

    def save(state: Mapping[str, Any]) -> None:
        save_state(folder, described, {**state, "kept": kept})

    with _stop_requests() as stopping:
        hooks = Hooks(evaluate, keep, finished, save, report, stopping)
        fitting = Fitting(
            packed, sampler, recipe, hooks, accelerator, save_every=options.save_every
        )
        try:
            epochs = fitting.run(state)
        except DivergedError as error:
            if not kept:  # the weights are those of the last step that went well
                write()
            describe(folder, described, tokenizer, epochs=fitting.finished, kept=kept)
            raise DivergedError(f"{error}. {folder} holds what was good before") from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UsageError(
                f"too little memory on {accelerator.device} ({str(error).splitlines()[0]}): lower "
                "packs_per_step or pack_tokens, set gradient_checkpointing, or load nf4"
            ) from error
    if accelerator.is_main_process:
        describe(folder, described, tokenizer, epochs=epochs, kept=kept)
        if tests:
            run = load_run(folder)
            run.model.to(accelerator.device)
            test = Validation(run.model, tokenizer, recipe, tests, retrievers).figures()
            describe(folder, described, tokenizer, epochs=epochs, kept=kept, test=test)
            report(f"epoch {kept} is kept; {told(test)}")
        (folder / STATE).unlink()


def _read(recipe: Recipe, report: Callable[[str], None]) -> tuple[list[Dataset], list[Dataset]]:
    """The training datasets, thinned as the recipe says, and the validation datasets."""
    datasets = [read_dataset(source) for source in recipe.train]
    held_out = [read_dataset(source) for source in recipe.valid]
    if recipe.exclude_overlap:
        datasets = [without_overlap(d, held_out, recipe.exclude_overlap) for d in datasets]
        for dataset in datasets:
            if not dataset.scenes:
                raise UsageError(
                    f"{dataset.source.path}: every dialogue shares a line with a validation "
                    "dataset (exclude_overlap): nothing is left to train on"
                )
    texts = [{u.text for s in d.scenes for u in s.dialogue.utterances} for d in held_out]
    for dataset in datasets:
        own = {u.text for s in dataset.scenes for u in s.dialogue.utterances}
        if any(found and found <= own for found in texts):
            report(
                f"warning: all that is said in a validation dataset stands in "
                f"{dataset.source.path} too: its figures will say nothing of new dialogues"
            )
    return share(datasets, recipe), held_out


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one stops at once."""
    asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
