// One entry per family of primitives; a, b, c are operands, out is [operation][n] or as each entry says.
#include "emulate.h"

struct Params {
    const unsigned *a, *b, *c;
    unsigned *out;
    int n;
};

extern "C" __global__ void __launch_bounds__(128, 1) words(const __grid_constant__ Params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) return;
    const unsigned a = p.a[i], b = p.b[i], c = p.c[i];
    const unsigned short low = static_cast<unsigned short>(a & 0xffffu);
    const unsigned results[] = {
        prmt(a, b, c),
        funnel_right(a, b, static_cast<int>(c & 63u)),
        h2_add(a, b),
        h2_sub(a, b),
        h2_mul(a, b),
        h2_fma(a, b, c),
        h2_pack(bits_to_float(a), bits_to_float(b)),
        bf2_pack(bits_to_float(a), bits_to_float(b)),
        float_to_bits(half_to_float(low)),
        float_to_bits(bf16_to_float(low)),
        float_to_bits(h2_low(a)),
        float_to_bits(h2_high(a)),
        h2_from_e4m3(low),
        float_to_bits(ex2(bits_to_float(a))),
        float_to_half(bits_to_float(a)),
        float_to_bf16(bits_to_float(a)),
        e4m3_pack(bits_to_float(a), bits_to_float(b)),
        float_to_bits(add_down(bits_to_float(a), bits_to_float(b))),
    };
    for (int k = 0; k < 18; ++k) p.out[k * p.n + i] = results[k];
}

extern "C" __global__ void warp(const __grid_constant__ Params p) {
    const int i = threadIdx.x, lane = i & 31;
    const unsigned a = p.a[i];
    const unsigned results[] = {
        shuffle_xor(a, 5),
        float_to_bits(shuffle_xor(bits_to_float(a), 16)),
        static_cast<unsigned>(shuffle_xor(static_cast<int>(a), 1)),
        shuffle(a, static_cast<int>(p.b[i])),
        float_to_bits(shuffle(bits_to_float(a), 7)),
        static_cast<unsigned>(shuffle(static_cast<int>(a), lane + 1)),
        static_cast<unsigned>(shuffle_up(static_cast<int>(a), 3)),
        vote_ballot((a & 1u) != 0),
        static_cast<unsigned>(vote_any(a == p.c[0])),
        movmatrix(a),
    };
    sync_warp();
    for (int k = 0; k < 10; ++k) p.out[k * p.n + i] = results[k];
}

// a: A [16][16], b: B [8][16] (column major), c: C [16][8] fp32; A and B halves in pairs.
extern "C" __global__ void matrix(const __grid_constant__ Params p) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = bits_to_float(p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2]);
    mma_16816(c, p.a[g * 8 + t], p.a[(g + 8) * 8 + t], p.a[g * 8 + t + 4], p.a[(g + 8) * 8 + t + 4], p.b[g * 8 + t],
              p.b[g * 8 + t + 4]);
    for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = float_to_bits(c[i]);
}

// Two stages of 16 bytes per thread, copied ahead; thread i passes on what thread n - 1 - i copied.
extern "C" __global__ void pipeline(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    uint4 *stages = reinterpret_cast<uint4 *>(smem);
    const int i = threadIdx.x, threads = blockDim.x, steps = p.n;
    const uint4 *from = reinterpret_cast<const uint4 *>(p.a);
    uint4 *to = reinterpret_cast<uint4 *>(p.out);
    cp_async<16>(stages + i, from + i, 16);
    cp_async_commit();
    for (int s = 0; s < steps; ++s) {
        if (s + 1 < steps) cp_async<16>(stages + (s + 1) % 2 * threads + i, from + (s + 1) * threads + i, 16);
        cp_async_commit();
        cp_async_wait<1>();
        sync_cta();
        to[s * threads + i] = stages[s % 2 * threads + threads - 1 - i];
        sync_cta();
    }
}

// Bytes past `valid` become zero: threads copy 4, 8 and 16 bytes of which i % (size + 1) are valid.
extern "C" __global__ void partial(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned *own = reinterpret_cast<unsigned *>(smem) + threadIdx.x * 8;
    const int i = threadIdx.x;
    cp_async<16>(own, p.a + i * 8, i % 17);
    cp_async<8>(own + 4, p.a + i * 8 + 4, i % 9);
    cp_async<4>(own + 6, p.a + i * 8 + 6, i % 5);
    cp_async_commit();
    cp_async_wait<0>();
    for (int k = 0; k < 7; ++k) p.out[i * 7 + k] = own[k];
}

// Warp 0 fills two stages of 512 bytes by bulk copies, warp 1 passes them on.
extern "C" __global__ void bulk(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned long long *full = reinterpret_cast<unsigned long long *>(smem + 1024), *empty = full + 2;
    const int lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; ++s) {
            mbarrier_init(full + s, 1);
            mbarrier_init(empty + s, 32);
        }
        mbarrier_fence_init();
    }
    sync_cta();
    for (int step = 0; step < p.n; ++step) {
        const int stage = step % 2, parity = step / 2 % 2;
        unsigned char *data = smem + stage * 512;
        if (threadIdx.x < 32) {
            if (lane == 0) {
                mbarrier_wait(empty + stage, parity ^ 1);
                mbarrier_arrive_expect(full + stage, 512);
                bulk_copy(data, p.a + step * 128, 256, full + stage);
                bulk_copy(data + 256, p.a + step * 128 + 64, 256, full + stage);
            }
        } else {
            mbarrier_wait(full + stage, parity);
            reinterpret_cast<uint4 *>(p.out)[step * 32 + lane] = reinterpret_cast<uint4 *>(data)[lane];
            mbarrier_arrive(empty + stage);
        }
    }
}

// Warps 0 and 1 exchange through barrier 1, warps 2 and 3 through barrier 2.
extern "C" __global__ void named(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned *words = reinterpret_cast<unsigned *>(smem);
    const int i = threadIdx.x;
    words[i] = p.a[i];
    if (i < 64) sync_named(1, 64);
    else sync_named(2, 64);
    p.out[i] = words[i ^ 32];
}

// Each CTA adds its part to partials (c as scratch comes zeroed); the last to arrive writes the sum and resets.
struct Counting {
    const unsigned *a;
    float *partials;
    int *counter;
    float *out;
};
extern "C" __global__ void last_cta(const __grid_constant__ Counting p) {
    const int ctas = gridDim.x * gridDim.y * gridDim.z;
    const int cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    float v = static_cast<float>(p.a[cta * 32 + threadIdx.x]);
    for (int m = 16; m; m >>= 1) v += shuffle_xor(v, m);
    int arrived = 0;
    if (threadIdx.x == 0) {
        p.partials[cta] = v;
        arrived = atomic_add_ordered(p.counter, 1);
    }
    if (shuffle(arrived, 0) != ctas - 1) return;
    float sum = 0;
    for (int i = threadIdx.x; i < ctas; i += 32) sum += load_l2(p.partials + i);
    for (int m = 16; m; m >>= 1) sum += shuffle_xor(sum, m);
    if (threadIdx.x == 0) {
        p.out[0] = sum;
        *p.counter = 0;
    }
}
