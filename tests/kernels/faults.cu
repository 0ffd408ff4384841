// One mistake per entry.
#include "emulate.h"

struct Params {
    const unsigned char *data;
    unsigned *out;
    int n;
};

extern "C" __global__ void read_byte(const __grid_constant__ Params p) { p.out[threadIdx.x] = p.data[p.n]; }
extern "C" __global__ void read_half(const __grid_constant__ Params p) {
    p.out[threadIdx.x] = *reinterpret_cast<const unsigned short *>(p.data + p.n);
}
extern "C" __global__ void load_half(const __grid_constant__ Params p) {
    p.out[threadIdx.x] = load_global<unsigned short>(p.data + p.n);
}
extern "C" __global__ void write_shared(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    smem[p.n] = 1;
    p.out[threadIdx.x] = smem[p.n];
}
extern "C" __global__ void local_index(const __grid_constant__ Params p) {
    unsigned local[4] = {1, 2, 3, 4};
    p.out[threadIdx.x] = local[p.n];
}
extern "C" __global__ void missing_wait(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    cp_async<4>(smem + 4 * threadIdx.x, p.data + 4 * threadIdx.x, 4);
    cp_async_commit();
    if (p.n) cp_async_wait<0>();
    p.out[threadIdx.x] = reinterpret_cast<unsigned *>(smem)[threadIdx.x];
}
// The next round's write may overtake the other warp's read unless n.
extern "C" __global__ void missing_sync(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned *words = reinterpret_cast<unsigned *>(smem);
    unsigned sum = 0;
    for (unsigned round = 0; round < 4; ++round) {
        words[threadIdx.x] = threadIdx.x + round * 1000u;
        sync_cta();
        sum += words[threadIdx.x ^ 32u];
        if (p.n) sync_cta();
    }
    p.out[threadIdx.x] = sum;
}
extern "C" __global__ void divergent(const __grid_constant__ Params p) {
    unsigned v = threadIdx.x;
    if (threadIdx.x < 7) v = shuffle_xor(v, 1);
    else sync_warp();
    p.out[threadIdx.x] = v;
}
extern "C" __global__ void exits(const __grid_constant__ Params p) {
    if (static_cast<int>(threadIdx.x) == p.n) return;
    p.out[threadIdx.x] = shuffle(threadIdx.x, 3);
}
extern "C" __global__ void deadlock(const __grid_constant__ Params p) {
    if (threadIdx.x < 32) sync_named(1, 64);
    else sync_cta();
    p.out[threadIdx.x] = 0;
}
extern "C" __global__ void barrier_count(const __grid_constant__ Params p) {
    sync_named(1, p.n);
    p.out[threadIdx.x] = 0;
}
extern "C" __global__ void copy_alignment(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    cp_async<16>(smem, p.data + p.n, 16);
}
extern "C" __global__ void copy_twice(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    if (threadIdx.x) return;
    for (int turn = 0; turn < 2; ++turn) {
        cp_async<16>(smem, p.data, 16);
        cp_async_commit();
        cp_async_wait<0>();
    }
    cp_async<16>(smem, p.data, 16);
    cp_async_commit();
    cp_async<4>(smem + p.n, p.data, 4);
}
extern "C" __global__ void copy_valid(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    cp_async<4>(smem, p.data, p.n);
}
extern "C" __global__ void bulk_overrun(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned long long *bar = reinterpret_cast<unsigned long long *>(smem + 128);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_arrive_expect(bar, 64);
        bulk_copy(smem, p.data + p.n, 64, bar);
        mbarrier_wait(bar, 0);
    }
}
extern "C" __global__ void bulk_bytes(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned long long *bar = reinterpret_cast<unsigned long long *>(smem + 128);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_arrive_expect(bar, 64);
        bulk_copy(smem, p.data, p.n, bar);
        mbarrier_wait(bar, 0);
    }
}
extern "C" __global__ void barrier_missing(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    mbarrier_wait(reinterpret_cast<unsigned long long *>(smem), p.n);
}
extern "C" __global__ void barrier_overwritten(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned long long *bar = reinterpret_cast<unsigned long long *>(smem);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        smem[3] = static_cast<unsigned char>(p.n);
        mbarrier_arrive(bar);
    }
}
extern "C" __global__ void endless(const __grid_constant__ Params p) {
    for (volatile int i = 0; i < 2; i = 0) p.out[0] = 1;
}
