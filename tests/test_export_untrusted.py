"""Bases, adapters and runs from strangers: nothing of theirs runs, is followed or is made up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import UNTRAINED, export_bundle, write_model, write_recipe
from helpers.commands import python
from helpers.gguf_file import write_gguf
from safetensors.numpy import load_file, save_file

from ercbatch.errors import UsageError
from ercbatch.scoring.checkpoints import load_causal_lm, refuse_code
from export.__main__ import main
from train.run import load_run

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5"}, "a t5 model, not a causal language model"),
        ({"model_type": None}, "config.json without model_type"),
        ({"is_decoder": False}, "`python -m train base`"),
    ],
)
def test_base_without_a_causal_model_is_refused(
    bert: Path, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    done = python("-m", "train", "fit", write_recipe(tmp_path, tmp_path / "base"), "-o", tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr) < 600


def test_a_config_that_asks_to_run_code_is_refused(bert: Path, tmp_path: Path) -> None:
    evil: list[dict[str, Any]] = [
        {key: "evil"}
        for key in ("auto_map", "_attn_implementation_internal", "attn_implementation")
    ]
    evil += [{"vision_config": evil[2]}, {"parts": [{"deeper": evil[1]}]}]
    for asking in evil:
        value = json.loads((bert / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**value, **asking}))
        with pytest.raises(UsageError, match="asks to run code"):
            load_causal_lm(str(tmp_path))


def away(folder: Path, change: str) -> None:
    """Let a model folder lead to what is beside it."""
    private = folder.parent / "private"
    private.mkdir()
    (private / "secret").write_text("hunter2\n")
    if change == "adapter":
        shutil.copytree(folder, private / "base")
        config = {"peft_type": "LORA", "base_model_name_or_path": str(private / "base"), "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif change == "link":
        (folder / "chat_template.jinja").symlink_to(private / "secret")
    elif change == "pipe":
        os.mkfifo(folder / "chat_template.jinja")
    elif change == "shard":
        (folder / "model.safetensors").rename(private / "model.safetensors")
        index = {"weight_map": {"x": "../private/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        path = folder / "tokenizer_config.json"
        value = {**json.loads(path.read_text()), "vocab_file": str(private / "secret")}
        path.write_text(json.dumps(value))


@pytest.mark.parametrize("change", ["adapter", "link", "pipe", "shard", "tokenizer"])
def test_a_base_that_leads_out_of_its_folder_is_refused(
    bert: Path, tmp_path: Path, change: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    away(base, change)
    with pytest.raises(UsageError, match=r"refused|merge the adapter into its base"):
        load_causal_lm(str(base))


def test_a_link_that_leads_in_a_circle_is_refused(bert: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    (base / "chat_template.jinja").symlink_to("chat_template.jinja")
    with pytest.raises(UsageError, match=r"chat_template\.jinja: .* refused"):
        load_causal_lm(str(base))


def test_what_stands_beside_a_gguf_file_is_not_read(bert: Path, tmp_path: Path) -> None:
    """An adapter's configuration would lead on to another model, a tokenizer's to code."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    path = write_gguf(folder / "model.gguf", write_model(tmp_path / "llama", "llama"))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(bert), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    code = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    done = python("-m", "train", "base", path, "-o", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "llama"


def test_the_width_of_an_expert_is_no_number_of_experts() -> None:
    refuse_code("here", {"shared_expert_intermediate_size": 20_480})
    with pytest.raises(UsageError, match="asks for num_experts"):
        refuse_code("here", {"num_experts": 20_480})


def test_links_within_a_hubs_cache_are_followed(bert: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--someone--small" / "blobs"
    snapshot = blobs.parent / "snapshots" / "1"
    shutil.copytree(bert, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    load_causal_lm(str(snapshot))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 5000}, "asks for num_hidden_layers = 5000"),
        ({"num_labels": 10**9}, "asks for num_labels"),
        ({"num_local_experts": 10**7}, "asks for num_local_experts"),
        ({"model_type": ["bert"]}, "not a causal language model"),
        ({"hidden_size": None}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_act": "no such"}, "cannot be loaded"),
        ({"quantization_config": ["x"]}, "cannot be loaded"),
    ],
)
def test_unusable_configuration_is_refused_in_a_sentence(
    bert: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    value = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(UsageError, match=words):
        load_causal_lm(str(base))


@pytest.mark.slow
def test_nothing_imports_kernels(tmp_path: Path) -> None:
    """With it transformers and bitsandbytes, which peft imports, fetch code from the hub."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('it is imported')\n")
    for name in ("train.run", "train.fit", "export.bundle"):
        done = python("-c", f"import {name}", PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr


def test_chat_template_cannot_write_files(bert: Path, tmp_path: Path) -> None:
    """Transformers takes the names of a stranger's templates for paths (CVE-2026-9856)."""
    base, out = tmp_path / "base", tmp_path / "a" / "b" / "c"
    shutil.copytree(bert, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    names = ("default", "../../x", str(tmp_path / "y"))
    config["chat_template"] = [{"name": name, "template": name} for name in names]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path, base, method="full", speaker_epochs=0)
    out.parent.mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    done = python("-m", "train", "fit", recipe, "-o", out)
    assert done.returncode == 0, done.stderr
    after = {path for path in tmp_path.rglob("*") if out not in path.parents}
    assert after - before == {out}
    assert not list(out.rglob("*x.jinja"))
    assert (out / "model" / "chat_template.jinja").read_text() == "default"


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "somebody.code"},
        {"target_modules": "(([a-z_0-9.]*)*)*!"},
        {"peft_type": "XLORA"},
        {"layer_replication": [[0, 10**9]]},
        {"unheard_of": "x"},
    ],
)
def test_adapter_with_other_settings_is_refused(
    trained: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match="not the configuration of an adapter"):
        load_run(run)


def test_run_with_altered_files_is_refused(trained: Path, tmp_path: Path) -> None:
    def tried(words: str, change: Callable[[Path, dict[str, Any]], object]) -> None:
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        described = json.loads((run / "run.json").read_text())
        change(run, described)
        (run / "run.json").write_text(json.dumps(described))
        asked = ("bundle", run, "-o", tmp_path / "bundle", "--name", "x", "--licence", "MIT")
        done = CliRunner().invoke(main, list(map(str, asked)))
        assert done.exit_code == 2, done.output
        assert words in done.output
        shutil.rmtree(run)
        assert not any(tmp_path.iterdir())

    def other_valid(_: Path, described: dict[str, Any]) -> None:
        described["data"][described["recipe"]["valid"][0]["path"]] = "0" * 64

    def pickled(run: Path, _: dict[str, Any]) -> None:
        (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter_model.bin")

    def no_settings(run: Path, _: dict[str, Any]) -> None:
        (run / "adapter" / "adapter_config.json").write_text("{}")

    tried("not what the run was validated on", other_valid)
    tried("has no adapter_model.safetensors: train again", pickled)
    tried("not the configuration of an adapter", no_settings)

    def with_value(**changed: object) -> Callable[[Path, dict[str, Any]], None]:
        return lambda _, described: described.update(changed)

    recipes: tuple[object, ...] = (None, [], "x")
    for recipe in recipes:
        tried("not the description of a finished run", with_value(recipe=recipe))
    for controls in ({}, {"start": 3}, None):
        tried("not the description", with_value(controls=controls))


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        ("missing", 2, "its weights lack model.norm.weight"),
        ("base", 2, "the answers of the base are no numbers"),
        ("adapter", 1, "the answers of torch "),
    ],
)
def test_weights_that_are_none_are_refused(
    llama: Path, trained: Path, tmp_path: Path, harm: str, code: int, words: str
) -> None:
    """Else transformers makes up what is missing, and every label is null."""
    source = tmp_path / "source"
    shutil.copytree(trained if harm == "adapter" else llama, source)
    (path,) = source.rglob("*model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(("model.norm.weight", "lora_B.weight")))
    values = tensors.pop(name)
    if harm != "missing":
        tensors[name] = np.full_like(values, np.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    options = () if harm == "adapter" else UNTRAINED
    done = export_bundle(source, tmp_path / "bundle", *options, "--accept-loss")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
