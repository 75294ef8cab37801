// A block: its threads take turns on one operating-system thread, meet at barriers, and are stopped at a mistake.
#pragma once
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace emulation {

constexpr size_t MAX_SHARED_BYTES = 227 << 10;  // of an H100
constexpr size_t RED_ZONE = 4096;               // bytes past the dynamic shared memory, where a write is noticed
constexpr size_t LANDING_BYTES = 1 << 20;       // below the lowest stack, for a thread that needs too much of it
constexpr int MAX_COPIES = 64;                  // cp.async operations of a thread that may be in flight
constexpr unsigned ALL_LANES = 0xffffffffu;

// Where a thread waits: the operation, and its place in the source.
struct Place {
    const char *operation, *file;
    int line;
    bool operator==(const Place& other) const {
        return line == other.line && !strcmp(operation, other.operation) && !strcmp(file, other.file);
    }
};
#define PLACE_OF_CALL const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct AsyncCopy {
    void* target;
    const void* source;
    size_t num_bytes, num_zeros;
    int group;
};

enum class State : char { RUNNABLE, AT_WARP_OPERATION, AT_BARRIER, DONE };

struct Thread {
    Context context;
    uint3 index{};
    int number = 0;  // within the block
    State state = State::DONE;
    Place place{};               // where it waits
    void* operands = nullptr;    // of the warp operation where it waits
    AsyncCopy copies[MAX_COPIES];
    int num_copies = 0, copy_group = 0;
    UNCHECKED int lane() const { return number % 32; }
};

// Moves data between the lanes that have met. operands: 32 pointers, null for lanes that are not among `lanes`.
typedef void (*Exchange)(void** operands, unsigned lanes);

// Lanes of a warp that meet at an operation. Several meetings may be open at once, for disjoint masks.
struct Meeting {
    unsigned mask, arrived;
    Place place;
    Exchange exchange;
};
struct Warp {
    unsigned alive = 0;  // lanes that have not returned from the kernel
    int num_meetings = 0;
    Meeting meetings[32];
};

// A launch, as its blocks see it.
struct Grid {
    const char* kernel;
    dim3 size, block_size;
    size_t shared_bytes;
    void (*run_thread)(void*);
    void* arguments;
};

// All that one operating-system thread needs to run blocks, one after the other.
struct Block {
    Thread* threads = nullptr;  // plain arrays: a vector's functions would be checked
    Warp* warps = nullptr;
    int* order = nullptr;  // in which the threads take turns
    int num_threads = 0, num_alive = 0, turn = 0;
    int num_waiting = 0, votes = 0, last_votes = 0;  // at the barrier
    Thread* current = nullptr;                       // null: the host
    Context host;
    const Grid* grid = nullptr;
    std::string error;  // the first mistake
    char *stacks = nullptr, *shared = nullptr;
    size_t num_stacks = 0;
    ~Block() {
        if (stacks != nullptr) munmap(stacks - LANDING_BYTES, num_stacks * STACK_BYTES + LANDING_BYTES);
        delete[] threads;
        delete[] warps;
        delete[] order;
        free(shared);
    }
};
PER_LIBRARY thread_local Block* block = nullptr;  // the one that this operating-system thread runs

inline std::string describe(const Place& place) {
    return std::string(place.operation) + " at " + place.file + ":" + std::to_string(place.line);
}

inline std::string describe(uint3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

// `thread == nullptr`: back to the host.
UNCHECKED inline void switch_to(Thread* thread) {
    Thread* before = block->current;
    block->current = thread;
    if (thread != nullptr) threadIdx = thread->index;
    const bool is_last = before != nullptr && before->state == State::DONE;
    switch_context(before ? before->context : block->host, thread ? thread->context : block->host, is_last);
}

// The current thread cannot continue: the next one that can has its turn, or the host if there is none.
UNCHECKED inline void give_turn() {
    Block& b = *block;
    int turn = b.turn;
    for (int i = 0; i < b.num_threads; i++) {
        if (++turn >= b.num_threads) turn = 0;
        Thread& thread = b.threads[b.order[turn]];
        if (thread.state != State::RUNNABLE) continue;
        b.turn = turn;
        if (&thread != b.current) switch_to(&thread);
        return;
    }
    switch_to(nullptr);
}

// Ends the launch with a message. Does not return: no thread of the block runs again.
UNCHECKED inline void stop(const std::string& mistake) {
    Block& b = *block;
    b.error = std::string(b.grid->kernel) + ", block " + describe(blockIdx) + ", thread " +
              describe(b.current->index) + ": " + mistake;
    switch_to(nullptr);
}

// All lanes of a meeting are there.
UNCHECKED inline void finish_meeting(Warp& warp, int first_thread, int number) {
    const Meeting meeting = warp.meetings[number];
    warp.meetings[number] = warp.meetings[--warp.num_meetings];
    void* operands[32] = {};
    for (int lane = 0; lane < 32; lane++) {
        if (!(meeting.arrived >> lane & 1)) continue;
        Thread& thread = block->threads[first_thread + lane];
        operands[lane] = thread.operands;
        thread.state = State::RUNNABLE;
    }
    if (meeting.exchange != nullptr) meeting.exchange(operands, meeting.arrived);
}

// Waits until all lanes of the mask that have not returned are here. The last one moves the data for all of them.
UNCHECKED inline void meet(unsigned mask, void* operands, Exchange exchange, Place place) {
    Thread& thread = *block->current;
    Warp& warp = block->warps[thread.number / 32];
    if (!(mask >> thread.lane() & 1)) stop(describe(place) + ": the calling lane is not in its own mask");
    int number = 0;
    while (number < warp.num_meetings && !(warp.meetings[number].mask & mask)) number++;
    if (number == warp.num_meetings) warp.meetings[warp.num_meetings++] = {mask, 0, place, exchange};
    Meeting& meeting = warp.meetings[number];
    if (meeting.mask != mask && meeting.place == place) {
        stop(describe(place) + ": other lanes of this warp have called it with another mask");
    }
    if (!(meeting.place == place)) {
        stop(describe(place) + ": other lanes of this warp wait in " + describe(meeting.place) +
             " (the warp has diverged: all lanes of the mask must execute the same operation)");
    }
    meeting.arrived |= 1u << thread.lane();
    thread.operands = operands;
    thread.place = place;
    thread.state = State::AT_WARP_OPERATION;
    if (meeting.arrived == (mask & warp.alive)) {
        finish_meeting(warp, thread.number / 32 * 32, number);
    } else {
        give_turn();
    }
}

UNCHECKED inline void open_barrier() {
    Block& b = *block;
    for (int i = 0; i < b.num_threads; i++) {
        if (b.threads[i].state == State::AT_BARRIER) b.threads[i].state = State::RUNNABLE;
    }
    b.last_votes = b.votes;
    b.votes = b.num_waiting = 0;
}

// Waits until all threads of the block that have not returned are here. Returns how many of them had a vote.
UNCHECKED inline int wait_at_barrier(bool vote, Place place) {
    Block& b = *block;
    Thread& thread = *b.current;
    for (int i = 0; b.num_waiting > 0 && i < b.num_threads; i++) {
        if (b.threads[i].state != State::AT_BARRIER) continue;
        if (!(b.threads[i].place == place)) {
            stop(describe(place) + ": other threads of this block wait in " + describe(b.threads[i].place) +
                 " (a barrier in a branch that not all threads take)");
        }
        break;  // those that wait have been compared when they arrived
    }
    thread.place = place;
    thread.state = State::AT_BARRIER;
    b.votes += vote;
    release(&b.num_waiting);
    if (++b.num_waiting == b.num_alive) {
        open_barrier();
    } else {
        give_turn();
    }
    acquire(&b.num_waiting);
    return b.last_votes;
}

// The life of a thread. One that returns from the kernel no longer counts at barriers, as on GPUs since Volta.
UNCHECKED inline void run_thread() {
#if CUDA_ON_CPU_ASAN
    const void* stack;
    size_t stack_size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &stack_size);
    if (block->host.stack == nullptr) {  // the first thread was started by the host
        block->host.stack = stack;
        block->host.stack_size = stack_size;
    }
#endif
    acquire(&block->num_threads);  // what the host did before the launch
    block->grid->run_thread(block->grid->arguments);
    Block& b = *block;
    Thread& thread = *b.current;
    Warp& warp = b.warps[thread.number / 32];
    release(&b.num_alive);
    if (thread.num_copies > 0) stop("returns while copies of __pipeline_memcpy_async are in flight");
    thread.state = State::DONE;
    thread.copy_group = 0;
    b.num_alive--;
    warp.alive &= ~(1u << thread.lane());
    for (int number = warp.num_meetings - 1; number >= 0; number--) {
        const Meeting& meeting = warp.meetings[number];
        if (meeting.arrived == (meeting.mask & warp.alive)) finish_meeting(warp, thread.number / 32 * 32, number);
    }
    if (b.num_alive > 0 && b.num_waiting == b.num_alive) open_barrier();
    give_turn();
}

// The order of n things: as they are, or as CUDA_ON_CPU_ORDER says: "reverse" or "random:<seed>". CUDA promises none.
inline void set_order(std::vector<int>& order, int n) {
    order.resize(n);
    std::iota(order.begin(), order.end(), 0);
    const char* wanted = getenv("CUDA_ON_CPU_ORDER");
    if (wanted == nullptr) return;
    if (!strcmp(wanted, "reverse")) std::reverse(order.begin(), order.end());
    if (!strncmp(wanted, "random:", 7)) std::shuffle(order.begin(), order.end(), std::mt19937(atoi(wanted + 7)));
}

UNCHECKED inline void prepare_block(Block& b, const Grid& grid) {
    b.grid = &grid;
    b.error.clear();
    b.num_threads = grid.block_size.x * grid.block_size.y * grid.block_size.z;
    if (b.num_stacks < (size_t)b.num_threads) {
        if (b.stacks != nullptr) munmap(b.stacks - LANDING_BYTES, b.num_stacks * STACK_BYTES + LANDING_BYTES);
        b.num_stacks = b.num_threads;
        const size_t num_bytes = b.num_stacks * STACK_BYTES + LANDING_BYTES;
        b.stacks = (char*)mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        b.stacks += LANDING_BYTES;
        delete[] b.threads;
        delete[] b.warps;
        delete[] b.order;
        b.threads = new Thread[b.num_stacks];
        b.warps = new Warp[(b.num_stacks + 31) / 32];
        b.order = new int[b.num_stacks];
    }
    if (b.shared == nullptr) b.shared = (char*)aligned_alloc(128, (MAX_SHARED_BYTES + 2 * RED_ZONE) / 128 * 128);
    std::vector<int> order;
    set_order(order, b.num_threads);
    for (int i = 0; i < b.num_threads; i++) {
        b.order[i] = order[i];
        const unsigned x = grid.block_size.x, y = grid.block_size.y;
        b.threads[i].number = i;
        b.threads[i].index = {i % x, i / x % y, i / (x * y)};
    }
#if CUDA_ON_CPU_TSAN
    b.host.sanitizer = __tsan_get_current_fiber();
#endif
    blockDim = grid.block_size;
    gridDim = grid.size;
}

// Shared memory is filled with ones, a NaN: reading it before writing it shows in the result.
UNCHECKED inline void clear_shared(Block& b, size_t end) {
#if CUDA_ON_CPU_ASAN
    __asan_unpoison_memory_region(b.shared, MAX_SHARED_BYTES + RED_ZONE);
#endif
    memset(b.shared, 0xff, end + RED_ZONE);
#if CUDA_ON_CPU_ASAN
    __asan_poison_memory_region(b.shared + end, RED_ZONE);
#endif
}

inline std::string describe_deadlock(const Block& b) {
    std::map<std::string, std::vector<int>> threads_at;
    for (int i = 0; i < b.num_threads; i++) {
        const Thread& thread = b.threads[i];
        threads_at[thread.state == State::DONE ? "returned from the kernel" : "wait in " + describe(thread.place)]
            .push_back(i);
    }
    std::string text = "deadlock:";
    for (const auto& [what, threads] : threads_at) {
        text += " " + std::to_string(threads.size()) + " thread(s), the first is " + std::to_string(threads[0]) + ", " +
                what + ";";
    }
    return text;
}

// What went wrong in a block whose threads have no turn any more; empty if all returned and nothing was overwritten.
UNCHECKED inline std::string find_mistake(const Block& b, [[maybe_unused]] size_t shared_end) {
    const std::string where = std::string(b.grid->kernel) + ", block " + describe(blockIdx) + ": ";
    for (int i = 0; i < b.num_threads; i++) {
        if (!has_overflowed(b.threads[i].context)) continue;
        return where + "thread " + std::to_string(i) + " needs more than " + std::to_string(STACK_BYTES >> 10) +
               " KiB for its local variables";
    }
    if (!b.error.empty()) return b.error;
    if (b.num_alive > 0) return where + describe_deadlock(b);
#if !CUDA_ON_CPU_ASAN
    for (size_t i = shared_end; i < shared_end + RED_ZONE; i++) {
        if (b.shared[i] == (char)0xff) continue;
        return where + "a thread wrote to byte " + std::to_string(i) + " of dynamic shared memory, which has " +
               std::to_string(b.grid->shared_bytes) + " bytes";
    }
#endif
    return "";
}

// Runs one block of the grid. Returns its mistake, or an empty string.
UNCHECKED inline std::string run_block(Block& b, const Grid& grid, unsigned number) {
    blockIdx = {number % grid.size.x, number / grid.size.x % grid.size.y, number / (grid.size.x * grid.size.y)};
    b.num_alive = b.num_threads;
    b.num_waiting = b.votes = 0;
    b.current = nullptr;
    for (int i = 0; i < (b.num_threads + 31) / 32; i++) b.warps[i].alive = b.warps[i].num_meetings = 0;
    const size_t shared_end = (grid.shared_bytes + 15) / 16 * 16;
    clear_shared(b, shared_end);
#if CUDA_ON_CPU_ASAN
    b.host.stack = nullptr;
#endif
    for (int i = 0; i < b.num_threads; i++) {
        Thread& thread = b.threads[i];
        prepare_stack(thread.context, b.stacks + i * STACK_BYTES, i, run_thread, describe(thread.index));
        thread.state = State::RUNNABLE;
        thread.num_copies = thread.copy_group = 0;
        b.warps[i / 32].alive |= 1u << thread.lane();
    }
    b.turn = b.num_threads - 1;
    release(&b.num_threads);
    give_turn();
    acquire(&b.num_alive);
    return find_mistake(b, shared_end);
}

}  // namespace emulation

// The first array of a kernel that has DYNAMIC_SHARED.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulation::block->shared)

inline void __syncthreads(PLACE_OF_CALL) { emulation::wait_at_barrier(false, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int predicate, PLACE_OF_CALL) {
    return emulation::wait_at_barrier(predicate != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, PLACE_OF_CALL) {
    return emulation::wait_at_barrier(predicate != 0, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, PLACE_OF_CALL) {
    return emulation::wait_at_barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
