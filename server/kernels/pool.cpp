#include "pool.h"

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headrace {
namespace {

// How long a thread that waits keeps its core. Inside a run the others are about to arrive; between
// runs the next one is at least a Python call away.
constexpr auto SPIN = std::chrono::microseconds(50);
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
  if (word.load() == value) std::this_thread::sleep_for(SPIN);
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, THREADS_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

// Waits until `word` is no longer `value`.
void wait_while(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int>& sleepers) {
  const auto end = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < PAUSES_PER_LOOK_AT_THE_CLOCK; i++) {
      if (word.load(std::memory_order_acquire) != value) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  sleepers.fetch_add(1);
  while (word.load() == value) sleep_while(word, value);
  sleepers.fetch_sub(1);
}

void advance(std::atomic<uint32_t>& word, std::atomic<int>& sleepers) {
  word.fetch_add(1);
  if (sleepers.load() > 0) wake_all(word);
}

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
  Shared shared;

  void work(int rank, uint32_t seen) {
    for (;;) {
      wait_while(epoch, seen, sleepers);
      seen++;
      if (rank < run_size) {
        Team team(&shared, rank, run_size);
        function(team, argument);
      }
      if (inside.fetch_sub(1) == 1) advance(ended, end_sleepers);
    }
  }

  void run(TeamFunction f, void* a) {
    std::lock_guard<std::mutex> guard(turn);
    if (size == 1) {
      Team team(&shared, 0, 1);
      f(team, a);
      return;
    }
    function = f;
    argument = a;
    run_size = size;
    for (auto& phase : shared.next)
      for (auto& counter : phase) counter.value.store(0, std::memory_order_relaxed);
    inside.store(uint32_t(started - 1));
    const uint32_t end = ended.load();
    advance(epoch, sleepers);
    Team team(&shared, 0, size);
    f(team, a);
    wait_while(ended, end, end_sleepers);
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
    wait_while(shared_->generation, generation, shared_->sleepers);
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
