// Operators that torch has for GPUs alone, in its CPU operators: products of bf16 or fp16 factors
// with an fp32 result, and the RMS norm as one operator.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>

#include <array>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "state.h"

namespace {

using at::Tensor;

// The same memory as a tensor of the host.
Tensor on_host(const Tensor& t) {
  if (t.is_cpu()) return t;
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(),
                       t.options().device(at::kCPU));
}

// A CPU tensor without dimensions is allowed among the others: it stands for a number.
void require_one_device(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  std::optional<Device> device;
  auto look = [&](const Tensor& t) {
    if (!t.defined() || (t.is_cpu() && t.dim() == 0)) return;
    TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, ",
                "but found at least two devices, ", *device, " and ", t.device(), " (", name, ")");
    device = t.device();
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) look(t);
    } else if (value.isOptionalTensorList()) {
      for (const auto& t : value.toOptionalTensorVector())
        if (t) look(*t);
    }
  }
}

Tensor product(const char* name, const Tensor& a, const Tensor& b, at::ScalarType type,
               const Tensor& self = {}) {
  require_healthy();
  require_one_device(name, {a, b, self});
  bool half = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), name, ": the factors differ in type");
  TORCH_CHECK(type == a.scalar_type() || (half && type == at::kFloat), name,
              ": out_dtype must be that of the factors, or fp32 for bf16 and fp16");
  TORCH_CHECK(!self.defined() || self.scalar_type() == type ||
                  self.scalar_type() == a.scalar_type(),
              name, ": the type of self must be out_dtype or that of the factors");
  count(launches, name);
  Computing guard;
  return at::matmul(on_host(a).to(type), on_host(b).to(type));
}

Tensor& write(Tensor& out, const Tensor& result) {
  TORCH_CHECK(out.scalar_type() == result.scalar_type(), "out_dtype must be the type of out");
  TORCH_CHECK(out.sizes() == result.sizes(), "out has another shape than the result");
  Computing guard;
  on_host(out).copy_(result);
  return out;
}

Tensor on_device(const Tensor& result, const Tensor& like) {
  Tensor out = at::empty(result.sizes(), like.options().dtype(result.scalar_type()));
  return write(out, result);
}

Tensor mm(const Tensor& a, const Tensor& b, at::ScalarType type) {
  return on_device(product("aten::mm.dtype", a, b, type), a);
}

Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  return write(out, product("aten::mm.dtype", a, b, type));
}

Tensor sum_with(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType type,
                const at::Scalar& beta, const at::Scalar& alpha) {
  Tensor result = product("aten::addmm.dtype", a, b, type, self);
  Computing guard;
  if (!alpha.equal(1)) result = result.mul(alpha);
  // With beta 0 not even a NaN of self counts.
  return beta.equal(0) ? result : result.add(on_host(self).to(type), beta);
}

Tensor addmm(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType type,
             const at::Scalar& beta, const at::Scalar& alpha) {
  return on_device(sum_with(self, a, b, type, beta, alpha), a);
}

Tensor& addmm_out(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType type,
                  const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  return write(out, sum_with(self, a, b, type, beta, alpha));
}

// Zhang & Sennrich (2019): y = x r w with r = 1 / sqrt(mean(x^2) + eps), over the last dimensions.
struct Norm {
  std::vector<int64_t> inner, outer;  // dimensions that are normalised, and the others

  Norm(const Tensor& input, at::IntArrayRef shape) : inner(shape.size()), outer() {
    std::iota(inner.begin(), inner.end(), input.dim() - static_cast<int64_t>(shape.size()));
    outer.resize(input.dim() - shape.size());
    std::iota(outer.begin(), outer.end(), 0);
  }
};

Tensor wide(const Tensor& t) {
  Tensor host = on_host(t);
  return host.scalar_type() == at::kDouble ? host : host.to(at::kFloat);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, at::IntArrayRef shape,
                                    const std::optional<Tensor>& weight,
                                    std::optional<double> eps) {
  require_healthy();
  require_one_device("aten::_fused_rms_norm", {input, weight});
  count(launches, "aten::_fused_rms_norm");
  Tensor y, r;
  {
    Computing guard;
    Tensor x = wide(input);
    double epsilon = eps ? *eps : std::numeric_limits<float>::epsilon();
    r = x.square().mean(Norm(input, shape).inner, true).add(epsilon).rsqrt();
    y = x.mul(r);
    if (weight && weight->defined()) y = y.mul(wide(*weight));
    y = y.to(input.scalar_type());
  }
  return {on_device(y, input), on_device(r, input)};
}

// With g the gradient of y: dx = r (g w - x r^2 mean(g w x)), dw = sum of g x r.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input,
                                             at::IntArrayRef shape, const Tensor& rstd,
                                             const std::optional<Tensor>& weight,
                                             std::array<bool, 2> wanted) {
  require_healthy();
  require_one_device("aten::_fused_rms_norm_backward", {grad, input, rstd, weight});
  count(launches, "aten::_fused_rms_norm_backward");
  Tensor grad_input, grad_weight;
  {
    Computing guard;
    Norm norm(input, shape);
    Tensor x = wide(input), g = wide(grad), r = wide(rstd);
    Tensor scaled = weight && weight->defined() ? g.mul(wide(*weight)) : g;
    Tensor mean = scaled.mul(x).mean(norm.inner, true);
    grad_input = scaled.sub(x.mul(r.square()).mul(mean)).mul(r).to(input.scalar_type());
    grad_weight = g.mul(x).mul(r).sum(norm.outer);
    if (weight && weight->defined()) grad_weight = grad_weight.to(weight->scalar_type());
  }
  return {wanted[0] ? on_device(grad_input, input) : Tensor(),
          wanted[1] ? on_device(grad_weight, input) : Tensor()};
}

}  // namespace
