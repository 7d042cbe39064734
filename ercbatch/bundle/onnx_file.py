"""What an ONNX file asks for, found out before ONNX Runtime parses it.

A graph is data, but it names operators, which may be some library's own code, and files to read
weights from. Both are read here from the file itself, so the wheel needs no `onnx`. Of protobuf's
wire format (https://protobuf.dev/programming-guides/encoding) only tags and lengths are followed,
over a memory map: weights are never touched, and the time goes with the number of fields.

Where protobuf is lenient, two readers may see two different files. So what no writer of ONNX
produces is refused: groups, a known field in another wire type, a singular field given twice.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ercbatch.errors import BundleError

DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Operator domains that ONNX Runtime has built in and bundles use; the first two are the same."""

OPERATORS = {
    "": frozenset(
        """
        Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum
        DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten
        Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish
        Identity If IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul
        MatMulInteger Max Mean Min Mod Mul Neg Not OneHot Or Pad Pow QuantizeLinear RMSNormalization
        Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign
        SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum
        Swish Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
        """.split()
    ),
    "com.microsoft": frozenset(
        """
        BiasGelu DynamicQuantizeMatMul FastGelu FusedMatMul Gelu GroupQueryAttention
        MatMulIntegerToFloat MatMulNBits QuickGelu RotaryEmbedding SkipLayerNormalization
        SkipSimplifiedLayerNormalization
        """.split()
    ),
}
"""What a language model's graph is made of, by domain. None of them repeats a subgraph (an endless
`Loop` heeds no signal), and what no graph needs is native code that no graph reaches."""

_ADVICE = "get the bundle again, or export it again"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types."""
_HIGHEST_TAG = 2**32 - 1
_VARINT_BITS = 70
"""Ten bytes of seven: enough for 64 bits."""
_MAX_DEPTH = 100
"""Messages inside each other; protobuf's own readers stop there."""
_LONGEST_NAME = 255
"""Bytes of a domain, or of a key or value of external data; a file's name is no longer."""


class _Field(NamedTuple):
    name: str
    type: str
    repeated: bool = False


_MESSAGES = {
    "ModelProto": {
        7: _Field("graph", "GraphProto"),
        8: _Field("opset_import", "OperatorSetIdProto", repeated=True),
        20: _Field("training_info", "TrainingInfoProto", repeated=True),
        25: _Field("functions", "FunctionProto", repeated=True),
    },
    "OperatorSetIdProto": {1: _Field("domain", "string")},
    "TrainingInfoProto": {
        1: _Field("initialization", "GraphProto"),
        2: _Field("algorithm", "GraphProto"),
    },
    "FunctionProto": {
        7: _Field("node", "NodeProto", repeated=True),
        9: _Field("opset_import", "OperatorSetIdProto", repeated=True),
        10: _Field("domain", "string"),
        11: _Field("attribute_proto", "AttributeProto", repeated=True),
    },
    "GraphProto": {
        1: _Field("node", "NodeProto", repeated=True),
        5: _Field("initializer", "TensorProto", repeated=True),
        15: _Field("sparse_initializer", "SparseTensorProto", repeated=True),
    },
    "NodeProto": {
        1: _Field("input", "string", repeated=True),
        4: _Field("op_type", "string"),
        5: _Field("attribute", "AttributeProto", repeated=True),
        7: _Field("domain", "string"),
    },
    "AttributeProto": {
        5: _Field("t", "TensorProto"),
        6: _Field("g", "GraphProto"),
        10: _Field("tensors", "TensorProto", repeated=True),
        11: _Field("graphs", "GraphProto", repeated=True),
        22: _Field("sparse_tensor", "SparseTensorProto"),
        23: _Field("sparse_tensors", "SparseTensorProto", repeated=True),
    },
    "SparseTensorProto": {
        1: _Field("values", "TensorProto"),
        2: _Field("indices", "TensorProto"),
    },
    "TensorProto": {13: _Field("external_data", "StringStringEntryProto", repeated=True)},
    "StringStringEntryProto": {1: _Field("key", "string"), 2: _Field("value", "string")},
}
"""Of onnx.proto (https://github.com/onnx/onnx, 1.23), all fields that lead to operator domains or
external data, by their numbers; and of nodes those by which inputs are missing."""
_OPTIONAL = {
    "Clip": {1, 2},
    "Dropout": {1, 2},
    "MatMulNBits": {3, 4},
    "Pad": {2},
}
"""Operators, and which of their inputs may be left out by an empty name. ONNX Runtime 1.32 crashes
where some others are, those of LayerNormalization say, though its bias is optional."""


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor's bytes stand outside the ONNX file."""

    location: str
    """Relative to the folder of the ONNX file, if the file is honest."""
    offset: int = 0
    length: int | None = None
    """None: as many bytes as the tensor's type and shape make."""


@dataclass(frozen=True, slots=True)
class OnnxRequests:
    """What an ONNX file asks for, in its graph, subgraphs and functions."""

    domains: frozenset[str]
    """Of imported operator sets, nodes and functions."""
    operators: frozenset[tuple[str, str]]
    """(domain, name) of all nodes."""
    external: frozenset[ExternalData]
    """Of all tensors that have external data, whether or not they say that it is to be used."""


def check_onnx(path: Path, file_names: Collection[str] = ()) -> None:
    """Refuse an ONNX file that asks for more than built-in operators and the bundle's own files.

    Args:
        path: the ONNX file.
        file_names: names of the files in its folder that may hold its external data.

    Raises:
        BundleError: an operator outside `DOMAINS` or `OPERATORS`, external data outside
            `file_names` or beyond the end of its file, or what `read_onnx` refuses.
    """
    requests = read_onnx(path)
    foreign = requests.domains - DOMAINS
    if foreign:
        raise BundleError(
            f"{path}: needs operators of the domain {min(foreign)!a}, and a bundle has only those "
            "of ONNX and com.microsoft: do not use this bundle, or export it again without them"
        )
    for domain, name in sorted(requests.operators):
        if name not in OPERATORS["" if domain == "ai.onnx" else domain]:
            raise BundleError(
                f"{path}: has the operator {name!a}, which no bundle needs: do not use this "
                "bundle, or export it again without it"
            )
    allowed = frozenset(file_names)
    sizes: dict[str, int] = {}
    for data in requests.external:
        name = data.location
        if name not in allowed:
            raise BundleError(
                f"{path}: reads weights from {name!a}, which is not among the files that belong "
                f"to it: do not use this bundle, or {_ADVICE}"
            )
        if name not in sizes:
            try:
                sizes[name] = (path.parent / name).stat().st_size
            except OSError as error:
                raise BundleError(
                    f"{path}: its weights in {name!a} cannot be read ({error.strerror}): {_ADVICE}"
                ) from error
        end = data.offset + (data.length or 0)
        if end > sizes[name]:
            raise BundleError(
                f"{path}: reads weights up to byte {end:,} of {name!a}, which has "
                f"{sizes[name]:,} bytes: {_ADVICE}"
            )


def read_onnx(path: Path) -> OnnxRequests:
    """Read what an ONNX file asks for, and nothing else of it.

    Raises:
        BundleError: not readable, or not a sound ONNX file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:  # which cannot be mapped
                raise _NotOnnxError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = _Reader(data)
                reader.message("ModelProto", 0, size, 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}: {_ADVICE}") from error
    except _NotOnnxError as error:
        raise BundleError(f"{path}: not a sound ONNX file ({error}): {_ADVICE}") from error
    return OnnxRequests(
        frozenset(reader.domains), frozenset(reader.operators), frozenset(reader.external)
    )


class _NotOnnxError(Exception):
    """Bytes that are not an ONNX file's."""


class _Reader:
    """Collects what the messages between two places of a file ask for."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.domains: set[str] = set()
        self.operators: set[tuple[str, str]] = set()
        self.external: set[ExternalData] = set()

    def message(self, kind: str, at: int, end: int, depth: int) -> dict[str, str]:
        """Read one message, and those inside it; its strings of `_MESSAGES` by name.

        Raises:
            _NotOnnxError: not such a message.
        """
        if depth > _MAX_DEPTH:
            raise _NotOnnxError(f"more than {_MAX_DEPTH} messages inside each other at byte {at:,}")
        fields = _MESSAGES[kind]
        strings: dict[str, str] = {}
        external: dict[str, str] = {}
        seen: set[int] = set()
        missing: list[int] = []
        inputs = 0
        while at < end:
            number, wire, start, stop = self._field(at, end)
            field = fields.get(number)
            if field is not None:
                if wire != _BYTES:
                    raise _NotOnnxError(f"{kind}.{field.name} in wire type {wire} at byte {at:,}")
                if number in seen and not field.repeated:
                    raise _NotOnnxError(f"a second {kind}.{field.name} at byte {at:,}")
                seen.add(number)
                if field.name == "input":
                    if start == stop:
                        missing.append(inputs)
                    inputs += 1
                elif field.type == "string":
                    strings[field.name] = self._string(start, stop)
                else:
                    inner = self.message(field.type, start, stop, depth + 1)
                    if field.name == "external_data":
                        key = inner.get("key", "")
                        if key in external:
                            raise _NotOnnxError(f"a second {key!a} of a tensor at byte {at:,}")
                        external[key] = inner.get("value", "")
            at = stop
        if missing and not _OPTIONAL.get(strings.get("op_type", ""), set()).issuperset(missing):
            raise _NotOnnxError(f"a node without one of its inputs before byte {end:,}")
        if kind == "NodeProto":
            self.operators.add((strings.get("domain", ""), strings.get("op_type", "")))
        if "domain" in strings:
            self.domains.add(strings["domain"])
        if external:
            self.external.add(_external_data(external))
        return strings

    def _field(self, at: int, end: int) -> tuple[int, int, int, int]:
        """(number, wire type, start, stop) of the field at a place: its content, and the next."""
        tag, start = self._varint(at, end)
        number, wire = tag >> 3, tag & 7
        if not number or tag > _HIGHEST_TAG:
            raise _NotOnnxError(f"no field has the tag at byte {at:,}")
        if wire == _BYTES:
            length, start = self._varint(start, end)
            stop = start + length
        elif wire == _VARINT:
            _, stop = self._varint(start, end)
        elif wire == _FIXED32:
            stop = start + 4
        elif wire == _FIXED64:
            stop = start + 8
        else:
            raise _NotOnnxError(f"wire type {wire} at byte {at:,}")
        if stop > end:
            raise _NotOnnxError(f"the field at byte {at:,} is cut short")
        return number, wire, start, stop

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, the place after it) of the integer at a place: 7 bits a byte, lowest first."""
        value = shift = 0
        while at < end and shift < _VARINT_BITS:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise _NotOnnxError(f"the number that ends at byte {at:,} is cut short or too long")

    def _string(self, start: int, stop: int) -> str:
        if stop - start > _LONGEST_NAME:
            raise _NotOnnxError(f"a name of {stop - start:,} bytes at byte {start:,}")
        # Reversible, so that two different names never read the same.
        return self._data[start:stop].decode("utf-8", "surrogateescape")


def _external_data(entries: dict[str, str]) -> ExternalData:
    # ONNX Runtime also reads weights at offsets in "prepacked..." entries, which only its own
    # optimized models have (onnxruntime, core/framework/tensor_external_data_info.cc).
    unknown_keys = entries.keys() - {"location", "offset", "length", "checksum"}
    if unknown_keys:
        raise _NotOnnxError(f"external data with the entry {min(unknown_keys)!a}")
    if "location" not in entries:
        raise _NotOnnxError("external data without a location")
    for key in entries.keys() & {"offset", "length"}:
        if not (entries[key].isascii() and entries[key].isdigit()):
            raise _NotOnnxError(f"external data with the {key} {entries[key]!a}")
    length = entries.get("length")
    return ExternalData(
        entries["location"],
        int(entries.get("offset", 0)),
        None if length is None else int(length),
    )
