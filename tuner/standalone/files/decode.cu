// SPDX-License-Identifier: Apache-2.0
// Decode attention: geometry, which caches a kernel can read, and the launch.
#include <cstdint>

#include "dispatch.h"

namespace wph {
namespace {

bool multiples(int of, const long long *values, int count) {
    for (int i = 0; i < count; ++i) {
        if (values[i] % of) return false;
    }
    return true;
}

// What one bulk copy moves must lie side by side and start at a multiple of 16 bytes: 16 tokens, or the CTA's heads of one. The
// bytes between tokens are a multiple of the kernel's alignment.
bool bulk_reads(const Kernel &kernel, const wph_decode_params &p, long long address) {
    if (p.kv_heads % kernel.head_warps) return false;
    const long long run = static_cast<long long>(kernel.head_warps) * kernel.slot_bytes;
    if (kernel.load == BULK_ROWS) {
        const long long starts[] = {address, p.block_stride, p.plane_stride, p.token_stride, run};
        return p.head_stride == kernel.slot_bytes && multiples(16, starts, 5);
    }
    const bool head_major = p.token_stride == kernel.slot_bytes;
    const bool token_major = p.head_stride == kernel.slot_bytes && p.token_stride == run;
    if (!head_major && !token_major) return false;
    if (p.token_stride % kernel.alignment) return false;
    const long long head = head_major ? p.head_stride : 0;
    const long long starts[] = {address, p.block_stride, p.plane_stride, 16 * p.token_stride, head};
    return multiples(16, starts, 5);
}

}  // namespace

bool reads(const Kernel &kernel, const wph_decode_params &p) {
    const long long address = static_cast<long long>(reinterpret_cast<std::uintptr_t>(p.kv_cache));
    if (p.block_size < 16 || p.block_size % 16) return false;
    if (kernel.load == BULK || kernel.load == BULK_ROWS) return bulk_reads(kernel, p, address);
    const long long starts[] = {address, p.block_stride, p.plane_stride, p.token_stride, p.head_stride};
    if (!multiples(kernel.alignment, starts, 5)) return false;
    return kernel.load != CP_ASYNC || p.block_stride % 16 == 0;
}

wph_plan decode_plan(const Table &table, int kernel, int batch, int kv_heads, int splits) {
    const Kernel &k = all_tables().kernels[kernel];
    wph_plan plan = make_plan(kernel, batch, kv_heads);
    const unsigned head_groups = divide_up(kv_heads, k.head_warps);
    plan.splits = splits;
    const unsigned shares = divide_up(splits, k.cluster);  // of a request, in global memory
    plan.grid[0] = shares * k.cluster;
    plan.grid[1] = head_groups, plan.grid[2] = k.stream ? 1 : batch;
    const size_t heads = static_cast<size_t>(kv_heads) * table.group;
    if (k.reduce) {
        plan.reduce_grid[0] = divide_up(heads, k.reduce_warps), plan.reduce_grid[1] = batch, plan.reduce_grid[2] = 1;
        plan.reduce_block = 32 * k.reduce_warps;
    }
    // Per split and query head: a maximum, a sum, and the output before division, whose rows start at 16 bytes.
    const size_t parts = k.stream ? 2 * static_cast<size_t>(splits) : static_cast<size_t>(batch) * shares;
    const size_t rows = parts * heads;
    plan.partials_bytes = ((2 * rows + 3) / 4 * 4 + rows * k.row_floats) * sizeof(float);
    const size_t counters = k.counts * (k.cluster + (k.branch ? divide_up(splits, k.branch) : 0));
    plan.counters_bytes = static_cast<size_t>(batch) * head_groups * counters * sizeof(int);
    return plan;
}

}  // namespace wph

using namespace wph;

wph_status wph_decode_select(const wph_decode_call *call, wph_plan *plan) {
    if (call->batch < 1 || call->kv_heads < 1 || call->context < 0) return WPH_BAD_ARGUMENT;
    const Table *table = find_table(DECODE, call->sm, call->format, call->head_dim, call->group);
    if (!table) return WPH_NO_TABLE;
    const double batch = static_cast<double>(call->batch) * call->kv_heads / table->kv_heads;
    const Choice *choice = find_choice(*table, batch, call->context, call->ragged != 0);
    if (!choice) return WPH_OUT_OF_RANGE;
    *plan = decode_plan(*table, choice->kernel, call->batch, call->kv_heads, choice->splits);
    return WPH_OK;
}

wph_status wph_decode_launch(const wph_plan *plan, const struct wph_decode_params *params, cudaStream_t stream) {
    if (!belongs(*plan, params->batch, params->kv_heads)) return WPH_BAD_ARGUMENT;
    const Kernel &kernel = all_tables().kernels[plan->kernel];
    if (!reads(kernel, *params)) return WPH_UNREADABLE_CACHE;
    wph_decode_params copy = *params;
    copy.splits = plan->splits;
    const wph_status status = enqueue(kernel.entry, plan->grid, plan->block, plan->shared_bytes, &copy, stream);
    if (status != WPH_OK || !kernel.reduce) return status;
    return enqueue(kernel.reduce, plan->reduce_grid, plan->reduce_block, 0, &copy, stream);
}
