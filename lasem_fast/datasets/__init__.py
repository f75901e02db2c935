"""The data sets of the paper's experiments as sequences of tasks, from their published files.

    tasks = lf.datasets.load("cifar-100", "data", n_tasks=10, percent=4, trial=0)

docs/datasets.md says where the files come from and where they go. Nothing is fetched.
"""

from lasem_fast.datasets.cifar_tasks import cifar10, cifar100
from lasem_fast.datasets.description import Description
from lasem_fast.datasets.mnist_tasks import mnist
from lasem_fast.datasets.office_home_tasks import office_home
from lasem_fast.datasets.registry import NAMES, describe, load, options
from lasem_fast.datasets.stand_in_tasks import digits, fashion_mnist
from lasem_fast.datasets.stl10_tasks import stl10

__all__ = [
    "NAMES",
    "Description",
    "cifar10",
    "cifar100",
    "describe",
    "digits",
    "fashion_mnist",
    "load",
    "mnist",
    "office_home",
    "options",
    "stl10",
]
