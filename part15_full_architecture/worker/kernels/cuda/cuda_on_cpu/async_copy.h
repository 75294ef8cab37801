// cp.async: copies from global to shared memory that run beside the computation. Here, the bytes arrive only when
// their group is waited for: a kernel that reads them earlier sees what was there before.
#pragma once

namespace emulation {

UNCHECKED inline void finish_copy(const AsyncCopy& copy) {
    memcpy(copy.target, copy.source, copy.num_bytes - copy.num_zeros);
    memset((char*)copy.target + copy.num_bytes - copy.num_zeros, 0, copy.num_zeros);
}

}  // namespace emulation

// Starts a copy of 4, 8 or 16 bytes, the last num_zeros of which become zeros and are not read.
UNCHECKED inline void __pipeline_memcpy_async(void* target, const void* source, size_t num_bytes, size_t num_zeros = 0) {
    emulation::Thread& thread = *emulation::block->current;
    if (num_bytes != 4 && num_bytes != 8 && num_bytes != 16) {
        emulation::stop("__pipeline_memcpy_async of " + std::to_string(num_bytes) + " bytes: expected 4, 8 or 16");
    }
    if (((uintptr_t)target | (uintptr_t)source) % num_bytes) {
        emulation::stop("__pipeline_memcpy_async: both addresses must be multiples of the number of bytes");
    }
    if (thread.num_copies == emulation::MAX_COPIES) {
        emulation::stop("__pipeline_memcpy_async: a thread has more than 64 copies in flight");
    }
    thread.copies[thread.num_copies++] = {target, source, num_bytes, num_zeros, thread.copy_group};
}

// The copies since the last commit are a group.
UNCHECKED inline void __pipeline_commit() { emulation::block->current->copy_group++; }

// Waits until all but the last num_groups groups have arrived: for this thread. Others need a barrier to see them.
UNCHECKED inline void __pipeline_wait_prior(int num_groups) {
    emulation::Thread& thread = *emulation::block->current;
    int num_kept = 0;
    for (int i = 0; i < thread.num_copies; i++) {
        const emulation::AsyncCopy copy = thread.copies[i];
        if (copy.group >= thread.copy_group - num_groups) {
            thread.copies[num_kept++] = copy;
        } else {
            emulation::finish_copy(copy);
        }
    }
    thread.num_copies = num_kept;
}
