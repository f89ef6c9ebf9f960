"""What crosses the wire comes back bit for bit; what is not of this protocol is refused in one line."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import cv2
import msgpack
import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_support import METADATA, ROBOT, observation, request, without

from qwen_vla_core.interfaces import ActionChunk, Committed, Observation, Prediction, Request
from qwen_vla_core.serving import protocol, requests
from qwen_vla_core.serving.metadata import Reduction, ServerMetadata, check_hello, hello_message
from qwen_vla_core.serving.pictures import decode_picture, encode_jpeg, jpeg_size, reduce_area
from qwen_vla_core.serving.protocol import ProtocolError, pack, unpack
from qwen_vla_core.serving.requests import decode_prediction, decode_request, encode_prediction, encode_request

META = METADATA.robots[ROBOT.name]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::2],
        np.array(1.5, np.float32),
        np.zeros((0, 3)),
        np.array([[True, False]]),
        np.arange(3, dtype=">i8"),
    ],
    ids=lambda a: f"{a.dtype.str}{a.shape}",
)
def test_arrays_come_back_as_they_were(array: np.ndarray) -> None:
    back = unpack(pack({"a": array}))["a"]
    assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)


def test_only_plain_numbers_can_be_sent() -> None:
    for value in (np.array([object()]), np.array(["text"]), {1, 2}, np.array([1j])):
        with pytest.raises(ValueError, match="cannot be sent"):
            pack({"a": value})


def bad_array(**changes: Any) -> bytes:
    good = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f8", b"shape": [1]}
    return msgpack.packb({**good, **{key.encode(): value for key, value in changes.items()}})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("text", "text frame"),
        (b"", "not a valid msgpack"),
        (b"\xc1", "not a valid msgpack"),
        (pack({"a": 1})[:-1], "not a valid msgpack"),
        (pack(1) + pack(2), "not a valid msgpack"),
        (b"\x91" * 5000, "not a valid msgpack|more than"),
        (msgpack.packb({1: 2}), "not a valid msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"code")), "not a valid msgpack"),
        (msgpack.packb(list(range(2000))), "not a valid msgpack"),
        (msgpack.packb("x" * 70_000), "not a valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not a valid msgpack"),
        (msgpack.packb([[[]] * 1000] * 10), "more than 4096 lists"),
        (bad_array(dtype="|O"), "not a plain number"),
        (bad_array(dtype="i4,i4"), "not a plain number"),
        (bad_array(dtype="(2,)f4"), "not a plain number"),
        (bad_array(dtype=None), "not a plain number"),
        (bad_array(dtype="{}"), "not a plain number"),
        (bad_array(dtype="<U2"), "not a plain number"),
        (bad_array(shape=[2]), "do not fill"),
        (bad_array(shape=[-1]), "not a list of sizes"),
        (bad_array(shape=[2**40, 2**40]), "do not fill"),
        (bad_array(shape=[True]), "not a list of sizes"),
        (bad_array(shape=[1] * 40), "not a list of sizes"),
        (bad_array(shape=3), "not a list of sizes"),
        (bad_array(data="text"), "not bytes"),
    ],
)
def test_nonsense_is_refused_in_one_line(data: Any, told: str) -> None:
    with pytest.raises(ProtocolError, match=told) as caught:
        unpack(data)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(lambda a, b: a[:b], st.just(pack(META.__dict__["contract"])), st.integers(0, 400)),
    )
)
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    try:
        message = unpack(data)
        protocol.message_type(message)
        decode_request(message, METADATA, (ROBOT.name,))
    except ProtocolError:
        pass


def test_a_request_comes_back_bit_for_bit_with_plan_and_noise() -> None:
    rng = np.random.default_rng(1)
    sent = request(
        0.25,
        committed=Committed(rng.normal(size=(9, len(ROBOT.channels))), 4),
        noise_hk=rng.normal(size=(ROBOT.control.horizon, 64)).astype(np.float32),
    )
    got = decode_request(unpack(pack(encode_request(sent, METADATA))), METADATA, (ROBOT.name,))
    assert got.committed is not None and sent.committed is not None and got.noise_hk is not None
    assert got.embodiment == sent.embodiment and got.committed.frozen == 4
    assert np.array_equal(got.committed.actions_hc, sent.committed.actions_hc)
    assert got.noise_hk.dtype == np.float32 and np.array_equal(got.noise_hk, sent.noise_hk)
    assert got.observation.instruction == sent.observation.instruction and got.observation.stamp_ns == 7
    assert np.array_equal(got.observation.state, sent.observation.state)
    assert all(np.array_equal(got.observation.images[v], sent.observation.images[v]) for v in ROBOT.views)


def test_no_field_is_left_behind() -> None:
    """Who adds a field to one of these has to make it travel, and then to change this test."""
    assert {f.name for f in dataclasses.fields(Request)} == {"observation", "embodiment", "committed", "noise_hk"}
    assert {f.name for f in dataclasses.fields(Observation)} == {"images", "state", "instruction", "stamp_ns"}
    assert {f.name for f in dataclasses.fields(Prediction)} == {"chunk", "seconds"}
    assert {f.name for f in dataclasses.fields(ActionChunk)} == {"actions_hc", "channels", "stamp_ns", "period_s"}


def test_a_plan_that_says_more_keeps_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Longer(Committed):
        use: Literal["guided", "prefix"] = "guided"

    monkeypatch.setattr(requests, "Committed", Longer)
    sent = request(committed=Longer(np.zeros((3, len(ROBOT.channels))), 1, "prefix"))
    message = unpack(pack(encode_request(sent, METADATA)))
    got = decode_request(message, METADATA, (ROBOT.name,)).committed
    assert isinstance(got, Longer) and got.use == "prefix" and got.frozen == 1
    message["committed"]["use"] = "by force"
    with pytest.raises(ProtocolError, match="'use' is 'by force', known are guided, prefix"):
        decode_request(message, METADATA, (ROBOT.name,))


def edited(path: str, value: Any) -> dict[str, Any]:
    """A good request's message with one thing wrong."""
    plan = Committed(np.zeros((3, len(ROBOT.channels))), 1)
    message = unpack(pack(encode_request(request(committed=plan, noise_hk=np.zeros((16, 64))), METADATA)))
    *parents, last = path.split("/")
    inner = message
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return message


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("embodiment", "widowx", "was not in this client's hello"),
        ("embodiment", 3, "'embodiment' is int, not str"),
        ("images/ego", ..., "view 'ego' of embodiment aloha is missing"),
        ("images/ego", np.zeros((4, 4), np.uint8), r"view 'ego' is \(4, 4\) uint8"),
        ("images/ego", np.zeros((4, 4, 3)), "float64, not"),
        ("images/ego", {"jpeg": b"\xff\xd8nonsense"}, "JPEG without a frame header"),
        ("images/ego", np.zeros((0, 4, 3), np.uint8), "4×0 pixels"),
        ("images", 5, "'images' is int"),
        ("state", np.zeros(3), "needs 14 channels, got 3"),
        ("state", np.full(14, np.nan), "'state' is not finite"),
        ("instruction", "x" * 5000, "5000 characters"),
        ("stamp_ns", 1.5, "'stamp_ns' is float"),
        ("stamp_ns", True, "'stamp_ns' is bool"),
        ("noise_hk", np.zeros((16, 3)), "'noise_hk' has shape"),
        ("committed/frozen", 9, "'frozen' is 9"),
        ("committed/actions_hc", np.zeros((99, 14)), "99 actions, the horizon is"),
        ("committed", [], "'committed' is not a map"),
        ("committed/force", "much", "committed: unknown key 'force'"),
    ],
)
def test_a_request_that_does_not_fit_the_robot_names_the_key(path: str, value: Any, told: str) -> None:
    assert decode_request(edited("stamp_ns", 8), METADATA, (ROBOT.name,)).observation.stamp_ns == 8
    with pytest.raises(ProtocolError, match=told) as caught:
        decode_request(edited(path, value), METADATA, (ROBOT.name,))
    assert caught.value.code == protocol.BAD_REQUEST


def test_a_prediction_comes_back_and_one_that_no_robot_should_get_does_not() -> None:
    actions = np.random.default_rng(2).normal(size=(ROBOT.control.horizon, len(ROBOT.channels)))
    sent = Prediction(ActionChunk(actions, ROBOT.channels, 7, ROBOT.period_s), {"backbone": 0.01})
    message = unpack(pack(encode_prediction(sent)))
    got = decode_prediction(message, META)
    assert np.array_equal(got.chunk.actions_hc, actions) and got.seconds == sent.seconds
    assert (got.chunk.channels, got.chunk.stamp_ns, got.chunk.period_s) == (ROBOT.channels, 7, ROBOT.period_s)
    for key, value in (("actions_hc", actions * np.nan), ("actions_hc", actions[1:]), ("channels", ["a"])):
        with pytest.raises(ProtocolError):
            decode_prediction({**message, key: value}, META)


def test_metadata_comes_back_and_other_versions_do_not() -> None:
    message = unpack(pack(METADATA.to_message()))
    got = ServerMetadata.from_message(message)
    assert got.robots[ROBOT.name] == META and got.checkpoint_id == "fake 0123456789ab" and got.flow_steps == 4
    with pytest.raises(ProtocolError, match="protocol version 99"):
        ServerMetadata.from_message({**message, "protocol": 99})
    with pytest.raises(ProtocolError, match="'checkpoint' is missing"):
        ServerMetadata.from_message({k: v for k, v in message.items() if k != "checkpoint"})


def test_a_robot_that_the_policy_does_not_know_is_told_the_first_difference() -> None:
    hello = unpack(pack(hello_message({ROBOT.name: ROBOT}, "me")))
    assert check_hello(hello, METADATA) == ("me", (ROBOT.name,))
    with pytest.raises(ProtocolError, match=r"control\.horizon is 16, but 15 in the checkpoint"):
        check_hello(hello, without(METADATA, **{"control.horizon": 15}))
    with pytest.raises(ProtocolError, match="knows aloha, widowx, not 'crane'"):
        check_hello({**hello, "embodiments": {"crane": {}}}, METADATA)


@pytest.mark.parametrize(("height", "width", "to"), [(480, 640, (96, 128)), (100, 75, (32, 64)), (97, 133, (33, 50))])
def test_pictures_are_reduced_exactly_as_the_model_would(height: int, width: int, to: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    wanted = functional.interpolate(pixels, to, mode="area").round()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(reduce_area(image, *to), wanted)
    # Halves are where rounding could differ.
    checker = np.indices((height, width)).sum(0)[:, :, None].repeat(3, 2).astype(np.uint8) % 2
    pixels = torch.from_numpy(checker).permute(2, 0, 1)[None].float()
    wanted = functional.interpolate(pixels, to, mode="area").round()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(reduce_area(checker, *to), wanted)


def test_jpeg_is_near_and_its_claimed_size_is_read_before_decoding() -> None:
    image = cv2.resize(
        np.random.default_rng(4).integers(0, 256, (3, 4, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC
    )
    entry = encode_jpeg(image, 90)
    assert jpeg_size(entry["jpeg"], "it") == (48, 64) and len(entry["jpeg"]) < image.nbytes / 2
    assert np.abs(decode_picture(entry, "it").astype(int) - image).mean() < 3
    data = bytearray(entry["jpeg"])
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = b"\xff\xff\xff\xff"  # claims 65535 × 65535 pixels: 13 GB
    with pytest.raises(ProtocolError, match="65535×65535 pixels"):
        decode_picture({"jpeg": bytes(data)}, "it")
    with pytest.raises(ProtocolError, match=r"not a readable JPEG|without a frame"):
        decode_picture({"jpeg": entry["jpeg"][: start + 12]}, "it")


def test_pictures_are_sent_smaller_only_where_the_model_would_make_them_so() -> None:
    rule = Reduction(side=32, min_pixels=12288, max_pixels=12288)
    metadata = dataclasses.replace(METADATA, reduction=rule)
    assert ServerMetadata.from_message(unpack(pack(metadata.to_message()))).reduction == rule
    image = np.random.default_rng(5).integers(0, 256, (288, 384, 3), dtype=np.uint8)
    seen = observation()
    for size, sent in ((image, (96, 128, 3)), (image[:96, :128], (96, 128, 3)), (image[:60, :80], (60, 80, 3))):
        asked = Request(type(seen)(dict.fromkeys(ROBOT.views, size), seen.state, "go"), ROBOT.name)
        assert {i.shape for i in encode_request(asked, metadata)["images"].values()} == {sent}
        for as_it_is in (encode_request(asked, metadata, "raw"), encode_request(asked, METADATA)):
            assert all(np.array_equal(i, size) for i in as_it_is["images"].values())
    with pytest.raises(ProtocolError, match="positive"):
        ServerMetadata.from_message({**METADATA.to_message(), "reduction": {**vars(rule), "side": 0}})
