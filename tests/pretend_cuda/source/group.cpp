// "nccl": collectives on streams of the device, carried by gloo on its memory.
//
// Values are there at once, but known to be only to who waits: a collective that is called asynchronous runs on a stream
// of the group. All ranks must call the same, and, where groups have the same members, the groups in one order.
#include "device.h"

#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>

namespace pretend {

namespace {

using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
using Members = std::vector<int64_t>;

// Makes a gloo group: of a store, a rank and a size.
py::object& maker() {
  static auto* made = new py::object();
  return *made;
}

// Collectives that this process has called, by who takes part.
std::map<Members, int64_t>& called() {
  static auto* made = new std::map<Members, int64_t>();
  return *made;
}

void wait_without_gil(const WorkPtr& work) {
  if (!work) return;
  std::optional<py::gil_scoped_release> free;
  if (PyGILState_Check()) free.emplace();
  work->wait();
}

Tensors joined(const Tensors& one, const Tensors& other) {
  auto all = one;
  all.insert(all.end(), other.begin(), other.end());
  return all;
}

Tensors flat(const Lists& lists) {
  Tensors found;
  for (auto& one : lists) found.insert(found.end(), one.begin(), one.end());
  return found;
}

Tensors own(const Tensors& given) {
  Tensors found;
  for (auto& one : given) {
    TORCH_CHECK(one.is_cuda(), "No backend type associated with device type cpu (nccl was given ", one.device(), ")");
    TORCH_CHECK(one.device().index() == current_device(), "nccl on cuda:", static_cast<int>(current_device()),
                " was given a tensor of ", one.device());
    TORCH_CHECK(one.is_non_overlapping_and_dense(), "Tensors must be contiguous");
    found.push_back(as_cpu(one));
  }
  return found;
}

Lists own(const Lists& given) {
  Lists found;
  for (auto& one : given) found.push_back(own(one));
  return found;
}

// A collective on a stream. It keeps what it accesses until somebody waits for it.
class Work final : public c10d::Work {
 public:
  Work(int key, Tensors kept, const Tensors& results, bool blocks_host)
      : key_(key), kept_(std::move(kept)), blocks_host_(blocks_host) {
    {
      Lock lock;
      end_ = record(key_);
    }
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::ofTensors(),
                                                       std::vector<c10::Device>{{c10::kCUDA, device_of(key_)}});
    auto before = current_stream_id(device_of(key_));
    set_current_stream_id(device_of(key_), key_ - stream_key(device_of(key_), 0));
    future_->markCompleted(c10::IValue(results));
    set_current_stream_id(device_of(key_), before);
  }
  ~Work() override {
    for (auto& one : kept_) record_stream(one.storage().data(), key_);
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  void synchronize() override { wait(kNoTimeout); }
  bool wait(std::chrono::milliseconds) override {
    {
      Lock lock;
      if (blocks_host_) host_waits(end_);
      stream_waits(current_key(device_of(key_)), end_);
    }
    kept_.clear();
    return true;
  }
  std::vector<at::Tensor> result() override { return future_->value().toTensorVector(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  int key_;
  Event end_;
  Tensors kept_;
  bool blocks_host_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

class Group final : public c10d::Backend {
 public:
  Group(int rank, int size, BackendPtr inner, Members members)
      : Backend(rank, size), inner_(std::move(inner)), members_(std::move(members)) {}
  const std::string getBackendName() const override { return "nccl"; }
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return c10::make_intrusive<Options>("nccl"); }
  BackendPtr split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                   const c10::intrusive_ptr<Options>&) override {
    auto place = std::find(ranks.begin(), ranks.end(), getRank());
    if (place == ranks.end()) return nullptr;
    int rank = static_cast<int>(place - ranks.begin()), size = static_cast<int>(ranks.size());
    Members members;
    for (int one : ranks) members.push_back(members_.empty() ? one : members_[one]);
    py::gil_scoped_acquire gil;
    return c10::make_intrusive<Group>(rank, size, maker()(store, rank, size).cast<BackendPtr>(), members);
  }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  void abort() override {}

  WorkPtr broadcast(Tensors& t, const c10d::BroadcastOptions& o) override {
    auto a = own(t);
    return run("broadcast", {}, t, o.asyncOp, [&] { return inner_->broadcast(a, o); });
  }
  WorkPtr allreduce(Tensors& t, const c10d::AllreduceOptions& o) override {
    auto a = own(t);
    return reduced("all_reduce", {}, t, a, o, [&](auto& summed) { return inner_->allreduce(a, summed); });
  }
  WorkPtr allreduce_coalesced(Tensors& t, const c10d::AllreduceCoalescedOptions& o) override {
    return each(t.size(), [&](size_t i) {
      Tensors single{t[i]};
      return allreduce(single, o);
    });
  }
  WorkPtr reduce(Tensors& t, const c10d::ReduceOptions& o) override {
    auto a = own(t);
    return reduced("reduce", {}, t, a, o, [&](auto& summed) { return inner_->reduce(a, summed); });
  }
  WorkPtr allgather(Lists& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    auto a = own(out);
    auto b = own(in);
    return run("all_gather", in, flat(out), o.asyncOp, [&] { return inner_->allgather(a, b, o); });
  }
  WorkPtr _allgather_base(at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& o) override {
    auto both = own(Tensors{out, in});
    return run("all_gather_into_tensor", {in}, {out}, o.asyncOp,
               [&] { return inner_->_allgather_base(both[0], both[1], o); });
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    return each(out.size(), [&](size_t i) { return _allgather_base(out[i], in[i], o); });
  }
  WorkPtr reduce_scatter(Tensors& out, Lists& in, const c10d::ReduceScatterOptions& o) override {
    auto a = own(out);
    auto b = own(in);
    return reduced("reduce_scatter", flat(in), out, a, o,
                   [&](auto& summed) { return inner_->reduce_scatter(a, b, summed); });
  }
  WorkPtr _reduce_scatter_base(at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& o) override {
    auto both = own(Tensors{out, in});
    return reduced("reduce_scatter_tensor", {in}, {out}, {both[0]}, o,
                   [&](auto& summed) { return inner_->_reduce_scatter_base(both[0], both[1], summed); });
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) override {
    return each(out.size(), [&](size_t i) { return _reduce_scatter_base(out[i], in[i], o); });
  }
  WorkPtr gather(Lists& out, Tensors& in, const c10d::GatherOptions& o) override {
    auto a = own(out);
    auto b = own(in);
    return run("gather", in, flat(out), o.asyncOp, [&] { return inner_->gather(a, b, o); });
  }
  WorkPtr scatter(Tensors& out, Lists& in, const c10d::ScatterOptions& o) override {
    auto a = own(out);
    auto b = own(in);
    return run("scatter", flat(in), out, o.asyncOp, [&] { return inner_->scatter(a, b, o); });
  }
  WorkPtr alltoall_base(at::Tensor& out, at::Tensor& in, std::vector<int64_t>& to, std::vector<int64_t>& from,
                        const c10d::AllToAllOptions& o) override {
    auto both = own(Tensors{out, in});
    return run("all_to_all_single", {in}, {out}, o.asyncOp,
               [&] { return inner_->alltoall_base(both[0], both[1], to, from, o); });
  }
  WorkPtr send(Tensors& t, int rank, int tag) override {
    auto a = own(t);
    return run("send", t, {}, true, [&] { return inner_->send(a, rank, tag); }, false);
  }
  WorkPtr recv(Tensors& t, int rank, int tag) override {
    auto a = own(t);
    return run("recv", {}, t, true, [&] { return inner_->recv(a, rank, tag); }, false);
  }
  WorkPtr barrier(const c10d::BarrierOptions& o) override {
    return run("barrier", {}, {}, o.asyncOp, [&] { return inner_->barrier(o); });
  }

 private:
  template <typename Function>
  WorkPtr run(const std::string& what, const Tensors& reads, const Tensors& writes, bool asynchronous, Function call,
              bool of_all = true) {
    int key = asynchronous ? own_key() : current_key(current_device());
    if (of_all) check_order(what);
    {
      Lock lock;
      if (asynchronous) stream_waits(key, record(current_key(current_device())));
      begin(key);
      for (auto& t : reads) note(what, key, t, false);
      for (auto& t : writes) note(what, key, t, true);
      flush(key);
    }
    wait_without_gil(call());
    return c10::make_intrusive<Work>(key, joined(reads, writes), writes, what == "barrier");
  }

  // gloo knows no average.
  template <typename Options, typename Function>
  WorkPtr reduced(const std::string& what, const Tensors& reads, const Tensors& writes, const Tensors& results,
                  const Options& options, Function call) {
    auto summed = options;
    bool average = options.reduceOp == c10d::ReduceOp::AVG;
    if (average) summed.reduceOp = c10d::ReduceOp::SUM;
    return run(what, reads, writes, options.asyncOp, [&]() -> WorkPtr {
      wait_without_gil(call(summed));
      if (average)
        for (auto one : results) {
          if (c10::isIntegralType(one.scalar_type(), false)) one.div_(getSize(), "trunc");
          else one.div_(getSize());
        }
      return nullptr;
    });
  }

  template <typename Function>
  static WorkPtr each(size_t count, Function call) {
    WorkPtr last;
    for (size_t i = 0; i < count; i++) last = call(i);
    return last;
  }

  int own_key() {
    auto device = current_device();
    if (!streams_.count(device)) streams_[device] = new_stream_id();
    return stream_key(device, streams_[device]);
  }

  // The device's order of collectives is each rank's own: where ranks have different ones, they wait for ever.
  void check_order(const std::string& what) {
    if (getSize() < 2) return;
    int64_t place = 0;
    {
      Lock lock;
      place = called()[members_]++;
    }
    auto mine = at::tensor({place, static_cast<int64_t>(std::hash<std::string>()(what))}, at::kLong);
    auto gathered = at::empty({getSize() * 2}, at::kLong), all = gathered.view({getSize(), 2});
    wait_without_gil(inner_->_allgather_base(gathered, mine, c10d::AllgatherOptions()));
    for (int rank = 0; rank < getSize(); rank++) {
      if (at::equal(all[rank], mine)) continue;
      auto text = what + " is number " + std::to_string(place) + " of the collectives of its members on rank " +
                  std::to_string(getRank()) + " and rank " + std::to_string(rank) + " calls " +
                  (at::equal(all[rank][1], mine[1]) ? "the same as number " : "another one as number ") +
                  std::to_string(all[rank][0].item<int64_t>());
      Lock lock;
      report("order", text);
      TORCH_CHECK(false, "pretended NCCL: ", text);
    }
  }

  BackendPtr inner_;
  Members members_;
  std::map<c10::DeviceIndex, int64_t> streams_;
};

}  // namespace

void add_process_group(py::module_& m) {
  m.def("set_maker", [](py::object made) { maker() = std::move(made); });
  m.def("group", [](int rank, int size, const BackendPtr& inner, Members members) -> BackendPtr {
    return c10::make_intrusive<Group>(rank, size, inner, std::move(members));
  });
}

}  // namespace pretend

namespace c10d {
class PretendTimer : public Timer {
 public:
  explicit PretendTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, PretendTimer)
}  // namespace c10d
