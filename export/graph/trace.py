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

from export.graph.nodes import Graph

_OPSET = 17

Axes = Mapping[str, Mapping[int, str]]
"""Input or output -> its dynamic axes."""


class _Called(nn.Module):
    """A module whose parameters are inputs, after its own.

    Of what is a parameter to the exporter it makes copies, transposed ones too, as often as it
    looks for shapes. `torch.func.functional_call` would do, but cannot be traced.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._called = [module]  # in a list it is no part of this one

    def forward(self, *inputs: Tensor) -> Any:
        (module,) = self._called
        parameters = list(module.parameters())
        count = len(inputs) - len(parameters)
        inputs_by_parameter = dict(zip(parameters, inputs[count:], strict=True))
        # By places, of which tied parameters have several; a bias that there isn't is None.
        slots = [
            (part._parameters, name, parameter)
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]
        try:
            for owner, name, parameter in slots:
                owner[name] = inputs_by_parameter[parameter]  # type: ignore[assignment]
            return module(*inputs[:count])
        finally:
            for owner, name, parameter in slots:
                owner[name] = parameter


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
        module.eval()
        weights = {name: tensor.data for name, tensor in module.named_parameters()}
        placeholders = tuple(
            # Numbers of their own: the exporter makes one of what is equal.
            torch.tensor(1 + number / 1024).expand(tensor.shape)
            for number, tensor in enumerate(weights.values())
        )
        with _float_buffers(module), torch.inference_mode():
            torch.onnx.export(
                _Called(module),
                (*example, *placeholders),
                path,
                input_names=[*inputs, *weights],
                output_names=list(outputs),
                dynamic_axes={**inputs, **outputs},
                opset_version=_OPSET,
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
            )
        return Graph(onnx.load(path), weights, data)


@contextmanager
def _float_buffers(module: nn.Module) -> Iterator[None]:
    originals = {tensor: tensor.data for tensor in module.buffers() if tensor.is_floating_point()}
    try:
        for tensor in originals:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, value in originals.items():
            tensor.data = value
