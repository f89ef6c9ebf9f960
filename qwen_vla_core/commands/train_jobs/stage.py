"""``qwen-vla train run``: the page in ``training/`` that belongs to a recipe, without looking for it."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import yaml

from qwen_vla_core.embodiment.yamlpos import compose, read_text
from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import resource_dir
from qwen_vla_core.training.page import add_arguments as add_page_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the pages."""
    parser.add_argument("--recipe", type=Path, required=True, help="YAML of a stage, e.g. training/recipes/…/sft.yaml")
    add_page_arguments(parser)
    parser.add_argument("--ray", action="store_true", help="reinforcement learning: worlds as Ray actors")


def run(args: argparse.Namespace) -> int:
    """Runs the page; on several ranks, start the page itself with torchrun."""
    source = str(args.recipe)
    node = compose(read_text(args.recipe, source), source)
    keys = {name.value: value for name, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    if "stage" in keys:
        return run_page(args.recipe, str(keys["stage"].value), args)
    if "worlds" in keys:
        from qwen_vla_core.training.rl_page import execute as practise

        return practise(args)
    raise UserError(f"{source}: is no recipe of a stage: it has neither `stage` nor `worlds`")


def run_page(recipe: Path, name: str, args: argparse.Namespace) -> int:
    """Runs the page of a stage.

    Args:
        recipe: for errors.
        name: of the stage.
        args: as ``page.add_arguments`` has them.

    Raises:
        UserError: there is no such page.
    """
    from qwen_vla_core.training.page import execute

    pages = resource_dir("training")
    page = pages / f"{name}.py"
    if not page.is_file():
        known = ", ".join(sorted(path.stem for path in pages.glob("*.py")))
        raise UserError(f"{recipe}: stage: there is no page {name}.py; pages: {known}")
    return execute(runpy.run_path(str(page), run_name="qwen_vla_page")["PAGE"], args)
