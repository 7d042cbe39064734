"""Bundles that anybody may have written, with digests that fit: refused, or harmless."""

from __future__ import annotations

import json
import os
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import EXAMPLES, cli, edit_manifest, sign
from safetensors.numpy import load_file, save_file

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle, open_bundle, read_info
from ercbatch.errors import BundleError
from ercbatch.labeler import smoke_test

CHAT = EXAMPLES / "group_chat.jsonl"
Json = dict[str, Any]


@pytest.fixture
def copy(bundle_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    shutil.copytree(bundle_folder, folder)
    return folder


def put(*path: str | int, value: Any) -> Callable[[Json], None]:
    def change(whole: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        whole[path[-1]] = value

    return change


def each(*path: str | int, values: Iterable[object]) -> list[tuple[tuple[str | int, ...], object]]:
    return [(path, value) for value in values]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *each("temperatures", values=([], {"meld": "x"}, {"meld": -1.0}, {"meld": 0})),
        (("temperatures",), {"meld": float("nan")}),
        *each("pack_tokens", values=("x", -5, 0, float("nan"), True, 1e9)),
        *each("demonstrations", values=("x", 2.5, -3, 10**6)),
        *((("window", k), v) for k, v in (("turns", 1.5), ("stride", 0), ("future", 3.5))),
        (("window", "max_tokens"), float("nan")),
        (("window", "other"), 1),
        *each("controls", "start", values=(["x"], [2**70], [[1]], [10**6], 3)),
        *each("template", values=(["x"], "nosuch")),
        *each("name", values=(3, "\ud800", None, "a\x1b[2J", "a" * 300)),
        *each("label_sets", 0, "name", values=("\ud800", "a\nb", 3, None)),
        *each("label_sets", 0, "labels", 0, values=("\x1b]0;x", "\ud800", "")),
        (("label_sets", 0, "labels"), [f"label{n}" for n in range(1001)]),
        (("label_sets", 0, "aliases"), {f"alias{n}": "joy" for n in range(60_000)}),
        *each("quality", values=([3], None, {"meld": 3}, {"meld": {"accuracy": "high"}})),
        *each("calibration", values=([], {"meld": {}}, {"meld": []})),
        (("data",), "abc"),
        (("label_sets",), []),
        (("form",), "int3"),
        *each("files", values=({}, [], {"../x": {"size": 1, "sha256": ""}})),
        *each("files", manifest.MODEL, "size", values=(1e999, "1", -1)),
        *((("files",), {name: {"size": 1, "sha256": ""}}) for name in ("a\0b", "a\udcff", "", ".")),
    ],
)
def test_an_odd_description_is_refused(copy: Path, path: tuple[str | int, ...], value: Any) -> None:
    edit_manifest(copy, put(*path, value=value))
    with pytest.raises(BundleError, match=str(copy)):
        smoke_test(open_bundle(copy))


def test_a_description_is_whole_or_refused(copy: Path) -> None:
    """Each of its bytes flipped, in turn, and each of its lines missing."""
    path = copy / manifest.MANIFEST
    data = path.read_bytes()
    known, refused = read_info(copy), 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            # The last of many digits need not make another number.
            assert read_info(copy) == known
        except BundleError:
            refused += 1
    assert refused > 0.99 * len(data)
    rows = data.splitlines(keepends=True)
    for number in range(len(rows)):
        path.write_bytes(b"".join(rows[:number] + rows[number + 1 :]))
        with pytest.raises(BundleError):
            read_info(copy)


def test_description_that_is_not_a_small_file_is_refused(copy: Path) -> None:
    path = copy / manifest.MANIFEST
    path.write_text("[" * 200_000)
    with pytest.raises(BundleError, match="not a bundle description"):
        read_info(copy)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="no ordinary small file"):
        read_info(copy)
    path.unlink()
    for elsewhere in ("/dev/zero", find_bundle("mini") / manifest.MANIFEST):
        path.symlink_to(elsewhere)
        with pytest.raises(BundleError, match="no ordinary small file"):
            read_info(copy)
        path.unlink()


@pytest.mark.parametrize(
    "name",
    [manifest.MODEL, manifest.HEAD, manifest.TOKENIZER, manifest.ENCODER, "demonstrations.jsonl"],
)
def test_what_is_not_listed_is_not_opened(copy: Path, name: str) -> None:
    edit_manifest(copy, lambda value: value["files"].pop(name))
    (copy / name).write_bytes(b"altered")
    labelled = cli("label", CHAT, "--bundle", copy, "--demos", "1")
    assert labelled.returncode == 4, labelled.stderr
    assert "Traceback" not in labelled.stderr
    assert labelled.stdout == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage", b"\xff" * 5000])
def test_files_of_another_kind_are_refused(copy: Path, content: bytes) -> None:
    for name in read_info(copy).files:
        if name in (manifest.CARD, manifest.CARD_JSON):
            continue
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        sign(copy)
        with pytest.raises((BundleError, Exception), match=str(copy)) as caught:
            smoke_test(open_bundle(copy))
        assert type(caught.value).__module__ == "ercbatch.errors", name
        (copy / name).write_bytes(before)
    sign(copy)
    smoke_test(open_bundle(copy))


def narrower(head: Json) -> None:
    head["weight"] = head["weight"][:, :-1].copy()


def without_rows(head: Json) -> None:
    for name in ("tokens", "weight", "bias"):
        head[name] = head[name][:1].copy()


def out_of_order(head: Json) -> None:
    head["tokens"] = head["tokens"][::-1].copy()


def no_numbers(head: Json) -> None:
    head["weight"] = np.full_like(head["weight"], np.nan)


def of_another_shape(head: Json) -> None:
    head["bias"] = head["bias"][:-1].copy()


@pytest.mark.parametrize(
    "change", [narrower, without_rows, out_of_order, no_numbers, of_another_shape]
)
def test_an_answer_head_that_does_not_fit_is_refused(
    copy: Path, change: Callable[[Json], None]
) -> None:
    head = dict(load_file(copy / manifest.HEAD))
    change(head)
    save_file(head, copy / manifest.HEAD)
    sign(copy)
    with pytest.raises(BundleError):
        smoke_test(open_bundle(copy))
    assert cli("bundle", "verify", copy).returncode == 4


def test_demonstrations_of_another_encoder_are_refused(copy: Path) -> None:
    path = copy / "demonstrations.safetensors"
    vectors = load_file(path)["vectors"]
    save_file({"vectors": vectors[:, :-1].copy()}, path)
    sign(copy)
    with pytest.raises(BundleError, match="not of its encoder"):
        smoke_test(open_bundle(copy))


def test_what_a_bundle_says_does_not_steer_a_terminal(copy: Path) -> None:
    edit_manifest(copy, put("licence", value="\x1b[31mred\x07"))
    shown = cli("bundle", "show", copy)
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    assert "\x07" not in shown.stdout


def test_the_bundle_in_the_package_labels() -> None:
    smoke_test(open_bundle(find_bundle("mini")))


@pytest.mark.parametrize("place", ["added token", "pattern"])
def test_a_tokenizer_that_takes_minutes_to_compile_is_refused(copy: Path, place: str) -> None:
    tokenizer = json.loads((copy / manifest.TOKENIZER).read_text())
    if place == "pattern":
        pattern = {"type": "Replace", "pattern": {"Regex": "a" * 100_000}, "content": "b"}
        tokenizer["normalizer"] = pattern
    else:
        tokenizer["added_tokens"][0]["content"] = "a" * 100_000
    (copy / manifest.TOKENIZER).write_text(json.dumps(tokenizer))
    sign(copy)
    with pytest.raises(BundleError, match="a string in it is over 4,096 characters long"):
        smoke_test(open_bundle(copy))


CHARACTERS = b"\4\0\0\0" + bytes(4) + b"a" * 1_000_000 + b"\0"
"""A table of SentencePiece: a trie of one cell, and a text."""


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 3,
            "up to 1,000,000 characters of one",
        ),
        ([{"type": "Prepend", "prepend": "a" * 4000}] * 2, "up to 16,008,001 characters of one"),
        ([{"type": "ByteLevel"}] * 30, "up to 1,073,741,824 characters of one"),
        (
            [{"type": "Precompiled", "precompiled_charsmap": b64encode(CHARACTERS).decode()}],
            "up to 1,000,000 characters of one",
        ),
        ([{"type": "Lowercase"}] * 100_000, "in 100001 steps"),
    ],
)
def test_a_tokenizer_that_makes_a_million_characters_of_one_is_refused(
    copy: Path, steps: list[dict[str, Any]], words: str
) -> None:
    tokenizer = json.loads((copy / manifest.TOKENIZER).read_text())
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    tokenizer["pre_tokenizer"] = None
    (copy / manifest.TOKENIZER).write_text(json.dumps(tokenizer))
    sign(copy)
    with pytest.raises(BundleError, match=words):
        smoke_test(open_bundle(copy))


def test_a_panic_of_the_tokenizers_library_is_an_error(copy: Path) -> None:
    tokenizer = json.loads((copy / manifest.TOKENIZER).read_text())
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]}
    tokenizer["model"]["continuing_subword_prefix"] = "longer than b"
    (copy / manifest.TOKENIZER).write_text(json.dumps(tokenizer))
    sign(copy)
    with pytest.raises(BundleError, match=r"not a tokenizer \(PanicException"):
        smoke_test(open_bundle(copy))


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("Cast", {"to": onnx.TensorProto.STRING}), ("ReduceSum", {"keepdims": 0})],
)
def test_a_graph_with_an_odd_output_ends_in_a_sentence(
    copy: Path, operator: str, attributes: dict[str, int]
) -> None:
    model = onnx.load(copy / manifest.MODEL)
    (output,) = model.graph.output
    node = onnx.helper.make_node(operator, [output.name], ["odd"])
    node.attribute.extend(onnx.helper.make_attribute(*item) for item in attributes.items())
    model.graph.node.append(node)
    kind = attributes.get("to", onnx.TensorProto.FLOAT)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("odd", kind, None))
    onnx.save(model, copy / manifest.MODEL)
    sign(copy)
    for command in (("label", CHAT, "--bundle", copy), ("bundle", "verify", copy)):
        done = cli(*command)
        assert done.returncode == 4, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_a_tokenizer_of_hundreds_of_megabytes_is_not_read(copy: Path) -> None:
    os.truncate(copy / manifest.TOKENIZER, 200_000_000)  # takes no room on the disk
    sign(copy)
    with pytest.raises(BundleError, match="over 134,217,728 bytes"):
        smoke_test(open_bundle(copy))


def test_a_token_of_an_id_that_no_model_has_is_refused(copy: Path) -> None:
    tokenizer = json.loads((copy / manifest.TOKENIZER).read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["gone"] = 2**31
    (copy / manifest.TOKENIZER).write_text(json.dumps(tokenizer))
    sign(copy)
    for text in ("it is gone", "yes"):
        source = copy / "in.jsonl"
        source.write_text(json.dumps({"utterances": [{"text": text}]}))
        done = cli("label", source, "--bundle", copy)
        assert done.returncode == (4 if "gone" in text else 0), done.stderr
        assert ("has the id 2147483648" in done.stderr) == ("gone" in text)
