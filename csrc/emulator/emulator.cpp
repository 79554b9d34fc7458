// The emulator: fibers, the schedule, barriers, operations of a warp, and what may be done to shared memory.

#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>

#include "context.h"
#include "control.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// With FASTGPT_TSAN this file, itself not instrumented, tells ThreadSanitizer who is who: a CUDA thread is a fiber of
// its own, ordered with others by the barriers alone, not by what the emulator does between them. Then a race on global
// memory, within a block or between blocks, is reported wherever the accesses lie. (Shared memory is hidden from it:
// check_shared knows better.)
#ifdef FASTGPT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read16(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}
#endif

namespace fastgpt::emulator {

thread_local Thread* current = nullptr;

namespace {

// While it lives, ThreadSanitizer sees nothing of what this CUDA thread reads and writes.
struct Unseen {
#ifdef FASTGPT_TSAN
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// While it lives, ThreadSanitizer does not take the locks of this CUDA thread for an order among CUDA threads.
struct Unordered {
#ifdef FASTGPT_TSAN
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
#else
  Unordered() {}
#endif
  Unordered(const Unordered&) = delete;
  Unordered& operator=(const Unordered&) = delete;
};

// "Everything before release(tag) happened before what follows acquire(tag)", for ThreadSanitizer.
void acquire([[maybe_unused]] void* tag) {
#ifdef FASTGPT_TSAN
  __tsan_acquire(tag);
#endif
}
void release([[maybe_unused]] void* tag) {
#ifdef FASTGPT_TSAN
  __tsan_release(tag);
#endif
}

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // what sm_90 lets a block have
constexpr size_t kMaxStaticBytes = 48 << 10;   // of it in arrays, not in what the launch states
constexpr int kMaxThreads = 1024;
constexpr unsigned kMostWorkers = 16;  // at a time: the stacks of 16 largest blocks are half of what Linux lets one map
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kBarriers = 16;
constexpr int kMaxMbarriers = 32;
constexpr uint32_t kDynamicAddress = 1024;  // where Hopper's instructions find the dynamic shared memory
constexpr int kMaxCount = (1 << 20) - 1;    // of an mbarrier's arrivals, and of its bytes

// ---- places in kernels ----

// A place's number. 0 is no place.
using SiteId = uint16_t;

struct KnownSite {
  Site site;
  std::atomic<const char*> waits{nullptr};  // what waits there, if anything does
  std::atomic<bool> off{false};
};

constexpr int kMaxSites = 1 << 14;
std::array<KnownSite, kMaxSites> known_sites;
std::atomic<int> known_count{1};
std::mutex sites_mutex;

SiteId find_site(Site site) {
  const Unordered unordered;
  std::lock_guard<std::mutex> lock(sites_mutex);
  const int count = known_count;
  for (int i = 1; i < count; ++i) {
    const Site& other = known_sites[i].site;
    if (other.line == site.line && (other.file == site.file || strcmp(other.file, site.file) == 0)) return i;
  }
  if (count == kMaxSites) throw Error("the emulator knows at most 16383 places in kernels");
  known_sites[count].site = site;
  known_count = count + 1;
  return static_cast<SiteId>(count);
}

SiteId id_of(Site site) {
  struct Slot {
    Site site{nullptr, 0};
    SiteId id = 0;
  };
  thread_local std::array<Slot, 1024> recent;
  Slot& slot = recent[(reinterpret_cast<uintptr_t>(site.file) / 8 + site.line) % recent.size()];
  if (slot.site.file != site.file || slot.site.line != site.line) slot = {site, find_site(site)};
  return slot.id;
}

// Whether that wait was switched off; makes it known.
bool is_off(Site site, const char* name) {
  KnownSite& known = known_sites[id_of(site)];
  known.waits.store(name, std::memory_order_relaxed);
  return known.off.load(std::memory_order_relaxed);
}

const char* base_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

std::string format_message(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) std::string formatted(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_message(format, arguments);
  va_end(arguments);
  return text;
}

std::string place(Site site) { return formatted("%s:%d", base_name(site.file), site.line); }
std::string place(SiteId id) { return place(known_sites[id].site); }

// ---- fibers ----

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
  SiteId site;
};

// By warp, how much of its past lies behind somebody; after the warps, how many phases of each mbarrier, whose copies
// are ordered as if a warp of their own made them.
using Past = std::array<uint32_t, kMaxWarps + kMaxMbarriers>;

void absorb(Past& past, const Past& other) {
  for (size_t i = 0; i < past.size(); ++i) past[i] = std::max(past[i], other[i]);
}

enum class State { ready, at_barrier, at_mbarrier, in_collective, done };

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;  // above a page that may not be touched
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::done;
  const char* waits_in = "";
  Site waits_at{"", 0};
  int barrier = 0;
  Past learnt{};  // at mbarriers, since the warp last met; only where its bit in the warp's `learnt` is set
  uint32_t priority = 0;
  std::vector<Copy> copies;  // in flight
  int group = 0;             // of the copies that no commit has closed yet
  void* sanitizer = nullptr;
};

struct Collective {
  unsigned mask, arrived;
  const char* name;
  Site site;
  void (*compute)(Lanes&, unsigned);
};

// One warp's access to shared memory, as its lanes come to it.
struct Request {
  unsigned mask = 0;
  uint32_t bytes = 0;
  std::array<uint32_t, 32> address{};
};
struct Requests {
  std::vector<Request> open;
  std::array<uint16_t, 32> next{};
};

// One warp's access to global memory, as its lanes come to it: the sectors that it touches.
using Sectors = std::vector<uintptr_t>;
struct MemoryRequests {
  std::vector<Sectors> open;
  std::array<uint32_t, 32> next{};
};
constexpr uintptr_t kSectorBytes = 32;

// A wgmma that has been started, and not waited for.
struct Pending {
  Product product;  // the first lane's
  const char* name;
  SiteId site;
  int group;
  Past known;  // to the warp when it started
  std::array<float (*)[4], 32> d;
  std::array<std::array<uint32_t, 4>, 32> a_elements;
  std::vector<float> before;  // d, by lane, while NaN is in its place
};

struct Warp {
  int number = 0;
  unsigned exists = 0, live = 0;
  Fiber* lane[32] = {};
  std::vector<Collective> pending;
  Lanes lanes;
  // Accesses are stamped with the clock, which moves on where the warp meets (at a barrier, __syncwarp or wgmma_wait),
  // or where those lanes that made them have arrived at an mbarrier. A barrier makes the past of all who meet there
  // one.
  uint32_t clock = 0;
  unsigned accessed = 0, learnt = 0;  // lanes that did so at this clock, and since the warp last met
  Past knows{};
  std::deque<Pending> products;  // in flight
  bool fenced = false;
  int group = 0;       // of the products that no commit has closed yet
  size_t started = 0;  // products, of those of its warpgroup
  std::unordered_map<SiteId, Requests> requests;
  std::unordered_map<SiteId, MemoryRequests> memory[2];  // loads and stores, which may share a line of the source
  char sanitizer_tag = 0;
};

struct Barrier {
  int arrived = 0, count = 0, first = 0;
  std::array<unsigned, kMaxWarps> here{};  // lanes, by warp
  const char* name = "";
  Site site{"", 0};
  char sanitizer_tag[2];
  unsigned generation = 0;
};

// A copy of TMA that nobody has waited for.
struct BoxCopy {
  unsigned char* to;
  Box from;
  uint32_t phase;
  bool landed;
  int thread;
  SiteId site;
};

struct Mbarrier {
  const void* address;
  int number;
  int thread;  // that made it
  SiteId site;
  int arrivals, lacks;
  int64_t lacks_bytes = 0;  // less than none where more have landed than were announced
  uint32_t phases = 0;      // that have ended
  bool fenced = false;
  Past gathering{}, released{};              // of those who arrived, and at the last phase's end
  std::array<unsigned, kMaxWarps> here{};    // lanes that have arrived in this phase, by warp,
  std::array<uint32_t, kMaxWarps> clocks{};  // at this clock of the warp
  std::vector<BoxCopy> copies;
  char sanitizer_tag[2];
};

// What all four warps of a warpgroup have to start alike.
struct Started {
  uint64_t a, b;
  bool add;
  SiteId site;
  int warp;
};

// An access that other threads' accesses are compared with. Threads beyond a block's largest are mbarriers' copies.
struct Stamp {
  uint16_t thread;
  SiteId site;
  uint32_t clock;
};

// Two bytes of shared memory. Of several reads that nothing orders, two suffice, of different warps: a write that
// conflicts with any of the others conflicts with one of these. (Not where a named barrier or an mbarrier orders the
// writer with these two and not with the others; that race goes by unseen.)
struct Cell {
  uint32_t run = 0;  // of the block that the rest is about
  bool in_flight = false;
  Stamp write{}, reads[2]{};
};

// A stretch of global memory.
struct Memory {
  uintptr_t begin;
  size_t bytes;
  std::string name;
};
std::vector<Memory> known_memory();

struct Array {
  const void* tag = nullptr;
  unsigned char* data = nullptr;
  size_t bytes = 0;
  std::vector<Cell> cells;
};

Fiber& self() { return *static_cast<Fiber*>(current); }

std::string coordinates(const uint3& at) { return formatted("(%u, %u, %u)", at.x, at.y, at.z); }

const char* name_of(Order order) {
  switch (order) {
    case Order::in_order:
      return "in_order";
    case Order::reversed:
      return "reversed";
    case Order::random:
      return "random";
    case Order::skewed:
      return "skewed";
  }
  return "";
}

[[noreturn]] void throw_error(const Fiber& fiber, Site site, const std::string& what);
// fail() in the name of another thread.
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail_as(const Fiber& fiber, Site site, const char* format,
                                                                ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string what = format_message(format, arguments);
  va_end(arguments);
  throw_error(fiber, site, what);
}

std::string too_much(size_t bytes, size_t most) {
  return formatted("%zu bytes of shared memory are more than a block can have%s (%zu)", bytes,
                   most == kMaxStaticBytes ? " in arrays" : "", most);
}

// ---- a block: one OS thread works through the blocks of a grid with one of these ----

constexpr char kDynamicTag = 0;
constexpr unsigned kAllLanes = ~0u;
struct Nothing {};

struct Block {
  std::string kernel;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  dim3 grid, size;
  uint3 index{};
  Settings settings;
  Counters counters;
  std::vector<Memory> memory;

  int threads = 0, live = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Fiber*> ready;
  size_t head = 0;
  Barrier barriers[kBarriers];
  std::deque<Mbarrier> mbarriers;
  std::array<std::vector<Started>, kMaxWarps / 4> products;  // by warpgroup
  std::vector<Array> arrays;
  size_t dynamic_bytes = 0, dynamic_alignment = 0;
  uint32_t run = 0;
  std::mt19937_64 random;
  std::exception_ptr error;
  Fiber outside;  // the OS thread's own stack
  char sanitizer_begin = 0, sanitizer_end = 0;

  ~Block() {
    for (auto& fiber : fibers) {
      munmap(fiber->stack - page_size(), kStackBytes + page_size());
#ifdef FASTGPT_TSAN
      __tsan_destroy_fiber(fiber->sanitizer);
#endif
    }
    forget_arrays();
  }

  static size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  void forget_arrays() {
    for (Array& array : arrays) free(array.data);
    arrays.clear();
  }

  void prepare(const std::string& name, dim3 grid_size, dim3 block_size, size_t shared_bytes, void (*run_thread)(void*),
               void* run_context) {
    kernel = name;
    grid = grid_size;
    size = block_size;
    body = run_thread;
    context = run_context;
    settings = emulator::settings();
    counters = {};
    memory = known_memory();
    error = nullptr;
    threads = static_cast<int>(size.x * size.y * size.z);
    while (fibers.size() < static_cast<size_t>(threads)) add_fiber();
    while (warps.size() * 32 < static_cast<size_t>(threads)) {
      warps.push_back(std::make_unique<Warp>());
      warps.back()->number = static_cast<int>(warps.size()) - 1;
    }
    for (auto& warp : warps) warp->exists = 0;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[i];
      const unsigned at = static_cast<unsigned>(i);
      fiber.index = {at % size.x, at / size.x % size.y, at / size.x / size.y};
      fiber.linear = i;
      fiber.lane = i % 32;
      fiber.warp = warps[i / 32].get();
      fiber.warp->lane[i % 32] = &fiber;
      fiber.warp->exists |= 1u << i % 32;
      fiber.block_index = &index;
      fiber.block_dim = &size;
      fiber.grid_dim = &grid;
    }
    forget_arrays();
    dynamic_bytes = shared_bytes;
    if (shared_bytes) add_array(&kDynamicTag, shared_bytes);
    release(&sanitizer_begin);
  }

  void add_fiber() {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, kStackBytes + page_size(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page_size(), PROT_NONE) != 0) {
      throw Error(
          "the emulator has no memory for the stacks of a block's threads: each takes two of the "
          "vm.max_map_count mappings that a process may have");
    }
    fiber->stack = static_cast<char*>(memory) + page_size();
    fiber->block = this;
#ifdef FASTGPT_TSAN
    fiber->sanitizer = __tsan_create_fiber(0);
#endif
    fibers.push_back(std::move(fiber));
  }

  // -- running

  void run_block(uint3 block_index, uint64_t seed) {
    index = block_index;
    ++run;
    live = threads;
    ready.clear();
    head = 0;
    random.seed(seed);
    for (Array& array : arrays) memset(array.data, 0xff, array.bytes);  // NaN in every dtype
    for (Barrier& barrier : barriers) barrier = {};
    dynamic_alignment = 0;
    mbarriers.clear();
    for (auto& started : products) started.clear();
    std::array<uint32_t, kMaxWarps> priority;
    for (uint32_t& p : priority) p = random() % 1000;
    for (auto& warp : warps) {
      warp->live = warp->exists;
      warp->pending.clear();
      warp->requests.clear();
      forget_memory_requests(*warp);
      warp->knows.fill(0);
      warp->knows[warp->number] = warp->clock = 1;
      warp->accessed = warp->learnt = 0;
      warp->products.clear();
      warp->fenced = false;
      warp->group = 0;
      warp->started = 0;
    }
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[settings.order == Order::reversed ? threads - 1 - i : i];
      fiber.priority = priority[fiber.linear / 32] * 64 + random() % 64;
      fiber.copies.clear();
      fiber.group = 0;
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // an error may have left frames behind
      fiber.sanitizer = nullptr;
#endif
      make_context(fiber.context, fiber.stack, kStackBytes, &Block::enter);
      wake(fiber);
    }
    outside.block = this;
#ifdef FASTGPT_TSAN
    outside.sanitizer = __tsan_get_current_fiber();
#endif
    Thread* before = current;
    current = &outside;
    switch_to(*pick());
    current = before;
    for (auto& warp : warps) close_requests(*warp);
    ++counters.blocks;
    if (error) std::rethrow_exception(error);
  }

  // The first function on a fiber's stack. It never returns: the thread's end switches away from it.
  static void enter() {
    landed();
    Fiber& fiber = self();
    Block& block = *fiber.block;
    acquire(&block.sanitizer_begin);
    try {
      block.body(block.context);
      require_landed(fiber);
      if (block.live == 1) block.require_over();
    } catch (...) {
      block.error = std::current_exception();
    }
    release(&block.sanitizer_end);
    block.leave(fiber);
  }

  // A block's shared memory is another's when it has ended, and what lands there then lands in that one's.
  static void require_landed(const Fiber& fiber) {
    if (!fiber.copies.empty()) {
      fail(known_sites[fiber.copies.front().site].site,
           "cp_async_16: the thread leaves the kernel, and this asynchronous copy has not been waited for");
    }
    if (!fiber.warp->products.empty()) {
      const Pending& first = fiber.warp->products.front();
      fail(known_sites[first.site].site, "%s: the warp leaves the kernel, and this product has not been waited for",
           first.name);
    }
  }

  // What has to be so when the last thread leaves.
  void require_over() {
    for (const Mbarrier& bar : mbarriers) {
      if (bar.copies.empty()) continue;
      const BoxCopy& copy = bar.copies.front();
      fail_as(*fibers[copy.thread], known_sites[copy.site].site,
              "tma_load: the block ends, and nobody has waited for this copy");
    }
    for (int i = 0; i < threads / 32; ++i) {
      const std::vector<Started>& all = products[i / 4];
      if (warps[i]->started == all.size()) continue;
      const Started& missed = all[warps[i]->started];
      fail_as(*warps[missed.warp]->lane[0], known_sites[missed.site].site,
              "wgmma: warp %d of the warpgroup has started this product, and warp %d leaves without", missed.warp, i);
    }
  }

  void leave(Fiber& fiber) {
    {
      const Unseen unseen;
      retire(fiber);
    }
    Fiber* next = error || live == 0 ? nullptr : pick();
    switch_to(next ? *next : outside);
    __builtin_unreachable();
  }

  // The thread has come to its end: who waits for it is told, or goes on.
  void retire(Fiber& fiber) {
    fiber.state = State::done;
    --live;
    fiber.warp->live &= ~(1u << fiber.lane);
    if (error || live == 0) return;
    try {
      for (const Collective& pending : fiber.warp->pending) require_lanes(*fiber.warp, pending);
      for (int id = 0; id < kBarriers; ++id) complete(id);
      if (head == ready.size()) fail_deadlock();
    } catch (...) {
      error = std::current_exception();
    }
  }

  void wake(Fiber& fiber) {
    fiber.state = State::ready;
    ready.push_back(&fiber);
  }

  Fiber* pick() {
    if (head == ready.size()) {
      ready.clear();
      head = 0;
      return nullptr;
    }
    size_t choice = head;
    if (settings.order == Order::random) {
      choice += random() % (ready.size() - head);
    } else if (settings.order == Order::skewed) {
      for (size_t i = head; i < ready.size(); ++i) {
        if (ready[i]->priority > ready[choice]->priority) choice = i;
      }
    }
    std::swap(ready[head], ready[choice]);
    Fiber* fiber = ready[head++];
    if (settings.order == Order::skewed && random() % 1024 == 0) {  // now another warp may lead
      const uint32_t priority = random() % 1000;
      for (Fiber* lane : fiber->warp->lane) {
        if (lane) lane->priority = priority * 64 + lane->priority % 64;
      }
    }
    if (head >= 4096) {
      ready.erase(ready.begin(), ready.begin() + static_cast<ptrdiff_t>(head));
      head = 0;
    }
    return fiber;
  }

  // Whether the thread that completes a barrier queues behind those it wakes.
  bool yields() const { return settings.order != Order::in_order; }

  void wait(Fiber& fiber, State state, const char* name, Site site) {
    fiber.state = state;
    fiber.waits_in = name;
    fiber.waits_at = site;
  }

  void yield() {
    Fiber* next = pick();
    if (next == nullptr) fail_deadlock();
    if (next != current) switch_to(*next);
  }

  void switch_to(Fiber& to) {
    Fiber& from = self();
    current = &to;
#ifdef __SANITIZE_ADDRESS__
    const bool gone = from.state == State::done && &from != &outside;
    __sanitizer_start_switch_fiber(gone ? nullptr : &from.sanitizer, to.stack ? to.stack : outside_bottom,
                                   to.stack ? kStackBytes : outside_size);
#endif
#ifdef FASTGPT_TSAN
    __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(from.context, to.context);
    landed();
  }

  static void landed() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(self().sanitizer, &bottom, &size);
    Block& block = *self().block;
    if (block.outside_bottom == nullptr) {  // the first switch of all comes from the OS thread's stack
      block.outside_bottom = bottom;
      block.outside_size = size;
    }
#endif
  }
  const void* outside_bottom = nullptr;
  size_t outside_size = 0;

  // -- barriers

  void arrive(int id, int count, const char* name, Site site) {
    Fiber& fiber = self();
    Barrier& barrier = barriers[id];
    if (id == 0 && barrier.arrived && (barrier.site.line != site.line || strcmp(barrier.site.file, site.file) != 0)) {
      fail(site, "divergent barrier: %s is reached here, while thread %d waits at %s", name, barrier.first,
           place(barrier.site).c_str());
    }
    if (barrier.arrived && barrier.count != count) {
      fail(site, "%s: thread %d waits here for %d threads, this one for %d", name, barrier.first, barrier.count, count);
    }
    if (!barrier.arrived) {
      barrier.first = fiber.linear;
      barrier.name = name;
      barrier.site = site;
      barrier.count = count;
    }
    ++barrier.arrived;
    barrier.here[fiber.warp->number] |= 1u << fiber.lane;
    fiber.barrier = id;
    wait(fiber, State::at_barrier, name, site);
    char* tag = &barrier.sanitizer_tag[barrier.generation % 2];  // who is fast may come to the next one early
    release(tag);
    if (!complete(id) || yields()) yield();
    fiber.state = State::ready;
    acquire(tag);
  }

  bool complete(int id) {
    Barrier& barrier = barriers[id];
    if (barrier.arrived == 0) return false;
    const auto is_whole = [&](const Warp& warp) { return (barrier.here[warp.number] & warp.live) == warp.live; };
    if (barrier.count == 0) {
      if (barrier.arrived < live) return false;
    } else {  // a GPU counts warps where it is told of threads
      int whole = 0;
      for (const auto& warp : warps) whole += barrier.here[warp->number] != 0 && is_whole(*warp) ? 32 : 0;
      if (whole < barrier.count) return false;
    }
    ++barrier.generation;
    ++counters.barriers;
    std::array<bool, kMaxWarps> met{};
    Past past{};
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[settings.order == Order::reversed ? threads - 1 - i : i];
      if (fiber.state != State::at_barrier || fiber.barrier != id || !is_whole(*fiber.warp)) continue;
      met[fiber.linear / 32] = true;
      --barrier.arrived;
      if (&fiber != current || yields()) wake(fiber);
    }
    for (auto& warp : warps) {
      if (!met[warp->number]) continue;
      barrier.here[warp->number] = 0;
      meet(*warp);
      forget_memory_requests(*warp);
      absorb(past, warp->knows);
    }
    for (auto& warp : warps) {
      if (met[warp->number]) warp->knows = past;
    }
    return true;
  }

  // The pasts of the warp's lanes become one.
  void meet(Warp& warp) {
    close_requests(warp);
    for (int lane = 0; lane < 32; ++lane) {
      if (warp.learnt >> lane & 1) absorb(warp.knows, warp.lane[lane]->learnt);
    }
    warp.learnt = warp.accessed = 0;
    warp.knows[warp.number] = ++warp.clock;
  }

  // -- mbarriers

  void init_mbarrier(void* address, int arrivals, Site site) {
    Fiber& fiber = self();
    check_cells(address, 8, Access::write, "mbar_init", site);
    if (arrivals < 1 || arrivals > kMaxCount) {
      fail(site, "mbar_init: a phase has 1 to %d arrivals, not %d", kMaxCount, arrivals);
    }
    for (const Mbarrier& bar : mbarriers) {
      if (bar.address == address) {
        fail(site, "mbar_init: thread %d has made this mbarrier at %s already", bar.thread, place(bar.site).c_str());
      }
    }
    const int number = static_cast<int>(mbarriers.size());
    if (number == kMaxMbarriers) fail(site, "mbar_init: the emulator takes at most %d mbarriers", kMaxMbarriers);
    Mbarrier& bar = mbarriers.emplace_back();
    bar.address = address;
    bar.number = number;
    bar.thread = fiber.linear;
    bar.site = id_of(site);
    bar.arrivals = bar.lacks = arrivals;
  }

  Mbarrier& mbarrier_at(const void* address, const char* name, Site site) {
    for (Mbarrier& bar : mbarriers) {
      if (bar.address != address) continue;
      check_cells(address, 8, Access::read, name, site);
      return bar;
    }
    fail(site, "%s: no thread has initialised this mbarrier", name);
  }

  void arrive_at_mbarrier(const void* address, int bytes, const char* name, Site site) {
    Fiber& fiber = self();
    Warp& warp = *fiber.warp;
    Mbarrier& bar = mbarrier_at(address, name, site);
    if (bar.lacks == 0) fail(site, "%s: this phase of the mbarrier has had all its arrivals (%d)", name, bar.arrivals);
    if (bytes < 0 || bytes > kMaxCount || bar.lacks_bytes + bytes > kMaxCount) {
      fail(site, "%s: an mbarrier cannot wait for more than %d bytes, or for less than none", name, kMaxCount);
    }
    unsigned& here = bar.here[warp.number];
    uint32_t& clock = bar.clocks[warp.number];
    if (clock != warp.clock) here = 0;
    clock = warp.clock;
    here |= 1u << fiber.lane;
    // The accesses at this clock are part of what the barrier orders where all that made them have arrived.
    if (warp.accessed && !(warp.accessed & ~here)) {
      Past own{};
      own[warp.number] = ++warp.clock;
      warp.accessed = 0;
      learn(fiber, own);
    }
    absorb(bar.gathering, warp.knows);
    if (warp.learnt >> fiber.lane & 1) absorb(bar.gathering, fiber.learnt);
    release(&bar.sanitizer_tag[bar.phases % 2]);
    --bar.lacks;
    bar.lacks_bytes += bytes;
    end_phase(bar);
  }

  static void learn(Fiber& fiber, const Past& past) {
    unsigned& learnt = fiber.warp->learnt;
    if (!(learnt >> fiber.lane & 1)) fiber.learnt = {};
    learnt |= 1u << fiber.lane;
    absorb(fiber.learnt, past);
  }

  void end_phase(Mbarrier& bar) {
    if (bar.lacks != 0 || bar.lacks_bytes != 0) return;
    for (const BoxCopy& copy : bar.copies) {
      if (!copy.landed) {
        fail(known_sites[copy.site].site,
             "tma_load: the phase of its mbarrier ends before this copy has landed, whose bytes nobody has announced");
      }
    }
    bar.gathering[kMaxWarps + bar.number] = ++bar.phases;
    bar.released = bar.gathering;
    bar.here.fill(0);
    bar.lacks = bar.arrivals;
    wake_waiters(bar);
  }

  void wake_waiters(const Mbarrier& bar) {
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[settings.order == Order::reversed ? threads - 1 - i : i];
      if (fiber.state == State::at_mbarrier && fiber.barrier == bar.number) wake(fiber);
    }
  }

  void wait_for_mbarrier(const void* address, int parity, Site site) {
    Fiber& fiber = self();
    Mbarrier& bar = mbarrier_at(address, "mbar_wait", site);
    if (parity != 0 && parity != 1) fail(site, "mbar_wait: a parity is 0 or 1, not %d", parity);
    while (static_cast<int>(bar.phases % 2) == parity) {
      if (land_boxes(bar)) continue;
      fiber.barrier = bar.number;
      wait(fiber, State::at_mbarrier, "mbar_wait", site);
      yield();
      fiber.state = State::ready;
    }
    acquire(&bar.sanitizer_tag[parity]);
    learn(fiber, bar.released);
    bar.copies.erase(std::remove_if(bar.copies.begin(), bar.copies.end(),
                                    [&](const BoxCopy& copy) { return copy.phase < bar.phases; }),
                     bar.copies.end());
  }

  // "3 arrivals and 128 bytes"
  static std::string what_lacks(const Mbarrier& bar) {
    std::string text;
    if (bar.lacks) text = formatted(bar.lacks == 1 ? "%d arrival" : "%d arrivals", bar.lacks);
    if (bar.lacks && bar.lacks_bytes) text += " and ";
    if (bar.lacks_bytes < 0) text += "the announcement of ";
    if (bar.lacks_bytes) text += formatted("%lld bytes", std::abs(static_cast<long long>(bar.lacks_bytes)));
    return text;
  }

  // -- copies of TMA

  void load_box(void* to, const Box& from, const void* address, Site site) {
    Fiber& fiber = self();
    const char* name = "tma_load";
    Mbarrier& bar = mbarrier_at(address, name, site);
    if (!bar.fenced) {
      fail(site, "tma_load: no mbar_fence_init of thread %d has followed its mbar_init at %s", bar.thread,
           place(bar.site).c_str());
    }
    const uint32_t bytes = static_cast<uint32_t>(from.rows) * 128, at = address_of(to, name, site) - kDynamicAddress;
    if (at % 1024 != 0) {
      fail(site, "tma_load: its destination is no multiple of 1024 bytes from the begin of shared memory");
    }
    if (dynamic_alignment < 1024) {
      fail(
          site,
          "tma_load: the kernel's DYNAMIC_SHARED is aligned to %zu bytes, and TMA needs DYNAMIC_SHARED_ALIGNED to 1024",
          dynamic_alignment);
    }
    if (at + bytes > dynamic_bytes) {
      fail(site, "tma_load: a box of %u bytes at byte %u of the %zu of the dynamic shared memory", bytes, at,
           dynamic_bytes);
    }
    auto* begin = static_cast<unsigned char*>(to);
    const Stamp landing{static_cast<uint16_t>((kMaxWarps + bar.number) * 32), id_of(site), bar.phases};
    for (int i = 0; i < from.rows * 8; ++i) {
      Cell* cell = check_cells(begin + 16 * i, 16, Access::write, name, site);
      for (int j = 0; j < 8; ++j) cell[j].write = landing;
    }
    ++counters.copies;
    if (settings.count_memory) note_box(from);
    bar.copies.push_back({begin, from, bar.phases, false, fiber.linear, id_of(site)});
    if (settings.lazy_copies) {
      memset(to, 0xff, bytes);
      wake_waiters(bar);
    } else {
      land_boxes(bar);
    }
  }

  // Whether anything was there to land.
  bool land_boxes(Mbarrier& bar) {
    bool any = false;
    for (BoxCopy& copy : bar.copies) {
      if (copy.landed) continue;
      for (int row = 0; row < copy.from.rows; ++row) land_row(copy, row);
      copy.landed = any = true;
      bar.lacks_bytes -= copy.from.rows * 128;
    }
    if (any) end_phase(bar);
    return any;
  }

  static void land_row(const BoxCopy& copy, int row) {
    uint16_t elements[64] = {};
    int first, count;
    if (const uint16_t* from = row_of(copy.from, row, first, count)) {
      for (int i = 0; i < count; ++i) elements[first + i] = from[i];
    }
    for (int chunk = 0; chunk < 8; ++chunk) {
      __builtin_memcpy(copy.to + 128 * row + 16 * (chunk ^ row % 8), elements + 8 * chunk, 16);
    }
  }

  // Of the box's row the elements that are within the tensor: where they are, which is the first, and how many; or
  // null.
  static const uint16_t* row_of(const Box& box, int row, int& first, int& count) {
    const int64_t at[4] = {0, box.at[1] + row, box.at[2], box.at[3]};
    const auto* from = static_cast<const uint16_t*>(box.data);
    for (int i = 1; i < 4; ++i) {
      if (at[i] < 0 || at[i] >= box.size[i]) return nullptr;
      from += at[i] * box.strides[i - 1];
    }
    first = static_cast<int>(std::clamp<int64_t>(-box.at[0], 0, 64));
    count = static_cast<int>(std::clamp<int64_t>(box.size[0] - box.at[0], 0, 64)) - first;
    return count > 0 ? from + box.at[0] + first : nullptr;
  }

  // -- products of a warpgroup

  // A matrix in shared memory by PTX's descriptor, swizzled by 128 bytes.
  struct Tile {
    uint32_t address, columns, rows;  // how far apart each 64 columns and each eight rows of 128 bytes are

    // Of 16 bytes within the row of 128.
    uint32_t chunk(int row, int at) const {
      const uint32_t plain = address + static_cast<uint32_t>(row / 8) * rows + static_cast<uint32_t>(row % 8) * 128 +
                             static_cast<uint32_t>(at / 8) * columns + static_cast<uint32_t>(at % 8) * 16;
      return plain ^ (plain >> 7 & 7) << 4;
    }
  };

  static Tile tile_of(uint64_t descriptor, const char* name, Site site) {
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    // All other bits have to be 0 but for bit 62: the swizzle of 128 bytes.
    if ((descriptor & ~(uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32)) != uint64_t{1} << 62) {
      fail(site, "%s: %016llx does not describe a matrix swizzled by 128 bytes", name,
           static_cast<unsigned long long>(descriptor));
    }
    return {field(0), field(16), field(32)};
  }

  // f(is_a, row of 128 bytes, 16 bytes of it, address) of all that this warp reads: operand a by its 16 rows, operand b
  // by column, or by row where a is in registers.
  template <class F>
  static void for_each_chunk(const Warp& warp, const Product& x, const char* name, Site site, F f) {
    if (!x.a_in_registers) {
      const Tile a = tile_of(x.a, name, site);
      for (int row = 0; row < 16; ++row) {
        for (int at = 0; at < 2; ++at) f(true, row, at, a.chunk(warp.number % 4 * 16 + row, at));
      }
    }
    const Tile b = tile_of(x.b, name, site);
    const int rows = x.a_in_registers ? 16 : x.n, chunks = x.a_in_registers ? x.n / 8 : 2;
    for (int row = 0; row < rows; ++row) {
      for (int at = 0; at < chunks; ++at) f(false, row, at, b.chunk(row, at));
    }
  }

  uint32_t address_of(const void* p, const char* name, Site site) const {
    const ptrdiff_t offset =
        static_cast<const unsigned char*>(p) - static_cast<unsigned char*>(find_array(&kDynamicTag));
    if (dynamic_bytes == 0 || offset < 0 || offset > static_cast<ptrdiff_t>(dynamic_bytes)) {
      fail(site, "%s: this is not in the dynamic shared memory", name);
    }
    return kDynamicAddress + static_cast<uint32_t>(offset);
  }

  unsigned char* at_address(uint32_t address, const char* name, Site site) const {
    if (address < kDynamicAddress || address + 16 > kDynamicAddress + dynamic_bytes) {
      fail(site, "%s: a descriptor leads to byte %lld of %zu of the dynamic shared memory", name,
           static_cast<long long>(address) - kDynamicAddress, dynamic_bytes);
    }
    return static_cast<unsigned char*>(find_array(&kDynamicTag)) + (address - kDynamicAddress);
  }

  // The warp's last lane starts it for all.
  void start_product(Lanes& lanes, const char* name, Site site) {
    Warp& warp = *self().warp;
    const Product& x = lanes.operand<Product>(0);
    for (int lane = 1; lane < 32; ++lane) {
      const Product& y = lanes.operand<Product>(lane);
      if (x.a != y.a || x.b != y.b) fail(site, "%s: lanes 0 and %d have different descriptors", name, lane);
      if (x.add != y.add) fail(site, "%s: of lanes 0 and %d only one adds", name, lane);
    }
    if (warp.number / 4 * 128 + 128 > threads) {
      fail(site, "%s: warp %d is not of four that are a warpgroup, in a block of %d threads", name, warp.number,
           threads);
    }
    if (!warp.fenced) fail(site, "%s: no wgmma_fence lies between the kernel's begin or a wgmma_wait and this", name);
    start_alike(warp, x, name, site);
    warp.products.push_back({x, name, id_of(site), warp.group, known_to_all(warp), {}, {}, {}});
    Pending& mine = warp.products.back();
    for (int lane = 0; lane < 32; ++lane) {
      const Product& y = lanes.operand<Product>(lane);
      mine.d[lane] = y.d;
      std::copy_n(y.a_elements, 4, mine.a_elements[lane].begin());
    }
    for_each_chunk(warp, x, name, site, [&](bool, int, int, uint32_t address) {
      Cell* cell = cells(at_address(address, name, site), 16, name, site);
      for (int i = 0; i < 8; ++i) {
        require_readable(cell[i], before(cell[i].write, mine.known), name, site);
        note_read(cell[i], stamp(*warp.lane[0], mine.site), *warp.lane[0]);
      }
    });
    if (!settings.lazy_copies) {
      multiply(warp, mine, site);
    } else if (std::none_of(warp.products.begin(), warp.products.end() - 1,
                            [&](const Pending& other) { return other.d[0] == mine.d[0]; })) {
      hide(mine);
    }
    counters.mma += x.n / 8;
  }

  // Holds the warps of a warpgroup to the same products.
  void start_alike(Warp& warp, const Product& x, const char* name, Site site) {
    std::vector<Started>& all = products[warp.number / 4];
    if (warp.started == all.size()) all.push_back({x.a, x.b, x.add, id_of(site), warp.number});
    const Started& first = all[warp.started++];
    if (first.a != x.a || first.b != x.b || first.add != x.add || first.site != id_of(site)) {
      fail(site, "%s: warp %d, of the same warpgroup, has started another product in this one's place, at %s", name,
           first.warp, place(first.site).c_str());
    }
  }

  // What the warp knows, and what each of its lanes has learnt for itself.
  static Past known_to_all(const Warp& warp) {
    Past known = warp.knows;
    if (warp.learnt != kAllLanes) return known;
    Past common = warp.lane[0]->learnt;
    for (const Fiber* lane : warp.lane) {
      for (size_t i = 0; i < common.size(); ++i) common[i] = std::min(common[i], lane->learnt[i]);
    }
    absorb(known, common);
    return known;
  }

  // Puts d aside, and NaN in its place, as long as the product is in flight.
  static void hide(Pending& x) {
    const size_t size = static_cast<size_t>(x.product.n) / 2;
    x.before.resize(32 * size);
    for (size_t lane = 0; lane < 32; ++lane) {
      __builtin_memcpy(&x.before[lane * size], x.d[lane], size * sizeof(float));
      __builtin_memset(x.d[lane], 0xff, size * sizeof(float));
    }
  }

  static void bring_back(Pending& x) {
    const size_t size = static_cast<size_t>(x.product.n) / 2;
    for (size_t lane = 0; lane < 32; ++lane) {
      __builtin_memcpy(x.d[lane], &x.before[lane * size], size * sizeof(float));
    }
  }

  void multiply(const Warp& warp, const Pending& p, Site site) const {
    const Product& x = p.product;
    float a[16][16], b[16][128], d[16][128];
    for_each_chunk(warp, x, p.name, site, [&](bool is_a, int row, int at, uint32_t address) {
      float wide[8];
      x.widen(reinterpret_cast<const uint16_t*>(at_address(address, p.name, site)), wide, 8);
      for (int i = 0; i < 8; ++i) {
        if (is_a) {
          a[row][8 * at + i] = wide[i];
        } else if (x.a_in_registers) {
          b[row][8 * at + i] = wide[i];
        } else {
          b[8 * at + i][row] = wide[i];
        }
      }
    });
    // Of both a and d a lane has what it has of mma_m16n8k16's.
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; x.a_in_registers && i < 4; ++i) {
        uint16_t pair[2];
        __builtin_memcpy(pair, &p.a_elements[lane][i], 4);
        x.widen(pair, &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)], 2);
      }
      for (int n = 0; n < x.n / 8; ++n) {
        for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][8 * n + 2 * t + i % 2] = x.add ? p.d[lane][n][i] : 0.0f;
      }
    }
    for (int half = 0; half < x.n; half += 64) {
      for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
          for (int n = 0; n < 64; ++n) d[m][half + n] += a[m][k] * b[k][half + n];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int n = 0; n < x.n / 8; ++n) {
        for (int i = 0; i < 4; ++i) p.d[lane][n][i] = d[lane / 4 + 8 * (i / 2)][8 * n + 2 * (lane % 4) + i % 2];
      }
    }
  }

  void finish_products(int pending, Site site) {
    Warp& warp = *self().warp;
    while (!warp.products.empty() && warp.products.front().group < warp.group - pending) {
      Pending mine = std::move(warp.products.front());
      warp.products.pop_front();
      // Until now it may have read its operands.
      for_each_chunk(warp, mine.product, mine.name, site, [&](bool, int, int, uint32_t address) {
        Cell* cell = cells(at_address(address, mine.name, site), 16, mine.name, site);
        for (int i = 0; i < 8; ++i) {
          const Stamp& write = cell[i].write;
          if (!before(write, mine.known)) {
            fail(known_sites[mine.site].site,
                 "race: %s reads shared memory until wgmma_wait, and %s at %s comes before", mine.name,
                 is_box(write) ? "tma_load" : formatted("thread %d's write", write.thread).c_str(),
                 place(write.site).c_str());
          }
          note_read(cell[i], stamp(*warp.lane[0], mine.site), *warp.lane[0]);
        }
      });
      if (!settings.lazy_copies) continue;
      bring_back(mine);
      multiply(warp, mine, site);
      for (Pending& next : warp.products) {
        if (next.d[0] != mine.d[0]) continue;
        hide(next);
        break;
      }
    }
    warp.fenced = false;
    meet(warp);
  }

  // -- operations of a warp

  void join(unsigned mask, const void* operand, size_t operand_size, void* result, size_t result_size,
            void (*compute)(Lanes&, unsigned), const char* name, Site site) {
    Fiber& fiber = self();
    Warp& warp = *fiber.warp;
    mask &= warp.exists;
    if (!(mask >> fiber.lane & 1)) fail(site, "%s: lane %d is not in its own mask %08x", name, fiber.lane, mask);
    Collective* mine = nullptr;
    for (Collective& other : warp.pending) {
      if (!(other.mask & mask)) continue;
      if (other.mask != mask || strcmp(other.name, name) != 0 || other.site.line != site.line ||
          strcmp(other.site.file, site.file) != 0) {
        fail(site,
             "mismatched operations of a warp: %s with mask %08x here, while lanes %08x are in %s with mask %08x at %s",
             name, mask, other.arrived, other.name, other.mask, place(other.site).c_str());
      }
      mine = &other;
    }
    if (mine == nullptr) {
      warp.pending.push_back({mask, 0, name, site, compute});
      mine = &warp.pending.back();
    }
    __builtin_memcpy(warp.lanes.in[fiber.lane], operand, operand_size);
    mine->arrived |= 1u << fiber.lane;
    require_lanes(warp, *mine);
    wait(fiber, State::in_collective, name, site);
    if (compute == nullptr) release(&warp.sanitizer_tag);
    if (mine->arrived == mask) {
      if (compute) {
        compute(warp.lanes, mask);
      } else {
        meet(warp);
      }
      if ((mask & warp.live) == warp.live) forget_memory_requests(warp);
      warp.pending.erase(warp.pending.begin() + (mine - warp.pending.data()));
      for (int i = 0; i < 32; ++i) {
        const int lane = settings.order == Order::reversed ? 31 - i : i;
        if (mask >> lane & 1 && (lane != fiber.lane || yields())) wake(*warp.lane[lane]);
      }
      if (yields()) yield();
    } else {
      yield();
    }
    fiber.state = State::ready;
    if (compute == nullptr) acquire(&warp.sanitizer_tag);
    __builtin_memcpy(result, warp.lanes.out[fiber.lane], result_size);
  }

  void require_lanes(const Warp& warp, const Collective& pending) {
    if (const unsigned gone = pending.mask & ~warp.live) {
      fail_as(*warp.lane[__builtin_ctz(pending.arrived)], pending.site,
              "%s waits for lanes %08x, which have left the kernel", pending.name, gone);
    }
  }

  [[noreturn]] void fail_deadlock() {
    std::string waiting;
    for (int first = 0; first < threads;) {
      const Fiber& fiber = *fibers[first];
      int last = first;
      while (last + 1 < threads && fibers[last + 1]->state == fiber.state &&
             (fiber.state == State::done || (fibers[last + 1]->waits_at.line == fiber.waits_at.line &&
                                             fibers[last + 1]->waits_at.file == fiber.waits_at.file)) &&
             (fiber.state != State::at_mbarrier || fibers[last + 1]->barrier == fiber.barrier)) {
        ++last;
      }
      if (waiting.size() < 600) {
        waiting += formatted("; threads %d to %d ", first, last);
        waiting += fiber.state == State::done
                       ? "have left"
                       : formatted("wait in %s at %s", fiber.waits_in, place(fiber.waits_at).c_str());
        if (fiber.state == State::at_mbarrier) {
          waiting += " for " + what_lacks(mbarriers[static_cast<size_t>(fiber.barrier)]);
        }
      }
      first = last + 1;
    }
    int first = 0;
    while (fibers[first]->state == State::done) ++first;
    fail_as(*fibers[first], fibers[first]->waits_at, "deadlock: no thread of the block can go on%s", waiting.c_str());
  }

  // -- shared memory

  void* find_array(const void* tag) const {
    for (const Array& array : arrays) {
      if (array.tag == tag) return array.data;
    }
    return nullptr;
  }

  // The array of SHARED; the first thread that comes there makes it.
  void* array_of(const void* tag, size_t bytes, Site site) {
    if (void* data = find_array(tag)) return data;
    size_t total = bytes;
    for (const Array& array : arrays) total += array.bytes;
    const size_t in_arrays = total - dynamic_bytes;
    if (in_arrays > kMaxStaticBytes) fail(site, "SHARED: %s", too_much(in_arrays, kMaxStaticBytes).c_str());
    if (total > kMaxSharedBytes) fail(site, "SHARED: %s", too_much(total, kMaxSharedBytes).c_str());
    return add_array(tag, bytes);
  }

  void* add_array(const void* tag, size_t bytes) {
    // Of exact size, and each on its own: AddressSanitizer sees what goes beyond.
    Array array{tag, nullptr, bytes, std::vector<Cell>((bytes + 1) / 2)};
    void* data = nullptr;
    if (posix_memalign(&data, 1024, bytes) != 0) throw Error("the emulator has no memory for a block's shared memory");
    array.data = static_cast<unsigned char*>(data);
    memset(array.data, 0xff, bytes);
    arrays.push_back(std::move(array));
    return data;
  }

  static bool before(const Stamp& stamp, const Past& past) {
    return stamp.site == 0 || past[stamp.thread / 32] > stamp.clock;
  }

  static bool ordered(const Stamp& stamp, const Fiber& fiber) {
    const Warp& warp = *fiber.warp;
    return stamp.thread == fiber.linear || before(stamp, warp.knows) ||
           (warp.learnt >> fiber.lane & 1 && before(stamp, fiber.learnt));
  }

  static Stamp stamp(const Fiber& fiber, SiteId site) {
    return {static_cast<uint16_t>(fiber.linear), site, fiber.warp->clock};
  }

  static bool is_box(const Stamp& stamp) { return stamp.thread >= kMaxThreads; }

  // The cells of [p, p + bytes), those of earlier blocks wiped.
  Cell* cells(const void* p, size_t bytes, const char* name, Site site) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
      fail(site, "%s: %zu bytes at an address that is not a multiple of %zu", name, bytes, bytes);
    }
    for (Array& array : arrays) {
      if (at < array.data || at >= array.data + array.bytes) continue;
      const size_t offset = static_cast<size_t>(at - array.data);
      if (offset + bytes > array.bytes) break;
      Cell* first = &array.cells[offset / 2];
      for (size_t i = 0; i < (bytes + 1) / 2; ++i) {
        if (first[i].run != run) {
          first[i] = {};
          first[i].run = run;
        }
      }
      return first;
    }
    std::string nearest;
    if (dynamic_bytes == 0 && reinterpret_cast<uintptr_t>(p) < kMaxSharedBytes) {  // DYNAMIC_SHARED gave null
      nearest = " (the launch asked for no dynamic shared memory)";
    }
    for (const Array& array : arrays) {
      const ptrdiff_t offset = at - array.data;
      if (offset >= -4096 && offset < static_cast<ptrdiff_t>(array.bytes) + 4096) {
        nearest = formatted(" (at byte %td of an array of %zu)", offset, array.bytes);
      }
    }
    fail(site, "%s: %zu bytes out of the bounds of the block's shared memory%s", name, bytes, nearest.c_str());
  }

  void check(const void* p, size_t bytes, Access access, const char* name, Site site) {
    self().warp->accessed |= 1u << self().lane;
    check_cells(p, bytes, access, name, site);
  }

  Cell* check_cells(const void* p, size_t bytes, Access access, const char* name, Site site) {
    Fiber& fiber = self();
    Cell* cell = cells(p, bytes, name, site);
    const Stamp now = stamp(fiber, id_of(site));
    for (size_t i = 0; i < (bytes + 1) / 2; ++i) {
      Cell& c = cell[i];
      if (access == Access::read) {
        require_readable(c, ordered(c.write, fiber), name, site);
        note_read(c, now, fiber);
      } else {
        require_landed(c, name, site);
        if (!ordered(c.write, fiber)) fail_race(name, "writes", c.write, "wrote", site);
        for (const Stamp& read : c.reads) {
          if (!ordered(read, fiber)) fail_race(name, "writes", read, "read", site);
        }
        c.write = now;
        c.reads[0] = c.reads[1] = {};
      }
    }
    return cell;
  }

  static void require_landed(const Cell& c, const char* name, Site site) {
    if (!c.in_flight) return;
    fail(site, "%s: the asynchronous copy that thread %d started at %s has not been waited for", name, c.write.thread,
         place(c.write.site).c_str());
  }

  static void require_readable(const Cell& c, bool is_ordered, const char* name, Site site) {
    require_landed(c, name, site);
    if (c.write.site == 0) {
      fail(site,
           "%s reads uninitialised shared memory (or another thread has yet to write it, and no barrier lies between)",
           name);
    }
    if (!is_ordered) fail_race(name, "reads", c.write, "wrote", site);
  }

  void note_read(Cell& c, Stamp now, const Fiber& fiber) {
    if (ordered(c.reads[0], fiber)) {
      c.reads[0] = now;
    } else if (ordered(c.reads[1], fiber)) {
      c.reads[1] = now;
    } else if (c.reads[0].thread / 32 == c.reads[1].thread / 32) {
      c.reads[1] = now;
    }
  }

  [[noreturn]] static void fail_race(const char* name, const char* does, Stamp other, const char* did, Site site) {
    if (is_box(other)) {
      fail(site, "%s: the copy of tma_load at %s has not been waited for", name, place(other.site).c_str());
    }
    fail(site, "race: %s %s shared memory that thread %d %s at %s, and no barrier lies between", name, does,
         other.thread, did, place(other.site).c_str());
  }

  // -- asynchronous copies

  void start_copy(void* to, const void* from, bool valid, Site site) {
    Fiber& fiber = self();
    if (valid) check_global(from, 16, Access::read, "cp_async_16", site);
    check(to, 16, Access::write, "cp_async_16", site);
    Cell* cell = cells(to, 16, "cp_async_16", site);
    for (int i = 0; i < 8; ++i) cell[i].in_flight = true;
    const Copy copy{to, from, valid, fiber.group, id_of(site)};
    if (settings.lazy_copies) {
      memset(to, 0xff, 16);
    } else {
      land(copy);
    }
    fiber.copies.push_back(copy);
    ++counters.copies;
  }

  static void land(const Copy& copy) {
    if (copy.valid) {
      __builtin_memcpy(copy.to, copy.from, 16);
    } else {
      __builtin_memset(copy.to, 0, 16);
    }
  }

  void finish_copies(int pending, Site site) {
    Fiber& fiber = self();
    size_t kept = 0;
    for (const Copy& copy : fiber.copies) {
      if (copy.group >= fiber.group - pending) {
        fiber.copies[kept++] = copy;
        continue;
      }
      if (settings.lazy_copies) land(copy);
      Cell* cell = cells(copy.to, 16, "cp_async_wait", site);
      for (int i = 0; i < 8; ++i) {
        cell[i].in_flight = false;
        cell[i].write = stamp(fiber, copy.site);
      }
    }
    fiber.copies.resize(kept);
  }

  // -- bank conflicts

  // Lanes come to an access one after the other: the n-th time that a lane is at this place since the warp last waited
  // belongs to the n-th request of the warp there.
  void note_request(const void* p, size_t bytes, SiteId site) {
    Fiber& fiber = self();
    Requests& requests = fiber.warp->requests[site];
    const size_t at = requests.next[fiber.lane]++;
    if (at == requests.open.size()) requests.open.emplace_back();
    Request& request = requests.open[at];
    request.mask |= 1u << fiber.lane;
    request.bytes = static_cast<uint32_t>(bytes);
    request.address[fiber.lane] = bank_address(p);
  }

  // Where shared memory's arrays begin a line of all banks, as they do here, the address within the array will do.
  static uint32_t bank_address(const void* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)); }

  void close_requests(Warp& warp) {
    for (auto& [site, requests] : warp.requests) {
      for (const Request& request : requests.open) {
        const int lanes = request.bytes <= 4 ? 32 : 128 / static_cast<int>(request.bytes);
        for (int first = 0; first < 32; first += lanes) {
          counters.bank_conflicts +=
              conflicts(request.address.data() + first, request.mask >> first, lanes, request.bytes);
        }
      }
    }
    warp.requests.clear();
  }

  // -- global memory

  void require_within_memory(const void* p, size_t bytes, const char* name, Site site) const {
    const auto at = reinterpret_cast<uintptr_t>(p);
    const Memory* nearest = nullptr;
    for (const Memory& one : memory) {
      if (at >= one.begin && at + bytes <= one.begin + one.bytes) return;
      if (at >= one.begin && (nearest == nullptr || one.begin > nearest->begin)) nearest = &one;
    }
    if (nearest == nullptr) fail(site, "%s: %zu bytes out of the bounds of global memory", name, bytes);
    fail(site, "%s: %zu bytes out of the bounds of global memory (at byte %zu of %s, which has %zu)", name, bytes,
         static_cast<size_t>(at - nearest->begin), nearest->name.c_str(), nearest->bytes);
  }

  // As with note_request: the n-th time that a lane is at this place since all of the warp met belongs to the n-th
  // request there. Who meets has made all accesses that come before, so that lanes which took different ways count
  // anew.
  void note_memory_request(const void* p, size_t bytes, Access access, Site site) {
    Fiber& fiber = self();
    const bool is_load = access == Access::read;
    Traffic& traffic = is_load ? counters.loads : counters.stores;
    MemoryRequests& requests = fiber.warp->memory[is_load ? 0 : 1][id_of(site)];
    const size_t at = requests.next[static_cast<size_t>(fiber.lane)]++;
    if (at == requests.open.size()) {
      requests.open.emplace_back();
      ++traffic.requests;
    }
    Sectors& touched = requests.open[at];
    const uintptr_t sector = reinterpret_cast<uintptr_t>(p) / kSectorBytes;  // at most 16 aligned bytes lie in one
    if (std::find(touched.begin(), touched.end(), sector) == touched.end()) {
      touched.push_back(sector);
      ++traffic.sectors;
    }
    traffic.bytes += static_cast<int64_t>(bytes);
  }

  static void forget_memory_requests(Warp& warp) {
    for (auto& requests : warp.memory) requests.clear();
  }

  // TMA asks for a box by itself, row after row.
  void note_box(const Box& box) {
    ++counters.loads.requests;
    uintptr_t last = 0;
    for (int row = 0; row < box.rows; ++row) {
      int first, count;
      const uint16_t* from = row_of(box, row, first, count);
      if (from == nullptr) continue;
      const auto begin = reinterpret_cast<uintptr_t>(from) / kSectorBytes;
      const auto end = (reinterpret_cast<uintptr_t>(from + count) - 1) / kSectorBytes;
      counters.loads.sectors += static_cast<int64_t>(end - begin) + (begin == last ? 0 : 1);
      counters.loads.bytes += 2 * count;
      last = end;
    }
  }

  // How many more passes than one the 32 banks of 4 bytes need for these lanes. Lanes that read the same word share it.
  static int conflicts(const uint32_t* address, unsigned mask, int lanes, uint32_t bytes) {
    uint32_t words[32][32];
    int count[32] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (uint32_t word = address[lane] / 4; word <= (address[lane] + bytes - 1) / 4; ++word) {
        const int bank = static_cast<int>(word % 32);
        if (std::find(words[bank], words[bank] + count[bank], word) == words[bank] + count[bank]) {
          words[bank][count[bank]++] = word;
        }
      }
    }
    return std::max(1, *std::max_element(count, count + 32)) - 1;
  }
};

void throw_error(const Fiber& fiber, Site site, const std::string& what) {
  const Block& block = *fiber.block;
  throw Error(place(site) + ": " + what + " [kernel " + block.kernel + ", block " + coordinates(block.index) +
              ", thread " + coordinates(fiber.index) + "; order " + name_of(block.settings.order) + ", copies " +
              (block.settings.lazy_copies ? "lazy" : "eager") + ", seed " + std::to_string(block.settings.seed) + "]");
}

// ---- the state of the emulator ----

std::mutex state_mutex;
Settings current_settings;
std::vector<Memory> current_memory;
std::map<std::string, Counters> kernel_counters;
auto& idle_blocks = *new std::vector<std::unique_ptr<Block>>;  // the process's end frees them

std::vector<Memory> known_memory() {
  std::lock_guard<std::mutex> lock(state_mutex);
  return current_memory;
}

std::unique_ptr<Block> take_block() {
  std::lock_guard<std::mutex> lock(state_mutex);
  if (idle_blocks.empty()) return std::make_unique<Block>();
  auto block = std::move(idle_blocks.back());
  idle_blocks.pop_back();
  return block;
}

void give_back(std::unique_ptr<Block> block) {
  std::lock_guard<std::mutex> lock(state_mutex);
  Counters& total = kernel_counters[block->kernel];
  const Counters& more = block->counters;
  total.blocks += more.blocks;
  total.barriers += more.barriers;
  total.mma += more.mma;
  total.ldmatrix += more.ldmatrix;
  total.copies += more.copies;
  total.shared_accesses += more.shared_accesses;
  total.bank_conflicts += more.bank_conflicts;
  total.loads += more.loads;
  total.stores += more.stores;
  if (idle_blocks.size() < kMostWorkers) idle_blocks.push_back(std::move(block));
}

// "ns::softmax_fwd_kernel<float>" from "... [with auto kKernel = ns::softmax_fwd_kernel<float>; Args = ...]".
std::string kernel_name(const char* signature) {
  const std::string text = signature, key = "kKernel = ";
  size_t begin = text.find(key);
  if (begin == std::string::npos) return text;
  begin += key.size();
  if (text[begin] == '&') ++begin;
  int depth = 0;
  size_t end = begin, name = begin;
  for (; end < text.size(); ++end) {
    const char c = text[end];
    if (depth == 0 && (c == ';' || c == ',' || c == ']')) break;
    if (c == '<' || c == '(' || c == '{') ++depth;
    if (c == '>' || c == ')' || c == '}') --depth;
    if (depth == 0 && c == ':' && text[end + 1] != ':') name = end + 1;
  }
  return text.substr(name, end - name);
}

}  // namespace

void fail(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string what = format_message(format, arguments);
  va_end(arguments);
  throw_error(self(), site, what);
}

void barrier(int id, int count, const char* name, Site site) {
  const Unseen unseen;
  if (!is_off(site, name)) self().block->arrive(id, count, name, site);
}

void named_barrier(int id, int count, const char* name, Site site) {
  const int threads = self().block->threads;
  if (id < 1 || id >= kBarriers) fail(site, "%s: there is no barrier %d, only 1 to 15", name, id);
  if (count <= 0 || count % 32 != 0 || count > threads) {
    fail(site, "%s: %d threads are not whole warps of a block of %d", name, count, threads);
  }
  barrier(id, count, name, site);
}

void sync_warp(unsigned mask, Site site) {
  const Unseen unseen;
  char nothing[1] = {};
  if (!is_off(site, "__syncwarp")) self().block->join(mask, nothing, 0, nothing, 0, nullptr, "__syncwarp", site);
}

void collective(unsigned mask, const void* operand, size_t operand_size, void* result, size_t result_size,
                void (*compute)(Lanes&, unsigned), const char* name, Site site) {
  const Unseen unseen;
  self().block->join(mask, operand, operand_size, result, result_size, compute, name, site);
}

void* shared_array(const void* tag, size_t bytes, Site site) {
  const Unseen unseen;
  return self().block->array_of(tag, bytes, site);
}

void* dynamic_shared(size_t alignment) {
  const Unseen unseen;
  Block& block = *self().block;
  block.dynamic_alignment = std::max(block.dynamic_alignment, alignment);
  return block.find_array(&kDynamicTag);
}

uint32_t shared_address(const void* p, Site site) {
  const Unseen unseen;
  return self().block->address_of(p, "shared_address", site);
}

void check_shared(const void* p, size_t bytes, Access access, const char* name, Site site) {
  const Unseen unseen;
  Block& block = *self().block;
  block.check(p, bytes, access, name, site);
  ++block.counters.shared_accesses;
  if (block.settings.count_banks) block.note_request(p, bytes, id_of(site));
}

void check_matrix_row(const void* row, const char* name, Site site) {
  const Unseen unseen;
  self().block->check(row, 16, Access::read, name, site);
}

void check_global(const void* p, size_t bytes, Access access, const char* name, Site site) {
  if (p == nullptr) fail(site, "%s: the address is null", name);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail(site, "%s: %zu bytes at an address that is not a multiple of %zu", name, bytes, bytes);
  }
  Block& block = *self().block;
  if (block.memory.empty() && !block.settings.count_memory) return;
  const Unseen unseen;
  if (!block.memory.empty()) block.require_within_memory(p, bytes, name, site);
  if (block.settings.count_memory) block.note_memory_request(p, bytes, access, site);
}

void copy_async(void* to, const void* from, bool valid, Site site) {
#ifdef FASTGPT_TSAN
  if (valid) __tsan_read16(const_cast<void*>(from));
#endif
  const Unseen unseen;
  Block& block = *self().block;
  block.start_copy(to, from, valid, site);
  if (block.settings.count_banks) block.note_request(to, 16, id_of(site));
}

void commit_async() { ++self().group; }

void wait_async(int pending, Site site) {
  const Unseen unseen;
  if (!is_off(site, "cp_async_wait")) self().block->finish_copies(pending, site);
}

void init_mbarrier(void* bar, int arrivals, Site site) {
  const Unseen unseen;
  self().block->init_mbarrier(bar, arrivals, site);
}

void fence_mbarriers() {
  const Unseen unseen;
  for (Mbarrier& bar : self().block->mbarriers) bar.fenced |= bar.thread == self().linear;
}

void arrive_at_mbarrier(void* bar, int bytes, const char* name, Site site) {
  const Unseen unseen;
  self().block->arrive_at_mbarrier(bar, bytes, name, site);
}

void wait_for_mbarrier(void* bar, int parity, Site site) {
  const Unseen unseen;
  if (!is_off(site, "mbar_wait")) self().block->wait_for_mbarrier(bar, parity, site);
}

void load_box(void* to, const Box& from, void* bar, Site site) {
#ifdef FASTGPT_TSAN
  for (int row = 0; row < from.rows; ++row) {
    int first, count;
    if (const uint16_t* at = Block::row_of(from, row, first, count)) {
      __tsan_read_range(const_cast<uint16_t*>(at), static_cast<size_t>(count) * 2);
    }
  }
#endif
  const Unseen unseen;
  self().block->load_box(to, from, bar, site);
}

// Of these the last lane to arrive does for all what `compute` says, at the place where it is.
void start_product(const Product& product, const char* name, Site site) {
  collective<Nothing>(
      kAllLanes, product,
      [](Lanes& lanes, unsigned) {
        const Fiber& last = self();
        last.block->start_product(lanes, last.waits_in, last.waits_at);
      },
      name, site);
}

void fence_products(Site site) {
  collective<Nothing>(kAllLanes, Nothing{}, [](Lanes&, unsigned) { self().warp->fenced = true; }, "wgmma_fence", site);
}

void commit_products(Site site) {
  collective<Nothing>(kAllLanes, Nothing{}, [](Lanes&, unsigned) { ++self().warp->group; }, "wgmma_commit", site);
}

void wait_for_products(int pending, Site site) {
  if (is_off(site, "wgmma_wait")) return;
  collective<Nothing>(
      kAllLanes, pending,
      [](Lanes& lanes, unsigned) { self().block->finish_products(lanes.operand<int>(0), self().waits_at); },
      "wgmma_wait", site);
}

void count_matrix_rows(const void* const rows[32]) {
  Counters& counters = self().block->counters;
  ++counters.ldmatrix;
  uint32_t address[32];
  for (int lane = 0; lane < 32; ++lane) address[lane] = Block::bank_address(rows[lane]);
  for (int first = 0; first < 32; first += 8) {
    counters.bank_conflicts += Block::conflicts(address + first, ~0u, 8, 16);
  }
}

void count_mma() { ++self().block->counters.mma; }

void launch(const char* signature, dim3 grid, dim3 block_size, size_t shared_bytes, void (*body)(void*), void* context,
            Site site) {
  const std::string name = kernel_name(signature);
  const auto refuse = [&](const std::string& why) { throw Error(place(site) + ": " + why + " [kernel " + name + "]"); };
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > kMaxThreads || block_size.z > 64) {
    refuse(formatted("a block of (%u, %u, %u) threads is not possible", block_size.x, block_size.y, block_size.z));
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse(formatted("a grid of (%u, %u, %u) blocks is not possible", grid.x, grid.y, grid.z));
  }
  if (shared_bytes > kMaxSharedBytes) refuse(too_much(shared_bytes, kMaxSharedBytes));
  const int64_t total = int64_t{grid.x} * grid.y * grid.z;
  if (total == 0) return;
  const Settings now = settings();
  {
    std::lock_guard<std::mutex> lock(state_mutex);
    ++kernel_counters[name].launches;
  }
  std::vector<int64_t> shuffled;
  if (now.order == Order::random || now.order == Order::skewed) {
    shuffled.resize(static_cast<size_t>(total));
    for (int64_t i = 0; i < total; ++i) shuffled[static_cast<size_t>(i)] = i;
    std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937_64(now.seed));
  }
  const int64_t cores =
      now.workers > 0 ? now.workers : std::clamp(std::thread::hardware_concurrency(), 1u, kMostWorkers);
  const int64_t workers = std::min(cores, total);
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  int64_t error_at = total;  // of several blocks with errors the first in the order, so that a seed gives the same one
  std::mutex error_mutex;
  auto work = [&]([[maybe_unused]] int64_t worker) {
    const Unseen unseen;
    auto block = take_block();
    int64_t i = 0;
    try {
#ifdef __SANITIZE_ADDRESS__
      block->outside_bottom = nullptr;  // it may be another OS thread's this time
#endif
      block->prepare(name, grid, block_size, shared_bytes, body, context);
#ifdef FASTGPT_TSAN
      // Neighbours never share an OS thread, whose fibers would be taken for one CUDA thread that runs in both.
      for (i = worker; i < total && next < total; i += workers) {
#else
      while ((i = next++) < total) {
#endif
        const int64_t at = now.order == Order::reversed ? total - 1 - i
                           : shuffled.empty()           ? i
                                                        : shuffled[static_cast<size_t>(i)];
        const uint3 index{static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                          static_cast<unsigned>(at / grid.x / grid.y)};
        block->run_block(index, now.seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(at));
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (i < error_at) {
        error_at = i;
        error = std::current_exception();
      }
      next = total;
    }
    acquire(&block->sanitizer_end);
    give_back(std::move(block));
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < workers; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

// ---- control ----

Settings settings() {
  std::lock_guard<std::mutex> lock(state_mutex);
  return current_settings;
}

void configure(const Settings& wanted) {
  std::lock_guard<std::mutex> lock(state_mutex);
  current_settings = wanted;
}

std::map<std::string, Counters> counters() {
  std::lock_guard<std::mutex> lock(state_mutex);
  return kernel_counters;
}

void reset_counters() {
  std::lock_guard<std::mutex> lock(state_mutex);
  kernel_counters.clear();
}

void add_memory(const void* begin, size_t bytes, const std::string& name) {
  std::lock_guard<std::mutex> lock(state_mutex);
  current_memory.push_back({reinterpret_cast<uintptr_t>(begin), bytes, name});
}

void remove_memory(const void* begin) {
  std::lock_guard<std::mutex> lock(state_mutex);
  const auto is_it = [&](const Memory& one) { return one.begin == reinterpret_cast<uintptr_t>(begin); };
  current_memory.erase(std::remove_if(current_memory.begin(), current_memory.end(), is_it), current_memory.end());
}

std::vector<Wait> waits() {
  std::vector<Wait> found;
  for (int i = 1; i < known_count; ++i) {
    const KnownSite& known = known_sites[static_cast<size_t>(i)];
    if (const char* name = known.waits) found.push_back({name, base_name(known.site.file), known.site.line, known.off});
  }
  return found;
}

void switch_off(const std::string& file, int line) {
  for (int i = 1; i < known_count; ++i) {
    KnownSite& known = known_sites[static_cast<size_t>(i)];
    if (known.waits && known.site.line == line && file == base_name(known.site.file)) {
      known.off = true;
      return;
    }
  }
  throw Error(formatted("no wait at %s:%d has been reached", file.c_str(), line));
}

void switch_all_on() {
  for (int i = 1; i < known_count; ++i) known_sites[static_cast<size_t>(i)].off = false;
}

}  // namespace fastgpt::emulator
