// Every other operator: the CPU's kernel on the memory of the device.
//
// Where torch can tell the shape of the results beforehand, by its kernels for tensors without data, the kernel is given
// to the stream and done when something waits for it; where it cannot, and where numbers are drawn, at once.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

namespace pretend {

namespace {

using Stack = torch::jit::Stack;
using Tensors = std::vector<at::Tensor>;
using Change = std::function<at::Tensor(const at::Tensor&, bool written)>;

// Replace each tensor of a value, in lists too.
c10::IValue changed(const c10::IValue& value, bool written, const Change& change) {
  if (value.isTensor()) return change(value.toTensor(), written);
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(change(t, written));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t && t->defined() ? std::optional<at::Tensor>(change(*t, written)) : t);
    return list;
  }
  return value;
}

at::SparseTensorImpl& sparse_impl(const at::Tensor& t) {
  return static_cast<at::SparseTensorImpl&>(*t.unsafeGetTensorImpl());
}

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

at::Tensor without_data(const at::Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::kMeta));
}

void copy_result(const at::Tensor& target, const at::Tensor& source, const std::string& name) {
  TORCH_CHECK(target.sizes() == source.sizes() && target.dtype() == source.dtype(), "pretended CUDA took the result of ",
              name, " for ", target.toString(), target.sizes(), " and it is ", source.toString(), source.sizes());
  const_cast<at::Tensor&>(target).copy_(source);
}

// One call of an operator, whose arguments are the last of the stack.
class Call {
 public:
  // `sparse`: results, if not arguments, have a sparse layout.
  Call(const c10::OperatorHandle& op, Stack* stack, bool sparse)
      : op_(op),
        schema_(op.schema()),
        stack_(stack),
        first_(stack->size() - schema_.arguments().size()),
        has_sparse_(sparse) {}

  void run() {
    find_device();
    take_arguments();
    if (is_view()) return run_now(false);
    auto shapes = may_wait() ? shapes_of_results() : std::nullopt;
    launch(schema_.name(), device_, reads_, writes_);
    if (shapes) return run_late(*shapes);
    {
      Lock lock;
      flush(current_key(device_));
    }
    run_now(true);
  }

 private:
  struct Pair {
    at::Tensor given, own;
    bool written;
  };

  void find_device() {
    auto& arguments = schema_.arguments();
    auto look = [&](const at::Tensor& t, bool) {
      if (device_ < 0 && t.defined() && t.is_cuda()) device_ = t.device().index();
      return t;
    };
    std::optional<c10::Device> named;
    for (size_t i = 0; i < arguments.size(); i++) {
      auto& value = (*stack_)[first_ + i];
      changed(value, false, look);
      if (value.isDevice() && value.toDevice().is_cuda()) named = value.toDevice();
    }
    if (named && named->has_index()) device_ = named->index();
    if (device_ < 0) device_ = current_device();
  }

  void take_arguments() {
    auto& arguments = schema_.arguments();
    for (size_t i = 0; i < arguments.size(); i++) {
      auto& value = (*stack_)[first_ + i];
      bool written = is_written(arguments[i]);
      value = changed(value, written, [&](const at::Tensor& t, bool) { return take(t, written); });
      if (value.isDevice() && value.toDevice().is_cuda()) value = c10::Device(c10::kCPU);
      if (arguments[i].real_type()->str().find("Generator") == std::string::npos) continue;
      value = inner_of(value.isGenerator() ? value.toGenerator() : default_generator(device_));
      has_generator_ = true;
    }
    draws_ = !has_generator_ && op_.hasTag(at::Tag::nondeterministic_seeded);
  }

  at::Tensor take(const at::Tensor& t, bool written) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      TORCH_CHECK(t.device().is_cpu(), "pretended CUDA meets a tensor on ", t.device(), " (", schema_.name(), ")");
      TORCH_CHECK(!t.dim() || !t.numel() || takes_both(),
                  "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                  static_cast<int>(device_), " and cpu! (", schema_.name(), ")");
      of_host_.push_back(t);
      return t;
    }
    if (t.is_sparse()) return take_sparse(t, written);
    TORCH_CHECK(t.layout() == at::kStrided, "pretended CUDA has no ", t.layout(), " tensors (", schema_.name(), ")");
    TORCH_CHECK(device_ == t.device().index(), "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                static_cast<int>(device_), " and ", t.device(), "! (", schema_.name(), ")");
    auto own = as_cpu(t);
    pairs_.push_back({t, own, written});
    (written ? writes_ : reads_).push_back(t);
    return own;
  }

  at::Tensor take_sparse(const at::Tensor& t, bool written) {
    has_sparse_ = true;
    auto own = sparse_of(take(sparse_impl(t).indices(), false), take(sparse_impl(t).values(), false), t);
    sparse_pairs_.push_back({t, own, written});
    return own;
  }

  // Operators whose CUDA kernels take tensors of the CPU beside their own.
  bool takes_both() const {
    auto& name = schema_.name();
    return name.find("index") != std::string::npos || name == "aten::_foreach_copy_" || name == "aten::where" ||
           name == "aten::copy_sparse_to_sparse_";
  }

  // Views are no work.
  bool is_view() const {
    auto& returns = schema_.returns();
    return !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
  }

  bool may_wait() const {
    if (!late() || has_sparse_ || draws_ || has_generator_ || pairs_.empty() || op_.hasTag(at::Tag::inplace_view)) return false;
    if (schema_.name().rfind("aten::", 0) != 0) return false;
    for (auto& one : schema_.returns()) {
      bool tensors = one.type()->isSubtypeOf(*c10::TensorType::get()) ||
                     one.type()->isSubtypeOf(*c10::ListType::ofTensors());
      if (!tensors) return false;
    }
    return op_.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta);
  }

  // Results without data, by torch's kernels for such; nothing where these cannot tell, and where an argument would
  // become larger.
  std::optional<Stack> shapes_of_results() const {
    Stack stack;
    std::vector<std::pair<at::Tensor, at::Tensor>> stand_ins;
    auto stand_in = [&](const at::Tensor& t, bool) {
      if (!t.defined() || !is_own(t)) return t;
      stand_ins.emplace_back(t, without_data(t));
      return stand_ins.back().second;
    };
    for (size_t i = first_; i < stack_->size(); i++) {
      auto value = changed((*stack_)[i], false, stand_in);
      stack.push_back(value.isDevice() ? c10::IValue(c10::Device(c10::kMeta)) : value);
    }
    try {
      at::AutoDispatchBelowADInplaceOrView below;
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
    } catch (...) {
      return std::nullopt;
    }
    for (auto& [own, other] : stand_ins)
      if (own.sizes() != other.sizes() || own.strides() != other.strides()) return std::nullopt;
    if (schema_.name() == "aten::native_batch_norm") take_types_of_cpu(stack);
    return stack;
  }

  // CUDA's statistics are float32, and so are those without data; the CPU's are of the input's type, unless a parameter
  // has another. Layer normalization is made of this operator here.
  void take_types_of_cpu(Stack& results) const {
    auto type = (*stack_)[first_].toTensor().scalar_type();
    for (size_t i = first_ + 1; i < first_ + 5; i++)
      if (auto& value = (*stack_)[i]; value.isTensor() && value.toTensor().defined() && value.toTensor().scalar_type() != type) return;
    for (size_t i = 1; i < 3; i++) results[i] = results[i].toTensor().to(type);
  }

  bool is_own(const at::Tensor& t) const {
    return std::any_of(pairs_.begin(), pairs_.end(), [&](auto& one) { return t.is_same(one.own); });
  }

  void run_late(const Stack& shapes) {
    auto& returns = schema_.returns();
    Stack results, targets;
    for (size_t i = 0; i < returns.size(); i++) {
      if (is_written(returns[i])) {
        results.push_back(written_argument(returns[i]));
        targets.push_back(c10::IValue());
        continue;
      }
      results.push_back(changed(shapes[i], true, [&](const at::Tensor& t, bool) { return t.defined() ? fresh(t) : t; }));
      targets.push_back(changed(results.back(), true, [](const at::Tensor& t, bool) { return as_cpu(t); }));
    }
    Stack arguments(stack_->begin() + static_cast<int64_t>(first_), stack_->end());
    // What the host may change before the kernel is done.
    for (auto& value : arguments)
      value = changed(value, false, [&](const at::Tensor& t, bool) { return t.defined() && !is_own(t) ? t.clone() : t; });
    submit_kernel(std::move(arguments), std::move(targets));
    stack_->resize(first_);
    stack_->insert(stack_->end(), results.begin(), results.end());
  }

  void submit_kernel(Stack arguments, Stack targets) const {
    Lock lock;
    submit(current_key(device_), [op = op_, arguments = std::move(arguments), targets = std::move(targets)]() mutable {
      at::AutoDispatchBelowADInplaceOrView below;
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &arguments);
      for (size_t i = 0; i < targets.size(); i++) {
        if (targets[i].isTensor() && targets[i].toTensor().defined())
          copy_result(targets[i].toTensor(), arguments[i].toTensor(), op.schema().name());
        if (!targets[i].isTensorList()) continue;
        auto to = targets[i].toTensorVector(), from = arguments[i].toTensorVector();
        for (size_t j = 0; j < to.size(); j++) copy_result(to[j], from[j], op.schema().name());
      }
    });
  }

  // What an operator returns that writes into an argument.
  c10::IValue written_argument(const c10::Argument& returned) const {
    auto& arguments = schema_.arguments();
    for (size_t i = 0; i < arguments.size(); i++) {
      if (!is_written(arguments[i]) || arguments[i].alias_info()->beforeSets() != returned.alias_info()->beforeSets()) continue;
      return changed((*stack_)[first_ + i], true, [&](const at::Tensor& t, bool) { return given_for(t); });
    }
    TORCH_CHECK(false, "pretended CUDA does not know which argument ", schema_.name(), " returns");
  }

  at::Tensor given_for(const at::Tensor& own) const {
    for (auto& one : pairs_)
      if (own.is_same(one.own)) return one.given;
    return own;
  }

  at::Tensor fresh(const at::Tensor& like) {
    auto nbytes = at::detail::computeStorageNbytes(like.sizes(), like.strides(), like.itemsize());
    auto storage = new_storage(nbytes, device_);
    auto made = tensor_on(storage, c10::DispatchKeySet(c10::DispatchKey::CUDA), like);
    made.unsafeGetTensorImpl()->set_storage_offset(0);
    note_fresh(made);
    return made;
  }

  void note_fresh(const at::Tensor& made) const {
    Lock lock;
    note(schema_.name(), current_key(device_), made, true);
  }

  void run_now(bool computes) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      auto before = draws_ ? lend_generator() : at::Tensor();
      if (has_sparse_)
        op_.callBoxed(stack_);
      else
        op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
      if (draws_) take_generator(before);
    }
    for (auto& one : pairs_)
      if (one.written) keep_new_shape(one);
    for (auto& one : sparse_pairs_)
      if (one.written) keep_new_values(one, computes);
    auto& returns = schema_.returns();
    for (size_t i = 0; i < returns.size(); i++) {
      auto& value = (*stack_)[first_ + i];
      value = changed(value, false, [&](const at::Tensor& t, bool) { return brought(t, computes); });
      if (!value.isScalar() && !value.isBool()) continue;
      Lock lock;
      host_waits_for_stream(current_key(device_));
    }
  }

  // Kernels that take no generator draw from the CPU's own: for that time it is as the device's.
  at::Tensor lend_generator() const {
    auto& cpu = const_cast<at::Generator&>(at::detail::getDefaultCPUGenerator());
    auto before = cpu.get_state();
    cpu.set_state(inner_of(default_generator(device_)).get_state());
    return before;
  }

  void take_generator(const at::Tensor& before) const {
    auto& cpu = const_cast<at::Generator&>(at::detail::getDefaultCPUGenerator());
    inner_of(default_generator(device_)).set_state(cpu.get_state());
    cpu.set_state(before);
  }

  // Of an argument that the kernel may have made larger.
  void keep_new_shape(const Pair& one) const {
    auto &from = one.own.storage(), &to = one.given.storage();
    if (from.data() != to.data()) {
      auto made = storage_of(from);
      auto* kept = to.unsafeGetStorageImpl();
      c10::DataPtr nothing(nullptr, c10::Device(c10::kCUDA, device_));
      kept->set_data_ptr(made.unsafeGetStorageImpl()->set_data_ptr(std::move(nothing)));
      kept->set_nbytes(from.nbytes());
    }
    if (one.given.sizes() != one.own.sizes() || one.given.strides() != one.own.strides())
      one.given.unsafeGetTensorImpl()->set_sizes_and_strides(one.own.sizes(), one.own.strides(), one.own.storage_offset());
  }

  void keep_new_values(const Pair& one, bool computes) {
    auto &from = sparse_impl(one.own), &to = sparse_impl(one.given);
    to.resize_(from.sparse_dim(), from.dense_dim(), one.own.sizes());
    to.set_indices_and_values_unsafe(brought(from.indices(), computes), brought(from.values(), computes));
    to.set_coalesced(from.coalesced());
  }

  // Memory of the device with the bytes of a storage of the CPU.
  c10::Storage storage_of(const c10::Storage& source) const {
    auto made = new_storage(source.nbytes(), device_);
    if (!source.nbytes()) return made;
    Lock lock;
    // Another thread may have freed it since the kernel began: what the stream was given then comes before.
    flush(current_key(device_));
    ::memcpy(made.mutable_data(), source.data(), source.nbytes());
    return made;
  }

  // A result of the CPU's kernel on the device: an argument, a view of one, or memory of its own.
  at::Tensor brought(const at::Tensor& t, bool computes) {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto& one : of_host_)
      if (t.is_same(one)) return t;
    if (t.is_sparse()) return brought_sparse(t, computes);
    for (auto& one : pairs_)
      if (t.is_same(one.own)) return one.given;
    for (auto& one : pairs_)
      if (t.has_storage() && t.storage().unsafeGetStorageImpl() == one.own.storage().unsafeGetStorageImpl())
        return tensor_on(one.given.storage(), one.given.key_set(), t, true);
    auto* source = t.storage().unsafeGetStorageImpl();
    auto found = made_.find(source);
    if (found == made_.end()) found = made_.emplace(source, storage_of(t.storage())).first;
    auto result = tensor_on(found->second, c10::DispatchKeySet(c10::DispatchKey::CUDA), t);
    if (computes) note_fresh(result);
    return result;
  }

  at::Tensor brought_sparse(const at::Tensor& t, bool computes) {
    for (auto& one : sparse_pairs_)
      if (t.is_same(one.own)) return one.given;
    auto& own = sparse_impl(t);
    return sparse_of(brought(own.indices(), computes), brought(own.values(), computes), t);
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack* stack_;
  size_t first_;
  c10::DeviceIndex device_ = -1;
  bool has_generator_ = false, draws_ = false, has_sparse_;
  std::vector<Pair> pairs_, sparse_pairs_;
  Tensors reads_, writes_, of_host_;
  std::map<c10::StorageImpl*, c10::Storage> made_;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack, false).run(); }
void sparse_fallback(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack, true).run(); }

}  // namespace

// Of operators that have kernels for sparse tensors beside one for all devices, the former: a fallback comes after both.
void prefer_sparse_kernels(torch::Library& m) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != "aten") continue;
    auto op = dispatcher.findOp(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::SparseCPU)) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd)) continue;
    auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&sparse_fallback>());
  }
}

TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) { prefer_sparse_kernels(m); }
TORCH_LIBRARY_IMPL(_, SparseCUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&sparse_fallback>()); }
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace pretend
