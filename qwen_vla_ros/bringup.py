"""The graph as data: which nodes run, with which parameters and environment. No ROS import, no process.

Both starters read it: the launch files (``ros2 launch``) and ``qwen-vla up`` (no launch installed).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import qwen_vla_ros
from qwen_vla_core.embodiment import load_robot
from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import DEFAULT_CHECKPOINT, resource_dir
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, find_strategy
from qwen_vla_core.serving.access import check_binding, read_token

Value = str | int | float | bool | list[str]
PACKAGE = "qwen_vla_ros"
PROFILE = "fastdds.xml"
# A process killed while it reads shared memory can make who writes to it next wait for seconds: not the controller.
CONTROLLER_PROFILE = "fastdds_udp.xml"
DASHBOARD_TOKEN = "QWEN_VLA_DASHBOARD_TOKEN"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")


@dataclass(frozen=True)
class NodeSpec:
    """One process of the graph.

    Attributes:
        executable: console script of ``package``; also the module ``<package>.<executable>``.
        parameters: ROS parameters; empty strings are left out (the node's own default holds).
        environment: variables to set for the process, on top of the inherited ones.
        ends_graph: this node's clean exit (0) is the end of the job, not a failure.
        optional: the robot does not need this node: its end does not end the others, and it is started again.
        stop_order: nodes stop in ascending order; the controller is last, so that it can hold while the rest ends.
    """

    name: str
    executable: str
    namespace: str = ""
    package: str = PACKAGE
    parameters: Mapping[str, Value] = field(default_factory=dict)
    params_file: str = ""
    remappings: tuple[tuple[str, str], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log_level: str = "info"
    ends_graph: bool = False
    optional: bool = False
    stop_order: int = 0

    @property
    def label(self) -> str:
        """Its name, with the namespace where there is one: unique in a graph of several robots."""
        return f"{self.namespace.strip('/')}/{self.name}".lstrip("/")


def build_graph(
    embodiment: str = "aloha",
    checkpoint: str = DEFAULT_CHECKPOINT,
    instruction: str = "",
    strategy: str = DEFAULT_STRATEGY,
    namespace: str = "",
    sim: bool | None = None,
    record: bool = True,
    use_sim_time: bool = False,
    autostart: bool = True,
    params_file: str = "",
    log_level: str = "info",
    episodes: int = 0,
    seed: int = 0,
    task: str = "",
    episode_timeout_s: float = 0.0,
    run_dir: str = "",
    server: str = "",
    server_token_file: str = "",
    server_ca_file: str = "",
    mock: bool = False,
    policy: bool = True,
    suite: str = "",
    axis: str = "",
    namespaced_topics: bool = False,
    dashboard: bool = False,
    dashboard_host: str = DEFAULT_HOST,
    dashboard_port: int = DEFAULT_PORT,
    dashboard_token_file: str = "",
    dashboard_read_only: bool = False,
) -> list[NodeSpec]:
    """The nodes of one robot, in start order.

    Args:
        embodiment: shipped name or path of the robot's YAML.
        checkpoint: shipped name or folder of the policy's checkpoint.
        instruction: what to do; in simulation an empty one lets the world choose for every episode.
        strategy: how chunks follow each other, of policy and controller (``runtime.continuity``).
        namespace: ROS namespace of all nodes (topics in the YAML that start with "/" stay where they are).
        sim: a simulated robot takes the place of the drivers; None: unless the mock does.
        record: one MCAP bag per episode, below ``run_dir``.
        use_sim_time: all nodes follow /clock; in simulation the simulator then publishes it.
        autostart: the policy configures and activates itself; otherwise use ``ros2 lifecycle``.
        params_file: ROS parameter YAML that overrides what is set here.
        log_level: debug, info, warn, error or fatal.
        episodes: in simulation, end after this many; 0 goes on until stopped.
        seed: of the first simulated episode; the next ones count up.
        task: in simulation, what the world draws instructions from when none is given: one of its tasks, its first when
            empty, "all" for everything it knows.
        episode_timeout_s: simulated seconds until an episode counts as failed; 0: the world's own limit.
        run_dir: folder of this run's bags and summary; default: the next free ``rollouts/<date>_<number>``.
        server: address of a policy server that is asked instead of a checkpoint, e.g. ``ws://gpu:8000``.
        server_token_file: file with its token.
        server_ca_file: certificate to trust for ``wss://``.
        mock: a kinematic mock takes the place of the drivers: it works for every robot, and no episode is judged.
        policy: start the policy; without it any other source of chunks may drive.
        suite: in simulation, use the worlds of this suite (``qwen-vla eval suites``).
        axis: of that suite.
        namespaced_topics: topics that the YAML writes with a leading "/" are inside the namespace too.
        dashboard: start the operator's web page.
        dashboard_host: address it is served on; any but a loopback one needs a token.
        dashboard_port: its port; where it is taken, the next free one.
        dashboard_token_file: file with the token; empty: QWEN_VLA_DASHBOARD_TOKEN.
        dashboard_read_only: show everything, press nothing.

    Raises:
        UserError: The YAML is wrong, the robot has no simulation, or a flag has an impossible value.
    """
    robot = load_robot(embodiment)
    sim = not mock if sim is None else sim
    if sim and mock:
        raise UserError("sim and mock both stand in for the robot: choose sim:=true (--sim) or mock:=true (--mock)")
    if sim and robot.simulation is None:
        raise UserError(
            f"embodiment '{robot.name}' has no simulation section: start it with mock:=true (--mock), "
            "which needs none, or on the robot with sim:=false (--no-sim)"
        )
    if sim and not policy:
        raise UserError("the simulator's episodes wait for a policy: use mock:=true (--mock) where another node drives")
    if episodes and not sim:
        raise UserError(
            "episodes need the simulator: on a robot, end episodes with the episode_success/failure services"
        )
    if log_level not in LOG_LEVELS:
        raise UserError(f"log_level '{log_level}' is none of {', '.join(LOG_LEVELS)}")
    find_strategy(strategy)
    if params_file and not Path(params_file).is_file():
        raise UserError(f"params_file '{params_file}' does not exist")
    if server and not server.startswith(("ws://", "wss://")):
        raise UserError(f"server '{server}' is no address like ws://host:8000 or wss://host:8000")
    for name, file in (("server_token_file", server_token_file), ("server_ca_file", server_ca_file)):
        if file and not server:
            raise UserError(f"{name} needs a server (server:=ws://host:8000, --server)")
        if file and not Path(file).expanduser().is_file():
            raise UserError(f"{name} '{file}' does not exist")
    yaml_path = robot.source_path if Path(robot.source_path).is_file() else embodiment
    environment = node_environment()
    controller_environment = node_environment(profile_file=CONTROLLER_PROFILE)

    def node(name: str, stop_order: int, parameters: Mapping[str, Value], ends_graph: bool = False) -> NodeSpec:
        clock: dict[str, Value] = {"use_sim_time": True} if use_sim_time and name != "sim_node" else {}
        values = {"embodiment": str(yaml_path), **parameters, **clock}
        if namespaced_topics:
            values["namespaced_topics"] = True
        return NodeSpec(
            name=name,
            executable=name,
            namespace=namespace,
            parameters={key: value for key, value in values.items() if value != ""},
            params_file=params_file,
            environment=controller_environment if name == "controller_node" else environment,
            log_level=log_level,
            ends_graph=ends_graph,
            stop_order=stop_order,
        )

    # In simulation the simulator starts every episode: it resets the world, then gives the instruction.
    controller: dict[str, Value] = {"simulated": sim or mock, "autostart": autostart, "start_on_activate": not sim}
    controller["instruction"] = "" if sim else instruction
    nodes = [node("controller_node", 3, {**controller, "strategy": strategy})]
    if record:
        recorder: dict[str, Value] = {"run_dir": run_dir, "checkpoint": server or checkpoint, "simulated": sim or mock}
        if mock:
            recorder["operated"] = True  # nobody else says when an episode begins
        nodes.append(node("recorder_node", 2, {**recorder, "instruction": "" if sim else instruction}))
    asked: dict[str, Value] = {"checkpoint": checkpoint}
    if server:
        asked = {"server": server, "server_token_file": server_token_file, "server_ca_file": server_ca_file}
    if sim:
        asked["frozen_after_s"] = 0.0  # a simulated camera has no noise: a still scene is the same picture again
    else:
        asked["instruction"] = instruction
    if policy:
        nodes.append(node("policy_node", 0, {**asked, "strategy": strategy, "autostart": autostart}))
    if mock:
        nodes.append(node("mock_node", 1, {}))
    if sim:
        summary = str(Path(run_dir) / "summary.json") if run_dir else ""
        parameters: dict[str, Value] = {
            "instruction": instruction,
            "episodes": episodes,
            "seed": seed,
            "task": task,
            "suite": suite,
            "axis": axis,
            "episode_timeout_s": float(episode_timeout_s),
            "publish_clock": use_sim_time,
            "wait_for_recorder": record,
            "summary_file": summary,
        }
        nodes.append(node("sim_node", 1, parameters, ends_graph=episodes > 0))
    if dashboard:
        check_binding(
            dashboard_host,
            read_token(token_file=dashboard_token_file, variable=DASHBOARD_TOKEN),
            "dashboard_host",
            f"dashboard_token_file or {DASHBOARD_TOKEN}",
        )
        page: dict[str, Value] = {
            "simulated": sim or mock,
            "rollouts": str(Path(run_dir).parent) if run_dir else "",
            "host": dashboard_host,
            "port": dashboard_port,
            "token_file": dashboard_token_file,
            "read_only": dashboard_read_only,
        }
        nodes.append(replace(node("dashboard_node", 0, page), optional=True))
    return nodes


def name_robots(robots: Sequence[str]) -> dict[str, str]:
    """Namespace → embodiment of ``left=aloha`` or just ``aloha``, whose namespace is then the robot's name.

    Raises:
        UserError: a namespace twice.
    """
    named: dict[str, str] = {}
    for text in robots:
        first, equals, second = text.partition("=")
        given = (first.strip("/"), second) if equals else (load_robot(text).name, text)
        if given[0] in named:
            raise UserError(f"namespace '{given[0]}' is there twice: name them, e.g. left={given[1]} right={given[1]}")
        named[given[0]] = given[1]
    return named


def build_fleet(robots: Mapping[str, str], **arguments: Any) -> list[NodeSpec]:
    """The nodes of several robots, of which one policy process drives all.

    Args:
        robots: namespace → embodiment. Every topic of each is inside its namespace.
        arguments: as of ``build_graph``, for all of them; ``namespace`` is the parent of theirs.

    Raises:
        UserError: as ``build_graph``, or an argument that several robots cannot share.
    """
    parent, run_dir = str(arguments.pop("namespace", "")).strip("/"), str(arguments.pop("run_dir", ""))
    for name in ("embodiment", "namespaced_topics"):
        arguments.pop(name, None)
    if arguments.get("use_sim_time") and arguments.get("sim", not arguments.get("mock", False)) is not False:
        raise UserError("use_sim_time: several simulators would each publish /clock; leave it out")
    nodes: list[NodeSpec] = []
    policies: list[NodeSpec] = []
    for namespace, embodiment in robots.items():
        below = f"{parent}/{namespace}".strip("/")
        own_dir = str(Path(run_dir) / namespace) if run_dir else ""
        specs = build_graph(embodiment, namespace=below, run_dir=own_dir, namespaced_topics=True, **arguments)
        policies += [spec for spec in specs if spec.name == "policy_node"]
        nodes += [spec for spec in specs if spec.name != "policy_node"]
    if policies:
        one = policies[0]
        own = ("embodiment", "namespaced_topics")
        parameters: dict[str, Value] = {key: value for key, value in one.parameters.items() if key not in own}
        parameters["robots"] = [
            f"{namespace}={spec.parameters['embodiment']}" for namespace, spec in zip(robots, policies, strict=True)
        ]
        nodes.append(replace(one, namespace=parent, parameters=parameters))
    return nodes


def node_environment(base: Mapping[str, str] | None = None, *, profile_file: str = PROFILE) -> dict[str, str]:
    """Variables the nodes need; what the user has set in ``base`` (default: this process's) is left as it is."""
    base = os.environ if base is None else base
    profile = str(resource_dir("config") / profile_file)
    wanted = {
        "FASTRTPS_DEFAULT_PROFILES_FILE": profile,  # read by Jazzy
        "FASTDDS_DEFAULT_PROFILES_FILE": profile,  # read by Kilted and later
        "MUJOCO_GL": "egl",
        "OMP_NUM_THREADS": "1",  # several nodes share the cores; the policy raises its own with torch_threads
        "PYTHONUNBUFFERED": "1",
    }
    if "FASTRTPS_DEFAULT_PROFILES_FILE" in base or "FASTDDS_DEFAULT_PROFILES_FILE" in base:
        wanted = {key: value for key, value in wanted.items() if "PROFILES" not in key}
    return {key: value for key, value in wanted.items() if key not in base}


def command_line(spec: NodeSpec) -> list[str]:
    """The command that runs ``spec`` with this interpreter, without any ROS command-line tool."""
    command = [sys.executable, "-m", f"{spec.package}.{spec.executable}", "--ros-args", "-r", f"__node:={spec.name}"]
    if spec.namespace:
        command += ["-r", f"__ns:=/{spec.namespace.strip('/')}"]
    for source, target in spec.remappings:
        command += ["-r", f"{source}:={target}"]
    for key, value in spec.parameters.items():
        # JSON is YAML: quoted text can never turn into a number or a boolean on the other side.
        command += ["-p", f"{key}:={json.dumps(value, ensure_ascii=False)}"]
    if spec.params_file:
        command += ["--params-file", spec.params_file]
    return [*command, "--log-level", f"{spec.name}:={spec.log_level}"]


def process_environment(spec: NodeSpec, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of ``spec``'s process: inherited, plus its own, plus this package on the path."""
    base = os.environ if base is None else base
    root = str(Path(qwen_vla_ros.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [base.get("PYTHONPATH", "")])])
    return {**base, **spec.environment, "PYTHONPATH": path}


def next_run_dir(rollouts: str | Path) -> Path:
    """Creates and returns the next free ``<rollouts>/<date>_<number>``, e.g. ``rollouts/20250131_002``."""
    today = date.today().strftime("%Y%m%d")
    for number in range(10_000):
        path = Path(rollouts) / f"{today}_{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UserError(f"no free run folder below {rollouts}: remove old ones or choose another --rollouts")
