// SPDX-License-Identifier: Apache-2.0
// Which kernel of the tables a call runs, and how one is launched.
#include "dispatch.h"

#include <cmath>

#include "tables.h"

namespace wph {
namespace {

constexpr unsigned FREE_SHARED_BYTES = 48 * 1024;  // a kernel has to ask for more

int batch_of(const Choice &choice) { return choice.batch; }
int context_of(const Choice &choice) { return choice.context; }

// The candidates among which the nearest is looked for: those of one kind, and of one batch where `batch` is not 0.
struct Row {
    const Choice *choices;
    int count, ragged, batch;

    bool has(const Choice &c) const { return (ragged < 0 || c.ragged == ragged) && (batch == 0 || c.batch == batch); }

    bool covers(double value, int (*place)(const Choice &)) const {
        double least = INFINITY, most = 0;
        for (int i = 0; i < count; ++i) {
            if (!has(choices[i])) continue;
            least = std::fmin(least, place(choices[i]));
            most = std::fmax(most, place(choices[i]));
        }
        return least / CUT_OFF <= value && value <= most * CUT_OFF;
    }

    // Nearest on a log scale; of two equally near the larger one. Distances are rounded so that 8/4 and 16/8 tie.
    const Choice *nearest(double value, int (*place)(const Choice &)) const {
        const Choice *best = nullptr;
        double best_distance = INFINITY;
        for (int i = 0; i < count; ++i) {
            if (!has(choices[i])) continue;
            const double distance = std::round(std::fabs(std::log2(place(choices[i]) / value)) * 1e9);
            if (distance < best_distance || (distance == best_distance && place(choices[i]) > place(*best))) {
                best = &choices[i];
                best_distance = distance;
            }
        }
        return best;
    }
};

}  // namespace

Tables all_tables() { return {KERNELS, TABLES, TABLE_COUNT}; }

const Table *find_table(Op op, int sm, wph_format format, int head_dim, int group) {
    for (const Table &table : TABLES) {
        const bool same_problem = table.format == format && table.head_dim == head_dim && table.group == group;
        if (table.op == op && table.sm == sm && same_problem) return &table;
    }
    return nullptr;
}

const Choice *find_choice(const Table &table, double batch, int context, bool ragged) {
    const Row any = {table.by_batch, table.by_batch_count, -1, 0};
    if (!any.covers(batch, batch_of)) return nullptr;
    if (context > 0) {
        for (int kind = ragged; kind >= 0; --kind) {
            Row row = {table.buckets, table.bucket_count, kind, 0};
            if (row.covers(batch, batch_of)) {
                row.batch = row.nearest(batch, batch_of)->batch;
                if (row.covers(context, context_of)) return row.nearest(context, context_of);
            }
        }
    }
    return any.nearest(batch, batch_of);
}

wph_plan make_plan(int kernel, int batch, int kv_heads) {
    wph_plan plan = {};
    plan.kernel = kernel;
    plan.name = KERNELS[kernel].name;
    plan.batch = batch;
    plan.kv_heads = kv_heads;
    plan.block = KERNELS[kernel].block;
    plan.shared_bytes = KERNELS[kernel].shared_bytes;
    plan.splits = 1;
    return plan;
}

bool belongs(const wph_plan &plan, int batch, int kv_heads) {
    return plan.kernel >= 0 && plan.kernel < KERNEL_COUNT && plan.batch == batch && plan.kv_heads == kv_heads;
}

wph_status enqueue(const void *entry, const unsigned (&grid)[3], unsigned block, unsigned shared_bytes, void *params,
                   cudaStream_t stream) {
    if (shared_bytes > FREE_SHARED_BYTES) {
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        const cudaError_t error = cudaFuncSetAttribute(entry, attribute, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return WPH_CUDA_ERROR;
    }
    void *arguments[] = {params};
    const dim3 ctas(grid[0], grid[1], grid[2]);
    const cudaError_t error = cudaLaunchKernel(entry, ctas, dim3(block), arguments, shared_bytes, stream);
    return error == cudaSuccess ? WPH_OK : WPH_CUDA_ERROR;
}

}  // namespace wph

const char *wph_status_text(wph_status status) {
    switch (status) {
        case WPH_OK: return "ok";
        case WPH_NO_TABLE: return "no kernel was tuned for this format, head dim, group size and GPU";
        case WPH_OUT_OF_RANGE: return "the batch is too far from every tuned one";
        case WPH_BAD_ARGUMENT: return "a size is not positive, or params do not belong to the plan";
        case WPH_UNREADABLE_CACHE: return "the kernel cannot read a cache with these strides or this alignment";
        case WPH_CUDA_ERROR: return "the launch failed";
    }
    return "unknown status";
}
