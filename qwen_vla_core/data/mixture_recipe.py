"""A mixture recipe: one YAML that says which datasets train which family, and how often each is drawn."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from qwen_vla_core.data.contract import FAMILIES, PUBLISHED_MIXTURE, TEXT_FAMILIES
from qwen_vla_core.embodiment.errors import did_you_mean
from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.embodiment.yamlpos import compose, read_text

Level = Literal["dataset", "embodiment", "task"]
Ask = Literal["where", "requests", "all"]
START_STEPS = 6  # what counts as the beginning of an episode or of an instruction
START_SHARE = 0.3  # of ``ask: requests``: at the beginning only the words tell what to do [O]


@dataclass(frozen=True)
class DatasetSpec:
    """One named source."""

    path: str = field(metadata=doc("Dataset folder, relative to `root`; for conversations also a .jsonl file."))
    weight: float = field(
        default=1.0, metadata=doc("Makes each of its samples this many times as likely.", exclusive_minimum=0.0)
    )
    embodiment: str | None = field(
        default=None,
        metadata=doc("Shipped name or YAML of the robot; default: the contract that the dataset carries."),
    )
    ask: Ask | None = field(
        default=None,
        metadata=doc(
            "In a family of conversations: `path` holds simulated demonstrations, and their frames are talked about: "
            "where (things are, in the reference view), requests (what possible instructions mean), all (questions)."
        ),
    )
    intention: bool = field(
        default=False,
        metadata=doc("Of simulated demonstrations: what the instruction means in the picture follows the prompt."),
    )
    hold_at_end: bool = field(
        default=False,
        metadata=doc("Episodes end at rest, where the robot shall stay: steps beyond the end are learned as such."),
    )
    other_prompt: float = field(
        default=0.0,
        metadata=doc(
            "Share of the samples whose prompt speaks of another robot of the mixture; they learn to stay [O].",
            minimum=0.0,
            maximum=1.0,
        ),
    )
    leave_out: int = field(
        default=0,
        metadata=doc("Its last episodes that are not learned from: for `open_loop` of a stage's recipe.", minimum=0),
    )
    start_share: float | None = field(
        default=None,
        metadata=doc(
            f"Share of the draws from the first {START_STEPS} steps of episodes and instructions; default: "
            f"{START_SHARE} for `ask: requests`, else 0.",
            minimum=0.0,
            maximum=1.0,
        ),
    )

    @property
    def early(self) -> float:
        """``start_share`` or its default."""
        default = START_SHARE if self.ask == "requests" else 0.0
        return default if self.start_share is None else self.start_share


@dataclass(frozen=True)
class FamilySpec:
    """One family of the mixture."""

    name: str = field(metadata=doc(f"One of {', '.join(FAMILIES)}."))
    datasets: tuple[DatasetSpec, ...] = field(metadata=doc("The family's sources."))
    weight: float | None = field(
        default=None, metadata=doc("Share of every minibatch; default: the published percentage.", exclusive_minimum=0)
    )
    balance: tuple[Level, ...] = field(
        default=("embodiment", "task"),
        metadata=doc("What is drawn in turn before a sample is: dataset, embodiment, task [P]; []: by size alone."),
    )
    temperature: float | None = field(
        default=None,
        metadata=doc(
            "How much size counts in `balance`: shares go with size^(1/temperature); 1: fully; default: not at all.",
            minimum=1.0,
        ),
    )
    whole: bool | None = field(
        default=None,
        metadata=doc("One sample is a whole episode without pictures, as in stage I [P]; default: true for t2a only."),
    )

    @property
    def whole_episodes(self) -> bool:
        """``whole`` or its default."""
        return self.name == "t2a" if self.whole is None else self.whole


@dataclass(frozen=True)
class MixtureRecipe:
    """What every minibatch consists of."""

    batch_size: int = field(metadata=doc("Samples per minibatch, over all ranks.", minimum=1))
    families: tuple[FamilySpec, ...] = field(metadata=doc("Families with data."))
    absent: tuple[str, ...] = field(
        default=(), metadata=doc("Published families that are left out on purpose; the others share their weight.")
    )
    seed: int = field(default=0, metadata=doc("Decides every draw.", minimum=0))
    root: str = field(default=".", metadata=doc("Folder that paths start from, relative to this file."))
    description: str = field(default="", metadata=doc("For humans."))
    source: str = field(default="<recipe>", compare=False, metadata=doc("", internal=True))
    lines: tuple[tuple[str, int], ...] = field(default=(), compare=False, repr=False, metadata=doc("", internal=True))

    def where(self, key: str) -> str:
        """``file:line: key`` for errors about a key that were found after parsing."""
        line = dict(self.lines).get(key)
        return f"{self.source}:{line}: {key}" if line else f"{self.source}: {key}"

    def folder(self, dataset: DatasetSpec) -> Path:
        """Where a source lies."""
        base = Path(self.source).parent if Path(self.source).suffix else Path()
        return Path(os.path.normpath(base / Path(self.root).expanduser() / Path(dataset.path).expanduser()))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each of ``families``: its own or the published percentage."""
        return tuple(PUBLISHED_MIXTURE.get(f.name, 0.0) if f.weight is None else f.weight for f in self.families)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each of ``families``; they add up to 1."""
        return tuple(weight / sum(self.weights) for weight in self.weights)


def load_mixture(path: str | Path) -> MixtureRecipe:
    """Reads a recipe.

    Raises:
        UserError: with file, line, key and the fix: an unknown key or family, a family twice or without a source, a
            published family that is neither given nor listed as absent, a family without a weight.
    """
    source = str(path)
    return parse_mixture(compose(read_text(Path(path), source), source), source)


def parse_mixture(node: yaml.Node, source: str) -> MixtureRecipe:
    """A recipe that may also be a part of another YAML; see ``load_mixture``."""
    parser = NodeParser(source)
    recipe = parser.dataclass(MixtureRecipe, node, "")
    _check(recipe, parser)
    return MixtureRecipe(
        batch_size=recipe.batch_size,
        families=recipe.families,
        absent=recipe.absent,
        seed=recipe.seed,
        root=recipe.root,
        description=recipe.description,
        source=source,
        lines=tuple(parser.lines.items()),
    )


def _check_dataset(family: FamilySpec, spec: DatasetSpec, key: str, parser: NodeParser) -> None:
    """Keys that mean nothing where they stand."""
    if family.name in TEXT_FAMILIES:
        if spec.embodiment is not None and spec.ask is None:
            parser.fail(f"{key}.embodiment", "conversations have no embodiment", "remove the key")
        if spec.start_share is not None and spec.ask is None:
            parser.fail(f"{key}.start_share", "conversations belong to no episode", "remove the key, or add 'ask: …'")
        for name, given in (
            ("intention", spec.intention),
            ("hold_at_end", spec.hold_at_end),
            ("other_prompt", spec.other_prompt > 0),
            ("leave_out", spec.leave_out > 0 and spec.ask is None),
        ):
            if given:
                parser.fail(f"{key}.{name}", "conversations have no actions", "remove the key")
        return
    if spec.ask is not None:
        family_of_texts = " or ".join(sorted(TEXT_FAMILIES))
        parser.fail(
            f"{key}.ask", f"family '{family.name}' holds actions, not conversations", f"move it to {family_of_texts}"
        )
    for name, useless in (
        ("intention", spec.intention),
        ("hold_at_end", spec.hold_at_end),
        ("other_prompt", spec.other_prompt > 0),
        ("start_share", spec.start_share is not None),
    ):
        if useless and family.whole_episodes:
            parser.fail(
                f"{key}.{name}", f"samples of family '{family.name}' are whole episodes without pictures",
                "remove the key, or add 'whole: false' to the family",
            )  # fmt: skip


def _check(recipe: MixtureRecipe, parser: NodeParser) -> None:
    if not recipe.families:
        parser.fail("families", "no families", "name at least one, with its datasets")
    given: dict[str, int] = {}
    for i, family in enumerate(recipe.families):
        key = f"families[{i}]"
        if family.name not in FAMILIES:
            parser.fail(f"{key}.name", f"'{family.name}' is no family", did_you_mean(family.name, FAMILIES))
        if family.name in given:
            parser.fail(f"{key}.name", f"'{family.name}' is already families[{given[family.name]}]", "merge the two")
        given[family.name] = i
        if family.name in recipe.absent:
            parser.fail(f"{key}.name", f"'{family.name}' is also listed under absent", "keep one of the two")
        if not family.datasets:
            parser.fail(
                f"{key}.datasets", f"family '{family.name}' has no data", "name a source, or list it under absent"
            )
        if family.weight is None and family.name not in PUBLISHED_MIXTURE:
            parser.fail(f"{key}.weight", f"'{family.name}' has no published share", "add 'weight: …' in percent")
        if len(set(family.balance)) < len(family.balance):
            parser.fail(f"{key}.balance", "names a level twice", "name each level once")
        if family.name in TEXT_FAMILIES and family.whole is not None:
            parser.fail(f"{key}.whole", "conversations are no episodes", "remove the key")
        for j, dataset in enumerate(family.datasets):
            _check_dataset(family, dataset, f"{key}.datasets[{j}]", parser)
    for i, name in enumerate(recipe.absent):
        if name not in FAMILIES:
            parser.fail(f"absent[{i}]", f"'{name}' is no family", did_you_mean(name, FAMILIES))
    silent = [name for name in PUBLISHED_MIXTURE if name not in given and name not in recipe.absent]
    if silent:
        parser.fail(
            "families",
            f"the published mixture also has {', '.join(silent)}",
            f"give them data, or say that they are left out: absent: [{', '.join([*recipe.absent, *silent])}]",
        )
