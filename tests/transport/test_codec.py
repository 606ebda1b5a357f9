"""Every message type comes back as it went, and nothing else comes in. Strategies are made from the hints of messages.py."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weft.transport import codec, messages
from weft.transport.codec import INLINE_BYTES, decode, encode
from weft.transport.errors import CodecError
from weft.transport.messages import AdapterRef, AddAdapter, Done, Sample, Scores, SlabHandle

REF = AdapterRef("a", 0, 3)
DTYPES = ["?", "u1", "i2", "<i4", "<i8", "<u4", "<f2", "<f4", "<f8"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
ARRAYS = st.one_of(
    hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
    hnp.arrays(st.sampled_from(DTYPES), st.integers(INLINE_BYTES - 1, INLINE_BYTES + 1), fill=st.just(1)),
)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXT | st.binary(max_size=8) | ARRAYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(TEXT | NUMBERS, inner, max_size=3),
    ),
    max_leaves=8,
)


def values(hint: object) -> st.SearchStrategy:
    """Whatever fits a hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is np.ndarray:
        return ARRAYS
    if origin is not None and issubclass(origin, Mapping):
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    return {
        typing.Any: PLAIN, type(None): st.none(), bool: st.booleans(), int: NUMBERS, float: st.floats(), str: TEXT,
        bytes: st.binary(max_size=8),
    }[hint]  # fmt: skip


def same(left: object, right: object) -> bool:
    """Equal in type, structure and bits, NaN equal to itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right or (left != left and right != right)


@pytest.mark.parametrize("name", sorted(codec.TYPES))
def test_every_message_comes_back_as_it_went(name: str):
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values(codec.TYPES[name]))
    def round_trip(message: object) -> None:
        frames = encode(message)
        assert same(decode(frames), message)
        assert same(decode([bytes(frame) for frame in frames]), message)

    round_trip()


def test_the_registry_is_messages_py():
    assert codec.TYPES["Group"] is messages.Group
    assert {name for name, value in vars(messages).items() if dataclasses.is_dataclass(value)} == set(codec.TYPES)


def test_large_arrays_are_frames_that_share_the_senders_memory():
    tokens = np.arange(INLINE_BYTES, dtype=np.int32)
    frames = encode(Scores(tokens, tokens[:3]))
    assert len(frames) == 2
    assert np.shares_memory(np.frombuffer(frames[1], np.int32), tokens)
    assert len(frames[0]) < 300


@pytest.mark.parametrize("size", [0, 1, 5, INLINE_BYTES])
def test_decoded_arrays_are_writeable_and_nobody_elses(size: int):
    sent = np.ones(size, np.float32)
    for frames in (encode(Scores(sent, sent)), [bytes(frame) for frame in encode(Scores(sent, sent))]):
        got = decode([bytearray(frame) for frame in frames])
        got.logprobs[:] = 7
        assert (sent == 1).all()
        assert (got.base_logprobs == 1).all()


def test_strided_and_scalar_arrays_travel():
    strided = np.arange(40_000, dtype=np.int32).reshape(200, 200)[::3, ::-2].T
    got = decode(encode(Scores(strided, np.array(2.5))))
    assert same(got.logprobs, np.ascontiguousarray(strided))
    assert same(got.base_logprobs, np.array(2.5))


def test_numbers_take_the_type_of_their_hint():
    got = decode(encode(Sample(np.zeros(0), np.zeros(0), np.zeros(0), 1, np.int64(2), np.True_, {"x": np.float32(0.5)})))
    assert (got.reward, got.turns, got.truncated, got.metrics) == (1.0, 2, True, {"x": 0.5})
    assert [type(value) for value in (got.reward, got.turns, got.truncated, got.metrics["x"])] == [float, int, bool, float]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (AdapterRef(3, 0, 0), "AdapterRef.name: 3 is no str"),
        (AdapterRef("a", True, 0), "AdapterRef.lineage: True is no int"),
        (AdapterRef("a", 2**64, 0), "AdapterRef"),
        (AdapterRef("\ud800", 0, 0), "AdapterRef"),
        (Scores([1.0], np.zeros(1)), "Scores.logprobs"),
        (Scores(np.array(["x"]), np.zeros(1)), "an array of <U1 does not travel"),
        (Scores(np.array([object()]), np.zeros(1)), "an array of object does not travel"),
        (AddAdapter({"x": object()}), "AddAdapter.config"),
        (AddAdapter({"x": {(1, 2): 3}}), "a key is a string or a number"),
        (messages.TrainStep([]), "TrainStep.batches"),
        (None, "NoneType is no message"),
        ("text", "str is no message"),
        (Done, "type is no message"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is_sent(message: object, words: str):
    with pytest.raises(CodecError, match=words):
        encode(message)


def test_a_class_of_the_same_name_is_no_message():
    stranger = dataclasses.make_dataclass("Done", [])
    with pytest.raises(CodecError, match="is no message"):
        encode(stranger())


def altered(change: dict[int, object]) -> list[bytes]:
    header = msgpack.unpackb(encode(REF)[0])
    for place, value in change.items():
        header[place] = value
    return [msgpack.packb(header)]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [b"\x91" * 5000],
        [msgpack.packb("text")],
        altered({0: 99}),
        altered({1: 0}),
        altered({2: "Config"}),
        altered({2: ["AdapterRef"]}),
        altered({2: "__builtins__"}),
        altered({3: ["a", 0]}),
        altered({3: ["a", 0, "3"]}),
        altered({3: [b"a", 0, 3]}),
        altered({2: "Scores", 3: [1, 2]}),
        altered({2: "Scores", 3: [msgpack.ExtType(9, b""), 2]}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, msgpack.packb(["|O", [1], b"12345678"]))] * 2}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, msgpack.packb(["<f4", [2], b"1234"]))] * 2}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, msgpack.packb(["<f4", [-1], b""]))] * 2}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, msgpack.packb(["<f4", [2**62, 0], b"1"]))] * 2}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, msgpack.packb(["<f4", [1], 0]))] * 2}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, b"")] * 2}),
        altered({2: "Scores", 3: [msgpack.ExtType(1, msgpack.packb([["<f4"], 3, None]))] * 2}),
        altered({2: "AddAdapter", 3: [{"a": msgpack.ExtType(2, b"\x01")}, 0]}),
    ],
)
def test_frames_that_are_none_of_ours_are_codec_errors(frames: list[bytes]):
    with pytest.raises(CodecError):
        decode(frames)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=3), st.integers(0, 200), st.binary(min_size=1, max_size=3))
def test_altered_frames_are_a_message_or_a_codec_error_and_never_more(frames: list[bytes], place: int, patch: bytes):
    data = np.arange(INLINE_BYTES, dtype=np.uint8)
    handle = SlabHandle(REF, data.nbytes, "bfloat16", 8, 2.0, ("q", "k"), -1.0, -2.0, data=data)
    good = [bytes(frame) for frame in encode(handle)]
    header = good[0][:place] + patch + good[0][place + len(patch) :]
    for wrong in (frames, [header, *good[1:]], [good[0], *frames]):
        try:
            decode(wrong)
        except CodecError:
            continue
