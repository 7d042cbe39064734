"""A merged model in each of the forms that a bundle may have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from transformers import AutoTokenizer

from ercbatch.bundle import manifest
from ercbatch.bundle.manifest import RUNTIME_OF_FORM
from ercbatch.errors import MissingExtraError
from ercbatch.prompts.packs import Pack
from ercbatch.scoring.checkpoints import save_tokenizer
from ercbatch.scoring.packed_model import PackedModel, collate
from export.graph.attention import sum_softmax_in_double
from export.graph.fusions import fuse_rotations
from export.graph.nodes import data_file
from export.model import trace_scorer
from export.optimum_form import export_optimum, import_optimum
from export.quantize.int4 import quantize_products_to_4_bits
from export.quantize.int8 import probe, quantize_lookups, quantize_products
from export.quantize.statistics import module_inputs
from export.quantize.targets import SAFE_TARGET, WEIGHT_RANGE
from train.run import LoadedRun

_MAX_SAMPLED_PARAMETERS = 2_000_000_000
"""Parameters from which weights are rounded each for itself: a large model loses little by it, and
to sample its activations takes a pass through all of it for every few layers."""
_SAMPLE_DIALOGUES = 64
"""Training dialogues that show a smaller one's activations."""
_PARAMETER_BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.625}


def describe_form(form: str, target: str) -> str:
    """A form for people."""
    return {
        "fp32": "none (float32)",
        "int8": (
            f"int8 weights within ±{WEIGHT_RANGE[target]} (for {target}), int8 activations per "
            "token; int8 embedding rows"
        ),
        "int4": "4-bit weights in blocks of 32, int8 activations per block; int8 embedding rows",
        "nf4": "NF4 weights, double quantization (bitsandbytes)",
        "bnb-int8": "int8 weights and activations (bitsandbytes)",
        "optimum": "none (float32, text-generation-with-past)",
    }[form]


def need_libraries(form: str) -> None:
    """See, before anything is loaded, that what writes a form is installed.

    Raises:
        MissingExtraError: it isn't; the message says what to install.
    """
    if form == "optimum":
        import_optimum()
    elif RUNTIME_OF_FORM[form] == "bnb":
        try:
            import export.bnb  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                f"the form {form} needs bitsandbytes ({error}): pip install '.[bnb]' in a checkout "
                "of ercbatch"
            ) from error


def write_form(
    run: LoadedRun, folder: Path, form: str, target: str, samples: Sequence[Pack]
) -> None:
    """Write the files of a merged model that attends eagerly; see `need_libraries` first.

    `samples` are packs that show what its activations are like; without them every weight is
    rounded for itself.

    Raises:
        UsageError: the model cannot be had in this form.
        OSError: it cannot be written.
    """
    if form in _PARAMETER_BYTES:
        write_graph(run.model, folder, form, target, samples)
    elif form == "optimum":
        with TemporaryDirectory(dir=folder) as checkpoint:
            save_merged(run, Path(checkpoint))
            export_optimum(Path(checkpoint), folder)
    elif RUNTIME_OF_FORM[form] == "bnb":
        from export.bnb import write_bnb

        write_bnb(run.model, folder, form)
    else:
        raise NotImplementedError(form)


def save_merged(run: LoadedRun, folder: Path) -> None:
    """Write a merged model as an ordinary Hugging Face checkpoint into a folder."""
    with run.model.whole() as whole:
        whole.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoint, trust_remote_code=False)
    save_tokenizer(tokenizer, folder)


def write_graph(
    model: PackedModel, folder: Path, form: str, target: str, samples: Sequence[Pack]
) -> None:
    """Write `model.onnx`; of a large model, with a data file beside it. See `write_form`."""
    size = sum(p.numel() for p in model.model.parameters()) * _PARAMETER_BYTES[form]
    graph = trace_scorer(model, data_file(folder, size))
    if form != "fp32":
        sum_softmax_in_double(graph)
    fuse_rotations(graph)
    sampler = module_inputs(model, _sample_run(model, samples)) if samples else None
    if form == "int8":
        quantize_products(graph, weight_range=WEIGHT_RANGE[target], sampler=sampler)
        if target != SAFE_TARGET:
            onnx.save(probe(), folder / manifest.PROBE)
    elif form == "int4":
        quantize_products_to_4_bits(graph, sampler=sampler)
    if form != "fp32":
        quantize_lookups(graph)
    graph.save(folder / manifest.MODEL)


def _sample_run(model: PackedModel, samples: Sequence[Pack]) -> Callable[[], None]:
    device = next(model.parameters()).device

    def run() -> None:
        for pack in samples:
            model(*(tensor.to(device) for tensor in collate([pack])))

    return run


def sample_size(model: PackedModel) -> int:
    """How many dialogues should guide the rounding of a model's weights."""
    return (
        0
        if sum(p.numel() for p in model.model.parameters()) > _MAX_SAMPLED_PARAMETERS
        else _SAMPLE_DIALOGUES
    )
