"""`python -m export bundle`: a bundle is proved, or not written; and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import (
    CHAT,
    EXAMPLES,
    UNTRAINED,
    cli,
    export_bundle,
    write_model,
    write_sentence_encoder,
)
from helpers.commands import ROOT, python
from helpers.packs import pack
from huggingface_hub import ModelCard
from onnx import numpy_helper
from peft import PeftModel

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import open_bundle, read_info, write_bundle
from ercbatch.errors import BundleError
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.onnx_scorer import check_full_range
from ercbatch.scoring.packed_model import PackedModel, collate
from export.__main__ import main
from export.quantize.int8 import probe
from train.run import load_run

pytestmark = pytest.mark.transformers

VALID = EXAMPLES / "labelled_chat_valid.jsonl"


STRICT = ("--quantize", "int4", "--min-agreement", "100", "--max-loss", "0")


@pytest.fixture(scope="module")
def int4(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that falls short."""
    folder = tmp_path_factory.mktemp("int4") / "bundle"
    done = export_bundle(llama, folder, *UNTRAINED, *STRICT, "--accept-loss")
    assert done.returncode == 0, done.stderr
    assert "warning: accepted loss: meld, labelled_chat: " in done.stdout
    return folder


def test_a_bundle_that_falls_short_is_not_written(llama: Path, tmp_path: Path) -> None:
    done = export_bundle(llama, tmp_path / "bundle", *UNTRAINED, *STRICT)
    assert done.returncode == 1
    assert "% of the labels are the original's (at least 100% must be)" in done.stderr
    assert "--accept-loss" in done.stderr
    assert not any(tmp_path.iterdir())


def test_an_accepted_loss_stands_in_the_bundle(int4: Path) -> None:
    info = read_info(int4)
    assert info.form == "int4"
    assert "% of the labels are the original's" in info.accepted_loss[-1]
    card = (int4 / manifest.CARD).read_text()
    assert card.startswith("---\n")
    assert "base_model" not in card  # a folder is nothing to others
    assert "## Accepted loss\n\nIt was written although:\n\n- meld, labelled_chat: " in card
    assert f"- {info.accepted_loss[-1]}" in card
    assert "| 80% | not reached" in card or "| 80% | 0." in card
    data = json.loads((int4 / manifest.CARD_JSON).read_text())
    assert data["license"] == "mit"
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == info.quality[0].to_json()["weighted_f1"]
    assert metrics[0]["args"] == {"average": "weighted"}
    done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", int4)
    assert done.returncode == 0, done.stderr
    assert "x (int4): ONNX Runtime" in done.stderr
    shown = cli("bundle", "show", int4).stdout
    assert "accepted loss:" in shown
    # Without --encoder it has nothing to show as demonstrations.
    done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", int4, "--demos", "1")
    assert done.returncode == 4
    assert "no encoder to find demonstrations with: export it with --encoder" in done.stderr


def test_the_merged_checkpoint_is_an_ordinary_one(trained: Path, tmp_path: Path) -> None:
    """Strictly the plain model's weights, and what the adapter computed on its base."""
    checkpoint = tmp_path / "checkpoint"
    options = ("--quantize", "fp32", "--accept-loss", "--also-checkpoint", checkpoint)
    done = export_bundle(trained, tmp_path / "bundle", *options)
    assert done.returncode == 0, done.stderr
    plain, _ = load_causal_lm(str(checkpoint))
    merged = load_run(trained).model
    with merged.whole() as whole:
        assert type(whole) is type(plain)
        plain.load_state_dict(whole.state_dict(), strict=True)
        assert not any(isinstance(module, PeftModel) for module in whole.modules())
        assert not any("lora" in name for name in whole.state_dict())
    apart = load_run(trained, merged=False).model
    assert any("lora" in name for name in apart.state_dict())
    batch = collate([pack(0, 40)])
    with torch.no_grad():
        one, other, base = (m(*batch) for m in (PackedModel(plain.eval()), apart, merged))
    assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(one, base, atol=1e-5)


def test_export_without_validation_data_is_refused(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    described = json.loads((run / "run.json").read_text())
    described["recipe"]["valid"] = []
    (run / "run.json").write_text(json.dumps(described))
    done = export_bundle(run, tmp_path / "bundle", "--quantize", "fp32")
    assert done.returncode == 1
    assert "no validation data" in done.stderr
    done = export_bundle(run, tmp_path / "bundle", "--quantize", "fp32", "--accept-loss")
    assert done.returncode == 0, done.stderr
    assert read_info(tmp_path / "bundle").accepted_loss == (
        "no validation data: nothing is measured",
    )
    assert "Confidences are not calibrated" in (tmp_path / "bundle" / "README.md").read_text()


def test_validation_files_of_one_label_set_count_together(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    described = json.loads((run / "run.json").read_text())
    (source,) = described["recipe"]["valid"]
    described["recipe"]["valid"] = [source, {**source, "path": str(VALID)}]
    (run / "run.json").write_text(json.dumps(described))
    done = export_bundle(run, tmp_path / "bundle", "--quantize", "fp32")
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "bundle")
    assert sorted(quality.title for quality in info.quality) == [
        "meld, labelled_chat",
        "meld, labelled_chat_valid",
    ]
    card = ModelCard.load(tmp_path / "bundle" / manifest.CARD).data
    assert sorted({(r.dataset_type, r.dataset_config) for r in card.eval_results}) == [
        ("meld", "labelled_chat"),
        ("meld", "labelled_chat_valid"),
    ]
    counts = [quality.metrics()["utterances"] for quality in info.quality]
    assert info.calibration["meld"].utterances == sum(counts)
    assert info.temperatures == {"meld": info.calibration["meld"].temperature}


@pytest.mark.slow
def test_bitsandbytes_forms_are_exported_too(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    done = export_bundle(
        llama, tmp_path / "bundle", "--quantize", "nf4", *UNTRAINED, "--accept-loss"
    )
    assert done.returncode == 0, done.stderr
    done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert "x (nf4): torch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("form", "module"), [("nf4", "bitsandbytes"), ("optimum", "optimum")])
def test_missing_library_is_reported_before_loading(form: str, module: str, tmp_path: Path) -> None:
    done = python(
        "-c",
        f"import sys; sys.modules[{module!r}] = None\n"
        "from export.bundle import BundleOptions, export_bundle\n"
        "from pathlib import Path\n"
        f"options = BundleOptions('x', {form!r}, 'MIT')\n"
        f"export_bundle(None, Path({str(tmp_path / 'bundle')!r}), options)",
    )
    extra = "bnb" if form == "nf4" else form
    assert f"MissingExtraError: the form {form} needs " in done.stderr
    assert f"pip install '.[{extra}]' in a checkout of ercbatch" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "no model there"),
        ("other weights", "not the base that the adapter in "),
        ("other model", "not an adapter for this base"),
    ],
)
def test_an_adapter_without_its_base_is_refused(
    change: str, words: str, trained: Path, bert: Path, tmp_path: Path
) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(trained, run)
    if change == "other weights":
        shutil.copytree(bert, base)
        data = bytearray((base / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (base / "model.safetensors").write_bytes(data)
    elif change == "other model":
        write_model(base, "llama")
    text = (run / "run.json").read_text().replace(str(bert), str(base))
    if change == "other model":  # as where the base was on the hub
        text = json.dumps({**json.loads(text), "files": {}})
    (run / "run.json").write_text(text)
    done = export_bundle(run, tmp_path / "bundle")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bundle", "encoder", "checkpoint"])
def test_export_to_a_full_disk_leaves_no_files(
    command: str, trained: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands in for it: the same error from the same calls."""
    source: dict[str, str | Path] = {
        "bundle": trained,
        "encoder": write_sentence_encoder(tmp_path.parent / f"{tmp_path.name}-sbert"),
        "checkpoint": bundle_folder,
    }
    options = ["--name", "x", "--licence", "x", "--accept-loss"] if command == "bundle" else []
    arguments = [command, str(source[command]), "-o", str(tmp_path / "out"), *options]
    done = python(
        "-c",
        "import resource, signal\n"
        "import torch, onnx, transformers\n"
        "from export.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        f"main({arguments!r})",
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_contradictory_settings_are_refused(trained: Path, tmp_path: Path) -> None:
    def asked(folder: Path, *options: str | Path) -> Result:
        words = ("bundle", trained, "-o", folder, "--name", "x", "--licence", "MIT", *options)
        return CliRunner().invoke(main, list(map(str, words)))

    for options, words in (
        (("--encoder", "mini"), "--encoder and --examples go together"),
        (("--demos", "2"), "--demos needs --encoder and --examples"),
        (("--quantize", "int4", "--target", "arm64"), "--target is for int8"),
        (("--zero-shot", CHAT), "--zero-shot needs --labels"),
        (("--template", "paper"), "--labels and --template go with --zero-shot"),
        (("--licence", " "), "--name and --licence must say something"),
        (("--also-checkpoint", tmp_path / "bundle"), "is or holds"),
        (("--also-checkpoint", tmp_path / "bundle" / "checkpoint"), "lies in it"),
        (("--also-checkpoint", tmp_path), "lies in it"),
    ):
        done = asked(tmp_path / "bundle", *options)
        assert done.exit_code == 2
        assert words in done.output
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    for done in (asked(taken), asked(tmp_path / "bundle", "--also-checkpoint", taken)):
        assert done.exit_code == 2
        assert "exists: choose another folder, or give --force" in done.output
    assert [path.name for path in taken.iterdir()] == ["mine"]
    for folder in (trained, trained.parent):
        done = asked(folder, "--force")
        assert done.exit_code == 2
        assert "is read from there: choose another place" in done.output
    assert (trained / "run.json").is_file()


@pytest.mark.slow
def test_stopped_export_leaves_no_files(trained: Path, tmp_path: Path) -> None:
    command = ("-m", "export", "bundle", trained, "-o", tmp_path / "bundle", "--name", "x")
    with Popen(
        [sys.executable, *command, "--licence", "MIT", "--also-checkpoint", tmp_path / "model"],
        cwd=ROOT,
        stderr=PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("export: merging"):
                process.send_signal(signal.SIGTERM)
                break
        said = process.stderr.read()
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said
    assert not any(tmp_path.iterdir())


def test_full_range_weights_are_tried_on_the_machine(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    done = export_bundle(trained, folder, "--target", "avx512_vnni", "--accept-loss")
    path = tmp_path / manifest.PROBE
    onnx.save(probe(), path)
    try:
        check_full_range(path)
    except BundleError:  # a processor that saturates: nothing was written
        assert done.returncode == 4
        assert "export it with --target avx2" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(folder)
    assert "±127" in bundle.info.quantization
    weights = [
        numpy_helper.to_array(t)
        for t in onnx.load(bundle.path(manifest.MODEL)).graph.initializer
        if t.name.endswith("weight_int8")
    ]
    assert max(np.abs(w.astype(int)).max() for w in weights) == 127
    # What a processor without such products would find: another sum.
    model = probe()
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.full((64, 64), 64, np.int8), "w")
    )

    def fill(part: Path) -> manifest.BundleInfo:
        for name in bundle.info.files:
            shutil.copyfile(bundle.path(name), part / name)
        onnx.save(model, part / manifest.PROBE)
        return bundle.info

    write_bundle(tmp_path / "saturating", fill)
    done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", tmp_path / "saturating")
    assert done.returncode == 4
    assert "integer products saturate there: export it with --target avx2" in done.stderr
