// Device primitives for the CPU: the names of templates/parts/ptx.cuh.j2 in portable C++17, and the CUDA words that a
// kernel uses. A kernel's lanes are fibers; a collective parks a lane until its fellows are there. `line` arguments
// are filled in by the compiler, for messages. No standard headers: every kernel pays for what stands here.
#pragma once

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // compile.py reads it
#define __align__(bytes) __attribute__((aligned(bytes)))
#define WPH_DEVICE inline
#define WPH_LINE int line = __builtin_LINE()
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif

// --- CUDA's types and functions -----------------------------------------------------------------------------------
#define WPH_VECTOR(T, name)                                                                                \
    struct __align__(2 * sizeof(T)) name##2 { T x, y; };                                                   \
    struct name##3 { T x, y, z; };                                                                         \
    struct __align__(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                        \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                             \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
WPH_VECTOR(float, float)
WPH_VECTOR(int, int)
WPH_VECTOR(unsigned, uint)
WPH_VECTOR(unsigned short, ushort)
WPH_VECTOR(unsigned char, uchar)
#undef WPH_VECTOR
struct dim3 { unsigned x, y, z; };
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

extern "C" {
float fabsf(float) noexcept;
float sqrtf(float) noexcept;
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
}
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// --- the run time -------------------------------------------------------------------------------------------------
namespace wph {
enum class Shuffle { exclusive_or, lane, up };
unsigned shuffle_word(Shuffle kind, unsigned v, int operand, const char *name, int line);
unsigned ballot(bool v, const char *name, int line);
void sync_warp(int line);
void sync_threads(int id, int threads, const char *name, int line);
void yield_lane();
void sync_cluster(bool ordered, const char *name, int line);  // `ordered`: memory, too
// Copies what CTA `rank` of the cluster holds where `p` is in this CTA's shared memory.
void load_cluster(void *to, const void *p, int rank, int bytes, int line);
// The two halves of a barrier of the cluster that orders no memory.
void arrive_cluster(int line);
void wait_cluster(int line);
// Stores `bytes` bytes in CTA `rank` where `p` is in this one; they are there once its mbarrier `bar` has counted them.
void store_cluster(void *p, int rank, const void *value, int bytes, unsigned long long *bar, int line);
// What the current lane did before the former precedes what any lane does after a later call of the latter with the
// same token, which is any address. For the sanitizer only.
void happens_before(const void *token);
void happens_after(const void *token);
enum class Element { half, bfloat };
void mma(float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, Element element,
         const char *name, int line);
unsigned transpose(unsigned v, int line);
unsigned shared_address(const void *p, int line);
unsigned load_shared(unsigned address, int line);
void copy_async(void *shared, const void *global, int bytes, int valid, int line, const void *call);
void copy_commit();
void copy_wait(int pending);
void barrier_init(unsigned long long *bar, int arrivals, int line);
void fence_barrier_init();  // shows them to those who pass wait_cluster
void barrier_arrive(unsigned long long *bar, int bytes, const char *name, int line);
void barrier_wait(unsigned long long *bar, int parity, int line);
void copy_bulk(void *shared, const void *global, int bytes, unsigned long long *bar, int line, const void *call);
float half_value(unsigned short v);
unsigned short half_bits(double v);
unsigned short bfloat_bits(float v);
unsigned short half_from_e4m3(unsigned char v);
unsigned char e4m3_bits(float v);
float sum_down(float a, float b);
unsigned permute_bytes(unsigned a, unsigned b, unsigned selector);
// The lesser, or the greater, of each half: of a number and NaN the number, and -0 is less than 0.
unsigned choose_halves(Element element, bool greater, unsigned a, unsigned b);
enum class Half2 { add, subtract, multiply, fma };
unsigned half2_arithmetic(Half2 kind, unsigned a, unsigned b, unsigned c);

// A kernel of the source, by name: how main() calls it with a parameter structure whose type only the source knows.
struct Entry {
    const char *name;
    unsigned cluster;  // CTAs, consecutive in x
    unsigned long long params_bytes;
    void (*kernel)();
    void (*call)(void (*)(), const void *);
    const Entry *next;
    static const Entry *first;

    template <typename P>
    Entry(const char *n, void (*k)(P), unsigned ctas)
        : name(n), cluster(ctas), params_bytes(sizeof(P)), kernel(reinterpret_cast<void (*)()>(k)), call(invoke<P>),
          next(first) {
        first = this;
    }
    template <typename P>
    static void invoke(void (*k)(), const void *params) {
        reinterpret_cast<void (*)(P)>(k)(*static_cast<const P *>(params));
    }
};
}  // namespace wph
#define WPH_ENTRY(name, cluster) static const wph::Entry wph_entry_##name(#name, name, cluster);

// --- bits ---------------------------------------------------------------------------------------------------------
// No variable has its address taken, which would cost a guarded frame per call.
WPH_DEVICE float bits_to_float(unsigned v) { return __builtin_bit_cast(float, v); }
WPH_DEVICE unsigned float_to_bits(float v) { return __builtin_bit_cast(unsigned, v); }
WPH_DEVICE unsigned prmt(unsigned a, unsigned b, unsigned selector) { return wph::permute_bytes(a, b, selector); }
WPH_DEVICE unsigned funnel_right(unsigned lo, unsigned hi, int shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(hi) << 32 | lo) >> (shift & 31));
}
WPH_DEVICE int count_bits(unsigned v) { return __builtin_popcount(v); }

// --- warp and CTA -------------------------------------------------------------------------------------------------
WPH_DEVICE float shuffle_xor(float v, int mask, WPH_LINE) {
    return bits_to_float(wph::shuffle_word(wph::Shuffle::exclusive_or, float_to_bits(v), mask, "shuffle_xor", line));
}
WPH_DEVICE unsigned shuffle_xor(unsigned v, int mask, WPH_LINE) {
    return wph::shuffle_word(wph::Shuffle::exclusive_or, v, mask, "shuffle_xor", line);
}
WPH_DEVICE int shuffle_xor(int v, int mask, WPH_LINE) {
    return static_cast<int>(
        wph::shuffle_word(wph::Shuffle::exclusive_or, static_cast<unsigned>(v), mask, "shuffle_xor", line));
}
WPH_DEVICE float shuffle(float v, int lane, WPH_LINE) {
    return bits_to_float(wph::shuffle_word(wph::Shuffle::lane, float_to_bits(v), lane, "shuffle", line));
}
WPH_DEVICE unsigned shuffle(unsigned v, int lane, WPH_LINE) {
    return wph::shuffle_word(wph::Shuffle::lane, v, lane, "shuffle", line);
}
WPH_DEVICE int shuffle(int v, int lane, WPH_LINE) {
    return static_cast<int>(wph::shuffle_word(wph::Shuffle::lane, static_cast<unsigned>(v), lane, "shuffle", line));
}
WPH_DEVICE int shuffle_up(int v, int delta, WPH_LINE) {
    return static_cast<int>(wph::shuffle_word(wph::Shuffle::up, static_cast<unsigned>(v), delta, "shuffle_up", line));
}
WPH_DEVICE bool vote_any(bool v, WPH_LINE) { return wph::ballot(v, "vote_any", line) != 0; }
WPH_DEVICE unsigned vote_ballot(bool v, WPH_LINE) { return wph::ballot(v, "vote_ballot", line); }
WPH_DEVICE unsigned reduce_or(unsigned v, WPH_LINE) {
    for (int mask = 1; mask < 32; mask *= 2) {
        v |= wph::shuffle_word(wph::Shuffle::exclusive_or, v, mask, "reduce_or", line);
    }
    return v;
}
WPH_DEVICE int add_lanes(int v, WPH_LINE) {
    auto sum = static_cast<unsigned>(v);
    for (int mask = 1; mask < 32; mask *= 2) {
        sum += wph::shuffle_word(wph::Shuffle::exclusive_or, sum, mask, "add_lanes", line);
    }
    return static_cast<int>(sum);
}
WPH_DEVICE void trap() { __builtin_trap(); }
WPH_DEVICE void sync_warp(WPH_LINE) { wph::sync_warp(line); }
WPH_DEVICE void sync_cta(WPH_LINE) { wph::sync_threads(0, 0, "sync_cta", line); }
WPH_DEVICE void sync_named(int id, int threads, WPH_LINE) { wph::sync_threads(id, threads, "sync_named", line); }
WPH_DEVICE int atomic_add_ordered(int *p, int v) {
    wph::yield_lane();
    wph::happens_after(p);
    const int old = *p;
    *p = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(v));
    wph::happens_before(p);
    return old;
}
WPH_DEVICE unsigned long long atomic_add_ordered_u64(unsigned long long *p, unsigned long long v) {
    wph::yield_lane();
    wph::happens_after(p);
    const unsigned long long old = __atomic_fetch_add(p, v, __ATOMIC_RELAXED);  // no race with those who look
    wph::happens_before(p);
    return old;
}
WPH_DEVICE unsigned long long load_ordered_u64(const unsigned long long *p) {
    wph::yield_lane();
    const unsigned long long v = __atomic_load_n(p, __ATOMIC_RELAXED);
    wph::happens_after(p);
    return v;
}
WPH_DEVICE void sync_cluster(WPH_LINE) { wph::sync_cluster(true, "sync_cluster", line); }
WPH_DEVICE void leave_cluster(WPH_LINE) { wph::sync_cluster(false, "leave_cluster", line); }
template <typename T>
WPH_DEVICE T load_cluster(const T *p, int rank, WPH_LINE) {
    T v;
    wph::load_cluster(&v, p, rank, sizeof v, line);
    return v;
}

WPH_DEVICE void arrive_cluster(WPH_LINE) { wph::arrive_cluster(line); }
WPH_DEVICE void wait_cluster(WPH_LINE) { wph::wait_cluster(line); }
template <typename T>
WPH_DEVICE void store_cluster(T *p, int rank, T v, unsigned long long *bar, WPH_LINE) {
    wph::store_cluster(p, rank, &v, sizeof v, bar, line);
}

// --- fp16, bf16, fp8 ----------------------------------------------------------------------------------------------
WPH_DEVICE float half_to_float(unsigned short v) { return wph::half_value(v); }
WPH_DEVICE unsigned short float_to_half(float v) { return wph::half_bits(v); }
WPH_DEVICE float bf16_to_float(unsigned short v) { return bits_to_float(static_cast<unsigned>(v) << 16); }
WPH_DEVICE unsigned short float_to_bf16(float v) { return wph::bfloat_bits(v); }
WPH_DEVICE unsigned bf2_pack(float lo, float hi) {
    return static_cast<unsigned>(wph::bfloat_bits(hi)) << 16 | wph::bfloat_bits(lo);
}
WPH_DEVICE unsigned h2_pack(float lo, float hi) {
    return static_cast<unsigned>(wph::half_bits(hi)) << 16 | wph::half_bits(lo);
}
WPH_DEVICE float h2_low(unsigned v) { return wph::half_value(static_cast<unsigned short>(v & 0xffffu)); }
WPH_DEVICE float h2_high(unsigned v) { return wph::half_value(static_cast<unsigned short>(v >> 16)); }
WPH_DEVICE unsigned h2_add(unsigned a, unsigned b) { return wph::half2_arithmetic(wph::Half2::add, a, b, 0); }
WPH_DEVICE unsigned h2_sub(unsigned a, unsigned b) { return wph::half2_arithmetic(wph::Half2::subtract, a, b, 0); }
WPH_DEVICE unsigned h2_mul(unsigned a, unsigned b) { return wph::half2_arithmetic(wph::Half2::multiply, a, b, 0); }
WPH_DEVICE unsigned h2_fma(unsigned a, unsigned b, unsigned c) {
    return wph::half2_arithmetic(wph::Half2::fma, a, b, c);
}
WPH_DEVICE unsigned h2_min(unsigned a, unsigned b) { return wph::choose_halves(wph::Element::half, false, a, b); }
WPH_DEVICE unsigned h2_max(unsigned a, unsigned b) { return wph::choose_halves(wph::Element::half, true, a, b); }
WPH_DEVICE unsigned bf2_min(unsigned a, unsigned b) { return wph::choose_halves(wph::Element::bfloat, false, a, b); }
WPH_DEVICE unsigned bf2_max(unsigned a, unsigned b) { return wph::choose_halves(wph::Element::bfloat, true, a, b); }
WPH_DEVICE unsigned h2_from_e4m3(unsigned short v) {
    return static_cast<unsigned>(wph::half_from_e4m3(static_cast<unsigned char>(v >> 8))) << 16 |
           wph::half_from_e4m3(static_cast<unsigned char>(v & 0xffu));
}
WPH_DEVICE unsigned short e4m3_pack(float lo, float hi) {
    return static_cast<unsigned short>(wph::e4m3_bits(hi) << 8 | wph::e4m3_bits(lo));
}
WPH_DEVICE float add_down(float a, float b) { return wph::sum_down(a, b); }
// Subnormals count as zero.
WPH_DEVICE float lg2(float v) { return log2f(fabsf(v) < 0x1p-126f ? 0.0f : v); }
// Results below the normal range become zero; inputs there count as zero.
WPH_DEVICE float ex2(float v) {
    const float d = exp2f(v);
    return d < 0x1p-126f ? 0.0f : d;
}
// Subnormals count as zero.
WPH_DEVICE float reciprocal_sqrt(float v) { return 1.0f / sqrtf(fabsf(v) < 0x1p-126f ? 0.0f : v); }
// Of a normal number. Two times of three a unit in the last place away from the nearest float, further than a GPU's may be.
WPH_DEVICE float near_reciprocal(float v) { return bits_to_float(float_to_bits(1.0f / v) + float_to_bits(v) / 64 % 3 - 1); }

// --- matrix -------------------------------------------------------------------------------------------------------
WPH_DEVICE void mma_16816(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1,
                          WPH_LINE) {
    wph::mma(c, a0, a1, a2, a3, b0, b1, wph::Element::half, "mma_16816", line);
}
WPH_DEVICE void mma_16816_bf16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                               unsigned b1, WPH_LINE) {
    wph::mma(c, a0, a1, a2, a3, b0, b1, wph::Element::bfloat, "mma_16816_bf16", line);
}
WPH_DEVICE unsigned movmatrix(unsigned v, WPH_LINE) { return wph::transpose(v, line); }

// --- memory -------------------------------------------------------------------------------------------------------
template <typename T>
WPH_DEVICE T load_global(const void *p) { return *static_cast<const T *>(p); }
template <typename T>
WPH_DEVICE void store_global(void *p, T v) { *static_cast<T *>(p) = v; }
template <typename T>
WPH_DEVICE T load_l2(const T *p) { return *p; }
WPH_DEVICE bool elect_lane(WPH_LINE) { return wph::ballot(true, "elect_lane", line) && threadIdx.x % 32 == 0; }
WPH_DEVICE void prefetch_l2(const void *p) { (void)*static_cast<const volatile unsigned char *>(p); }
WPH_DEVICE unsigned shared_address(const void *p, WPH_LINE) { return wph::shared_address(p, line); }
WPH_DEVICE unsigned load_shared(unsigned address, WPH_LINE) { return wph::load_shared(address, line); }
template <int BYTES>
WPH_DEVICE void cp_async(void *shared, const void *global, int valid, WPH_LINE) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    wph::copy_async(shared, global, BYTES, valid, line, __builtin_return_address(0));
}
WPH_DEVICE void copy_ahead(void *shared, const void *global, WPH_LINE) {
    wph::copy_async(shared, global, 16, 16, line, __builtin_return_address(0));
}
WPH_DEVICE void cp_async_commit() { wph::copy_commit(); }
template <int PENDING>
WPH_DEVICE void cp_async_wait() { wph::copy_wait(PENDING); }
WPH_DEVICE void mbarrier_init(unsigned long long *bar, int arrivals, WPH_LINE) {
    wph::barrier_init(bar, arrivals, line);
}
WPH_DEVICE void mbarrier_fence_init() { wph::fence_barrier_init(); }
WPH_DEVICE void fence_async_proxy() {}
WPH_DEVICE void mbarrier_arrive_expect(unsigned long long *bar, int bytes, WPH_LINE) {
    wph::barrier_arrive(bar, bytes, "mbarrier_arrive_expect", line);
}
WPH_DEVICE void mbarrier_arrive(unsigned long long *bar, WPH_LINE) {
    wph::barrier_arrive(bar, 0, "mbarrier_arrive", line);
}
WPH_DEVICE void mbarrier_wait(unsigned long long *bar, int parity, WPH_LINE) { wph::barrier_wait(bar, parity, line); }
WPH_DEVICE void mbarrier_wait_cluster(unsigned long long *bar, int parity, WPH_LINE) { wph::barrier_wait(bar, parity, line); }
WPH_DEVICE void bulk_copy(void *shared, const void *global, int bytes, unsigned long long *bar, WPH_LINE) {
    wph::copy_bulk(shared, global, bytes, bar, line, __builtin_return_address(0));
}
