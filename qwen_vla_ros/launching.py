"""What all launch files share: the arguments, and the graph of ``bringup.py`` as launch actions.

The only module that imports ROS 2's ``launch``, which the PyPI wheels do not have; nothing but launch files imports it.
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES
from qwen_vla_ros.bringup import DEFAULT_HOST, DEFAULT_PORT, LOG_LEVELS, NodeSpec, build_graph, next_run_dir

BOOLEANS = ["true", "false"]
FLAGS = ("use_sim_time", "sim", "mock", "policy", "record", "autostart", "dashboard", "dashboard_read_only")
SERVER = ("server", "server_token_file", "server_ca_file")
ROBOT = ("embodiment", "checkpoint", *SERVER, "instruction", "strategy")
TEXTS = (*ROBOT, "namespace", "params_file", "log_level", "task", "dashboard_host", "dashboard_token_file")


def describe(robot: str | None = None) -> LaunchDescription:
    """The launch description of one robot.

    Args:
        robot: shipped name of its embodiment, the default of the argument ``embodiment``; None: the user must name it.
    """
    arguments = _arguments(robot)

    def start(context: LaunchContext) -> list[Node]:
        value = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in arguments}
        flags = {name: value[name] == "true" for name in FLAGS}
        specs = build_graph(
            **{name: value[name] for name in TEXTS},
            **flags,
            episodes=int(value["episodes"]),
            seed=int(value["seed"]),
            dashboard_port=int(value["dashboard_port"]),
            episode_timeout_s=float(value["episode_timeout"]),
            run_dir=str(next_run_dir(value["rollouts"])) if flags["record"] or flags["sim"] else "",
        )
        return [_action(spec) for spec in specs]

    return LaunchDescription([*arguments, OpaqueFunction(function=start)])


def _arguments(robot: str | None) -> list[DeclareLaunchArgument]:
    return [
        DeclareLaunchArgument(
            "embodiment", default_value=robot, description="Shipped name or path of the robot's YAML"
        ),
        DeclareLaunchArgument("checkpoint", default_value=DEFAULT_CHECKPOINT, description="Shipped name or folder"),
        DeclareLaunchArgument("server", default_value="", description="Policy server, ws://host:port or wss://…"),
        DeclareLaunchArgument("server_token_file", default_value="", description="Its token; empty: QWEN_VLA_TOKEN"),
        DeclareLaunchArgument("server_ca_file", default_value="", description="Certificate to trust for wss://"),
        DeclareLaunchArgument("instruction", default_value="", description="What to do; empty: the simulator chooses"),
        DeclareLaunchArgument(
            "strategy",
            default_value=DEFAULT_STRATEGY,
            choices=list(STRATEGIES),
            description="How chunks follow each other",
        ),
        DeclareLaunchArgument("namespace", default_value="", description="ROS namespace of all nodes"),
        DeclareLaunchArgument("use_sim_time", default_value="false", choices=BOOLEANS, description="Follow /clock"),
        DeclareLaunchArgument("sim", default_value="false", choices=BOOLEANS, description="Simulate the robot"),
        DeclareLaunchArgument("mock", default_value="false", choices=BOOLEANS, description="Kinematic mock robot"),
        DeclareLaunchArgument("policy", default_value="true", choices=BOOLEANS, description="Start the policy"),
        DeclareLaunchArgument("record", default_value="true", choices=BOOLEANS, description="Record MCAP bags"),
        DeclareLaunchArgument("autostart", default_value="true", choices=BOOLEANS, description="Activate the policy"),
        DeclareLaunchArgument("params_file", default_value="", description="ROS parameter YAML with overrides"),
        DeclareLaunchArgument("log_level", default_value="info", choices=list(LOG_LEVELS), description="Log level"),
        DeclareLaunchArgument("episodes", default_value="0", description="Simulated episodes; 0: until stopped"),
        DeclareLaunchArgument("seed", default_value="0", description="Seed of the first simulated episode"),
        DeclareLaunchArgument("task", default_value="", description="What simulated instructions are drawn from"),
        DeclareLaunchArgument("episode_timeout", default_value="0.0", description="Simulated seconds; 0: the world's"),
        DeclareLaunchArgument("rollouts", default_value="rollouts", description="Folder of recorded runs"),
        DeclareLaunchArgument("dashboard", default_value="true", choices=BOOLEANS, description="Operator's web page"),
        DeclareLaunchArgument("dashboard_host", default_value=DEFAULT_HOST, description="Its address"),
        DeclareLaunchArgument(
            "dashboard_port", default_value=str(DEFAULT_PORT), description="Its port, or the next free one"
        ),
        DeclareLaunchArgument(
            "dashboard_token_file",
            default_value="",
            description="Token that browsers must show; needed beyond loopback",
        ),
        DeclareLaunchArgument(
            "dashboard_read_only", default_value="false", choices=BOOLEANS, description="Show everything, press nothing"
        ),
    ]


def _action(spec: NodeSpec) -> Node:
    """One launch action. A node's end ends the launch, so that nothing is left running half; one that the robot does
    not need is started again instead.
    """
    reason = f"{spec.name} finished" if spec.ends_graph else f"{spec.name} ended"
    return Node(
        package=spec.package,
        executable=spec.executable,
        name=spec.name,
        namespace=spec.namespace,
        parameters=[dict(spec.parameters), *filter(None, [spec.params_file])],
        remappings=list(spec.remappings),
        additional_env=dict(spec.environment),
        ros_arguments=["--log-level", f"{spec.name}:={spec.log_level}"],
        output="screen",
        on_exit=None if spec.optional else Shutdown(reason=reason),
        respawn=spec.optional,
        respawn_delay=2.0,
    )
