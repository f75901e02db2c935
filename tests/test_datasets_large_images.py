"""Sequences of STL-10 and Office-Home: who has which images, noise, splits, trials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numbered_images import same

from lasem_fast import datasets
from lasem_fast.datasets import office_home_images, stl10_tasks
from lasem_fast.datasets.office_home_images import CLASSES
from lasem_fast.datasets.office_home_tasks import GROUPS, INCREMENTAL
from lasem_fast.datasets.published import Labelled, Published
from lasem_fast.datasets.stl10_files import STL10_NAMES
from lasem_fast.datasets.stl10_tasks import stl10_definitions
from lasem_fast.lifelong.task_data import check_tasks

# STL-10


@pytest.fixture
def stl10(monkeypatch):
    """Of the sizes of STL-10, but 4 x 4 pixels; no pixel is near black or white."""
    rng = np.random.default_rng(0)
    parts = []
    for per_class in (500, 800):
        x = rng.integers(90, 160, (10 * per_class, 3, 4, 4), dtype=np.uint8)
        parts.append(Labelled(x, rng.permutation(np.repeat(np.arange(10), per_class))))
    published = Published(*parts, STL10_NAMES)
    monkeypatch.setattr(stl10_tasks, "read_stl10", lambda root: published)
    return published


@pytest.fixture
def clean(stl10, monkeypatch):
    """Tasks without noise, with the channels in their places, as bytes."""

    def tasks(**options):
        with monkeypatch.context() as context:
            context.setattr(stl10_tasks, "NOISE_STEP", 0)
            made = datasets.stl10("", **options)
        definitions = stl10_definitions(len(made), options.get("seed", 0))
        return [
            [
                ((x[:, np.argsort(d.channels)].double().numpy() + 0.5) * 255, y.numpy())
                for _, (x, y) in task.splits()
            ]
            for task, d in zip(made, definitions, strict=True)
        ]

    return tasks


def keys(x: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in np.round(x).astype(np.uint8)]


@pytest.mark.parametrize(
    ("n_tasks", "n_classes", "per_class"), [(20, 3, (106, 19, 800)), (15, 5, (25, 25, 800))]
)
def test_sizes_and_labels_of_stl10(stl10, n_tasks, n_classes, per_class):
    tasks = check_tasks(datasets.stl10("", n_tasks=n_tasks))
    sizes = tuple(n * n_classes for n in per_class)
    described = datasets.describe("stl-10", n_tasks=n_tasks)
    assert (described.sizes, described.classes) == (sizes, (n_classes,) * n_tasks)
    for task in tasks:
        for (_, (x, y)), n in zip(task.splits(), per_class, strict=True):
            assert y.bincount().tolist() == [n] * n_classes
            assert x.shape == (n * n_classes, 3, 4, 4) and x.is_contiguous()
            assert x.min() >= -0.5 and x.max() <= 0.5


@pytest.mark.parametrize("n_tasks", [20, 15])
def test_images_of_stl10(stl10, clean, n_tasks):
    label_of = [dict(zip(keys(part.x), part.y, strict=True)) for part in (stl10.train, stl10.test)]
    assert [len(labels) for labels in label_of] == [5000, 8000]
    definitions = stl10_definitions(n_tasks, 0)
    for (train, valid, test), definition in zip(clean(n_tasks=n_tasks), definitions, strict=True):
        for (x, y), labels in ((train, label_of[0]), (valid, label_of[0]), (test, label_of[1])):
            assert [labels[key] for key in keys(x)] == [definition.classes[label] for label in y]
            assert len(set(keys(x))) == len(x)
        assert not set(keys(train[0])) & set(keys(valid[0]))


def test_noise_of_stl10_is_as_defined_and_drawn_per_pixel_and_split(stl10, clean):
    tasks, definitions = datasets.stl10(""), stl10_definitions(20, 0)
    assert {bool(d.noise_sd) for d in definitions} == {True, False}
    drawn = []
    for task, splits, d in zip(tasks, clean(), definitions, strict=True):
        for (_, (x, _)), (raw, _) in zip(task.splits(), splits, strict=True):
            places = list(d.channels)
            noise = x.double().numpy() - (raw / 255 - 0.5)[:, places]
            if d.noise_sd == 0:
                np.testing.assert_allclose(noise, d.noise_mean, atol=2**-23)
                continue
            z = (noise - d.noise_mean) / d.noise_sd
            assert abs(z.mean()) < 5 / math.sqrt(z.size)
            assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)
            assert abs((z**3).mean()) < 5 * math.sqrt(15 / z.size)
            drawn.append(z.flatten()[:100].round(3).tobytes())
    assert len(set(drawn)) == len(drawn)


def test_noise_of_stl10_is_clipped(stl10, monkeypatch):
    monkeypatch.setattr(stl10_tasks, "NOISE_STEP", 0.5)
    tasks, definitions = datasets.stl10(""), stl10_definitions(20, 0)
    noisy = [task for task, d in zip(tasks, definitions, strict=True) if d.noise_sd]
    for task in noisy:
        for _, (x, _) in task.splits():
            assert (x.min(), x.max()) == (-0.5, 0.5)


def test_trials_of_stl10_share_definitions_and_differ_in_images(stl10, clean):
    assert same(datasets.stl10("", trial=1), datasets.stl10("", trial=1))
    assert [t.note for t in datasets.stl10("", trial=0)] == [
        t.note for t in datasets.stl10("", trial=1)
    ]
    for one, other in zip(clean(trial=0), clean(trial=1), strict=True):
        for which in (0, 1):
            assert set(keys(one[which][0])) != set(keys(other[which][0]))
            assert one[which][1].tolist() == other[which][1].tolist()
        assert keys(one[2][0]) == keys(other[2][0])
    # the noise of a trial is its own, on the test images too
    pairs = zip(datasets.stl10("", trial=0), datasets.stl10("", trial=1), strict=True)
    noisy = [bool(d.noise_sd) for d in stl10_definitions(20, 0)]
    assert [not torch.equal(a.test[0], b.test[0]) for a, b in pairs] == noisy
    notes = [task.note for task in datasets.stl10("", seed=1)]
    assert notes != [task.note for task in datasets.stl10("")]


def test_notes_of_stl10_say_what_a_task_is(stl10):
    for task, d in zip(datasets.stl10(""), stl10_definitions(20, 0), strict=True):
        names, noise, places = task.note.split(", ")
        assert names.split() == [STL10_NAMES[label] for label in d.classes]
        assert noise == f"{d.noise_mean:+.3f}±{d.noise_sd:.3f}"
        assert places == "channels " + "".join("RGB"[channel] for channel in d.channels)


def test_fewer_test_images_of_stl10(stl10):
    few, all_of_them = datasets.stl10("", test_per_class=5), datasets.stl10("")
    assert [len(task.test[1]) for task in few] == [15] * 20
    assert all(torch.equal(a.train[0], b.train[0]) for a, b in zip(few, all_of_them, strict=True))
    assert datasets.describe("stl-10", test_per_class=5).sizes == (318, 57, 15)
    assert datasets.describe("stl-10", test_per_class=900).sizes == (318, 57, 2400)


# Office-Home

COUNTS = {label: 10 + label % 11 for label in range(65)}


@pytest.fixture(scope="module")
def office_home(tmp_path_factory):
    """One colour an image: its domain, class and number."""
    pillow = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("office-home")
    for domain, folder in enumerate(("Product", "RealWorld")):
        for label, name in enumerate(CLASSES):
            own = root / folder / name
            own.mkdir(parents=True)
            for number in range(COUNTS[label]):
                colour = (100 + domain, label, number)
                pillow.new("RGB", (2, 2), colour).save(own / f"{number:05}.png")
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(office_home_images, "SIDE", 3)


def colours(x: torch.Tensor) -> list[tuple[int, ...]]:
    """The domain, class and number of each image."""
    values = (x.double() * 255).round().long()
    assert (values == values[:, :, :1, :1]).all()
    assert x.min() >= 0 and x.max() <= 1
    return [tuple(colour) for colour in values[:, :, 0, 0].tolist()]


def check_split(task, domain: int, classes) -> None:
    seen: set = set()
    for (_, (x, y)), tenths in zip(task.splits(), (6, 1, 3), strict=True):
        found = colours(x)
        counts = [int(COUNTS[label] * tenths / 10) for label in classes]
        assert y.bincount(minlength=len(classes)).tolist() == counts
        assert [(100 + domain, classes[label]) for label in y] == [f[:2] for f in found]
        assert len(set(found)) == len(found) and not seen & set(found)
        seen |= set(found)
    assert (task.train[1].diff() < 0).any()  # mixed, not class by class


def test_ten_tasks_of_office_home(office_home):
    tasks = check_tasks(datasets.office_home(office_home))
    assert len(tasks) == 10
    for number, task in enumerate(tasks):
        domain, group = divmod(number, 5)
        assert task.train[0].shape[1:] == (3, 3, 3)
        check_split(task, domain, GROUPS[group])
        names = " ".join(CLASSES[label] for label in GROUPS[group])
        assert task.note == f"{('Product', 'Real World')[domain]}: {names}"


def test_incremental_tasks_of_office_home(office_home):
    tasks = check_tasks(datasets.office_home(office_home, incremental=True))
    assert [task.n_classes for task in tasks] == [3, 4, 5, 6, 7, 8]
    for task, classes in zip(tasks, INCREMENTAL, strict=True):
        check_split(task, 0, classes)
    # the same class is drawn anew in each task
    parts = [frozenset(c for c in colours(t.train[0]) if c[1] == 13) for t in tasks]
    assert len(set(parts)) > 1


def test_trials_of_office_home_split_anew(office_home):
    one, again, other = (
        datasets.office_home(office_home, incremental=True, trial=trial) for trial in (0, 0, 1)
    )
    assert same(one, again)
    for task, task_of_other in zip(one, other, strict=True):
        for name in ("train", "valid", "test"):
            images, others = (colours(getattr(t, name)[0]) for t in (task, task_of_other))
            assert set(images) != set(others)


def test_too_few_images_of_office_home(office_home, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    for label in INCREMENTAL[-1]:
        own = tmp_path / "Product" / CLASSES[label]
        own.mkdir(parents=True)
        for number in range(9 if label == 6 else 10):
            pillow.new("RGB", (2, 2)).save(own / f"{number}.png")
    with pytest.raises(ValueError, match="at least 10 images of Bucket in Product, got 9"):
        datasets.office_home(tmp_path, incremental=True)
