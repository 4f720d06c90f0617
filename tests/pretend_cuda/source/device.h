// A pretended CUDA device for CPU builds of torch: memory, streams and events of its own, kernels of the CPU.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace at {
struct HostAllocator;
}

namespace pretend {

constexpr int kDevices = 8;

// --- reports (reports.cpp)

// Held while anything of the device is read or changed, by one thread as often as it likes. What was reported under it
// is published when the outermost one ends, since that may take the GIL, which nobody may wait for who holds this.
class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
};

// Tell of something that a real device would not forgive; `kind` is a word. Under a Lock.
void report(const std::string& kind, const std::string& text);
// Also write reports into this file, one a line, those of forks of this process too; nowhere if empty.
void set_report_file(const std::string& path);
// What gives the place in the program that the calling thread is at, or nothing.
void set_call_site(std::function<std::string()> found);
std::vector<std::string> reports();
void count(const std::string& what, int64_t amount = 1);
std::map<std::string, int64_t> counts();
void clear_reports();

// --- streams, clocks (streams.cpp)

// Streams by number, of all devices; the host is one of them.
constexpr int kHost = -1;
// Of each stream, up to which of its actions all is known to be over.
using Clock = std::map<int, uint64_t>;

struct Event {
  Clock clock;
  int stream = 0;
  uint64_t upto = 0;
};

int stream_key(c10::DeviceIndex device, int64_t id);
int current_key(c10::DeviceIndex device);
c10::DeviceIndex device_of(int key);
std::string name_of(int key);
int64_t new_stream_id();
c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex device);
int64_t current_stream_id(c10::DeviceIndex device);
void set_current_stream_id(c10::DeviceIndex device, int64_t id);
int device_count();
void set_device_count(int count);
// Whether what is given to a stream is done as late as what waits for it allows.
bool late();
void set_late(bool value);

// The functions below are called under a Lock.

// The next action of a stream begins: it comes after all that the host has waited for.
void begin(int key);
// Give a stream its next task: done at once, after all before it, unless the device is late.
void submit(int key, std::function<void()> task);
// Do what the stream was given, up to its task of that number.
void flush(int key, uint64_t upto = UINT64_MAX);
void flush_device(c10::DeviceIndex device);
bool is_idle(int key);
bool is_over(const Event& event);
Event record(int key);
void stream_waits(int key, const Event& event);
void host_waits(const Event& event);
void host_waits_for_stream(int key);
void host_waits_for_device(c10::DeviceIndex device);
// Whether `action` of stream `key` is over for who has waited as `waiter` has.
bool is_before(int key, uint64_t action, int waiter);
uint64_t now(int key);

class OnDevice {
 public:
  explicit OnDevice(c10::DeviceIndex device) : before_(current_device()) { set_current_device(device); }
  ~OnDevice() { set_current_device(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  c10::DeviceIndex before_;
};

// --- memory (memory.cpp, pinned.cpp)

struct Access {
  uintptr_t low, high;
  bool write;
  int stream;
  uint64_t at;
  std::string what;
};

// Memory of a device, or pinned DRAM (device -1).
struct Block {
  size_t nbytes = 0;
  c10::DeviceIndex device = -1;
  int stream = 0;             // allocated on
  std::vector<int> recorded;  // by record_stream
  std::vector<Access> accesses;
};

struct Stats {
  int64_t allocated = 0, peak = 0, reserved = 0, peak_reserved = 0, allocations = 0;
  int64_t limit = INT64_C(8) << 30;
};

constexpr int64_t kContextBytes = INT64_C(500) << 20;

std::map<uintptr_t, Block>& blocks();
Stats& stats(int device);
// Devices on which this process has a context, and what was done first there.
std::map<int, std::string> contexts();
void open_context(int device, const char* what);
// The block that has this address, or nullptr.
Block* block_at(uintptr_t address);
// An action of a stream accesses a tensor: what may run beside it and touches the same bytes is reported.
void note(const std::string& what, int key, const at::Tensor& tensor, bool write);
void record_stream(const void* data, int key);
void empty_cache(c10::DeviceIndex device);
c10::Allocator* device_allocator();
at::HostAllocator* pinned_allocator();
void pin(uintptr_t address, size_t nbytes, bool by_hand);
void unpin(uintptr_t address, bool by_hand);
bool is_pinned(const void* data);
// Now and at most.
std::pair<int64_t, int64_t> pinned_bytes();
void reset_pinned_peak();

// --- guard, generators, hooks (guard.cpp)

const at::Generator& default_generator(c10::DeviceIndex device);
// The CPU's generator that a device's draws from.
at::Generator inner_of(const at::Generator& generator);
// Have torch ask this device where it asks CUDA.
void install_hooks();

// --- tensors and operators (tensors.cpp, fallback.cpp)

// A CPU tensor on the memory of a tensor of the device.
at::Tensor as_cpu(const at::Tensor& tensor);
c10::Storage new_storage(size_t nbytes, c10::DeviceIndex device);
// A sparse tensor (COO) of these indices and values, otherwise like another.
at::Tensor sparse_of(const at::Tensor& indices, const at::Tensor& values, const at::Tensor& like);
// A tensor on a storage with the shape of another.
at::Tensor tensor_on(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& like, bool view = false);
void resize_storage(c10::StorageImpl* storage, size_t nbytes);
// The next action of a device's current stream: what it accesses is noted.
void launch(const std::string& what, c10::DeviceIndex device, const std::vector<at::Tensor>& reads,
            const std::vector<at::Tensor>& writes);

}  // namespace pretend
