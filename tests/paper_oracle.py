"""The paper's networks and mechanisms written out a second time, in the release's own layouts.

For brute force over the nets of `lasem_fast.nets` and for generated weights; no library code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lasem_fast as lf


def logits_by_protocol(arch):
    """One configuration of an architecture, layer by layer as the release runs it."""

    def logits(net, config, x, task):
        entering, h = [], x
        for i, shared in enumerate(config):
            entering.append(h)
            weight, bias = layer_tensors(net, task, i, shared)
            out = F.relu(F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2))
            for first, last in arch.skips:
                if last == i:
                    skip = entering[first]
                    for j in range(first, last):
                        skip = same_max_pool(skip, arch.pools[j])
                    out = out + skip
            h = same_max_pool(out, arch.pools[i])
        return net.heads[task](h)

    return logits


def same_max_pool(h: Tensor, p: int) -> Tensor:
    """Pads with -inf, the smaller half first, and pools p x p with stride p."""
    padding = []
    for n in (h.shape[3], h.shape[2]):
        total = (-(-n // p) - 1) * p + p - n
        padding += [total // 2, total - total // 2]
    return F.max_pool2d(F.pad(h, padding, value=-torch.inf), p)


def layer_tensors(net, task, stage, shared) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution of a stage in a branch."""
    if not shared:
        conv = next(m for m in net.specific[task][stage].modules() if isinstance(m, nn.Conv2d))
        return conv.weight, conv.bias
    if net.adapters[task][stage] is None:
        conv = next(m for m in net.shared[stage].modules() if isinstance(m, nn.Conv2d))
        return conv.weight, conv.bias
    (factors,), (knowledge,) = net.adapters[task][stage], net.shared[stage].knowledge
    if isinstance(net.mechanism, lf.transfer.TensorFactorization):
        return tucker(knowledge.tensor, factors.modes), factors.bias
    return deconvolved(knowledge.tensor, factors, knowledge.sizes.filter), factors.bias


def tucker(shared: Tensor, modes) -> Tensor:
    """W[a,b,c,d] = sum_ijkl KB[i,j,k,l] U0[i,a] U1[j,b] U2[k,c] U3[l,d] over [kh,kw,cin,cout]."""
    u3, u2, u0, u1 = modes
    kb = shared.permute(2, 3, 1, 0)
    return torch.einsum("ijkl,ia,jb,kc,ld->abcd", kb, u0, u1, u2, u3).permute(3, 2, 0, 1)


def deconvolved(shared: Tensor, factors, t: int) -> Tensor:
    """The transposed convolution of stride 2 (SAME), entry by entry, and the contraction."""
    kb, filters = shared[0], factors.deconvolution  # [C_k, h, h] and [C_k, C_t, t, t]
    h, pad = kb.shape[1], (t - 1) // 2
    k = 2 * (h - 1) + 1
    z = [[factors.deconvolution_bias for _ in range(k)] for _ in range(k)]
    for i in range(h):
        for j in range(h):
            for u in range(t):
                for v in range(t):
                    a, b = 2 * i + u - pad, 2 * j + v - pad
                    if 0 <= a < k and 0 <= b < k:
                        z[a][b] = z[a][b] + kb[:, i, j] @ filters[:, :, u, v]
    rows = [torch.stack([factors.contraction @ entry for entry in row], dim=-1) for row in z]
    return torch.stack(rows, dim=-2)


def orthogonality(net, task, weight=0.1):
    """The auxiliary term of a stage under tf: ||U^T U - I||_F, not squared, over all factors."""

    def penalty(stage):
        total = 0.0
        for factors in net.adapters[task][stage] or ():
            for u in factors.modes:
                total = total + (u.T @ u - torch.eye(len(u), dtype=u.dtype)).square().sum().sqrt()
        return weight * total

    return penalty if isinstance(net.mechanism, lf.transfer.TensorFactorization) else None


@torch.no_grad()
def excite(net, task, x):
    """Weights under which activations keep their size, so that no gradient is trivially small."""
    h = x
    for stage in range(net.depth):
        for shared in (False, True):
            weight, bias = layer_tensors(net, task, stage, shared)
            outermost = weight
            if shared and net.adapters[task][stage] is not None:
                (factors,), (knowledge,) = net.adapters[task][stage], net.shared[stage].knowledge
                for mode in getattr(factors, "modes", ()):
                    mode += torch.eye(len(mode), dtype=mode.dtype)
                outermost = getattr(factors, "contraction", knowledge.tensor)
            else:
                nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
            nn.init.uniform_(bias, 0.1, 0.5)
            own = h[:, : weight.shape[1]]
            weight, bias = layer_tensors(net, task, stage, shared)
            out = F.conv2d(own, weight, padding=weight.shape[-1] // 2)
            outermost /= out.std()
            bias -= out.mean(dim=(0, 2, 3)) / out.std()  # every channel opens somewhere
        h = net.path(task, [True] * net.depth)[stage](h)
    *hidden, output = [m for m in net.heads[task].modules() if isinstance(m, nn.Linear)]
    for layer in (*hidden, output):
        nn.init.kaiming_normal_(layer.weight)
    for layer in hidden:
        layer.weight.abs_()  # narrowed to one unit, it must not be closed
        layer.weight /= layer.weight.sum(dim=1, keepdim=True)
