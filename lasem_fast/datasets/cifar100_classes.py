"""CIFAR-100's classes and superclasses, and which classes the paper's tasks have.

Classes are numbered in alphabetical order of their names, superclasses likewise (Krizhevsky, 2009).
The lists of tasks are those of the authors' release (github.com/Lifelong-ML/LASEM), by their rule.
"""

from __future__ import annotations

SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
FINE_NAMES = tuple(sorted(name for names in SUPERCLASSES.values() for name in names))
COARSE_NAMES = tuple(SUPERCLASSES)
COARSE_OF_FINE = tuple(
    next(i for i, names in enumerate(SUPERCLASSES.values()) if fine in names) for fine in FINE_NAMES
)

N_TASKS = (10, 20, 40)
_FIRST_TEN = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "vehicles_1",
)  # fmt: skip
_OTHER_TEN = tuple(name for name in SUPERCLASSES if name not in _FIRST_TEN)

Classes = tuple[int, ...]


def task_classes(n_tasks: int) -> list[Classes]:
    """The ten classes of each of 10, 20 or 40 tasks, in the order of their labels.

    10 tasks have no class in common. The first 20 of 40 are the 20 tasks, in which every class
    occurs twice: every other task is half of the one before it, half of the one behind it.
    """
    first = [_one_of_each(_FIRST_TEN, i) for i in range(5)]
    other = [_one_of_each(_OTHER_TEN, i) for i in range(5)]
    if n_tasks == 10:
        return first + other
    whole = [classes for pair in zip(first[:4], other[:4], strict=True) for classes in pair]
    whole += [other[4], first[4]]
    tasks = []
    for now, then in _with_next(whole):
        tasks += [now, _alternate(now, then)]
    if n_tasks == 20:
        return tasks
    mixed = []
    for a, b in zip(first, other, strict=True):
        for start in (0, 1):
            pairs = zip(a[start::2], b[start::2], strict=True)
            mixed.append(tuple(label for pair in pairs for label in pair))
    for now, then in _with_next(mixed):
        tasks += [now, then[:5] + now[5:]]
    return tasks


def _one_of_each(superclasses: tuple[str, ...], which: int) -> Classes:
    return tuple(FINE_NAMES.index(SUPERCLASSES[name][which]) for name in superclasses)


def _with_next(lists: list[Classes]) -> list[tuple[Classes, Classes]]:
    return list(zip(lists, lists[1:] + lists[:1], strict=True))


def _alternate(now: Classes, then: Classes) -> Classes:
    """Even positions of the one, odd positions of the other."""
    return tuple((then if i % 2 else now)[i] for i in range(len(now)))
