"""LeRobot datasets v3.0 and v2.1, written and read with pyarrow and PyAV alone."""

from qwen_vla_core.data.lerobot.hub import find_dataset, open_dataset
from qwen_vla_core.data.lerobot.layout import Feature, Version
from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.lerobot.staging import EpisodeStager, Staged
from qwen_vla_core.data.lerobot.writer import LeRobotWriter
from qwen_vla_core.data.video import Clip

__all__ = [
    "Clip",
    "EpisodeStager",
    "Feature",
    "LeRobotDataset",
    "LeRobotWriter",
    "Staged",
    "Version",
    "find_dataset",
    "open_dataset",
]
