"""Configs: what is wrong is told by its place, with the nearest key; what is left out is filled."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import drawn_experiment
import pytest

from lasem_fast.__main__ import main

pytest.importorskip("pydantic")

from lasem_fast import LASEM
from lasem_fast.experiments import config, network, presets, schema, variants
from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.experiment import Experiment

PLAIN = config.tomllib.loads(drawn_experiment.config())


def changed(**changes):
    """The plain config with other values by dotted keys, ``__`` for a dot; None takes a key out."""
    plain = config.tomllib.loads(drawn_experiment.config())
    for key, value in changes.items():
        *tables, name = key.split("__")
        table = plain
        for part in tables:
            table = table[int(part) if part.isdigit() else part]
        if value is None:
            del table[name]
        else:
            table[name] = value
    return plain


def work_out(plain) -> None:
    """All that is looked at before anything is trained."""
    experiment = Experiment.of(plain)
    for unit in experiment.units():
        experiment.settings(unit)
        experiment.tasks(unit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [1]}, r"seedz: unknown key; did you mean 'seeds'\?"),
        ({"training__epoch": 3}, r"training.epoch: unknown key; did you mean 'epochs'\?"),
        ({"net__group": [1, 1]}, r"net.group: unknown key; did you mean 'groups'\?"),
        ({"methods__0__likelihod": "joint"},
         r"methods\[0\].likelihod: unknown key; did you mean 'likelihood'\?"),
        ({"methods__1__probability": 0.5}, r"methods\[1\].probability: unknown key; known are "),
        ({"methods__0__method": "lassem"},
         r"methods\[0\].method: expected one of .* got 'lassem'; did you mean 'lasem'\?"),
        ({"methods__0__method": None}, r"methods\[0\].method: expected the name of a method"),
        ({"name": None}, "name: missing"),
        ({"name": "a/b"}, r"name: string should match pattern '\^\[A-Za-z0-9.*, got 'a/b'$"),
        ({"data": None}, "data: missing"),
        ({"data": {"name": "digit"}, "training": {}},
         r"data.name: expected one of .* got 'digit'; did you mean 'digits'\?"),
        ({"data__name": f"{drawn_experiment.__file__}:five", "data__n": None},
         r"data.name: what .*:five' returned: tasks: expected a sequence of Task, got int"),
        ({"methods": []}, "methods: list should have at least 1 item"),
        ({"seeds": [0, "1"]}, r"seeds.1: input should be a valid integer, got '1'"),
        ({"seeds": [0, 0]}, r"seeds: expected different ones, got \[0, 0\]"),
        ({"workers": 0}, "workers: input should be greater than or equal to 1, got 0"),
        ({"training__epochs": 2.5}, "training.epochs: input should be a valid integer"),
        ({"methods__0__preset": "papers"}, r"methods\[0\].preset: input should be 'paper' or 'rel"),
        ({"methods__0__prune": 1.0}, r"methods\[0\].prune: input should be less than 1"),
        ({"methods__0__backend": "tritn"}, r"lasem: backend: expected one of .* got 'tritn'"),
        ({"methods__1__config": "topp-1"}, r"methods\[1\].config: expected 'all', .* got 'topp-1'"),
        ({"methods__1__config": "top-3"}, r"methods\[1\].config: expected .* got 'top-3'"),
        ({"methods__1__config": [[1, 3]]}, r"methods\[1\].config: expected different stages"),
        ({"methods__1__config": ["all", [1, 2]]}, "methods: expected different labels, got 'All h"),
        ({"methods__1__config": "release"}, r"methods\[1\].config: 'release' is defined for nets"),
        ({"net__name": "cifar-5"}, r"net.name: expected one of .* did you mean 'cifar-"),
        ({"net__name": "nowhere.py:net"}, "net.name: expected a Python file, got 'nowhere.py'"),
        ({"net__name": f"{drawn_experiment.__file__}:mesh"}, "net.name: expected a function"),
        ({"net__groups": [3]}, r"net.groups: expected positive sizes that add up to depth=2"),
        ({"training__preset": "cifar"}, r"training.preset: expected .* did you mean 'cifar-10"),
        ({"training__lr": None}, "training: expected lr, or a preset"),
        ({"data__m": 3}, r"data.m: unknown key; known are n, trial"),
        ({"methods__0__tasks": 4}, "tasks of 'LASEM hps': expected at most the sequence's 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_its_place(changes, message):
    with pytest.raises(ConfigError, match=rf"(?m)^{message}"):
        work_out(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods__0__max_memory": 0}, "expected bytes .* or a fraction .* got 0"),
        ({"methods__0__max_memory": 1.5}, "expected bytes .* or a fraction .* got 1.5"),
        ({"methods__0__transfer": ["hps", "x"]}, r"expected 'hps', .* got \['hps', 'x'\]"),
        ({"methods__1__config": [[0]]}, r"expected a name such as .* got \[\[0\]\]"),
        ({"training__evaluate_earlier_every": 0}, "expected a whole .* or 'never', got 0"),
    ],
)
def test_a_value_of_several_types_is_told_in_one_line(changes, message):
    (key,) = changes
    *_, name = key.split("__")
    with pytest.raises(ConfigError) as error:
        config.check(changed(**changes))
    (line,) = str(error.value).splitlines()
    assert re.search(rf"\.{name}: {message}$", line)


def test_den_is_refused_where_its_phases_have_no_epochs():
    plain = changed(methods=[{"method": "den"}], training__epochs=2)
    experiment = Experiment.of(plain)
    with pytest.raises(ConfigError, match=r"^training\.epochs: .* at least 5 for 'DEN', got 2"):
        experiment.arguments(experiment.units()[0])
    plain["methods"][0]["tasks"] = 1
    experiment = Experiment.of(plain)
    assert experiment.arguments(experiment.units()[0])["epochs"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": '"abacus"'}, "device: expected one that PyTorch can use here, got 'abacus'"),
        ({"joblib_backend": '"abacus"', "workers": "2"},
         "joblib_backend: expected one that joblib can use here, got 'abacus'"),
        ({"tensorboard": "true"}, "tensorboard: expected false where TensorBoard is not installed"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_here_is_told_before_anything_is_trained(
    changes, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    path = tmp_path / "c.toml"
    path.write_text(drawn_experiment.config(out=f'"{tmp_path / "out"}"', **changes))
    for more in ([], ["--plan"]):
        with pytest.raises(SystemExit) as end:
            main(["run", str(path), *more])
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        config.check(changed(seedz=1, net__nam="x", methods__2__foo=1))
    assert len(str(error.value).splitlines()) == 3


def test_the_command_tells_file_and_place_with_status_2(tmp_path, capsys):
    path = tmp_path / "c.toml"
    for text, told in (("name = 1\n", "name: input should be a valid string"), ("[", "TOML")):
        path.write_text(text)
        with pytest.raises(SystemExit) as end:
            main(["run", str(path)])
        assert end.value.code == 2 and told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "none.toml")])
    assert "No such file" in capsys.readouterr().err


def test_lists_stand_for_variants():
    checked = config.check(
        changed(methods=[
            {"method": "lasem", "transfer": ["hps", "tf"]},
            {"method": "static", "config": ["all", "none", "bottom-1", "alternating"]},
            {"method": "static", "config": ["all"], "transfer": "dfcnn", "label": "Everything"},
            {"method": "static", "config": ["all", [1]], "transfer": "tf", "label": "S"},
        ])
    )  # fmt: skip
    found = variants.expand(checked.methods, network.Network(checked.config.net))
    assert [v.label for v in found] == [
        "LASEM hps", "LASEM tf", "All hps", "None hps", "Bottom 1 hps", "Top 1 hps", "Everything",
        "S All", "S Bottom 1",
    ]  # fmt: skip
    assert [v.settings["config"] for v in found[2:6]] == [[1, 2], [], [1], [2]]
    assert len({v.slug for v in found}) == len(found)


def test_names_of_configurations():
    names = [
        variants.configuration_name(c, 6)
        for c in ([1, 2, 3, 4, 5, 6], [], [5, 6], [1], [2, 4, 6], [1, 3, 5])
    ]
    assert names == ["All", "None", "Top 2", "Bottom 1", "Alternating", "{1,3,5}"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("cifar-4", 9), ("cifar-6", 12), ("cifar-8", 9), ("office-home-6", 9), ("stl-9", 1)],
)
def test_static_configurations_of_the_release(name, counts):
    """Numbers of configurations: PROTOCOL's list of the release's test types."""
    plain = changed(net={"name": name}, methods=[{"method": "static", "config": "release"}])
    checked = config.check(plain)
    found = variants.expand(checked.methods, network.Network(checked.config.net))
    assert len(found) == counts
    if name == "office-home-6":  # its first two layers are never shared
        assert all(min(v.settings["config"]) >= 3 for v in found)


def test_presets_of_the_search():
    """What the presets say is what `LASEM` and `LASEM.reference` do."""
    checked = config.check(
        changed(methods=[
            {"method": "lasem", "preset": "paper", "label": "a"},
            {"method": "lasem", "preset": "release", "label": "b"},
            {"method": "lasem", "preset": "release", "prior": "count", "label": "c"},
        ])
    )  # fmt: skip
    experiment = Experiment(checked, checked.out)
    made = []
    for variant in experiment.variants:
        built = experiment.built[variant.slug]
        made.append(built(built.make_net).module)
    for em, expected in zip(made, (LASEM(made[0].net), LASEM.reference(made[0].net)), strict=False):
        assert type(em.likelihood) is type(expected.likelihood)
        assert type(em._prior) is type(expected._prior)
        assert em.redraw_unclaimed == expected.redraw_unclaimed
    assert type(made[2]._prior) is type(made[0]._prior)
    assert made[2].redraw_unclaimed and type(made[2].likelihood) is type(made[1].likelihood)


def test_presets_of_the_training():
    """PROTOCOL's table: rates, decays and epochs, those of MNIST shared among the tasks."""
    assert presets.training("mnist", 5)["epochs"] == 100
    assert presets.training("mnist", 10)["epochs"] == 50
    assert presets.training("cifar-10", 10)["epochs"] == 200
    cifar = presets.training("cifar-100", 40)
    assert (cifar["epochs"], cifar["lr"], cifar["lr_decay"]) == (2000, 1e-4, 1 / 4000)
    assert cifar["optimizer"] == "tf-rmsprop" and cifar["drop_last"]
    found = Experiment.of(changed(training={"preset": "stl-10", "epochs": 7})).training()
    assert (found["epochs"], found["lr"], found["lr_decay"]) == (7, 1e-4, 0.0)


def test_every_table_has_a_default_for_what_can_be_left_out():
    checked = config.check(PLAIN)
    assert checked.config.workers == 1 and str(checked.out) == "runs/drawn"
    assert [type(m) for m in checked.methods] == [
        schema.Lasem, schema.Static, schema.SingleTask, schema.BruteForce
    ]  # fmt: skip


EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_ready_configs_are_right(path):
    experiment = Experiment.of(config.read(path), planned=True)
    assert experiment.config.name == path.stem
    unit = experiment.units()[0]
    assert experiment.variants[0].settings["method"] == "lasem"
    if experiment.config.data.name == "office-home":  # its sizes are those of the files
        with pytest.raises(ConfigError, match="data: "):
            experiment.tasks(unit)
        return
    assert experiment.settings(unit)["training"]["epochs"] >= 5
    tasks = experiment.tasks(unit)
    net = experiment.network.net("hps")
    net.add_task("t", experiment.network.head(tasks[0], "hps"))
    assert net(tasks[0].test[0][:1], "t", config=0).shape == (1, tasks[0].n_classes)
