"""What every corpus of hands becomes first: tracked wrists and finger poses, the camera's path, and words.

A step whose hand was not tracked is marked, never filled in: usable stretches become episodes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.rotations import from_quaternion
from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.hands.eigengrasps import Eigengrasps
from qwen_vla_core.data.hands.points import POSE, checked, finger_pose, wrist_frames
from qwen_vla_core.data.source_frames import EncodedFrames, VideoFrames
from qwen_vla_core.embodiment.spec import PromptSpec

SIDES = ("left", "right")
HANDS = ("both", *SIDES)
GRASPS = 10  # eigengrasps per hand [P]
HORIZON = 16  # [P]
WRIST_UNIT = "m,axis_angle"


@dataclass(frozen=True)
class HandTrack:
    """One hand; T steps.

    Attributes:
        wrist: (T, 4, 4) wrist → world, metres.
        fingers: (T, 45) radians; of the right hand or mirrored to it.
        valid: (T,) bool, False where the corpus does not vouch for the hand.
    """

    wrist: np.ndarray
    fingers: np.ndarray
    valid: np.ndarray

    def __post_init__(self) -> None:
        checked(self.wrist, "wrist", (4, 4))
        checked(self.fingers, "fingers", (POSE,))
        if not len(self.wrist) == len(self.fingers) == len(self.valid):
            raise ValueError(f"wrist, fingers, valid: {len(self.wrist)}, {len(self.fingers)}, {len(self.valid)} steps")


@dataclass(frozen=True)
class HandRecording:
    """One recording of a corpus.

    Attributes:
        name: unique in the corpus.
        where: file (and record), for errors and lists.
        fps: steps per second.
        camera: (T, 4, 4) camera → world; axes as in OpenCV: x right, y down, z forward.
        camera_valid: (T,) bool.
        hands: ``left`` and ``right``.
        texts: T instructions; empty where the corpus gives none. For a corpus with words per hand, ``hand_texts``.
        frames: T pictures of the camera; None without.
        pose: how ``fingers`` were made: ``points`` or ``mano``.
        hand_texts: side → T texts; empty mapping where the corpus does not tell the hands apart.
    """

    name: str
    where: str
    fps: float
    camera: np.ndarray
    camera_valid: np.ndarray
    hands: dict[str, HandTrack]
    texts: Sequence[str]
    frames: VideoFrames | EncodedFrames | None
    pose: str = "points"
    hand_texts: dict[str, Sequence[str]] | None = None

    def __len__(self) -> int:
        return len(self.camera)

    def valid(self, hands: str) -> np.ndarray:
        """(T,) bool: the camera and the hands asked for are known."""
        valid = self.camera_valid.astype(bool)
        for side in sides_of(hands):
            valid = valid & self.hands[side].valid
        return valid

    def instructions(self, hands: str) -> list[str]:
        """Instruction of every step for the hands asked for; empty where there is none.

        Words per hand are put as VITRA does: "Left hand: …. Right hand: …." with "None." for an idle hand [X].
        """
        if not self.hand_texts:
            return [" ".join(text.split()) for text in self.texts]
        told = {side: [" ".join(text.split()) for text in self.hand_texts[side]] for side in SIDES}
        if hands != "both":
            return told[hands]
        pairs = zip(told["left"], told["right"], strict=True)
        return [
            f"Left hand: {left.rstrip('.') or 'None'}. Right hand: {right.rstrip('.') or 'None'}."
            if left or right
            else ""
            for left, right in pairs
        ]


def sides_of(hands: str) -> tuple[str, ...]:
    """``both`` → left, right; a side → itself."""
    return SIDES if hands == "both" else (hands,)


def track_points(points: np.ndarray, side: str, tracked: np.ndarray) -> HandTrack:
    """Points of a hand in world coordinates → its track.

    Args:
        points: (T, 21, 3) metres; see ``points``.
        side: ``left`` or ``right``.
        tracked: (T,) bool, what the corpus says.
    """
    wrist, whole = wrist_frames(points, side)
    fingers, bent = finger_pose(points, wrist, side)
    return HandTrack(wrist, fingers, np.asarray(tracked, bool) & whole & bent)


def contract_of(hands: str, fps: float, views: tuple[str, ...]) -> DataContract:
    """32 channels for two hands, 16 for one: per hand wrist position, axis-angle, 10 eigengrasps [P]."""
    groups: list[ChannelGroup] = []
    for side in sides_of(hands):
        pose = tuple(f"{side}_wrist_{axis}" for axis in ("x", "y", "z", "rx", "ry", "rz"))
        groups.append(ChannelGroup(f"{side}_wrist", "eef_pose", WRIST_UNIT, pose))
        grasps = tuple(f"{side}_grasp_{i}" for i in range(GRASPS))
        groups.append(ChannelGroup(f"{side}_hand", "hand", "eigengrasp", grasps))
    return DataContract(
        prompt=PromptSpec("human", "dual arms" if hands == "both" else "single arm"),
        frequency_hz=fps,
        horizon=HORIZON,
        convention="relative_eef",  # wrists relative to the chunk's first frame [P]
        views=views,
        state=tuple(groups),
        action=tuple(groups),
    )


def stretches(usable: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(usable, bool), [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def channels(recording: HandRecording, hands: str, grasps: Eigengrasps, start: int, end: int) -> np.ndarray:
    """(end − start, 32 or 16) of a stretch, wrists in the frame of the camera at its first step."""
    world_to_camera = np.linalg.inv(recording.camera[start].astype(np.float64))
    parts = []
    for side in sides_of(hands):
        track = recording.hands[side]
        wrist = world_to_camera @ track.wrist[start:end].astype(np.float64)
        turn = from_quaternion(Rotation.from_matrix(wrist[:, :3, :3]).as_quat(), "axis_angle")
        parts += [wrist[:, :3, 3], turn, grasps.coefficients(track.fingers[start:end])]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rows_of(values: np.ndarray, task: np.ndarray, fps: float) -> EpisodeRows:
    """(n, c) states and (n,) tasks → n − 1 steps: people have no commands, so the next state is the action [P]."""
    steps = len(values) - 1
    return EpisodeRows(
        state=values[:-1],
        action=values[1:],
        timestamp=np.arange(steps) / fps,
        task=task[:-1],
        perturbed=np.zeros(steps, bool),
    )
