"""A bundle labels as the model it was made from, and an altered one never loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import EXAMPLES, cli, edit_manifest, export_bundle

from ercbatch.bundle.bundle import find_bundle, open_bundle, read_info
from ercbatch.bundle.manifest import FORMAT
from ercbatch.errors import BundleError
from ercbatch.labels import label_set
from ercbatch.retrieval.bank import read_examples

pytestmark = pytest.mark.transformers


def test_show_and_verify_say_what_a_bundle_is(bundle_folder: Path) -> None:
    shown = cli("bundle", "show", bundle_folder)
    assert shown.returncode == 0, shown.stderr
    assert "meld: neutral, surprise, fear, sad, joyful, disgust, angry" in shown.stdout
    assert json.loads(cli("bundle", "show", bundle_folder, "--json").stdout)["name"] == "tiny"
    assert "whole" in cli("bundle", "verify", bundle_folder).stdout


def test_the_quantized_bundle_agrees_with_the_merged_model(bundle_folder: Path) -> None:
    (quality,) = read_info(bundle_folder).quality
    assert (quality.label_set, quality.dataset) == ("meld", "labelled_chat")
    metrics = quality.metrics()
    assert metrics["agreement"] >= 0.97
    assert 0 <= metrics["weighted_f1"] <= 1


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "link"])
def test_every_harmed_file_is_refused_by_name(
    bundle_folder: Path, tmp_path: Path, harm: str
) -> None:
    for name in read_info(bundle_folder).files:
        folder = tmp_path / name
        shutil.copytree(bundle_folder, folder)
        path = folder / name
        data = bytearray(path.read_bytes())
        if harm == "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        elif harm == "cut":
            path.write_bytes(data[:-1])
        else:
            path.unlink()
        if harm == "link":
            path.symlink_to(bundle_folder / name)
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            open_bundle(folder)


def test_a_missing_bundle_or_file_ends_with_4_and_the_next_step(
    bundle_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(bundle_folder, folder)
    (folder / "model.onnx").unlink()
    for bundle, words in ((folder, "model.onnx: missing"), (tmp_path, "not a bundle")):
        done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", str(bundle) + "/")
        assert done.returncode == 4
        assert words in done.stderr
        assert "python -m export" in done.stderr


def test_a_format_of_the_future_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    shutil.copy(bundle_folder / "bundle.json", tmp_path)
    edit_manifest(tmp_path, lambda value: value.update(format="2.0"))
    with pytest.raises(BundleError, match="upgrade ercbatch"):
        read_info(tmp_path)
    files = {"../up": {"size": 1, "sha256": ""}}
    edit_manifest(tmp_path, lambda value: value.update(format=FORMAT, files=files))
    with pytest.raises(BundleError, match="plain file name"):
        read_info(tmp_path)


def test_bank_build_writes_a_bundle_with_own_examples(bundle_folder: Path, tmp_path: Path) -> None:
    examples, out = EXAMPLES / "my_examples.jsonl", tmp_path / "mine"
    done = cli("bank", "build", examples, "--bundle", bundle_folder, "-o", out, "--demos", "2")
    assert done.returncode == 0, done.stderr
    # The figures of a bundle are not those of its copy with another bank.
    info = read_info(out)
    assert (info.demonstrations, info.quality, info.calibration) == (2, (), {})
    assert info.temperatures == read_info(bundle_folder).temperatures
    assert not {"README.md", "model_card.json"} & info.files.keys()
    again = cli("bank", "build", examples, "--bundle", out, "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "has not been measured" in again.stderr
    assert len(read_examples(out / "demonstrations.jsonl")) == len(
        read_examples(examples, label_set("meld"))
    )
    assert cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", out).returncode == 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x", "label": "sleepy"}\n')
    refused = cli("bank", "build", bad, "--bundle", bundle_folder, "-o", tmp_path / "no")
    assert refused.returncode == 4
    assert "line 1" in refused.stderr
    assert "sleepy" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("shown", "words"), [(0.3, "worse"), (0.495, None), (0.6, None)])
def test_bank_build_warns_if_demonstrations_harm(
    bundle_folder: Path, tmp_path: Path, shown: float, words: str | None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bundle_folder, base)
    (quality,) = read_info(base).quality
    assert 0 <= quality.metrics()["weighted_f1_with_demonstrations"] <= 1
    metrics = {"weighted_f1": 0.5, "weighted_f1_with_demonstrations": shown}
    edit_manifest(base, lambda value: value["quality"][0].update(metrics))
    examples = EXAMPLES / "my_examples.jsonl"
    done = cli("bank", "build", examples, "--bundle", base, "-o", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    if words is None:
        assert "warning" not in done.stderr
    else:
        assert "worse on its meld, labelled_chat (weighted F1 30.0%, 50.0% wi" in done.stderr


def test_export_without_a_run_names_the_train_command(encoder_folder: Path, tmp_path: Path) -> None:
    examples = ("--encoder", encoder_folder, "--examples", EXAMPLES / "my_examples.jsonl")
    done = export_bundle(tmp_path, tmp_path / "b", *examples)
    assert done.returncode == 2
    assert "python -m train fit" in done.stderr


def test_folder_does_not_shadow_a_packaged_bundle(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle_folder, tmp_path / "mini")
    shutil.copytree(bundle_folder, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    assert read_info(find_bundle("mini")).name == "mini"
    assert read_info(find_bundle("./mini")).name == "tiny"
    assert read_info(find_bundle("own")).name == "tiny"
    with pytest.raises(BundleError, match="no bundle 'other'"):
        find_bundle("other")
