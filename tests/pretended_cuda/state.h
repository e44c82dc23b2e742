// What the pretended devices keep: counts, memory, and whether an error has broken them.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType;
using Counts = std::map<std::string, int64_t>;

constexpr int MOST_DEVICES = 64;
constexpr size_t ALIGNMENT = 64;  // as torch's CPU allocator, since a kernel may choose by it

std::atomic<int> devices{1};
thread_local DeviceIndex current = 0;

// ---- what a GPU would launch, and what the host would wait for ----------------------------------

std::mutex counting;
Counts launches, waits;
std::atomic<bool> paused{false};         // nothing is counted
std::atomic<bool> waits_refused{false};  // as after torch.cuda.set_sync_debug_mode("error")
std::atomic<bool> broken{false};
thread_local bool computing = false;  // in a CPU kernel: copies are this file's, not the program's

void count(Counts& counts, const std::string& name) {
  if (paused || computing) return;
  std::lock_guard<std::mutex> lock(counting);
  ++counts[name];
}

void wait_for(const std::string& name) {
  TORCH_CHECK(computing || paused || !waits_refused, "called a synchronizing CUDA operation: ",
              name);
  count(waits, name);
}

[[noreturn]] void fail_as_broken() {
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 710,
                              "CUDA error: device-side assert triggered (pretended)");
}

void require_healthy() {
  if (broken) fail_as_broken();
}

struct Computing {
  bool before = std::exchange(computing, true);
  ~Computing() { computing = before; }
};

// ---- memory -------------------------------------------------------------------------------------

struct Usage {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    int64_t used = now += bytes, known = peak;
    while (used > known && !peak.compare_exchange_weak(known, used)) {
    }
  }
};
std::array<Usage, MOST_DEVICES> used;
Usage pinned;
std::mutex pinning;
std::map<const char*, size_t> pinned_blocks;  // size by first byte

void* host_memory(size_t size) {
  void* data = std::aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  TORCH_CHECK(data, "CUDA out of memory (pretended): ", size, " bytes");
  return data;
}

struct DeviceBlock {
  void* data;
  int64_t size;
  DeviceIndex device;
  static void free(void* block) {
    auto* self = static_cast<DeviceBlock*>(block);
    used[self->device].now -= self->size;
    std::free(self->data);
    delete self;
  }
};

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    Device device(DeviceType::CUDA, current);
    if (size == 0) return {nullptr, device};
    auto* block = new DeviceBlock{host_memory(size), static_cast<int64_t>(size), current};
    used[current].add(block->size);
    return {block->data, block, &DeviceBlock::free, device};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
} device_memory;

// torch rounds pinned blocks up to a power of two.
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, Device(DeviceType::CPU)};
    auto* data = static_cast<char*>(host_memory(std::bit_ceil(size)));
    std::lock_guard<std::mutex> lock(pinning);
    pinned_blocks[data] = std::bit_ceil(size);
    pinned.add(static_cast<int64_t>(std::bit_ceil(size)));
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data) {
    std::lock_guard<std::mutex> lock(pinning);
    auto block = pinned_blocks.find(static_cast<char*>(data));
    pinned.now -= static_cast<int64_t>(block->second);
    pinned_blocks.erase(block);
    std::free(data);
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
} pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinning);
  auto after = pinned_blocks.upper_bound(static_cast<const char*>(data));
  if (after == pinned_blocks.begin()) return false;
  auto [first, size] = *std::prev(after);
  return static_cast<const char*>(data) < first + size;
}

}  // namespace
