// Stacks, and the switch from one to another. A switch saves the registers that a function must preserve on the old
// stack, and takes those of the new one: about 20 instructions, no system call.
#pragma once
#include <sys/mman.h>

#include <string>

#if CUDA_ON_CPU_TSAN
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void* __tsan_get_current_fiber(void);
extern "C" void __tsan_set_fiber_name(void* fiber, const char* name);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif
#if CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// A kernel that is stopped at a mistake never frees what it holds.
extern "C" __attribute__((weak)) const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

extern "C" void cuda_on_cpu_switch(void** save_stack, void* load_stack) asm("cuda_on_cpu_switch");
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
cuda_on_cpu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
namespace emulation {
constexpr int SAVED_WORDS = 8, RETURN_WORD = 6;  // of a stack that has been switched away from
}
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
cuda_on_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
namespace emulation {
constexpr int SAVED_WORDS = 20, RETURN_WORD = 11;
}
#else
#error "cuda_on_cpu: fibers.h has no stack switch for this processor"
#endif

namespace emulation {

constexpr size_t STACK_BYTES = CUDA_ON_CPU_TSAN || CUDA_ON_CPU_ASAN ? 256 << 10 : 64 << 10;
constexpr uint64_t CANARY = 0x5afe57ac4b07700dull;  // at the end of each stack

// One thread of control. The host, which launches, is one as well: its stack is the operating-system thread's.
struct Context {
    void* saved = nullptr;  // the stack pointer, while another one runs
    const void* stack = nullptr;
    size_t stack_size = 0;
    void* sanitizer = nullptr;  // ThreadSanitizer's idea of it
};

// Prepares a stack so that the first switch to it calls start. number: stacks begin at different offsets, else all of
// them would compete for the same lines of the cache. name: for ThreadSanitizer's reports.
UNCHECKED inline void prepare_stack(
    Context& context, char* stack, int number, void (*start)(), [[maybe_unused]] const std::string& name
) {
    context.stack = stack;
    context.stack_size = STACK_BYTES;
    memcpy(stack, &CANARY, sizeof CANARY);
    void** top = (void**)(stack + STACK_BYTES - number % 32 * 448) - SAVED_WORDS;
    memset((void*)top, 0, SAVED_WORDS * sizeof(void*));
    top[RETURN_WORD] = (void*)start;
    context.saved = top;
#if CUDA_ON_CPU_TSAN
    if (context.sanitizer == nullptr) context.sanitizer = __tsan_create_fiber(0);
    __tsan_set_fiber_name(context.sanitizer, name.c_str());
#endif
}

UNCHECKED inline bool has_overflowed(const Context& context) {
    return memcmp(context.stack, &CANARY, sizeof CANARY) != 0;
}

// Continues `to` where it left off. is_last: `from` will not be continued.
UNCHECKED inline void switch_context(Context& from, Context& to, bool is_last) {
    (void)is_last;
#if CUDA_ON_CPU_TSAN
    __tsan_switch_to_fiber(to.sanitizer, 1);  // 1: a switch is no synchronization; only barriers are
#endif
#if CUDA_ON_CPU_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(is_last ? nullptr : &fake_stack, to.stack, to.stack_size);
#endif
    cuda_on_cpu_switch(&from.saved, to.saved);
#if CUDA_ON_CPU_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// What happened before release(place) is visible after acquire(place): the only order that ThreadSanitizer sees.
UNCHECKED inline void release([[maybe_unused]] void* place) {
#if CUDA_ON_CPU_TSAN
    __tsan_release(place);
#endif
}
UNCHECKED inline void acquire([[maybe_unused]] void* place) {
#if CUDA_ON_CPU_TSAN
    __tsan_acquire(place);
#endif
}

}  // namespace emulation
