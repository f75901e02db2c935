"""Office-Home's folders of photographs, one folder a class, read with Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lasem_fast.datasets.option_checks import optional_module
from lasem_fast.datasets.source import Root, Source

OFFICE_HOME = Source(
    "Office-Home",
    "https://www.hemanthdv.org/officeHomeDataset.html",
    (
        "", "OfficeHomeDataset_10072016", "OfficeHomeDataset", "OfficeHome", "office-home",
        "office_home",
    ),
    "unpack its archive there (folders of domains with a folder for each class)",
)  # fmt: skip
SIDE = 128
# The order of the numbers: alphabetical, whatever the case.
CLASSES = (
    "Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket", "Calculator",
    "Calendar", "Candles", "Chair", "Clipboards", "Computer", "Couch", "Curtains", "Desk_Lamp",
    "Drill", "Eraser", "Exit_Sign", "Fan", "File_Cabinet", "Flipflops", "Flowers", "Folder", "Fork",
    "Glasses", "Hammer", "Helmet", "Kettle", "Keyboard", "Knives", "Lamp_Shade", "Laptop", "Marker",
    "Monitor", "Mop", "Mouse", "Mug", "Notebook", "Oven", "Pan", "Paper_Clip", "Pen", "Pencil",
    "Postit_Notes", "Printer", "Push_Pin", "Radio", "Refrigerator", "Ruler", "Scissors",
    "Screwdriver", "Shelf", "Sink", "Sneakers", "Soda", "Speaker", "Spoon", "Table", "Telephone",
    "ToothBrush", "Toys", "Trash_Can", "TV", "Webcam",
)  # fmt: skip
DOMAINS = {
    "Product": ("Product",),
    "Real World": ("Real World", "RealWorld", "Real_World"),
}
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def read_domain(root: Root, domain: str, classes: Iterable[int]) -> dict[int, np.ndarray]:
    """The images of these classes: for each uint8 ``[N, 3, 128, 128]``, in the order of names.

    An image is brought to its size by Pillow's linear filter, whose support grows with the
    reduction (anti-aliasing).

    Raises:
        FileNotFoundError, ValueError: a folder is missing or empty, or an image is damaged.
        ModuleNotFoundError: Pillow is not installed.
    """
    optional_module("PIL.Image", "pillow", "Office-Home")
    folder = OFFICE_HOME.find_folder(root, *DOMAINS[domain])
    files = {label: _files(folder, CLASSES[label]) for label in classes}
    with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes without the GIL
        return {
            label: np.stack(list(threads.map(_read_image, paths))) for label, paths in files.items()
        }


def _files(folder: Path, name: str) -> list[Path]:
    own = [p for p in folder.iterdir() if p.name.lower() == name.lower() and p.is_dir()]
    if not own:
        raise FileNotFoundError(
            f"Office-Home: no folder {name} in {folder}: get it from {OFFICE_HOME.home} and "
            f"{OFFICE_HOME.advice}"
        )
    paths = sorted(
        path for path in own[0].iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    )  # fmt: skip
    if not paths:
        raise OFFICE_HOME.damaged(own[0], "no image (.jpg, .png) in it")
    return paths


def _read_image(path: Path) -> np.ndarray:
    """uint8 ``[3, 128, 128]``."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OFFICE_HOME.damaged(path, f"not an image that can be read ({error})") from error
    return np.asarray(small).transpose(2, 0, 1)
