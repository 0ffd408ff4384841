// A program that racecheck is asked about before our kernels. Its first argument: 1 leaves out the last barrier, so that
// there is a race; its second: 1 lets pairs of warps exchange numbers before, under a barrier of their own and each pair a
// different number of times.
#include <cstdio>
#include <cstdlib>

constexpr int WARPS = 8, THREADS = 32 * WARPS;

__device__ void sync_pair(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(1 + pair) : "memory"); }

__global__ void exchange(const int *rounds, int races, int *out) {
    __shared__ int numbers[THREADS], sums[WARPS];
    const int thread = threadIdx.x, pair = thread / 64;
    int x = thread;
    for (int i = 0; i < rounds[pair]; ++i) {
        numbers[thread] = x;
        sync_pair(pair);
        x += numbers[thread ^ 32];
        sync_pair(pair);
    }
    if (thread % 32 == 0) sums[thread / 32] = x;
    if (!races) __syncthreads();
    out[thread] = sums[(thread / 32 + 3) % WARPS];
}

int main(int count, char **words) {
    const int races = count > 1 ? std::atoi(words[1]) : 0, paired = count > 2 ? std::atoi(words[2]) : 0;
    const int host[WARPS / 2] = {3 * paired, paired, 0, 5 * paired};
    int *rounds, *out, found[THREADS];
    cudaMalloc(&rounds, sizeof host);
    cudaMalloc(&out, sizeof found);
    cudaMemcpy(rounds, host, sizeof host, cudaMemcpyHostToDevice);
    exchange<<<1, THREADS>>>(rounds, races, out);
    if (cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
    std::printf("%d\n", found[0]);
    return 0;
}
