// A stack of its own to run a function on, and the switch between two such stacks.

#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fastgpt::emulator {

#ifdef __x86_64__

// The registers that a call preserves go onto the stack that is left. ucontext would also save the signal mask, by a
// system call, at every switch: four times as slow.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void fastgpt_emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden fastgpt_emulator_switch
.globl fastgpt_emulator_switch
.type fastgpt_emulator_switch, @function
fastgpt_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastgpt_emulator_switch, .-fastgpt_emulator_switch
)");

inline void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) {
  fastgpt_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

struct Context {
  ucontext_t state;
};

inline void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

}  // namespace fastgpt::emulator
