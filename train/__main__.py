"""`python -m train`: fit a model on labelled dialogues, or make the base of `mini`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from ercbatch.cli import Failure
from ercbatch.errors import ErcbatchError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train causal language models on labelled dialogues."""


@main.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def base(source: Path, output: Path) -> None:
    """Turn a BERT sentence encoder into a causal decoder: the base of `mini`."""
    from train.base import write_base

    write_base(source, output)
    click.echo(f"{output}: a causal decoder with the weights of {source.name}", err=True)


@main.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Run folder.")
@click.option("--base", "base_", help="Another base than the recipe's.")
@click.option("--epochs", type=click.IntRange(1), help="Another number of epochs.")
@click.option("--seed", type=int, help="Another seed.")
@click.option("--bf16/--no-bf16", default=False, help="Compute in bfloat16.")
@click.option("--force", is_flag=True, help="Replace an existing run folder's files.")
def fit(
    recipe: Path,
    output: Path,
    base_: str | None,
    epochs: int | None,
    seed: int | None,
    bf16: bool,
    force: bool,
) -> None:
    """Fit the model of a RECIPE (TOML) and keep the best epoch in a run folder."""
    from train.recipe import read_recipe

    try:
        if (output / "run.json").exists() and not force:
            raise UsageError(f"{output} holds a run: choose another folder, or give --force")
        _fit(read_recipe(recipe, base=base_, epochs=epochs, seed=seed), output, bf16)
    except ErcbatchError as error:
        raise Failure(error) from error


def _fit(recipe: Any, output: Path, bf16: bool) -> None:
    import torch

    from ercbatch import bundle as files
    from ercbatch.encoder import SentenceEncoder
    from ercbatch.torch_model import PackedModel, load_causal_lm
    from train.adapter import add_lora
    from train.fit import EpochFigures, fit
    from train.samples import Sampler, read_dataset, training_bank
    from train.validate import Validation

    datasets = [read_dataset(source) for source in recipe.train]
    held_out = [read_dataset(source) for source in recipe.valid]
    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    model, tokenizer = load_causal_lm(recipe.base, **settings)
    packed = PackedModel(model)
    torch.manual_seed(recipe.seed)  # before the adapters: their weights are drawn too
    network: Any = add_lora(packed, recipe) if recipe.method == "lora" else None
    banks = {}
    if recipe.demonstrations:
        folder = Path(recipe.encoder)
        encoder = SentenceEncoder(folder / files.ENCODER, folder / files.ENCODER_TOKENIZER)
        banks = {i: training_bank(d, encoder, recipe) for i, d in enumerate(datasets)}
    sampler = Sampler(recipe, datasets, tokenizer, banks)
    validation = Validation(packed, tokenizer, recipe, held_out)
    output.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {
        "recipe": recipe.to_json(),
        "controls": tokenizer.controls.to_json(),
        "versions": {n: version(n) for n in ("ercbatch", "torch", "transformers", "peft")},
        "data": {d.source.path: _digest(d.source.path) for d in (*datasets, *held_out)},
        "epochs": [],
    }
    tokenizer.save(output / files.TOKENIZER)

    def keep(figures: EpochFigures) -> None:
        if network is not None:
            network.save_pretrained(output / "adapter")
        else:
            with packed.whole() as whole:
                whole.save_pretrained(output / "model")
        described["kept"] = figures.epoch

    def say(text: str) -> None:
        print(f"train: {text}", file=sys.stderr, flush=True)

    figures: Sequence[EpochFigures] = fit(
        packed,
        sampler,
        recipe,
        evaluate=validation.figures,
        keep=keep,
        report=say,
        bfloat16=bf16,
    )
    described["epochs"] = [dataclasses.asdict(f) for f in figures]
    text = json.dumps(described, indent=2)
    (output / "run.json").write_text(text + "\n", encoding="utf-8")


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(prog_name="python -m train")
