// What torch asks of any device: its guard, streams and events; its random numbers; and CUDA's hooks.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>

#include <cstring>

namespace pretend {

namespace {

c10::DeviceIndex index_of(c10::Device device) { return device.has_index() ? device.index() : current_device(); }

c10::Stream stream_of(c10::DeviceIndex index, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, index), id);
}

int key(const c10::Stream& stream) { return stream_key(index_of(stream.device()), stream.id()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }
  c10::Device getDevice() const override { return {c10::kCUDA, current_device()}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index_of(device) < device_count(), "CUDA error: invalid device ordinal");
    set_current_device(index_of(device));
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { set_current_device(index_of(device)); }

  c10::Stream getStream(c10::Device device) const override {
    return stream_of(index_of(device), current_stream_id(index_of(device)));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(index_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device); }
  c10::Stream getNewStream(c10::Device device, int = 0) const override {
    return stream_of(index_of(device), new_stream_id());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto index = index_of(stream.device());
    auto before = getStream(stream.device());
    set_current_stream_id(index, stream.id());
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock;
    return is_idle(key(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Lock lock;
    host_waits_for_stream(key(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    Lock lock;
    host_waits_for_device(index);
  }

  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock;
    if (!*event) *event = new Event();
    *static_cast<Event*>(*event) = pretend::record(key(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    Lock lock;
    stream_waits(key(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    Lock lock;
    return is_over(*static_cast<Event*>(event));
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    Lock lock;
    host_waits(*static_cast<Event*>(event));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    record_stream(data.get(), key(stream));
  }
};
c10::impl::DeviceGuardImplRegistrar registrar(c10::kCUDA, new Guard());

struct PretendGenerator final : c10::GeneratorImpl {
  explicit PretendGenerator(c10::DeviceIndex index)
      : GeneratorImpl(c10::Device(c10::kCUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override {
    auto* made = new PretendGenerator(device_.index());
    made->inner = inner.clone();
    return made;
  }
  at::Generator inner;
};

}  // namespace

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* generators = [] {
    auto* made = new std::array<at::Generator, kDevices>();
    for (int i = 0; i < kDevices; i++) (*made)[i] = at::make_generator<PretendGenerator>(static_cast<c10::DeviceIndex>(i));
    return made;
  }();
  return (*generators)[index < 0 ? current_device() : index];
}

at::Generator inner_of(const at::Generator& generator) {
  auto* own = dynamic_cast<PretendGenerator*>(generator.unsafeGetGeneratorImpl());
  return own ? own->inner : generator;
}

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index = -1) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index = -1) const override {
    return at::make_generator<PretendGenerator>(index < 0 ? pretend::current_device() : index);
  }
  c10::Device getDeviceFromPtr(void* data) const override {
    Lock lock;
    auto* block = block_at(reinterpret_cast<uintptr_t>(data));
    return {c10::kCUDA, block ? block->device : pretend::current_device()};
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override { return contexts().count(index) > 0; }
  c10::DeviceIndex current_device() const override { return pretend::current_device(); }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count()); }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current_device(index); }
  c10::DeviceIndex getCurrentDevice() const override { return pretend::current_device(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto before = pretend::current_device();
    set_current_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  int getNumGPUs() const override { return device_count(); }
  void deviceSynchronize(c10::DeviceIndex index) const override {
    Lock lock;
    host_waits_for_device(index);
  }
};

void install_hooks() {
  c10::SetAllocator(c10::kCUDA, device_allocator(), 255);
  at::setHostAllocator(c10::kCUDA, pinned_allocator(), 255);
  // torch asked for the hooks when it was imported, found none and keeps what stands for none: an object without
  // members, which is ours from now on.
  static auto* own = new CUDAHooks(at::CUDAHooksArgs{});
  static_assert(sizeof(CUDAHooks) == sizeof(void*) && sizeof(at::CUDAHooksInterface) == sizeof(void*));
  auto& kept = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  ::memcpy(static_cast<void*>(&kept), static_cast<void*>(own), sizeof(void*));
}

}  // namespace pretend
