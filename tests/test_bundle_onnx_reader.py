"""The reader of ONNX files against protobuf's own: any bytes are read alike, or refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from helpers.onnx_graphs import (
    WEIGHTS,
    everything,
    external,
    function,
    graph_of,
    model_of,
    node,
    requests_of,
    sparse,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from ercbatch.bundle.onnx_file import _MESSAGES, OnnxRequests, check_onnx, read_onnx
from ercbatch.errors import BundleError


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
def test_what_is_not_an_onnx_file_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"model\.onnx: not a sound ONNX file .*{words}.*get"):
        check_onnx(path)


def test_what_protobuf_reads_as_deep_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
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
        ("NodeProto", "input"),
        ("NodeProto", "op_type"),
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
