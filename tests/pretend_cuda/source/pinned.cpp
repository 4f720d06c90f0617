// Pinned DRAM: torch's allocator of it, and what the program registers by itself.
#include "device.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/util/llvmMathExtras.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pretend {

namespace {

constexpr size_t kPage = 4096;
constexpr int kPoison = 0xFF;

struct Pinned {
  std::map<uintptr_t, size_t> ranges;
  int64_t now = 0, peak = 0;
};
Pinned& pinned() {
  static auto* made = new Pinned();
  return *made;
}

void free_pinned(void* address) {
  if (!address) return;
  unpin(reinterpret_cast<uintptr_t>(address), false);
  ::free(address);
}

// As torch's own takes it, so that it is found again for others: ATen/core/CachingHostAllocator.h.
struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (!nbytes) return {nullptr, nullptr, &free_pinned, c10::kCPU};
    auto taken = c10::llvm::PowerOf2Ceil(nbytes);
    auto address = ::aligned_alloc(kPage, std::max(kPage, taken));
    TORCH_CHECK(address, "this machine has no memory to pin");
    ::memset(address, kPoison, nbytes);
    pin(reinterpret_cast<uintptr_t>(address), taken, false);
    return {address, address, &free_pinned, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, size_t count) const override { ::memcpy(target, source, count); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

void check_unused(const Block& block) {
  for (auto& one : block.accesses) {
    if (is_before(one.stream, one.at, kHost)) continue;
    report("pinned", "DRAM is unregistered (" + std::to_string(block.nbytes) + " bytes) while " + one.what + " on " +
                         name_of(one.stream) + " may be under way");
    return;
  }
}

}  // namespace

at::HostAllocator* pinned_allocator() {
  static auto* made = new PinnedAllocator();
  return made;
}

void pin(uintptr_t address, size_t nbytes, bool by_hand) {
  Lock lock;
  // On the device that the calling thread has, as any call of the runtime: the first, unless the thread was told. torch's
  // own allocator looks for a device that has a context before.
  if (by_hand || contexts().empty()) open_context(current_device(), by_hand ? "cudaHostRegister" : "pin_memory");
  pinned().ranges[address] = nbytes;
  blocks()[address] = Block{nbytes, -1, 0, {}, {}};
  pinned().now += static_cast<int64_t>(nbytes);
  pinned().peak = std::max(pinned().peak, pinned().now);
}

void unpin(uintptr_t address, bool by_hand) {
  Lock lock;
  auto block = blocks().find(address);
  if (block != blocks().end()) {
    // torch's own allocator keeps it for the copies that it knows of; what the program registers nobody keeps.
    if (by_hand) check_unused(block->second);
    for (auto& one : block->second.accesses) flush(one.stream);
    blocks().erase(block);
  }
  auto range = pinned().ranges.find(address);
  if (range == pinned().ranges.end()) return;
  pinned().now -= static_cast<int64_t>(range->second);
  pinned().ranges.erase(range);
}

bool is_pinned(const void* data) {
  Lock lock;
  auto address = reinterpret_cast<uintptr_t>(data);
  auto found = pinned().ranges.upper_bound(address);
  if (found == pinned().ranges.begin()) return false;
  --found;
  return address < found->first + found->second;
}

std::pair<int64_t, int64_t> pinned_bytes() {
  Lock lock;
  return {pinned().now, pinned().peak};
}

void reset_pinned_peak() {
  Lock lock;
  pinned().peak = pinned().now;
}

}  // namespace pretend
