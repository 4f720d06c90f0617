// What the device has seen: reports of what a real one would not forgive, and how often things happened.
#include "device.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

namespace pretend {

namespace {

constexpr size_t kMost = 1000;

std::recursive_mutex& mutex() {
  static auto* made = new std::recursive_mutex();
  return *made;
}
thread_local int depth = 0;
thread_local std::vector<std::pair<std::string, std::string>> pending;

struct Published {
  std::mutex mutex;
  std::vector<std::string> reports;
  std::map<std::string, int64_t> counts;
  std::string file;
  std::function<std::string()> call_site;
};
Published& published() {
  static auto* made = new Published();
  return *made;
}

void write_line(const std::string& path, const std::string& line) {
  int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file < 0) return;
  auto whole = line + "\n";
  [[maybe_unused]] auto written = ::write(file, whole.data(), whole.size());
  ::close(file);
}

void publish(const std::vector<std::pair<std::string, std::string>>& told) {
  auto& all = published();
  auto site = all.call_site ? all.call_site() : std::string();
  std::lock_guard lock(all.mutex);
  for (auto& [kind, text] : told) {
    auto line = kind + ": " + text + (site.empty() ? "" : ", at " + site);
    bool known = std::find(all.reports.begin(), all.reports.end(), line) != all.reports.end();
    if (all.reports.size() < kMost) all.reports.push_back(line);
    if (!known && !all.file.empty()) write_line(all.file, line);
  }
}

}  // namespace

Lock::Lock() {
  mutex().lock();
  depth++;
}

Lock::~Lock() {
  std::vector<std::pair<std::string, std::string>> told;
  if (--depth == 0) told.swap(pending);
  mutex().unlock();
  if (!told.empty()) publish(told);
}

void report(const std::string& kind, const std::string& text) { pending.emplace_back(kind, text); }

void set_report_file(const std::string& path) {
  std::lock_guard lock(published().mutex);
  published().file = path;
}

void set_call_site(std::function<std::string()> found) { published().call_site = std::move(found); }

std::vector<std::string> reports() {
  std::lock_guard lock(published().mutex);
  return published().reports;
}

void count(const std::string& what, int64_t amount) {
  std::lock_guard lock(published().mutex);
  published().counts[what] += amount;
}

std::map<std::string, int64_t> counts() {
  std::lock_guard lock(published().mutex);
  return published().counts;
}

void clear_reports() {
  std::lock_guard lock(published().mutex);
  published().reports.clear();
  published().counts.clear();
}

}  // namespace pretend
