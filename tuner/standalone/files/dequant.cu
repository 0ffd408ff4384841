// SPDX-License-Identifier: Apache-2.0
// Dequantisation: geometry and launch.
#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace wph {

namespace {

constexpr long long GRID_Y_MAX = 65535;
// Longest run of adjacent dirty slots that one entry of the grid decodes: blocks may hold thousands.
constexpr int DIRTY_RUN_TOKENS = 16;

int run_tokens(int block_size) { return std::min(DIRTY_RUN_TOKENS, block_size); }

}  // namespace

// One entry of the grid is a cell of the block table: x counts the CTAs of a block, y and z together the entries.
wph_plan dequant_plan(int kernel, int batch, int kv_heads, int block_size, int max_blocks) {
    wph_plan plan = make_plan(kernel, batch, kv_heads);
    const long long entries = static_cast<long long>(batch) * max_blocks;
    const long long y = entries < GRID_Y_MAX ? entries : GRID_Y_MAX;
    plan.grid[0] = divide_up(static_cast<long long>(block_size) * kv_heads, all_tables().kernels[kernel].rows);
    plan.grid[1] = static_cast<unsigned>(y), plan.grid[2] = divide_up(entries, y);
    return plan;
}

// One entry is a run of adjacent dirty slots.
wph_plan dirty_plan(int kernel, int slots, int kv_heads, int block_size) {
    return dequant_plan(kernel, slots, kv_heads, run_tokens(block_size), 1);
}

}  // namespace wph

using namespace wph;

wph_status wph_dequant_select(const wph_dequant_call *call, wph_plan *plan) {
    if (call->batch < 1 || call->kv_heads < 1 || call->context < 0 || call->block_size < 1) return WPH_BAD_ARGUMENT;
    if (!call->dirty && call->max_blocks < 1) return WPH_BAD_ARGUMENT;
    const Table *table = find_table(DEQUANT, call->sm, call->format, call->head_dim, 1);
    if (!table) return WPH_NO_TABLE;
    const double batch = static_cast<double>(call->batch) * call->kv_heads / table->kv_heads;
    const Choice *choice = find_choice(*table, batch, call->dirty ? 0 : call->context, false);
    if (!choice) return WPH_OUT_OF_RANGE;
    *plan = call->dirty ? dirty_plan(choice->kernel, call->batch, call->kv_heads, call->block_size)
                        : dequant_plan(choice->kernel, call->batch, call->kv_heads, call->block_size, call->max_blocks);
    return WPH_OK;
}

wph_status wph_dequant_launch(const wph_plan *plan, const struct wph_dequant_params *params, cudaStream_t stream) {
    if (!belongs(*plan, params->batch, params->kv_heads)) return WPH_BAD_ARGUMENT;
    wph_dequant_params copy = *params;
    if (copy.dirty) copy.max_blocks = 1, copy.by_block_id = 1, copy.run_tokens = run_tokens(copy.block_size);
    const wph_plan wanted = copy.dirty
        ? dirty_plan(plan->kernel, copy.batch, copy.kv_heads, copy.block_size)
        : dequant_plan(plan->kernel, copy.batch, copy.kv_heads, copy.block_size, copy.max_blocks);
    if (std::memcmp(wanted.grid, plan->grid, sizeof plan->grid)) return WPH_BAD_ARGUMENT;
    const void *entry = all_tables().kernels[plan->kernel].entry;
    return enqueue(entry, plan->grid, plan->block, plan->shared_bytes, &copy, stream);
}
