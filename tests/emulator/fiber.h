// Cooperative fibers: each emulated CUDA thread is one, with a stack of its own, and only one runs at a time.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace rebalfer::emulator {

class Stack {
 public:
  static constexpr size_t kBytes = 256 << 10;  // of address space; pages come with their first use

  Stack() : guard_(size_t(getpagesize())) {
    void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
    mprotect(base_, guard_, PROT_NONE);  // an overflow faults
  }
  ~Stack() { munmap(base_, kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* begin() const { return base_ + guard_; }
  size_t size() const { return kBytes - guard_; }

 private:
  size_t guard_;
  char* base_;
};

// Where a suspended fiber, or the scheduler, continues.
struct Context {
#if defined(__x86_64__)
  void* place = nullptr;
#else
  ucontext_t place;
#endif
  const void* stack = nullptr;
  size_t stack_size = 0;
};

#if defined(__x86_64__)
// Saves what a call must preserve and changes stacks: a few nanoseconds, where swapcontext makes two system calls.
__attribute__((naked, noinline)) inline void swap_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_size);
#endif
#if defined(__x86_64__)
  swap_stack(&from.place, to.place);
#else
  swapcontext(&from.place, &to.place);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fiber does; `from` is the context that switched to it.
inline void fiber_started(Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_size);
#else
  (void)from;
#endif
}

// A fiber on a stack nobody uses; entry() must never return.
inline void start_fiber(Context& fiber, const Stack& stack, void (*entry)()) {
  fiber.stack = stack.begin();
  fiber.stack_size = stack.size();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack.begin(), stack.size());  // an abandoned fiber leaves its frames' marks
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack.begin() + stack.size()) - 8;  // six registers, entry, its "caller"
  std::memset(top, 0, 64);
  top[6] = reinterpret_cast<void*>(entry);
  fiber.place = top;
#else
  getcontext(&fiber.place);
  fiber.place.uc_stack.ss_sp = stack.begin();
  fiber.place.uc_stack.ss_size = stack.size();
  fiber.place.uc_link = nullptr;
  makecontext(&fiber.place, entry, 0);
#endif
}

}  // namespace rebalfer::emulator
