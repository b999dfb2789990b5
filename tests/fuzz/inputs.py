"""What is thrown at a node and at an edge: any message of the contract, and any damage to the bytes of a good one.

Knows protobuf's descriptors and bytes; nothing of what messages mean. A field that the contract gains is thrown too.
"""

import math
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from isthmus.wire.gen import backbone_pb2 as pb

Sent = TypeVar("Sent", bound=Message)

MOST = 4
"""Elements of a repeated field."""
DEPTH = 4
KINDS = ("flip", "cut", "drop", "repeat", "swap", "noise", "lengthen", "splice")

_whole = st.one_of(st.integers(0, 40), st.sampled_from((2**31 - 1, 2**32 - 1)), st.integers(0, 2**32 - 1))
_long = st.one_of(_whole, st.sampled_from((2**62, 2**63 - 1, 2**63, 2**64 - 1)), st.integers(0, 2**64 - 1))
_real = st.one_of(st.floats(), st.sampled_from((math.nan, math.inf, -math.inf, -0.0, 5e-324)))
_words = ("none", "bf16", "fp16", "int8", "zstd", "float32", "bfloat16", "int64", "tap", "lora", "self_attn.q_proj")
_text = st.one_of(
    st.sampled_from(_words), st.text(max_size=40), st.sampled_from(("../../etc/passwd", "x" * 5000, "\0"))
)
_bytes = st.one_of(st.binary(max_size=80), st.integers(0, 3000).map(bytes))
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_UINT32: _whole,
    FieldDescriptor.TYPE_UINT64: _long,
    FieldDescriptor.TYPE_FIXED64: _long,
    FieldDescriptor.TYPE_DOUBLE: _real,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_BYTES: _bytes,
}


def messages() -> dict[str, type[Message]]:
    """Every message of the contract by its name."""
    return {name: getattr(pb, name) for name in sorted(pb.DESCRIPTOR.message_types_by_name)}


def any_message(kind: type[Sent]) -> st.SearchStrategy[Sent]:
    """Any value of a message: each field absent, or of its type."""
    return _fields(kind.DESCRIPTOR, DEPTH).map(lambda fields: kind(**fields))


@cache
def _fields(descriptor: Descriptor, depth: int) -> st.SearchStrategy[dict[str, Any]]:
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if field.message_type is None or depth:
            one = _field(field, depth)
            strategies[field.name] = st.lists(one, max_size=MOST) if field.is_repeated else one
    oneofs = [[field.name for field in group.fields] for group in descriptor.oneofs]
    optional = st.fixed_dictionaries({}, optional=strategies)
    return st.tuples(optional, st.integers(0, 1 << 20)).map(lambda drawn: _one_of_each(*drawn, oneofs))


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return _fields(field.message_type, depth - 1)
    if field.enum_type is not None:
        return st.one_of(st.sampled_from(range(len(field.enum_type.values))), st.integers(0, 2**31 - 1))
    return _SCALARS[field.type]


def _one_of_each(fields: dict[str, Any], chosen: int, oneofs: list[list[str]]) -> dict[str, Any]:
    """Of fields that exclude each other one at most, none of them always the same."""
    for names in oneofs:
        given = [name for name in names if name in fields]
        for name in given:
            if name != given[chosen % len(given)]:
                del fields[name]
    return fields


def damage() -> st.SearchStrategy[list[tuple[str, int, int, int]]]:
    """What to do to frames or a file, in order: how, to which, where, and with what."""
    number = st.integers(0, 1 << 20)
    return st.lists(st.tuples(st.sampled_from(KINDS), number, number, st.integers(1, 255)), min_size=1, max_size=4)


def damaged(parts: list[bytes], changes: list[tuple[str, int, int, int]]) -> list[bytes]:
    """The same with these changes."""
    parts = list(parts)
    for kind, which, where, value in changes:
        if parts:
            _damage(parts, kind, which % len(parts), where, value)
    return parts


def _damage(parts: list[bytes], kind: str, index: int, where: int, value: int) -> None:
    part = bytearray(parts[index])
    # Headers stand at the front: half of the places are among the first bytes.
    place = (where % min(len(part), 120) if where % 2 else where % len(part)) if part else 0
    other = where % len(parts)
    match kind:
        case "flip" if part:
            part[place] ^= value
            parts[index] = bytes(part)
        case "cut":
            parts[index] = bytes(part[:place])
        case "lengthen":
            parts[index] = bytes(part) + bytes((value * step) % 256 for step in range(value))
        case "noise":
            parts[index] = bytes((where + value * step) % 256 for step in range(value))
        case "splice":
            parts[index] = bytes(part[:place]) + parts[other][place:]
        case "drop" if len(parts) > 1:
            del parts[index]
        case "repeat":
            parts.insert(other, bytes(part))
        case "swap":
            parts[index], parts[other] = parts[other], parts[index]
