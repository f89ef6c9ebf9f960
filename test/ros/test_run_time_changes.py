"""What may be changed while a controller runs: the instruction, how it is taken, and, at rest, the robot."""

from __future__ import annotations

import json
import subprocess

import numpy as np
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from std_msgs.msg import String
from test_controller_node import START, FakeRobot, controller, domain, robot  # noqa: F401

from qwen_vla_ros.node_utils import LATCHED_QOS, PLAYING_TOPIC


def set_text(robot: FakeRobot, name: str, value: str) -> tuple[bool, str]:  # noqa: F811
    text = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
    request = SetParameters.Request(parameters=[Parameter(name=name, value=text)])
    (result,) = robot.call("controller_node/set_parameters", SetParameters, request).results
    return result.successful, result.reason


def test_an_instruction_finishes_or_flushes_the_plan_as_asked_live_and_is_told_per_action(
    robot: FakeRobot,  # noqa: F811
    controller: subprocess.Popen,  # noqa: F811
) -> None:
    told: list[dict] = []
    robot.node.create_subscription(String, PLAYING_TOPIC, lambda msg: told.append(json.loads(msg.data)), LATCHED_QOS)

    def instruct(text: str) -> None:
        """Chunks for it come only when the test lets them: the policy is still thinking."""
        robot.chunk_action = None
        robot.instruction_publisher.publish(String(data=text))

    def playing(instruction: str) -> None:
        robot.wait(lambda: told and told[-1]["instruction"] == instruction and told[-1]["playing"], instruction)

    robot.find("controller_node/set_parameters", SetParameters)
    instruct("red")
    robot.wait_statuses(1)
    robot.chunk_action = START
    robot.wait_mode("running")
    playing("red")

    instruct("green")  # finish is the default: the watchdog ends the old plan, not the instruction
    robot.wait_mode("holding", "watchdog")
    robot.wait(lambda: not told[-1]["playing"], what="nothing played")
    assert {event["instruction"] for event in told} == {"red", ""}  # a late state may have interrupted it before
    robot.chunk_action = START
    playing("green")
    assert told[-1]["on_instruction"] == "finish"

    assert set_text(robot, "on_instruction", "later") == (False, "'later' is none of finish, flush, hold")
    assert set_text(robot, "on_instruction", "flush") == (True, "")
    instruct("blue")
    status = robot.wait_mode("holding", "waiting for the first chunk")
    assert status["on_instruction"] == "flush" and status["played_instruction"] == ""
    robot.chunk_action = START
    playing("blue")
    assert told[-1]["on_instruction"] == "flush" and told[-2] == {**told[-2], "playing": False}


def test_another_robot_only_at_rest_and_never_under_an_emergency_stop(
    robot: FakeRobot,  # noqa: F811
    controller: subprocess.Popen,  # noqa: F811
) -> None:
    def change(transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return robot.call("controller_node/change_state", ChangeState, request).success

    robot.chunk_action = START
    robot.wait_mode("running")
    assert set_text(robot, "embodiment", "widowx") == (
        False,
        "active: deactivate first, then set another embodiment",
    )
    assert robot.call("qwen_vla/estop").success
    assert change(Transition.TRANSITION_DEACTIVATE)
    refused, reason = set_text(robot, "embodiment", "widowx")
    assert not refused and "reset first" in reason
    assert robot.call("qwen_vla/reset").success
    assert set_text(robot, "embodiment", "widowx") == (True, "")
    assert change(Transition.TRANSITION_ACTIVATE)
    status = robot.wait_mode("holding", "no state yet")
    assert status["embodiment"] == "widowx"
    assert change(Transition.TRANSITION_DEACTIVATE)
    assert set_text(robot, "embodiment", "aloha") == (True, "")
    assert change(Transition.TRANSITION_ACTIVATE)
    robot.wait_mode("running")
    np.testing.assert_allclose(robot.latest(), START, atol=1e-2)
