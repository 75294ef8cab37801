// A tile for the tensor cores begins at an address that is no multiple of 32 bytes.
#include "outcome.h"

__global__ void misaligned_tile(const half* input, float* output) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::row_major> tile;
    nvcuda::wmma::load_matrix_sync(tile, input + 4, 16);
    output[threadIdx.x] = __half2float(tile.x[0]);
}

int main() {
    half* input = allocate<half>(512);
    float* output = allocate<float>(32);
    LAUNCH(misaligned_tile, 1, 32, 0, 0)(input, output);
    return outcome(output, 4);
}
