// Paged attention in miniature: a block table names a block that the cache does not have. AddressSanitizer names the
// load.
#include "outcome.h"

__global__ void block_table_outside_the_cache(const float* cache, const int* block_table, float* output) {
    output[threadIdx.x] = cache[block_table[threadIdx.x / 16] * 16 + threadIdx.x % 16];
}

int main() {
    float *cache = allocate<float>(4 * 16), *output = allocate<float>(32);
    int* block_table = allocate<int>(2);
    for (int i = 0; i < 4 * 16; i++) cache[i] = i;
    block_table[0] = 3;
    block_table[1] = 4;  // the cache has blocks 0 to 3
    LAUNCH(block_table_outside_the_cache, 1, 32, 0, 0)(cache, block_table, output);
    return outcome(output, 4);
}
