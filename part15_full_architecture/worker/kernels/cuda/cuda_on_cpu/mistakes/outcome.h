// How a program ends: it prints the error of a launch and exits with 1, or prints the first results.
#pragma once
#include "../cuda_on_cpu.h"

#include <cstdio>
#include <cstdlib>

inline void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    printf("error: %s\n", cudaGetErrorString(error));
    exit(1);
}

template <class T> T* allocate(int n) {
    T* pointer;
    check(cudaMallocManaged(&pointer, n * sizeof(T)));
    return pointer;
}

inline int outcome(const float* results, int n) {
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    for (int i = 0; i < n; i++) printf("%g ", results[i]);
    printf("\n");
    return 0;
}
