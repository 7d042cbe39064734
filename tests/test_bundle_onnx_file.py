"""A graph from a stranger names no operators of others and no files but the bundle's."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from conftest import EXAMPLES, cli, sign
from helpers.onnx_graphs import (
    WEIGHTS,
    choice,
    constant,
    default_graph,
    everything,
    external,
    function,
    graph_of,
    model_of,
    node,
    requests_of,
    sparse,
)

from ercbatch.bundle.bundle import find_bundle
from ercbatch.bundle.manifest import MODEL
from ercbatch.bundle.onnx_file import check_onnx, read_onnx
from ercbatch.errors import BundleError
from ercbatch.scoring.sessions import open_session


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for a graph, with the 32 bytes of its external data beside it."""
    (tmp_path / WEIGHTS).write_bytes(bytes(32))
    return tmp_path / "model.onnx"


def test_what_bundles_need_passes(path: Path) -> None:
    onnx.save(everything(), path)
    check_onnx(path, [WEIGHTS])
    requests = read_onnx(path)
    assert requests.domains == {"", "ai.onnx", "com.microsoft"}
    assert {data.offset for data in requests.external} == {0, 1, 2, 3, 5, 6, 7, 16}
    assert requests == requests_of(onnx.load(path, load_external_data=False))


@pytest.mark.parametrize("name", ["model.onnx", "encoder.onnx"])
def test_the_graphs_of_the_packaged_bundle_pass(name: str) -> None:
    path = find_bundle("mini") / name
    check_onnx(path)
    assert read_onnx(path) == requests_of(onnx.load(path))


FOREIGN = {
    "import": model_of(graph_of(node()), "evil.ops"),
    "node": model_of(graph_of(node("evil.ops"))),
    "subgraph": model_of(graph_of(choice(graph_of(choice(graph_of(node("evil.ops"))))))),
    "graphs": model_of(graph_of(node(bodies=[graph_of(node()), graph_of(node("evil.ops"))]))),
    "function": model_of(graph_of(node()), functions=[function("evil.ops", node())]),
    "function's node": model_of(graph_of(node()), functions=[function("", node("evil.ops"))]),
    "function's import": model_of(
        graph_of(node()), functions=[function("", node(), imports="evil.ops")]
    ),
    "function's default": model_of(
        graph_of(node()), functions=[default_graph(graph_of(node("evil.ops")))]
    ),
}


@pytest.mark.parametrize("place", FOREIGN)
def test_a_foreign_domain_is_refused_wherever_it_stands(path: Path, place: str) -> None:
    onnx.save(FOREIGN[place], path)
    with pytest.raises(BundleError, match=r"model\.onnx: needs operators .* 'evil\.ops'.*export"):
        check_onnx(path, [WEIGHTS])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_node_without_an_input_that_it_needs_is_refused(path: Path, missing: int) -> None:
    """ONNX Runtime crashes on some of them."""
    inputs = ["x", "y", "z"]
    inputs[missing] = ""
    normalized = onnx.helper.make_node("LayerNormalization", inputs, ["out"])
    onnx.save(model_of(graph_of(choice(graph_of(normalized)))), path)
    with pytest.raises(BundleError, match="without one of its inputs"):
        check_onnx(path)
    onnx.save(model_of(graph_of(onnx.helper.make_node("Clip", inputs, ["out"]))), path)
    if missing:
        check_onnx(path)
    else:
        with pytest.raises(BundleError, match="without one of its inputs"):
            check_onnx(path)


@pytest.mark.parametrize(
    ("domain", "name"),
    [("", "Loop"), ("ai.onnx", "Scan"), ("com.microsoft", "BeamSearch"), ("com.microsoft", "Add")],
)
def test_an_operator_that_no_bundle_needs_is_refused(path: Path, domain: str, name: str) -> None:
    """An endless loop would heed no signal."""
    repeated = onnx.helper.make_node(name, ["x"], ["y"], domain=domain)
    onnx.save(model_of(graph_of(choice(graph_of(repeated)))), path)
    with pytest.raises(BundleError, match=f"has the operator '{name}', which no bundle needs"):
        check_onnx(path)
    # A function of that name, in the file, may be the operator to ONNX Runtime all the same.
    named = onnx.helper.make_function(
        "", name, ["x"], ["y"], [node()], [onnx.helper.make_opsetid("", 17)]
    )
    onnx.save(model_of(graph_of(repeated), functions=[named]), path)
    with pytest.raises(BundleError, match="which no bundle needs"):
        check_onnx(path)


def test_only_the_exact_domains_are_known(path: Path) -> None:
    for domain in ("com.microsoft.nchwc", "ai.onnx.ml", "COM.MICROSOFT", "ai.onnx\0", "\x1b[2J"):
        onnx.save(model_of(graph_of(node(domain))), path)
        with pytest.raises(BundleError, match="needs operators") as refused:
            check_onnx(path)
        assert str(refused.value).isprintable()


OUTSIDE = [
    "../model.onnx.data",
    "./model.onnx.data",
    "/etc/passwd",
    "other.data",
    "model.onnx",
    "model.onnx.data\0",
    "",
    # ONNX Runtime's own mark of weights that stand in memory, at the address "offset".
    "*/_ORT_MEM_ADDR_/*",
]


@pytest.mark.parametrize("location", OUTSIDE)
def test_external_data_outside_the_listed_files_is_refused(path: Path, location: str) -> None:
    tensor = external(location)
    places = [
        graph_of(node(), initializer=[tensor]),
        graph_of(node(), sparse_initializer=[sparse(tensor)]),
        graph_of(constant(tensor)),
        graph_of(choice(graph_of(node(more=[tensor])))),
    ]
    for graph in places:
        onnx.save(model_of(graph), path)
        with pytest.raises(BundleError, match=r"reads weights from .*do not use this bundle"):
            check_onnx(path, [WEIGHTS])


def test_a_tensor_that_does_not_say_that_its_data_is_external_is_checked_too(path: Path) -> None:
    """Protobuf cuts an enum to 32 bits, so 2**32 + 1 may read as EXTERNAL: it is not looked at."""
    tensor = external("/etc/passwd")
    tensor.ClearField("data_location")
    onnx.save(model_of(graph_of(node(), initializer=[tensor])), path)
    with pytest.raises(BundleError, match="reads weights from"):
        check_onnx(path, [WEIGHTS])


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "33"},
        {"offset": "16", "length": "17"},
        {"length": "33"},
        {"offset": "9" * 200, "length": "9" * 200},
    ],
)
def test_external_data_beyond_its_file_is_refused(path: Path, entries: dict[str, str]) -> None:
    onnx.save(model_of(graph_of(node(), initializer=[external(**entries)])), path)
    with pytest.raises(BundleError, match=r"of 'model\.onnx\.data', which has 32 bytes: get"):
        check_onnx(path, [WEIGHTS])


def test_external_data_up_to_the_end_passes_and_a_missing_file_does_not(path: Path) -> None:
    tensors = [external(offset="32"), external(offset="16", length="16")]
    onnx.save(model_of(graph_of(node(), initializer=tensors)), path)
    check_onnx(path, [WEIGHTS])
    (path.parent / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        check_onnx(path, [WEIGHTS])


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (external(offset="-1"), "the offset '-1'"),
        (external(offset="1_0"), "the offset '1_0'"),
        (external(length="٣"), "the length '\\\\u0663'"),
        (external(None, offset="1"), "without a location"),
        (external(prepacked_1="k|0;99;0"), "the entry 'prepacked_1'"),
        (external("x" * 256), "a name of 256 bytes"),
    ],
)
def test_odd_external_data_is_refused(path: Path, tensor: onnx.TensorProto, words: str) -> None:
    onnx.save(model_of(graph_of(node(), initializer=[tensor])), path)
    with pytest.raises(BundleError, match=f"not a sound ONNX file .*{words}"):
        check_onnx(path, [WEIGHTS])


def test_a_bundle_with_operators_of_others_ends_with_4(tmp_path: Path) -> None:
    """Its digests are right: they only say that the file is the one that its writer meant."""
    folder = tmp_path / "evil"
    shutil.copytree(find_bundle("mini"), folder)
    for name in (MODEL, "encoder.onnx"):
        model = onnx.load(folder / name)
        model.graph.node.add(op_type="Run", domain="evil.ops")
        onnx.save(model, folder / name)
        sign(folder)
        done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", folder, "--demos", "1")
        assert (done.returncode, done.stdout) == (4, "")
        assert f"{name}: needs operators of the domain 'evil.ops'" in done.stderr
        assert "do not use this bundle" in done.stderr
        shutil.copyfile(find_bundle("mini") / name, folder / name)


def test_a_bundle_labels_with_its_external_data_only_when_it_lists_it(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(find_bundle("mini"), folder)
    onnx.save(
        onnx.load(folder / MODEL), folder / MODEL, save_as_external_data=True, location=WEIGHTS
    )
    sign(folder)
    chat = EXAMPLES / "group_chat.jsonl"
    done = cli("label", chat, "--bundle", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == cli("label", chat, "--bundle", "mini").stdout
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    sign(folder)
    (folder / WEIGHTS).write_bytes(weights)
    refused = cli("label", chat, "--bundle", folder)
    assert refused.returncode == 4
    assert "reads weights from 'model.onnx.data'" in refused.stderr


def test_no_session_is_made_of_an_unchecked_file(path: Path) -> None:
    onnx.save(model_of(graph_of(node(), initializer=[external()])), path)
    with pytest.raises(BundleError, match="reads weights from"):
        open_session(path, 1)
    open_session(path, 1, [WEIGHTS])
