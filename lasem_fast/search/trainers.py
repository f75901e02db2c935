"""Notices two LASEMs that train one net at once: each would put back what the other has taught."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakKeyDictionary, ref

if TYPE_CHECKING:
    from lasem_fast.net import TransferNet
    from lasem_fast.networks.rollback import Rollback

_LAST: WeakKeyDictionary[TransferNet, ReferenceType[Rollback]] = WeakKeyDictionary()


def note_step(net: TransferNet, rollback: Rollback) -> None:
    """To be called before each step of training, with the roll-back of the LASEM that makes it.

    Warns:
        UserWarning: the step before this one was another LASEM's, which has tasks under way.
    """
    last = _LAST.get(net)
    other = None if last is None else last()
    if other is rollback:
        return
    _LAST[net] = ref(rollback)
    if other is None or other.is_idle:
        return
    warnings.warn(
        "net: expected one LASEM at a time to train a net, got a step of another one while tasks "
        "of the first are under way; at the end of a task each takes back what the other has "
        "taught the shared stages meanwhile. One LASEM takes all tasks, regression beside "
        "classification by a likelihood of your own that looks at y",
        UserWarning,
        stacklevel=6,  # this, two of the LASEM, two of nn.Module, the loop
    )
