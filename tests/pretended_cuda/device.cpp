// CUDA devices made of host memory, for a torch without CUDA, whose dispatch key CUDA is empty.
//
// A tensor says that it is on cuda:k and has memory of its own. Its operators are computed by
// torch's CPU kernels, on copies. As on a GPU: an operator refuses tensors of different devices,
// memory is counted, an index out of range breaks the devices for the rest of the process. What is
// launched, and what the host waits for, is counted by name.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <string>

#include "gpu_only.h"
#include "state.h"

namespace {

using c10::Stream;

// ---- what torch asks a device for ---------------------------------------------------------------

DeviceIndex exchange_device(DeviceIndex index) { return std::exchange(current, index); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override {
    if (device.has_index()) current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, device);
  }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(devices); }
  // Autograd records and awaits events; everything here is done when a call returns.
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return devices > 0; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return devices > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return devices; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(devices); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange_device(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current : exchange_device(index);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  std::string showConfig() const override { return "pretended CUDA"; }
  void deviceSynchronize(DeviceIndex) const override {
    require_healthy();
    wait_for("synchronize");
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks);  // the name that torch asks for

}  // namespace at

// ---- operators ----------------------------------------------------------------------------------

namespace {

c10::DeviceGuard on(std::optional<Device> device) {
  return c10::DeviceGuard(device && device->has_index() ? *device
                                                        : Device(DeviceType::CUDA, current));
}

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  auto guard = on(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, KEYS,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  auto guard = on(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &device_memory, KEYS,
                                           c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size,
                      std::optional<at::MemoryFormat>) {
  auto guard = on(self.device());
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), {});
  return self;
}

// A copy between host and device makes the host wait, unless it may be asynchronous and can be:
// to the host only into pinned memory.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  require_healthy();
  bool to_host = self.is_cpu(), from_host = source.is_cpu();
  std::string name = to_host                             ? "copy to the host"
                     : from_host                         ? "copy from the host"
                     : self.dtype() == source.dtype()    ? "copy"
                                                         : "cast";
  if (self.numel() > 0) {
    count(launches, name);
    bool asynchronous = non_blocking && (from_host || is_pinned(self.const_data_ptr()));
    if ((to_host || from_host) && !asynchronous) wait_for("blocking " + name);
  }
  Computing guard;
  on_host(self).copy_(on_host(source));
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, source, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& to) {
  if (source.sizes() != to.sizes()) to.resize_(source.sizes());
  return copy_from(source, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  require_healthy();
  wait_for("item");
  Computing guard;
  return on_host(self).item();
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  std::optional<int64_t> first;
  if (offset) first = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), first);
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

// Operators whose result has a shape that depends on values, or that returns to the host.
const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::equal",   "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
// Operators that read at the places that a tensor says: on a GPU an assertion in the kernel.
const std::set<std::string> INDEXING = {
    "aten::embedding", "aten::embedding_dense_backward", "aten::index", "aten::_index_put_impl_",
    "aten::index_add", "aten::index_select", "aten::gather", "aten::scatter", "aten::scatter_add",
    "aten::nll_loss_forward"};

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  require_healthy();
  require_one_device(name, torch::jit::last(*stack, op.schema().arguments().size()));
  count(launches, name);
  if (WAITING.contains(name)) wait_for(name);
  Computing guard;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (const c10::IndexError&) {
    if (!INDEXING.contains(name) && !INDEXING.contains(name.substr(0, name.size() - 1))) throw;
    broken = true;
    fail_as_broken();
  }
}

torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<&compute_on_host>();
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  for (const char* name : {"mm.dtype", "bmm.dtype"}) m.impl(name, &mm);
  for (const char* name : {"mm.dtype_out", "bmm.dtype_out"}) m.impl(name, &mm_out);
  for (const char* name : {"addmm.dtype", "baddbmm.dtype"}) m.impl(name, &addmm);
  for (const char* name : {"addmm.dtype_out", "baddbmm.dtype_out"}) m.impl(name, &addmm_out);
  m.impl("_fused_rms_norm", &rms_norm);
  m.impl("_fused_rms_norm_backward", &rms_norm_backward);
  // One launch each on a GPU. Without this, torch would look for cuDNN, and take lists apart.
  m.impl("convolution", boxed());
  m.impl("convolution_backward", boxed());
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.starts_with("aten::_foreach_")) m.impl(c10::toString(name).c_str(), boxed());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed()); }

// ---- for Python ---------------------------------------------------------------------------------

c10::Dict<std::string, int64_t> taken(Counts& counts) {
  std::lock_guard<std::mutex> lock(counting);
  c10::Dict<std::string, int64_t> found;
  for (const auto& [name, number] : counts) found.insert(name, number);
  counts.clear();
  return found;
}

TORCH_LIBRARY(pretended_cuda, m) {
  m.def("set_device_count", [](int64_t number) { devices = static_cast<int>(number); });
  m.def("current_device", []() -> int64_t { return current; });
  m.def("exchange_device", [](int64_t index) -> int64_t {
    TORCH_CHECK(index < devices, "CUDA error: invalid device ordinal (pretended): ", index);
    return index < 0 ? current : exchange_device(static_cast<DeviceIndex>(index));
  });
  // The counts since the last call.
  m.def("launches", []() { return taken(launches); });
  m.def("waits", []() { return taken(waits); });
  m.def("pause", [](bool on) -> bool { return paused.exchange(on); });
  m.def("wait_for", [](std::string name) {
    require_healthy();
    wait_for(name);
  });
  m.def("refuse_waits", [](bool on) { waits_refused = on; });
  m.def("allocated", [](int64_t device) -> int64_t { return used.at(device).now; });
  m.def("peak_allocated", [](int64_t device) -> int64_t { return used.at(device).peak; });
  m.def("reset_peak", [](int64_t device) { used.at(device).peak = used.at(device).now.load(); });
  m.def("pinned", []() -> int64_t { return pinned.now; });
  m.def("peak_pinned", []() -> int64_t { return pinned.peak; });
}

}  // namespace
