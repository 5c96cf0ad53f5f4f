// Threads that go through the steps of one call together. Between two steps they stay awake for a moment: waking a thread
// takes longer than most steps do. Who waits for longer sleeps, and so is among the first to run again where others want the
// cores, too. The leader goes on once all tasks of a step are through, whether or not each of the others has been there: one
// that has lost its core holds nobody up unless it is at a task.

#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <vector>

// A thread's memory for a task.
struct Room {
  std::vector<float> first, second;
};

class Team {
 public:
  explicit Team(int num_threads) : size(num_threads) {}
  const int size;

  // The leader's: work(i, room) for each i below count, on whichever thread is free.
  template <class Work>
  void share(int64_t count, const Work& work) {
    work_ = &work;
    run_ = [](const void* of, int64_t i, Room& room) { (*(const Work*)of)(i, room); };
    num_left_ = count;
    next_ = ++step_ << 40 | count << 20;
    begun();
    take(room_);
    wait(num_left_, is_leader_asleep_, [&] { return num_left_ == 0; });
  }

  // The leader's, after its last step.
  void end() {
    is_over_ = true;
    begun();
  }

  // The others', until then.
  void help() {
    Room room;
    while (!is_over_) {
      const uint64_t step = take(room);
      wait(num_begun_, num_asleep_, [&] { return is_over_ || next_ >> 40 != step; });
    }
  }

 private:
  static constexpr uint64_t MOST = (1 << 20) - 1;
  static constexpr int SPINS = 2000;  // some 40 us

  // Tasks of the step that there is, up to its end; which that was. While one of them is not through there is no other
  // step: so whoever has drawn a number of it knows its work.
  uint64_t take(Room& room) {
    for (;;) {
      const uint64_t drawn = next_.fetch_add(1);
      if ((drawn & MOST) >= (drawn >> 20 & MOST)) return drawn >> 40;
      run_(work_, drawn & MOST, room);
      if (num_left_.fetch_sub(1) == 1 && is_leader_asleep_) wake(num_left_);
    }
  }

  void begun() {
    num_begun_.fetch_add(1);
    if (num_asleep_) wake(num_begun_);
  }

  // Until something holds that comes with a change of the word; `asleep` counts who has to be woken after one.
  template <class Until>
  static void wait(std::atomic<int32_t>& word, std::atomic<int32_t>& asleep, const Until& until) {
    for (int spins = 0; spins < SPINS; ++spins) {
      if (until()) return;
      _mm_pause();
    }
    asleep.fetch_add(1);
    for (int32_t seen = word; !until(); seen = word)
      syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    asleep.fetch_sub(1);
  }

  static void wake(std::atomic<int32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  const void* work_ = nullptr;
  void (*run_)(const void*, int64_t, Room&) = nullptr;
  Room room_;
  uint64_t step_ = 0;
  alignas(64) std::atomic<uint64_t> next_{0};  // step, number of its tasks, the next of them: 24, 20 and 20 bits
  alignas(64) std::atomic<int32_t> num_left_{0}, is_leader_asleep_{0};
  alignas(64) std::atomic<int32_t> num_begun_{0}, num_asleep_{0};
  std::atomic<bool> is_over_{false};
};
