"""The form `optimum`: the standard ONNX of text generation with past, which other tools read too.

optimum's exporter holds transformers to a release of its own, so that it is an extra and imported
here alone.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ercbatch.bundle import manifest
from ercbatch.errors import MissingExtraError, UsageError
from ercbatch.scoring.checkpoints import check_config, refuse_code

_TASK = "text-generation-with-past"
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""What is taken of the exporter's other files: data that the readers of the form look for. The
bundle has its own `tokenizer.json`."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FAILURES = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What optimum, transformers and torch raise at a model that they cannot load or trace."""


def import_optimum() -> tuple[Any, Any]:
    """Optimum's exporter, and what knows which architectures it exports.

    Raises:
        MissingExtraError: no optimum here, or a transformers that it does not take.
    """
    try:
        from optimum.exporters.onnx import main_export
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:
        raise MissingExtraError(
            f"the form optimum needs optimum-onnx, and a transformers that it takes ({error}): "
            "pip install '.[optimum]' in a checkout of ercbatch"
        ) from error
    return main_export, TasksManager


def export_optimum(checkpoint: Path, folder: Path) -> None:
    """Write the standard graph of a causal language model's checkpoint into a bundle's folder.

    `model.onnx` (float32; over 2 GB its weights are in `model.onnx_data` beside it) takes
    `input_ids`, `attention_mask`, where the architecture has them `position_ids`, and
    `past_key_values.*`; it gives `logits` and `present.*`. `config.json` and its like are those
    that optimum's `ORTModelForCausalLM` and transformers read.

    Raises:
        MissingExtraError: no optimum here, or a transformers that it does not take.
        UsageError: the checkpoint asks to run code, has no safetensors, or is not of an
            architecture that optimum exports.
    """
    kind = str(check_config(str(checkpoint)).get("model_type"))
    main_export, tasks = import_optimum()
    if not any((checkpoint / name).exists() for name in _WEIGHTS):
        raise UsageError(f"{checkpoint}: has no {_WEIGHTS[0]}: save the model as safetensors")
    try:
        supported_tasks = tasks.get_supported_tasks_for_model_type(
            kind, "onnx", library_name="transformers"
        )
    except KeyError:
        supported_tasks = {}
    if _TASK not in supported_tasks:
        raise UsageError(
            f"optimum exports no {kind} model for {_TASK}: choose --quantize fp32 or int8, which "
            "this project exports itself"
        )
    with TemporaryDirectory(dir=folder) as exported, warnings.catch_warnings():
        # torch's exporter says that it is deprecated, and that shape checks become constants.
        warnings.simplefilter("ignore")
        try:
            main_export(
                str(checkpoint),
                exported,
                task=_TASK,
                device="cpu",
                dtype="fp32",
                library_name="transformers",
                local_files_only=True,
                trust_remote_code=False,
                # Its check only logs; a bundle's labels are compared with its model's.
                do_validation=False,
            )
        except _FAILURES as error:
            raise UsageError(
                f"{checkpoint}: optimum cannot export this {kind} model ({error}): choose "
                "--quantize fp32 or int8"
            ) from error
        settings = [path for name in _SETTINGS if (path := Path(exported, name)).exists()]
        for path in settings:
            text = path.read_text(encoding="utf-8")
            refuse_code(f"{checkpoint}: {path.name}", json.loads(text))
        for path in (*settings, *Path(exported).glob(f"{manifest.MODEL}*")):
            path.rename(folder / path.name)
