"""CUDA on a CPU: each classic mistake is named, correct kernels run, and numbers are those of CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "part15_full_architecture" / "worker" / "kernels" / "cuda" / "cuda_on_cpu"
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-pthread", "-Wall", "-Wextra", "-Werror"]
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
pytestmark = pytest.mark.skipif(not COMPILERS, reason="there is no C++ compiler: g++ or clang++")


def compiled(source: Path, directory: Path, *flags: str, compiler: str = "") -> Path:
    """A program."""
    program = directory / "program"
    command = [compiler or COMPILERS[0], *FLAGS, *flags, "-x", "c++", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"{source.name} does not compile with {command[0]}:\n{built.stderr}"
    return program


def run(program: Path, **env: str) -> tuple[int, str]:
    """Its status, and all that it printed."""
    done = subprocess.run(
        [program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, **env}, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout


@dataclass(frozen=True)
class Mistake:
    """What the program of a mistake must print. sanitizer: what it needs to be found."""

    name: str
    message: tuple[str, ...]
    sanitizer: str = ""
    order: str = ""
    is_error: bool = True


MISTAKES = [
    Mistake(
        "barrier_in_a_branch",
        ("thread (32,0,0)", "__syncthreads at", "barrier_in_a_branch.cu:12", "wait in", "barrier_in_a_branch.cu:9"),
    ),
    Mistake(
        "barrier_that_not_all_reach",
        ("deadlock", "16 thread(s), the first is 16, wait in __shfl_xor_sync at", ".cu:6", "__syncthreads at", ".cu:5"),
    ),
    Mistake("shuffle_in_a_branch", ("thread (1,0,0)", "__shfl_up_sync", ".cu:9", "__shfl_down_sync", ".cu:7")),
    Mistake("lane_outside_its_mask", ("thread (16,0,0)", ".cu:5", "not in its own mask")),
    Mistake("past_dynamic_shared_memory", ("wrote to byte 128", "which has 128 bytes")),
    Mistake("past_dynamic_shared_memory", ("use-after-poison", ".cu:6"), sanitizer="address"),
    Mistake("past_a_shared_array", ("global-buffer-overflow", ".cu:6", "'values'"), sanitizer="address"),
    Mistake("missing_barrier", ("data race", ".cu:7", ".cu:8", "'(32,0,0)'", "'(31,0,0)'"), sanitizer="thread"),
    Mistake("missing_syncwarp", ("data race", ".cu:7", ".cu:8"), sanitizer="thread"),
    Mistake("reduction_that_reuses_too_early", ("data race", ".cu:8", ".cu:10"), sanitizer="thread"),
    Mistake("copy_without_a_barrier", ("data race", "__pipeline_wait_prior", ".cu:9"), sanitizer="thread"),
    Mistake("block_table_outside_the_cache", ("heap-buffer-overflow", "READ of size 4", ".cu:6"), sanitizer="address"),
    Mistake("misaligned_load", ("misaligned address", ".cu:5"), sanitizer="alignment", is_error=False),
    Mistake("misaligned_tile", ("must begin at a multiple of 32 bytes",)),
    Mistake("read_before_write", ("nan nan nan nan",), is_error=False),
    Mistake("copy_not_waited_for", ("nan nan nan nan",), is_error=False),
    Mistake("order_of_blocks", ("nan nan nan",), order="reverse", is_error=False),
    Mistake("too_many_threads", ("a block of (2048,1,1) threads: expected 1 to 1024",)),
    Mistake("too_much_shared_memory", ("65536 bytes", "the limit is 49152", "cudaFuncSetAttribute")),
    Mistake("large_local_array", ("thread 0 needs more than 64 KiB for its local variables",)),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.name} {m.sanitizer}".strip())
def test_a_mistake_is_named(mistake: Mistake, tmp_path: Path) -> None:
    flags = [f"-fsanitize={mistake.sanitizer}"] if mistake.sanitizer else []
    order = {"CUDA_ON_CPU_ORDER": mistake.order} if mistake.order else {}
    status, text = run(compiled(TOOL / "mistakes" / f"{mistake.name}.cu", tmp_path, *flags), **order)
    text = text.replace("-nan", "nan")
    assert (status != 0) == mistake.is_error, f"{mistake.name} ended with {status}:\n{text}"
    missing = [part for part in mistake.message if part not in text]
    assert not missing, f"{mistake.name}: the report lacks {missing}:\n{text}"


def test_each_mistake_is_tested_and_on_the_page() -> None:
    programs = {path.stem for path in (TOOL / "mistakes").glob("*.cu")}
    assert programs == {mistake.name for mistake in MISTAKES}, "a program of mistakes/ is not tested, or the reverse"
    page = (TOOL / "README.md").read_text(encoding="utf-8")
    missing = [name for name in programs if f"mistakes/{name}.cu" not in page]
    assert not missing, f"cuda_on_cpu/README.md does not mention {missing}"


TEMPLATE = r"""
#include "CUDA_ON_CPU/cuda_on_cpu.h"
template <class T, int N> __global__ void wait_in_a_branch(T* output) {
    if (threadIdx.x < N) __syncthreads();
    else __syncwarp(0xffffffff), __syncthreads();
    output[0] = 1;
}
int main() {
    float output;
    LAUNCH((wait_in_a_branch<float, 32>), 1, 64, 0, 0)(&output);
    puts(cudaGetErrorString(cudaGetLastError()));
}
"""


def test_a_message_names_a_template_without_the_parentheses_of_launch(tmp_path: Path) -> None:
    source = tmp_path / "template.cu"
    source.write_text(TEMPLATE.replace("CUDA_ON_CPU", str(TOOL)))
    _, text = run(compiled(source, tmp_path))
    assert text.startswith("wait_in_a_branch<float, 32>, block (0,0,0)"), f"got {text}"


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("sanitizer", ["", "thread", "address,undefined"])
def test_the_example_is_right(compiler: str, sanitizer: str, tmp_path: Path) -> None:
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    for name in ("example.cu", *HEADERS):  # it needs nothing else
        shutil.copy(TOOL / name, tmp_path)
    status, text = run(compiled(tmp_path / "example.cu", tmp_path, *flags, compiler=compiler))
    assert status == 0 and text.count("probabilities add up to 1.000000") == 8, f"the example printed:\n{text}"
    assert "runtime error" not in text and "WARNING" not in text, f"a sanitizer complains about the example:\n{text}"


HEADERS = sorted(path.name for path in TOOL.glob("*.h"))

CORRECT = r"""
#include "CUDA_ON_CPU/cuda_on_cpu.h"
#include "CUDA_ON_CPU/ptx.h"
#include <cassert>
#include <cstdio>
using namespace nvcuda;

__global__ void votes(int* output) {
    const int lane = threadIdx.x;
    const int num_votes = __popc(__ballot_sync(~0u, lane % 3 == 0));
    output[lane] = num_votes * 100 + (__any_sync(~0u, lane == 5) != 0) * 10 + (__all_sync(~0u, lane < 32) != 0);
}
__global__ void shuffles(int* output) {
    const int lane = threadIdx.x;
    output[lane] = __shfl_up_sync(~0u, lane, 3);
    output[32 + lane] = __shfl_down_sync(~0u, lane, 3, 8);
    output[64 + lane] = __shfl_sync(~0u, lane, 5, 8);
    output[96 + lane] = __shfl_xor_sync(~0u, lane, 5, 4);  // outside the segment: the own number
}
__global__ void halves_of_a_warp(int* output) {
    const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
    int sum = threadIdx.x;
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
    output[threadIdx.x] = sum;
}
__global__ void threads_that_leave(int* output) {  // allowed since Volta
    if (threadIdx.x >= 40) return;
    __syncthreads();
    output[threadIdx.x] = __syncthreads_count(threadIdx.x % 3 == 0);
}
__global__ void indices(int* output) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    output[block * 24 + thread] = block * 24 + thread;
}
__global__ void sum_of_all(int* output) { atomicAdd(output, (int)(blockIdx.x * blockDim.x + threadIdx.x)); }
__global__ void zero_filled(const float4* input, float* output) {
    __shared__ float4 values[32];
    __pipeline_memcpy_async(&values[threadIdx.x], &input[threadIdx.x], 16, threadIdx.x % 4 * 4);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    output[threadIdx.x] = values[threadIdx.x].x + values[threadIdx.x].y + values[threadIdx.x].z + values[threadIdx.x].w;
}
template <class T> __global__ void product_by_wmma(const T* a, const T* b, float* output) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums;
    wmma::fill_fragment(sums, 1.f);
    wmma::load_matrix_sync(fa, a, 16);
    wmma::load_matrix_sync(fb, b, 16);
    wmma::mma_sync(sums, fa, fb, sums);
    wmma::store_matrix_sync(output, sums, 16, wmma::mem_row_major);
}
// The same product by mma.sync, whose registers ldmatrix has loaded: columns 0 to 7.
template <class T> __global__ void product_by_mma(const T* a, const T* b, float* output) {
    __shared__ __align__(16) T tile_a[16 * 16];
    __shared__ __align__(16) T tile_b[16 * 16];
    const int lane = threadIdx.x, row = lane / 4, pair = 2 * (lane % 4);
    for (int i = lane; i < 256; i += 32) {
        tile_a[i] = a[i];
        tile_b[i] = b[i];
    }
    __syncwarp();
    unsigned fa[4], fb[4];
    ptx::ldmatrix_x4<false>(fa, tile_a + lane % 16 * 16 + lane / 16 * 8);
    ptx::ldmatrix_x4<false>(fb, tile_b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);  // column-major
    float sums[4] = {1.f, 1.f, 1.f, 1.f};
    const unsigned first[2] = {fb[0], fb[1]};
    ptx::mma_m16n8k16<T>(sums, fa, first);
    for (int i = 0; i < 4; i++) output[(row + 8 * (i / 2)) * 8 + pair + i % 2] = sums[i];
}
__global__ void permuted_bytes(unsigned* output) {
    const unsigned selectors[] = {0x3210, 0x7654, 0x7440, 0x0123, 0x5555, 0xba98, 0xfedc, 0xabcd6172};
    output[threadIdx.x] = __byte_perm(0x83a2c1e0u, 0x97b6d5f4u, selectors[threadIdx.x]);
}
__global__ void transposed(const unsigned short* input, unsigned* output) {
    unsigned tiles[4];
    ptx::ldmatrix_x4<true>(tiles, input + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) output[threadIdx.x * 4 + i] = tiles[i];
}

template <class T> void test_products() {
    alignas(32) T a[256], b[256];
    alignas(32) float by_wmma[256], by_mma[128];
    for (int i = 0; i < 256; i++) {
        a[i] = (float)(i * 7 % 13 - 6);
        b[i] = (float)(i * 5 % 11 - 5);
    }
    LAUNCH(product_by_wmma<T>, 1, 32, 0, 0)(a, b, by_wmma);
    LAUNCH(product_by_mma<T>, 1, 32, 0, 0)(a, b, by_mma);
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 16; column++) {
            float expected = 1;
            for (int k = 0; k < 16; k++) expected += (float)a[row * 16 + k] * (float)b[column * 16 + k];
            assert(by_wmma[row * 16 + column] == expected);
            if (column < 8) assert(by_mma[row * 8 + column] == expected);
        }
    }
}

int main() {
    int output[256] = {};
    LAUNCH(votes, 1, 32, 0, 0)(output);
    for (int lane = 0; lane < 32; lane++) assert(output[lane] == 1111);
    LAUNCH(shuffles, 1, 32, 0, 0)(output);
    for (int lane = 0; lane < 32; lane++) {
        assert(output[lane] == (lane < 3 ? lane : lane - 3));
        assert(output[32 + lane] == (lane % 8 < 5 ? lane + 3 : lane));
        assert(output[64 + lane] == lane / 8 * 8 + 5);
        assert(output[96 + lane] == lane);
    }
    LAUNCH(halves_of_a_warp, 1, 32, 0, 0)(output);
    for (int lane = 0; lane < 32; lane++) assert(output[lane] == (lane < 16 ? 120 : 376));
    LAUNCH(threads_that_leave, 1, 64, 0, 0)(output);
    for (int i = 0; i < 40; i++) assert(output[i] == 14);
    LAUNCH(indices, dim3(2, 1, 3), dim3(2, 3, 4), 0, 0)(output);
    for (int i = 0; i < 144; i++) assert(output[i] == i);
    output[0] = 0;
    LAUNCH(sum_of_all, 10, 100, 0, 0)(output);
    assert(output[0] == 999 * 1000 / 2);
    alignas(16) float input[128], sums[32];
    for (int i = 0; i < 128; i++) input[i] = 1;
    LAUNCH(zero_filled, 1, 32, 0, 0)((const float4*)input, sums);
    for (int i = 0; i < 32; i++) assert(sums[i] == 4 - i % 4);
    unsigned permuted[8];
    LAUNCH(permuted_bytes, 1, 8, 0, 0)(permuted);
    const unsigned expected[8] = {  // the last three: the highest bit of each four, and the upper 16 bits, are not used
        0x83a2c1e0, 0x97b6d5f4, 0x97f4f4e0, 0xe0c1a283, 0xd5d5d5d5, 0x83a2c1e0, 0x97b6d5f4, 0xb6c197a2,
    };
    for (int i = 0; i < 8; i++) assert(permuted[i] == expected[i]);
    test_products<half>();
    test_products<__nv_bfloat16>();
    alignas(16) unsigned short numbers[256];
    unsigned tiles[128];
    for (int i = 0; i < 256; i++) numbers[i] = i;
    LAUNCH(transposed, 1, 32, 0, 0)(numbers, tiles);
    for (int lane = 0; lane < 32; lane++) {
        for (int tile = 0; tile < 4; tile++) {  // row l / 4 of the transposed tile is its column l / 4
            const unsigned low = tile * 64 + 2 * (lane % 4) * 8 + lane / 4;
            assert(tiles[lane * 4 + tile] == (low | (low + 8) << 16));
        }
    }
    assert(cudaGetLastError() == cudaSuccess);
    puts("all right");
}
"""


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("flags", [(), ("-fsanitize=thread",), ("-fsanitize=address,undefined",)], ids=str)
def test_correct_kernels_run(compiler: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "correct.cu"
    source.write_text(CORRECT.replace("CUDA_ON_CPU", str(TOOL)))
    program = compiled(source, tmp_path, *flags, compiler=compiler)
    for order in ("", "reverse", "random:1", "random:2"):
        status, text = run(program, CUDA_ON_CPU_ORDER=order)
        assert (status, text) == (0, "all right\n"), f"order {order!r}, {compiler} {flags} ended with {status}:\n{text}"


NUMBERS = r"""
#include "CUDA_ON_CPU/cuda_on_cpu.h"
extern "C" void round_trip(const float* numbers, int n, unsigned short* halves, unsigned short* bfloats) {
    for (int i = 0; i < n; i++) {
        halves[i] = __half_as_ushort(__float2half(numbers[i]));
        bfloats[i] = __bfloat16_as_ushort(__float2bfloat16(numbers[i]));
    }
}
extern "C" void decode(float* halves, float* bfloats) {
    for (int i = 0; i < 65536; i++) {
        halves[i] = __half2float(emulation::bits_as<__half>((unsigned short)i));
        bfloats[i] = __bfloat162float(emulation::bits_as<__nv_bfloat16>((unsigned short)i));
    }
}
"""


@pytest.mark.parametrize("define", ["", "-DCUDA_ON_CPU_SOFT_HALF"], ids=["native", "soft"])
def test_half_and_bfloat16_are_those_of_torch(define: str, tmp_path: Path) -> None:
    import ctypes

    import torch

    source, library = tmp_path / "numbers.cu", tmp_path / "numbers.so"
    source.write_text(NUMBERS.replace("CUDA_ON_CPU/", f"{TOOL}/"))
    flags = [*FLAGS, *([define] if define else []), "-fPIC", "-shared", "-x", "c++"]
    subprocess.run([COMPILERS[0], *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    halves, bfloats = torch.empty(65536), torch.empty(65536)
    loaded.decode(pointer(halves), pointer(bfloats))
    bits = torch.arange(65536).to(torch.uint16)
    for found, dtype in ((halves, torch.float16), (bfloats, torch.bfloat16)):
        torch.testing.assert_close(found, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    between = (halves[:31744] + torch.nextafter(halves[:31744], torch.tensor(torch.inf))) / 2
    ties = (halves[:31743] + halves[1:31744]) / 2  # halfway between two neighbors
    numbers = torch.cat((some, between, ties, -ties, torch.tensor([65504.0, 65519.9, 65520.0, 1e-8, -0.0])))
    codes = [torch.empty(len(numbers), dtype=torch.uint16) for _ in range(2)]
    loaded.round_trip(pointer(numbers), len(numbers), *map(pointer, codes))
    for found, dtype in zip(codes, (torch.float16, torch.bfloat16), strict=True):
        torch.testing.assert_close(found.view(dtype).float(), numbers.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
