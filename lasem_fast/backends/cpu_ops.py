"""Contracts of the CPU kernels: schemas, fakes and autograd.

The extension ``_cpu`` registers implementations only, so that importing this module works without
it; then :func:`supported` is false, :func:`why_unsupported` says why, and the operators raise
``NotImplementedError``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.backends import extension, head_gradient, second_order
from lasem_fast.levels.row_liveness import Liveness

_cpu, _why_no_extension = extension.load()

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "winograd_level(Tensor x, Tensor[] weights, Tensor[] biases, Tensor parents, Tensor branches, "
    "Tensor? skip, Tensor? skip_rows, int padding, int pool, int pool_pad, int out_h, int out_w, "
    "int tile, bool relu, bool relu_after) -> (Tensor, Tensor)"
)
_library.define(
    "winograd_level_backward(Tensor dy, Tensor x, Tensor code, Tensor[] weights, Tensor parents, "
    "Tensor branches, Tensor? live, int padding, int pool, int pool_pad, int tile, bool need_dx, "
    "bool need_dbiases) -> (Tensor, Tensor[], Tensor[])"
)
_library.define(
    "winograd_level_skip_backward(Tensor dy, Tensor code, Tensor? skip_rows, Tensor? live, "
    "int skips, int conv_h, int conv_w, int pool, int pool_pad) -> Tensor"
)
_library.define("channels_last_linear(Tensor x, Tensor weight, Tensor bias) -> Tensor")
_library.define(
    "channels_last_linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "posterior_head(Tensor logits, Tensor labels, Tensor log_prior, int likelihood) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("posterior_head_backward(Tensor residual, Tensor weights) -> Tensor")

_level = torch.ops.lasem_fast.winograd_level.default
_level_backward = torch.ops.lasem_fast.winograd_level_backward.default
_skip_backward = torch.ops.lasem_fast.winograd_level_skip_backward.default
_linear = torch.ops.lasem_fast.channels_last_linear.default
_linear_backward = torch.ops.lasem_fast.channels_last_linear_backward.default
_posterior_head = torch.ops.lasem_fast.posterior_head.default
_posterior_head_backward = torch.ops.lasem_fast.posterior_head_backward.default


@torch.library.register_fake("lasem_fast::winograd_level", lib=_library)
def _(
    x, weights, biases, parents, branches, skip, skip_rows, padding, pool, pool_pad, out_h, out_w,
    tile, relu, relu_after,
):  # fmt: skip
    size = (parents.shape[0], x.shape[1], out_h, out_w, weights[0].shape[0])
    return x.new_empty(size), x.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("lasem_fast::winograd_level_backward", lib=_library)
def _(
    dy, x, code, weights, parents, branches, live, padding, pool, pool_pad, tile, need_dx,
    need_dbiases,
):  # fmt: skip
    dx = torch.empty_like(x) if need_dx else x.new_empty((0,))
    dbiases = [w.new_empty(w.shape[:1]) for w in weights] if need_dbiases else []
    return dx, [torch.empty_like(w) for w in weights], dbiases


@torch.library.register_fake("lasem_fast::winograd_level_skip_backward", lib=_library)
def _(dy, code, skip_rows, live, skips, conv_h, conv_w, pool, pool_pad):
    return dy.new_empty((skips, dy.shape[1], conv_h, conv_w, dy.shape[4]))


@torch.library.register_fake("lasem_fast::channels_last_linear", lib=_library)
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("lasem_fast::channels_last_linear_backward", lib=_library)
def _(dy, x, weight, need_dx):
    dx = torch.empty_like(x) if need_dx else x.new_empty((0,))
    return dx, torch.empty_like(weight), weight.new_empty(weight.shape[:1])


@torch.library.register_fake("lasem_fast::posterior_head", lib=_library)
def _(logits, labels, log_prior, likelihood):
    per_config = logits.new_empty(logits.shape[:1])
    return (
        per_config,
        torch.empty_like(per_config),
        torch.empty_like(per_config),
        logits.new_empty(()),
        torch.empty_like(logits),
    )


@torch.library.register_fake("lasem_fast::posterior_head_backward", lib=_library)
def _(residual, weights):
    return torch.empty_like(residual)


def isa() -> str | None:
    """Instruction set of the float32 kernels (``"avx512"``, ``"avx2"``), or ``None``."""
    return (_cpu.isa() or None) if _cpu else None


def force_isa(name: str | None) -> None:
    """Use ``"avx2"`` or ``"avx512"`` from now on; ``None`` restores the choice made at start.

    At start the best instruction set of this CPU is taken, or the one that the environment variable
    ``LASEM_FAST_CPU_ISA`` names. Raises ``ValueError`` if this CPU lacks it.
    """
    if _cpu is None:
        raise RuntimeError(_why_no_extension)
    _cpu.force_isa(name or "")


def why_unsupported() -> str:
    """Why float32 has no kernels here, in words; empty where it has."""
    return _cpu.isa_reason() if _cpu else _why_no_extension


def supported() -> bool:
    """Whether the float32 kernels can run on this machine."""
    return isa() is not None


def clear_scratch() -> int:
    """Free the memory kept between steps; returns its size in bytes."""
    return _cpu.clear_scratch() if _cpu else 0


class WinogradLevel(torch.autograd.Function):
    """One tree level with its backward: one operator call in each direction.

    A backward for gradients of gradients holds the choices of ReLU and pool fixed.
    """

    @staticmethod
    def forward(
        ctx, x, skip, parents, branches, skip_rows, liveness, padding, pool, pool_pad, out_h, out_w,
        tile, relu, relu_after, branch_count, *parameters,
    ):  # fmt: skip
        weights, biases = list(parameters[:branch_count]), list(parameters[branch_count:])
        y, code = _level(
            x, weights, biases, parents, branches, skip, skip_rows, padding, pool, pool_pad, out_h,
            out_w, tile, relu, relu_after,
        )  # fmt: skip
        ctx.save_for_backward(x, skip, code, parents, branches, skip_rows, *parameters)
        ctx.liveness, ctx.branch_count = liveness, branch_count
        ctx.sizes = padding, pool, pool_pad, tile
        # without a pool and a ReLU behind the sum, every output passes its gradient on to its skip
        ctx.skip_passes = pool == 1 and not relu_after and skip_rows is None
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        return y, code

    @staticmethod
    def backward(ctx, dy, _):
        x, skip, code, parents, branches, skip_rows, *parameters = ctx.saved_tensors
        if dy is None:
            return (None,) * (15 + len(parameters))
        live = None if ctx.liveness is None else ctx.liveness.live
        rows = parents, branches
        if second_order.wanted() and len(parents):
            inputs = x, *parameters
            dx, *grads, dskip = WinogradLevel._plain_backward(
                ctx, dy, inputs, skip, code, rows, skip_rows, live
            )
            return dx, dskip, *(None,) * 13, *grads
        need_dx, need_dskip = ctx.needs_input_grad[:2]
        dy, weights = dy.contiguous(), parameters[: ctx.branch_count]
        need_dbiases = len(parameters) > len(weights)
        dx, dweights, dbiases = _level_backward(
            dy, x, code, weights, *rows, live, *ctx.sizes, need_dx, need_dbiases
        )
        dskip = None
        if need_dskip and ctx.skip_passes and live is None and dy.shape == skip.shape:
            dskip = dy
        elif need_dskip:
            skips, _, height, width, _ = skip.shape
            dskip = _skip_backward(dy, code, skip_rows, live, skips, height, width, *ctx.sizes[1:3])
        return dx if need_dx else None, dskip, *(None,) * 13, *dweights, *dbiases

    @staticmethod
    def _plain_backward(ctx, dy, inputs, skip, code, rows, skip_rows, live):
        padding, pool, pool_pad, _ = ctx.sizes

        def convolve(x, *parameters):
            weights, biases = parameters[: ctx.branch_count], parameters[ctx.branch_count :]
            images = x.flatten(0, 1).permute(0, 3, 1, 2)
            bias = torch.cat(biases) if biases else None
            return F.conv2d(images, torch.cat(weights), bias, padding=padding)

        level = second_order.Level(*rows, skip_rows, live, code, pool, pool_pad)
        needs_dx, needs_dskip, *needed = ctx.needs_input_grad
        needed = [needs_dx, *needed[13:], needs_dskip]
        return level.gradients(convolve, inputs, skip, needed, dy)


class ChannelsLastLinear(torch.autograd.Function):
    """A linear layer on channels-last images, with its backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if second_order.wanted():
            plain = lambda x, *layer: F.linear(x.transpose(1, 2).flatten(1), *layer)  # noqa: E731
            return tuple(second_order.gradients(plain, (x, weight, bias), ctx.needs_input_grad, dy))
        need_dx = ctx.needs_input_grad[0]
        dx, dweight, dbias = _linear_backward(dy.contiguous(), x, weight, need_dx)
        return dx if need_dx else None, dweight, dbias


class PosteriorHead(torch.autograd.Function):
    """The posterior head; the posterior is constant in the gradient of ``loss``."""

    @staticmethod
    def forward(ctx, logits, labels, log_prior, likelihood, nll_grad):
        log_likelihood, posterior, nll, loss, residual = _posterior_head(
            logits.contiguous(), labels.contiguous(), log_prior.contiguous(), likelihood
        )
        ctx.save_for_backward(residual, logits, labels, posterior)
        ctx.mark_non_differentiable(log_likelihood, posterior, *([] if nll_grad else [nll]))
        ctx.set_materialize_grads(False)
        return log_likelihood, posterior, nll, loss

    @staticmethod
    def backward(ctx, _likelihood, _posterior, dnll, dloss):
        if dnll is None and dloss is None:
            return (None,) * 5
        residual, *inputs, posterior = ctx.saved_tensors
        weights = head_gradient.weights_of(posterior, dnll, dloss)
        if second_order.wanted():
            return head_gradient.of_logits(*inputs, weights), *(None,) * 4
        return _posterior_head_backward(residual, weights.contiguous()), *(None,) * 4


def _full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operators' rule under autocast: what came in lower precision is computed in float32."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    lower = (torch.bfloat16, torch.float16)
    return tuple(t.float() if t.dtype in lower else t for t in tensors)


def fewest_products(conv_size: tuple[int, int], filter_size: int) -> int:
    """The tile of a level where none is asked for: a fixed rule of its size.

    A tile of m x m outputs costs (m + R - 1)^2 products of a pixel's channels with a filter's,
    however much of it lies inside the image. The m that needs fewest for one image is taken, the
    smaller of two that need as many because it rounds less: 4 for large images and those of 4, 7
    or 8 pixels, 3 for 3, 5, 6 or 9, 2 for 2. There the tile is the image: with padding 1 all
    that it would read beside the pixels is zero, and 9 products are left of 16.

    Args:
        conv_size: height and width of the convolution's outputs.
        filter_size: R, 3 or 5.
    """
    if filter_size == 5:
        return 2
    height, width = conv_size
    products = {}
    for m in (2, 3, 4):
        products[m] = -(-height // m) * -(-width // m) * (m + filter_size - 1) ** 2
    return min(products, key=products.__getitem__)


def winograd_level(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    parents: Tensor,
    branches: Tensor,
    padding: int,
    pool: int = 1,
    pool_pad: int = 0,
    out_size: tuple[int, int] | None = None,
    tile: int | None = None,
    relu: bool = True,
    skip: Tensor | None = None,
    skip_rows: Tensor | None = None,
    relu_after: bool = False,
    liveness: Liveness | None = None,
) -> Tensor:
    """One level: ``max_pool2d(relu(conv2d(x, weight, bias)))`` of a list of rows.

    With a skip, ``max_pool2d(relu_after(relu(conv2d(x, weight, bias)) + skip[skip_rows]))``; either
    ReLU may be there or not.

    Row r is parent ``parents[r]`` through branch ``branches[r]``: its weight is
    ``weights[branches[r]]``, its bias likewise. Any pairs in any order will do:
    a parent is read once however many rows come from it, and not at all if none does, so that it
    may then hold anything. What no row uses has gradient 0.

    Args:
        x: ``[P, N, H, W, C]``, contiguous, float32 (float64: slow, for tests).
        weights: of every branch ``[Co, C, R, R]`` with R = 3 or 5, contiguous, of ``x``'s dtype.
        biases: of every branch ``[Co]``, likewise; none at all: zeros.
        parents: int64 ``[R]`` on the CPU, rows of ``x``.
        branches: int64 ``[R]`` on the CPU, of ``weights``; no (parent, branch) pair twice.
        padding: of the convolution, 0 to R - 1; its stride is 1.
        pool: window and stride of the pool, 1 (none), 2 or 3.
        pool_pad: padding before the first window, at most ``pool // 2``; never wins.
        out_size: ``(out_h, out_w)``; windows are clipped at the border, so floor and ceil mode are
            both a choice of it. ``None`` is floor mode.
        tile: ``m`` of Winograd F(m x m, R x R), larger being faster and rounding more. For R = 3:
            2, 3 or 4; 2 stands for nine products where the padding is 1 and the images are at most
            2 x 2; 1 is the direct algorithm, which up to 4 input channels is always used. For
            R = 5: 2. ``None``: the rule of :func:`fewest_products`.
        relu: whether a ReLU follows the convolution.
        skip: ``[S, N, conv_h, conv_w, Co]``, added to the convolution's outputs, behind its ReLU.
        skip_rows: int64 ``[R]`` on the CPU, the row of ``skip`` of each row; rows may share one.
            ``None``: every row has its own, in order.
        relu_after: whether a ReLU follows the sum.
        liveness: its ``live``, as it is when the backward runs, names the rows that count there:
            neither the gradient of another row nor a parent that only such rows use is read.
            ``None``: all rows.

    Returns:
        ``[R, N, out_h, out_w, Co]``: the next level's ``x``.

    Raises:
        RuntimeError: a shape, dtype or size that does not fit, naming the argument.
    """
    x, *parameters = _full_precision(x, *weights, *biases)
    if skip is not None:
        (skip,) = _full_precision(skip)
    filter_size = weights[0].shape[-1]
    conv_size = tuple(n + 2 * padding - filter_size + 1 for n in x.shape[2:4])
    if out_size is None:
        out_size = tuple((n + 2 * pool_pad - pool) // pool + 1 for n in conv_size)
    if tile is None:
        tile = fewest_products(conv_size, filter_size)
    if skip_rows is not None:
        skip_rows = skip_rows.contiguous()
    return WinogradLevel.apply(
        x, skip, parents.contiguous(), branches.contiguous(), skip_rows, liveness, padding, pool,
        pool_pad, *out_size, tile, relu, relu_after, len(weights), *parameters,
    )[0]  # fmt: skip


def channels_last_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(flatten(images), weight, bias)`` of channels-first images, held channels last.

    A row whose gradient is exactly zero takes no part in the gradients of weight and bias, so that
    its ``x`` may be inf or NaN.

    Args:
        x: ``[R, S, C]``, the S pixels of R images, contiguous, float32 (float64: slow, for tests).
        weight: ``[K, C * S]``, features in the order of ``[C, S]``, as behind ``nn.Flatten``.
        bias: ``[K]``.

    Returns:
        ``[R, K]``.

    Raises:
        RuntimeError: a shape, dtype or size that does not fit, naming the argument.
    """
    return ChannelsLastLinear.apply(*_full_precision(x, weight, bias))


def posterior_head(
    logits: Tensor,
    labels: Tensor,
    log_prior: Tensor,
    *,
    mean_likelihood: bool = False,
    nll_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior of every configuration, and the loss whose gradient it weights.

    Args:
        logits: ``[configurations, N, K]``, float32 or float64.
        labels: ``[N]``, int64, in ``[0, K)``.
        log_prior: ``[configurations]``, float32 or float64; ``-inf`` excludes a configuration.
        mean_likelihood: ``L_c = log mean_i p_i`` instead of the joint ``sum_i log p_i``.
        nll_grad: whether ``nll`` has a gradient too, for a loss with other weights.

    Returns:
        ``log_likelihood``, ``posterior``, ``nll`` (``[configurations]`` each) and ``loss``, the sum
        of ``posterior * nll``. A configuration whose ``nll`` is not finite has log-likelihood
        ``-inf``, nll ``inf``, posterior 0 and no gradient; then, and with a log-prior that is NaN
        or +inf, ``loss`` is NaN.

    Raises:
        RuntimeError: a shape or dtype that does not fit, or a label out of range.
    """
    (logits,) = _full_precision(logits)
    return PosteriorHead.apply(logits, labels, log_prior, int(mean_likelihood), nll_grad)
