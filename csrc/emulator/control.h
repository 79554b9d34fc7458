// How the emulator is told what to do, and asked what happened: by its Python module and by the sanitizers' driver.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fastgpt::emulator {

// Which of the threads that could run does.
enum class Order {
  in_order,  // by their number; who completes a barrier goes on
  reversed,
  random,
  skewed,  // one warp runs as far ahead of the others as barriers let it
};

struct Settings {
  Order order = Order::in_order;
  bool lazy_copies = false;   // what cp_async, TMA and wgmma bring arrives when it is waited for, and not before
  uint64_t seed = 0;          // of everything that is random: the same seed, the same run
  int workers = 0;            // OS threads; 0: one for each core
  bool count_banks = false;   // bank conflicts of lds, sts and cp_async, too (ldmatrix's always are); slow
  bool count_memory = false;  // requests for global memory and their sectors; slow
};

Settings settings();
void configure(const Settings& settings);

// Accesses to global memory in one direction. A request is what a warp asks for with one instruction: its lanes' n-th
// access at one place in the source, since the warp last met. A sector is 32 bytes, aligned: what memory moves.
struct Traffic {
  int64_t requests = 0;
  int64_t sectors = 0;  // different ones within a request
  int64_t bytes = 0;    // that the lanes want, each for itself

  void operator+=(const Traffic& more) {
    requests += more.requests;
    sectors += more.sectors;
    bytes += more.bytes;
  }
};

// What the launches of one kernel did.
struct Counters {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t barriers = 0;  // completed ones of blocks and named ones, not of warps
  int64_t mma = 0;       // of m16n8k16; a warp's part of a wgmma counts as what it is made of
  int64_t ldmatrix = 0;
  int64_t copies = 0;           // asynchronous ones, of 16 bytes, or TMA's of a box
  int64_t shared_accesses = 0;  // lds and sts, by thread
  int64_t bank_conflicts = 0;   // phases of a warp's access to shared memory beyond those that its size needs
  Traffic loads, stores;        // of global memory, where count_memory asks for them
};

// By kernel, without namespaces: "layer_norm_fwd_kernel<float, float>".
std::map<std::string, Counters> counters();
void reset_counters();

// What there is of global memory, under a name for messages. As soon as anything has been added, what kernels access by
// ldg, stg and cp_async_16 has to lie within some of it; before, no bounds are known.
void add_memory(const void* begin, size_t bytes, const std::string& name);
void remove_memory(const void* begin);

// A place that waits: __syncthreads, __syncwarp, bar_sync, cp_async_wait, mbar_wait or wgmma_wait.
struct Wait {
  std::string name, file;
  int line;
  bool off;
};
// Those that have been reached since the program started.
std::vector<Wait> waits();
// From now on that wait does nothing: to see whether a test misses it. Throws Error where there is no such wait.
void switch_off(const std::string& file, int line);
void switch_all_on();

}  // namespace fastgpt::emulator
