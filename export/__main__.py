"""`python -m export`: a training run to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from ercbatch.cli import Failure
from ercbatch.errors import ErcbatchError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Merge, quantize, measure, and write bundles; and read their weights back."""


@main.command("encoder")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def encoder_(source: Path, output: Path) -> None:
    """Export a sentence-transformers model with mean pooling, quantized."""
    from export.encoder import export_encoder

    try:
        output.mkdir(parents=True, exist_ok=True)
        export_encoder(source, output)
    except ErcbatchError as error:
        raise Failure(error) from error


@main.command()
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle folder."
)
@click.option(
    "--zero-shot",
    "data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="SOURCE is a base, not a run: bundle it untrained, measured on these labelled dialogues.",
)
@click.option("--labels", help="With --zero-shot: the label set.")
@click.option(
    "--template", default="paper", show_default=True, help="With --zero-shot: the prompts' wording."
)
@click.option("--name", required=True, help="The bundle's name.")
@click.option(
    "--encoder",
    required=True,
    help="What finds demonstrations: a folder that `python -m export encoder` wrote, or a bundle.",
)
@click.option(
    "--examples",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Demonstrations: JSONL with text and label.",
)
@click.option(
    "--demos",
    type=click.IntRange(0, 8),
    default=0,
    show_default=True,
    metavar="K",
    help="Demonstrations a question shows by default.",
)
@click.option("--quantize", type=click.Choice(["int8", "fp32"]), default="int8", show_default=True)
@click.option("--licence", required=True, help="Licence of the weights.")
@click.option(
    "--provenance", multiple=True, help="What it was trained on, with licence; repeatable."
)
@click.option("--base-name", help="What to call the base; default: the recipe's.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def bundle(
    source: str,
    output: Path,
    data: Path | None,
    labels: str | None,
    template: str,
    name: str,
    encoder: str,
    examples: Path,
    demos: int,
    quantize: str,
    licence: str,
    provenance: tuple[str, ...],
    base_name: str | None,
    force: bool,
) -> None:
    """Write the bundle of SOURCE, a run folder that `python -m train fit` wrote.

    With --zero-shot, SOURCE is any causal language model: a checkpoint folder or a hub id.
    """
    from export.bundle import EXPORTED, BundleOptions, export_bundle
    from train.recipe import Source
    from train.run import load_run, untrained_run

    options = BundleOptions(
        name, encoder, examples, demos, quantize, licence, provenance, base_name
    )
    try:
        if data is None:
            run = load_run(Path(source), attention=EXPORTED)
        elif labels is None:
            raise UsageError("--zero-shot needs --labels: name the label set of the dialogues")
        else:
            given = Source(str(data), labels)
            run = untrained_run(source, given, template, attention=EXPORTED)
        click.echo(export_bundle(run, output, options, force=force))
    except ErcbatchError as error:
        raise Failure(error) from error


@main.command()
@click.argument("bundle_name", metavar="BUNDLE")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--force", is_flag=True, help="Write into a folder that exists.")
def checkpoint(bundle_name: str, output: Path, force: bool) -> None:
    """Write the model of BUNDLE as a Hugging Face checkpoint, a base to train on."""
    from ercbatch.bundle import find_bundle, open_bundle
    from export.checkpoint import write_checkpoint

    try:
        if output.exists() and not force:
            raise UsageError(f"{output} exists: choose another folder, or give --force")
        write_checkpoint(open_bundle(find_bundle(bundle_name)), output)
    except ErcbatchError as error:
        raise Failure(error) from error
    click.echo(f"{output}: a causal language model with the weights of {bundle_name}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m export")
