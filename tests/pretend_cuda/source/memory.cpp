// Memory of the device: counted and limited, kept for its stream when freed, poisoned, and who accesses it noted.
#include "device.h"

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pretend {

namespace {

constexpr size_t kPage = 4096, kRound = 512;
constexpr int kPoison = 0xFF;

// Freed blocks by stream and size: what was freed last is given out first.
std::map<std::pair<int, size_t>, std::vector<uintptr_t>>& pool() {
  static auto* made = new std::map<std::pair<int, size_t>, std::vector<uintptr_t>>();
  return *made;
}

std::map<int, std::string>& opened() {
  static auto* made = new std::map<int, std::string>();
  return *made;
}

size_t rounded(size_t nbytes, size_t to) { return (std::max<size_t>(nbytes, 1) + to - 1) / to * to; }

std::pair<uintptr_t, uintptr_t> extent(const at::Tensor& t) {
  auto low = reinterpret_cast<uintptr_t>(t.storage().data()) + t.storage_offset() * t.itemsize();
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
  return {low, low + (last + 1) * t.itemsize()};
}

void check_reuse(const Block& block, int key, size_t nbytes) {
  for (auto& one : block.accesses) {
    bool told = std::find(block.recorded.begin(), block.recorded.end(), one.stream) != block.recorded.end();
    if (one.stream == key || told || is_before(one.stream, one.at, key) || is_before(one.stream, one.at, kHost)) continue;
    report("reuse", "memory that " + one.what + " uses on " + name_of(one.stream) + " is given out again on " + name_of(key) +
                        ", which has not waited for it, nor was it told of by record_stream (" + std::to_string(nbytes) +
                        " bytes)");
  }
}

uintptr_t map_memory(size_t size, c10::DeviceIndex device) {
  auto& own = stats(device);
  auto wanted = static_cast<int64_t>(size), total = own.limit - kContextBytes;
  if (own.reserved + wanted > total) empty_cache(device);
  if (own.reserved + wanted > total)
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size >> 20, " MiB. GPU ",
                     static_cast<int>(device), " has a total capacity of ", own.limit >> 20, " MiB of which ",
                     (total - own.reserved) >> 20, " MiB is free (pretended).");
  auto mapped = ::mmap(nullptr, rounded(size, kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(mapped != MAP_FAILED, "this machine has no memory for the pretended device");
  ::memset(mapped, kPoison, size);
  own.reserved += wanted;
  own.peak_reserved = std::max(own.peak_reserved, own.reserved);
  return reinterpret_cast<uintptr_t>(mapped);
}

uintptr_t take(size_t nbytes, c10::DeviceIndex device) {
  Lock lock;
  open_context(device, "an allocation");
  auto size = rounded(nbytes, kRound);
  int key = current_key(device);
  auto& held = pool()[{key, size}];
  uintptr_t address = 0;
  if (held.empty()) {
    address = map_memory(size, device);
  } else {
    address = held.back();
    held.pop_back();
    check_reuse(blocks()[address], key, nbytes);
  }
  blocks()[address] = Block{size, device, key, {}, {}};
  auto& own = stats(device);
  own.allocated += static_cast<int64_t>(size);
  own.peak = std::max(own.peak, own.allocated);
  own.allocations++;
  return address;
}

void give_back(void* pointer) {
  Lock lock;
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto found = blocks().find(address);
  if (found == blocks().end()) return;
  auto& block = found->second;
  // What was told of is over before it is given out again; what its own stream was given comes before anyway.
  for (int key : block.recorded) flush(key);
  stats(block.device).allocated -= static_cast<int64_t>(block.nbytes);
  submit(block.stream, [pointer, nbytes = block.nbytes] { ::memset(pointer, kPoison, nbytes); });
  pool()[{block.stream, block.nbytes}].push_back(address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    c10::Device where(c10::kCUDA, current_device());
    if (!nbytes) return {nullptr, nullptr, &give_back, where};
    auto address = reinterpret_cast<void*>(take(nbytes, where.index()));
    return {address, address, &give_back, where};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* target, const void* source, size_t count) const override { ::memcpy(target, source, count); }
};

}  // namespace

std::map<uintptr_t, Block>& blocks() {
  static auto* made = new std::map<uintptr_t, Block>();
  return *made;
}

Stats& stats(int device) {
  static auto* made = new std::array<Stats, kDevices>();
  TORCH_CHECK(device >= 0 && device < kDevices, "CUDA error: invalid device ordinal");
  return (*made)[device];
}

std::map<int, std::string> contexts() {
  Lock lock;
  return opened();
}

void open_context(int device, const char* what) {
  if (!opened().emplace(device, what).second) return;
  const char* rank = std::getenv("LOCAL_RANK");
  if (rank && std::atoi(rank) != device && std::atoi(rank) < device_count())
    report("context", "rank " + std::string(rank) + " of this machine opens a context on cuda:" + std::to_string(device) +
                          " by " + what);
}

Block* block_at(uintptr_t address) {
  auto found = blocks().upper_bound(address);
  if (found == blocks().begin()) return nullptr;
  --found;
  return address < found->first + std::max<size_t>(found->second.nbytes, 1) ? &found->second : nullptr;
}

void note(const std::string& what, int key, const at::Tensor& tensor, bool write) {
  if (!tensor.defined() || !tensor.has_storage() || !tensor.numel()) return;
  auto [low, high] = extent(tensor);
  auto* block = block_at(low);
  if (!block) return;
  std::vector<Access> kept;
  for (auto& one : block->accesses) {
    bool overlaps = one.low < high && low < one.high;
    bool before = one.stream == key || is_before(one.stream, one.at, key);
    if (overlaps && !before && (write || one.write))
      report("race", what + (write ? " writes" : " reads") + " on " + name_of(key) + " what " + one.what +
                         (one.write ? " writes" : " reads") + " on " + name_of(one.stream) + ", without waiting for it (" +
                         (block->device < 0 ? "pinned DRAM" : "device memory") + ", " + std::to_string(high - low) + " bytes)");
    bool superseded = before && low <= one.low && one.high <= high && (write || (!one.write && one.stream == key));
    if (!superseded) kept.push_back(one);
  }
  kept.push_back({low, high, write, key, now(key), what});
  block->accesses = std::move(kept);
}

void record_stream(const void* data, int key) {
  Lock lock;
  auto* block = block_at(reinterpret_cast<uintptr_t>(data));
  if (block && key != block->stream) block->recorded.push_back(key);
}

void empty_cache(c10::DeviceIndex device) {
  Lock lock;
  flush_device(device);
  for (auto& [key, held] : pool()) {
    auto& [stream, size] = key;
    if (device_of(stream) != device) continue;
    for (auto address : held) {
      ::munmap(reinterpret_cast<void*>(address), rounded(size, kPage));
      blocks().erase(address);
      stats(device).reserved -= static_cast<int64_t>(size);
    }
    held.clear();
  }
}

c10::Allocator* device_allocator() {
  static auto* made = new DeviceAllocator();
  return made;
}

}  // namespace pretend
