"""`python -m export`: a training run to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from ercbatch.bundle.manifest import RUNTIME_OF_FORM
from ercbatch.terminal.stopping import exit_on_errors, stoppable
from export.quantize.targets import SAFE_TARGET, WEIGHT_RANGE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Merge, quantize, measure, and write bundles; and read their weights back."""


@main.command("encoder")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option(
    "--quantize",
    type=click.Choice(["int8", "fp32"]),
    default="int8",
    show_default=True,
    help="Weights: int8, or float32, which takes four times as much room.",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def encoder_(source: Path, output: Path, quantize: str, force: bool) -> None:
    """Export a sentence-transformers model, or a plain encoder."""
    from export.encoder import export_encoder

    with exit_on_errors(), stoppable():
        export_encoder(source, output, quantize=quantize == "int8", force=force)


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
@click.option("--template", help="With --zero-shot: the prompts' wording.  [default: paper]")
@click.option("--name", required=True, help="The bundle's name.")
@click.option(
    "--quantize",
    "form",
    type=click.Choice(list(RUNTIME_OF_FORM)),
    default="int8",
    show_default=True,
    help="fp32, int8 and int4 are ONNX graphs; nf4 and bnb-int8 need torch and bitsandbytes where "
    "they label; optimum is the ONNX that other tools read.",
)
@click.option(
    "--target",
    type=click.Choice(list(WEIGHT_RANGE)),
    default=SAFE_TARGET,
    show_default=True,
    help="With int8: avx2 runs everywhere; avx512_vnni and arm64 round weights more finely, and "
    "refuse a processor that cannot add them exactly.",
)
@click.option(
    "--full-precision-base",
    is_flag=True,
    help="Merge what was trained on an NF4 or int8 base into the base itself, unrounded.",
)
@click.option(
    "--encoder",
    help="What finds demonstrations: a folder that `python -m export encoder` wrote, or a bundle.",
)
@click.option(
    "--examples",
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
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 100),
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Weighted F1 that the bundle may lose on validation data.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 100),
    default=97.0,
    show_default=True,
    metavar="PERCENT",
    help="Labels that must be those of the model as it was trained.",
)
@click.option(
    "--accept-loss", is_flag=True, help="Write it even if it loses more, and say so in it."
)
@click.option(
    "--also-checkpoint",
    type=click.Path(path_type=Path),
    help="Folder for the merged model as a Hugging Face checkpoint too.",
)
@click.option(
    "--licence",
    required=True,
    help="Licence of the weights: an SPDX identifier such as Apache-2.0, or in words.",
)
@click.option(
    "--provenance", multiple=True, help="What it was trained on, with licence; repeatable."
)
@click.option(
    "--base-name", help="The base's hub id, or what to call it; default: as the recipe names it."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def bundle(  # click passes a parameter for each option
    source: str,
    output: Path,
    data: Path | None,
    labels: str | None,
    template: str | None,
    name: str,
    form: str,
    target: str,
    full_precision_base: bool,
    encoder: str | None,
    examples: Path | None,
    demos: int,
    max_loss: float,
    min_agreement: float,
    accept_loss: bool,
    also_checkpoint: Path | None,
    licence: str,
    provenance: tuple[str, ...],
    base_name: str | None,
    force: bool,
) -> None:
    """Write the bundle of SOURCE, a run folder.

    A run folder is what `python -m train fit` writes; its [[valid]] data is what is measured on.
    With --zero-shot, SOURCE is any causal language model: a checkpoint folder or a hub id.
    """
    from export.bundle import BundleOptions, export_bundle, run_loader, summary
    from export.proof.losses import LossLimits

    if (encoder is None) != (examples is None):
        raise click.UsageError("--encoder and --examples go together: give both, or neither")
    if demos and encoder is None:
        raise click.UsageError("--demos needs --encoder and --examples")
    if data is not None and labels is None:
        raise click.UsageError("--zero-shot needs --labels: name the label set of the dialogues")
    if data is None and (labels is not None or template is not None):
        raise click.UsageError("--labels and --template go with --zero-shot: a run has its own")
    if data is not None and full_precision_base:
        raise click.UsageError("--full-precision-base is for runs: a base is as it is")
    if not name.strip() or not licence.strip():
        raise click.UsageError("--name and --licence must say something")
    if target != SAFE_TARGET and form != "int8":
        raise click.UsageError(f"--target is for int8: {form} is the same on every processor")
    options = BundleOptions(
        name=name,
        form=form,
        target=target,
        licence=licence,
        encoder=encoder,
        examples=examples,
        demonstrations=demos,
        provenance=provenance,
        base_name=base_name,
        also_checkpoint=also_checkpoint,
        limits=LossLimits(max_loss / 100, min_agreement / 100),
        accept_loss=accept_loss,
    )
    with exit_on_errors(), stoppable():
        load = run_loader(
            source, data, labels, template or "paper", full_precision_base=full_precision_base
        )
        info = export_bundle(load, output, options, force=force, say=_say)
    click.echo(summary(info, output))


@main.command()
@click.argument("bundle_name", metavar="BUNDLE")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option(
    "--valid",
    multiple=True,
    required=True,
    metavar="SET=FILE",
    help="A label set of the bundle and dialogues labelled with it (meld=dev.jsonl); repeatable.",
)
@click.option(
    "--measure",
    multiple=True,
    metavar="SET=FILE",
    help="Dialogues to measure on, without calibrating on them; repeatable.",
)
@click.option(
    "--label-shift",
    is_flag=True,
    help="Fit how common each label is in your dialogues too. This changes labels.",
)
@click.option("--name", help="The new bundle's name; default: as it is.")
@click.option("--turns", type=click.IntRange(0), help="Earlier turns in view; default: as it is.")
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="The window moves by so many turns; default: as it is. More is cheaper in long dialogues.",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def calibrate(  # click passes a parameter for each option
    bundle_name: str,
    output: Path,
    valid: tuple[str, ...],
    measure: tuple[str, ...],
    label_shift: bool,
    name: str | None,
    turns: int | None,
    stride: int | None,
    force: bool,
) -> None:
    """Write BUNDLE calibrated anew, on labelled dialogues of your own."""
    from ercbatch.bundle.bundle import find_bundle, open_bundle
    from export.bundle import summary
    from export.recalibrate import CalibrateOptions, recalibrate

    options = CalibrateOptions(
        fitted=tuple(_parse_labelled_file("--valid", text) for text in valid),
        only_measured=tuple(_parse_labelled_file("--measure", text) for text in measure),
        label_shift=label_shift,
        name=name,
        turns=turns,
        stride=stride,
    )
    with exit_on_errors(), stoppable():
        source = open_bundle(find_bundle(bundle_name))
        info = recalibrate(source, output, options, force=force)
    click.echo(summary(info, output, {labels for labels, _ in options.measured}))
    for labels in dict.fromkeys(labels for labels, _ in options.fitted):
        if label_shift and labels not in info.label_offsets:
            click.echo(
                f"warning: {labels}: no label shift was kept, because it did not fit dialogues "
                "that were held back: give more labelled dialogues",
                err=True,
            )


@main.command()
@click.argument("bundle_name", metavar="BUNDLE")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def checkpoint(bundle_name: str, output: Path, force: bool) -> None:
    """Write the model of BUNDLE (fp32 or int8) as a checkpoint to train on.

    It has Hugging Face's form. Of other forms, see `bundle --also-checkpoint`.
    """
    from ercbatch.bundle.bundle import find_bundle, open_bundle
    from export.checkpoint import write_checkpoint

    with exit_on_errors(), stoppable():
        write_checkpoint(open_bundle(find_bundle(bundle_name)), output, force=force)
    click.echo(f"{output}: a causal language model with the weights of {bundle_name}", err=True)


def _parse_labelled_file(option: str, text: str) -> tuple[str, Path]:
    """The label set and the file of an option's SET=FILE."""
    labels, equals, path = text.partition("=")
    if not equals:
        raise click.UsageError(f"{option} {text}: give it as SET=FILE, such as meld=dev.jsonl")
    if not Path(path).is_file():
        raise click.UsageError(f"{option} {text}: there is no file {path}")
    return labels, Path(path)


def _say(text: str) -> None:
    click.echo(f"export: {text}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m export")
