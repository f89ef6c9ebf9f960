"""Which processes share memory: the controller does not, so that nobody's death can make it wait for a lock."""

from __future__ import annotations

from pathlib import Path

import pytest
from graph_support import Graph, Watcher
from rclpy.utilities import get_rmw_implementation_identifier

from qwen_vla_ros.bringup import build_graph


@pytest.mark.skipif("fastrtps" not in get_rmw_implementation_identifier(), reason="the profiles are Fast DDS's")
@pytest.mark.usefixtures("no_profile_chosen")
def test_the_controller_maps_no_shared_memory_and_is_heard_by_those_who_do(watcher: Watcher, tmp_path: Path) -> None:
    specs = build_graph("aloha", run_dir=str(tmp_path / "run"))
    graph = Graph([spec for spec in specs if spec.name in ("controller_node", "recorder_node")], tmp_path)
    try:
        watcher.wait_for(lambda: {"controller", "recorder"} <= set(watcher.status), 60, "both statuses")
        maps = {name: Path(f"/proc/{process.pid}/maps").read_text() for name, process in graph.processes.items()}
        shares = {name: "/dev/shm/fastrtps_" in text for name, text in maps.items()}
        assert shares == {"controller_node": False, "recorder_node": True}
    finally:
        graph.close()
