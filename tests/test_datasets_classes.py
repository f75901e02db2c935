"""Which classes the tasks have: the published numbering and the paper's lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lasem_fast.datasets.cifar100_classes import (
    COARSE_NAMES,
    COARSE_OF_FINE,
    FINE_NAMES,
    SUPERCLASSES,
    task_classes,
)
from lasem_fast.datasets.class_sets import balanced_class_sets, different_class_sets
from lasem_fast.datasets.office_home_images import CLASSES
from lasem_fast.datasets.office_home_tasks import GROUPS, INCREMENTAL
from lasem_fast.datasets.stl10_tasks import stl10_definitions

# Ids of the fine labels of each superclass, as the files of CIFAR-100 have them.
FINE_IDS = """
aquatic_mammals 4 30 55 72 95
fish 1 32 67 73 91
flowers 54 62 70 82 92
food_containers 9 10 16 28 61
fruit_and_vegetables 0 51 53 57 83
household_electrical_devices 22 39 40 86 87
household_furniture 5 20 25 84 94
insects 6 7 14 18 24
large_carnivores 3 42 43 88 97
large_man-made_outdoor_things 12 17 37 68 76
large_natural_outdoor_scenes 23 33 49 60 71
large_omnivores_and_herbivores 15 19 21 31 38
medium_mammals 34 63 64 66 75
non-insect_invertebrates 26 45 77 79 99
people 2 11 35 46 98
reptiles 27 29 44 78 93
small_mammals 36 50 65 74 80
trees 47 52 56 59 96
vehicles_1 8 13 48 58 90
vehicles_2 41 69 81 85 89
"""
# The paper's two lists of superclasses.
A = [
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "vehicles_1",
]
B = [
    "household_electrical_devices",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_2",
]


def ids() -> dict[str, list[int]]:
    lines = (line.split() for line in FINE_IDS.split("\n") if line)
    return {name: [int(value) for value in values] for name, *values in lines}


def test_fine_and_coarse_labels_of_cifar100_are_those_of_its_files():
    assert len(FINE_NAMES) == len(set(FINE_NAMES)) == 100
    assert list(COARSE_NAMES) == sorted(COARSE_NAMES) == list(ids())
    for coarse, (name, fine) in enumerate(ids().items()):
        assert [FINE_NAMES[label] for label in fine] == list(SUPERCLASSES[name])
        assert {COARSE_OF_FINE[label] for label in fine} == {coarse}


def names_of_forty_tasks() -> list[list[str]]:
    """The rule, on the names of classes."""

    def named(superclasses: list[str], i: int) -> list[str]:
        return [SUPERCLASSES[name][i] for name in superclasses]

    a, b = ([named(superclasses, i) for i in range(5)] for superclasses in (A, B))
    whole = [a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], b[4], a[4]]
    tasks = []
    for j in range(10):
        then = whole[(j + 1) % 10]
        tasks.append(whole[j])
        tasks.append([then[k] if k in (1, 3, 5, 7, 9) else whole[j][k] for k in range(10)])
    halves = []
    for i in range(5):
        for parity in (0, 1):
            mixed = []
            for k in range(parity, 10, 2):
                mixed += [a[i][k], b[i][k]]
            halves.append(mixed)
    for j in range(10):
        tasks.append(halves[j])
        tasks.append(halves[(j + 1) % 10][:5] + halves[j][5:])
    return tasks


def test_forty_tasks_of_cifar100_follow_the_rule():
    expected = names_of_forty_tasks()
    found = [[FINE_NAMES[label] for label in classes] for classes in task_classes(40)]
    assert found == expected
    assert len({tuple(sorted(classes)) for classes in found}) == 40
    occurrences = np.bincount(np.array(task_classes(40)).flatten(), minlength=100)
    assert occurrences.tolist() == [4] * 100


@pytest.mark.parametrize(
    ("task", "classes"),
    [
        (0, (4, 1, 54, 9, 0, 5, 6, 3, 12, 8)),
        (1, (4, 23, 54, 34, 0, 2, 6, 36, 12, 41)),
        (15, (86, 71, 31, 75, 79, 98, 78, 80, 59, 89)),
        (19, (95, 1, 92, 9, 83, 5, 24, 3, 76, 8)),
        (20, (4, 22, 54, 15, 0, 26, 6, 27, 12, 47)),
        (21, (1, 23, 9, 34, 5, 26, 6, 27, 12, 47)),
        (39, (4, 22, 54, 15, 0, 98, 97, 80, 90, 89)),
    ],
)
def test_some_of_the_forty_tasks_written_out(task, classes):
    assert task_classes(40)[task] == classes


def test_ten_and_twenty_tasks_of_cifar100():
    assert task_classes(20) == task_classes(40)[:20]
    twice = np.bincount(np.array(task_classes(20)).flatten(), minlength=100)
    assert twice.tolist() == [2] * 100
    expected = [[ids()[name][i] for name in names] for names in (A, B) for i in range(5)]
    assert [list(classes) for classes in task_classes(10)] == expected
    assert sorted(label for classes in expected for label in classes) == list(range(100))


def test_classes_of_office_home():
    assert len(CLASSES) == 65
    assert list(CLASSES) == sorted(CLASSES, key=str.lower)
    assert sorted(itertools.chain(*GROUPS)) == list(range(65))
    assert [len(group) for group in GROUPS] == [13] * 5
    first = "TV Sneakers Soda Telephone Radio Calendar Bottle Speaker Exit_Sign Scissors Bed Spoon"
    assert [CLASSES[label] for label in GROUPS[0]] == [*first.split(), "Couch"]
    added = ["Couch", "Table", "Paper_Clip", "Clipboards", "Bucket", "Notebook", "Bed", "Trash_Can"]
    assert [[CLASSES[label] for label in classes] for classes in INCREMENTAL] == [
        added[:n] for n in range(3, 9)
    ]


@pytest.mark.parametrize("draw", [different_class_sets, balanced_class_sets])
@pytest.mark.parametrize(("n_tasks", "per_task"), [(120, 3), (20, 3), (15, 5), (10, 9), (1, 10)])
def test_drawn_class_sets_differ_and_come_in_any_order(draw, n_tasks, per_task):
    sets = draw(n_tasks, per_task, 10, np.random.default_rng(0))
    assert len({frozenset(classes) for classes in sets}) == n_tasks
    for classes in sets:
        assert len(set(classes)) == per_task and set(classes) <= set(range(10))
    assert any(list(classes) != sorted(classes) for classes in sets)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_tasks", "per_task"), [(10, 5), (7, 4), (252, 5), (10, 9)])
def test_balanced_class_sets_have_every_class_about_equally_often(seed, n_tasks, per_task):
    sets = balanced_class_sets(n_tasks, per_task, 10, np.random.default_rng(seed))
    occurrences = np.bincount(np.array(sets).flatten(), minlength=10)
    assert occurrences.max() - occurrences.min() <= 1


@pytest.mark.parametrize("draw", [different_class_sets, balanced_class_sets])
def test_more_class_sets_than_there_are(draw):
    with pytest.raises(ValueError, match="n_tasks: expected at most 10, the number of different"):
        draw(11, 9, 10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="classes_per_task: expected at most 10, got 11"):
        draw(1, 11, 10, np.random.default_rng(0))


def test_definitions_of_stl10():
    for n_tasks, per_task in ((20, 3), (15, 5)):
        means, sds, places = set(), set(), set()
        for seed in range(20):
            definitions = stl10_definitions(n_tasks, seed)
            assert len({frozenset(d.classes) for d in definitions}) == n_tasks
            assert {len(set(d.classes)) for d in definitions} == {per_task}
            means |= {d.noise_mean for d in definitions}
            sds |= {d.noise_sd for d in definitions}
            places |= {d.channels for d in definitions}
        assert means == {-0.05, -0.025, 0.0, 0.025}
        assert sds == {0.0, 0.025}
        assert places == set(itertools.permutations(range(3)))
    assert stl10_definitions(20, 3) == stl10_definitions(20, 3) != stl10_definitions(20, 4)
