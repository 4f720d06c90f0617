// Streams: tasks that are done as late as waiting allows, and vector clocks that know what has been waited for.
//
// Source: Lamport 1978, "Time, Clocks, and the Ordering of Events"; Mattern 1989, "Virtual Time and Global States".
#include "device.h"

#include <algorithm>
#include <atomic>

namespace pretend {

namespace {

constexpr int kStreams = 1 << 16;

struct Stream {
  Clock clock;
  std::deque<std::function<void()>> tasks;
  uint64_t given = 0, done = 0;
};

std::map<int, Stream>& streams() {
  static auto* made = new std::map<int, Stream>();
  return *made;
}
// All threads of the host have one clock: what one has waited for, all have.
Clock& host() {
  static auto* made = new Clock();
  return *made;
}
std::atomic<int64_t> last_id{0};
std::atomic<int> devices{2};
std::atomic<bool> is_late{true};
thread_local c10::DeviceIndex device_of_thread = 0;
thread_local std::array<int64_t, kDevices> stream_of_thread{};

void join(Clock& into, const Clock& from) {
  for (auto& [key, action] : from) into[key] = std::max(into[key], action);
}

}  // namespace

int stream_key(c10::DeviceIndex device, int64_t id) { return device * kStreams + static_cast<int>(id); }
int current_key(c10::DeviceIndex device) { return stream_key(device, stream_of_thread[device]); }
c10::DeviceIndex device_of(int key) { return static_cast<c10::DeviceIndex>(key / kStreams); }

std::string name_of(int key) {
  if (key == kHost) return "the host";
  return "cuda:" + std::to_string(key / kStreams) + " stream " + std::to_string(key % kStreams);
}

int64_t new_stream_id() {
  auto id = ++last_id;
  TORCH_CHECK(id < kStreams, "the pretended device has no more than ", kStreams, " streams");
  return id;
}

c10::DeviceIndex current_device() { return device_of_thread; }
void set_current_device(c10::DeviceIndex device) { device_of_thread = device; }
int64_t current_stream_id(c10::DeviceIndex device) { return stream_of_thread[device]; }
void set_current_stream_id(c10::DeviceIndex device, int64_t id) { stream_of_thread[device] = id; }
int device_count() { return devices; }
void set_device_count(int count) { devices = count; }
bool late() { return is_late; }
void set_late(bool value) { is_late = value; }

void begin(int key) {
  auto& clock = streams()[key].clock;
  join(clock, host());
  clock[key]++;
}

void submit(int key, std::function<void()> task) {
  auto& stream = streams()[key];
  stream.given++;
  stream.tasks.push_back(std::move(task));
  if (!is_late) flush(key);
}

void flush(int key, uint64_t upto) {
  auto& stream = streams()[key];
  // What traces while the work is done, as torch.compile, does not see it.
  c10::impl::ExcludeDispatchKeyGuard no_modes(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PreDispatch, c10::DispatchKey::PythonTLSSnapshot}));
  while (!stream.tasks.empty() && stream.done < upto) {
    auto task = std::move(stream.tasks.front());
    stream.tasks.pop_front();
    stream.done++;
    task();
  }
}

void flush_device(c10::DeviceIndex device) {
  for (auto& [key, stream] : streams())
    if (device_of(key) == device) flush(key);
}

bool is_idle(int key) { return streams()[key].tasks.empty(); }

bool is_over(const Event& event) {
  if (streams()[event.stream].done >= event.upto) return true;
  // To ask is not to wait; but who asks again and again is not to ask for ever.
  static int asked = 0;
  if (++asked % 3 == 0) flush(event.stream, event.upto);
  return streams()[event.stream].done >= event.upto;
}

Event record(int key) {
  auto& stream = streams()[key];
  join(stream.clock, host());
  return {stream.clock, key, stream.given};
}

void stream_waits(int key, const Event& event) {
  join(streams()[key].clock, event.clock);
  if (key == event.stream) return;
  submit(key, [stream = event.stream, upto = event.upto] { flush(stream, upto); });
}

void host_waits(const Event& event) {
  flush(event.stream, event.upto);
  join(host(), event.clock);
}

void host_waits_for_stream(int key) { host_waits(record(key)); }

void host_waits_for_device(c10::DeviceIndex device) {
  std::vector<int> keys;
  for (auto& [key, stream] : streams())
    if (device_of(key) == device) keys.push_back(key);
  for (int key : keys) host_waits_for_stream(key);
}

uint64_t now(int key) { return streams()[key].clock[key]; }

bool is_before(int key, uint64_t action, int waiter) {
  auto& clock = waiter == kHost ? host() : streams()[waiter].clock;
  auto known = clock.find(key);
  return known != clock.end() && action <= known->second;
}

}  // namespace pretend
