"""The methods on a `TransferNet` that a sequence can be trained by, one a file."""

from lasem_fast.lifelong.methods.brute_force import BruteForce
from lasem_fast.lifelong.methods.search import Search
from lasem_fast.lifelong.methods.single_task import SingleTask
from lasem_fast.lifelong.methods.static import Static

__all__ = ["BruteForce", "Search", "SingleTask", "Static"]
