"""Stand-ins for RoboCasa's objects: a coloured box for every category of every registry.

    python test/evaluation/gr1_assets.py

writes them into the installed package's ``models/assets/objects``, where it looks for them when it is imported; the
real ones are a download of several gigabytes. Task code, robot, controllers, furniture and renderer are the real ones.
"""

from __future__ import annotations

import colorsys
import importlib
import zlib
from pathlib import Path
from typing import Any

HALF = (0.03, 0.03, 0.04)  # metres


def write_objects(package: str) -> int:
    """Returns how many."""
    models: Any = importlib.import_module(f"{package}.models")
    known: Any = importlib.import_module(f"{package}.models.objects.kitchen_objects").OBJ_CATEGORIES
    root, count = Path(models.assets_root) / "objects", 0
    for category, registries in known.items():
        for registry in registries:
            folder = root / ("aigen_objs" if registry == "aigen" else registry) / category
            for number in range(2):  # split A leaves out the last
                place = folder / f"{category}_{number}"
                place.mkdir(parents=True, exist_ok=True)
                (place / "model.xml").write_text(_model(category))
                count += 1
    return count


def _model(category: str) -> str:
    colour = " ".join(f"{part:.2f}" for part in colorsys.hsv_to_rgb(zlib.crc32(category.encode()) % 97 / 97, 0.7, 0.8))
    x, y, z = HALF
    box = f'type="box" size="{x} {y} {z}"'
    sites = {"bottom_site": (0, 0, -z), "top_site": (0, 0, z), "horizontal_radius_site": (x, y, 0)}
    marks = "".join(
        f'<site name="{name}" pos="{" ".join(map(str, place))}" size="0.002" rgba="0 0 0 0"/>'
        for name, place in sites.items()
    )
    return (
        f'<mujoco model="{category}"><asset/><worldbody><body><body name="object">'
        f'<geom name="visual" {box} rgba="{colour} 1" group="1" contype="0" conaffinity="0" mass="0"/>'
        f'<geom name="collision" {box} rgba="0 0 0 0" group="0" density="400" friction="1 0.01 0.001"/>'
        f'<geom name="reg_bbox" {box} rgba="0 0 0 0" group="2" contype="0" conaffinity="0" mass="0"/>'
        f"</body>{marks}</body></worldbody></mujoco>\n"
    )


if __name__ == "__main__":
    from qwen_vla_core.evaluation.suites.robocasa_gr1 import installed_package

    name = installed_package()
    print(f"wrote {write_objects(name)} boxes" if name else "RoboCasa's tabletop tasks are not installed")
