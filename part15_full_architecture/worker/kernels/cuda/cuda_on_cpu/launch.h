// Launches, and the functions of the host that programs with kernels call.
#pragma once
#include <atomic>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

typedef void* cudaStream_t;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

namespace emulation {

PER_LIBRARY thread_local std::string last_message;  // of the last error, for cudaGetErrorString
PER_LIBRARY thread_local cudaError_t last_error = cudaSuccess;
PER_LIBRARY std::map<const void*, size_t> raised_limits;  // of dynamic shared memory, by kernel
constexpr size_t DEFAULT_SHARED_LIMIT = 48 << 10;

inline cudaError_t note_error(cudaError_t error, const std::string& message) {
    last_message = message;
    return last_error = error;
}

// What a GPU would refuse about a launch; empty if nothing.
inline std::string refusal(const void* kernel, const Grid& grid) {
    const auto [x, y, z] = std::tuple(grid.block_size.x, grid.block_size.y, grid.block_size.z);
    const size_t num_threads = (size_t)x * y * z;
    if (num_threads == 0 || num_threads > 1024 || z > 64) {
        return "a block of " + describe(uint3{x, y, z}) + " threads: expected 1 to 1024 in all, at most 64 in z";
    }
    const uint3 blocks{grid.size.x, grid.size.y, grid.size.z};
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || blocks.x > 0x7fffffff || blocks.y > 65535 || blocks.z > 65535) {
        return "a grid of " + describe(blocks) + " blocks: expected at least 1, at most 65535 in y and z";
    }
    const auto raised = raised_limits.find(kernel);
    const size_t limit = raised == raised_limits.end() ? DEFAULT_SHARED_LIMIT : raised->second;
    if (grid.shared_bytes > limit) {
        return std::to_string(grid.shared_bytes) + " bytes of dynamic shared memory: the limit is " +
               std::to_string(limit) + ", which cudaFuncSetAttribute raises";
    }
    return "";
}

// How many blocks run at once: CUDA_ON_CPU_THREADS, 1 if it is not set.
inline unsigned num_workers(unsigned num_blocks) {
    const char* wanted = getenv("CUDA_ON_CPU_THREADS");
    const unsigned most = CUDA_ON_CPU_ASAN || wanted == nullptr ? 1 : std::max(1, atoi(wanted));
    return std::min(most, num_blocks);
}

// Runs all blocks. The first mistake ends the launch.
inline void run_grid(const void* kernel, const Grid& grid) {
    if (const std::string refused = refusal(kernel, grid); !refused.empty()) {
        note_error(cudaErrorInvalidConfiguration, std::string(grid.kernel) + ": " + refused);
        return;
    }
    const unsigned num_blocks = grid.size.x * grid.size.y * grid.size.z;
    std::vector<int> order;
    set_order(order, num_blocks);
    std::atomic<unsigned> next{0};
    std::mutex lock;
    std::string mistake;
    auto work = [&] {
        static thread_local Block own;
        Block* outer = block;
        block = &own;
        prepare_block(own, grid);
        for (unsigned i; (i = next++) < num_blocks;) {
            const std::string found = run_block(own, grid, order[i]);
            if (found.empty()) continue;
            const std::lock_guard<std::mutex> guard(lock);
            if (mistake.empty()) mistake = found;
            next = num_blocks;
        }
        block = outer;
    };
    std::vector<std::thread> workers;
    for (unsigned i = 1; i < num_workers(num_blocks); i++) workers.emplace_back(work);
    work();
    for (auto& worker : workers) worker.join();
    if (!mistake.empty()) note_error(cudaErrorLaunchFailure, mistake);
}

// kernel<<<grid, block, shared_bytes, stream>>>: called with the kernel's arguments.
template <class... Parameters> struct Launcher {
    std::string name;
    void (*kernel)(Parameters...);
    dim3 grid, block_size;
    size_t shared_bytes;

    template <class... Arguments> void operator()(Arguments&&... arguments) const {
        struct Call {
            void (*kernel)(Parameters...);
            std::tuple<Parameters...> arguments;
        } call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
        auto run_thread = [](void* pointer) {
            const Call& call = *(const Call*)pointer;
            std::apply(call.kernel, call.arguments);
        };
        run_grid((const void*)kernel, Grid{name.c_str(), grid, block_size, shared_bytes, run_thread, &call});
    }
};

// name: as LAUNCH gets it. A kernel with several template arguments is in parentheses there, which are left out.
template <class... Parameters>
Launcher<Parameters...> make_launcher(
    const std::string& name, void (*kernel)(Parameters...), dim3 grid, dim3 block_size, size_t shared_bytes, cudaStream_t
) {
    const bool has_parentheses = name.front() == '(';
    return {has_parentheses ? name.substr(1, name.size() - 2) : name, kernel, grid, block_size, shared_bytes};
}

}  // namespace emulation

#define LAUNCH(kernel, grid, block, shared_bytes, stream) \
    emulation::make_launcher(#kernel, kernel, grid, block, shared_bytes, (cudaStream_t)(stream))

// The last error, which is then forgotten. Its message stays for cudaGetErrorString.
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return emulation::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : emulation::last_message.c_str();
}
inline cudaError_t cudaDeviceSynchronize() { return emulation::last_error; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulation::last_error; }

template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int num_bytes) {
    if (num_bytes > (int)emulation::MAX_SHARED_BYTES) {
        const std::string limit = std::to_string(emulation::MAX_SHARED_BYTES);
        return emulation::note_error(
            cudaErrorInvalidValue, std::to_string(num_bytes) + " bytes of shared memory: a block can have " + limit
        );
    }
    emulation::raised_limits[(const void*)kernel] = num_bytes;
    return cudaSuccess;
}

// Memory of the "device", which is the host's. New memory has no defined contents, as on a GPU.
template <class T> cudaError_t cudaMalloc(T** pointer, size_t num_bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, num_bytes) != 0) {
        return emulation::note_error(cudaErrorMemoryAllocation, std::to_string(num_bytes) + " bytes: out of memory");
    }
    *pointer = (T*)memory;
    memset((void*)*pointer, 0xff, num_bytes);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMallocManaged(T** pointer, size_t num_bytes) { return cudaMalloc(pointer, num_bytes); }
inline cudaError_t cudaFree(void* pointer) {
    free(pointer);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t num_bytes, cudaMemcpyKind) {
    memcpy(target, source, num_bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* target, int value, size_t num_bytes) {
    memset(target, value, num_bytes);
    return cudaSuccess;
}
