// Tensor cores through nvcuda::wmma: products of 16 x 16 tiles by a whole warp. CUDA does not say which lane holds
// which element of a fragment. Here, element i of lane l is element 32 * i + l of the tile, which is no GPU's layout.
#pragma once

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static constexpr bool is_a = std::is_same<Use, matrix_a>::value, is_b = std::is_same<Use, matrix_b>::value;
    static constexpr int num_rows = is_b ? K : M, num_columns = is_a ? K : N;
    static constexpr int num_elements = num_rows * num_columns / 32;
    T x[num_elements];
};

template <class Fragment, class T> void fill_fragment(Fragment& fragment, T value) {
    for (auto& element : fragment.x) element = value;
}

template <class T> void check_address(const T* pointer, unsigned stride) {
    if ((uintptr_t)pointer % 32) emulation::stop("wmma: a tile must begin at a multiple of 32 bytes");
    if (stride * sizeof(T) % 16) emulation::stop("wmma: the stride of the rows must be a multiple of 16 bytes");
}

template <class Fragment, class T>
void load_tile(Fragment& fragment, const T* pointer, unsigned stride, bool is_row_major) {
    check_address(pointer, stride);
    for (int i = 0; i < Fragment::num_elements; i++) {
        const int element = i * 32 + emulation::lane();
        const int row = element / Fragment::num_columns, column = element % Fragment::num_columns;
        fragment.x[i] = is_row_major ? pointer[row * stride + column] : pointer[column * stride + row];
    }
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& fragment, const T* pointer, unsigned stride) {
    load_tile(fragment, pointer, stride, std::is_same<Layout, row_major>::value);
}
template <int M, int N, int K, class T>
void load_matrix_sync(fragment<accumulator, M, N, K, T>& fragment, const T* pointer, unsigned stride, layout_t layout) {
    load_tile(fragment, pointer, stride, layout == mem_row_major);
}
template <int M, int N, int K, class T>
void store_matrix_sync(T* pointer, const fragment<accumulator, M, N, K, T>& fragment, unsigned stride, layout_t layout) {
    check_address(pointer, stride);
    for (int i = 0; i < fragment.num_elements; i++) {
        const int element = i * 32 + emulation::lane(), row = element / N, column = element % N;
        pointer[layout == mem_row_major ? row * stride + column : column * stride + row] = fragment.x[i];
    }
}

template <int M, int N, int K, class D, class A, class B> struct MmaOperands {
    D* result;
    const A* a;
    const B* b;
    const D* sum;

    UNCHECKED static void exchange(void** operands, unsigned lanes) {
        if (lanes != emulation::ALL_LANES) emulation::stop("mma_sync: all 32 lanes of the warp must execute it");
        typedef std::decay_t<decltype(result->x[0])> Sum;
        Sum a[M * K], b[K * N], total[M * N];
        for (int lane = 0; lane < 32; lane++) {
            const MmaOperands& own = *(MmaOperands*)operands[lane];
            for (int i = 0; i < A::num_elements; i++) {
                const auto number = own.a->x[i];  // a copy: its conversion may be a function that sanitizers check
                a[i * 32 + lane] = (Sum)number;
            }
            for (int i = 0; i < B::num_elements; i++) {
                const auto number = own.b->x[i];
                b[i * 32 + lane] = (Sum)number;
            }
            for (int i = 0; i < D::num_elements; i++) total[i * 32 + lane] = own.sum->x[i];
        }
        for (int row = 0; row < M; row++) {
            for (int k = 0; k < K; k++) {
                for (int column = 0; column < N; column++) total[row * N + column] += a[row * K + k] * b[k * N + column];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            D& result = *((MmaOperands*)operands[lane])->result;
            for (int i = 0; i < D::num_elements; i++) result.x[i] = total[i * 32 + lane];
        }
    }
};

template <int M, int N, int K, class T, class TA, class LayoutA, class TB, class LayoutB>
void mma_sync(
    fragment<accumulator, M, N, K, T>& result, const fragment<matrix_a, M, N, K, TA, LayoutA>& a,
    const fragment<matrix_b, M, N, K, TB, LayoutB>& b, const fragment<accumulator, M, N, K, T>& sum, PLACE_OF_CALL
) {
    typedef std::decay_t<decltype(result)> D;
    typedef MmaOperands<M, N, K, D, std::decay_t<decltype(a)>, std::decay_t<decltype(b)>> Operands;
    Operands operands{&result, &a, &b, &sum};
    emulation::meet(emulation::ALL_LANES, &operands, Operands::exchange, {"mma_sync", file, line});
}

}  // namespace wmma
}  // namespace nvcuda
