"""A torch module as an ONNX graph that names its weights without holding them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.onnx import symbolic_opset9

from export.graph import Graph

OPSET = 17

Axes = Mapping[str, Mapping[int, str]]
"""Input or output -> its dynamic axes."""


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Axes,
    outputs: Axes,
    data: Path | None = None,
) -> Graph:
    """The float32 graph of a module, called on `example`; `data` as for `Graph`.

    While it is traced the module holds no weights, so they can be of any type.
    """
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # The exporter says that it is deprecated, and that shape checks become constants.
        warnings.simplefilter("ignore")
        path = Path(folder) / "traced.onnx"
        module.eval()  # the exporter puts back the mode of the whole over that of the parts
        with _hollow(module) as weights, _no_turned_weights(), torch.inference_mode():
            torch.onnx.export(
                module,
                example,
                path,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={**inputs, **outputs},
                opset_version=OPSET,
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
            )
        return Graph(onnx.load(path), weights, data)


@contextmanager
def _no_turned_weights() -> Iterator[None]:
    """The exporter works out the transposition of every weight, to learn its shape, and keeps it;
    that of a copy it doesn't."""

    def linear(graph: Any, rows: Any, weight: Any, bias: Any) -> Any:
        return symbolic_opset9.linear(graph, rows, graph.op("Identity", weight), bias)

    torch.onnx.register_custom_op_symbolic("aten::linear", linear, OPSET)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::linear", OPSET)  # type: ignore[attr-defined]


@contextmanager
def _hollow(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Parameters that are one number each, seen as a float32 tensor of the right shape; yields the
    real ones by name."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    real = {name: tensor.data for name, tensor in tensors.items()}
    weights = {name: real[name] for name, _ in module.named_parameters()}
    try:
        for number, (name, tensor) in enumerate(tensors.items()):
            if name in weights:
                # Numbers of their own: the exporter makes one of what is equal.
                tensor.data = torch.tensor(1 + number / 1024).expand(tensor.shape)
            elif tensor.is_floating_point():
                tensor.data = tensor.data.float()
        yield weights
    finally:
        for name, tensor in tensors.items():
            tensor.data = real[name]
