"""Small real kernels for the tests of build, cubin, sass and the static model."""

from __future__ import annotations

from tuner.render import Source
from tuner.space import Problem, default_config

CONFIG = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))


def source(text: str) -> Source:
    """``text`` as if it had been rendered."""
    return Source(CONFIG, text)


def tiny(n: int) -> Source:
    """A kernel that compiles at once; every ``n`` is another one."""
    return source(f'extern "C" __global__ void wph_decode(float *x) {{ x[threadIdx.x] *= {n}.5f; }}\n')


BROKEN = source('extern "C" __global__ void wph_decode(float *x) {\n    x[0] = nothing;\n}\n')
GREEDY = source("""
extern "C" __global__ void wph_decode(int *x) {
    __shared__ int s[20000];
    s[x[0]] = 1;
    x[1] = s[x[2]];
}
""")

# An outer loop with an asynchronous copy and barriers, an inner loop of known content, and a second kernel.
LOOPS = source("""
extern "C" __global__ void __launch_bounds__(128) wph_decode(const float *__restrict__ a, float *out, int n) {
    __shared__ float s[1024];
    float sum = 0.f;
    for (int i = threadIdx.x; i < n; i += 128) {
        s[threadIdx.x] = a[i];
        __syncthreads();
#pragma unroll 1
        for (int j = 0; j < 8; ++j) {
            const float4 x = *reinterpret_cast<const float4 *>(s + 4 * ((threadIdx.x + j) & 255));
            sum += __shfl_xor_sync(~0u, x.x, 1) * x.y;
            sum += x.z * x.w;
        }
        __syncthreads();
    }
    out[threadIdx.x + blockIdx.x * 128] = sum;
}
extern "C" __global__ void wph_decode_reduce(float *x) { x[threadIdx.x] += 1.f; }
""")
