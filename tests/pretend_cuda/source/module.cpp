// What Python sees of the device.
#include "device.h"

#include <ATen/core/Tensor.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/device_lazy_init.h>
#include <torch/csrc/utils/pybind.h>

namespace pretend {

void add_process_group(py::module_& m);

namespace {

std::string site_of(const py::object& found) {
  // Operators are called without the GIL. Nothing of the device is locked here.
  if (!Py_IsInitialized()) return "";
  py::gil_scoped_acquire gil;
  try {
    return found().cast<std::string>();
  } catch (py::error_already_set&) {
    return "";
  }
}

py::dict stats_of(int device) {
  Lock lock;
  auto& own = stats(device);
  py::dict found;
  found["allocated"] = own.allocated;
  found["peak"] = own.peak;
  found["reserved"] = own.reserved;
  found["peak_reserved"] = own.peak_reserved;
  found["allocations"] = own.allocations;
  found["limit"] = own.limit;
  found["context"] = kContextBytes;
  return found;
}

void reset_peak(int device) {
  Lock lock;
  auto& own = stats(device);
  own.peak = own.allocated;
  own.peak_reserved = own.reserved;
}

void set_device(int device) {
  TORCH_CHECK(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal");
  set_current_device(static_cast<c10::DeviceIndex>(device));
}

void set_devices(int count) {
  TORCH_CHECK(count >= 1 && count <= kDevices, "1 to ", kDevices, " devices can be pretended, not ", count);
  set_device_count(count);
}

void synchronize(int device) {
  py::gil_scoped_release free;
  Lock lock;
  host_waits_for_device(static_cast<c10::DeviceIndex>(device));
}

void add_memory(py::module_& m) {
  m.def("stats", &stats_of);
  m.def("reset_peak", &reset_peak);
  m.def("set_limit", [](int device, int64_t limit) { stats(device).limit = limit; });
  m.def("empty_cache", [](int device) { empty_cache(static_cast<c10::DeviceIndex>(device)); });
  m.def("contexts", &contexts);
  m.def("pin", [](uintptr_t address, size_t nbytes) { pin(address, nbytes, true); });
  m.def("unpin", [](uintptr_t address) { unpin(address, true); });
  m.def("pinned_bytes", &pinned_bytes);
  m.def("reset_pinned_peak", &reset_pinned_peak);
  m.def("resize_storage", [](const at::Tensor& holder, size_t nbytes) {
    resize_storage(holder.storage().unsafeGetStorageImpl(), nbytes);
  });
}

void add_streams(py::module_& m) {
  m.def("set_devices", &set_devices);
  m.def("current_device", [] { return static_cast<int>(current_device()); });
  m.def("set_device", &set_device);
  // Have torch ask torch.cuda to begin once more.
  m.def("forget_beginning", [] { torch::utils::set_requires_device_init(at::kCUDA, true); });
  m.def("current_stream", [](int device) { return current_stream_id(static_cast<c10::DeviceIndex>(device)); });
  m.def("synchronize", &synchronize);
  m.def("set_late", &set_late);
  m.def("default_generator", [](int device) { return default_generator(static_cast<c10::DeviceIndex>(device)); });
}

void add_reports(py::module_& m) {
  m.def("set_report_file", &set_report_file);
  m.def("set_call_site", [](py::object found) {
    auto* kept = new py::object(std::move(found));  // kept for ever: threads outlive the interpreter
    set_call_site([kept] { return site_of(*kept); });
  });
  m.def("reports", &reports);
  m.def("counts", &counts);
  m.def("clear_reports", &clear_reports);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  install_hooks();
  add_memory(m);
  add_streams(m);
  add_reports(m);
  add_process_group(m);
}

}  // namespace pretend
