"""One episode as a Rerun recording: cameras, states beside commands, latencies and the timeline, on one time axis."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import replacing
from qwen_vla_core.rollouts.index import Rollout
from qwen_vla_core.rollouts.summary import summarise
from qwen_vla_ros.node_utils import INFERENCE_TOPIC
from qwen_vla_ros.rollouts.episode import Episode
from qwen_vla_ros.rollouts.rows import Series, command_series, state_series

AXIS = "episode"  # seconds since it began
JPEG_QUALITY = 85


def export(rollout: Rollout, path: str | Path) -> dict[str, int]:
    """Writes a ``.rrd`` with its layout; the file appears when it is complete.

    Args:
        rollout: which; its bag may be unfinished.
        path: of the recording.

    Returns:
        entity → entries.

    Raises:
        UserError: ``rerun-sdk`` is not installed, or the bag or the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".rrd":
        raise UserError(f"{path}: a Rerun recording's name ends in .rrd")
    if find_spec("rerun") is None:
        raise UserError("--to rerun needs rerun-sdk: pip install 'qwen_vla_ros[rerun]'")
    import rerun as rr

    with Episode(rollout) as episode:
        recording = rr.RecordingStream("qwen_vla_ros", recording_id=rollout.name, send_properties=False)
        try:
            with replacing(path) as temporary:
                recording.save(temporary, default_blueprint=_layout(episode))
                written = _Log(rr, recording, episode).everything()
                recording.flush()
                recording.disconnect()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return written


def _layout(episode: Episode) -> Any:
    """Cameras above, one plot per group below, the words beside them."""
    import rerun.blueprint as rrb

    robot = episode.robot
    cameras = [rrb.Spatial2DView(origin=f"camera/{view}", name=view) for view in robot.views]
    names = dict.fromkeys([*(g.name for g in robot.actions), *(g.name for g in robot.state)])
    plots = [rrb.TimeSeriesView(name=n, origin="/", contents=[f"state/{n}", f"command/{n}"]) for n in names]
    latency = rrb.TimeSeriesView(name="latency, ms", origin="/", contents=["latency/**"])
    words = rrb.Vertical(rrb.TextDocumentView(origin="about", name="about"), rrb.TextLogView(origin="events"))
    left = rrb.Vertical(rrb.Horizontal(*cameras), rrb.Grid(*plots, latency), row_shares=[2, 3])
    return rrb.Blueprint(rrb.Horizontal(left, words, column_shares=[4, 1]), collapse_panels=True)


class _Log:
    """Writes one episode's parts."""

    def __init__(self, rr: Any, recording: Any, episode: Episode) -> None:
        self._rr, self._recording, self._episode = rr, recording, episode
        self._written: dict[str, int] = {}

    def everything(self) -> dict[str, int]:
        """All parts; returns entity → entries."""
        self._about()
        self._cameras()
        for columns, series, name, _ in state_series(self._episode):
            self._curves(f"state/{name}", series, [self._episode.robot.state_channels[i] for i in columns])
        for group in self._episode.robot.actions:
            try:
                series = command_series(self._episode, group)
            except UserError:  # nobody moved it
                continue
            self._curves(f"command/{group.name}", series, [f"{channel} commanded" for channel in group.channels])
        self._latency()
        self._events()
        return self._written

    def _seconds(self, times_ns: np.ndarray) -> np.ndarray:
        return (times_ns - self._episode.start_ns) * 1e-9

    def _about(self) -> None:
        rollout = self._episode.rollout
        rows = {
            "instruction": rollout.instruction,
            "outcome": rollout.outcome,
            "reason": rollout.reason,
            "note": rollout.note,
            "robot": rollout.embodiment,
            "checkpoint": rollout.checkpoint_id or rollout.checkpoint,
            "started": rollout.started,
        }
        text = f"# {rollout.name}\n" + "\n".join(f"- **{key}**: {value}" for key, value in rows.items() if value)
        document = self._rr.TextDocument(text, media_type="text/markdown")
        self._recording.log("about", document, static=True)
        self._written["about"] = 1

    def _cameras(self) -> None:
        cameras = self._episode.cameras()
        for topic, arrived_ns, data in self._episode.bag.messages(list(cameras)):
            camera = cameras[topic]
            pixels = self._episode.picture(topic, camera, data)
            flags = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            ok, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), flags)
            if not ok:
                raise UserError(f"{self._episode.rollout.name}: a picture on {topic} cannot be stored")
            self._recording.set_time(AXIS, duration=(arrived_ns - self._episode.start_ns) * 1e-9)
            entity = f"camera/{camera.view}"
            self._recording.log(entity, self._rr.EncodedImage(contents=jpeg.tobytes(), media_type="image/jpeg"))
            self._written[entity] = self._written.get(entity, 0) + 1

    def _curves(self, entity: str, series: Series, names: list[str]) -> None:
        rr = self._rr
        self._recording.log(entity, rr.SeriesLines(names=names), static=True)
        columns = rr.Scalars.columns(scalars=series.values.reshape(-1)).partition([len(names)] * len(series))
        times = rr.TimeColumn(AXIS, duration=self._seconds(series.times))
        rr.send_columns(entity, indexes=[times], columns=columns, recording=self._recording)
        self._written[entity] = len(series)

    def _latency(self) -> None:
        from qwen_vla_ros.inference_log import InferenceRecord

        parts: dict[str, tuple[list[int], list[list[float]]]] = {}
        for arrived_ns, message in self._episode.told(INFERENCE_TOPIC):
            try:
                record = InferenceRecord.from_text(str(message.data))
            except ValueError:
                continue
            for part, ms in record.ms.items():
                times, values = parts.setdefault(part, ([], []))
                times.append(arrived_ns)
                values.append([ms])
        for part, (times, values) in parts.items():
            self._curves(f"latency/{part}", Series(times, values), [part])

    def _events(self) -> None:
        for event in summarise(self._episode.rollout, self._episode.start_ns).events:
            level = "WARN" if event.text.startswith(("holding", "fault", "emergency")) else "INFO"
            self._recording.set_time(AXIS, duration=event.seconds)
            self._recording.log("events", self._rr.TextLog(f"{event.who}: {event.text}", level=level))
            self._written["events"] = self._written.get("events", 0) + 1
