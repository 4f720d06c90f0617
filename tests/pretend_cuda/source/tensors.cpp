// Tensors of the device: how they are made, resized, copied and read by the host.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

namespace pretend {

namespace {

// From this size on a copy that is called asynchronous, and is not, is reported.
constexpr size_t kLarge = 1 << 16;

c10::DispatchKeySet cuda_keys() { return c10::DispatchKeySet(c10::DispatchKey::CUDA); }

c10::DeviceIndex index_of(std::optional<at::Device> device) {
  return device && device->has_index() ? device->index() : current_device();
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on(index_of(device));
  return at::detail::empty_generic(size, device_allocator(), cuda_keys(), at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice on(index_of(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), cuda_keys(), at::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  auto wanted = at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset());
  if (self.numel() && wanted > self.storage().nbytes()) resize_storage(self.storage().unsafeGetStorageImpl(), wanted);
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\"");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.data()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return self;
}

at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  auto length = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {length}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, new_storage(0, self.device().index()), 0, {0}, {});
}

// --- copies

void copy_on_cpu(const at::Tensor& target, const at::Tensor& source) {
  at::AutoDispatchBelowADInplaceOrView below;
  const_cast<at::Tensor&>(target).copy_(source);
}

// A CPU tensor on the memory of any tensor, which it does not keep: only what the program holds does.
at::Tensor bare(const at::Tensor& t) {
  c10::DataPtr memory(const_cast<void*>(t.storage().data()), c10::Device(c10::kCPU));
  c10::Storage same(c10::Storage::use_byte_size_t{}, t.storage().nbytes(), std::move(memory), nullptr, false);
  return tensor_on(same, c10::DispatchKeySet(c10::DispatchKey::CPU), t);
}

void submit_copy(const std::string& what, int key, const at::Tensor& target, const at::Tensor& source) {
  auto to = bare(target), from = bare(source);
  Lock lock;
  begin(key);
  note(what, key, source, false);
  note(what, key, target, true);
  submit(key, [to, from] { copy_on_cpu(to, from); });
}

void copy_between_devices(const at::Tensor& target, const at::Tensor& source) {
  int to = current_key(target.device().index()), from = current_key(source.device().index());
  {
    Lock lock;
    stream_waits(from, record(to));
  }
  submit_copy("copy between devices", from, target, source);
  Lock lock;
  stream_waits(to, record(from));
}

void count_copy(const std::string& what, size_t nbytes, bool pinned, bool non_blocking) {
  auto kind = what + (pinned ? ", pinned" : ", pageable") + (non_blocking ? ", not blocking" : ", blocking");
  count(kind);
  count(kind + ", bytes", static_cast<int64_t>(nbytes));
  if (non_blocking && !pinned && nbytes >= kLarge)
    report("pageable", what + " of " + std::to_string(nbytes) + " bytes is called asynchronous, but its DRAM is pageable");
}

void copy_from_or_to_host(const at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  bool to_host = target.device().is_cpu();
  int key = current_key((to_host ? source : target).device().index());
  bool pinned = is_pinned((to_host ? target : source).const_data_ptr());
  std::string what = to_host ? "copy to host" : "copy to device";
  // Before the lock is taken, since to count the references of what Python holds may take the GIL.
  auto to = bare(target), from = bare(source);
  Lock lock;
  count_copy(what, target.nbytes(), pinned, non_blocking);
  begin(key);
  note(what, key, source, false);
  note(what, key, target, true);
  if (non_blocking && pinned) return submit(key, [to, from] { copy_on_cpu(to, from); });
  flush(key);
  copy_on_cpu(to, from);
  if (to_host || !non_blocking) host_waits_for_stream(key);
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_same(source) || !self.numel()) return self;
  TORCH_CHECK(!self.is_meta() && !source.is_meta(), "Cannot copy out of meta tensor; no data!");
  if (source.sizes() != self.sizes()) return copy_(self, source.expand_as(self), non_blocking);
  if (!self.is_cuda() || !source.is_cuda())
    copy_from_or_to_host(self, source, non_blocking);
  else if (self.device() != source.device())
    copy_between_devices(self, source);
  else
    submit_copy("copy on device", current_key(self.device().index()), self, source);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  auto there = target;
  return copy_(there, self, non_blocking);
}

at::Scalar local_scalar(const at::Tensor& self) {
  auto device = self.device().index();
  launch("item", device, {self}, {});
  {
    Lock lock;
    host_waits_for_stream(current_key(device));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return as_cpu(self).item();
}

void record_stream_of(at::Tensor& self, at::Stream stream) {
  record_stream(self.storage().data(), stream_key(stream.device().index(), stream.id()));
}

}  // namespace

at::Tensor tensor_on(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& like, bool view) {
  auto made = view ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage), keys, like.dtype())
                   : at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor sparse_of(const at::Tensor& indices, const at::Tensor& values, const at::Tensor& like) {
  auto& old = static_cast<at::SparseTensorImpl&>(*like.unsafeGetTensorImpl());
  auto key = values.is_cuda() ? c10::DispatchKey::SparseCUDA : c10::DispatchKey::SparseCPU;
  OnDevice on(values.is_cuda() ? values.device().index() : current_device());
  auto made = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), values.dtype());
  auto& impl = static_cast<at::SparseTensorImpl&>(*made.unsafeGetTensorImpl());
  impl.resize_(old.sparse_dim(), old.dense_dim(), like.sizes());
  impl.set_indices_and_values_unsafe(indices, values);
  impl.set_coalesced(old.coalesced());
  return made;
}

at::Tensor as_cpu(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  c10::DataPtr memory(const_cast<void*>(t.storage().data()), c10::Device(c10::kCPU));
  c10::Storage same(c10::Storage::use_byte_size_t{}, t.storage().nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
  return tensor_on(same, c10::DispatchKeySet(c10::DispatchKey::CPU), t);
}

c10::Storage new_storage(size_t nbytes, c10::DeviceIndex device) {
  OnDevice on(device);
  return c10::Storage(c10::Storage::use_byte_size_t{}, nbytes, device_allocator()->allocate(nbytes), device_allocator(), true);
}

void resize_storage(c10::StorageImpl* storage, size_t nbytes) {
  OnDevice on(storage->device().index());
  auto fresh = device_allocator()->allocate(nbytes);
  if (auto common = std::min(nbytes, storage->nbytes())) {
    Lock lock;
    submit(current_key(storage->device().index()),
           [to = fresh.get(), from = storage->data(), common] { ::memcpy(to, from, common); });
  }
  storage->set_data_ptr(std::move(fresh));
  storage->set_nbytes(nbytes);
}

void launch(const std::string& what, c10::DeviceIndex device, const std::vector<at::Tensor>& reads,
            const std::vector<at::Tensor>& writes) {
  Lock lock;
  int key = current_key(device);
  begin(key);
  for (auto& t : reads) note(what, key, t, false);
  for (auto& t : writes) note(what, key, t, true);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("record_stream", &record_stream_of);
}

}  // namespace pretend
