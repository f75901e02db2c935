"""The plan of a shared-prefix tree: which rows each level holds and where they come from.

A level has one row per distinct prefix of the configurations that are evaluated. A row is its
parent row on the level before and the branch it takes there. Any set of prefixes can be planned:
a full tree, bound groups, an explicit list, what is left when some configurations are dropped;
and the number of branches is whatever the rows name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from lasem_fast.configs import Configuration

# Branch 0 is `shared`, branch 1 `specific`: nested-loop order, shared before specific.
SHARED, SPECIFIC = 0, 1


@dataclass(frozen=True)
class Level:
    """The rows of one level, in nested-loop order if nothing else is said.

    Attributes:
        parents: for each row, its row on the level before (row 0 of the input for level 0).
        branches: for each row, the branch of this level's stage that it takes.
        width: number of rows on the level before.
        used_branches: the branches that at least one row takes, ascending.
        positions: for each row, where its branch stands among the used ones.
        is_full: whether every parent goes through every used branch, in nested-loop order.
        takes_turns: whether the rows take the used branches in turn, as on a full level and where
            its rows go on.
        rows: for each used branch, its rows and their parents; see :meth:`rows_of`.
    """

    parents: tuple[int, ...]
    branches: tuple[int, ...]
    width: int
    used_branches: tuple[int, ...] = field(init=False)
    positions: tuple[int, ...] = field(init=False)
    is_full: bool = field(init=False)
    takes_turns: bool = field(init=False, compare=False, repr=False)
    rows: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(
        init=False, compare=False, repr=False
    )
    _hash: int | None = field(init=False, default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        # set here, not when first read: torch.compile cannot trace a cached property
        used = tuple(sorted(set(self.branches)))
        place = {branch: i for i, branch in enumerate(used)}
        object.__setattr__(self, "used_branches", used)
        object.__setattr__(self, "positions", tuple(place[branch] for branch in self.branches))
        object.__setattr__(self, "is_full", len(self) == self.width * len(used) and (
            self.parents == tuple(p for p in range(self.width) for _ in used)
        ))  # fmt: skip
        turns = tuple(range(len(used))) * (len(self) // max(len(used), 1))
        object.__setattr__(self, "takes_turns", self.positions == turns)
        rows: dict[int, tuple[list[int], list[int]]] = {branch: ([], []) for branch in used}
        for row, (parent, branch) in enumerate(zip(self.parents, self.branches, strict=True)):
            rows[branch][0].append(row)
            rows[branch][1].append(parent)
        object.__setattr__(self, "rows", {b: (tuple(r), tuple(p)) for b, (r, p) in rows.items()})

    def __hash__(self) -> int:
        # kept, because levels of hundreds of rows are looked up at every step; not made before,
        # because torch.compile of PyTorch 2.11 cannot trace it
        if self._hash is None:
            object.__setattr__(self, "_hash", hash((self.parents, self.branches, self.width)))
        return self._hash

    def __len__(self) -> int:
        return len(self.parents)

    def going_on(self) -> Level:
        """The level of these rows' next layer in the branch that each of them came from."""
        return Level(tuple(range(len(self))), self.branches, len(self))

    def rows_of(self, branch: int) -> tuple[int, ...]:
        """The rows of this level that take ``branch``."""
        return self.rows[branch][0] if branch in self.rows else ()

    def parents_of(self, branch: int) -> tuple[int, ...]:
        """The parent rows that go through ``branch``, in the order of :meth:`rows_of`."""
        return self.rows[branch][1] if branch in self.rows else ()

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
        order: the last level's rows in nested-loop order; None: that is how they are.
        continued: for each stage, whether it continues the one before; see :meth:`continues`.
        places: for each configuration, the place of its leaf in nested-loop order.
        is_in_order: whether each configuration's place is its own number, and there are no others.
    """

    levels: tuple[Level, ...]
    leaves: tuple[int, ...]
    order: tuple[int, ...] | None = None
    continued: tuple[bool, ...] = field(init=False, compare=False, repr=False)
    places: tuple[int, ...] = field(init=False, compare=False, repr=False)
    is_in_order: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        pairs = zip(self.levels, self.levels[1:], strict=False)
        object.__setattr__(self, "continued", (False, *(_continues(a, b) for a, b in pairs)))
        places = self.leaves
        if self.order is not None:
            place = {leaf: i for i, leaf in enumerate(self.order)}
            places = tuple(place[leaf] for leaf in self.leaves)
        object.__setattr__(self, "places", places)
        in_order = len(self.levels) > 0 and places == tuple(range(len(self.levels[-1])))
        object.__setattr__(self, "is_in_order", in_order)

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
        return self.continued[stage]

    def top(self, stage: int) -> Plan:
        """The levels before stage ``stage``, each of whose last rows is a leaf."""
        levels = self.levels[:stage]
        return Plan(levels, tuple(range(len(levels[-1]))))

    def by_branch(self) -> Plan:
        """The same plan with each level's rows one branch after another, of parents in order.

        Kernels can take the rows of a branch, which are neighbours as their parents are, for one.
        """
        levels, place = [], (0,)
        for level in self.levels:
            parents = tuple(place[parent] for parent in level.parents)
            order = sorted(range(len(level)), key=lambda row: (level.branches[row], parents[row]))
            levels.append(
                Level(
                    tuple(parents[row] for row in order),
                    tuple(level.branches[row] for row in order),
                    level.width,
                )
            )
            place = tuple(sorted(range(len(order)), key=order.__getitem__))
        leaves = tuple(place[leaf] for leaf in self.leaves)
        return Plan(tuple(levels), leaves, None if place == tuple(range(len(place))) else place)

    def only(self, configs: Sequence[int]) -> Plan:
        """The plan of some of its configurations, in the order given."""
        needed = {self.leaves[config] for config in configs}
        levels = []
        place = {row: i for i, row in enumerate(sorted(needed))}
        leaves = tuple(place[self.leaves[config]] for config in configs)
        order = None
        if self.order is not None:
            order = tuple(place[row] for row in self.order if row in needed)
        for level, before in zip(
            reversed(self.levels), [*reversed(self.levels[:-1]), None], strict=True
        ):
            rows = sorted(needed)
            needed = {level.parents[row] for row in rows}
            width = 1 if before is None else len(needed)
            place = {row: i for i, row in enumerate(sorted(needed))}
            parents = tuple(place[level.parents[row]] for row in rows)
            levels.append(Level(parents, tuple(level.branches[row] for row in rows), width))
        return Plan(tuple(reversed(levels)), leaves, order)

    def below(self, stage: int, first: int, stop: int) -> SubPlan:
        """The sub-trees from stage ``stage`` on that hang on some rows of the level before.

        Of a plan in nested-loop order.

        Args:
            stage: at least 1.
            first: the first of those rows.
            stop: the row behind the last.
        """
        levels, begin, end = [], first, stop
        for level in self.levels[stage:]:
            # in nested-loop order the rows that hang on neighbours are neighbours
            a, b = bisect_left(level.parents, begin), bisect_left(level.parents, end)
            parents = tuple(parent - begin for parent in level.parents[a:b])
            levels.append(Level(parents, level.branches[a:b], end - begin))
            begin, end = a, b
        configs = tuple(c for c, leaf in enumerate(self.leaves) if begin <= leaf < end)
        leaves = tuple(self.leaves[c] - begin for c in configs)
        return SubPlan(Plan(tuple(levels), leaves), configs)

    def split(self, stage: int) -> Plan:
        """The same plan for a net whose stage ``stage`` has been cut into two stages."""
        second = self.levels[stage].going_on()
        levels = *self.levels[: stage + 1], second, *self.levels[stage + 1 :]
        return Plan(levels, self.leaves, self.order)


def _continues(before: Level, level: Level) -> bool:
    return level.branches == before.branches and level.parents == tuple(range(level.width))


@dataclass(frozen=True)
class SubPlan:
    """A part of a plan.

    Attributes:
        plan: its levels and leaves, numbered from 0; the first level's parents are the rows that
            it was asked for.
        configs: for each of its leaves, the configuration of the whole plan.
    """

    plan: Plan
    configs: tuple[int, ...]
