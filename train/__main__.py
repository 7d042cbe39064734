"""`python -m train`: fit a model on labelled dialogues, or make the base of `mini`."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from ercbatch.errors import UsageError
from ercbatch.terminal.stopping import exit_on_errors


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
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--force", is_flag=True, help="Replace an earlier base.")
def base(source: Path, output: Path, force: bool) -> None:
    """Make a base of a BERT sentence encoder (a folder) or of a GGUF file.

    The encoder becomes a causal decoder, which is the base of `mini`; what a GGUF file holds is
    dequantized.
    """
    from train.base import write_base

    with exit_on_errors():
        write_base(source, output, force=force)
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
@click.option("--lora", "method", flag_value="lora", help="Train LoRA adapters.")
@click.option("--full", "method", flag_value="full", help="Train all parameters.")
@click.option(
    "--load", type=click.Choice(["full", "nf4", "int8"]), help="How to load a base under LoRA."
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the training data.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value for a key of the recipe (--set alpha=0.2); repeatable.",
)
@click.option(
    "--bf16/--no-bf16", default=None, help="Compute in bfloat16; by default on a GPU that has it."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Start again in a folder that holds a run.")
@click.option(
    "--save-every",
    type=click.FloatRange(0),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How often to save what --resume goes on from.",
)
def fit(  # click passes a parameter for each option
    recipe: Path,
    output: Path,
    base_: str | None,
    epochs: int | None,
    seed: int | None,
    fold: tuple[int, int] | None,
    method: str | None,
    load: str | None,
    fraction: float | None,
    settings: tuple[str, ...],
    bf16: bool | None,
    resume: bool,
    force: bool,
    save_every: float,
) -> None:
    """Fit the model of a RECIPE (TOML) and keep the best epoch in a run folder."""
    from train.recipe import read_recipe
    from train.run import DESCRIPTION, is_diverged
    from train.state import STATE

    with exit_on_errors():
        if resume and (output / DESCRIPTION).exists():
            if is_diverged(output):
                raise UsageError(f"{output} diverged: lower learning_rate, and start with --force")
            _say(f"{output} is finished: nothing to resume")
            return
        if not force and not resume:
            if (output / DESCRIPTION).exists():
                raise UsageError(f"{output} holds a run: choose another folder, or give --force")
            if (output / STATE).exists():
                raise UsageError(
                    f"{output} holds an interrupted run: go on with --resume, or start again with "
                    "--force"
                )
        resolved = read_recipe(
            recipe,
            settings,
            base=base_,
            epochs=epochs,
            seed=seed,
            method=method,
            load=load,
            fraction=fraction,
        )
        if fold is not None:
            resolved = replace(
                resolved, train=tuple(replace(source, leave_out=fold) for source in resolved.train)
            )
        from train.fit import FitOptions, fit_recipe
        from train.loop import InterruptedFitError

        try:
            fit_recipe(resolved, output, FitOptions(bf16, resume, save_every), _say)
        except InterruptedFitError as error:
            arguments = [a for a in sys.argv[1:] if a not in ("--force", "--resume")]
            processes = os.environ.get("WORLD_SIZE", "1")
            launcher = (
                ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
            )
            command = shlex.join([*launcher, "-m", "train", *arguments, "--resume"])
            raise InterruptedFitError(f"{error}; to go on: {command}") from error


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Run folder.")
def average(runs: tuple[Path, ...], output: Path) -> None:
    """Average the weights of full-parameter RUNS that began from the same base."""
    from train.average import average_runs

    with exit_on_errors():
        average_runs(runs, output)
    _say(f"{output}: the mean of {len(runs)} runs")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN)
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL file of dialogues.",
)
@click.option("--labels", required=True, help="The label set to score.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSONL file.")
@click.option("--bf16/--no-bf16", default=False, help="Compute in bfloat16.")
@click.option("--in-sample", is_flag=True, help="Ask RUNS about their own training dialogues too.")
def teach(
    runs: tuple[Path, ...], data: Path, labels: str, output: Path, bf16: bool, in_sample: bool
) -> None:
    """Write the mean `scores` of RUNS for dialogues that they were not fitted on."""
    if output.exists() and output.samefile(data):
        raise click.UsageError(f"{output} is the data itself: choose another output")
    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent} is no folder: make it first")
    from ercbatch.labels import find_label_set
    from train.teach import teach as write_scores

    with exit_on_errors():
        count = write_scores(
            runs, data, find_label_set(labels), output, _say, bfloat16=bf16, in_sample=in_sample
        )
    _say(f"{output}: {count:,} dialogues")


def _say(text: str) -> None:
    print(f"train: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(prog_name="python -m train")
