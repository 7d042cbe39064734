"""A training run to a bundle: merge, trace, quantize, calibrate, measure, write."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save_file

from ercbatch import bundle as files
from ercbatch.bank import build_bank, read_examples
from ercbatch.bundle import BundleInfo, encoder_files, write_bundle
from ercbatch.encoder import SentenceEncoder
from ercbatch.errors import UsageError
from ercbatch.evaluate import expected_calibration_error
from ercbatch.labels import LabelSet
from ercbatch.onnx_scorer import OnnxScorer, available_threads, feed
from ercbatch.packs import join
from ercbatch.pipeline import Engine, Retriever
from ercbatch.prompts import template
from ercbatch.scoring import calibrated
from ercbatch.torch_model import PackedModel
from ercbatch.torch_scorer import TorchScorer
from ercbatch.tree import Question, Renderer, Task
from export.attention import sum_softmax_in_double
from export.model import export_scorer
from export.quantize import quantize_graph
from train.datasets import read_dataset
from train.recipe import Source
from train.run import TrainedRun
from train.validate import Predictions, predict

EXPORTED = "eager"
"""The form of attention that the exporter traces."""
_SAMPLED = 64
"""Training dialogues that quantization samples activations from."""
_SHOWN = 3
"""Demonstrations a question shows where their effect is measured: what `bank build` gives it."""
_QUANTIZATION = {
    "int8": "int8 weights within ±63, int8 activations per token; int8 embedding rows",
    "fp32": "none (float32)",
}


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """What the run does not say about its bundle."""

    name: str
    encoder: str
    examples: Path
    demonstrations: int
    quantize: str
    licence: str
    provenance: tuple[str, ...]
    base_name: str | None = None


def export_bundle(
    run: TrainedRun, folder: Path, options: BundleOptions, *, force: bool = False
) -> str:
    """Write the bundle of a run loaded with `EXPORTED`; a summary of what was measured."""
    recipe, model, tokenizer = run.recipe, run.model, run.tokenizer
    encoder_model, encoder_tokenizer = encoder_files(options.encoder)
    taught = [s for s in recipe.train if read_dataset(s, labelled=False).has_targets]
    if not taught:
        raise UsageError("the run has learnt no labels: there is nothing to label with")
    sets = tuple({source.labels: source.label_set() for source in taught}.values())
    wording = template(recipe.template)
    renderers = {s.name: Renderer(tokenizer, wording, recipe.window, s.labels) for s in sets}
    tokens = sorted({token for r in renderers.values() for token in r.trie.tokens})
    head = model.answer_head(tokens)
    held_out = [read_dataset(source) for source in recipe.valid]
    for dataset in held_out:
        if dataset.labels.name not in renderers:
            raise UsageError(
                f"{dataset.source.path}: the run has not learnt the labels of "
                f"{dataset.labels.name}: a bundle is measured on labels that it has"
            )
    graph = export_scorer(model)
    if options.quantize == "int8":
        quantize_graph(graph, samples=_samples(renderers[sets[0].name], taught[0]))
        sum_softmax_in_double(graph)
    lines: list[str] = []

    def fill(part: Path) -> BundleInfo:
        onnx.save(graph, part / files.MODEL)
        save_file(dict(head.tensors()), part / files.HEAD)
        tokenizer.save(part / files.TOKENIZER)
        shutil.copyfile(encoder_model, part / files.ENCODER)
        shutil.copyfile(encoder_tokenizer, part / files.ENCODER_TOKENIZER)
        encoder = SentenceEncoder(part / files.ENCODER, part / files.ENCODER_TOKENIZER)
        examples = read_examples(options.examples, sets[0])
        retriever = Retriever(encoder, build_bank(examples, encoder))
        retriever.bank.save(part)
        scorer = OnnxScorer(part / files.MODEL, head, available_threads())
        original = TorchScorer(model, tokens)
        temperatures: dict[str, float] = {}
        quality: dict[str, Any] = {}
        for dataset in held_out:
            name = dataset.labels.name
            engine = Engine(scorer, renderers[name], 1.0, recipe.pack_tokens)
            found = predict(engine, dataset)
            reference = predict(replace(engine, scorer=original), dataset)
            temperatures[name], figures = _figures(found, reference)
            shown = replace(
                engine, retriever=retriever.restricted(dataset.labels), demonstrations=_SHOWN
            )
            with_them = predict(shown, dataset).figures()["weighted_f1"]
            figures["weighted_f1_with_demonstrations"] = round(with_them, 4)
            quality[f"{name}, validation split"] = figures
            lines.append(f"{name}: {figures}")
        info = BundleInfo(
            name=options.name,
            version=version("ercbatch"),
            label_sets=sets,
            template=wording.name,
            template_version=wording.version,
            controls=tokenizer.controls,
            window=recipe.window,
            later_turns=recipe.later_window if recipe.later_turns else 0,
            pack_tokens=recipe.pack_tokens,
            demonstrations=options.demonstrations,
            temperatures=temperatures,
            form=options.quantize,
            quantization=_QUANTIZATION[options.quantize],
            base=options.base_name or recipe.base,
            data=(*options.provenance, f"demonstrations: {len(examples)} written examples"),
            licence=options.licence,
            quality=quality,
            architecture=_architecture(model),
        )
        (part / files.CARD).write_text(_card(info, sets), encoding="utf-8")
        return info

    if not held_out:
        lines.append("warning: no [[valid]] data in the recipe: confidences are not calibrated")
    write_bundle(folder, fill, force=force)
    return "\n".join(lines)


def _architecture(model: PackedModel) -> dict[str, Any]:
    """The model's configuration, without what is of this machine or of how it was loaded."""
    config: dict[str, Any] = model.model.config.to_diff_dict()
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {k: v for k, v in config.items() if k not in (*left_out, "quantization_config")}


def _samples(renderer: Renderer, source: Source) -> list[Mapping[str, Any]]:
    """Inputs of the graph from a few training dialogues: they show its activations' outliers."""
    dialogues = [scene.dialogue for scene in read_dataset(source).scenes[:_SAMPLED]]
    return [
        feed(join([(0, tree)]))
        for dialogue in dialogues
        for tree in renderer.trees(
            dialogue, [Question(Task.EMOTION, t) for t in range(len(dialogue.utterances))]
        )
    ]


def _figures(found: Predictions, reference: Predictions) -> tuple[float, dict[str, float]]:
    """(temperature, figures). The temperature is fitted on every other dialogue; the calibration
    error is measured on the rest."""
    fitting = found.dialogue % 2 == 0
    logs = np.log(found.probabilities.clip(1e-12))
    temperature = fit_temperature(logs[fitting], found.gold[fitting])
    errors = []
    for t in (1.0, temperature):
        probabilities = calibrated(logs[~fitting], t)
        right = probabilities.argmax(1) == found.gold[~fitting]
        errors.append(expected_calibration_error(probabilities.max(1), right))
    same = found.probabilities.argmax(1) == reference.probabilities.argmax(1)
    figures = found.figures()
    figures["weighted_f1_float32"] = reference.figures()["weighted_f1"]
    figures["agreement_with_float32"] = float(same.mean())
    figures["calibration_error_before"], figures["calibration_error_after"] = errors
    return temperature, {name: round(value, 4) for name, value in figures.items()}


def fit_temperature(logs: np.ndarray, gold: np.ndarray) -> float:
    """The temperature, 0.25 to 4, that makes gold labels [n] likeliest under logs [n, labels].

    1 where there are none.
    """
    if not len(gold):
        return 1.0
    grid = np.exp(np.linspace(np.log(0.25), np.log(4.0), 241))
    losses = [
        -np.log(calibrated(logs, float(t))[np.arange(len(gold)), gold].clip(1e-12)).mean()
        for t in grid
    ]
    return round(float(grid[int(np.argmin(losses))]), 4)


def _card(info: BundleInfo, sets: tuple[LabelSet, ...]) -> str:
    rows = [f"# {info.name}", "", "A bundle for `ercbatch label`: an emotion for every utterance."]
    rows += ["", f"- Base: {info.base}", f"- Quantization: {info.quantization}"]
    rows += [f"- Data: {source}" for source in info.data]
    rows += [f"- Licence: {info.licence}", "", "## Label sets", ""]
    rows += [f"- `{s.name}`: {', '.join(s.labels)}" for s in sets]
    rows += ["", "## Measured with this bundle", ""]
    for name, figures in info.quality.items():
        rows += [f"### {name}", "", "| figure | value |", "|---|---|"]
        rows += [f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items()]
        rows.append("")
    return "\n".join(rows) + "\n"
