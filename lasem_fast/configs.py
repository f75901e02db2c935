"""What is searched: the space of transfer configurations.

A configuration says, stage by stage, whether the `shared` branch (True) or the task's own
`specific` branch (False) is used (LASEM, section 3: the latent variable of the model).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from lasem_fast._numbers import is_whole

Configuration = tuple[bool, ...]

# 2^20 rows of bits are 20 MB; more has to be said as groups or as an explicit list.
_MAX_FREE_CHOICES = 20
_MOST_STAGES = 10_000


class ConfigSpace:
    """The set C of configurations that a search looks at.

    Rows are in nested-loop order, first stage outermost, shared before specific: row 0 of a full
    space is "transfer at all layers", its last row is "nothing shared".

    Args:
        depth: number of stages d of the net, at least 1.
        groups: sizes of runs of consecutive stages that are shared together, for example
            ``[5, 4, 4, 4]`` for a net of 17 stages; they add up to ``depth``. None: every stage
            is a group of its own.

    Attributes:
        bits: bool tensor ``[C, d]`` on the CPU, True where the stage is shared.

    Raises:
        TypeError, ValueError: ``depth`` or ``groups`` is not as described, or the space has more
            than 2^20 rows.
    """

    def __init__(self, depth: int, groups: Sequence[int] | None = None) -> None:
        depth = _checked_depth(depth)
        sizes = (1,) * depth if groups is None else _checked_groups(groups, depth)
        if len(sizes) > _MAX_FREE_CHOICES:
            raise ValueError(
                f"depth: expected at most {_MAX_FREE_CHOICES} independent stages or groups "
                f"(2^{_MAX_FREE_CHOICES} configurations), got {len(sizes)}; bind stages with "
                f"groups=[...] or list the configurations with ConfigSpace.from_configs"
            )
        rows = torch.arange(2 ** len(sizes)).unsqueeze(1)
        places = torch.arange(len(sizes) - 1, -1, -1)
        shared = (rows >> places) & 1 == 0
        self._setup(shared.repeat_interleave(torch.tensor(sizes), dim=1), sizes)

    @classmethod
    def from_configs(cls, configs: Iterable[Any], depth: int | None = None) -> ConfigSpace:
        """A space of exactly the given configurations, put into nested-loop order.

        Args:
            configs: the configurations, each as bits (a sequence or tensor of d booleans), as a
                set of 1-based shared stages, or as a row number of the full space.
            depth: number of stages; may be left out if at least one configuration is bits.

        Raises:
            TypeError, ValueError: no configuration, one given twice, or one that does not fit.
        """
        words = isinstance(configs, (str, bytes, Mapping))
        if words or not isinstance(configs, Iterable) or getattr(configs, "ndim", 1) == 0:
            raise TypeError(
                f"configs: expected a sequence of configurations, got {type(configs).__name__} "
                f"{configs!r}"
            )
        configs = list(configs)
        if not configs:
            raise ValueError("configs: expected at least one configuration, got none")
        if depth is None:
            lengths = {len(c) for c in configs if _is_bits(c)}
            if not lengths:
                raise ValueError(
                    "depth: expected the number of stages, because no configuration is given as "
                    "bits; got None"
                )
            if len(lengths) > 1:
                raise ValueError(
                    f"configs: expected the same number of bits in each, got {sorted(lengths)}"
                )
            depth = lengths.pop()
        depth = _checked_depth(depth)
        rows = [parse_config(c, depth) for c in configs]
        if len(set(rows)) != len(rows):
            twice = next(row for row, number in Counter(rows).items() if number > 1)
            raise ValueError(f"configs: expected distinct configurations, got {list(twice)} twice")
        space = cls.__new__(cls)
        space._setup(torch.tensor(sorted(rows, reverse=True)), None)
        return space

    def _setup(self, bits: Tensor, groups: tuple[int, ...] | None) -> None:
        self._bits = bits
        self._groups = groups
        self._rows = [tuple(row) for row in bits.tolist()]
        self._index = {row: i for i, row in enumerate(self._rows)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Configuration:
        """The configuration of a row, as a tuple of d booleans."""
        return self._rows[self._checked_row(row)]

    def __iter__(self) -> Iterator[Configuration]:
        return iter(self._rows)

    def __contains__(self, config: Any) -> bool:
        try:
            self.index(config)
        except (TypeError, ValueError):
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigSpace) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(tuple(self._rows))

    def __repr__(self) -> str:
        groups = "" if self._groups is None else f", groups={list(self._groups)}"
        return f"ConfigSpace(depth={self.depth}{groups}, configurations={len(self)})"

    @property
    def bits(self) -> Tensor:
        """All configurations as bool ``[C, d]``, True where shared; a copy."""
        return self._bits.clone()

    @property
    def depth(self) -> int:
        """Number of stages d."""
        return self._bits.shape[1]

    @property
    def configs(self) -> list[Configuration]:
        """All configurations in the order of their rows."""
        return list(self._rows)

    @property
    def groups(self) -> tuple[int, ...] | None:
        """Sizes of the groups, or None for an explicit list of configurations."""
        return self._groups

    def label(self, row: int) -> str:
        """The paper's name of a row: its shared stages, 1-based, as in ``"{2,4}"``."""
        shared = (str(i + 1) for i, bit in enumerate(self[row]) if bit)
        return "{" + ",".join(shared) + "}"

    def index(self, config: Any) -> int:
        """The row of a configuration.

        Args:
            config: bits, a row number of this space, or a set of 1-based shared stages.

        Raises:
            TypeError, ValueError: not a configuration of this depth, or one outside the space.
        """
        if is_whole(config):
            return self._checked_row(config, "config")
        bits = parse_config(config, self.depth)
        if bits not in self._index:
            raise ValueError(
                f"config: expected one of the {len(self)} configurations of the space, got "
                f"{list(bits)}, which is outside it"
            )
        return self._index[bits]

    @property
    def all(self) -> Configuration:
        """Every stage shared ("transfer at all layers")."""
        return (True,) * self.depth

    def top(self, k: int) -> Configuration:
        """The ``k`` stages next to the output shared."""
        k = self._checked_count(k)
        return (False,) * (self.depth - k) + (True,) * k

    def bottom(self, k: int) -> Configuration:
        """The ``k`` stages next to the input shared."""
        k = self._checked_count(k)
        return (True,) * k + (False,) * (self.depth - k)

    @property
    def alternating(self) -> Configuration:
        """Every second stage shared: {2,4,...}."""
        return tuple(i % 2 == 1 for i in range(self.depth))

    def _checked_row(self, row: Any, argument: str = "row") -> int:
        if not is_whole(row):
            raise TypeError(
                f"{argument}: expected a row in 0..{len(self) - 1}, got {type(row).__name__} "
                f"{row!r}"
            )
        if not 0 <= int(row) < len(self):
            raise ValueError(f"{argument}: expected a row in 0..{len(self) - 1}, got {int(row)}")
        return int(row)

    def _checked_count(self, k: int) -> int:
        if not is_whole(k) or not 0 <= int(k) <= self.depth:
            raise ValueError(f"k: expected a number of stages in 0..{self.depth}, got {k!r}")
        return int(k)


def parse_config(config: Any, depth: int) -> Configuration:
    """A configuration in any accepted form, as a tuple of ``depth`` booleans.

    A row number is one of the full space of that depth.
    """
    if is_whole(config):
        row = int(config)
        if not 0 <= row < 2**depth:
            raise ValueError(f"config: expected a row in 0..{2**depth - 1}, got {row}")
        return tuple(not (row >> (depth - 1 - i)) & 1 for i in range(depth))
    if isinstance(config, AbstractSet):
        stages = set(config)
        if not all(is_whole(s) and 1 <= int(s) <= depth for s in stages):
            raise ValueError(f"config: expected a set of stages in 1..{depth}, got {config!r}")
        numbers = set(map(int, stages))  # a tensor is equal to no number in a set
        return tuple(i + 1 in numbers for i in range(depth))
    if not _is_bits(config):
        raise TypeError(
            f"config: expected {depth} booleans, a row number or a set of 1-based stages, got "
            f"{type(config).__name__} {config!r}"
        )
    values = config.tolist() if hasattr(config, "tolist") else list(config)
    if len(values) != depth or not all(map(_is_bit, values)):
        raise ValueError(f"config: expected {depth} booleans, one per stage, got {values!r}")
    return tuple(bool(v) for v in values)


def _is_bit(value: Any) -> bool:
    try:
        return value in (0, 1)
    except (RuntimeError, ValueError):  # an array or a tensor of several values
        return False


def _is_bits(config: Any) -> bool:
    if isinstance(config, (str, bytes, AbstractSet)):
        return False
    if hasattr(config, "tolist"):
        return getattr(config, "ndim", 0) == 1 and not getattr(config, "is_meta", False)
    return isinstance(config, Sequence)


def _checked_depth(depth: Any) -> int:
    if not is_whole(depth):
        raise TypeError(f"depth: expected a number of stages, got {type(depth).__name__} {depth!r}")
    if int(depth) < 1:
        raise ValueError(f"depth: expected at least 1 stage, got {int(depth)}")
    if int(depth) > _MOST_STAGES:
        raise ValueError(f"depth: expected at most {_MOST_STAGES} stages, got {int(depth)}")
    return int(depth)


def _checked_groups(groups: Any, depth: int) -> tuple[int, ...]:
    if not isinstance(groups, Sequence) or not all(is_whole(g) for g in groups):
        raise TypeError(f"groups: expected a sequence of group sizes, got {groups!r}")
    sizes = tuple(int(g) for g in groups)
    if any(g < 1 for g in sizes) or sum(sizes) != depth:
        raise ValueError(
            f"groups: expected positive sizes that add up to depth={depth}, got {list(sizes)} "
            f"(sum {sum(sizes)})"
        )
    return sizes
