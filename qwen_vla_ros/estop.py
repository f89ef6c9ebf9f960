"""The emergency stop by topic: a request anyone may publish, and the state everyone may read.

``qwen_vla/estop_request`` (std_msgs/Bool): true latches the emergency stop, also when it was published before the
controller started. False does not release it: only the ``reset`` service does, and not while the last request is true
(a button that is still pressed). ``qwen_vla/estopped`` (std_msgs/Bool, latched) tells whether the stop is latched.

Two subscriptions hear one topic, because DDS delivers nothing between a volatile publisher and a subscriber that asks
for history: one takes whatever is offered, reliable or not; the other takes what a latching publisher said earlier.
"""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Bool

from qwen_vla_ros.node_utils import LATCHED_QOS

ESTOP_REQUEST_TOPIC = "qwen_vla/estop_request"
ESTOPPED_TOPIC = "qwen_vla/estopped"
ANY_QOS = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
)
REASON = "emergency stop requested on " + ESTOP_REQUEST_TOPIC


class EstopTopic:
    """Hears requests and publishes the state, for one node.

    Attributes:
        pressed: whether the last request was true.
    """

    def __init__(self, node: Node, on_pressed: Callable[[], None]) -> None:
        """``on_pressed`` is called in the executor, whenever a request turns from false (or nothing) to true."""
        self.pressed = False
        self._on_pressed = on_pressed
        self._told: bool | None = None
        self._publisher = node.create_publisher(Bool, ESTOPPED_TOPIC, LATCHED_QOS)
        for qos in (ANY_QOS, LATCHED_QOS):
            node.create_subscription(Bool, ESTOP_REQUEST_TOPIC, self._on_request, qos)

    def _on_request(self, msg: Bool) -> None:
        was, self.pressed = self.pressed, bool(msg.data)
        if self.pressed and not was:
            self._on_pressed()

    def tell(self, estopped: bool) -> None:
        """Publishes the state where it differs from what was published last."""
        if estopped != self._told:
            self._told = estopped
            self._publisher.publish(Bool(data=estopped))
