"""What needs the messages of ROS to look at recorded episodes: films, exports, replay."""
