"""`python -m train`: fit a model on labelled dialogues, or make the base of `mini`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ercbatch.cli import Failure
from ercbatch.errors import ErcbatchError, UsageError


def _fold(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    fold, _, folds = value.partition("/")
    if fold.isdecimal() and folds.isdecimal() and int(fold) < int(folds):
        return int(fold), int(folds)
    raise click.BadParameter(f"{value!r} is not K/N with K below N, such as 0/4")


_RUN = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train causal language models on labelled dialogues."""


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def base(source: Path, output: Path) -> None:
    """Make a base of a BERT sentence encoder (a folder) or of a GGUF file.

    The encoder becomes a causal decoder, which is the base of `mini`; what a GGUF file holds is
    dequantized.
    """
    from train.base import write_base

    try:
        write_base(source, output)
    except ErcbatchError as error:
        raise Failure(error) from error
    click.echo(f"{output}: a causal decoder with the weights of {source.name}", err=True)


@main.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Run folder.")
@click.option("--base", "base_", help="Another base than the recipe's.")
@click.option("--epochs", type=click.IntRange(1), help="Another number of epochs.")
@click.option("--seed", type=int, help="Another seed.")
@click.option(
    "--fold",
    metavar="K/N",
    callback=_fold,
    help="Leave out every N-th training dialogue, from the K-th (from 0) on.",
)
@click.option("--bf16/--no-bf16", default=False, help="Compute in bfloat16.")
@click.option("--force", is_flag=True, help="Replace an existing run folder's files.")
def fit(
    recipe: Path,
    output: Path,
    base_: str | None,
    epochs: int | None,
    seed: int | None,
    fold: tuple[int, int] | None,
    bf16: bool,
    force: bool,
) -> None:
    """Fit the model of a RECIPE (TOML) and keep the best epoch in a run folder."""
    from train.recipe import read_recipe
    from train.run import DESCRIPTION

    try:
        if (output / DESCRIPTION).exists() and not force:
            raise UsageError(f"{output} holds a run: choose another folder, or give --force")
        wanted = read_recipe(recipe, base=base_, epochs=epochs, seed=seed)
        if fold is not None:
            wanted = replace(
                wanted, train=tuple(replace(source, leave_out=fold) for source in wanted.train)
            )
        _fit(wanted, output, bf16)
    except ErcbatchError as error:
        raise Failure(error) from error


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Run folder.")
def average(runs: tuple[Path, ...], output: Path) -> None:
    """Average the weights of full-parameter RUNS that began from the same base."""
    from train.average import average_runs

    try:
        average_runs(runs, output)
    except ErcbatchError as error:
        raise Failure(error) from error
    _say(f"{output}: the mean of {len(runs)} runs")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN)
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--labels", required=True, help="The label set to score.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSONL file.")
@click.option("--bf16/--no-bf16", default=False, help="Compute in bfloat16.")
def teach(runs: tuple[Path, ...], data: Path, labels: str, output: Path, bf16: bool) -> None:
    """Write what RUNS say of dialogues that they were not fitted on, as `scores`."""
    from ercbatch.labels import label_set
    from train.teach import teach as write_scores

    try:
        count = write_scores(runs, data, label_set(labels), output, _say, bfloat16=bf16)
    except ErcbatchError as error:
        raise Failure(error) from error
    _say(f"{output}: {count:,} dialogues")


def _say(text: str) -> None:
    print(f"train: {text}", file=sys.stderr, flush=True)


def _fit(recipe: Any, output: Path, bf16: bool) -> None:
    import torch
    from transformers import AutoTokenizer

    from ercbatch import bundle as files
    from ercbatch.encoder import SentenceEncoder
    from ercbatch.onnx_scorer import available_threads
    from ercbatch.torch_model import PackedModel, check_config, load_causal_lm
    from train.adapter import add_lora
    from train.dropout import dropout_settings
    from train.fit import EpochFigures, fit
    from train.run import ADAPTER, MODEL, describe
    from train.samples import Sampler, read_dataset, training_bank, without_overlap
    from train.validate import Validation

    datasets = [read_dataset(source) for source in recipe.train]
    held_out = [read_dataset(source) for source in recipe.valid]
    if recipe.exclude_overlap:
        datasets = [without_overlap(d, held_out, recipe.exclude_overlap) for d in datasets]
    check_config(recipe.base)
    settings: dict[str, Any] = {"attn_implementation": "sdpa", **dropout_settings(recipe)}
    model, tokenizer = load_causal_lm(recipe.base, **settings)
    original = AutoTokenizer.from_pretrained(recipe.base, trust_remote_code=False)
    packed = PackedModel(model)
    torch.manual_seed(recipe.seed)  # before the adapters: their weights are drawn too
    network: Any = add_lora(packed, recipe) if recipe.method == "lora" else None
    banks = {}
    if recipe.demonstrations:
        folder = Path(recipe.encoder)
        encoder = SentenceEncoder(
            folder / files.ENCODER, folder / files.ENCODER_TOKENIZER, threads=available_threads()
        )
        banks = {i: training_bank(d, encoder, recipe) for i, d in enumerate(datasets)}
    sampler = Sampler(recipe, datasets, tokenizer, banks)
    validation = Validation(packed, tokenizer, recipe, held_out)
    output.mkdir(parents=True, exist_ok=True)
    kept = 0

    def keep(figures: EpochFigures) -> None:
        nonlocal kept
        kept = figures.epoch
        if network is not None:
            network.save_pretrained(output / ADAPTER)
        else:
            with packed.whole() as whole:
                whole.save_pretrained(output / MODEL)
            original.save_pretrained(output / MODEL)  # so that it is a base like any other

    figures: Sequence[EpochFigures] = fit(
        packed,
        sampler,
        recipe,
        evaluate=validation.figures,
        keep=keep,
        report=_say,
        bfloat16=bf16,
    )
    paths = [d.source.path for d in (*datasets, *held_out)]
    describe(output, recipe, tokenizer, paths, epochs=figures, kept=kept)


if __name__ == "__main__":
    main(prog_name="python -m train")
