"""Several robots, each in its own namespace, driven by one process with one copy of the weights.

Each robot has a ``policy_node`` of its own: its lifecycle, instruction, status and worker, its callbacks in a thread of
their own. What they share is the model: requests that wait at the same time are answered in one pass, of different
robots too. Nobody waits for a robot that does not ask: one whose camera is gone holds, and the others go on.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from rcl_interfaces.msg import ParameterDescriptor, ParameterType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter

from qwen_vla_core.errors import UserError
from qwen_vla_ros.engines import EngineShelf
from qwen_vla_ros.node_utils import spin_until
from qwen_vla_ros.policy_node import PolicyNode

_NAMESPACE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:/[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Member:
    """One robot: its namespace, and its embodiment where that is not left to the parameter of that name."""

    namespace: str
    embodiment: str = ""


def parse_members(texts: list[str]) -> list[Member]:
    """``["left=aloha", "right=/path/to.yaml", "third"]`` → members.

    Raises:
        UserError: a namespace that is none, or one twice.
    """
    members: list[Member] = []
    for text in (text.strip() for text in texts if text.strip()):
        namespace, _, embodiment = text.partition("=")
        namespace = namespace.strip().strip("/")
        if not _NAMESPACE.fullmatch(namespace):
            raise UserError(f"parameter 'robots': '{text}' is no NAMESPACE or NAMESPACE=EMBODIMENT, e.g. left=aloha")
        if any(member.namespace == namespace for member in members):
            raise UserError(f"parameter 'robots': namespace '{namespace}' is there twice; each robot needs its own")
        members.append(Member(namespace, embodiment.strip()))
    return members


def asked_for() -> list[Member]:
    """The parameter ``robots`` of the node that this process is; empty: there is one robot, as always."""
    node = Node("policy_node")
    try:
        text = "Several robots: a NAMESPACE or NAMESPACE=EMBODIMENT each; empty: one robot, in this node's namespace"
        descriptor = ParameterDescriptor(description=text, type=ParameterType.PARAMETER_STRING_ARRAY, read_only=True)
        return parse_members(list(node.declare_parameter("robots", [""], descriptor).value or []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"parameter 'robots' of {node.get_name()}: {error}") from error
    finally:
        node.destroy_node()


class Fleet(Node):
    """The policies of several robots; itself it does nothing but hold them together.

    Raises:
        UserError: one of them cannot start; the message says which and why.
    """

    def __init__(self, members: list[Member]) -> None:
        super().__init__("policy_fleet")
        self.shelf = EngineShelf(shared=True)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.robots: dict[str, PolicyNode] = {}
        base = self.get_namespace().rstrip("/")
        try:
            for member in members:
                self.robots[member.namespace] = self._make(member, f"{base}/{member.namespace}")
            for namespace, robot in self.robots.items():
                if robot.get_parameter("autostart").value:
                    try:
                        robot.start()
                    except UserError as error:
                        raise UserError(f"{namespace}: {error}") from error
        except BaseException:
            self.close()
            self.destroy_node()
            raise
        for namespace, robot in self.robots.items():
            thread = threading.Thread(target=self._spin, args=(robot,), name=f"callbacks of {namespace}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.get_logger().info(
            f"{len(self.robots)} robots: {', '.join(self.robots)}; {self.shelf.loads} model in memory"
        )

    def _make(self, member: Member, namespace: str) -> PolicyNode:
        """A policy node whose own arguments win over those of the process, which name no namespace of its own."""
        given = [Parameter("namespaced_topics", value=True)]
        if member.embodiment:
            given.append(Parameter("embodiment", value=member.embodiment))
        return PolicyNode(self.shelf, cli_args=["--ros-args", "-r", f"__ns:={namespace}"], parameter_overrides=given)

    def _spin(self, robot: PolicyNode) -> None:
        executor = SingleThreadedExecutor()
        executor.add_node(robot)
        try:
            spin_until(executor, self._stopping.is_set)
        finally:
            executor.remove_node(robot)

    def close(self) -> None:
        """Ends every worker, then the model's thread."""
        self._stopping.set()
        for robot in self.robots.values():
            robot.ask_to_stop()
        for thread in self._threads:
            thread.join(timeout=2.0)
        for robot in self.robots.values():
            robot.close()
        self.shelf.clear()

    def destroy_node(self) -> None:
        """With its robots."""
        for robot in self.robots.values():
            robot.destroy_node()
        self.robots.clear()
        super().destroy_node()
