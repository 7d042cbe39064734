"""A graph from a stranger names no operators of others and no files but the bundle's."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import EXAMPLES, cli
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from ercbatch.bundle import MODEL, find_bundle
from ercbatch.errors import BundleError
from ercbatch.onnx_file import _MESSAGES, ExternalData, OnnxRequests, check_onnx, read_onnx
from ercbatch.onnx_scorer import open_session

WEIGHTS = "model.onnx.data"
FLOAT = onnx.TensorProto.FLOAT


def external(location: str | None = WEIGHTS, **entries: str) -> onnx.TensorProto:
    """Four floats in another file."""
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=FLOAT, data_location="EXTERNAL")
    for key, value in {"location": location, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(values: onnx.TensorProto) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(4))
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[9])


def graph_of(*nodes: onnx.NodeProto, **parts: Any) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, FLOAT, [4]) for name in "xy"]
    return helper.make_graph([*nodes], "graph", values[:1], values[1:], **parts)


def model_of(graph: onnx.GraphProto, *imports: str, **parts: Any) -> onnx.ModelProto:
    opsets = [helper.make_opsetid(domain, 17 if not domain else 1) for domain in ("", *imports)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **parts)


def node(domain: str | None = None, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Relu", ["x"], ["y"], domain=domain, **attributes)


def choice(branch: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=graph_of(node()))


def constant(value: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["k"], value=value)


def function(domain: str, *nodes: onnx.NodeProto, imports: str = "") -> onnx.FunctionProto:
    opsets = [helper.make_opsetid(imports, 17)]
    return helper.make_function(domain, "twice", ["x"], ["y"], list(nodes), opsets)


def default_graph(graph: onnx.GraphProto) -> onnx.FunctionProto:
    """A function whose attribute has a graph for its default."""
    made = function("com.microsoft", node())
    made.attribute_proto.append(helper.make_attribute("body", graph))
    return made


def everything() -> onnx.ModelProto:
    """A model with something in every place that is looked at."""
    nodes = [
        choice(graph_of(choice(graph_of(node("com.microsoft"), constant(external(offset="16")))))),
        helper.make_node("Many", [], ["m"], graphs=[graph_of(node("ai.onnx"))]),
        helper.make_node("Some", [], ["n"], tensors=[external(length="4")]),
        helper.make_node("Sparse", [], ["o"], sparse_value=sparse(external(offset="1"))),
    ]
    nodes[-1].attribute.append(helper.make_attribute("more", [sparse(external(offset="2"))]))
    graph = graph_of(
        *nodes,
        initializer=[external(offset="0", length="16", checksum="0" * 40)],
        sparse_initializer=[sparse(external(offset="3"))],
    )
    model = model_of(
        graph,
        "com.microsoft",
        functions=[
            function("com.microsoft", node("ai.onnx"), constant(external(offset="5"))),
            default_graph(graph_of(node(), initializer=[external(offset="6")])),
        ],
    )
    model.training_info.add().algorithm.CopyFrom(graph_of(initializer=[external(offset="7")]))
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for a graph, with the 32 bytes of its external data beside it."""
    (tmp_path / WEIGHTS).write_bytes(bytes(32))
    return tmp_path / "model.onnx"


def words(value: str | bytes) -> str:
    """A protobuf string: bytes where it is not UTF-8."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def messages(message: Message) -> Iterator[Message]:
    """A message and all inside it, in whatever field."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def requests_of(model: onnx.ModelProto) -> OnnxRequests:
    """The same as `read_onnx`, from what the `onnx` package has read."""
    domains, found = set(), set()
    for message in messages(model):
        if isinstance(message, onnx.NodeProto | onnx.OperatorSetIdProto | onnx.FunctionProto):
            if message.HasField("domain"):
                domains.add(words(message.domain))
        elif isinstance(message, onnx.TensorProto) and message.external_data:
            entries = {words(e.key): words(e.value) for e in message.external_data}
            length = entries.get("length")
            data = ExternalData(
                entries["location"],
                int(entries.get("offset", 0)),
                None if length is None else int(length),
            )
            found.add(data)
    return OnnxRequests(frozenset(domains), frozenset(found))


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


def twice(number: int, *contents: bytes) -> bytes:
    """A field of bytes with each of these contents, all shorter than 128."""
    return b"".join(bytes([number << 3 | 2, len(content)]) + content for content in contents)


def nested(depth: int) -> bytes:
    """Graphs in attributes of nodes in graphs."""
    tags, inner = (6, 5, 1), b""  # AttributeProto.g, NodeProto.attribute, GraphProto.node
    for level in range(depth):
        inner = varint(tags[level % 3] << 3 | 2) + varint(len(inner)) + inner
    return varint(7 << 3 | 2) + varint(len(inner)) + inner  # ModelProto.graph


def varint(value: int) -> bytes:
    """As protobuf writes it."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x3a", "cut short or too long"),
        (b"\x3a\x05abc", "cut short"),
        (b"\x0d\x00", "cut short"),
        (b"\x09\x00", "cut short"),
        (b"\x08" + b"\x80" * 10 + b"\x00", "cut short or too long"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "cut short"),
        (b"\x02\x00", "no field has the tag"),
        (varint(2**32 + (7 << 3 | 2)) + b"\x00", "no field has the tag"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x38\x00", r"ModelProto\.graph in wire type 0"),
        # Protobuf's readers merge messages and keep the last string.
        (twice(7, b"", b""), r"a second ModelProto\.graph"),
        (twice(8, twice(1, b"evil", b"")), r"a second OperatorSetIdProto\.domain"),
        (
            twice(7, twice(5, twice(13, *[twice(1, b"location") + twice(2, b"a")] * 2))),
            "a second 'location' of a tensor",
        ),
        (nested(99), "more than 100 messages inside each other"),
        (nested(30_000), "more than 100 messages inside each other"),
    ],
)
def test_what_is_not_an_onnx_file_is_refused(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"model\.onnx: not a sound ONNX file .*{words}.*get"):
        check_onnx(path)


def test_what_protobuf_reads_as_deep_is_read(path: Path) -> None:
    path.write_bytes(nested(98))
    assert read_onnx(path) == requests_of(onnx.load(path))


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(BundleError, match="cannot be read"):
            check_onnx(path)


def test_every_field_that_leads_to_a_request_is_known() -> None:
    """Also those that a later `onnx` may add: the numbers are held against its own."""
    wanted = {
        ("NodeProto", "domain"),
        ("OperatorSetIdProto", "domain"),
        ("FunctionProto", "domain"),
        ("TensorProto", "external_data"),
        ("StringStringEntryProto", "key"),
        ("StringStringEntryProto", "value"),
    }
    types = {d.name: d for d in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()}
    leading = {"NodeProto", "OperatorSetIdProto", "FunctionProto", "TensorProto"}
    size = 0
    while size != len(leading):
        size = len(leading)
        for name, descriptor in types.items():
            inner = {f.message_type.name for f in descriptor.fields if f.message_type}
            if inner & leading:
                leading.add(name)
    expected: dict[str, dict[int, tuple[str, str, bool]]] = {}
    for name in leading | {"StringStringEntryProto"}:
        for field in types[name].fields:
            kind = field.message_type.name if field.message_type else "string"
            if kind in leading or (name, field.name) in wanted:
                known = expected.setdefault(name, {})
                known[field.number] = (field.name, kind, field.is_repeated)
    assert expected == _MESSAGES


REAL = everything().SerializeToString()


def read_bytes(data: bytes) -> OnnxRequests | None:
    """What a file of these bytes asks for; None: refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(data)
        try:
            return read_onnx(path)
        except BundleError:
            return None


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real graph with bytes flipped, cut out, put in, or copied elsewhere."""
    data = bytearray(REAL)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        stop = min(len(data), at + draw(st.integers(1, 40)))
        match draw(st.sampled_from(["flip", "cut", "truncate", "insert", "copy"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:stop]
            case "truncate":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "copy":
                to = draw(st.integers(0, len(data)))
                data[to:to] = data[at:stop]
        if not data:
            break
    return bytes(data)


pieces = st.one_of(
    st.sampled_from([varint(n << 3 | 2) for n in (1, 5, 6, 7, 8, 10, 11, 13, 15, 20, 22, 25)]),
    st.integers(0, 40).map(lambda n: bytes([n])),
    st.binary(max_size=3),
)
soups = st.lists(pieces, max_size=60).map(b"".join)


@settings(max_examples=300, deadline=2000)
@given(st.one_of(st.binary(max_size=300), soups, mutated()))
@example(b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x7f")
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(data: bytes) -> None:
    """Nothing but BundleError is raised, and no request that protobuf sees is missed."""
    requests = read_bytes(data)
    if requests is not None:
        try:
            model = onnx.ModelProto.FromString(data)
        except DecodeError:  # in a part that is not looked at here
            return
        assert requests == requests_of(model)


names = st.sampled_from(["", "ai.onnx", "com.microsoft", "evil.ops", "ops", "日本", "x" * 200])
externals = st.builds(
    external,
    st.sampled_from([WEIGHTS, "../up", "/abs", "日本.data"]),
    offset=st.none() | st.integers(0, 2**64).map(str),
    length=st.none() | st.integers(0, 2**64).map(str),
)
within = numpy_helper.from_array(np.zeros(300, np.float32), "z")
tensors = st.just(within) | externals
sparse_tensors = st.builds(sparse, tensors)


def graphs(inner: st.SearchStrategy[onnx.GraphProto]) -> st.SearchStrategy[onnx.GraphProto]:
    """Graphs whose nodes have attributes of every kind, some with a graph of `inner`."""
    values = st.one_of(
        st.integers(-(2**63), 2**63 - 1),
        st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=3),
        st.lists(st.text(max_size=3), min_size=1, max_size=3),
        st.lists(tensors, min_size=1, max_size=2),
        st.lists(sparse_tensors, min_size=1, max_size=2),
        st.lists(inner, min_size=1, max_size=2),
        tensors,
        sparse_tensors,
        inner,
    )
    nodes = st.builds(
        lambda domain, attributes: node(domain, **attributes),
        st.none() | names,
        st.dictionaries(st.sampled_from("abc"), values, max_size=2),
    )
    return st.builds(
        lambda nodes, **parts: graph_of(*nodes, **parts),
        st.lists(nodes, max_size=3),
        initializer=st.lists(tensors, max_size=2),
        sparse_initializer=st.lists(sparse_tensors, max_size=1),
        doc_string=st.text(max_size=200),
    )


models = st.builds(
    lambda graph, imports, functions: model_of(graph, *imports, functions=functions),
    st.recursive(graphs(st.just(graph_of(node()))), graphs, max_leaves=4),
    st.lists(names, max_size=2),
    st.lists(
        st.builds(
            lambda domain, body, imports: function(domain, *body.node, imports=imports),
            names,
            graphs(st.just(graph_of(node("ops")))),
            names,
        ),
        max_size=2,
        unique_by=lambda f: f.domain,
    ),
)


@settings(max_examples=100, deadline=None)
@given(models)
def test_any_graph_is_read_as_onnx_reads_it(model: onnx.ModelProto) -> None:
    assert read_bytes(model.SerializeToString()) == requests_of(model)


def write_digests(folder: Path) -> None:
    """Make `bundle.json` list the files of a folder as they are."""
    value = json.loads((folder / "bundle.json").read_bytes())
    value["files"] = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
        if p.name != "bundle.json"
    }
    (folder / "bundle.json").write_text(json.dumps(value))


def test_a_bundle_with_operators_of_others_ends_with_4(tmp_path: Path) -> None:
    """Its digests are right: they only say that the file is the one that its writer meant."""
    folder = tmp_path / "evil"
    shutil.copytree(find_bundle("mini"), folder)
    for name in (MODEL, "encoder.onnx"):
        model = onnx.load(folder / name)
        model.graph.node.add(op_type="Run", domain="evil.ops")
        onnx.save(model, folder / name)
        write_digests(folder)
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
    write_digests(folder)
    chat = EXAMPLES / "group_chat.jsonl"
    done = cli("label", chat, "--bundle", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == cli("label", chat, "--bundle", "mini").stdout
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    write_digests(folder)
    (folder / WEIGHTS).write_bytes(weights)
    refused = cli("label", chat, "--bundle", folder)
    assert refused.returncode == 4
    assert "reads weights from 'model.onnx.data'" in refused.stderr


def test_no_session_is_made_of_an_unchecked_file(path: Path) -> None:
    onnx.save(model_of(graph_of(node(), initializer=[external()])), path)
    with pytest.raises(BundleError, match="reads weights from"):
        open_session(path, 1)
    open_session(path, 1, [WEIGHTS])
