"""ROS-free core of qwen_vla_ros: embodiment contract, model, simulation, runtime. Never imports rclpy."""
