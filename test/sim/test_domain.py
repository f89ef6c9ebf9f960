"""Full domain randomisation: repeatable, really different, off by default, and an expert that still copes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.demos import check_expert
from qwen_vla_core.sim.domain import FIELDS, TABLE_TOP, DomainConfig, domain_option, load_domain
from qwen_vla_core.sim.worlds.aloha import AlohaWorld
from qwen_vla_core.sim.worlds.scene import CUBE_HALF


@pytest.fixture(scope="module")
def varied() -> Iterator[AlohaWorld]:
    world = AlohaWorld(domain=DomainConfig())
    yield world
    world.close()


def moment(world: AlohaWorld, seed: int) -> tuple[np.ndarray, np.ndarray]:
    world.reset(seed)
    for _ in range(10):
        world.step(world.command())
    return world.data.qpos.copy(), np.stack([world.render(view, 64, 48) for view in world.views])


def test_same_seed_gives_the_same_domain_whatever_came_before(varied: AlohaWorld) -> None:
    first, drawn = moment(varied, 5), varied.domain_drawn
    moment(varied, 6)
    again = moment(varied, 5)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert varied.domain_drawn == drawn == json.loads(json.dumps(drawn))


def test_every_part_of_the_domain_differs_between_seeds(varied: AlohaWorld) -> None:
    seen: dict[str, list[np.ndarray]] = {name: [] for name in (*FIELDS, "geom_rgba", "cam_pos", "cam_fovy")}
    pictures = []
    for seed in (1, 2, 3):
        pictures.append(moment(varied, seed)[1])
        for name, values in seen.items():
            values.append(getattr(varied.model, name).copy())
    for name, values in seen.items():
        assert not np.array_equal(values[0], values[1]) or not np.array_equal(values[0], values[2]), name
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).mean() > 15


def test_values_stay_inside_their_ranges(varied: AlohaWorld) -> None:
    config, arms = DomainConfig(), varied._arm_qpos["left"]
    plain = AlohaWorld()
    for seed in range(15):
        varied.reset(seed)
        plain.reset(seed)
        for cube in varied.domain_drawn["cubes"].values():
            assert config.cube_size[0] <= cube["size"] <= config.cube_size[1]
            assert config.cube_mass[0] <= cube["mass"] <= config.cube_mass[1]
        body = varied.model.body("cube_red").id
        mass = varied.model.body_mass[body] / plain.model.body_mass[body]
        assert mass == pytest.approx(varied.domain_drawn["cubes"]["cube_red"]["mass"])
        assert (varied.model.dof_damping[arms] <= config.joint_damping[1]).all()
        assert np.abs(varied.command()[:6] - [0, -0.96, 1.16, 0, -0.3, 0]).max() <= config.start_pose
    plain.close()


def test_scene_and_instruction_are_those_of_the_seed_with_or_without_it(varied: AlohaWorld, world: AlohaWorld) -> None:
    assert world.domain is None and world.domain_drawn == {}
    assert TABLE_TOP not in [world.model.geom(i).name for i in range(world.model.ngeom)]
    for seed in range(5):
        varied.reset(seed)
        world.reset(seed)
        assert varied.instruction == world.instruction
        for one, two in zip(varied.scene_state().cubes, world.scene_state().cubes, strict=True):
            assert one.colour == two.colour and one.rgb == two.rgb
            np.testing.assert_allclose(one.position[:2], two.position[:2])


def test_cubes_rest_on_the_table_whatever_their_size(varied: AlohaWorld) -> None:
    for seed in range(5):
        varied.reset(seed)
        sizes = varied.domain_drawn["cubes"]
        for _ in range(25):
            varied.step(varied.command())
        for cube in varied.scene_state().cubes:
            half = CUBE_HALF * sizes[f"cube_{cube.colour}"]["size"]
            assert cube.position[2] == pytest.approx(half, abs=1e-3)


def test_the_expert_still_succeeds(varied: AlohaWorld) -> None:
    assert sum(line["success"] for line in check_expert(varied, "aloha", range(50, 56))) >= 5


def test_ranges_come_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "ranges.yaml"
    file.write_text("cube_mass: [0.9, 1.1]\ntextures: false\n")
    config = load_domain(file)
    assert config.cube_mass == (0.9, 1.1) and not config.textures
    assert config.light_strength == DomainConfig().light_strength
    assert domain_option(str(file)) == config
    assert domain_option("") == DomainConfig() and domain_option(None) is None
    world = AlohaWorld(domain=config)
    world.reset(0)
    assert world.model.geom_matid[world.model.geom(TABLE_TOP).id] == -1


def test_demonstrations_are_randomised_on_request_and_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["sim", "demos", "--task", "pick", "--episodes", "1", "--out", str(tmp_path / "demos"), "--json"]
    assert main([*flags, "--randomize"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1
    assert main(flags) != 0
    assert "domain" in capsys.readouterr().err
    for name, more in (("plain.png", []), ("varied.png", ["--randomize"])):
        assert main(["sim", "render", "--seed", "2", "--out", str(tmp_path / name), *more]) == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "varied.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cube_mas: [1, 2]", "cube_mass"),
        ("cube_mass: [2, 1]", "larger"),
        ("cube_mass: 3", "cube_mass"),
        ("cube_size: [0.1, 1]", "too small"),
        ("textures: maybe", "true or false"),
        ("", "empty"),
    ],
)
def test_mistakes_in_the_ranges_give_one_clear_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "ranges.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        load_domain(file)
    assert "ranges.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--randomize"):
        domain_option(str(tmp_path / "none.yaml"))
