// The operators, as registered. Schemas, fakes and autograd are in Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "stable_torch.h"

namespace lasem_fast {

using torch::stable::Tensor;

// Makes levels go "by block" or "by panel" where they can, for tests; "" goes back to the rule of
// their shape. False: no such name.
bool force_schedule(const std::string& name);

std::tuple<Tensor, Tensor> winograd_level(const Tensor& x, const std::vector<Tensor>& weights,
                                          const std::vector<Tensor>& biases, const Tensor& parents,
                                          const Tensor& branches, const std::optional<Tensor>& skip,
                                          const std::optional<Tensor>& skip_rows, int64_t padding,
                                          int64_t pool, int64_t pool_pad, int64_t out_h,
                                          int64_t out_w, int64_t tile, bool relu, bool relu_after);

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> winograd_level_backward(
    const Tensor& dy, const Tensor& x, const Tensor& code, const std::vector<Tensor>& weights,
    const Tensor& parents, const Tensor& branches, const std::optional<Tensor>& live,
    int64_t padding, int64_t pool, int64_t pool_pad, int64_t tile, bool need_dx, bool need_dbiases);

Tensor winograd_level_skip_backward(const Tensor& dy, const Tensor& code,
                                    const std::optional<Tensor>& skip_rows,
                                    const std::optional<Tensor>& live, int64_t skips,
                                    int64_t conv_h, int64_t conv_w, int64_t pool, int64_t pool_pad);

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_level(
    const Tensor& y, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const Tensor& branches, const std::optional<Tensor>& skip,
    const std::optional<Tensor>& skip_rows, double eps, int64_t pool, int64_t pool_pad,
    int64_t out_h, int64_t out_w, bool relu, bool relu_after);

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> norm_level_backward(
    const Tensor& dout, const Tensor& y, const Tensor& code, const Tensor& mean, const Tensor& var,
    const std::vector<Tensor>& weights, const Tensor& branches, const std::optional<Tensor>& live,
    double eps, int64_t pool, int64_t pool_pad);

Tensor channels_last_linear(const Tensor& x, const Tensor& weight, const Tensor& bias);

std::tuple<Tensor, Tensor, Tensor> channels_last_linear_backward(const Tensor& dy, const Tensor& x,
                                                                 const Tensor& weight,
                                                                 bool need_dx);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> posterior_head(const Tensor& logits,
                                                                  const Tensor& labels,
                                                                  const Tensor& log_prior,
                                                                  int64_t likelihood);

Tensor posterior_head_backward(const Tensor& residual, const Tensor& weights);

}  // namespace lasem_fast
