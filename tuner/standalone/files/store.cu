// SPDX-License-Identifier: Apache-2.0
// Storing new keys and values: geometry and launch.
#include "dispatch.h"

namespace wph {

wph_plan store_plan(int kernel, int tokens, int kv_heads) {
    wph_plan plan = make_plan(kernel, tokens, kv_heads);
    plan.grid[0] = divide_up(static_cast<long long>(tokens) * kv_heads, all_tables().kernels[kernel].rows);
    plan.grid[1] = plan.grid[2] = 1;
    return plan;
}

}  // namespace wph

using namespace wph;

wph_status wph_store_select(const wph_store_call *call, wph_plan *plan) {
    if (call->tokens < 1 || call->kv_heads < 1) return WPH_BAD_ARGUMENT;
    const Table *table = find_table(STORE, call->sm, call->format, call->head_dim, 1);
    if (!table) return WPH_NO_TABLE;
    const double tokens = static_cast<double>(call->tokens) * call->kv_heads / table->kv_heads;
    const Choice *choice = find_choice(*table, tokens, 0, false);
    if (!choice) return WPH_OUT_OF_RANGE;
    *plan = store_plan(choice->kernel, call->tokens, call->kv_heads);
    return WPH_OK;
}

wph_status wph_store_launch(const wph_plan *plan, const struct wph_store_params *params, cudaStream_t stream) {
    if (!belongs(*plan, params->tokens, params->kv_heads)) return WPH_BAD_ARGUMENT;
    wph_store_params copy = *params;
    const void *entry = all_tables().kernels[plan->kernel].entry;
    return enqueue(entry, plan->grid, plan->block, plan->shared_bytes, &copy, stream);
}
