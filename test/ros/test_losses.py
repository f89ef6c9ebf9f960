"""Lost messages are counted from their publishers' numbers, and nothing else is taken for a loss."""

from __future__ import annotations

from qwen_vla_ros.losses import LossCounter


def hear(numbers: list[int | None], alone: bool = True) -> dict[str, int]:
    counter = LossCounter()
    for number in numbers:
        counter.heard("/camera", "/camera", number, lambda: alone)
    return dict(counter.lost)


def test_gaps_are_losses_wherever_the_numbering_begins() -> None:
    assert hear([7, 8, 9]) == {}
    assert hear([7, 9, 10, 14]) == {"/camera": 4}


def test_a_restarted_publisher_a_second_one_and_a_middleware_without_numbers_are_none() -> None:
    assert hear([7, 8, 1, 2]) == {}
    assert hear([7, 100, 8, 101], alone=False) == {}
    assert hear([None, None]) == {}


def test_streams_of_one_topic_are_numbered_apart() -> None:
    counter = LossCounter()
    for stream, number in (("a", 1), ("b", 50), ("a", 2), ("b", 52)):
        counter.heard("/status", stream, number, lambda: True)
    assert counter.lost == {"/status": 1}


def test_what_is_lost_before_an_episodes_first_message_counts_for_that_episode() -> None:
    counter = LossCounter()
    for number in (1, 2, 4):
        counter.heard("/camera", "/camera", number, lambda: True)
    counter.lost.clear()  # an episode begins
    counter.heard("/camera", "/camera", 7, lambda: True)
    assert counter.lost == {"/camera": 2}
