"""Packages of lasem_fast; the rest of the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["lasem_fast", "lasem_fast.*"]))
