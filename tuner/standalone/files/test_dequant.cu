// SPDX-License-Identifier: Apache-2.0
// Runs every dequantisation kernel for the attached GPU and compares its rows with those in double precision.
//
// Outputs are poisoned with NaN: blocks past a request's length must keep it. Every call is made twice and must give
// the same bits.
#include <set>

#include "cache.h"

using namespace wph_test;

namespace {

// Allowed per element: one bf16 step, and what rounding the operands of a rotation to halves costs of a row's length.
constexpr double STEP = 1.0 / 128, ROW_ROUNDING = 1.0 / 2048;

struct Case {
    Cache cache;
    DeviceCache device;

    Case(const Layout &layout, const Spec &spec, int kv_heads, unsigned seed)
        : cache(layout, spec, kv_heads, seed), device(cache) {}

    size_t row_of(int b, int t, int h) const {
        const size_t block = static_cast<size_t>(b) * cache.max_blocks + t / cache.spec.block_size;
        return (block * cache.spec.block_size + t % cache.spec.block_size) * cache.kv_heads + h;
    }
};

using Rows = std::vector<unsigned short>;

std::pair<Rows, Rows> run(const Case &c, const wph_plan &plan, const std::string &where) {
    const size_t rows = c.row_of(c.cache.batch, 0, 0);
    const int dim = c.cache.layout.head_dim;
    DeviceArray<unsigned short> key(rows * dim), value(rows * dim);
    key.fill(0xff), value.fill(0xff);
    wph_dequant_params p = {};
    c.device.describe(p);
    p.key_out = key.get(), p.value_out = value.get();
    p.out_head_stride = dim, p.out_token_stride = p.out_head_stride * c.cache.kv_heads;
    p.out_block_stride = p.out_token_stride * c.cache.spec.block_size;
    finish(wph_dequant_launch(&plan, &p, nullptr), where);
    return {key.to_host(), value.to_host()};
}

// Largest deviation of one row over what is allowed.
double deviation(const unsigned short *bits, const std::vector<double> &wanted, const std::string &where) {
    const double row = ROW_ROUNDING * length_of(wanted);
    double worst = 0;
    for (size_t d = 0; d < wanted.size(); ++d) {
        const double error = std::fabs(from_bf16(bits[d]) - wanted[d]);
        if (std::isnan(error)) fail(where + ": NaN in the output, or part of it not written");
        worst = std::max(worst, error / (STEP * std::fabs(wanted[d]) + row + 1e-30));
    }
    return worst;
}

// Likewise of all rows.
double compare(const Case &c, const Rows &got, bool values, const std::string &where) {
    const int dim = c.cache.layout.head_dim, block_size = c.cache.spec.block_size;
    double worst = 0;
    for (int b = 0; b < c.cache.batch; ++b) {
        const int length = c.cache.spec.lengths[b], covered = (length + block_size - 1) / block_size * block_size;
        for (int t = 0; t < c.cache.max_blocks * block_size; ++t) {
            if (t >= length && t < covered) continue;  // the rest of the last block may hold anything
            for (int h = 0; h < c.cache.kv_heads; ++h) {
                const unsigned short *bits = &got[c.row_of(b, t, h) * dim];
                if (t >= length) {
                    for (int d = 0; d < dim; ++d) {
                        if (bits[d] != 0xffff) fail(where + ": writes past a request's length");
                    }
                    continue;
                }
                worst = std::max(worst, deviation(bits, values ? c.cache.value(b, t, h) : c.cache.key(b, t, h), where));
            }
        }
    }
    return worst;
}

// Some slots listed as dirty: their rows become those of a full decode, all others stay as they were.
void check_dirty(const Case &c, int kernel, const std::string &where) {
    const int dim = c.cache.layout.head_dim, heads = c.cache.kv_heads;
    std::vector<long long> slots;
    for (int b = 0; b < c.cache.batch; ++b) {
        const int length = c.cache.spec.lengths[b];
        for (int t = std::max(0, length - 20); t < length; ++t) slots.push_back(c.cache.slot_number(b, t));
        slots.push_back(-1);
    }
    const DeviceArray<long long> list(slots);
    const size_t rows = c.cache.bytes.size() / c.cache.block_stride() * c.cache.spec.block_size * heads;
    DeviceArray<unsigned short> key(rows * dim);
    key.fill(0xff);
    wph_dequant_params p = {};
    c.device.describe_slots(p);
    p.batch = static_cast<int>(slots.size());
    p.dirty = list.get(), p.dirty_bytes = 8;
    p.key_out = key.get();
    p.out_head_stride = dim, p.out_token_stride = p.out_head_stride * heads;
    p.out_block_stride = p.out_token_stride * c.cache.spec.block_size;
    const wph_plan plan = wph::dirty_plan(kernel, p.batch, heads, c.cache.spec.block_size);
    finish(wph_dequant_launch(&plan, &p, nullptr), where);
    const Rows got = key.to_host();
    const std::set<long long> listed(slots.begin(), slots.end());
    for (size_t row = 0; row < rows; ++row) {
        const auto first = got.begin() + row * dim;
        const bool written = std::count(first, first + dim, 0xffff) < dim;
        if (written != (listed.count(static_cast<long long>(row / heads)) > 0)) {
            fail(where + ", dirty slots: row " + std::to_string(row) + (written ? " was written" : " was not written"));
        }
    }
    for (int b = 0; b < c.cache.batch; ++b) {
        for (int t = std::max(0, c.cache.spec.lengths[b] - 20); t < c.cache.spec.lengths[b]; ++t) {
            for (int h = 0; h < heads; ++h) {
                const unsigned short *bits = &got[(c.cache.slot_number(b, t) * heads + h) * dim];
                if (deviation(bits, c.cache.key(b, t, h), where) > 1) fail(where + ", dirty slots: a row deviates");
            }
        }
    }
}

void check_table(const wph::Table &table, const Layout &layout) {
    const std::vector<Spec> specs = all_specs();
    for (int kernel = table.first_kernel; kernel < table.first_kernel + table.kernel_count; ++kernel) {
        const std::string name = wph::all_tables().kernels[kernel].name;
        double worst = 0;
        for (size_t i = 0; i < specs.size(); ++i) {
            const Case c(layout, specs[i], table.kv_heads, static_cast<unsigned>(i));
            const std::string where = name + ", " + describe(specs[i]);
            const int block_size = specs[i].block_size, max_blocks = c.cache.max_blocks;
            const wph_plan plan = wph::dequant_plan(kernel, c.cache.batch, c.cache.kv_heads, block_size, max_blocks);
            const std::pair<Rows, Rows> got = run(c, plan, where);
            const double error = std::max(compare(c, got.first, false, where), compare(c, got.second, true, where));
            if (got != run(c, plan, where)) fail(where + ": two runs differ");
            if (!(error <= 1)) fail(where + ": " + std::to_string(error) + " of the allowed deviation");
            worst = std::max(worst, error);
            check_dirty(c, kernel, where);
        }
        std::printf("ok   %s: worst deviation %.2f of what is allowed\n", name.c_str(), worst);
    }
}

}  // namespace

int main() { return check_kernels(wph::DEQUANT, check_table); }
