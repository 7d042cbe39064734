"""The bitsandbytes scorer: a model in NF4 or int8, on CUDA or a CPU. Needs torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ercbatch.errors import BundleError, UsageError
from ercbatch.prompts.answers import AnswerHead, FloatArray
from ercbatch.prompts.packs import Pack, split
from ercbatch.scoring.checkpoints import refuse_code
from ercbatch.scoring.hidden_kernels import hidden_kernels
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, as it is installed, and quiet."""
    # It warns at every int8 product that the input is read in half precision, as it always is.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with hidden_kernels():
        import bitsandbytes
    module: ModuleType = bitsandbytes
    return module


bnb = import_bitsandbytes()

NF4_BLOCK = 64
"""Weights that share a scale in NF4: bitsandbytes' default."""
_NF4_STATE = "quant_state.bitsandbytes__nf4"
"""What stands beside a weight that is NF4."""
INT8_SCALES = "SCB"
"""What stands beside a weight that is int8: a scale for each output."""
_NESTED_BLOCK = 256
"""NF4's scales that share a scale of their own."""


def nf4_config(**settings: Any) -> BitsAndBytesConfig:
    """NF4 with double quantization, computed in bfloat16, and other settings of the class."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **settings,
    )


class BnbScorer(TorchScorer):
    """Scores packs with the files of `export.bnb.write_bnb`, on CUDA where there is a device.

    Args:
        config: the model's `config.json`.
        weights: its safetensors.
        head: the bundle's answer head; the model has no output embedding.
        threads: processor threads, where no GPU is used.

    Raises:
        BundleError: the files ask for code, or are not a model that this program can run.
    """

    packages = (*TorchScorer.packages, "bitsandbytes")

    def __init__(
        self, config: Path, weights: Sequence[Path], head: AnswerHead, threads: int
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(threads)
        try:
            values = json.loads(config.read_bytes())
            refuse_code(str(config), values)
            model = load_quantized(values, weights, self._device)
        except UsageError as error:
            raise BundleError(f"{error}: do not use this bundle") from error
        except Exception as error:  # torch, transformers and safetensors each raise their own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise BundleError(
                f"{config.parent}: transformers {version('transformers')} with bitsandbytes "
                f"{version('bitsandbytes')} cannot load its model ({reason}): export the bundle "
                "again, or install the releases that it was written with"
            ) from error
        super().__init__(model, head)

    def describe(self) -> str:
        """See `Scorer.describe`."""
        libraries = f"torch {torch.__version__}, bitsandbytes {version('bitsandbytes')}"
        if self._device.type == "cuda":
            return f"{libraries}, {torch.cuda.get_device_name(self._device)}"
        return f"{libraries}, CPU, {torch.get_num_threads()} threads"

    def states(self, pack: Pack) -> FloatArray:
        """See `StateScorer.states`.

        On a CPU each tree is run by itself, so that its states are the same alone and amid others
        to the last bit. In a pack a float sum is rounded by what stands beside it, and the next
        rounding, to bfloat16 or int8, turns such a last bit into a whole step, which moves a
        probability by up to a thousandth. MELD's dialogues take no longer so; utterances without a
        dialogue, 30 tokens each, up to 1.7 times. A GPU is filled by a pack, not by a tree: there
        numbers are equal to the rounding of half precision.
        """
        if self._device.type == "cuda":
            return super().states(pack)
        return np.concatenate([super(BnbScorer, self).states(tree) for tree in split(pack)])


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The matrices that bitsandbytes has products for, by name: `nn.Linear` and GPT-2's form."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def shape_of(matrix: Any) -> tuple[int, int]:
    """(outputs, inputs) of a matrix of the model."""
    height, width = matrix.weight.shape
    return (width, height) if isinstance(matrix, Conv1D) else (height, width)


def load_quantized(
    config: Mapping[str, Any], weights: Sequence[Path], device: torch.device
) -> PackedModel:
    """A model of quantized matrices, without an output embedding.

    transformers' own `from_pretrained` would make up an output embedding and whatever else the
    files lack. Here each tensor has its place and its size, or the model is refused; the kernels of
    bitsandbytes would read beyond one that is too short.

    Raises:
        Exception: of any kind: the files are not such a model.
    """
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    settings = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    dtype = _compute_dtype(device)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    packed = PackedModel(model)
    packed.head = None  # a matrix as high as the vocabulary, which nothing asks for
    tensors: dict[str, Tensor] = {}
    for path in weights:
        tensors |= load_file(path, device=str(device))
    quantized = set()
    for name, matrix in quantizable(model).items():
        weight = f"{name}.weight"
        if f"{weight}.{_NF4_STATE}" in tensors:
            parts = {k: tensors.pop(k) for k in list(tensors) if k.startswith(f"{weight}.")}
            state = {k.removeprefix(f"{weight}."): tensor for k, tensor in parts.items()}
            linear = _nf4(matrix, tensors.pop(weight), state)
        elif f"{name}.{INT8_SCALES}" in tensors:
            linear = _int8(matrix, tensors.pop(weight), tensors.pop(f"{name}.{INT8_SCALES}"))
        else:
            continue
        quantized.add(weight)
        model.set_submodule(name, linear)
    floats = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    keys = model.load_state_dict(floats, strict=False, assign=True)
    missing = sorted(set(keys.missing_keys) - quantized)
    if missing or keys.unexpected_keys:
        raise ValueError(f"missing: {missing}, unknown: {keys.unexpected_keys}")
    return packed.to(device).eval()


def _compute_dtype(device: torch.device) -> torch.dtype:
    """What is computed in between the quantized products. On a CPU it is little beside them."""
    if device.type == "cpu":
        return torch.float32
    # Before compute capability 8 CUDA only imitates bfloat16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _nf4(matrix: nn.Module, weight: Tensor, state: Mapping[str, Tensor]) -> nn.Module:
    """A product with NF4 weights (QLoRA, arXiv 2305.14314), whose scales are quantized too."""
    outputs, inputs = shape_of(matrix)
    blocks = outputs * inputs // NF4_BLOCK
    _check("weight", weight, torch.uint8, (outputs * inputs // 2, 1))
    _check("absmax", state["absmax"], torch.uint8, (blocks,))
    _check("quant_map", state["quant_map"], torch.float32, (16,))
    nested = -(-blocks // _NESTED_BLOCK)
    _check("nested_absmax", state["nested_absmax"], torch.float32, (nested,))
    _check("nested_quant_map", state["nested_quant_map"], torch.float32, (256,))
    # Multiplied out, the weights are the input's float32, or bfloat16 where the CPU has products
    # of it: on one thread those are 1.4 to 1.9 times as fast, and round far finer than NF4 does.
    native = weight.device.type == "cpu" and bnb.functional.has_avx512bf16()
    linear = bnb.nn.Linear4bit(
        inputs,
        outputs,
        matrix.bias is not None,
        compute_dtype=torch.bfloat16 if native else None,
        quant_type="nf4",
        device="meta",
    )
    linear.weight = bnb.nn.Params4bit.from_prequantized(
        weight, state, device=weight.device, module=linear
    )
    quant_state = linear.weight.quant_state
    sizes = (*quant_state.shape, quant_state.blocksize, quant_state.state2.blocksize)
    if sizes != (outputs, inputs, NF4_BLOCK, _NESTED_BLOCK):
        raise ValueError(f"sizes {sizes} of NF4 in a matrix of {outputs} by {inputs}")
    # bitsandbytes would lay the weights out anew for a kernel of its own. That is for single
    # tokens: over a dialogue it is slower, and it takes no matrix whose height 32 doesn't divide.
    linear.support_avx512bf16_for_cpu = False
    module: nn.Module = linear
    return module


def _int8(matrix: nn.Module, weight: Tensor, scales: Tensor) -> nn.Module:
    """A product in int8, with a scale for each token and for each output.

    LLM.int8 (arXiv 2208.07339) besides takes out the columns in which any token of the batch
    exceeds a threshold, and multiplies them in half precision. In a pack that token may be a
    stranger's, and his words would change how mine are rounded: with the paper's threshold of 6 a
    probability moved by up to 0.02. A threshold of 0 takes no columns out.
    """
    outputs, inputs = shape_of(matrix)
    _check("weight", weight, torch.int8, (outputs, inputs))
    _check(INT8_SCALES, scales, torch.float32, (outputs,))
    linear = bnb.nn.Linear8bitLt(
        inputs,
        outputs,
        matrix.bias is not None,
        has_fp16_weights=False,
        threshold=0.0,
        device="meta",
    )
    linear.weight = bnb.nn.Int8Params(
        weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales
    )
    module: nn.Module = linear
    return module


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{what} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
