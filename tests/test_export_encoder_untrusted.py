"""`export encoder` refuses what cannot be exported, and what asks to run code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import python
from helpers.sentence_model import (
    POOLINGS,
    change,
    copy_model,
    write_modules,
    write_sentence_model,
)
from safetensors.torch import load_file, save_file

from ercbatch.errors import UsageError
from export.encoder import export_encoder

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentence_model(tmp_path_factory.mktemp("sentence_model"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("where", "joins the default prompt 'where' with the text"),
        ("where is it " * 40, "its default prompt takes over half of 128 tokens"),
        ("what: ", "its pooling leaves the default prompt out"),
    ],
)
def test_a_prompt_that_cannot_be_exported_is_refused(
    source: Path, tmp_path: Path, prompt: str, message: str
) -> None:
    model = copy_model(source, tmp_path / "model")
    path = model / "config_sentence_transformers.json"
    change(path, prompts={"query": prompt}, default_prompt_name="query")
    change(model / "1_Pooling" / "config.json", include_prompt=prompt != "what: ")
    with pytest.raises(UsageError, match=message + ".*or take default_prompt_name out"):
        export_encoder(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["Transformer", "Pooling", "Dense"], "has the module Dense"),
        (["Transformer", "Pooling", "LayerNorm", "Normalize"], "has the module LayerNorm"),
        (["Router"], "has the module Router"),
        (["util.pickle"], "has the module pickle"),
        (["Transformer"], "its modules are Transformer;"),
        (["Pooling", "Transformer"], "its modules are Pooling, Transformer;"),
        ([], "its modules are none;"),
    ],
)
def test_modules_that_cannot_be_exported_are_refused_by_name(
    source: Path, tmp_path: Path, modules: list[str], message: str
) -> None:
    model = copy_model(source, tmp_path / "model")
    write_modules(model, modules, POOLINGS[0])
    with pytest.raises(UsageError, match=message + ".*choose another sentence encoder"):
        export_encoder(model, tmp_path / "out")


def write_hostile(model: Path, kind: str) -> Path:
    """Let a model name a class of a file that stands beside it; the file that this would write."""
    ran = model.parent / "ran"
    (model / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom sentence_transformers.models import Transformer\n"
    )
    entries = json.loads((model / "modules.json").read_text())
    entries[0]["type"] = kind
    (model / "modules.json").write_text(json.dumps(entries))
    return ran


@pytest.mark.parametrize("kind", ["evil.Transformer", "evil", "transformers.models.{}", "os.path"])
def test_untrusted_module_is_not_imported(
    source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases of the library up to 5 would run the file."""
    model = copy_model(source, tmp_path / "model")
    ran = write_hostile(model, kind)
    monkeypatch.syspath_prepend(model)
    with pytest.raises(UsageError, match=f"the module '{kind}' is not of sentence-transformers"):
        export_encoder(model, tmp_path / "out")
    assert not ran.exists()


@pytest.mark.slow
def test_command_imports_no_untrusted_module(source: Path, tmp_path: Path) -> None:
    model = copy_model(source, tmp_path / "model")
    ran = write_hostile(model, "evil.Transformer")
    done = python("-m", "export", "encoder", model, "-o", tmp_path / "out", PYTHONPATH=str(model))
    assert done.returncode == 2
    assert "'evil.Transformer' is not of sentence-transformers: refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def _module_elsewhere(model: Path) -> None:
    shutil.copytree(model / "1_Pooling", model.parent / "elsewhere")
    entries = json.loads((model / "modules.json").read_text())
    entries[1]["path"] = "../elsewhere"
    (model / "modules.json").write_text(json.dumps(entries))


def _fewer_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _not_a_number(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})


SETTINGS = "sentence_bert_config.json"
ANOTHER_METHOD = {"text": {"method": "save_pretrained", "method_output_name": None}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_module_elsewhere, "outside of its folder: refused"),
        (_fewer_weights, r"its weights lack encoder\.layer\.1\.output\.dense\.weight"),
        (_not_a_number, "has another embedding in the graph"),
        (lambda m: change(m / "config.json", auto_map={"AutoModel": "evil.Model"}), "run code"),
        (lambda m: change(m / "adapter_config.json", r=4), "merge the adapter"),
        (lambda m: (m / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda m: change(m / SETTINGS, model_args={"variant": "x"}), "'model_args' is not supp"),
        (lambda m: change(m / SETTINGS, tokenizer_name_or_path="/x"), "'tokenizer_name_or_path'"),
        (lambda m: change(m / SETTINGS, modality_config=ANOTHER_METHOD), "'modality_config' is"),
        (lambda m: (m / "modules.json").write_text('{"a": 1}'), "cannot be exported"),
    ],
)
def test_settings_of_an_untrusted_model_are_checked(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    model = copy_model(source, tmp_path / "model")
    write_modules(model, ["Transformer", "Pooling"], {"pooling_mode_cls_token": True})
    damage(model)
    with pytest.raises(UsageError, match=message):
        export_encoder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
