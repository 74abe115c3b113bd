#include "pool.h"

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headrace {
namespace {

// How long a thread that waits keeps its core. Inside a run the others are about to arrive; between
// runs the next one is at least a Python call away.
constexpr int64_t SPIN = 50000;  // nanoseconds
constexpr int PAUSES_PER_LOOK_AT_THE_CLOCK = 32;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  if (word.load() == value) std::this_thread::sleep_for(std::chrono::nanoseconds(SPIN));
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, THREADS_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Waits until `word` is no longer `value`.
void wait_while(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int>& sleepers,
                Waited& waited) {
  const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
  int64_t now = begin;
  do {
    for (int i = 0; i < PAUSES_PER_LOOK_AT_THE_CLOCK; i++) {
      if (word.load(std::memory_order_acquire) != value) {
        waited.spinning += now - begin;
        return;
      }
      pause();
    }
    now = nanoseconds(CLOCK_MONOTONIC);
  } while (now - begin < SPIN);
  waited.spinning += now - begin;
  sleepers.fetch_add(1);
  while (word.load() == value) sleep_while(word, value);
  sleepers.fetch_sub(1);
  waited.asleep += nanoseconds(CLOCK_MONOTONIC) - now;
}

void advance(std::atomic<uint32_t>& word, std::atomic<int>& sleepers) {
  word.fetch_add(1);
  if (sleepers.load() > 0) wake_all(word);
}

// Says whether runs should take the whole team or the caller alone.
//
// Where other programs keep the cores busy, a thread of the team is often descheduled, and the
// others wait a time slice for it, at any of some two hundred barriers a step. So it is measured:
// what the threads computed, and what part of a core the caller got while it wanted one, give the
// time that the caller alone would have taken. If the team took longer, the caller works alone for
// a while, longer each time in a row.
class Governor {
 public:
  bool alone(int64_t now) const { return now < alone_until_; }

  // A run of the team: its nanoseconds, those the caller slept, and the caller's and the whole
  // team's on a core (waiting not counted in `computed`).
  void ran(int64_t now, int64_t elapsed, int64_t asleep, int64_t on_core, int64_t computed) {
    elapsed_ += elapsed;
    asleep_ += asleep;
    on_core_ += on_core;
    computed_ += computed;
    if (elapsed_ < WINDOW) return;
    const double share = double(on_core_) / double(elapsed_ - asleep_ + 1);
    if (double(elapsed_) * share > double(computed_)) {
      alone_until_ = now + period_;
      period_ = period_ * 2 < LONGEST ? period_ * 2 : LONGEST;
    } else {
      period_ = SHORTEST;
    }
    elapsed_ = asleep_ = on_core_ = computed_ = 0;
  }

 private:
  static constexpr int64_t WINDOW = 2000000, SHORTEST = 30000000, LONGEST = 500000000;  // ns
  int64_t alone_until_ = 0, period_ = SHORTEST;
  int64_t elapsed_ = 0, asleep_ = 0, on_core_ = 0, computed_ = 0;  // of the window
};

// Wakes the workers off the caller's core. The kernel likes to wake a thread on the core of who wakes
// it, where it then shares the core with the caller, beside an idle one, until the next load
// balancing some milliseconds later. Once awake a worker may run anywhere again.
class Apart {
 public:
  // Called by each worker, once.
  void joined(int rank) {
#if defined(__linux__)
    ids_[rank].store(int(syscall(SYS_gettid)));
#else
    (void)rank;
#endif
  }

  // Called by the caller before it wakes sleeping workers, of ranks 1 to `workers`.
  void from_caller(int workers) {
#if defined(__linux__)
    cpu_set_t cores;
    const int core = sched_getcpu();
    if (core < 0 || sched_getaffinity(0, sizeof cores, &cores) != 0) return;
    if (CPU_COUNT(&cores) <= workers) return;  // too few for a core each
    all_ = cores;
    CPU_CLR(core, &cores);
    for (int rank = 1; rank <= workers; rank++) {
      const int id = ids_[rank].load();
      if (id != 0 && sched_setaffinity(id, sizeof cores, &cores) == 0) kept_off_[rank] = true;
    }
#else
    (void)workers;
#endif
  }

  // Called by each worker when it is awake.
  void anywhere(int rank) {
#if defined(__linux__)
    if (kept_off_[rank]) sched_setaffinity(0, sizeof all_, &all_);
#endif
    kept_off_[rank] = false;
  }

 private:
  std::atomic<int> ids_[THREADS_MAX] = {};
  bool kept_off_[THREADS_MAX] = {};
#if defined(__linux__)
  cpu_set_t all_;
#endif
};

// The pool lives as long as the process: workers are detached and never asked to end, so that
// nothing has to be joined while the interpreter exits.
struct Pool {
  std::mutex turn;  // held by the caller of a run, and by set_threads
  int size = 1;     // threads of a run
  int started = 1;  // threads that exist, the caller included

  std::atomic<uint32_t> epoch{0};  // of runs
  std::atomic<int> sleepers{0};
  TeamFunction function = nullptr;
  void* argument = nullptr;
  int run_size = 1;
  // Workers that have not left the current run. The caller waits for all of them, also for those
  // that have no part in it, so that none is still reading when the next run is written.
  std::atomic<uint32_t> inside{0};
  std::atomic<uint32_t> ended{0};
  std::atomic<int> end_sleepers{0};
  std::atomic<int64_t> computed{0};  // nanoseconds of the workers in the current run
  Governor governor;
  Apart apart;
  Shared shared;

  void work(int rank, uint32_t seen) {
    apart.joined(rank);
    for (;;) {
      Waited between;
      wait_while(epoch, seen, sleepers, between);
      seen++;
      if (rank < run_size) {
        apart.anywhere(rank);
        const int64_t begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
        Team team(&shared, rank, run_size);
        function(team, argument);
        const int64_t used = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
        computed.fetch_add(used - team.waited.spinning);
      }
      if (inside.fetch_sub(1) == 1) advance(ended, end_sleepers);
    }
  }

  void run(TeamFunction f, void* a) {
    std::lock_guard<std::mutex> guard(turn);
    const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
    if (size == 1 || governor.alone(begin)) {
      Team team(&shared, 0, 1);
      f(team, a);
      return;
    }
    if (sleepers.load() > 0) apart.from_caller(size - 1);
    function = f;
    argument = a;
    run_size = size;
    for (auto& phase : shared.next)
      for (auto& counter : phase) counter.value.store(0, std::memory_order_relaxed);
    inside.store(uint32_t(started - 1));
    computed.store(0);
    const uint32_t end = ended.load();
    const int64_t core_begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    advance(epoch, sleepers);
    Team team(&shared, 0, size);
    f(team, a);
    wait_while(ended, end, end_sleepers, team.waited);
    const int64_t now = nanoseconds(CLOCK_MONOTONIC);
    const int64_t on_core = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - core_begin;
    governor.ran(now, now - begin, team.waited.asleep, on_core,
                 computed.load() + on_core - team.waited.spinning);
  }

  int resize(int wanted) {
    std::lock_guard<std::mutex> guard(turn);
    size = wanted < 1 ? 1 : wanted > THREADS_MAX ? THREADS_MAX : wanted;
    for (; started < size; started++)
      std::thread(&Pool::work, this, started, epoch.load()).detach();
    return size;
  }
};

Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: see Pool
  return *one;
}

}  // namespace

void Team::barrier() {
  if (size == 1) return;
  const uint32_t generation = shared_->generation.load(std::memory_order_relaxed);
  if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    shared_->arrived.store(0, std::memory_order_relaxed);
    advance(shared_->generation, shared_->sleepers);
  } else {
    wait_while(shared_->generation, generation, shared_->sleepers, waited);
  }
}

void run_team(TeamFunction function, void* argument) { pool().run(function, argument); }
int set_threads(int threads) { return pool().resize(threads); }
int threads() { return pool().size; }

void* scratch(size_t bytes) {
  struct Owned {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Owned() { release(memory); }
  };
  static thread_local Owned owned;
  if (owned.bytes < bytes) {
    release(owned.memory);
    owned.memory = allocate(bytes);
    owned.bytes = bytes;
  }
  return owned.memory;
}

void* allocate(size_t bytes) {
  constexpr size_t HUGE = size_t(2) << 20;
  const size_t align = bytes >= HUGE ? HUGE : 64;
  const size_t rounded = (bytes + align - 1) / align * align;
  void* memory = std::aligned_alloc(align, rounded ? rounded : align);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (align == HUGE) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace headrace
