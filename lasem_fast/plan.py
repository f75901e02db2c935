"""The plan of a shared-prefix tree: which rows each level holds and where they come from.

A level has one row per distinct prefix of the configurations that are evaluated. A row is its
parent row on the level before and the branch it takes there. Any set of prefixes can be planned:
a full tree, bound groups, an explicit list, what is left when some configurations are dropped;
and the number of branches is whatever the rows name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lasem_fast.configs import Configuration

# Branch 0 is `shared`, branch 1 `specific`: nested-loop order, shared before specific.
SHARED, SPECIFIC = 0, 1


@dataclass(frozen=True)
class Level:
    """The rows of one level, in nested-loop order.

    Attributes:
        parents: for each row, its row on the level before (row 0 of the input for level 0).
        branches: for each row, the branch of this level's stage that it takes.
        width: number of rows on the level before.
        used_branches: the branches that at least one row takes, ascending.
        is_full: whether every parent goes through every used branch.
    """

    parents: tuple[int, ...]
    branches: tuple[int, ...]
    width: int
    used_branches: tuple[int, ...] = field(init=False)
    is_full: bool = field(init=False)

    def __post_init__(self) -> None:
        # set here, not when first read: torch.compile cannot trace a cached property
        object.__setattr__(self, "used_branches", tuple(sorted(set(self.branches))))
        object.__setattr__(self, "is_full", len(self) == self.width * len(self.used_branches))

    def __len__(self) -> int:
        return len(self.parents)

    def rows_of(self, branch: int) -> tuple[int, ...]:
        """The rows of this level that take ``branch``."""
        return tuple(i for i, b in enumerate(self.branches) if b == branch)

    def parents_of(self, branch: int) -> tuple[int, ...]:
        """The parent rows that go through ``branch``, in the order of :meth:`rows_of`."""
        return tuple(self.parents[i] for i in self.rows_of(branch))

    def merge_order(self) -> tuple[int, ...]:
        """Where each row stands when the branches' rows are put one branch after another."""
        stacked = [row for branch in self.used_branches for row in self.rows_of(branch)]
        order = [0] * len(stacked)
        for place, row in enumerate(stacked):
            order[row] = place
        return tuple(order)


@dataclass(frozen=True)
class Plan:
    """The levels of a tree and the leaf of each configuration.

    Attributes:
        levels: one per stage.
        leaves: for each configuration, its row on the last level.
    """

    levels: tuple[Level, ...]
    leaves: tuple[int, ...]

    @classmethod
    def of(cls, branches: list[list[int]]) -> Plan:
        """The plan of configurations given as branch numbers ``[C][d]``, in any order."""
        configs = [tuple(config) for config in branches]
        parents: list[list[int]] = [[] for _ in configs[0]]
        taken: list[list[int]] = [[] for _ in configs[0]]
        leaves: dict[tuple[int, ...], int] = {}
        before: tuple[int, ...] = ()
        for config in sorted(configs):
            pairs = zip(config, before, strict=False)
            # the first stage that it does not share with its neighbour: new rows from there on
            new = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(before))
            for stage in range(new, len(config)):
                parents[stage].append(len(parents[stage - 1]) - 1 if stage else 0)
                taken[stage].append(config[stage])
            leaves[config] = len(parents[-1]) - 1
            before = config
        widths = [1, *map(len, parents)]
        levels = map(Level, map(tuple, parents), map(tuple, taken), widths)
        return cls(tuple(levels), tuple(leaves[config] for config in configs))

    @classmethod
    def of_configs(cls, configs: Sequence[Configuration]) -> Plan:
        """The plan of configurations given as bits, True where shared."""
        return cls.of([[SHARED if bit else SPECIFIC for bit in config] for config in configs])

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def stage_evaluations(self) -> int:
        """How many times a stage is evaluated on one mini-batch: all rows of all levels."""
        return sum(len(level) for level in self.levels)

    def continues(self, stage: int) -> bool:
        """Whether each row only goes on in the branch it came from, as inside a group."""
        if stage == 0:
            return False
        before, level = self.levels[stage - 1], self.levels[stage]
        in_order = level.parents == tuple(range(level.width))
        return in_order and level.branches == before.branches

    def split(self, stage: int) -> Plan:
        """The same plan for a net whose stage ``stage`` has been cut into two stages."""
        rows = len(self.levels[stage])
        second = Level(tuple(range(rows)), self.levels[stage].branches, rows)
        return Plan((*self.levels[: stage + 1], second, *self.levels[stage + 1 :]), self.leaves)
