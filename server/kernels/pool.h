// A small thread pool: the caller and N - 1 workers run one function together, as a team.
//
// Work inside a team run is dealt out statically in equal ranges, and who is done first takes from
// the others' ranges: the cores are shared with the router and with clients, so a thread may be
// descheduled at any time. Threads that wait spin for a bounded time, then sleep in the kernel. While
// the cores are so busy with others that waiting costs more than it gains, runs take one thread.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace headrace {

constexpr int THREADS_MAX = 64;

struct alignas(64) Counter {
  std::atomic<long> value{0};
};

// What the threads of one run share.
struct Shared {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<int> sleepers{0};
  Counter next[2][THREADS_MAX];  // of two phases in turn: the items each thread's range has given
};

// Nanoseconds that a thread has waited for others in a run.
struct Waited {
  int64_t spinning = 0;
  int64_t asleep = 0;
};

class Team {
 public:
  Team(Shared* shared, int rank, int size) : rank(rank), size(size), shared_(shared) {}

  const int rank;
  const int size;
  Waited waited;

  // Waits until every thread of the team is here. What was written before is seen after.
  void barrier();

  // Runs body(item) once for every item in 0..items, spread over the team, and ends with a barrier,
  // before which each thread runs idle(): it may touch what it will read next.
  template <class Body, class Idle>
  void for_each(long items, Body body, Idle idle) {
    const int phase = phase_;
    phase_ ^= 1;
    if (size == 1) {
      for (long item = 0; item < items; item++) body(item);
      return;
    }
    // Nobody counts in the next phase before the barrier below.
    shared_->next[phase ^ 1][rank].value.store(0, std::memory_order_relaxed);
    for (int turn = 0; turn < size; turn++) {
      const int owner = rank + turn < size ? rank + turn : rank + turn - size;
      const long first = items * owner / size, end = items * (owner + 1) / size;
      std::atomic<long>& next = shared_->next[phase][owner].value;
      if (next.load(std::memory_order_relaxed) >= end - first) continue;
      for (;;) {
        const long at = first + next.fetch_add(1, std::memory_order_relaxed);
        if (at >= end) break;
        body(at);
      }
    }
    idle();
    barrier();
  }

  template <class Body>
  void for_each(long items, Body body) {
    for_each(items, body, [] {});
  }

 private:
  Shared* shared_;
  int phase_ = 0;
};

typedef void (*TeamFunction)(Team& team, void* argument);

// Runs `function` on every thread of the pool, the caller among them, and waits for all.
// One run at a time: callers take turns.
void run_team(TeamFunction function, void* argument);

template <class Body>
void run_team(Body& body) {
  run_team([](Team& team, void* argument) { (*static_cast<Body*>(argument))(team); }, &body);
}

// Threads of the next runs, the caller included. Returns what was set: 1 to THREADS_MAX.
int set_threads(int threads);
int threads();

// Memory of this thread that stays until its next call with a larger size; 64-byte aligned.
void* scratch(size_t bytes);

// Large memory for what is read often: 2 MB aligned, in huge pages where the system grants them.
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace headrace
