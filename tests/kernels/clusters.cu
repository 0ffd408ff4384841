// Clusters of four CTAs of 64 threads, of which each reads the next one's words. Bits of n: barriers that are there.
#include "emulate.h"

struct Params {
    float *out;
    int n;
};

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(64) next_words(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float words[];
    const int i = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x);
    words[i] = static_cast<float>(64 * cta + i);
    if (p.n & 1) sync_cluster();
    p.out[64 * cta + i] = load_cluster(words + (i ^ 32), (cta + 1) % 4);
    if (p.n & 2) leave_cluster();
}
// A barrier that orders no memory shows nobody what was written before it.
extern "C" __global__ void __cluster_dims__(4, 1, 1) behind_a_barrier(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float words[];
    const int i = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x);
    words[i] = 0.f;
    if (p.n & 1) sync_cluster();
    words[i] = static_cast<float>(i);
    p.n & 2 ? sync_cluster() : leave_cluster();
    p.out[64 * cta + i] = load_cluster(words + i, (cta + 1) % 4);
    leave_cluster();
}
extern "C" __global__ void __cluster_dims__(4, 1, 1) written_too_early(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float words[];
    const int i = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x);
    words[i] = static_cast<float>(i);
    sync_cluster();
    p.out[64 * cta + i] = load_cluster(words + i, (cta + 1) % 4);
    if (p.n) sync_cluster();
    words[i] = -1.f;
    sync_cluster();
}
// What went through global memory is in order, too.
extern "C" __global__ void __cluster_dims__(4, 1, 1) by_way_of_memory(const __grid_constant__ Params p) {
    const int i = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x);
    p.out[64 * cta + i] = static_cast<float>(64 * cta + i);
    p.n ? sync_cluster() : leave_cluster();
    const float next = p.out[64 * (cta / 4 * 4 + (cta + 1) % 4) + i];
    sync_cluster();
    p.out[64 * cta + i] = next;
}
extern "C" __global__ void __cluster_dims__(4, 1, 1) no_such_cta(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float words[];
    words[threadIdx.x] = 0.f;
    sync_cluster();
    p.out[threadIdx.x] = load_cluster(words + threadIdx.x, p.n);
    sync_cluster();
}
extern "C" __global__ void __cluster_dims__(4, 1, 1) one_stays_away(const __grid_constant__ Params p) {
    if (blockIdx.x % 4 != 2) sync_cluster();
}
// An address without the CTA's rank is one of the first CTA's.
extern "C" __global__ void __cluster_dims__(4, 1, 1) by_address(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned numbers[];
    numbers[threadIdx.x] = 64 * blockIdx.x + threadIdx.x;
    sync_cta();
    const unsigned start = shared_address(numbers);
    p.out[64 * blockIdx.x + threadIdx.x] = static_cast<float>(load_shared((p.n ? start : 1024) + 4 * threadIdx.x));
}
// Each CTA's words go into the next one's memory, whose mbarrier counts them. Bits of n: what is there.
extern "C" __global__ void __cluster_dims__(4, 1, 1) stored_words(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float words[];
    const int i = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x);
    auto *bar = reinterpret_cast<unsigned long long *>(words + 64);
    if (i == 0) {
        mbarrier_init(bar, 1);
        mbarrier_fence_init();
        mbarrier_arrive_expect(bar, 256);
    }
    if (p.n & 1) arrive_cluster();
    if (p.n & 8) arrive_cluster();
    if (p.n & 2) wait_cluster();
    store_cluster(words + i, (cta + (p.n & 16 ? 4 - cta : 1)) % (p.n & 16 ? 8 : 4), static_cast<float>(64 * cta + i), bar);
    sync_cta();
    if (p.n & 4) mbarrier_wait_cluster(bar, 0);
    p.out[64 * cta + i] = words[i ^ 32];
}
// Two of them for the same word.
extern "C" __global__ void __cluster_dims__(4, 1, 1) stored_twice(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) float words[];
    auto *bar = reinterpret_cast<unsigned long long *>(words + 64);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_fence_init();
        mbarrier_arrive_expect(bar, p.n);
    }
    arrive_cluster();
    wait_cluster();
    if (threadIdx.x < 2) store_cluster(words, static_cast<int>(blockIdx.x % 4), 1.f, bar);
    mbarrier_wait_cluster(bar, 0);
}
