"""Any frame of any video is the one asked for; packets are joined and cut without touching a picture."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from lerobot_support import SIZE, frames, shown, write_foreign_video

from qwen_vla_core.data import video
from qwen_vla_core.data.video import Clip, VideoReader, choose_decoder, encode_video, join_videos, video_signature
from qwen_vla_core.errors import UserError

DECODERS = ("pyav", "torchcodec") if choose_decoder() == "torchcodec" else ("pyav",)


def made(path: Path, episode: int, length: int, fps: float = 10) -> Path:
    with path.open("wb") as file:
        assert encode_video(file, frames(episode, length), SIZE, fps) == length
    return path


def foreign(path: Path, length: int, codec: str = "libx264", **options: str) -> Path:
    write_foreign_video(path, frames(1, length), 30, codec, {"crf": "12", **options})
    return path


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_come_in_the_order_asked_for(tmp_path: Path, decoder: video.Decoder) -> None:
    reader = VideoReader(made(tmp_path / "a.mp4", 3, 25), decoder)
    order = [24, 0, 7, 7, 6, 13, 1]
    assert reader.count == 25 and reader.size == SIZE
    assert [shown(frame) for frame in reader.frames(order)] == [(3, step) for step in order]
    assert reader.frames([]).shape == (0, SIZE[1], SIZE[0], 3)
    np.testing.assert_allclose(reader.times, np.arange(25) / 10)
    assert reader.gop(0) == (0, 2) and reader.gop(7) == (6, 8) and reader.gop(24) == (24, 25)


def test_pictures_keep_their_colours(tmp_path: Path) -> None:
    smooth = np.zeros((6, 48, 64, 3), np.uint8)
    smooth[..., 0] = np.linspace(30, 220, 64)
    smooth[..., 1] = np.linspace(220, 30, 48)[:, None]
    smooth[..., 2] = np.arange(6)[:, None, None] * 30
    with (tmp_path / "a.mp4").open("wb") as file:
        encode_video(file, smooth, (64, 48), 30)
    error = VideoReader(tmp_path / "a.mp4", "pyav").frames(range(6)).astype(float) - smooth
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 40


def test_the_same_pictures_give_the_same_file() -> None:
    def data() -> bytes:
        file = io.BytesIO()
        encode_video(file, frames(0, 9), SIZE, 10)
        return file.getvalue()

    assert len({data() for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {"bf": "3", "g": "12"}), ("libx264", {"g": "250"}), ("libsvtav1", {"g": "2"})]
)
def test_videos_of_other_writers_are_read_by_frame(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    reader = VideoReader(foreign(tmp_path / "f.mp4", 26, codec, **options), "pyav")
    assert reader.count == 26
    order = [25, 3, 12, 11, 0, 19]
    assert [shown(frame) for frame in reader.frames(order)] == [(1, step) for step in order]
    np.testing.assert_allclose(reader.times - reader.times[0], np.arange(26) / 30, atol=1e-4)
    assert reader.frame_at(7 / 30, 1 / 60) == 7


def test_joined_videos_show_the_same_pictures_and_times(tmp_path: Path) -> None:
    parts = [made(tmp_path / f"{i}.mp4", i, length, 29.97) for i, length in enumerate((5, 8, 3))]
    assert len({video_signature(part) for part in parts}) == 1
    with (tmp_path / "all.mp4").open("wb") as file:
        join_videos(file, [Clip(part, 0, VideoReader(part).count) for part in parts], 29.97)
    reader = VideoReader(tmp_path / "all.mp4", "pyav")
    single = np.concatenate([VideoReader(part, "pyav").frames(range(VideoReader(part).count)) for part in parts])
    np.testing.assert_array_equal(reader.frames(range(16)), single)
    np.testing.assert_allclose(reader.times, np.arange(16) * 1001 / 30000, atol=2e-4)
    assert reader.gop(5)[0] == 5  # an episode begins with a keyframe, also after an odd number of frames
    with (tmp_path / "cut.mp4").open("wb") as file:
        join_videos(file, [Clip(tmp_path / "all.mp4", 5, 8)], 29.97)
    np.testing.assert_array_equal(VideoReader(tmp_path / "cut.mp4", "pyav").frames(range(8)), single[5:13])


def test_videos_with_other_headers_have_another_signature(tmp_path: Path) -> None:
    assert video_signature(made(tmp_path / "a.mp4", 0, 4)) != video_signature(foreign(tmp_path / "b.mp4", 4))


@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_videos_are_named_with_the_frame(tmp_path: Path, decoder: video.Decoder) -> None:
    path = made(tmp_path / "a.mp4", 0, 20)
    with pytest.raises(UserError, match=r"a\.mp4: frame 20 is asked for, the file has 20"):
        VideoReader(path, decoder).frames([20])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.mp4: cannot be read as a video") as caught:
        VideoReader(path, decoder)
    assert "\n" not in str(caught.value)
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"x\.mp4"):
        VideoReader(tmp_path / "x.mp4", decoder)
    with pytest.raises(UserError, match="missing"):
        VideoReader(tmp_path / "missing.mp4", decoder)


def test_a_video_with_its_index_but_without_its_end_names_the_frame(tmp_path: Path) -> None:
    """As after a broken download of a file whose index comes first."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "2", "bf": "0", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 255, (20, SIZE[1], SIZE[0], 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    whole = VideoReader(path, "pyav").frames([2])
    path.write_bytes(path.read_bytes()[:-3000])
    reader = VideoReader(path, "pyav")
    np.testing.assert_array_equal(reader.frames([2]), whole)
    with pytest.raises(UserError, match=r"a\.mp4: frame 19 of 20"):
        reader.frames([19])
    np.testing.assert_array_equal(reader.frames([2]), whole)  # and the reader still works


@pytest.mark.parametrize("bad", [np.zeros((32, 30, 3), np.uint8), np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8)])
def test_pictures_of_another_size_or_type_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"frame 1: is .* must be uint8 \(32, 32, 3\)"):
        encode_video(io.BytesIO(), [frames(0, 1)[0], bad], SIZE, 10)
    with pytest.raises(UserError, match="even"):
        encode_video(io.BytesIO(), [], (31, 32), 10)


def test_torchcodec_is_used_where_it_works_and_named_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_torchcodec", lambda: None)
    assert choose_decoder("auto") == "pyav"
    with pytest.raises(UserError, match="decoder torchcodec"):
        choose_decoder("torchcodec")
    monkeypatch.setattr(video, "_torchcodec", lambda: object)
    assert choose_decoder("auto") == "torchcodec" and choose_decoder("pyav") == "pyav"


def test_a_full_disk_is_the_operating_systems_error(tmp_path: Path) -> None:
    """Not one of FFmpeg's many: the writer tells it apart by its number."""
    code = (
        "import resource, numpy as np; from qwen_vla_core.data.video import encode_video\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "noise = np.random.default_rng(0).integers(0, 255, (30, 96, 96, 3), np.uint8)\n"
        f"try:\n    encode_video(open({str(tmp_path / 'a.mp4')!r}, 'wb'), noise, (96, 96), 10)\n"
        "except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[:1] == ["27"], done.stderr  # EFBIG
