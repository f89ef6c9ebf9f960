"""Stand-ins for RoboCasa's assets: a coloured box for every category of objects, and for every mesh of its furniture.

    python test/evaluation/gr1_assets.py

writes them into the installed package's ``models/assets/objects``, where it looks for them when it is imported; the
real ones are a download of several gigabytes. Task code, robot, controllers, furniture and renderer are the real ones.
"""

from __future__ import annotations

import colorsys
import importlib
import re
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from simpler_assets import box_obj

_TEXTURE = re.compile(r"textures/[\w/-]+\.png")
HALF = (0.03, 0.03, 0.04)  # metres


def fill_furniture(package: str) -> int:
    """Writes the meshes and textures that furniture names and the package has not; returns how many."""
    models: Any = importlib.import_module(f"{package}.models")
    count = 0
    for model in sorted(Path(models.assets_root).glob("fixtures/**/*.xml")):
        for tag in ElementTree.parse(model).iter():
            place = model.parent / tag.get("file", "")
            if tag.tag not in ("mesh", "texture") or not tag.get("file") or place.exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if tag.tag == "mesh":
                place.write_text(box_obj(np.array([0.1, 0.1, 0.1])))
            else:
                cv2.imwrite(str(place), np.full((8, 8, 3), 160, np.uint8))
            count += 1
    for text in Path(models.assets_root).parents[1].rglob("*"):
        if text.suffix in (".yaml", ".xml", ".py"):
            for name in _TEXTURE.findall(text.read_text(encoding="utf-8", errors="replace")):
                place = Path(models.assets_root) / name
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(place), np.full((8, 8, 3), 160, np.uint8))
                    count += 1
    return count


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
    print(
        f"wrote {write_objects(name)} objects, {fill_furniture(name)} files of furniture"
        if name
        else "RoboCasa's tabletop tasks are not installed"
    )
