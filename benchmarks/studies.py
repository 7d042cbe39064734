"""The paper's tables, on any base: one recipe varied, each variant trained with several seeds.

    python -m benchmarks.studies ablation RECIPE -o FOLDER

Every variant is a run folder under FOLDER; what is finished there is not trained again, and what
was interrupted goes on. Figures are those of the recipe's [[test]] data; without any they are of
the validation data, which also chose the epochs, and so a little too good.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ercbatch.digests import file_sha256
from ercbatch.errors import UsageError
from ercbatch.terminal.stopping import exit_on_errors
from train.fit import FitOptions, fit_recipe
from train.recipe import Recipe, read_recipe
from train.run import DESCRIPTION
from train.sources import Source, source_names

Variants = Mapping[str, Recipe]

_TRAIN_SAMPLE = 100
"""Training dialogues that show how much better a model knows its own data."""


def ablation(recipe: Recipe) -> Variants:
    """Variants without one auxiliary task or all, with other demonstrations, with the plain prompt.

    Demonstrations are shown or not, of the gold label or of any.
    """
    count = recipe.demonstrations_shown
    if recipe.demonstrations and not count:
        raise UsageError("the recipe learns with demonstrations: say how many demonstrations_shown")
    recipe = _demonstrated(recipe, count)
    other_rule = replace(recipe, same_label=not recipe.same_label)
    auxiliary = [task for task in recipe.tasks if task != "emotion"]

    def without(*left_out: str) -> Recipe:
        return replace(recipe, tasks=tuple(t for t in recipe.tasks if t not in left_out))

    return {
        "InstructERC": recipe,
        **{f"without {task}": without(task) for task in auxiliary},
        **({"without both": without(*auxiliary)} if len(auxiliary) > 1 else {}),
        f"with{'out' if count else ''} demonstrations": _demonstrated(recipe, 0 if count else 1),
        f"demonstrations of {'any' if recipe.same_label else 'the same'} label": _demonstrated(
            other_rule, count or 1
        ),
        "plain prompt": replace(_demonstrated(recipe, 0), template="plain", tasks=("emotion",)),
    }


def window(recipe: Recipe) -> Variants:
    """How many earlier turns are in view: exactly so many, so turns share no prompts (slow)."""
    return {
        f"{turns} turns": replace(recipe, window=replace(recipe.window, turns=turns, stride=1))
        for turns in (1, 5, 12, 20)
    }


def lora_vs_full(recipe: Recipe) -> Variants:
    """Adapters at the recipe's learning rate, all parameters at a tenth of it, as in the paper."""
    if recipe.method != "lora":
        raise UsageError("this study needs a LoRA recipe: its learning rate is what both go by")
    recipe = replace(recipe, train_sample=_TRAIN_SAMPLE)
    assert recipe.learning_rate is not None  # the recipe has filled it in
    tenth = recipe.learning_rate / 10
    full = replace(recipe, method="full", load="full", learning_rate=tenth)
    return {"LoRA": recipe, "full": full}


def scaling(recipe: Recipe) -> Variants:
    """1 to 1/64 of the data: of each dataset alone, and of all by either way of mixing."""
    variants = {}
    names = source_names(recipe.train)
    for parts in (1, 2, 4, 8, 16, 32, 64):
        part = replace(recipe, fraction=recipe.fraction / parts)
        for name, source in zip(names, recipe.train, strict=True):
            variants[f"1/{parts} of {name}"] = replace(
                part,
                train=(source,),
                valid=_matching_sources(source, recipe.valid),
                test=_matching_sources(source, recipe.test),
            )
        if len(recipe.train) > 1:
            for mix in ("total", "ratio"):
                variants[f"1/{parts}, {mix} mix"] = replace(part, mix=mix)
    return variants


def _matching_sources(source: Source, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources whose labels are written and learnt as this one's.

    Raises:
        UsageError: there are sources, but none such.
    """
    matching = tuple(s for s in sources if (s.labels, s.written) == (source.labels, source.written))
    if sources and not matching:
        raise UsageError(f"{source.path}: no [[valid]] or [[test]] data under its label set")
    return matching


def transfer(recipe: Recipe) -> Variants:
    """Train on one dataset, measure on each, all under the unified labels."""

    def unified(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(
            s
            if s.labels == "unified"
            else replace(s, labels="unified", written=s.written or s.labels, mapping="")
            for s in sources
        )

    recipe = replace(recipe, valid=unified(recipe.valid), test=unified(recipe.test))
    return {
        f"from {name}": replace(recipe, train=(source,))
        for name, source in zip(source_names(recipe.train), unified(recipe.train), strict=True)
    }


def demos(recipe: Recipe) -> Variants:
    """How many demonstrations a question shows; in training, up to so many."""
    return {f"{count} demonstrations": _demonstrated(recipe, count) for count in (0, 1, 3, 5)}


def _demonstrated(recipe: Recipe, count: int) -> Recipe:
    if not recipe.encoder:
        raise UsageError("this study shows demonstrations: name an `encoder` in the recipe")
    return replace(
        recipe,
        demonstrations=1.0 if count else 0.0,
        demonstrations_most=max(1, count),
        demonstrations_shown=count,
    )


STUDIES: Mapping[str, Callable[[Recipe], Variants]] = {
    "ablation": ablation,
    "window": window,
    "lora-vs-full": lora_vs_full,
    "scaling": scaling,
    "transfer": transfer,
    "demos": demos,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one variant. `metrics`: dataset -> metric -> one value for each seed."""

    metrics: Mapping[str, Mapping[str, list[float]]]
    gaps: Mapping[int, list[float]]
    """Epoch -> for each seed: weighted F1 on training data less that on validation data."""


def run_variant(recipe: Recipe, folder: Path, seeds: int, bfloat16: bool | None) -> Outcome:
    """Train what is not trained yet, and collect its metrics."""
    metrics: dict[str, dict[str, list[float]]] = {}
    gaps: dict[int, list[float]] = {}
    for seed in range(recipe.seed, recipe.seed + seeds):
        run = folder / str(seed)
        described = _trained(replace(recipe, seed=seed), run, bfloat16)
        best = described["epochs"][described["kept"] - 1]
        for name, dataset_metrics in (described.get("test") or best["valid"]).items():
            for metric in ("weighted_f1", "macro_f1"):
                metrics.setdefault(name, {}).setdefault(metric, []).append(dataset_metrics[metric])
        for epoch in described["epochs"]:
            if "emotion" in epoch["losses"] and epoch["train"]:
                both = (epoch["train"], epoch["valid"])
                means = [
                    statistics.mean(f["weighted_f1"] for f in d.values() if "weighted_f1" in f)
                    for d in both
                ]
                gaps.setdefault(epoch["epoch"], []).append(means[0] - means[1])
    return Outcome(metrics, gaps)


def _trained(recipe: Recipe, run: Path, bfloat16: bool | None) -> Mapping[str, Any]:
    path = run / DESCRIPTION
    if not path.exists():
        print(f"studies: {run}", file=sys.stderr, flush=True)
        fit_recipe(recipe, run, FitOptions(bfloat16, resume=True), _say)
    described: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if described.get("diverged"):
        raise UsageError(f"{run} diverged: lower learning_rate, and choose another folder")
    if described["recipe"] != json.loads(json.dumps(recipe.to_json())):
        raise UsageError(f"{run} was trained by another recipe: choose another folder")
    for path, before in {**described["data"], **described.get("files", {})}.items():
        if not Path(path).exists() or file_sha256(path) != before:
            raise UsageError(f"{path} is not what {run} was trained on: choose another folder")
    return described


def _say(text: str) -> None:
    print(f"train: {text}", file=sys.stderr, flush=True)


@click.command()
@click.argument("name", type=click.Choice(list(STUDIES)))
@click.argument("recipe_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--base", help="Another base than the recipe's.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(1), help="Another number of epochs.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), help="Share of the data.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="As `train fit` has it."
)
@click.option(
    "--variant", "selected", multiple=True, metavar="NAME", help="Only this variant; repeatable."
)
@click.option("--bf16/--no-bf16", default=None)
def main(  # click passes a parameter for each option
    name: str,
    recipe_file: Path,
    output: Path,
    base: str | None,
    seeds: int,
    epochs: int | None,
    fraction: float | None,
    settings: tuple[str, ...],
    selected: tuple[str, ...],
    bf16: bool | None,
) -> None:
    """Run the study NAME on the recipe in RECIPE_FILE."""
    with exit_on_errors():
        recipe = read_recipe(recipe_file, settings, base=base, epochs=epochs, fraction=fraction)
        if not recipe.valid:
            raise UsageError("a study chooses epochs by [[valid]] data: name some in the recipe")
        if "emotion" not in recipe.tasks:
            raise UsageError("a study compares emotions: have them among the recipe's tasks")
        variants = STUDIES[name](recipe)
        for variant in selected:
            if variant not in variants:
                names = ", ".join(map(repr, variants))
                raise UsageError(f"{name} has no variant {variant!r}: choose from {names}")
        variants = {
            v: variant_recipe
            for v, variant_recipe in variants.items()
            if not selected or v in selected
        }
        outcomes = {
            variant: run_variant(
                variant_recipe, output / name / variant.replace("/", "-"), seeds, bf16
            )
            for variant, variant_recipe in variants.items()
        }
    _print(name, recipe, outcomes)
    click.echo(json.dumps({"study": name, "seeds": seeds, "variants": _plain(outcomes)}))


def _print(name: str, recipe: Recipe, outcomes: Mapping[str, Outcome]) -> None:
    where = "test" if recipe.test else "validation"
    datasets = list(dict.fromkeys(d for o in outcomes.values() for d in o.metrics))
    table = Table("variant", title=f"{name}: weighted / macro F1 in % on {where} data")
    for dataset in datasets:
        table.add_column(dataset)
    for variant, outcome in outcomes.items():
        cells = []
        for dataset in datasets:
            dataset_metrics = outcome.metrics.get(dataset)
            metrics = (
                ()
                if dataset_metrics is None
                else (dataset_metrics["weighted_f1"], dataset_metrics["macro_f1"])
            )
            cells.append(" / ".join(_format_spread(values) for values in metrics))
        table.add_row(variant, *cells)
    console = Console()
    console.print(table)
    gapped = {variant: o.gaps for variant, o in outcomes.items() if o.gaps}
    if gapped:
        table = Table("variant", title="weighted F1 on training data less on validation data")
        epochs = sorted({epoch for gaps in gapped.values() for epoch in gaps})
        for epoch in epochs:
            table.add_column(f"epoch {epoch}")
        for variant, gaps in gapped.items():
            table.add_row(variant, *(_format_spread(gaps[e]) if e in gaps else "" for e in epochs))
        console.print(table)


def _format_spread(values: list[float]) -> str:
    """Mean and standard deviation, in per cent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _plain(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        variant: {"figures": outcome.metrics, "gaps": outcome.gaps}
        for variant, outcome in outcomes.items()
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.studies")
