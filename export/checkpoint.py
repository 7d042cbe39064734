"""A bundle back to a Hugging Face checkpoint, to train on from there.

The graph has kept the names of the model's parameters. Quantized weights come back as what they
stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import Bundle
from ercbatch.bundle.folders import check_output, whole_folder
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import BundleError, ErcbatchError
from ercbatch.labeler import Labeler
from ercbatch.prompts.answers import AnswerHead
from ercbatch.prompts.packs import join
from ercbatch.prompts.tokens import control_tokens
from ercbatch.prompts.tree import Question, Task
from ercbatch.scoring.checkpoints import draw_no_bars, refuse_code, save_tokenizer
from ercbatch.scoring.onnx_scorer import OnnxScorer
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from export.graph.nodes import TRANSPOSED, Array
from export.quantize.int8 import stored_weights

_MIN_COSINE = 0.99
"""Least cosine of the states that graph and checkpoint give: rounding moves them a little."""
_SAMPLE_TEXTS = ("Where were you?", "On the train, asleep. I woke up at the sea!", "Oh no.")
_MODULE_PREFIX = "model."
"""What the exported module calls the model inside it."""
_READABLE_FORMS = ("fp32", "int8")
"""Forms whose weights can be read back."""


def write_checkpoint(bundle: Bundle, folder: Path, *, force: bool = False) -> None:
    """Write the model of a bundle as a checkpoint that `train fit` takes as a base.

    Raises:
        BundleError: it doesn't say what its architecture is, or its weights cannot be read back.
        UsageError: its architecture asks to run code, or `folder` exists.
        OutputError: it cannot be written.
    """
    check_output(folder, manifest.CONFIG, force=force, inputs=[bundle.folder])
    config = dict(bundle.info.architecture)
    if not config:
        raise BundleError(f"{bundle.folder}: its architecture is not in it: train from its base")
    refuse_code(str(bundle.folder / manifest.MANIFEST), config)
    if bundle.info.form not in _READABLE_FORMS:
        raise BundleError(
            f"{bundle.folder}: is {bundle.info.form}; a checkpoint can be made of "
            f"{' and '.join(_READABLE_FORMS)} bundles: export the run with --also-checkpoint, "
            "or train from its base"
        )
    labeler = Labeler(bundle)
    draw_no_bars()
    try:
        graph = onnx.load(bundle.path(manifest.MODEL))
        with torch.device("meta"):  # no memory for more than the graph has
            parameters = find_parameters(_model(config), graph)
        model = _model(config)
        fill(model, parameters, labeler.engine.scorer.head)
        packed = PackedModel(model)
        _compare(packed, labeler)
        tokenizer = _tokenizer(bundle)
    except ErcbatchError:
        raise
    except Exception as error:  # torch and transformers each raise their own at what is no model
        raise BundleError(
            f"{bundle.folder}: not to be made a checkpoint of: {error}: train from its base"
        ) from error
    with whole_folder(folder, manifest.CONFIG, force=force) as part:
        with packed.whole() as whole:
            whole.save_pretrained(part)
        save_tokenizer(tokenizer, part)


def _model(config: dict[str, Any]) -> Any:
    """An untrained model."""
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, trust_remote_code=False
    ).eval()


def find_parameters(model: Any, graph: ModelProto) -> dict[str, Array]:
    """Parameter of a model -> its value in an exported graph, which has no output bias.

    Raises:
        ValueError: one is not there, or not in its shape.
    """
    output = model.get_output_embeddings()
    if output.weight is not model.get_input_embeddings().weight:
        # What isn't an answer has no row in the bundle, and labels of one's own would need it.
        raise ValueError("its output embedding is not its input embedding")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    transposed = [name for name in constants if name.endswith(TRANSPOSED)]
    constants.update({name.removesuffix(TRANSPOSED): constants[name].T for name in transposed})
    tables, products = stored_weights(graph)
    parameters = {**constants, **tables}
    modules = dict(model.named_modules())
    for name, weight in products.items():
        module = modules.get(name.removeprefix(_MODULE_PREFIX).rpartition(".")[0])
        parameters[name] = weight.T if isinstance(module, nn.Linear) else weight
    parameters = {name.removeprefix(_MODULE_PREFIX): value for name, value in parameters.items()}
    for name, parameter in model.named_parameters():
        if parameter is output.bias:
            continue
        if name not in parameters or parameters[name].shape != tuple(parameter.shape):
            raise ValueError(f"{name} is not in its graph")
    return parameters


def fill(model: Any, parameters: Mapping[str, Array], head: AnswerHead) -> None:
    """Put what `find_parameters` found, and the rows of the answers, into a model."""
    output = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is output.bias:
                parameter.zero_()
            else:
                parameter.copy_(torch.from_numpy(np.array(parameters[name])))
        rows = torch.from_numpy(head.tokens)
        output.weight[rows] = torch.from_numpy(head.weight)
        if output.bias is not None:
            output.bias[rows] = torch.from_numpy(head.bias)


def _compare(model: PackedModel, labeler: Labeler) -> None:
    """See that the model gives what the bundle gives, on a few words.

    Raises:
        ValueError: it doesn't.
    """
    dialogue = Dialogue(
        tuple(Utterance(text, str(i % 2)) for i, text in enumerate(_SAMPLE_TEXTS)), {}
    )
    questions = [Question(Task.EMOTION, t) for t in range(len(_SAMPLE_TEXTS))]
    pack = join([(0, tree) for tree in labeler.engine.renderer.trees(dialogue, questions)])
    rows = labeler.engine.scorer.head.tokens.tolist()
    scorer = labeler.engine.scorer
    assert isinstance(scorer, OnnxScorer)  # what runs the forms that are read
    expected = scorer.states(pack)
    states = TorchScorer(model, rows).states(pack)
    norms = np.linalg.norm(states, axis=1) * np.linalg.norm(expected, axis=1)
    lowest_cosine = float(((states * expected).sum(1) / norms).min())
    if not lowest_cosine >= _MIN_COSINE:
        raise ValueError(f"it does not compute the same (cosine {lowest_cosine:.2f})")


def _tokenizer(bundle: Bundle) -> PreTrainedTokenizerFast:
    """The bundle's tokenizer, with the bundle's control tokens.

    Raises:
        BundleError: they are not among its special tokens.
    """
    controls = bundle.info.controls
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bundle.path(manifest.TOKENIZER)))
    backend = tokenizer.backend_tokenizer
    token_ids = {"bos_token": controls.start, "mask_token": controls.answer}
    if control_tokens(backend, {}).separator != controls.separator:
        token_ids["sep_token"] = controls.separator
    texts = {n: backend.id_to_token(ids[0]) or "" for n, ids in token_ids.items() if ids}
    if control_tokens(backend, texts) != controls:
        raise BundleError(
            f"{bundle.folder}: its tokenizer lacks the control tokens of {manifest.MANIFEST}: "
            "train from its base"
        )
    tokenizer.add_special_tokens(texts)
    return tokenizer
