"""The command line. Only click and the standard library are imported until a command runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from ercbatch.errors import ErcbatchError, MissingExtraError, OutputError

FINISHED_WITH_REJECTS = 3
CLOSED_PIPE = 141

_PUBLISHERS = ("meld", "emorynlp", "iemocap", "goemotions", "topical-chat")


class Failure(click.ClickException):
    """An error of ours, as click shows it."""

    def __init__(self, error: ErcbatchError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads the instance's


class _Stopped(BaseException):
    """A signal asked the run to stop."""


@contextmanager
def errors() -> Iterator[None]:
    """Errors as one line and an exit code."""
    try:
        yield
    except ErcbatchError as error:
        raise Failure(error) from error
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # A working file, in no output's care.
        full = OutputError(f"{error}: make room, there or by TMPDIR elsewhere, and try again")
        raise Failure(full) from error


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end the work in order; a second one ends it at once."""

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped as stopped:
        number = stopped.args[0]
        click.echo(f"ercbatch: stopped by {signal.Signals(number).name}", err=True)
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ERCBATCH"}
)
@click.version_option(package_name="ercbatch")
def main() -> None:
    """An emotion for every utterance of a conversation: in bulk, offline, on your own machine.

    Every option can be set in the environment too, as ERCBATCH_COMMAND_OPTION.
    """


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
    help="File for bad lines; default: OUTPUT.rejects.jsonl.",
)
@click.option(
    "--max-errors", type=click.IntRange(0), metavar="N", help="Give up after N bad lines."
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Processor threads.")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "onnx", "bnb"]),
    default="auto",
    show_default=True,
    help="Refuse a bundle that another runtime is for; auto takes each.",
)
@click.option("--dry-run", is_flag=True, help="Check input and bundle, and estimate the time.")
@click.option("--quiet", is_flag=True, help="No progress.")
def label(
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
    force: bool,
    threads: int | None,
    runtime: str,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Label JSONL dialogues: files, folders, globs, or - for stdin; .gz and .zst too."""
    if not quiet:
        click.echo(f"ercbatch: loading bundle {bundle}", err=True)
    with errors(), stoppable():
        from ercbatch.labeler import Labeler
        from ercbatch.records import expand_inputs
        from ercbatch.run import RunOptions, dry_run_label, run_label

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
                click.echo(f"ercbatch: {labeler.describe()}", err=True)
            return labeler

        options = RunOptions(
            inputs=tuple(expand_inputs(inputs)),
            output=None if output == Path("-") else output,
            rejects=rejects,
            max_errors=max_errors,
            force=force,
            quiet=quiet,
        )
        if dry_run:
            click.echo(dry_run_label(load, options))
            return
        summary = run_label(load, options)
        counts = summary.counts
        if not quiet:
            speed = summary.utterances / max(summary.seconds, 1e-9)
            click.echo(
                f"ercbatch: {counts.accepted:,} dialogues, {summary.utterances:,} utterances in "
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
    with errors():
        from ercbatch.convert import convert as convert_dataset
        from ercbatch.errors import UsageError
        from ercbatch.records import dump_record

        if output.exists() and not force:
            raise UsageError(f"{output} exists: choose another --output, or give --force")
        dialogues = utterances = unlabelled = 0
        part = output.with_name(output.name + ".part")
        try:
            with part.open("wb") as file:
                for record in convert_dataset(format, source):
                    file.write(dump_record(record))
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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(labelled: Path, label_set: str | None, as_json: bool) -> None:
    """Compare labels with the gold labels in the same file."""
    with errors():
        from ercbatch.evaluate import evaluate as evaluate_records
        from ercbatch.evaluate import print_evaluation
        from ercbatch.labels import find_label_set
        from ercbatch.records import read_dialogues

        records = (dialogue.record for _, dialogue in read_dialogues(labelled))
        labels = find_label_set(label_set) if label_set else None
        found = evaluate_records(records, labels)
        if as_json:
            click.echo(json.dumps(found.to_json()))
        else:
            print_evaluation(found)


@main.group()
def bundle() -> None:
    """Look into bundles."""


@bundle.command("show")
@click.argument("name", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bundle_show(name: str, as_json: bool) -> None:
    """Say what a bundle is. DIR is a folder, or a bundle in the package."""
    with errors():
        from ercbatch.bundle import find_bundle, read_info
        from ercbatch.show import describe

        folder = find_bundle(name)
        info = read_info(folder)
        click.echo(json.dumps(info.to_json(), indent=2) if as_json else describe(folder, info))


@bundle.command("verify")
@click.argument("name", metavar="DIR")
def bundle_verify(name: str) -> None:
    """Check every file of a bundle against its digest, and label a word with it."""
    with errors():
        from ercbatch.bundle import find_bundle, open_bundle
        from ercbatch.labeler import labels_a_word

        opened = open_bundle(find_bundle(name))
        count, size = len(opened.info.files), opened.size() / 1e6
        try:
            labels_a_word(opened)
            tried = "it labels"
        except MissingExtraError as error:
            tried = f"not tried: {error}"
        click.echo(f"{opened.folder}: whole: {count} files, {size:.1f} MB; {tried}")


@main.group()
def bank() -> None:
    """Banks of demonstrations."""


@bank.command("build")
@click.argument("examples", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bundle", "name", default="mini", show_default=True, help="Bundle to start from.")
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
    with errors():
        from ercbatch.bank_bundle import rebuild_with_examples

        count, doubt = rebuild_with_examples(examples, name, output, label_set, demos, force=force)
    click.echo(f"{output}: {count:,} demonstrations", err=True)
    if doubt is not None:
        click.echo(
            f"warning: {doubt}: compare it with the old one by `ercbatch evaluate` first",
            err=True,
        )
