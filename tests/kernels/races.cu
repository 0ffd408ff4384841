// One edge per entry, which is missing unless n.
#include "emulate.h"

struct Params {
    const unsigned *data;
    int *counter;
    unsigned *out;
    int n;
};

extern "C" __global__ void across_warps(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    words[i] = i;
    if (p.n) sync_cta();
    p.out[blockIdx.x * 64 + i] = words[i ^ 32u];
}
// Lanes of a warp wait for each other at a shuffle, which orders no memory.
extern "C" __global__ void across_lanes(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    words[i] = i;
    const unsigned other = shuffle_xor(i, 1);
    if (p.n) sync_warp();
    p.out[i] = words[other];
}
extern "C" __global__ void by_address(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    words[i] = i;
    if (p.n) sync_warp();
    p.out[i] = load_shared(shared_address(words + (i ^ 1u)));
}
extern "C" __global__ void copy_unawaited(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    cp_async<4>(words + i, p.data + i, 4);
    cp_async_commit();
    if (p.n) cp_async_wait<0>();
    p.out[i] = words[i];
}
// The second group is still on its way when only one may be.
extern "C" __global__ void group_unawaited(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    cp_async<4>(words + i, p.data + i, 4);
    cp_async_commit();
    cp_async<4>(words + 64 + i, p.data + i, 4);
    cp_async_commit();
    cp_async_wait<1>();
    p.out[i] = words[i];
    if (p.n) cp_async_wait<0>();
    p.out[i] += words[64 + i];
}
// A wait is for the thread's own copies.
extern "C" __global__ void copy_of_another(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    cp_async<4>(words + i, p.data + i, 4);
    cp_async_commit();
    cp_async_wait<0>();
    if (p.n) sync_cta();
    p.out[i] = words[i ^ 32u];
}
extern "C" __global__ void copy_too_early(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x;
    words[i] = i;
    sync_cta();
    p.out[i] = words[i ^ 32u];
    if (p.n) sync_cta();
    cp_async<4>(words + i, p.data + i, 4);
    cp_async_commit();
    cp_async_wait<0>();
}
// The first warp does not wait; the second one does.
extern "C" __global__ void bulk_unawaited(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    unsigned long long *full = reinterpret_cast<unsigned long long *>(words + 64);
    const unsigned i = threadIdx.x;
    if (i == 0) {
        mbarrier_init(full, 1);
        mbarrier_arrive_expect(full, 256);
        bulk_copy(words, p.data, 256, full);
    }
    sync_cta();
    if (p.n || i >= 32) mbarrier_wait(full, 0);
    p.out[i] = words[i];
}
// The first warp refills what the second one reads.
extern "C" __global__ void bulk_too_early(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    unsigned long long *full = reinterpret_cast<unsigned long long *>(words + 64), *empty = full + 1;
    const unsigned i = threadIdx.x;
    if (i == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, 32);
    }
    words[i] = i;
    sync_cta();
    if (i >= 32) {
        p.out[i] = words[i];
        mbarrier_arrive(empty);
    } else if (i == 0) {
        if (p.n) mbarrier_wait(empty, 0);
        mbarrier_arrive_expect(full, 256);
        bulk_copy(words, p.data, 256, full);
        mbarrier_wait(full, 0);
    }
}
extern "C" __global__ void barrier_unpublished(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    unsigned long long *bar = reinterpret_cast<unsigned long long *>(words);
    if (threadIdx.x == 0) mbarrier_init(bar, 64);
    if (p.n) sync_cta();
    mbarrier_arrive(bar);
}
// The last CTA reads what all have written; only the counter tells which one that is in time.
extern "C" __global__ void across_ctas(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned words[];
    const unsigned i = threadIdx.x, ctas = gridDim.x;
    p.out[blockIdx.x * 64 + i] = i;
    sync_cta();
    if (i == 0) words[0] = p.n ? atomic_add_ordered(p.counter, 1) == static_cast<int>(ctas) - 1 : blockIdx.x == ctas - 1;
    sync_cta();
    if (!words[0]) return;
    unsigned sum = 0;
    for (unsigned cta = 0; cta < ctas; ++cta) sum += load_l2(p.out + cta * 64 + i);
    p.out[i] = sum;
}
