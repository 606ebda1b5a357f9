"""Messages to frames and back: one msgpack header, then the bytes of each large array as a frame of its own.

    encode(message) -> [header, array, array, ...]        decode(frames) -> message

The header is [protocol, schema, type name, fields]. A dataclass is the list of its fields in order, so `schema` (a checksum
of every type, field and hint in messages.py) must be equal at both ends. The registry is closed: the dataclasses of
messages.py and nothing else, so that bytes from outside can build no other object. What a field's hint says is what comes
back: tuples stay tuples, numbers under `float` come back as float. Arrays under INLINE_BYTES travel in the header, where a
copy is cheaper than a frame; the others are neither copied here nor there, so nobody may write to an array once it is
in a message. Decoded arrays are writeable and share memory with nobody.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import msgpack
import numpy as np

from weft.transport import messages
from weft.transport.errors import CodecError

PROTOCOL = 1
INLINE_BYTES = 4096  # a ZeroMQ frame costs about 4 us at each end, a copy of 4 KiB 0.2 us (Xeon at 2.5 GHz)
_ARRAY, _TUPLE = 1, 2  # codes of msgpack's extension types
_DTYPES = {
    np.dtype(name).str: np.dtype(name)
    for name in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")
}

Buffer = bytes | bytearray | memoryview
Encoder = Callable[[Any, list[Buffer]], Any]  # (value, frames that it may append to) -> what msgpack packs
Decoder = Callable[[Any, Sequence[Buffer]], Any]

TYPES: Mapping[str, Any] = {
    name: value
    for name, value in vars(messages).items()
    if isinstance(value, type) and value.__module__ == messages.__name__ and dataclasses.is_dataclass(value)
}


def encode(message: object) -> list[Buffer]:
    """Frames of one message. Raises CodecError if it is no message of ours, or a field does not fit its hint."""
    cls = type(message)
    if TYPES.get(cls.__name__) is not cls:
        raise CodecError(f"{cls.__module__}.{cls.__qualname__} is no message: messages.py does not have it")
    frames: list[Buffer] = [b""]
    try:
        fields = _pair(cls)[0](message, frames)
        frames[0] = msgpack.packb([PROTOCOL, _schema(), cls.__name__, fields])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CodecError(f"{cls.__name__} cannot be encoded: {error}") from error
    return frames


def decode(frames: Sequence[Buffer]) -> Any:
    """The message of these frames. Raises CodecError for anything that `encode` of this version did not make."""
    if not frames:
        raise CodecError("no frames")
    try:
        header = msgpack.unpackb(frames[0], strict_map_key=False, use_list=True)
        if not isinstance(header, list) or len(header) != 4:
            raise CodecError("the header is not [protocol, schema, type, fields]")
        protocol, schema, name, fields = header
        if (protocol, schema) != (PROTOCOL, _schema()):
            raise CodecError(f"protocol {protocol} with schema {schema}: this process has {PROTOCOL} with {_schema()}")
        if not isinstance(name, str) or name not in TYPES:
            raise CodecError(f"unknown type {name!r}")
        return _pair(TYPES[name])[1](fields, frames[1:])
    except (TypeError, ValueError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"no message of ours: {type(error).__name__}: {error}") from error


@functools.cache
def _schema() -> int:
    """A checksum of every type, field and hint."""
    lines = [f"{name}.{field.name}:{field.type}" for name, cls in sorted(TYPES.items()) for field in dataclasses.fields(cls)]
    return zlib.crc32("\n".join(lines).encode())


@functools.cache
def _pair(hint: Any) -> tuple[Encoder, Decoder]:
    """The encoder and decoder of one hint; each is made once."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(origin, "__value__"):  # from 2.5 on numpy's NDArray is an alias
        return _pair(origin.__value__)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        assert len(inner) == 1, f"{hint}: a field is one type, or that type or None"
        return _optional(*_pair(inner[0]))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _sequence(*_pair(arguments[0]))
        return _fixed([_pair(argument) for argument in arguments])
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_pair(arguments[0]), _pair(arguments[1]))
    if hint is np.ndarray or origin is np.ndarray:
        return _encode_array, _decode_array
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint))
    if hint is Any:
        return _encode_any, _decode_any
    return _scalar(hint)


def _dataclass(cls: type) -> tuple[Encoder, Decoder]:
    assert TYPES.get(cls.__name__) is cls, f"{cls}: a message is made of messages"
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    pairs = [_pair(hints[name]) for name in names]

    def encode_fields(value: Any, frames: list[Buffer]) -> list[Any]:
        if type(value) is not cls:
            raise TypeError(f"{value!r:.80} is no {cls.__name__}")
        encoded = []
        for name, (encode_field, _) in zip(names, pairs, strict=True):
            try:
                encoded.append(encode_field(getattr(value, name), frames))
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.{name}: {error}") from error
        return encoded

    def decode_fields(value: Any, frames: Sequence[Buffer]) -> Any:
        if not isinstance(value, list) or len(value) != len(names):
            raise CodecError(f"{cls.__name__} has {len(names)} fields")
        return cls(*[decode_field(item, frames) for item, (_, decode_field) in zip(value, pairs, strict=True)])

    return encode_fields, decode_fields


def _optional(encoder: Encoder, decoder: Decoder) -> tuple[Encoder, Decoder]:
    return (
        lambda value, frames: None if value is None else encoder(value, frames),
        lambda value, frames: None if value is None else decoder(value, frames),
    )


def _sequence(encoder: Encoder, decoder: Decoder) -> tuple[Encoder, Decoder]:
    return (
        lambda value, frames: [encoder(item, frames) for item in _instance(value, tuple)],
        lambda value, frames: tuple(decoder(item, frames) for item in _instance(value, list)),
    )


def _fixed(pairs: list[tuple[Encoder, Decoder]]) -> tuple[Encoder, Decoder]:
    return (
        lambda value, frames: [pair[0](item, frames) for pair, item in zip(pairs, _instance(value, tuple), strict=True)],
        lambda value, frames: tuple(pair[1](item, frames) for pair, item in zip(pairs, _instance(value, list), strict=True)),
    )


def _mapping(key: tuple[Encoder, Decoder], item: tuple[Encoder, Decoder]) -> tuple[Encoder, Decoder]:
    return (
        lambda value, frames: {key[0](k, frames): item[0](v, frames) for k, v in _instance(value, Mapping).items()},
        lambda value, frames: {key[1](k, frames): item[1](v, frames) for k, v in _instance(value, dict).items()},
    )


def _scalar(kind: Any) -> tuple[Encoder, Decoder]:
    """bool, int, float, str, bytes. numpy's own scalars pass where they fit; a whole number passes for a float."""
    fits = {bool: (bool, np.bool_), int: (int, np.integer), float: (float, int, np.floating, np.integer)}.get(kind, kind)
    assert kind in (bool, int, float, str, bytes), f"{kind}: the codec has no place for this hint"

    def encode_scalar(value: Any, _frames: list[Buffer]) -> Any:
        if kind is not bool and isinstance(value, bool):
            raise TypeError(f"{value!r} is no {kind.__name__}")
        return kind(_instance(value, fits))

    return encode_scalar, lambda value, _frames: _exactly(value, kind)


def _instance(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} is no {getattr(kind, '__name__', kind)}")
    return value


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _encode_array(value: Any, frames: list[Buffer]) -> msgpack.ExtType:
    array = _instance(value, np.ndarray)
    if array.dtype.str not in _DTYPES:
        raise TypeError(f"an array of {array.dtype} does not travel (those that do: {', '.join(map(str, _DTYPES.values()))})")
    if array.nbytes < INLINE_BYTES:
        place: int | bytes = array.tobytes()
    else:
        contiguous = array if array.flags.c_contiguous else array.copy(order="C")
        frames.append(memoryview(contiguous.reshape(-1).view(np.uint8)))
        place = len(frames) - 2  # counted without the header
    return msgpack.ExtType(_ARRAY, msgpack.packb([array.dtype.str, array.shape, place]))


def _decode_array(value: Any, frames: Sequence[Buffer]) -> Any:
    if not isinstance(value, msgpack.ExtType) or value.code != _ARRAY:
        raise TypeError(f"{value!r:.80} is no array")
    name, shape, place = msgpack.unpackb(value.data)
    if name not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
        raise CodecError(f"an array of {name!r} and shape {shape!r:.80}")
    if type(place) is int and not 0 <= place < len(frames):
        raise CodecError(f"array frame {place} of {len(frames)}")
    data = frames[place] if type(place) is int else bytearray(_exactly(place, bytes))
    if memoryview(data).nbytes != math.prod(shape) * _DTYPES[name].itemsize:
        raise CodecError(f"{memoryview(data).nbytes} bytes for an array of {name} and shape {shape}")
    array = np.frombuffer(data, dtype=_DTYPES[name]).reshape(shape)
    return array if array.flags.writeable else array.copy()


def _encode_any(value: Any, frames: list[Buffer]) -> Any:
    """A value under the hint Any: None, numbers, strings, bytes, lists, tuples, mappings and arrays, nested."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.ndarray):
        return _encode_array(value, frames)
    if isinstance(value, np.generic):
        return _encode_any(value.item(), frames)
    if isinstance(value, Mapping):
        return {_key(key): _encode_any(item, frames) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode_any(item, frames) for item in value]
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, msgpack.packb([_encode_any(item, frames) for item in value]))
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}: plain values, sequences, mappings and arrays travel")


def _decode_any(value: Any, frames: Sequence[Buffer]) -> Any:
    if isinstance(value, list):
        return [_decode_any(item, frames) for item in value]
    if isinstance(value, dict):
        return {key: _decode_any(item, frames) for key, item in value.items()}
    if not isinstance(value, msgpack.ExtType):
        return value
    if value.code == _TUPLE:
        items = _instance(msgpack.unpackb(value.data, strict_map_key=False), list)
        return tuple(_decode_any(item, frames) for item in items)
    return _decode_array(value, frames)


def _key(key: Any) -> Any:
    if key is not None and type(key) not in (bool, int, float, str):
        raise TypeError(f"{key!r:.80}: a key is a string or a number")
    return key
