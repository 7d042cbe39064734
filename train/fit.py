"""A recipe to a run folder: data, model, loop, and what is written on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import AutoTokenizer

from ercbatch.bundle.bundle import encoder_files
from ercbatch.errors import InputError, UsageError
from ercbatch.prompts.tree import Task
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.retrieval.retriever import Retriever
from ercbatch.scoring.checkpoints import check_config, load_causal_lm, save_tokenizer
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.threads import available_threads
from train.curves import write_curves
from train.datasets import Dataset, read_dataset, share, without_overlap
from train.loop import DivergedError, Fitting, Hooks
from train.model import check_memory, load_trainable
from train.progress import EpochMetrics, Metrics, metrics_text
from train.recipe import Recipe
from train.run import ADAPTER, DESCRIPTION, MODEL, run_description, write_description
from train.samples import Sampler, TrainingBank, joined, training_bank
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
    bfloat16 = options.bfloat16
    if bfloat16 is None:
        # A GPU that only emulates it is faster without.
        bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    accelerator = Accelerator(mixed_precision="bf16" if bfloat16 else "no")
    if not accelerator.is_main_process:
        report = _silent
    data = _read_data(recipe, report)
    check_config(recipe.base)
    check_memory(recipe, bfloat16=bfloat16)
    _make_folder(folder)
    try:
        _fit(recipe, folder, options, report, accelerator, data)
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch has no error of its own for it.
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        message = str(error).partition("\n")[0]
        raise UsageError(
            f"too little memory on {accelerator.device} ({message}): lower packs_per_step or "
            "pack_tokens, set gradient_checkpointing, or load nf4"
        ) from error


@dataclass(frozen=True, slots=True)
class _Data:
    """The datasets of a recipe, the training ones thinned as it says."""

    train: Sequence[Dataset]
    valid: Sequence[Dataset]
    test: Sequence[Dataset]


@dataclass(frozen=True, slots=True)
class _Demonstrations:
    """The demonstrations that questions show.

    Attributes:
        banks: index of a training dataset -> its bank.
        retrievers: label set -> the retriever for validation.
        for_sample: the same for training dialogues that are measured.
    """

    banks: Mapping[int, TrainingBank] = field(default_factory=dict)
    retrievers: Mapping[str, Retriever] = field(default_factory=dict)
    for_sample: Mapping[str, Retriever] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, data: _Data, sampled: Sequence[Dataset]) -> _Demonstrations:
        if not (recipe.demonstrations or recipe.demonstrations_shown):
            return cls()
        encoder = SentenceEncoder(*encoder_files(recipe.encoder), threads=available_threads())
        banks = {
            i: training_bank(d, encoder, recipe) for i, d in enumerate(data.train) if d.has_targets
        }
        # A demonstration shows a label, so no dialogue that is measured may be among them.
        sampled_texts = {u.text for d in sampled for s in d.scenes for u in s.dialogue.utterances}
        retrievers, for_sample = {}, {}
        for name in {data.train[i].labels.name for i in banks}:
            label_banks = [
                bank.bank for i, bank in banks.items() if data.train[i].labels.name == name
            ]
            retrievers[name] = Retriever(encoder, joined(label_banks))
            for_sample[name] = Retriever(encoder, joined(label_banks, sampled_texts))
        return cls(banks, retrievers, for_sample)


@dataclass(slots=True)
class _RunFolder:
    """The folder of a run: the weights of the epoch that is kept, and the state to resume from."""

    folder: Path
    recipe: Recipe
    packed: PackedModel
    adapter: Any
    described: Mapping[str, Any]
    best_epoch: int = 0
    """Number of the epoch whose weights are in the folder; 0 before the first one."""

    def clear(self) -> None:
        """Remove what an earlier run has left."""
        for name in (DESCRIPTION, STATE):
            (self.folder / name).unlink(missing_ok=True)

    def keep(self, epoch: EpochMetrics) -> None:
        self.best_epoch = epoch.epoch
        self.write()

    def write(self) -> None:
        if self.adapter is not None:
            self.adapter.save_pretrained(self.folder / ADAPTER)
            return
        with self.packed.whole() as whole:
            whole.save_pretrained(self.folder / MODEL)
        original = AutoTokenizer.from_pretrained(self.recipe.base, trust_remote_code=False)
        save_tokenizer(original, self.folder / MODEL)  # so that it is a base like any other

    def draw(self, epochs: Sequence[EpochMetrics]) -> None:
        write_curves(self.folder, epochs)

    def save(self, state: Mapping[str, Any]) -> None:
        save_state(self.folder, self.described, {**state, "kept": self.best_epoch})

    def load_best(self) -> None:
        """Put the weights that were written into the model."""
        if self.adapter is not None:
            weights = load_peft_weights(str(self.folder / ADAPTER), device="cpu")
            set_peft_model_state_dict(self.adapter, weights)
            return
        best, _ = load_causal_lm(str(self.folder / MODEL))
        with self.packed.whole() as whole:
            whole.load_state_dict(best.state_dict())


def _fit(
    recipe: Recipe,
    folder: Path,
    options: FitOptions,
    report: Callable[[str], None],
    accelerator: Accelerator,
    data: _Data,
) -> None:
    bfloat16 = accelerator.mixed_precision == "bf16"
    packed, adapter, tokenizer = load_trainable(recipe, accelerator.device, bfloat16=bfloat16)
    sampled = [d.first(recipe.train_sample) for d in data.train if recipe.train_sample]
    demonstrations = _Demonstrations.of(recipe, data, sampled)
    sampler = Sampler(recipe, data.train, tokenizer, demonstrations.banks)
    validation = Validation(packed, tokenizer, recipe, data.valid, demonstrations.retrievers)
    test = Validation(packed, tokenizer, recipe, data.test, demonstrations.retrievers)
    sample = Validation(packed, tokenizer, recipe, sampled, demonstrations.for_sample)
    described = {
        **run_description(recipe, tokenizer),
        "bfloat16": bfloat16,
        "processes": accelerator.num_processes,
    }
    run = _RunFolder(folder, recipe, packed, adapter, described)
    state = load_state(folder, described) if options.resume else None
    if state is not None:
        run.best_epoch = int(state["kept"])
    elif accelerator.is_main_process:
        run.clear()

    def evaluate(tasks: Collection[Task]) -> tuple[Metrics, Metrics]:
        return validation.metrics(tasks), sample.metrics(tasks)

    outcome: dict[str, Any] = {}
    with _stop_requests() as stopping:
        hooks = Hooks(evaluate, run.keep, run.draw, run.save, report, stopping)
        fitting = Fitting(
            packed, sampler, recipe, hooks, accelerator, save_every=options.save_every
        )
        try:
            outcome["epochs"] = fitting.run(state)
        except DivergedError as error:
            if accelerator.is_main_process:
                if not run.best_epoch:  # the weights are those of the last step that went well
                    run.write()
                outcome = {"epochs": fitting.finished, "kept": run.best_epoch, "diverged": True}
                write_description(folder, described, tokenizer, **outcome)
            raise DivergedError(f"{error}. {folder} holds what was good before") from error
    if accelerator.is_main_process:
        outcome["kept"] = run.best_epoch
        test_summary = ""
        if data.test:
            run.load_best()
            outcome["test"] = test.metrics(recipe.stages[-1].tasks)
            test_summary = f"; {metrics_text(outcome['test'])}"
        write_description(folder, described, tokenizer, **outcome)
        (folder / STATE).unlink()
        report(
            f"{folder}: epoch {run.best_epoch} is kept{test_summary}; "
            f"next: python -m export bundle {folder}"
        )


def _make_folder(folder: Path) -> None:
    """Make the run folder, before any time is spent.

    Raises:
        UsageError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to ({error}): choose another") from error


def _silent(_text: str) -> None:
    """One process reports for all."""


def _read_data(recipe: Recipe, report: Callable[[str], None]) -> _Data:
    speakers = Task.SPEAKER.value in recipe.tasks
    emotions = any(task is not Task.SPEAKER for stage in recipe.stages for task in stage.tasks)
    datasets = [read_dataset(source, need_targets=not speakers) for source in recipe.train]
    valid, test = (
        [read_dataset(source, need_targets=emotions) for source in sources]
        for sources in (recipe.valid, recipe.test)
    )
    for dataset in (*valid, *test):
        if emotions and not dataset.labelled:
            raise InputError(
                f"{dataset.source.path}: no utterance has a `label` of its own to be measured by"
            )
    if emotions and not any(dataset.has_targets for dataset in datasets):
        files = ", ".join(source.path for source in recipe.train)
        raise InputError(f"{files}: no utterance has a `label`: emotions are learnt from labels")
    for dataset in datasets:
        if emotions and not dataset.has_targets:
            report(f"{dataset.source.path}: no utterance has a `label`: for speakers alone")
    held_out = [*valid, *test]
    if recipe.exclude_overlap:
        datasets = [without_overlap(d, held_out, recipe.exclude_overlap) for d in datasets]
        for dataset in datasets:
            if not dataset.scenes:
                raise UsageError(
                    f"{dataset.source.path}: every dialogue shares a line with a validation or "
                    "test dataset (exclude_overlap): nothing is left to train on"
                )
    for dataset in datasets:
        training_texts = {u.text for s in dataset.scenes for u in s.dialogue.utterances}
        for other in held_out:
            held_out_texts = {u.text for s in other.scenes for u in s.dialogue.utterances}
            if held_out_texts and held_out_texts <= training_texts:
                report(
                    f"warning: all that is said in {other.source.path} stands in "
                    f"{dataset.source.path} too: its figures will say nothing of new dialogues"
                )
    return _Data(share(datasets, recipe), valid, test)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one stops at once."""
    requested = False

    def request_stop(number: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, signal.SIG_DFL)

    handlers = {
        number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
