// A program that racecheck is asked about before our kernels. Its first argument names a race: 1 leaves out the CTA's
// last barrier, 2 one of the meetings of a pair of warps, and with 3 a pair reads what another pair writes, which meets
// elsewhere. With 1 for the second the pairs of warps meet, each a different number of times, at mbarriers, as in twins of
// kernels.
#include <cstdio>
#include <cstdlib>

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

int main(int count, char **words) {
    const int race = count > 1 ? std::atoi(words[1]) : 0, pairs = count > 2 ? std::atoi(words[2]) : 0;
    const int host[WARPS / 2] = {3 * pairs, pairs, 0, 5 * pairs};
    int *rounds, *out, found[THREADS];
    cudaMalloc(&rounds, sizeof host);
    cudaMalloc(&out, sizeof found);
    cudaMemcpy(rounds, host, sizeof host, cudaMemcpyHostToDevice);
    exchange<<<1, THREADS, MEETINGS_BYTES>>>(rounds, race, out);
    if (cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
    std::printf("%d\n", found[0]);
    return 0;
}
