"""Networks and learning rules that the paper compares LASEM with, as methods of a training run."""

from lasem_fast.comparators.apd import APDNet
from lasem_fast.comparators.darts import DARTS
from lasem_fast.comparators.den import DEN
from lasem_fast.comparators.fixed import FixedProbability
from lasem_fast.comparators.prognn import ProgNN

__all__ = ["DARTS", "DEN", "APDNet", "FixedProbability", "ProgNN"]
