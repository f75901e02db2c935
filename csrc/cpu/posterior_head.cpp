// Logits and labels of every configuration -> likelihoods, posterior, loss and residuals; those and
// a weight for each configuration -> d(logits).

#include <cmath>
#include <limits>
#include <memory>

#include "checks.h"
#include "ops.h"
#include "stable_torch.h"
#include "subnormals.h"

namespace lasem_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr double kInf = std::numeric_limits<double>::infinity();

// log sum exp without overflow; -inf of nothing or of all -inf.
double log_sum_exp(const double* v, int64_t n) {
  double top = -kInf;
  for (int64_t i = 0; i < n; ++i) top = std::fmax(top, v[i]);
  if (top == -kInf) return -kInf;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(v[i] - top);
  return top + std::log(sum);
}

// One row: writes softmax - onehot, returns log p(label). Any NaN or +inf logit gives NaN, and so
// does a label that is none: where nobody may look at values, the loss has to show it.
template <class T>
double softmax_row(const T* logits, int64_t classes, int64_t label, T* residual) {
  double top = -kInf;
  for (int64_t k = 0; k < classes; ++k) top = std::fmax(top, static_cast<double>(logits[k]));
  double sum = 0;
  for (int64_t k = 0; k < classes; ++k) sum += std::exp(static_cast<double>(logits[k]) - top);
  for (int64_t k = 0; k < classes; ++k) {
    const double p = std::exp(static_cast<double>(logits[k]) - top) / sum;
    residual[k] = static_cast<T>(k == label ? p - 1 : p);
  }
  if (label < 0 || label >= classes) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(logits[label]) - top - std::log(sum);
}

double prior_at(const Tensor& prior, int64_t c) {
  return prior.scalar_type() == ScalarType::Double ? prior.const_data_ptr<double>()[c]
                                                   : prior.const_data_ptr<float>()[c];
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run(const Tensor& logits, const Tensor& labels,
                                                       const Tensor& log_prior, bool mean) {
  const int64_t configs = logits.size(0), samples = logits.size(1), classes = logits.size(2);
  const int64_t size[] = {configs};
  Tensor likelihood_out = torch::stable::new_empty(logits, {size, 1});
  Tensor posterior_out = torch::stable::new_empty(logits, {size, 1});
  Tensor nll_out = torch::stable::new_empty(logits, {size, 1});
  Tensor loss_out =
      torch::stable::new_empty(logits, torch::headeronly::IntHeaderOnlyArrayRef(size, size_t{0}));
  Tensor residual_out = torch::stable::empty_like(logits);
  const T* in = logits.const_data_ptr<T>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  T* residual = residual_out.mutable_data_ptr<T>();

  const auto log_p = std::make_unique<double[]>(configs * samples);
  const auto score = std::make_unique<double[]>(configs);
  const auto likelihood = std::make_unique<double[]>(configs);
  const auto nll = std::make_unique<double[]>(configs);
  // About one microsecond of work for each thread that is woken.
  const int64_t grain = 1 + 200 / (1 + samples * classes);
  torch::stable::parallel_for(0, configs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double* row = log_p.get() + c * samples;
      double sum = 0;
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t at = (c * samples + i) * classes;
        row[i] = softmax_row(in + at, classes, label[i], residual + at);
        sum += row[i];
      }
      nll[c] = -sum / samples;
      const bool finite = std::isfinite(nll[c]);
      if (!finite) nll[c] = kInf;
      likelihood[c] = !finite ? -kInf
                      : mean  ? log_sum_exp(row, samples) - std::log(static_cast<double>(samples))
                              : sum;
      score[c] = finite ? prior_at(log_prior, c) + likelihood[c] : -kInf;
    }
  });

  const double norm = log_sum_exp(score.get(), configs);
  // With nothing left to weigh, a NaN loss shows it.
  double loss = norm == -kInf ? std::numeric_limits<double>::quiet_NaN() : 0;
  for (int64_t c = 0; c < configs; ++c) {
    const double posterior = norm == -kInf ? 0 : std::exp(score[c] - norm);
    const T rounded = static_cast<T>(posterior);
    likelihood_out.mutable_data_ptr<T>()[c] = static_cast<T>(likelihood[c]);
    nll_out.mutable_data_ptr<T>()[c] = static_cast<T>(nll[c]);
    posterior_out.mutable_data_ptr<T>()[c] = rounded;
    // NaN for one that overflowed (0 * inf): its gradient is 0, but its activations are in those of
    // the weights. Likewise for a prior of NaN or infinity.
    loss += posterior * nll[c];
  }
  *loss_out.mutable_data_ptr<T>() = static_cast<T>(loss);
  return {likelihood_out, posterior_out, nll_out, loss_out, residual_out};
}

template <class T>
Tensor scaled(const Tensor& residual, const Tensor& weights) {
  const int64_t configs = residual.size(0), samples = residual.size(1);
  const int64_t size = samples * residual.size(2);
  Tensor dlogits = torch::stable::empty_like(residual);
  const T* weight = weights.const_data_ptr<T>();
  const T* from = residual.const_data_ptr<T>();
  T* to = dlogits.mutable_data_ptr<T>();
  // About ten microseconds of work for each thread that is woken.
  const int64_t grain = 1 + (1 << 15) / size;
  torch::stable::parallel_for(0, configs, grain, [&](int64_t begin, int64_t end) {
    const SubnormalsAreZero scope;
    for (int64_t c = begin; c < end; ++c) {
      const double scale = static_cast<double>(weight[c]) / samples;
      // Written, not multiplied: 0 * NaN would be NaN.
      for (int64_t k = c * size; k < (c + 1) * size; ++k)
        to[k] = scale != 0 ? static_cast<T>(scale * from[k]) : T{0};
    }
  });
  return dlogits;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> posterior_head(const Tensor& logits,
                                                                  const Tensor& labels,
                                                                  const Tensor& log_prior,
                                                                  int64_t likelihood) {
  check_float(logits, "logits");
  check_float(log_prior, "log_prior");
  STD_TORCH_CHECK(logits.dim() == 3, "logits must have shape (configurations, N, K), got ",
                  logits.dim(), " dimensions");
  const int64_t configs = logits.size(0), samples = logits.size(1), classes = logits.size(2);
  STD_TORCH_CHECK(configs > 0 && samples > 0 && classes > 0, "logits must not be empty");
  check_tensor(logits, "logits", logits.scalar_type(), {configs, samples, classes});
  check_tensor(labels, "labels", ScalarType::Long, {samples});
  check_tensor(log_prior, "log_prior", log_prior.scalar_type(), {configs});
  STD_TORCH_CHECK(likelihood == 0 || likelihood == 1,
                  "likelihood must be 0 (joint) or 1 (mean), got ", likelihood);
  return logits.scalar_type() == ScalarType::Double
             ? run<double>(logits, labels, log_prior, likelihood == 1)
             : run<float>(logits, labels, log_prior, likelihood == 1);
}

Tensor posterior_head_backward(const Tensor& residual, const Tensor& weights) {
  check_float(residual, "residual");
  STD_TORCH_CHECK(residual.dim() == 3, "residual must have shape (configurations, N, K), got ",
                  residual.dim(), " dimensions");
  const int64_t configs = residual.size(0);
  STD_TORCH_CHECK(residual.numel() > 0, "residual must not be empty");
  check_tensor(residual, "residual", residual.scalar_type(),
               {configs, residual.size(1), residual.size(2)});
  check_tensor(weights, "weights", residual.scalar_type(), {configs});
  return residual.scalar_type() == ScalarType::Double ? scaled<double>(residual, weights)
                                                      : scaled<float>(residual, weights);
}

}  // namespace lasem_fast
