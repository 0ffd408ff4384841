// A program that racecheck is asked about before our kernels, with races and without: `control WHAT RACE`. WHAT is
//
//   cta    all warps meet. Race 1 leaves out the CTA's last barrier.
//   pairs  pairs of warps meet, each a different number of times, at mbarriers, as in twins of kernels. Races: 1; 2 leaves
//          out one of a pair's meetings; with 3 a pair reads what another pair writes, which meets elsewhere.
//   turns  warps ask in turn for steps that all of them read, and the CTAs of a cluster store what they make of them in
//          each other's shared memory, as twins of kernels do it. Race 1 gives a stage back before it is read; with 2
//          nobody waits for what others store.
//   lanes  the same as kernels do it: one lane says for its warp that a stage is read, and what initialises the last
//          mbarrier uses it without having met the others. Race 0 is all there is of it.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "primitives.cuh"  // the kernels' own: sanitize.py writes it

constexpr int WARPS = 8, THREADS = 32 * WARPS, MEETINGS_AT = 0, MEETINGS_BYTES = 128 + 4 * THREADS;

extern __shared__ __align__(128) unsigned char smem[];

#include "sanitize_meeting.cuh"

__global__ void exchange(const int *rounds, int race, int *out) {
    open_meetings(WARPS / 2, 64);
    __shared__ int numbers[THREADS], sums[WARPS];
    const int thread = threadIdx.x, pair = thread / 64;
    int x = thread;
    for (int i = 0; i < rounds[pair]; ++i) {
        numbers[thread] = x;
        if (race != 2) meet(1 + pair, 64);
        x += numbers[thread ^ (race == 3 ? 64 : 32)];
        meet(1 + pair, 64);
    }
    if (thread % 32 == 0) sums[thread / 32] = x;
    if (race != 1) __syncthreads();
    out[thread] = sums[(thread / 32 + 3) % WARPS];
}

constexpr int STAGES = 2, STEPS = 12, CTAS = 2;

// One lane of a warp arrives for all, or each for itself.
template <bool LANES>
WPH_DEVICE void relay_steps(const int *in, int race, int *out) {
    __shared__ __align__(128) int stages[STAGES][THREADS];
    __shared__ float inbox[CTAS * WARPS];
    __shared__ unsigned long long full[STAGES], empty[STAGES], stored;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, rank = blockIdx.x % CTAS;
    if (thread < STAGES) {
        mbarrier_init(full + thread, 1);
        mbarrier_init(empty + thread, LANES ? WARPS : THREADS);
        mbarrier_fence_init();
    }
    if (LANES) sync_cta();
    if (thread == 0) {
        mbarrier_init(&stored, 1);
        mbarrier_fence_init();
    }
    if (!LANES) sync_cta();
    const auto ask = [&](int step) {
        if (step >= STEPS || step % WARPS != warp) return;
        if (elect_lane()) {
            const int stage = step % STAGES;
            if (step >= STAGES) mbarrier_wait(empty + stage, (step / STAGES - 1) & 1);
            mbarrier_arrive_expect(full + stage, sizeof stages[0]);
            bulk_copy(stages[stage], in + step * THREADS, sizeof stages[0], full + stage);
        }
        sync_warp();
    };
    const auto give_back = [&](int stage) {
        sync_warp();
        if (!LANES || lane == 0) mbarrier_arrive(empty + stage);
        sync_warp();
    };
    for (int step = 0; step < STAGES; ++step) ask(step);
    float sum = 0.f;
    for (int step = 0; step < STEPS; ++step) {
        const int stage = step % STAGES;
        mbarrier_wait(full + stage, step / STAGES & 1);
        if (race == 1) give_back(stage);
        for (int i = 0; i < WARPS; ++i) sum += static_cast<float>(stages[stage][32 * ((warp + i) % WARPS) + 31 - lane]);
        if (race != 1) give_back(stage);
        ask(step + STAGES);
    }
    arrive_cluster();
    if (thread == 0) mbarrier_arrive_expect(&stored, sizeof inbox);
    wait_cluster();
    if (lane == 0) {
        for (int other = 0; other < CTAS; ++other) store_cluster(inbox + WARPS * rank + warp, other, sum, &stored);
    }
    if (race != 2) mbarrier_wait_cluster(&stored, 0);
    out[blockIdx.x * THREADS + thread] = static_cast<int>(inbox[thread % (CTAS * WARPS)]);
    if (race == 2) mbarrier_wait_cluster(&stored, 0);  // no CTA may end while it is stored to
}
__global__ void __cluster_dims__(CTAS, 1, 1) relay(const int *in, int race, int lanes, int *out) {
    if (lanes) relay_steps<true>(in, race, out);
    else relay_steps<false>(in, race, out);
}

int main(int count, char **words) {
    const char *what = count > 1 ? words[1] : "";
    const int race = count > 2 ? std::atoi(words[2]) : 0;
    const bool cta = !std::strcmp(what, "cta"), pairs = !std::strcmp(what, "pairs"), turns = !std::strcmp(what, "turns"), lanes = !std::strcmp(what, "lanes");
    const int host[WARPS / 2] = {3 * pairs, pairs, 0, 5 * pairs};
    int *in, *out, found[CTAS * THREADS] = {};
    if (!cta && !pairs && !turns && !lanes) return 3;
    if (cudaMalloc(&in, STEPS * THREADS * sizeof *in) != cudaSuccess || cudaMalloc(&out, sizeof found) != cudaSuccess) return 2;
    cudaMemset(in, 1, STEPS * THREADS * sizeof *in);
    cudaMemcpy(in, host, sizeof host, cudaMemcpyHostToDevice);
    if (turns || lanes) relay<<<CTAS, THREADS>>>(in, race, lanes, out);
    else exchange<<<1, THREADS, MEETINGS_BYTES>>>(in, race, out);
    if (cudaGetLastError() != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess) return 2;
    if (cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
    std::printf("%d\n", found[0]);
    return 0;
}
