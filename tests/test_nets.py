"""The paper's nets under every mechanism equal brute force; their tables, pooling and skips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import assert_equals, assert_step_equals, brute_force
from paper_oracle import excite, logits_by_protocol, orthogonality, same_max_pool
from torch import nn

import lasem_fast as lf

NETS = {
    "cifar100-4": lambda **options: lf.nets.cifar100(4, width=1 / 16, **options),
    "cifar100-6": lambda **options: lf.nets.cifar100(6, width=1 / 16, **options),
    "cifar100-8": lambda **options: lf.nets.cifar100(8, width=1 / 16, **options),
    "office_home-4": lambda **options: lf.nets.office_home(4, width=1 / 32, **options),
    "office_home-6": lambda **options: lf.nets.office_home(6, width=1 / 64, **options),
    "office_home-8": lambda **options: lf.nets.office_home(8, width=1 / 16, **options),
    "stl10-6": lambda **options: lf.nets.stl10(6, width=1 / 16, **options),
    "stl10-9": lambda **options: lf.nets.stl10(9, width=1 / 16, **options),
    **{
        f"residual17-{g}G": lambda g=g, **options: lf.nets.residual17(g, width=1 / 32, **options)
        for g in range(4, 9)
    },
}


def _space(name, arch):
    """The paper's space; of the large images' deep nets every so many rows, for time."""
    rows = {"office_home-6": range(0, 64, 5), "office_home-8": range(0, 256, 17)}.get(name)
    return arch.space() if rows is None else lf.ConfigSpace.from_configs(rows, arch.depth)


def _case(arch, samples=2, classes=3):
    net = arch.net()
    net.add_task("a", arch.head(classes))
    net.double().eval()
    x = torch.randn(samples, *arch.input_shape, dtype=torch.float64)
    excite(net, "a", x)
    return net, x, torch.randint(classes, (samples,))


@pytest.mark.parametrize(
    ("name", "transfer"),
    [
        (name, transfer)
        for name in NETS
        for transfer in ("hps", "tf", "dfcnn")
        # generated weights know nothing of groups; 4G has them all
        if transfer == "hps" or name not in {f"residual17-{g}G" for g in range(5, 9)}
    ],
)
def test_gradients_equal_brute_force(name, transfer):
    arch = NETS[name](transfer=transfer)
    net, x, y = _case(arch)
    em = lf.LASEM.reference(net, _space(name, arch), backend="torch").eval()
    truth = brute_force(
        net,
        em.space.bits,
        x,
        y,
        "a",
        likelihood="mean",
        logits=logits_by_protocol(arch),
        penalty=orthogonality(net, "a"),
    )
    largest = sorted(float(g.abs().max()) for g in truth.grads.values())
    assert largest[len(largest) // 4] > 1e-6, "gradients too small to be compared"
    assert_step_equals(net, em(x, y, "a"), truth)


@pytest.mark.parametrize("transfer", ["hps", "tf", "dfcnn"])
def test_a_skip_may_span_branches(transfer):
    arch = lf.nets.residual17(width=1 / 32, transfer=transfer)
    net, x, y = _case(arch)
    space = lf.ConfigSpace.from_configs([{2}, {3}, {2, 3, 9}, {4, 8}, {1, 16}, {17}, set()], 17)
    truth = brute_force(
        net,
        space.bits,
        x,
        y,
        "a",
        logits=logits_by_protocol(arch),
        penalty=orthogonality(net, "a"),
    )
    assert_step_equals(net, lf.LASEM(net, space, backend="torch").eval()(x, y, "a"), truth)


@pytest.mark.parametrize("skips", [((1, 1),), ((1, 1), (3, 3)), ((1, 3),), ((0, 2),)])
def test_skips_of_any_length_are_pooled_on_their_way(skips):
    arch = replace(lf.nets.cifar100(4, width=1 / 16), channels=(3, 3, 3, 3), skips=skips)
    net, x, y = _case(arch)
    truth = brute_force(net, arch.space().bits, x, y, "a", logits=logits_by_protocol(arch))
    assert_step_equals(net, lf.LASEM(net, backend="torch").eval()(x, y, "a"), truth)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7])
def test_same_pooling_is_a_plain_max_pool(window):
    for side in range(window, 20):
        h = torch.randn(2, 3, side, side, dtype=torch.float64) - 10
        pool = lf.nets.same_pool(side, window)
        assert type(pool) in (nn.Identity, nn.MaxPool2d)
        assert torch.equal(pool(h), same_max_pool(h, window))


def test_sizes_of_the_paper():
    features = {
        lf.nets.cifar100: {4: 4096, 6: 2048, 8: 512},
        lf.nets.office_home: {4: 4096, 6: 4096, 8: 4096},
        lf.nets.stl10: {6: 2048, 9: 2048},
    }
    for make, by_layers in features.items():
        for layers, expected in by_layers.items():
            for transfer in ("hps", "tf", "dfcnn"):
                arch = make(layers, transfer)
                assert arch.features == expected and arch.depth == layers
                arch.net()
    assert lf.nets.residual17().features == 2048
    groups = {4: [5, 4, 4, 4], 8: [3, 2, 2, 2, 2, 2, 2, 2]}
    for number, sizes in groups.items():
        assert lf.nets.residual17(number).space() == lf.ConfigSpace(depth=17, groups=sizes)
    assert len(lf.nets.stl10(9).space()) == 8


@pytest.mark.parametrize(
    ("arch", "shared", "own"),
    [
        (lf.nets.cifar100(4, "tf"), 65_376, 16_657),
        (lf.nets.cifar100(4, "dfcnn"), 432, 533_424),
        (lf.nets.office_home(4, "dfcnn"), 1_952, 19_116_400),
    ],
)
def test_numbers_of_parameters_of_the_release(arch, shared, own):
    net = arch.net()
    net.add_task("a", arch.head(2))
    assert sum(p.numel() for p in net.shared.parameters()) == shared
    assert sum(p.numel() for p in net.adapters["a"].parameters()) == own


def test_initial_weights_are_the_release_s():
    net = lf.nets.cifar100(8).net()
    net.add_task("a", lf.nets.cifar100(8).head(10))
    for part in (net.shared, net.specific["a"], net.heads["a"]):
        for layer in part.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                assert float(layer.weight.detach().abs().max()) <= 0.1
                assert bool((layer.bias == 0.2).all())
    # a normal distribution cut at 2 standard deviations keeps 0.8796 of its standard deviation;
    # 147,456 draws estimate it to a relative 1 / sqrt(2 n) = 0.2%
    largest = net.shared[7][0].weight.detach()
    assert abs(float(largest.std()) / (0.05 * 0.8796) - 1) < 5 * (2 * largest.numel()) ** -0.5


def test_glorot_limits_of_generated_layers():
    bounds = []
    for transfer in ("tf", "dfcnn"):
        net = lf.nets.cifar100(4, transfer).net()
        net.add_task("a", nn.Identity())
        knowledge, factors = net.shared[2].knowledge[0], net.adapters["a"][2][0]
        bounds.append((factors.bias, (3 / 64) ** 0.5))
        if transfer == "tf":  # [3, 3, 32, 64]: fans 9 * 32 and 9 * 64
            bounds.append((knowledge.tensor, (6 / (288 + 576)) ** 0.5))
            bounds += [(mode, (3 / len(mode)) ** 0.5) for mode in factors.modes]
        else:  # [1, 2, 2, 32], [3, 3, 64, 32], [1, 1, 1, 64], [64, 32, 64]
            bounds.append((knowledge.tensor, (6 / (4 + 64)) ** 0.5))
            bounds.append((factors.deconvolution, (6 / (576 + 288)) ** 0.5))
            bounds.append((factors.deconvolution_bias, (6 / 65) ** 0.5))
            bounds.append((factors.contraction, (6 / (64 * 32 + 64 * 64)) ** 0.5))
    for tensor, limit in bounds:
        largest = float(tensor.detach().abs().max())
        assert largest <= limit
        # P(all n draws below q limit) = q^n: at most 1e-9
        assert largest >= limit * 1e-9 ** (1 / tensor.numel())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lf.nets.cifar100(5), r"layers: expected one of \(4, 6, 8\), got 5"),
        (lambda: lf.nets.stl10(4), r"layers: expected one of \(6, 9\), got 4"),
        (lambda: lf.nets.residual17(3), r"groups: expected one of \[4, 5, 6, 7, 8\], got 3"),
        (lambda: lf.nets.cifar100(width=0), "width: expected a finite number above 0, got 0"),
        (lambda: lf.nets.cifar100(torch.ones(2)), "layers: expected one of"),
        (lambda: lf.nets.residual17({4}), "groups: expected one of"),
        (lambda: lf.nets.cifar100().head(0), "classes: expected a whole number of at least 1"),
        (lambda: lf.nets.same_pool(7, 0), "window: expected a whole number of at least 1, got 0"),
        (lambda: lf.nets.cifar100(transfer="x").net(), "transfer: expected 'hps', 'tf'"),
    ],
)
def test_bad_arguments_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lf.nets.cifar100().head("ten"), "classes: expected a whole number"),
        (lambda: lf.nets.cifar100(width="wide"), "width: expected a finite number above 0"),
        (lambda: lf.nets.same_pool(7.5, 2), "side: expected a whole number"),
        (lambda: lf.nets.SkipLayer(nn.Linear(1, 1), nn.Identity()), "conv: expected an nn.Conv2d"),
        (lambda: lf.nets.SkipLayer(nn.Conv2d(1, 1, 1), None), "pool: expected an nn.Module"),
        (lambda: lf.initialisers.release_([nn.Linear(1, 1)]), "module: expected an nn.Module"),
        (lambda: lf.initialisers.glorot_uniform_(torch.ones(2), "2", 2), "fan_in: expected a"),
        (lambda: lf.transfer.DeconvolutionalFactorization(3), "sizes: expected a sequence"),
        (lambda: lf.transfer.TensorFactorization(aux_weight="x"), "aux_weight: expected a finite"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_in_words(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_reference_backend_agrees_on_a_generated_residual_net():
    arch = lf.nets.residual17(8, "dfcnn", width=1 / 32)
    net, x, _ = _case(arch)
    space = lf.ConfigSpace.from_configs([arch.space()[i] for i in (0, 77, 255)])
    outputs = [
        lf.LASEM(net, space, backend=backend).eval().evaluate(x, "a").detach()
        for backend in ("torch", "reference")
    ]
    assert_equals(*outputs, "logits")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kernels": (2, 3, 3, 3)}, "kernels"),
        ({"channels": (3,)}, "channels"),
        ({"pools": (0, 1, 1, 1)}, "pools"),
        ({"hidden": 1}, "hidden"),
        ({"batch_size": None}, "batch_size"),
        ({"transfer": "lora"}, "transfer"),
        ({"input_shape": (3, 32, 31)}, "input_shape"),
        ({"skips": ((1, 2), (2, 3))}, "skips"),
        ({"groups": (1, 2)}, "groups"),
    ],
)
def test_architectures_that_do_not_fit_are_named(change, name):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        replace(lf.nets.cifar100(4), **change)
