"""One E-step and one M-step of the reference preset, worked by hand for each mechanism.

The net: two layers, each a 1 x 1 convolution of one channel with ReLU, on an image of one pixel.
The head: dropout and a linear layer of logits (z, 0), so P(label 0) = sigmoid(z).

    weight of layer 1: shared 2, own 1        weight of layer 2: shared ln 2, own 2 ln 2

All biases are 0. Mini-batch: pixels 1 and 0, both with label 0. Pixel 0 gives z = 0 and P = 1/2 in
every configuration, and (the derivative of ReLU at 0 is 0) no gradient of layers 1 and 2.

E-step, without dropout, z = product of the weights for pixel 1; the likelihood is the mean of P:

    row  shared  z       P(pixel 1)  likelihood             prior  posterior
    0    {1,2}   2 ln 2  4/5         (4/5   + 1/2)/2 0.650000  1/4    0.249623
    1    {1}     4 ln 2  16/17       (16/17 + 1/2)/2 0.720588  1/4    0.276732
    2    {2}       ln 2  2/3         (2/3   + 1/2)/2 0.583333  1/4    0.224021
    3    {}      2 ln 2  4/5         (4/5   + 1/2)/2 0.650000  1/4    0.249623
                                     sum             2.603922

M-step, with a dropout mask per configuration (keep 1/2, so kept features count twice). Here rows
0, 2 and 3 are kept and row 1 is dropped. With two samples d nll / d z = -(1 - P) / 2:

    row  z       P      d nll / d z
    0    4 ln 2  16/17  -1/34
    1    0       1/2    (nothing behind the mask)
    2    2 ln 2  4/5    -1/10
    3    4 ln 2  16/17  -1/34

With z = 2 a b for weights a, b of layers 1 and 2: dz/da = 2 b and dz/db = 2 a, and so

    shared 1: 0.249623 (-1/34) 2 ln 2                                        = -0.01017799
    own 1:    0.224021 (-1/10) 2 ln 2 + 0.249623 (-1/34) 4 ln 2              = -0.05141190
    shared 2: 0.249623 (-1/34) 4      + 0.224021 (-1/10) 2                   = -0.07417169
    own 2:    0.249623 (-1/34) 2                                             = -0.01468373

Biases: that of layer 1 has the gradient of its weight (pixel 1), that of layer 2 has dz/dc = 2:

    shared 2: 0.249623 (-1/34) 2 + 0.224021 (-1/10) 2                        = -0.05948795
    own 2:    0.249623 (-1/34) 2   (row 1 is dropped)                        = -0.01468373

The loss: 0.249623 (ln(17/16) + ln 2)/2 + 0.276732 (ln 2 + ln 2)/2 + 0.224021 (ln(5/4) + ln 2)/2
          + 0.249623 (ln(17/16) + ln 2)/2                                    = 0.48260933
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_equals
from torch import nn

import lasem_fast as lf

LN2 = math.log(2)
PRINTED = 1e-6  # the figures above and below have this many digits


class KnownDropout(nn.Dropout):
    """A dropout of 1/2 whose draw for the four configurations is known: row 1 is dropped."""

    def forward(self, h):
        if not self.training:
            return h
        return (h.unflatten(0, (-1, 4)) * h.new_tensor([2, 0, 2, 2])[:, None]).flatten(0, 1)


def _net(transfer):
    net = lf.TransferNet(
        [nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()) for _ in range(2)], transfer=transfer
    )
    net.add_task("a", nn.Sequential(nn.Flatten(), KnownDropout(0.5), nn.Linear(1, 2, bias=False)))
    for parameter in net.double().parameters():
        nn.init.zeros_(parameter)
    _set(net.specific["a"][0][0].weight, 1)
    _set(net.specific["a"][1][0].weight, 2 * LN2)
    with torch.no_grad():
        net.heads["a"][2].weight.copy_(torch.tensor([[1.0], [0.0]]))
    return net


def _set(parameter, value):
    nn.init.constant_(parameter, value)


def _step(net):
    em = lf.LASEM.reference(net)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    step = em(x, torch.tensor([0, 0]), "a")
    step.loss.backward()
    return em, step


def _is(actual, *expected):
    actual = actual.detach().flatten()
    assert_equals(actual, torch.tensor(expected, dtype=actual.dtype), "figure", bound=PRINTED)


def _check_own_and_posterior(net, em, step, loss):
    _is(step.log_likelihood.exp(), 0.650000, 0.720588, 0.583333, 0.650000)
    _is(step.posterior, 0.249623, 0.276732, 0.224021, 0.249623)
    _is(em.prior("a"), 0.249623, 0.276732, 0.224021, 0.249623)  # the mean of one posterior
    _is(step.loss, loss)
    own = net.specific["a"]
    _is(own[0][0].weight.grad, -0.051412)
    _is(own[0][0].bias.grad, -0.051412)
    _is(own[1][0].weight.grad, -0.014684)
    _is(own[1][0].bias.grad, -0.014684)


def _update(net, parameter, expected):
    """One step of the release's RMSProp: w - lr g / sqrt(0.9 + 0.1 g^2)."""
    lf.optim.TFRMSprop(net.task_parameters("a"), lr=0.1).step()
    _is(parameter, expected)


def test_hard_parameter_sharing():
    net = _net("hps")
    _set(net.shared[0][0].weight, 2)
    _set(net.shared[1][0].weight, LN2)
    em, step = _step(net)
    _check_own_and_posterior(net, em, step, 0.482609)
    _is(net.shared[0][0].weight.grad, -0.010178)
    _is(net.shared[0][0].bias.grad, -0.010178)
    _is(net.shared[1][0].weight.grad, -0.074172)
    _is(net.shared[1][0].bias.grad, -0.059488)
    # 0.693147 + 0.1 * 0.074172 / sqrt(0.9 + 0.1 * 0.074172^2) = 0.693147 + 0.007816
    _update(net, net.shared[1][0].weight, 0.700963)


def test_tensor_factorisation():
    """Weight = shared * U_0 U_1 U_2 U_3, all numbers here: 1 * 2 1 1 1 and ln 2 * 1 1 1 1.

    Layer 1's factor 2 has an auxiliary term of 0.1 |2^2 - 1| = 0.3 with the derivative 0.1 * 2 * 2
    = 0.4; all other factors are orthogonal: 0 and 0. The term counts with the posterior that layer
    1 is shared, 0.249623 + 0.276732 = 0.526355: the loss rises by 0.157906, the gradient of the
    factor by 0.210542.
    """
    net = _net("tf")
    first, second = (net.adapters["a"][i][0] for i in range(2))
    _set(net.shared[0].knowledge[0].tensor, 1)
    _set(net.shared[1].knowledge[0].tensor, LN2)
    for mode in (*first.modes, *second.modes):
        _set(mode, 1)
    _set(first.modes[0], 2)
    em, step = _step(net)
    _check_own_and_posterior(net, em, step, 0.482609 + 0.157906)
    _is(net.shared[0].knowledge[0].tensor.grad, -0.010178 * 2)
    # d weight / d U_0 = 1, d weight / d U_1 = 2
    _is(first.modes[0].grad, -0.010178 + 0.210542)
    _is(first.modes[1].grad, -0.010178 * 2)
    _is(first.bias.grad, -0.010178)
    _is(net.shared[1].knowledge[0].tensor.grad, -0.074172)
    _is(second.modes[3].grad, -0.074172 * LN2)
    _is(second.bias.grad, -0.059488)
    # 2 - 0.1 * 0.200364 / sqrt(0.9 + 0.1 * 0.200364^2) = 2 - 0.021073
    _update(net, first.modes[0], 1.978927)


def test_deconvolutional_factorisation():
    """Weight = contraction * (shared * deconvolution + its bias), all numbers here.

    Layer 1: 1 * (1 * 1 + 1) = 2. Layer 2: ln 2 * (1 * 1 + 0) = ln 2.
    """
    net = _net(lf.transfer.DeconvolutionalFactorization(sizes=[(1, 1, 1, 1)] * 2))
    first, second = (net.adapters["a"][i][0] for i in range(2))
    for i, factors in enumerate((first, second)):
        _set(net.shared[i].knowledge[0].tensor, 1)
        _set(factors.deconvolution, 1)
        _set(factors.deconvolution_bias, 1 - i)
        _set(factors.contraction, LN2 if i else 1)
    em, step = _step(net)
    _check_own_and_posterior(net, em, step, 0.482609)
    # d weight / d shared = contraction * deconvolution; / d contraction = what is contracted
    _is(net.shared[0].knowledge[0].tensor.grad, -0.010178)
    _is(first.deconvolution.grad, -0.010178)
    _is(first.deconvolution_bias.grad, -0.010178)
    _is(first.contraction.grad, -0.010178 * 2)
    _is(first.bias.grad, -0.010178)
    _is(net.shared[1].knowledge[0].tensor.grad, -0.074172 * LN2)
    _is(second.deconvolution.grad, -0.074172 * LN2)
    _is(second.deconvolution_bias.grad, -0.074172 * LN2)
    _is(second.contraction.grad, -0.074172)
    _is(second.bias.grad, -0.059488)
    _update(net, second.contraction, 0.700963)


@pytest.mark.parametrize("share", [{1}, {2}])
def test_the_next_task_finds_unclaimed_stages_drawn_anew(share):
    """Layer 1 or 2 is kept; the other one is rolled back and then drawn anew."""
    net = _net("hps")
    em, _ = _step(net)
    with torch.no_grad():
        for parameter in net.shared.parameters():
            parameter += 5
    torch.manual_seed(3)
    em.end_task("a", share)
    claimed, unclaimed = (0, 1) if 1 in share else (1, 0)
    assert float(net.shared[claimed][0].weight.detach()) == 5
    torch.manual_seed(3)
    fresh = nn.Conv2d(1, 1, 1, dtype=torch.float64)
    assert torch.equal(net.shared[unclaimed][0].weight, fresh.weight)
    assert torch.equal(net.shared[unclaimed][0].bias, fresh.bias)
