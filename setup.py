"""ament_python package: `colcon build` and `pip install` read the same lists."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "qwen_vla_ros"
SHARE = f"share/{NAME}"


def tree(folder: str) -> list[tuple[str, list[str]]]:
    """Every file below ``folder``, installed under the package's share directory with its layout kept."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [(f"{SHARE}/{path.parent.as_posix()}", [path.as_posix()]) for path in sorted(files)]


def files(*patterns: str) -> list[str]:
    """Files of the checkout that match, sorted."""
    return sorted(path.as_posix() for pattern in patterns for path in Path().glob(pattern))


setup(
    name=NAME,
    version="0.1.0",
    description="Open, ROS 2-native implementation of Qwen-VLA.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="qwen_vla_ros maintainers",
    maintainer_email="qwen-vla-ros@users.noreply.github.com",
    packages=find_packages(include=["qwen_vla_core", "qwen_vla_core.*", "qwen_vla_ros", "qwen_vla_ros.*"]),
    package_data={
        "qwen_vla_core": ["py.typed", "sim/worlds/*.xml", "evaluation/*.yaml", "evaluation/pages/*.html"],
        "qwen_vla_ros": ["py.typed", "dashboard/static/*"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/launch", files("launch/*.launch.py")),
        (f"{SHARE}/embodiments", files("embodiments/*.yaml", "embodiments/*.json", "embodiments/*.urdf")),
        *tree("embodiments/suites"),
        *tree("config"),
        *tree("checkpoints"),
        (f"{SHARE}/training", files("training/*.py", "training/*.sh")),
        *tree("training/recipes"),
    ],
    python_requires=">=3.10",
    zip_safe=False,
    # ROS packages are never hard dependencies: a sourced ROS 2 provides them, or the [ros-wheels] extra does.
    install_requires=[
        "aiohttp>=3.10,<4",
        "jinja2>=3.1",
        "msgpack>=1.0",
        "numpy>=1.26",
        "opencv-python",
        "pyyaml>=6",
        "rosbags>=0.11,<0.12",
        "safetensors>=0.5",
        "scipy>=1.11",
        "setuptools",
        "tokenizers>=0.22",
        "torch>=2.6",
        "tqdm>=4.66",
        "transformers>=5.20,<6",
        "websockets>=15",
    ],
    extras_require={
        "ros-wheels": [
            "ros-rclpy[fastrtps]==7.1.6",
            "ros-sensor-msgs==5.3.6",
            "ros-trajectory-msgs==5.3.6",
            "ros-nav-msgs==5.3.6",
            "ros-geometry-msgs==5.3.6",
            "ros-diagnostic-msgs==5.3.6",
            "ros-visualization-msgs==5.3.6",
            "ros-shape-msgs==5.3.6",
            "ros-stereo-msgs==5.3.6",
            "ros-std-srvs==5.3.6",
            "ros-test-msgs==2.0.3",
        ],
        "sim": ["mujoco>=3.3,<3.9", "gym-aloha==0.1.5", "rtb-data==2.0.0", "pillow>=10"],
        "data": [
            "av>=14",
            "google-crc32c>=1.5",
            "h5py>=3.10",
            "huggingface_hub>=0.30",
            "jinja2>=3.1",
            "jsonschema>=4.20",
            "matplotlib>=3.8",
            "pillow>=10",
            "protobuf>=4.25",
            "pyarrow>=17",
            "zarr>=3; python_version >= '3.11'",
        ],
        "rerun": ["rerun-sdk>=0.24"],
        "ray": ["ray[data]>=2.40"],
        "train": ["matplotlib>=3.8", "peft>=0.17", "pillow>=10", "tensorboard>=2.18"],
        "flash": ["flash-attn>=2.7; platform_system == 'Linux'"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "psutil>=5.9",
            "pytest>=7.4",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.6",
            "ros-domain-coordinator==0.12.0",
            "ruff>=0.9",
            "selenium>=4.20",
            "triton>=3.3; platform_system == 'Linux'",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "qwen-vla = qwen_vla_core.cli:main",
            "policy_node = qwen_vla_ros.policy_node:main",
            "controller_node = qwen_vla_ros.controller_node:main",
            "recorder_node = qwen_vla_ros.recorder_node:main",
            "sim_node = qwen_vla_ros.sim_node:main",
            "mock_node = qwen_vla_ros.mock_node:main",
            "dashboard_node = qwen_vla_ros.dashboard_node:main",
        ],
    },
)
