"""R2R and RxR in continuous environments (VLN-CE) with Habitat: val-unseen, 500 steps, a stop within 3 m.

Facts from github.com/jacobkrantz/VLN-CE at 729d141 (habitat_extensions: measures.py, config/vlnce_task.yaml and
rxr_vlnce_english_task.yaml); written against habitat-lab 0.3 (habitat.Env, habitat.get_config), because VLN-CE's own
habitat 0.1.7 needs Python 3.6. Folders as VLN-CE has them, below ``VLN_CE_DATA`` (default: data).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwen_vla_core.data.vln_ce import read_json
from qwen_vla_core.data.waypoints import STEP_M, heading, planar
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.navigation import ndtw
from qwen_vla_core.evaluation.suites.external import ExternalWorld, Seen, missing_modules, suite_embodiment
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol, Trial, Watcher
from qwen_vla_core.sim.track import Track

SUCCESS_M = 3.0
MAX_STEPS = 500
STILL_PERIODS = 2  # [O] so many waypoints in a row that stay where the base is are a stop
INSTALL = (
    "habitat-sim 0.3.3 and habitat-lab 0.3.3: conda install habitat-sim=0.3.3 headless -c conda-forge -c "
    "aihabitat, then pip install habitat-lab"
)
DATA = (
    "the Matterport3D scenes (niessner.github.io/Matterport, download_mp.py --task habitat) as "
    "scene_datasets/mp3d/<scene>/<scene>.glb, and the episodes (github.com/jacobkrantz/VLN-CE, Data) in datasets/"
)


@dataclass(frozen=True)
class Corpus:
    """What R2R and RxR do not share.

    Attributes:
        episodes, walks: files below the data folder.
        turn_deg: one turn.
        size: of the picture, width and height.
        hfov_deg: of the camera.
        height_m: of the camera; None: Habitat's.
        sliding: whether the agent slides along walls.
        languages: of the instructions; empty: all.
    """

    episodes: str
    walks: str
    turn_deg: float
    size: tuple[int, int]
    hfov_deg: int
    height_m: float | None
    sliding: bool
    languages: tuple[str, ...] = ()


R2R = Corpus(
    "datasets/R2R_VLNCE_v1-3_preprocessed/val_unseen/val_unseen.json.gz",
    "datasets/R2R_VLNCE_v1-3_preprocessed/val_unseen/val_unseen_gt.json.gz",
    15.0, (224, 224), 90, None, True,
)  # fmt: skip
RXR = Corpus(
    "datasets/RxR_VLNCE_v0/val_unseen/val_unseen_guide.json.gz",
    "datasets/RxR_VLNCE_v0/val_unseen/val_unseen_guide_gt.json.gz",
    30.0, (640, 480), 79, 0.88, False, ("en-US", "en-IN"),
)  # fmt: skip


def discrete_action(target: np.ndarray, here: np.ndarray, turn_rad: float) -> str | None:
    """The one of Habitat's moves that brings the base nearest to a waypoint; None: it is there.

    Args:
        target: x, y, heading of the waypoint.
        here: x, y, heading of the base.
        turn_rad: one turn.
    """
    offset = target[:2] - here[:2]
    distance, aim = math.hypot(*offset), _wrapped(math.atan2(offset[1], offset[0]) - here[2])
    # A waypoint just behind was walked past: turning round for it would be wrong.
    near = distance < STEP_M / 2 or (distance < STEP_M and abs(aim) > math.pi / 2)
    if near:
        aim = _wrapped(float(target[2] - here[2]))
    if abs(aim) <= turn_rad / 2 * (1 - 1e-6):
        return None if near else "move_forward"
    return "turn_left" if aim > 0 else "turn_right"


class HabitatSimulator:
    """The episodes of a corpus.

    Args:
        env: a ``habitat.Env`` whose dataset holds them.
        walks: episode id → locations of the annotated walk, (m, 3) as Habitat has them.
        turn_deg: one turn.
    """

    def __init__(self, env: Any, walks: Mapping[str, np.ndarray], turn_deg: float) -> None:
        self.env, self.walks, self.turn_rad = env, walks, math.radians(turn_deg)
        self.episodes = list(env.episodes)

    def reset(self, seed: int, instruction: str | None) -> Seen:
        """Episode number ``seed`` of the file, counted around its end."""
        self.env.current_episode = self.episodes[seed % len(self.episodes)]
        self._shown = self.env.reset()
        self._text = instruction or self.env.current_episode.instruction.instruction_text
        self._still, self._path, self._least = 0, [self._position()], math.inf
        return self._seen()

    def step(self, command: Mapping[str, np.ndarray]) -> Seen:
        """One period: one move towards the waypoint, or none; a stop after some that stay."""
        move = discrete_action(command["/target_pose"], self._pose(), self.turn_rad)
        self._still = self._still + 1 if move is None else 0
        if self._still >= STILL_PERIODS:
            move = "stop"
        if move is not None:
            self._shown = self.env.step({"action": move})
            if not np.array_equal(position := self._position(), self._path[-1]):
                self._path.append(position)
        return self._seen()

    def track(self) -> Track | None:
        """None: Habitat measures in three dimensions and along its own navigation mesh."""
        return None

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _position(self) -> np.ndarray:
        return np.array(self.env.sim.get_agent_state().position, np.float64)

    def _pose(self) -> np.ndarray:
        turn = self.env.sim.get_agent_state().rotation
        return np.array([*planar(self._position()), heading((turn.x, turn.y, turn.z, turn.w))])

    def _seen(self) -> Seen:
        measured = self.env.get_metrics()
        self._least = min(self._least, float(measured["distance_to_goal"]))
        path = np.stack(self._path)
        metrics = {
            "navigation_error_m": float(measured["distance_to_goal"]),
            "oracle_success": float(self._least < SUCCESS_M),
            "spl": float(measured["spl"]),
            "ndtw": ndtw(path, self.walks[str(self.env.current_episode.episode_id)], SUCCESS_M),
            "path_m": float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum()),
        }
        pose = dict(zip(("x", "y", "heading"), self._pose().tolist(), strict=True))
        images = {"/rgb": np.ascontiguousarray(self._shown["rgb"][..., :3])}
        return Seen(
            images, {"/pose": pose}, self._text, bool(measured["success"]), bool(self.env.episode_over), metrics
        )


class VlnCeSuite:
    """R2R or RxR; which one, a subclass says."""

    name: str
    title: str
    corpus: Corpus
    embodiment = "vln_ce"
    axes: ClassVar[Mapping[str, str]] = {"val_unseen": "houses and walks that training has not seen"}
    tasks: tuple[str, ...] = ("instruction",)
    metrics: tuple[str, ...] = ("navigation_error_m", "oracle_success", "spl", "ndtw", "path_m")
    protocol: PublishedProtocol

    def missing(self) -> str | None:
        """Modules, then episodes, then houses."""
        absent = missing_modules(("habitat", "habitat_sim"), INSTALL)
        if absent is not None:
            return absent
        for needed in (self.corpus.episodes, self.corpus.walks, "scene_datasets/mp3d"):
            if not (_data() / needed).exists():
                return f"{DATA}  (no {_data() / needed}; VLN_CE_DATA names the folder)"
        return None

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Consecutive episodes of the file."""
        return [Trial("val_unseen", "instruction", seed + i) for i in range(episodes)]

    def make_world(self, trial: Trial) -> ExternalWorld:
        """All episodes in one environment; Habitat changes the house when it has to."""
        problem = self.missing()
        if problem is not None:
            raise UserError(f"install {problem}")
        walks = {name: np.array(walk["locations"]) for name, walk in read_json(_data() / self.corpus.walks).items()}
        simulator = HabitatSimulator(habitat_env(self.corpus, _data()), walks, self.corpus.turn_deg)
        return self.world(simulator)

    def world(self, simulator: HabitatSimulator) -> ExternalWorld:
        """The robot of the YAML with this corpus' camera."""
        robot = suite_embodiment(self.embodiment)
        cameras = tuple(replace(camera, size=self.corpus.size) for camera in robot.cameras)
        return ExternalWorld(replace(robot, cameras=cameras), simulator, MAX_STEPS)

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """Habitat measures."""
        return ()


def habitat_env(corpus: Corpus, data: Path) -> Any:
    """``habitat.Env`` set as VLN-CE sets it, with a corpus' episodes."""
    import habitat
    from habitat.core.dataset import Dataset
    from habitat.tasks.nav.nav import NavigationGoal
    from habitat.tasks.vln.vln import InstructionData, VLNEpisode

    config = habitat.get_config("benchmark/nav/vln_r2r.yaml", overrides(corpus))
    dataset: Any = Dataset()
    dataset.episodes = [
        VLNEpisode(
            episode_id=str(item["episode_id"]),
            trajectory_id=item["trajectory_id"],
            scene_id=str(data / "scene_datasets" / item["scene_id"].removeprefix("data/scene_datasets/")),
            start_position=item["start_position"],
            start_rotation=item["start_rotation"],
            goals=[NavigationGoal(position=goal["position"], radius=goal.get("radius")) for goal in item["goals"]],
            reference_path=item["reference_path"],
            instruction=InstructionData(instruction_text=item["instruction"]["instruction_text"]),
        )
        for item in chosen_episodes(corpus, data)
    ]
    return habitat.Env(config, dataset)


def overrides(corpus: Corpus) -> list[str]:
    """What VLN-CE sets otherwise than habitat-lab's ``benchmark/nav/vln_r2r.yaml``."""
    width, height = corpus.size
    sensor = "habitat.simulator.agents.main_agent.sim_sensors.rgb_sensor"
    changes = [
        f"habitat.environment.max_episode_steps={MAX_STEPS}",
        f"habitat.simulator.forward_step_size={STEP_M}",
        f"habitat.simulator.turn_angle={corpus.turn_deg:g}",
        f"habitat.simulator.habitat_sim_v0.allow_sliding={corpus.sliding}",
        f"{sensor}.width={width}",
        f"{sensor}.height={height}",
        f"{sensor}.hfov={corpus.hfov_deg}",
        f"habitat.task.measurements.success.success_distance={SUCCESS_M:g}",
    ]
    if corpus.height_m is not None:
        changes += [
            f"{sensor}.position=[0,{corpus.height_m},0]",
            f"habitat.simulator.agents.main_agent.height={corpus.height_m}",
            "habitat.simulator.agents.main_agent.radius=0.18",
        ]
    return changes


def chosen_episodes(corpus: Corpus, data: Path) -> list[dict[str, Any]]:
    """The corpus' episodes in its languages, in the order of the file.

    Raises:
        UserError: the file is missing or damaged, or has none.
    """
    path = data / corpus.episodes
    found = [
        item
        for item in read_json(path).get("episodes", [])
        if not corpus.languages or item["instruction"].get("language") in corpus.languages
    ]
    if not found:
        raise UserError(f"{path}: no episode in {', '.join(corpus.languages) or 'any language'}; download it again")
    return found


def _data() -> Path:
    return Path(os.environ.get("VLN_CE_DATA", "data")).expanduser()


def _wrapped(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _protocol(source: str, preprocessing: tuple[str, ...], deviations: tuple[str, ...]) -> PublishedProtocol:
    return PublishedProtocol(
        source=source,
        tag="X",
        trials_per_task=0,
        horizon_steps={"*": MAX_STEPS},
        control_hz=2.0,
        seeds="the episodes of val_unseen, numbered in the order of the file",
        success="the agent says stop with less than 3 m of free way to the goal (SR); NE: that way at the end; OSR: it "
        "was ever less than 3 m; SPL: Anderson et al. 2018; nDTW: Ilharco et al. 2019, over all positions",
        preprocessing=(
            *preprocessing,
            "waypoints at 2 Hz; each period is one of Habitat's moves: 0.25 m or one turn [O], the nearest to the "
            f"waypoint; {STILL_PERIODS} periods of staying are a stop [O]",
        ),
        deviations=(
            "habitat-lab 0.3 instead of 0.1.7",
            "a period without a move does not count among the 500 steps of Habitat, but among ours",
            *deviations,
        ),
    )


class R2RSuite(VlnCeSuite):
    """``--suite r2r``."""

    name = "r2r"
    title = "R2R in continuous environments (VLN-CE), val-unseen"
    corpus = R2R
    protocol = _protocol(
        "VLN-CE, arXiv 2004.02857; github.com/jacobkrantz/VLN-CE at 729d141, habitat_extensions/config/vlnce_task.yaml",
        ("one camera 224×224, 90°; turns of 15°; sliding along walls",), (),
    )  # fmt: skip


class RxRSuite(VlnCeSuite):
    """``--suite rxr``."""

    name = "rxr"
    title = "RxR in continuous environments (VLN-CE), val-unseen, English guide instructions"
    corpus = RXR
    protocol = _protocol(
        "RxR-Habitat; github.com/jacobkrantz/VLN-CE at 729d141, habitat_extensions/config/rxr_vlnce_english_task.yaml",
        ("one camera 640×480, 79°, 0.88 m high; turns of 30°; no sliding",),
        ("the challenge also has moves that look up and down; waypoints do not",),
    )
