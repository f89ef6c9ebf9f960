"""The operator's web page: what the robot sees and does, and the buttons; see docs/dashboard.md."""
