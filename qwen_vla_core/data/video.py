"""Video files of pictures: written so that any frame is cheap to reach, read by frame number, copied without loss.

A GOP of 2 without B-frames [X: LeRobot's choice] makes every second frame a keyframe: a random frame costs at most two
decoded pictures. CRF 18 keeps a PSNR of about 36.8 dB on rendered 128×96 pictures, where 4:2:0 chroma alone costs all
but 39.1 dB. The same pictures give the same file: one encoder thread, and no macroblock tree, whose AVX-512 code in
x264 165 reads memory that nothing was written to (1 file of 55 had other bytes in a process that had done other work;
with AVX2 none). Over two frames the tree has nothing to gain anyway.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from qwen_vla_core.errors import UserError

Decoder = Literal["auto", "pyav", "torchcodec"]
GOP = 2
CRF = 18
# Without CABAC and deblocking a frame decodes in half the time at the same PSNR, for 6 to 27 % more bytes (measured).
_X264 = {
    "preset": "medium",
    "tune": "fastdecode",
    "bf": "0",
    "threads": "1",
    "x264-params": "scenecut=0:open-gop=0:mbtree=0",
}


@dataclass(frozen=True)
class Clip:
    """Some frames of a video file, for copying without encoding them again.

    Attributes:
        path: of the video.
        first: number of the first frame.
        count: frames.
    """

    path: Path
    first: int
    count: int


def frame_rate(fps: float) -> Fraction:
    """The rate as a fraction; 29.97 becomes 30000/1001-like values instead of a float's digits."""
    return Fraction(fps).limit_denominator(1001)


def encode_video(
    file: BinaryIO, frames: Iterable[np.ndarray], size: tuple[int, int], fps: float, crf: int = CRF
) -> int:
    """Writes an H.264 mp4 (yuv420p, GOP 2) and returns the number of frames.

    Args:
        file: opened for writing and seeking; a full disk is its ``OSError``.
        frames: (height, width, 3) uint8 RGB each.
        size: (width, height), both even.
        fps: constant rate.
        crf: quality, lower is better.

    Raises:
        UserError: a frame of another size or type (names its number), or an odd size.
    """
    width, height = size
    if width % 2 or height % 2:
        raise UserError(f"video of {width}×{height}: width and height must be even; resize or crop first")
    count = 0
    with _writing(file) as container:
        stream = container.add_stream(
            "libx264", rate=frame_rate(fps), options={**_X264, "crf": str(crf), "g": str(GOP)}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for count, frame in enumerate(frames, 1):
            if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                raise UserError(
                    f"frame {count - 1}: is {frame.dtype} {tuple(frame.shape)}, must be uint8 ({height}, {width}, 3)"
                )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if count:
            container.mux(stream.encode(None))
    return count


def video_signature(path: Path) -> str:
    """What must agree for packets of two files to be joined: codec, its header, size and rate."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        header = (stream.codec_context.extradata or b"").hex()
        return f"{stream.codec_context.name}:{stream.width}x{stream.height}:{stream.average_rate}:{header}"


def join_videos(file: BinaryIO, clips: Sequence[Clip], fps: float) -> None:
    """Copies clips one after another into an mp4, packet by packet: no picture changes.

    Frame ``k`` of the result is shown at ``k / fps``. All clips have the same ``video_signature``; each begins with a
    keyframe and is followed by one (or by the end).

    Raises:
        UserError: a clip cannot be read or has other frames than promised.
    """
    with _writing(file) as output:
        target = None
        done = 0
        for clip in clips:
            with _open(clip.path) as source:
                stream = _video_stream(source, clip.path)
                if target is None:
                    target = output.add_stream_from_template(stream, opaque=True)
                    target.time_base = stream.time_base
                done += _copy_packets(output, target, source, stream, clip, done, frame_rate(fps))


def _copy_packets(output: Any, target: Any, source: Any, stream: Any, clip: Clip, done: int, rate: Fraction) -> int:
    reader = VideoReader(clip.path, "pyav")
    try:
        first, last = reader.ticks[clip.first], reader.ticks[clip.first + clip.count - 1]
    except IndexError:
        raise UserError(f"{clip.path}: has {reader.count} frames, {clip.first + clip.count} are needed") from None
    finally:
        reader.close()
    base = stream.time_base
    shift = round(Fraction(done) / rate / base) - int(first)
    step = round(1 / rate / base)
    if first > reader.ticks[0]:
        source.seek(int(first), stream=stream, backward=True)
    copied = 0
    for packet in source.demux(stream):
        if packet.pts is None or not first <= packet.pts <= last:
            if packet.dts is not None and packet.dts > last:
                break
            continue
        packet.pts += shift
        packet.dts = packet.pts if packet.dts is None else packet.dts + shift
        packet.duration = packet.duration or step
        packet.stream = target
        output.mux(packet)
        copied += 1
    if copied != clip.count:
        raise UserError(f"{clip.path}: {copied} of {clip.count} frames from frame {clip.first} on could be copied")
    return copied


@contextlib.contextmanager
def _writing(file: BinaryIO) -> Iterator[Any]:
    """An mp4 that is closed in any case; of several errors, the first is told: a full disk fails again on closing."""
    container = av.open(file, "w", format="mp4")
    try:
        yield container
    except BaseException:
        with contextlib.suppress(av.error.FFmpegError, OSError):
            container.close()
        raise
    container.close()


def _open(path: Path) -> Any:
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a video ({reason}); copy or convert it again") from None


def _video_stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise UserError(f"{path}: has no video stream; copy or convert it again")
    return container.streams.video[0]


@functools.cache
def _torchcodec() -> Any | None:
    """torchcodec's decoder class, or None where it, or the FFmpeg libraries it needs, cannot be loaded."""
    try:
        return importlib.import_module("torchcodec.decoders").VideoDecoder
    except (ImportError, OSError, RuntimeError):
        return None


def choose_decoder(wanted: Decoder = "auto") -> Literal["pyav", "torchcodec"]:
    """torchcodec where it works, else PyAV: for files written here both give the same bytes at about the same speed.

    Raises:
        UserError: torchcodec is asked for and cannot be loaded.
    """
    if wanted == "auto":
        return "torchcodec" if _torchcodec() is not None else "pyav"
    if wanted == "torchcodec" and _torchcodec() is None:
        raise UserError("decoder torchcodec: not installed, or its FFmpeg libraries are missing; use decoder pyav")
    return wanted


class VideoReader:
    """Random access to the frames of one file. Opened once, cheap when used again; not shared between threads.

    Attributes:
        path: of the file.
        count: frames.
        size: (width, height).
        ticks: (count,) int64 presentation times in units of ``base``, ascending: frame ``i`` is the i-th shown.
        base: the unit, seconds.
    """

    def __init__(self, path: str | Path, decoder: Decoder = "auto") -> None:
        """Opens the file and reads its table of frames; no picture is decoded yet.

        Raises:
            UserError: missing, cut short or not a video.
        """
        self.path = Path(path)
        self._container = _open(self.path)
        self._stream = _video_stream(self._container, self.path)
        self._stream.codec_context.thread_count = 1  # frame threads delay a single frame; workers use the cores
        self.base = Fraction(self._stream.time_base)
        self.size = (int(self._stream.width), int(self._stream.height))
        self._decoding: Any = None  # generator of decoded frames
        self._next = -1  # number of the frame it gives next
        self._reformatter = VideoReformatter()
        self._read_table(self._stream.codec_context.has_b_frames == 0)
        self._torchcodec: Any = None
        if self.count and choose_decoder(decoder) == "torchcodec":
            self._torchcodec = self._guard(self._open_torchcodec, 0)

    def _open_torchcodec(self) -> Any:
        decoder = _torchcodec()
        assert decoder is not None
        return decoder(str(self.path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")

    def _read_table(self, quick: bool) -> None:
        """The container's own index where packets are stored in the order shown, else one pass over the packets."""
        entries = self._stream.index_entries if quick else ()
        if len(entries):
            table = [(entry.timestamp, entry.is_keyframe) for entry in entries]
        else:
            self._container.seek(0, stream=self._stream)
            packets = self._guard(lambda: list(self._container.demux(self._stream)), 0)
            table = [(packet.pts, packet.is_keyframe) for packet in packets if packet.pts is not None]
            self._decoding = None
        table.sort()
        self.ticks = np.array([pts for pts, _ in table], np.int64)
        self.count = len(table)
        self._keyframes = np.array([i for i, (_, key) in enumerate(table) if key], np.int64)
        self._from_index = bool(len(entries))

    @property
    def times(self) -> np.ndarray:
        """(count,) float64 seconds at which frames are shown."""
        return self.ticks * float(self.base)

    def gop(self, index: int) -> tuple[int, int]:
        """(first, end) of the frames that are decoded together with ``index``; ``first`` is a keyframe."""
        at = int(np.searchsorted(self._keyframes, index, "right"))
        first = int(self._keyframes[at - 1]) if at else 0
        return first, int(self._keyframes[at]) if at < len(self._keyframes) else self.count

    def frame_at(self, seconds: float, tolerance_s: float) -> int:
        """Number of the frame shown nearest to a time.

        Raises:
            UserError: none is shown within the tolerance.
        """
        tick = seconds / float(self.base)
        right = min(int(np.searchsorted(self.ticks, tick)), self.count - 1)
        nearest = min((max(right - 1, 0), right), key=lambda i: abs(int(self.ticks[i]) - tick)) if self.count else -1
        if nearest < 0 or abs(int(self.ticks[nearest]) - tick) * float(self.base) > tolerance_s:
            shown = (
                f"the nearest of its {self.count} frames is at {self.times[nearest]:.4f} s" if self.count else "empty"
            )
            raise UserError(f"{self.path}: no frame at {seconds:.4f} s ({shown}); convert the dataset again")
        return nearest

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), height, width, 3) uint8 RGB, in the order asked for; a GOP is decoded once.

        Raises:
            UserError: a frame lies outside the file or cannot be decoded (names it).
        """
        for index in indices:
            if not 0 <= index < self.count:
                raise UserError(f"{self.path}: frame {index} is asked for, the file has {self.count}; convert it again")
        width, height = self.size
        out = np.empty((len(indices), height, width, 3), np.uint8)
        if self._torchcodec is not None:
            if len(indices):
                batch = self._guard(lambda: self._torchcodec.get_frames_at(indices=list(indices)), min(indices))
                out[:] = batch.data.numpy()
            return out
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(int(index), []).append(place)
        for index in sorted(places):
            picture = self._guard(functools.partial(self._decode, index), index)
            for place in places[index]:
                out[place] = picture
        return out

    def _decode(self, index: int) -> np.ndarray:
        first, _ = self.gop(index)
        if self._decoding is None or not first <= self._next <= index:
            self._container.seek(int(self.ticks[first]), stream=self._stream, backward=True)
            self._decoding = self._container.decode(self._stream)
        for frame in self._decoding:
            position = int(np.searchsorted(self.ticks, frame.pts))
            if position >= self.count or self.ticks[position] != frame.pts:
                if not self._from_index:
                    break
                self._read_table(False)  # packets are not in the order shown after all
                return self._decode(index)
            self._next = position + 1
            if position == index:
                return self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            if position > index:
                break
        self._decoding = None
        raise UserError(f"{self.path}: frame {index} of {self.count} is missing or damaged; copy or convert it again")

    def _guard(self, work: Callable[[], Any], index: int) -> Any:
        """What FFmpeg says about a damaged file, as a user's error that names the frame."""
        try:
            return work()
        except (av.error.FFmpegError, RuntimeError, ValueError, IndexError) as error:
            self._decoding = None
            raise UserError(
                f"{self.path}: frame {index} of {getattr(self, 'count', '?')} cannot be decoded "
                f"({str(error).splitlines()[0]}); copy or convert it again"
            ) from None

    def close(self) -> None:
        """Closes the file."""
        self._decoding = self._torchcodec = None
        self._container.close()
