"""Where a data set comes from, where its files are looked for, and what is said without them."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Root = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """The origin of a data set.

    Attributes:
        title: its name in messages.
        home: its public home page.
        folders: where its files may lie, relative to the root; "" is the root itself.
        advice: what to do with what the home page offers.
    """

    title: str
    home: str
    folders: tuple[str, ...]
    advice: str

    def find(self, root: Root, *names: str) -> Path:
        """The first file of one of these names.

        Raises:
            TypeError: the root is no path.
            FileNotFoundError: there is none; says where it was looked for and where to get it.
        """
        return self._first(root, names, Path.is_file)

    def find_folder(self, root: Root, *names: str) -> Path:
        """As :meth:`find`, of folders."""
        return self._first(root, names, Path.is_dir)

    def has(self, root: Root, *names: str) -> bool:
        """Whether :meth:`find` would find a file."""
        return any(path.is_file() for path in self._candidates(root, names))

    def damaged(self, path: Path, what: str) -> ValueError:
        """The error to raise for a file that is not as it was published."""
        return ValueError(f"{path}: {what}; get {self.title} anew from {self.home}")

    def read(self, path: Path) -> bytes:
        """The content of a file, decompressed if its name ends in .gz."""
        if path.suffix != ".gz":
            return path.read_bytes()
        try:
            return gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self.damaged(path, str(error)) from error

    def _first(self, root: Root, names: tuple[str, ...], is_there: Callable[[Path], bool]) -> Path:
        for path in self._candidates(root, names):
            if is_there(path):
                return path
        below = ", ".join(folder for folder in self.folders if folder)
        missing = "" if Path(root).is_dir() else " (there is no such folder)"
        raise FileNotFoundError(
            f"{self.title}: no {' or '.join(names)} in {root}{missing} or in its sub-folders "
            f"{below}: get it from {self.home} and {self.advice}"
        )

    def _candidates(self, root: Root, names: tuple[str, ...]) -> list[Path]:
        if not isinstance(root, (str, os.PathLike)):
            raise TypeError(f"root: expected the folder of {self.title}'s files, got {root!r}")
        return [Path(root) / folder / name for folder in self.folders for name in names]
