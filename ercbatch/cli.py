"""The command line. Only click and the standard library are imported until a command runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from ercbatch.errors import (
    FINISHED_WITH_REJECTS,
    MissingExtraError,
    UsageError,
)
from ercbatch.terminal.stopping import exit_on_errors, stoppable
from ercbatch.terminal.streams import printable, steady_streams

_PATIENCE = 2.0
"""Seconds that a line on stdout has, once a signal came, to be taken by its reader."""
_MAX_COUNT = 1 << 62
"""Upper end of the options that count; every library takes it."""
_PUBLISHERS = ("meld", "emorynlp", "iemocap", "goemotions", "topical-chat", "xed")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ERCBATCH"}
)
@click.version_option(package_name="ercbatch")
def main() -> None:
    """An emotion for every utterance of a conversation: in bulk, offline, on your own machine.

    Every option can be set in the environment too, as ERCBATCH_COMMAND_OPTION.
    """
    steady_streams()


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; default: stdout, as a transcript where that is a terminal.",
)
@click.option("--bundle", default="mini", show_default=True, help="Bundle name or folder.")
@click.option("--label-set", help="Which of the bundle's label sets; default: its first.")
@click.option(
    "--demos",
    type=click.IntRange(0, 8),
    metavar="K",
    help="Labelled examples that each question shows; default: the bundle's own number.",
)
@click.option(
    "--context",
    type=click.Choice(["past", "both"]),
    default="past",
    show_default=True,
    help="Whether a question may see later turns too.",
)
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="P",
    help="Below it the emotion is null.",
)
@click.option("--scores", is_flag=True, help="Write the probability of every label.")
@click.option(
    "--rejects",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for bad lines; default: OUTPUT.rejects.jsonl, or stderr where there is no OUTPUT.",
)
@click.option(
    "--max-errors", type=click.IntRange(0), metavar="N", help="Give up at more than N bad lines."
)
@click.option(
    "--max-line-bytes",
    type=click.IntRange(1, _MAX_COUNT),
    default=16 << 20,
    show_default=True,
    metavar="N",
    help="A longer line is a bad one.",
)
@click.option(
    "--max-turns",
    type=click.IntRange(1, _MAX_COUNT),
    default=100_000,
    show_default=True,
    metavar="N",
    help="A dialogue of more turns is a bad line.",
)
@click.option(
    "--max-characters",
    type=click.IntRange(1, _MAX_COUNT),
    default=1_000_000,
    show_default=True,
    metavar="N",
    help="An utterance of more characters makes its dialogue a bad line.",
)
@click.option(
    "--max-file-bytes",
    type=click.IntRange(1, _MAX_COUNT),
    default=1 << 40,
    show_default=True,
    metavar="N",
    help="Read no further in a compressed file that holds more.",
)
@click.option(
    "--commit-every",
    type=click.FloatRange(0.01, 5),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Bring what is labelled to the disk so often.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped, if there is one.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Processor threads; some runs go on with as many only.",
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "onnx", "bnb"]),
    default="auto",
    show_default=True,
    help="Refuse a bundle that another runtime is for; auto takes each.",
)
@click.option("--dry-run", is_flag=True, help="Check input and bundle, and estimate the time.")
@click.option("--quiet", is_flag=True, help="No progress.")
def label(  # click passes a parameter for each option
    inputs: tuple[str, ...],
    output: Path | None,
    bundle: str,
    label_set: str | None,
    demos: int | None,
    context: str,
    min_confidence: float,
    scores: bool,
    rejects: Path | None,
    max_errors: int | None,
    max_line_bytes: int,
    max_turns: int,
    max_characters: int,
    max_file_bytes: int,
    commit_every: float,
    resume: bool,
    force: bool,
    threads: int | None,
    runtime: str,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Label JSONL dialogues: files, folders, globs, or - for stdin; .gz and .zst too."""
    if not quiet:
        click.echo(f"ercbatch: loading bundle {printable(bundle)}", err=True)
    with exit_on_errors(), stoppable() as stop:
        from ercbatch.inputs.files import expand_inputs
        from ercbatch.inputs.records import InputLimits
        from ercbatch.labeler import Labeler
        from ercbatch.runs.dry_run import dry_run_label
        from ercbatch.runs.output import Files
        from ercbatch.runs.preflight import RunOptions
        from ercbatch.runs.resume_advice import advise_resuming
        from ercbatch.runs.run import run_label

        def load() -> Labeler:
            labeler = Labeler(
                bundle,
                label_set=label_set,
                demonstrations=demos,
                context=context,
                min_confidence=min_confidence,
                scores=scores,
                threads=threads,
                runtime=runtime,
            )
            if not quiet:
                click.echo(f"ercbatch: {printable(labeler.describe())}", err=True)
            return labeler

        source = click.get_current_context().get_parameter_source
        command_line = ParameterSource.COMMANDLINE  # and not by the environment, for all commands
        if resume and force and command_line in (source("resume"), source("force")):
            resume, force = source("resume") == command_line, source("force") == command_line
        if not math.isfinite(commit_every):
            raise UsageError("--commit-every is no number of seconds")
        if output == Path("-"):
            output = None
        if output is not None and not output.name:
            raise UsageError("--output is empty: is a variable of yours not set?")
        outputs = Files.of(output, rejects).earlier_outputs() if output else ()
        stop.patience = _PATIENCE if output is None else None
        options = RunOptions(
            inputs=tuple(expand_inputs(inputs, outputs)),
            output=output,
            rejects=rejects,
            max_errors=max_errors,
            limits=InputLimits(max_line_bytes, max_turns, max_characters, max_file_bytes),
            commit_seconds=commit_every,
            resume=resume,
            force=force,
            quiet=quiet,
        )
        if dry_run:
            click.echo(dry_run_label(load, options))
            return
        with advise_resuming(options.output, options.inputs):
            summary = run_label(load, options, stop)
        counts = summary.counts
        if not quiet:
            speed = counts.utterances / max(summary.seconds, 1e-9)
            click.echo(
                f"ercbatch: {counts.labelled:,} dialogues, {counts.utterances:,} utterances in "
                f"{summary.seconds:.1f} s ({speed:,.0f}/s); {counts.rejected:,} lines rejected, "
                f"{counts.blank:,} blank",
                err=True,
            )
        if counts.rejected:
            sys.exit(FINISHED_WITH_REJECTS)


@main.command()
@click.argument("format", type=click.Choice(_PUBLISHERS))
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Dialogue JSONL to write.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
def convert(format: str, source: Path, output: Path, force: bool) -> None:
    """Turn a dataset publisher's files into dialogue JSONL with gold labels."""
    with exit_on_errors():
        from ercbatch.inputs.convert import convert as convert_dataset
        from ercbatch.inputs.records import dump_line

        part = output.with_name(output.name + ".part")
        for path in (part, output):
            if path.exists() and not force:
                raise UsageError(f"{path} exists: choose another --output, or give --force")
            if path.exists() and path.samefile(source):
                raise UsageError(f"{path} is read: choose another --output")
        dialogues = utterances = unlabelled = 0
        try:
            with part.open("wb") as file:
                for record in convert_dataset(format, source):
                    file.write(dump_line(record))
                    dialogues += 1
                    utterances += len(record["utterances"])
                    unlabelled += sum("label" not in turn for turn in record["utterances"])
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)
    click.echo(
        f"{output}: {dialogues:,} dialogues, {utterances:,} utterances, "
        f"{unlabelled:,} of them without a single label",
        err=True,
    )


@main.command()
@click.argument("labelled", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--label-set",
    help="A built-in label set, or a JSON file of your own; default: the smallest that fits.",
)
@click.option(
    "--json", "as_json", is_flag=True, envvar="ERCBATCH_EVALUATE_JSON", help="Print JSON."
)
def evaluate(labelled: Path, label_set: str | None, as_json: bool) -> None:
    """Compare labels with the gold labels in the same file."""
    with exit_on_errors():
        from ercbatch.evaluate import evaluate as evaluate_records
        from ercbatch.evaluate import print_evaluation
        from ercbatch.inputs.records import read_dialogues
        from ercbatch.labels import find_label_set

        records = (dialogue.record for _, dialogue in read_dialogues(labelled))
        labels = find_label_set(label_set) if label_set else None
        results = evaluate_records(records, labels)
        if as_json:
            click.echo(json.dumps(results.to_json()))
        else:
            print_evaluation(results)


@main.group()
def bundle() -> None:
    """Look into bundles."""


@bundle.command("show")
@click.argument("name", metavar="DIR")
@click.option(
    "--json", "as_json", is_flag=True, envvar="ERCBATCH_BUNDLE_SHOW_JSON", help="Print JSON."
)
def bundle_show(name: str, as_json: bool) -> None:
    """Say what a bundle is. DIR is a folder, or a bundle in the package."""
    with exit_on_errors():
        from ercbatch.bundle.bundle import find_bundle, read_info
        from ercbatch.terminal.show import describe

        folder = find_bundle(name)
        info = read_info(folder)
        click.echo(json.dumps(info.to_json(), indent=2) if as_json else describe(folder, info))


@bundle.command("verify")
@click.argument("name", metavar="DIR")
def bundle_verify(name: str) -> None:
    """Check every file of a bundle against its digest, and label a word with it."""
    with exit_on_errors():
        from ercbatch.bundle.bundle import find_bundle, open_bundle
        from ercbatch.labeler import smoke_test

        opened = open_bundle(find_bundle(name))
        count, size = len(opened.info.files), opened.size() / 1e6
        try:
            smoke_test(opened)
            outcome = "it labels"
        except MissingExtraError as error:
            outcome = f"not tried: {error}"
        click.echo(f"{opened.folder}: whole: {count} files, {size:.1f} MB; {outcome}")


@main.group()
def bank() -> None:
    """Banks of demonstrations."""


@bank.command("build")
@click.argument("examples", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--bundle",
    "name",
    default="mini",
    show_default=True,
    envvar="ERCBATCH_BANK_BUILD_BUNDLE",
    help="Bundle to start from.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle folder to write."
)
@click.option("--label-set", help="Whose labels the examples have; default: the bundle's first.")
@click.option(
    "--demos",
    type=click.IntRange(1, 8),
    default=3,
    show_default=True,
    metavar="K",
    help="Labelled examples that each question shows with the new bundle.",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def bank_build(
    examples: Path, name: str, output: Path, label_set: str | None, demos: int, force: bool
) -> None:
    """Write a bundle that demonstrates with your own labelled examples. Nothing is trained."""
    with exit_on_errors():
        from ercbatch.retrieval.rebuild import rebuild_with_examples

        count, warning = rebuild_with_examples(
            examples, name, output, label_set, demos, force=force
        )
    click.echo(f"{output}: {count:,} demonstrations", err=True)
    if warning is not None:
        click.echo(
            f"warning: {warning}: compare it with the old one by `ercbatch evaluate` first",
            err=True,
        )
