// wph_store: head_dim 128, 1 query heads per KV head, turboquant_4bit_nc
// warps=4 rows=1 chunks=1 sides=together order=heads transform=shuffle search=select store=direct store_bytes=4
// passes=1 min_ctas=1

// New keys and values, bf16 or fp16, to the slots of a compressed paged cache. A row lies on LANES lanes with REPEATS
// chunks of eight adjacent channels each: a chunk is one load, and whole bytes of indices. A warp issues the loads of
// ROWS passes before it uses the first. Nothing but the bytes that carry data is written, each by one lane.

// Device primitives. Everything a kernel needs beyond plain C++ is behind these names, so that the same source
// runs on a GPU and, lane by lane, in the CPU emulator. Half pairs travel as 32-bit words, low half first.
#if defined(WPH_EMULATE)
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WPH_DEVICE __device__ __forceinline__

// --- warp and CTA -----------------------------------------------------------------------------------------------
WPH_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
WPH_DEVICE unsigned shuffle_xor(unsigned v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
WPH_DEVICE int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
WPH_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
WPH_DEVICE unsigned shuffle(unsigned v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
WPH_DEVICE int shuffle(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
WPH_DEVICE int shuffle_up(int v, int delta) { return __shfl_up_sync(0xffffffffu, v, delta); }
WPH_DEVICE bool vote_any(bool v) { return __any_sync(0xffffffffu, v); }
WPH_DEVICE unsigned vote_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
WPH_DEVICE void sync_warp() { __syncwarp(); }
WPH_DEVICE void trap() { __trap(); }
WPH_DEVICE void sync_cta() { __syncthreads(); }
// Barrier of `threads` threads (a multiple of 32) of the CTA; id 1 to 15.
WPH_DEVICE void sync_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Adds to a counter of the GPU. What the CTA's threads wrote before its last barrier is visible to whoever adds later,
// and what earlier adders' CTAs wrote is visible after the CTA's next barrier.
WPH_DEVICE int atomic_add_ordered(int *p, int v) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
    return before;
}

// --- bits -------------------------------------------------------------------------------------------------------
// Four bytes chosen by the low three bits of the selector's low four nibbles; a nibble's top bit spreads the sign.
WPH_DEVICE unsigned prmt(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }
// Low word of (hi:lo) >> (shift & 31).
WPH_DEVICE unsigned funnel_right(unsigned lo, unsigned hi, int shift) { return __funnelshift_r(lo, hi, shift); }
WPH_DEVICE float bits_to_float(unsigned v) { return __uint_as_float(v); }
WPH_DEVICE unsigned float_to_bits(float v) { return __float_as_uint(v); }

// --- fp16, bf16, fp8 ---------------------------------------------------------------------------------------------
WPH_DEVICE unsigned h2_word(__half2 v) { return *reinterpret_cast<unsigned *>(&v); }
WPH_DEVICE __half2 h2_value(unsigned v) { return *reinterpret_cast<__half2 *>(&v); }
WPH_DEVICE unsigned h2_pack(float lo, float hi) { return h2_word(__floats2half2_rn(lo, hi)); }
WPH_DEVICE float h2_low(unsigned v) { return __low2float(h2_value(v)); }
WPH_DEVICE float h2_high(unsigned v) { return __high2float(h2_value(v)); }
WPH_DEVICE unsigned h2_add(unsigned a, unsigned b) { return h2_word(__hadd2(h2_value(a), h2_value(b))); }
WPH_DEVICE unsigned h2_sub(unsigned a, unsigned b) { return h2_word(__hsub2(h2_value(a), h2_value(b))); }
WPH_DEVICE unsigned h2_mul(unsigned a, unsigned b) { return h2_word(__hmul2(h2_value(a), h2_value(b))); }
WPH_DEVICE unsigned h2_fma(unsigned a, unsigned b, unsigned c) {
    return h2_word(__hfma2(h2_value(a), h2_value(b), h2_value(c)));
}
WPH_DEVICE float half_to_float(unsigned short v) { return __half2float(__ushort_as_half(v)); }
WPH_DEVICE unsigned short float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }
WPH_DEVICE float bf16_to_float(unsigned short v) { return __uint_as_float(static_cast<unsigned>(v) << 16); }
WPH_DEVICE unsigned short float_to_bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
// Two bf16, low first.
WPH_DEVICE unsigned bf2_pack(float lo, float hi) {
    unsigned d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
// Two E4M3 bytes to two halves, low first; NaN stays NaN.
WPH_DEVICE unsigned h2_from_e4m3(unsigned short v) {
    unsigned d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(v));
    return d;
}
// Two floats to E4M3 bytes, low first, to nearest even; what lies beyond +-448 becomes that, NaN stays NaN.
WPH_DEVICE unsigned short e4m3_pack(float lo, float hi) {
    unsigned short d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(hi), "f"(lo));
    return d;
}
// a + b rounded down: with b = 2^23 the low mantissa bits are floor(a), for 0 <= a < 2^23.
WPH_DEVICE float add_down(float a, float b) { return __fadd_rd(a, b); }
// 2^v; ex2(-inf) = 0.
WPH_DEVICE float ex2(float v) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}
// 1 / sqrt(v), to two units in the last place; subnormals count as zero.
WPH_DEVICE float reciprocal_sqrt(float v) {
    float d;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}

// --- matrix -----------------------------------------------------------------------------------------------------
// c += a (16x16, row) * b (16x8, col) on halves with fp32 sums. Lane l = 4 * g + t holds
// a = {A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]}, b = {B[2t..][g], B[2t+8..][g]},
// c = {C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]}.
WPH_DEVICE void mma_16816(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Transposes an 8x8 matrix of 16-bit elements spread two per lane (lane 4 * row + column / 2).
WPH_DEVICE unsigned movmatrix(unsigned v) {
    unsigned d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}

// --- memory -----------------------------------------------------------------------------------------------------
template <typename T>
WPH_DEVICE T load_global(const void *p) { return __ldg(static_cast<const T *>(p)); }
// One store of a whole T (unsigned, uint2, uint4), which a plain assignment may be split into words of.
template <typename T>
WPH_DEVICE void store_global(void *p, T v) { __stwb(static_cast<T *>(p), v); }
// Reads past the L1, which other CTAs' writes do not update.
template <typename T>
WPH_DEVICE T load_l2(const T *p) { return __ldcg(p); }
WPH_DEVICE unsigned shared_address(const void *p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
// What lies at a shared address and changes no more: the read may move across barriers.
WPH_DEVICE unsigned load_shared(unsigned address) {
    unsigned v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
// Asynchronous copy of BYTES (4, 8, 16) of which the first `valid` are read and the rest become zero.
template <int BYTES>
WPH_DEVICE void cp_async(void *shared, const void *global, int valid) {
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(valid) : "memory");
    }
}
WPH_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's newest groups are in flight.
template <int PENDING>
WPH_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Bulk copies (sm_90 and later) complete on a barrier in shared memory. Addresses and sizes are multiples of 16.
WPH_DEVICE void mbarrier_init(unsigned long long *bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine; the CTA synchronises after it.
WPH_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
WPH_DEVICE void mbarrier_arrive_expect(unsigned long long *bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
WPH_DEVICE void mbarrier_arrive(unsigned long long *bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
WPH_DEVICE void mbarrier_wait(unsigned long long *bar, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN_%=;\n}" ::"r"(
            shared_address(bar)), "r"(parity) : "memory");
}
// Orders this thread's ordinary accesses to shared memory before later bulk copies; a barrier follows.
WPH_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
WPH_DEVICE void bulk_copy(void *shared, const void *global, int bytes, unsigned long long *bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
        shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(bar)) : "memory");
}
#endif

struct StoreParams {
    const void *key;               // [>= tokens, kv_heads, D] bf16 or fp16
    long long key_token_stride;    // elements
    long long key_head_stride;     // elements
    const void *value;             // likewise, of the same type
    long long value_token_stride;  // elements
    long long value_head_stride;   // elements
    int is_bf16;                   // 1: key and value are bf16, 0: fp16
    const void *slot_mapping;      // slots [tokens], int32 or int64: block * block_size + token; negative: none
    int slot_mapping_bytes;        // 4 or 8: size of a slot number
    int tokens;                    // new tokens
    int kv_heads;                  // KV heads
    unsigned char *kv_cache;       // first byte of the cache
    long long block_stride;        // bytes between blocks
    long long plane_stride;        // bytes from the key plane to the value plane (0: one slot holds both)
    long long token_stride;        // bytes between tokens of a block
    long long head_stride;         // bytes between KV heads
    int block_size;                // tokens per block
    const float *centroids;        // codebook levels, ascending [2^bits], of N(0, 1/BLOCK_D)
    const float *signs;            // +-1 per normal channel (formats with signs), else null
    const int *channels;           // channel ids [D]: the normal ones in order, then the outliers; null without outliers
};

// Device primitives that no other kernel uses.
#if !defined(WPH_EMULATE)
WPH_DEVICE unsigned reduce_or(unsigned v) { return __reduce_or_sync(0xffffffffu, v); }
WPH_DEVICE int count_bits(unsigned v) { return __popc(v); }
// The lesser and the greater of each half; of a number and NaN the number, and -0 is less than 0.
WPH_DEVICE unsigned h2_min(unsigned a, unsigned b) {
    unsigned d;
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
WPH_DEVICE unsigned h2_max(unsigned a, unsigned b) {
    unsigned d;
    asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
WPH_DEVICE unsigned bf2_min(unsigned a, unsigned b) {
    unsigned d;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
WPH_DEVICE unsigned bf2_max(unsigned a, unsigned b) {
    unsigned d;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// mma_16816 on bf16.
WPH_DEVICE void mma_16816_bf16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

constexpr int D = 128;
constexpr int THREADS = 128;
constexpr int CHUNK = 8;
constexpr int LANES = 16;
constexpr int REPEATS = 1;
constexpr int HELD = CHUNK * REPEATS;  // channels per lane
constexpr int ROWS_PER_PASS = 2;
constexpr int ROWS = 1;
constexpr unsigned WARP_PAIRS = ROWS * ROWS_PER_PASS;
constexpr unsigned CTA_PAIRS = 8;

// Where a thread stands.
struct Lane {
    int warp, lane;
    int piece;  // lane within the row
    int sub;    // row within the pass
    bool bf16;  // what the rows are
    static constexpr int NEXT = 1;  // from the lane with a chunk to that with the next one
    // Number and first channel of chunk `i`.
    WPH_DEVICE int chunk(int i) const { return i * LANES + piece; }
    WPH_DEVICE int channel(int i) const { return chunk(i) * CHUNK; }
};

// One of the two inputs.
struct Side {
    const unsigned short *rows;
    long long token_stride, head_stride;
    bool wide;  // every chunk is aligned to its size
    WPH_DEVICE Side(const void *first, long long token, long long head)
        : rows(static_cast<const unsigned short *>(first)), token_stride(token), head_stride(head),
          wide(((reinterpret_cast<unsigned long long>(first) | 2 * (token | head)) & 15) == 0) {}
};

// n / d. Powers of two, which the numbers of heads and a block's slots mostly are, need no reciprocal.
WPH_DEVICE unsigned quotient(unsigned n, unsigned d) {
    if (!(d & (d - 1))) return n >> count_bits(d - 1);
    return n / d;
}

// A token and head: where the rows come from and where they go.
struct Pair {
    unsigned token, head;
    bool inside;          // there is such a token
    long long number;     // of the slot
    unsigned char *slot;  // null: nothing is written
    WPH_DEVICE void find_slot(const StoreParams &p) {
        // The cache has less than 2^32 slots, so a 32-bit division serves 64-bit numbers too.
        const unsigned block = quotient(static_cast<unsigned>(number), p.block_size);
        const unsigned place = static_cast<unsigned>(number) - block * p.block_size;
        slot = inside && number >= 0 ? p.kv_cache + block * p.block_stride + place * p.token_stride + head * p.head_stride : nullptr;
    }
};

// The pairs of a lane from number `first` on, heads fastest, and their slots' numbers. One division, then additions only.
WPH_DEVICE void locate(const StoreParams &p, unsigned first, Pair (&pairs)[ROWS]) {
    const unsigned inner = p.kv_heads, outer_count = p.tokens;
    unsigned outer = quotient(first, inner), minor = first - outer * inner;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Pair &pair = pairs[r];
        pair.inside = outer < outer_count;
        // Beyond the end the last pairs are loaded once more, and not written.
        const unsigned held = pair.inside ? outer : outer_count - 1;
        pair.token = held, pair.head = minor;
        if (p.slot_mapping_bytes == 8) pair.number = load_global<long long>(static_cast<const long long *>(p.slot_mapping) + pair.token);
        else pair.number = load_global<int>(static_cast<const int *>(p.slot_mapping) + pair.token);
        minor += ROWS_PER_PASS;
#pragma unroll 1
        while (minor >= inner) minor -= inner, ++outer;
    }
}

WPH_DEVICE float to_float(unsigned short v, bool bf16) { return bf16 ? bf16_to_float(v) : half_to_float(v); }

// A lane's chunks of a row, as they are in memory.
struct Loaded {
    uint4 chunk[REPEATS];

    WPH_DEVICE void load(const Side &side, const Pair &pair, const Lane &lane) {
        const unsigned short *first = side.rows + pair.token * side.token_stride + pair.head * side.head_stride + lane.channel(0);
        if (side.wide) {
#pragma unroll
            for (int i = 0; i < REPEATS; ++i) chunk[i] = load_global<uint4>(first + i * LANES * CHUNK);
        } else {
#pragma unroll
            for (int i = 0; i < REPEATS; ++i) {
                chunk[i] = make_uint4(0, 0, 0, 0);
                // A loop, or its instructions would be issued without effect in the other case too.
#pragma unroll 1
                for (int j = 0; j < CHUNK; j += 2) {
                    const unsigned short *at = first + i * LANES * CHUNK + j;
                    const unsigned next = load_global<unsigned short>(at) | static_cast<unsigned>(load_global<unsigned short>(at + 1)) << 16;
                    chunk[i] = make_uint4(chunk[i].y, chunk[i].z, chunk[i].w, next);
                }
            }
        }
    }
    WPH_DEVICE void unpack(float (&y)[HELD], const Lane &lane) const {
#pragma unroll
        for (int i = 0; i < REPEATS; ++i) {
            const unsigned words[] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w};
#pragma unroll
            for (int j = 0; j < CHUNK / 2; ++j) {
                float *pair = y + CHUNK * i + 2 * j;
                if (lane.bf16) pair[0] = bits_to_float(words[j] << 16), pair[1] = bits_to_float(words[j] & 0xffff0000u);
                else pair[0] = h2_low(words[j]), pair[1] = h2_high(words[j]);
            }
        }
    }
};

// sqrt(v) for v from 0 to 1e38, to half a unit in the last place and a little; below 1e-37 it is next to nothing.
WPH_DEVICE float square_root(float v) {
    const float root = reciprocal_sqrt(fmaxf(v, 1e-37f)), near = v * root;
    return fmaf(fmaf(-near, near, v), 0.5f * root, near);
}
// 1 / v to a few units in the last place, for v from 1e-12 to 1e38.
WPH_DEVICE float reciprocal(float v) {
    const float root = reciprocal_sqrt(v);
    return root * root;
}

// Sum over the lanes of a row.
WPH_DEVICE float row_sum(float v) {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) v += shuffle_xor(v, mask);
    return v;
}

// Writing: a slot may start at any byte, mostly at any even one.
WPH_DEVICE int misaligned(const void *at, int alignment) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(at) & (alignment - 1));
}
// A 16-bit field wherever it stands.
WPH_DEVICE void put_half(unsigned char *at, unsigned v) {
    if (!misaligned(at, 2)) {
        *reinterpret_cast<unsigned short *>(at) = static_cast<unsigned short>(v);
    } else {
        at[0] = static_cast<unsigned char>(v), at[1] = static_cast<unsigned char>(v >> 8);
    }
}
WPH_DEVICE void put_word(unsigned char *at, unsigned v) {
    if (!misaligned(at, 4)) store_global(at, v);
    else put_half(at, v), put_half(at + 2, v >> 16);
}

// Puts the fields of a row where they belong, at once. `BASE`: the row's first byte, counted from the target.
template <int BASE>
struct Writer {
    unsigned char *row;  // null: nothing is written
    unsigned char *to;
    WPH_DEVICE Writer(unsigned char *target, const Lane &) : row(target), to(target + BASE) {}
    template <int SIZE>
    WPH_DEVICE void finish(const Lane &) const {}
    WPH_DEVICE bool writes() const { return row; }
    template <int OFFSET>
    WPH_DEVICE static void put_field_word(unsigned char *at, unsigned v) { put_word(at, v); }
    template <int OFFSET>
    WPH_DEVICE static void put_field_half(unsigned char *at, unsigned v) { put_half(at, v); }

    // Word `index` of a field of SIZE bytes from byte OFFSET on.
    template <int OFFSET, int SIZE>
    WPH_DEVICE void word(int index, unsigned v) const {
        if (!writes()) return;
        unsigned char *at = to + OFFSET + 4 * index;
        put_field_word<OFFSET>(at, v);
    }
    // A 16-bit field, or number `index` of several.
    template <int OFFSET>
    WPH_DEVICE void half(unsigned short v, int index = 0) const {
        if (writes()) put_field_half<OFFSET>(to + OFFSET + 2 * index, v);
    }
    // The codes of a lane's chunks, BITS per channel: 4 bits make words. Chunks of 3 bits are 24 bits each, and of four
    // neighbours three take a word.
    template <int BITS, int OFFSET, int SIZE, typename Holder>
    WPH_DEVICE void codes(const unsigned (&code)[REPEATS], const Holder &lane) const {
#pragma unroll
        for (int i = 0; i < REPEATS; ++i) {
            const int chunk = lane.chunk(i);
            if (BITS == 4) {
                word<OFFSET, SIZE>(chunk, code[i]);
            } else {
                const unsigned next = shuffle(code[i], lane.lane + Holder::NEXT);
                const int part = chunk % 4;
                if (part < 3) word<OFFSET, SIZE>(chunk / 4 * 3 + part, code[i] >> 8 * part | next << (24 - 8 * part));
            }
        }
    }
};

// Codes of coefficients: the number of midpoints between codebook levels that are <= y.
constexpr int BITS = 4;
constexpr int LEVELS = 16;
WPH_DEVICE float midpoint(const StoreParams &p, int i) { return (load_global<float>(p.centroids + i) + load_global<float>(p.centroids + i + 1)) * 0.5f; }

// The codes of a chunk, one after the other.
WPH_DEVICE unsigned pack(const unsigned (&n)[CHUNK]) {
    unsigned packed = 0;
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) packed += n[j] << BITS * j;
    return packed;
}

struct Search {
    float middle[LEVELS - 1];

    WPH_DEVICE Search(const StoreParams &p, const Lane &) {
#pragma unroll
        for (int i = 0; i < LEVELS - 1; ++i) middle[i] = midpoint(p, i);
    }
    // Of the coefficients y * scale, packed.
    WPH_DEVICE void codes(const float (&y)[HELD], float scale, unsigned (&packed)[REPEATS]) const {
#pragma unroll
        for (int i = 0; i < REPEATS; ++i) {
            unsigned n[CHUNK];
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) n[j] = code(y[CHUNK * i + j] * scale);
            packed[i] = pack(n);
        }
    }
    WPH_DEVICE unsigned code(float coefficient) const {
        unsigned n = 0;
        // Each comparison halves what is left, which moves to the front.
        float left[LEVELS - 1];
#pragma unroll
        for (int k = 0; k < LEVELS - 1; ++k) left[k] = middle[k];
#pragma unroll
        for (int half = LEVELS / 2; half > 0; half /= 2) {
            const bool up = coefficient >= left[half - 1];
            n += up ? half : 0;
#pragma unroll
            for (int k = 0; k < half - 1; ++k) left[k] = up ? left[half + k] : left[k];
        }
        return n;
    }
};

// Walsh-Hadamard transform of a row, unnormalised: stages over a lane's own channels are additions in registers, only
// those across lanes shuffle.
WPH_DEVICE void rotate(float (&y)[HELD], const Lane &lane) {
#pragma unroll
    for (int step = 1; step < HELD; step *= 2)
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (!(i & step)) {
                const float a = y[i], b = y[i + step];
                y[i] = a + b, y[i + step] = a - b;
            }
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) {
        const float sign = lane.piece & mask ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) y[i] = fmaf(sign, y[i], shuffle_xor(y[i], mask));
    }
}

// Constants of the layer that a lane keeps in registers.
struct Encoder {
    Search search;
    WPH_DEVICE Encoder(const StoreParams &p, const Lane &lane) : search(p, lane) {
        (void)p, (void)lane;
    }
};

// fp16 of a number; what lies beyond its range saturates.
WPH_DEVICE unsigned short field(float v) { return float_to_half(fmaxf(fminf(v, 65504.f), -65504.f)); }

// Codebook indices of a rotated vector of length one, and the length that it had.
struct CodedRow {
    static constexpr int SIZE = 66;
    WPH_DEVICE static float squares(const float (&y)[HELD]) {
        float sum[4] = {};  // independent: else each product would wait for the one before it
#pragma unroll
        for (int i = 0; i < HELD; ++i) sum[i % 4] = fmaf(y[i], y[i], sum[i % 4]);
        return row_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    // `taken` is called once what was loaded is needed no more.
    template <typename Writer, typename Taken>
    WPH_DEVICE static void encode(const Loaded &loaded, const Writer &writer, const Encoder &encoder, const Lane &lane, const Taken &taken) {
        float y[HELD];
        const Lane &holder = lane;
        const Writer &to = writer;
        loaded.unpack(y, lane);
        float sum = squares(y), shrink = 1.f;
        if (vote_any(!(sum <= 1e37f))) {
            // bf16 holds numbers whose squares fp32 does not: such rows are scaled by a power of two.
            if (!(sum <= 1e37f)) shrink = 0x1p-72f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) y[i] *= shrink;
            sum = squares(y);
        }
        rotate(y, lane);
        taken();
        const float length = square_root(sum), unit = 0.08838834764831845f * reciprocal(length + 1e-8f * shrink);  // 1 / sqrt(BLOCK_D)
        unsigned code[REPEATS];
        encoder.search.codes(y, unit, code);
        to.template codes<BITS, 0, 64>(code, holder);
        if (holder.piece == 0) to.template half<64>(field(shrink == 1.f ? length : length * 0x1p72f));
    }
};

// Values: the nearest of evenly spaced levels from the least to the greatest channel, not rotated.
struct AffineRow {
    static constexpr int SIZE = 68;
    static constexpr float TOP = 15.0f;
    // No quotient exceeds TOP by as much as a half. Adding 2^23 leaves a number's integer part in the low bits, under an exponent that is taken off again.
    static constexpr unsigned BIAS = 0x4b000000u * 0x11111111u;

    WPH_DEVICE static unsigned lesser(unsigned a, unsigned b, const Lane &lane) { return lane.bf16 ? bf2_min(a, b) : h2_min(a, b); }
    WPH_DEVICE static unsigned greater(unsigned a, unsigned b, const Lane &lane) { return lane.bf16 ? bf2_max(a, b) : h2_max(a, b); }
    template <typename Writer, typename Taken>
    WPH_DEVICE static void encode(const Loaded &loaded, const Writer &writer, const Encoder &, const Lane &lane, const Taken &taken) {
        float y[HELD];
        loaded.unpack(y, lane);
        // The least and the greatest of the channels, two at a time; then the least and the negated greatest of the row.
        unsigned least = loaded.chunk[0].x, greatest = least;
#pragma unroll
        for (int i = 0; i < REPEATS; ++i) {
            const unsigned words[] = {loaded.chunk[i].x, loaded.chunk[i].y, loaded.chunk[i].z, loaded.chunk[i].w};
#pragma unroll
            for (int j = i ? 0 : 1; j < CHUNK / 2; ++j) least = lesser(least, words[j], lane), greatest = greater(greatest, words[j], lane);
        }
        taken();
        greatest ^= 0x80008000u;
        unsigned ends = lesser(prmt(least, greatest, 0x5410), prmt(least, greatest, 0x7632), lane);
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) ends = lesser(ends, shuffle_xor(ends, mask), lane);
        const float low = to_float(static_cast<unsigned short>(ends), lane.bf16), high = -to_float(static_cast<unsigned short>(ends >> 16), lane.bf16);
        // Quotients must be those of fp32 division to the last bit, or ties fall to the other side. The product with the
        // reciprocal to twice a float's digits gives them. A range beyond fp32 has one level only.
        float range = high - low, from = low, shrink = 1.f;
        const bool finite = range <= 3.4028235e38f;
        if (vote_any(!(range <= 1e28f))) {
            // The rest of their reciprocals would be subnormal: such rows are scaled by a power of two.
            if (!(range <= 1e28f)) shrink = 0x1p-80f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) y[i] *= shrink;
            from *= shrink, range = high * shrink - from;
        }
        float scale = range * (1.f / TOP);
        scale = fmaf(fmaf(-scale, TOP, range), 1.f / TOP, scale);
        scale = scale > 1e-8f ? scale : 1e-8f;
        const float near = reciprocal(scale), better = fmaf(fmaf(-scale, near, 1.f), near, near);
        const float inverse = finite ? better : 0.f, rest = fmaf(-scale, better, 1.f) * inverse;
        unsigned code[REPEATS];
#pragma unroll
        for (int i = 0; i < REPEATS; ++i) {
            code[i] = 0u - BIAS;
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
                const float distance = y[CHUNK * i + j] - from, quotient = fmaf(distance, inverse, distance * rest);
                code[i] += float_to_bits(add_down(quotient + 0.5f, 8388608.f)) << 4 * j;
            }
        }
        writer.template codes<4, 0, 64>(code, lane);
        if (lane.piece == 0) writer.template half<64>(field(shrink == 1.f ? scale : scale * 0x1p80f)), writer.template half<66>(field(low));
    }
};

// Codes a loaded row and writes it `offset` bytes into its slot.
template <typename Row, typename Taken>
WPH_DEVICE void store_row(const Pair &pair, const Loaded &loaded, long long offset, const Encoder &encoder, const Lane &lane, const Taken &taken) {
    const Writer<0> writer(pair.slot ? pair.slot + offset : nullptr, lane);
    Row::encode(loaded, writer, encoder, lane, taken);
    writer.template finish<Row::SIZE>(lane);
}

// What a warp does. A literal `bf16` leaves only one of the conversions in the code that follows from it.
WPH_DEVICE void store_pairs(const StoreParams &p, bool bf16) {
    Lane lane;
    lane.warp = threadIdx.x / 32, lane.lane = threadIdx.x % 32;
    lane.piece = lane.lane % LANES, lane.sub = lane.lane / LANES;
    lane.bf16 = bf16;
    const unsigned rank = lane.warp;
    const unsigned first = blockIdx.x * CTA_PAIRS + rank * WARP_PAIRS;
    const unsigned all = static_cast<unsigned>(p.tokens) * p.kv_heads;
    if (first >= all) return;
    Pair pairs[ROWS];
    locate(p, first + lane.sub, pairs);
    const Side keys(p.key, p.key_token_stride, p.key_head_stride), values(p.value, p.value_token_stride, p.value_head_stride);

    Loaded key[ROWS], value[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) key[r].load(keys, pairs[r], lane), value[r].load(values, pairs[r], lane);
    const Encoder encoder(p, lane);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) pairs[r].find_slot(p);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (!vote_any(pairs[r].slot)) continue;
        const auto load_key = [] {};
        const auto load_value = [] {};
        store_row<CodedRow>(pairs[r], key[r], 0, encoder, lane, load_key);
        store_row<AffineRow>(pairs[r], value[r], 66, encoder, lane, load_value);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wph_store(const __grid_constant__ StoreParams p) {
    if (p.is_bf16) store_pairs(p, true);
    else store_pairs(p, false);
}
