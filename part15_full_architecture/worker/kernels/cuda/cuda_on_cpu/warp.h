// Operations of a warp: 32 threads, the lanes, that exchange numbers without shared memory.
#pragma once

namespace emulation {

inline int lane() { return block->current->lane(); }

template <class T> struct ShuffleOperands {
    T given, received;
    int source;
};

template <class T> UNCHECKED void exchange_shuffle(void** operands, unsigned lanes) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1)) continue;
        auto& own = *(ShuffleOperands<T>*)operands[lane];
        if (lanes >> own.source & 1) {
            own.received = ((ShuffleOperands<T>*)operands[own.source])->given;
        } else {
            memset((void*)&own.received, 0xff, sizeof(T));  // what a lane gets from one that is absent is undefined
        }
    }
}

template <class T> T shuffle(unsigned mask, T value, int source, Place place) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    ShuffleOperands<T> operands{value, value, source};
    meet(mask, &operands, exchange_shuffle<T>, place);
    return operands.received;
}

// The lane that a shuffle reads: `wanted`, or the own one if that is outside the segment of `width` lanes.
inline int within(int wanted, int width) {
    const int first = lane() & ~(width - 1);
    return wanted < first || wanted >= first + width ? lane() : wanted;
}

struct VoteOperands {
    bool vote;
    unsigned votes;
};

UNCHECKED inline void exchange_votes(void** operands, unsigned lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (lanes >> lane & 1) votes |= (unsigned)((VoteOperands*)operands[lane])->vote << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
        if (lanes >> lane & 1) ((VoteOperands*)operands[lane])->votes = votes;
    }
}

inline unsigned collect_votes(unsigned mask, bool vote, Place place) {
    VoteOperands operands{vote, 0};
    meet(mask, &operands, exchange_votes, place);
    return operands.votes;
}

}  // namespace emulation

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, PLACE_OF_CALL) {
    const int first = emulation::lane() & ~(width - 1);
    return emulation::shuffle(mask, value, first + (source & (width - 1)), {"__shfl_sync", file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, PLACE_OF_CALL) {
    const int source = emulation::within(emulation::lane() ^ lane_mask, width);
    return emulation::shuffle(mask, value, source, {"__shfl_xor_sync", file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PLACE_OF_CALL) {
    const int source = emulation::within(emulation::lane() + (int)delta, width);
    return emulation::shuffle(mask, value, source, {"__shfl_down_sync", file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PLACE_OF_CALL) {
    const int source = emulation::within(emulation::lane() - (int)delta, width);
    return emulation::shuffle(mask, value, source, {"__shfl_up_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PLACE_OF_CALL) {
    return emulation::collect_votes(mask, predicate != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, PLACE_OF_CALL) {
    return emulation::collect_votes(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PLACE_OF_CALL) {
    return emulation::collect_votes(mask, predicate == 0, {"__all_sync", file, line}) == 0;
}

// A barrier for the lanes of the mask: what they wrote before it is visible to the others after it. (A shuffle is none.)
inline void __syncwarp(unsigned mask = 0xffffffffu, PLACE_OF_CALL) {
    void* warp = &emulation::block->warps[emulation::block->current->number / 32];
    emulation::release(warp);
    emulation::meet(mask, nullptr, nullptr, {"__syncwarp", file, line});
    emulation::acquire(warp);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
