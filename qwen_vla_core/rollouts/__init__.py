"""Recorded episodes: finding them, judging them, reading their bags. No ROS in here."""
