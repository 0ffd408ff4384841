// SPDX-License-Identifier: Apache-2.0
// What the generated tables hold. Internal: callers use wph.h.
#pragma once

#include "wph.h"

namespace wph {

enum Op { DECODE, DEQUANT, STORE };

// How a decode kernel reads slots; it decides which caches the kernel can read.
enum Load { DIRECT, CP_ASYNC, BULK, BULK_ROWS };

struct Kernel {
    const char *name;
    const void *entry;   // __global__ function
    const void *reduce;  // second kernel, or null
    int block;           // threads
    int reduce_warps;    // of the second kernel's block
    int shared_bytes;
    int head_warps;  // KV heads per CTA
    int stream;      // 1: one persistent grid for all requests, 0: `splits` CTAs per request
    int counts;      // 1: the last CTA of a request, found by a counter, adds up the splits; more: all do, with so many
    int branch;      // ... or, where this is not 0, the last CTA of so many, and then the last of those
    int cluster;     // CTAs that add up in each other's shared memory first; each of them has a counter
    int row_floats;  // fp32 values per query head and split, in whole 16 bytes
    int rows;        // other kernels: tokens x heads that a CTA covers (dequantisation: of a block)
    Load load;
    int alignment;  // of every slot, in bytes; with bulk copies, of the bytes between tokens
    int slot_bytes;
};

// `batch` requests, the longest of `context` tokens (0: any), run `kernel` with `splits`.
struct Choice {
    int batch, context, ragged, kernel, splits;
};

struct Table {
    Op op;
    int sm;
    wph_format format;
    int head_dim, group;
    int kv_heads;  // that it was tuned with: what counts is batch x KV heads
    const Choice *by_batch;
    int by_batch_count;
    const Choice *buckets;
    int bucket_count;
    int first_kernel, kernel_count;
};

struct Tables {
    const Kernel *kernels;
    const Table *tables;
    int count;
};
Tables all_tables();

// Null where there is none.
const Table *find_table(Op op, int sm, wph_format format, int head_dim, int group);

// The choice for `batch` requests (scaled to the tuned number of KV heads); null: too far from every tuned batch. A
// context far outside the tuned ones falls back on the choice that holds for all of them, and with ragged requests first
// on what serves equal ones.
const Choice *find_choice(const Table &table, double batch, int context, bool ragged);

// A plan without grid and scratch.
wph_plan make_plan(int kernel, int batch, int kv_heads);

// Geometry and scratch of one kernel, whatever the tables would choose.
wph_plan decode_plan(const Table &table, int kernel, int batch, int kv_heads, int splits);
wph_plan dequant_plan(int kernel, int batch, int kv_heads, int block_size, int max_blocks);
wph_plan dirty_plan(int kernel, int slots, int kv_heads, int block_size);
wph_plan store_plan(int kernel, int tokens, int kv_heads);

// Whether a decode kernel can read a cache with this address, these strides and this block size.
bool reads(const Kernel &kernel, const wph_decode_params &p);

// Whether `plan` names a kernel and was made for these sizes.
bool belongs(const wph_plan &plan, int batch, int kv_heads);

wph_status enqueue(const void *entry, const unsigned (&grid)[3], unsigned block, unsigned shared_bytes, void *params,
                   cudaStream_t stream);

inline unsigned divide_up(long long a, long long b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace wph
