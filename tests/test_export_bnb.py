"""Bundles that bitsandbytes runs: NF4 and int8 label as the model does, alone and amid others."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHAT, EXAMPLES, cli, write_model
from helpers.commands import python
from safetensors.numpy import save_file

from ercbatch import Labeler
from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import open_bundle, read_info, write_bundle
from ercbatch.bundle.manifest import BundleInfo
from ercbatch.dialogues import Dialogue
from ercbatch.engine import Engine
from ercbatch.errors import BundleError, UsageError
from ercbatch.inputs.records import read_dialogues
from ercbatch.prompts.packs import graft, join, split
from ercbatch.prompts.templates import template
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Question, Read, Renderer, Segment, Task, lay_out
from ercbatch.retrieval.bank import INDEX, TEXTS, VECTORS

pytest.importorskip("bitsandbytes")

import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from transformers import AutoModelForCausalLM, LlamaConfig

from ercbatch.scoring.bnb_scorer import BnbScorer, bnb
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from export.bnb import write_bnb

pytestmark = pytest.mark.transformers

FORMS = ["nf4", "bnb-int8"]
CHATS = EXAMPLES / "group_chat.jsonl"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedModel, SegmentTokenizer]:
    """The tiny Llama in float32, as `train.run.load_run` gives a model to the export."""
    folder = write_model(tmp_path_factory.mktemp("llama"), "llama")
    model, tokenizer = load_causal_lm(str(folder), attn_implementation="eager")
    with torch.no_grad():
        # Drawn as wide as they are, they would multiply an error from layer to layer, as the
        # matrices of a trained model don't.
        for parameter in model.model.layers.parameters():
            parameter *= 0.5 if parameter.ndim == 2 else 1
    return PackedModel(model.eval()), tokenizer


@pytest.fixture(scope="module")
def folders(
    llama: tuple[PackedModel, SegmentTokenizer],
    bundle_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A bundle of the tiny Llama in each form."""
    model, tokenizer = llama
    other = open_bundle(bundle_folder)
    info = other.info
    wording = template(info.template, info.template_version)
    trie = Renderer(tokenizer, wording, info.window, info.label_sets[0].labels).trie
    paths = {form: tmp_path_factory.mktemp("bnb") / form for form in FORMS}
    for form, path in paths.items():

        def fill(part: Path, form: str = form) -> BundleInfo:
            for name in (manifest.ENCODER, manifest.ENCODER_TOKENIZER, TEXTS, VECTORS, INDEX):
                if name in info.files:
                    shutil.copyfile(other.path(name), part / name)
            tokenizer.save(part / manifest.TOKENIZER)
            save_file(dict(model.answer_head(trie.tokens).tensors()), part / manifest.HEAD)
            write_bnb(model, part, form)
            controls = tokenizer.controls
            return replace(info, name="llama", form=form, controls=controls, temperatures={})

        write_bundle(path, fill)
    return paths


@pytest.fixture(params=FORMS)
def folder(folders: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """The bundle of each form, one after the other."""
    return folders[request.param]


def altered(folder: Path, out: Path, alter: Callable[[Path], None]) -> Path:
    """A copy of a bundle in which a stranger has altered files, with the digests to match."""

    def fill(part: Path) -> BundleInfo:
        for name in read_info(folder).files:
            shutil.copyfile(folder / name, part / name)
        alter(part)
        return read_info(folder)

    write_bundle(out, fill)
    return out


def probabilities(engine: Engine, dialogues: Iterable[Dialogue]) -> np.ndarray:
    """[utterances, labels] of all dialogues, in order."""
    run = engine.run((None, dialogue) for dialogue in dialogues)
    return np.array([entry.rows[t] for entry in run for t in sorted(entry.rows)])


def chats() -> list[Dialogue]:
    return [dialogue for path in (CHATS, CHAT) for _, dialogue in read_dialogues(path)]


@pytest.mark.slow
def test_manifest_names_what_labelled(folder: Path, tmp_path: Path) -> None:
    outputs = []
    for runtime in ("auto", "bnb"):
        out = tmp_path / f"{runtime}.jsonl"
        options = ("--runtime", runtime, "--scores", "--threads", "1", "--demos", "0")
        done = cli("label", CHATS, "--bundle", folder, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        assert "bitsandbytes 0." in done.stderr
        assert len(done.stderr.splitlines()) == 3  # nothing of what the libraries have to say
        outputs.append(out.read_bytes())
        manifest = json.loads(Path(f"{out}.manifest.json").read_text())
        assert {"ercbatch", "torch", "transformers", "bitsandbytes"} <= set(manifest)
        assert "onnxruntime" not in manifest
    assert outputs[0] == outputs[1]
    refused = cli("label", CHATS, "--bundle", folder, "--runtime", "onnx")
    assert refused.returncode == 2
    assert "the runtime bnb runs" in refused.stderr


def test_the_sentence_encoder_is_in_the_manifest_where_it_chose_demonstrations(
    folder: Path,
) -> None:
    releases = Labeler(str(folder), demonstrations=1).releases()
    assert {"onnxruntime", "bitsandbytes"} <= set(releases)


def test_it_answers_as_the_float_model_with_the_rounded_weights(
    folder: Path, llama: tuple[PackedModel, SegmentTokenizer], tmp_path: Path
) -> None:
    """What is written is what was rounded; beside that there is the rounding of activations."""
    tensors = load_file(folder / "model.safetensors")
    model, _ = load_causal_lm(str(write_model(tmp_path, "llama")))
    model.model.load_state_dict(llama[0].model.model.state_dict())
    for name, module in model.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is None or not isinstance(module, torch.nn.Linear):
            continue
        if f"{name}.SCB" in tensors:
            module.weight.data = weight * tensors[f"{name}.SCB"][:, None] / 127
        else:
            own = {k: v for k, v in tensors.items() if k.startswith(f"{name}.weight.")}
            parameter = bnb.nn.Params4bit.from_prequantized(weight, own, device="cpu")
            module.weight.data = bnb.functional.dequantize_4bit(weight, parameter.quant_state)
    engine = Labeler(str(folder), threads=1, demonstrations=0).engine
    scorer = TorchScorer(PackedModel(model.eval()), engine.scorer.head)
    result = probabilities(engine, chats())
    expected = probabilities(replace(engine, scorer=scorer), chats())
    assert np.abs(result - expected).mean() < 0.01


def test_it_agrees_with_the_float_model(
    folder: Path, llama: tuple[PackedModel, SegmentTokenizer]
) -> None:
    engine = Labeler(str(folder), threads=1, demonstrations=0).engine
    result = probabilities(engine, chats())
    expected = probabilities(
        replace(engine, scorer=TorchScorer(llama[0], engine.scorer.head)), chats()
    )
    least, most = (0.8, 0.08) if folder.name == "nf4" else (0.9, 0.02)
    assert len(set(expected.argmax(1))) > 3
    assert (result.argmax(1) == expected.argmax(1)).mean() >= least
    assert np.abs(result - expected).mean() < most


def test_a_label_does_not_depend_on_its_neighbours(folder: Path) -> None:
    """On a CPU to what the answer head, which is float32, rounds: see `BnbScorer.states`."""
    chance = random.Random(5)
    words = "it is gone thank you where my door late again happy fridge no !".split()
    dialogues = [
        {"utterances": [{"text": " ".join(chance.choices(words, k=chance.randint(1, 30)))}]}
        for _ in range(24)
    ]
    labeler = Labeler(str(folder), scores=True, threads=1, demonstrations=0)
    allowed = 5e-6 if labeler.engine.scorer.describe().endswith("threads") else 2e-2
    for dialogue, amid in zip(dialogues, list(labeler.label(dialogues)), strict=True):
        alone = next(labeler.label([dialogue]))
        assert alone.labels[0].scores == pytest.approx(amid.labels[0].scores, abs=allowed)


def test_int8_takes_no_columns_out_for_the_outliers_of_others(
    llama: tuple[PackedModel, SegmentTokenizer], tmp_path: Path
) -> None:
    """In a product over a whole pack, as on a GPU, a stranger's outlier rounds nothing of mine."""
    model, _ = llama
    weights = write_bnb(model, tmp_path, "bnb-int8")
    scorer = BnbScorer(tmp_path / "config.json", weights, model.answer_head([1, 2]), threads=1)
    product = scorer._model.model.model.layers[0].mlp.down_proj
    mine = torch.randn((20, 128), generator=torch.Generator().manual_seed(1))
    outlier = torch.zeros((1, 128))
    outlier[0, :64] = 100.0

    def moves() -> bool:
        with torch.inference_mode():
            return not torch.equal(product(mine), product(torch.cat([mine, outlier]))[:-1])

    assert not moves()
    product.state.threshold = 6.0  # LLM.int8's own
    assert moves()


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_split_undoes_join_and_graft(shared: int) -> None:
    trees = []
    for owner, length in enumerate((5, 4, 9)):
        branch = Segment([7, 8], read=Read(Question(Task.EMOTION, 0), 0))
        trees.append((owner, lay_out(Segment(list(range(length)), [(length - 1, branch)]))))
    parts = list(split(graft(trees, shared) if shared else join(trees)))
    assert len(parts) == 3
    for part, pair in zip(parts, trees, strict=True):
        whole = join([pair])
        assert part.reads == whole.reads
        for name in ("tokens", "positions", "ends"):
            assert np.array_equal(getattr(part, name), getattr(whole, name))


def test_weights_may_lie_in_several_files(folder: Path, tmp_path: Path) -> None:
    def divide(part: Path) -> None:
        tensors = load_file(part / "model.safetensors")
        (part / "model.safetensors").unlink()
        names = sorted(tensors)
        for number, few in enumerate((names[:9], names[9:]), start=1):
            path = part / f"model-{number:05}-of-00002.safetensors"
            save_tensors({name: tensors[name] for name in few}, path)

    def emotions(path: Path) -> list[Any]:
        dialogues = [dialogue for _, dialogue in read_dialogues(CHATS)]
        return [labeled.labels for labeled in Labeler(str(path), threads=1).label(dialogues)]

    assert emotions(altered(folder, tmp_path / "two", divide)) == emotions(folder)


def test_an_altered_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders["nf4"], copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    done = cli("label", CHATS, "--bundle", copy)
    assert done.returncode == 4
    assert "model.safetensors: altered" in done.stderr


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation", "attn_implementation"])
def test_a_config_that_asks_for_code_is_refused(
    folders: dict[str, Path], tmp_path: Path, key: str
) -> None:
    def ask(part: Path) -> None:
        value = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps({**value, key: "someone/else"}))

    with pytest.raises(BundleError, match=f"config.json has '{key}', which asks to run code"):
        Labeler(str(altered(folders["nf4"], tmp_path / "asks", ask)))


def _cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Kernels read a matrix's scales without asking how many there are."""
    tensors[name] = tensors[name][:-1].clone()


def _scales(tensors: dict[str, torch.Tensor]) -> str:
    return next(n for n in tensors if n.endswith(("gate_proj.weight.absmax", "gate_proj.SCB")))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: ['model.norm.weight']"),
        (lambda t: t.update(extra=torch.ones(2)), "unknown: ['extra']"),
        (lambda t: _cut(t, "model.norm.weight"), "size mismatch for model.norm.weight"),
        (lambda t: _cut(t, "model.layers.0.mlp.gate_proj.weight"), "weight is torch."),
        (lambda t: _cut(t, _scales(t)), ", not torch."),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    folder: Path, tmp_path: Path, harm: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    def alter(part: Path) -> None:
        tensors = load_file(part / "model.safetensors")
        harm(tensors)
        save_tensors(tensors, part / "model.safetensors")

    with pytest.raises(BundleError) as refused:
        Labeler(str(altered(folder, tmp_path / "harmed", alter)))
    assert words in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["bitsandbytes", "torch", "transformers", "accelerate"])
def test_a_missing_package_is_named_with_what_to_install(
    folders: dict[str, Path], package: str
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from ercbatch.cli import main; main(['label', {str(CHATS)!r}, '--bundle', "
        f"{str(folders['nf4'])!r}])"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert package in done.stderr
    assert done.stderr.endswith("pip install '.[bnb]' in a checkout of ercbatch\n")


@pytest.mark.slow
def test_nothing_is_fetched_where_the_package_kernels_is_installed(tmp_path: Path) -> None:
    """Bitsandbytes itself would, on a processor with AVX512-BF16: see `import_bitsandbytes`."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__): print('fetched')\n")
    done = python(
        "-c",
        "import ercbatch.scoring.bnb_scorer, kernels; print(kernels.__name__)",
        PYTHONPATH=str(tmp_path),
    )
    assert (done.returncode, done.stdout) == (0, "kernels\n"), done.stderr


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bert", "bloom", "gemma3_text", "gpt2", "phi", "qwen3"])
def test_other_architectures_are_written_and_read(kind: str, form: str, tmp_path: Path) -> None:
    """Tied and untied output embeddings, GPT-2's transposed matrices, matrices left in bfloat16."""
    model, _ = load_causal_lm(str(write_model(tmp_path / "model", kind)))
    packed = PackedModel(model.eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = write_bnb(packed, tmp_path, form)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    scorer = BnbScorer(tmp_path / "config.json", weights, packed.answer_head(range(9)), threads=1)
    trunk = Segment(list(range(20, 40)), read=Read(Question(Task.EMOTION, 0), 0))
    pack = join([(0, lay_out(trunk))])
    (result,), (expected,) = scorer.states(pack), TorchScorer(packed, range(9)).states(pack)
    cosine = result @ expected / np.linalg.norm(result) / np.linalg.norm(expected)
    assert cosine > (0.9 if form == "nf4" else 0.99)


def test_a_model_without_a_matrix_for_nf4_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    model = PackedModel(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UsageError, match="take --quantize bnb-int8"):
        write_bnb(model, tmp_path, "nf4")
    assert write_bnb(model, tmp_path, "bnb-int8") == [tmp_path / "model.safetensors"]
