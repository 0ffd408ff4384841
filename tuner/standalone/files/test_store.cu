// SPDX-License-Identifier: Apache-2.0
// Runs every store kernel for the attached GPU and compares the cache byte by byte with one that was coded on the host.
//
// The cache starts full of 0xff: only bytes that carry data of a stored token may change. FP8 keys, affine values and
// outliers must be exact. A codebook index may be one level off where fp32 sums can move its coefficient across the
// midpoint between the two, a norm one fp16 step. Every call is made twice and must give the same bytes.
#include "cache.h"

using namespace wph_test;

namespace {

constexpr double UNIT = 1.0 / (1 << 24);  // relative error of one fp32 rounding
constexpr int LENGTH_ROUNDINGS = 32;      // of a coefficient: dividing by the length and by sqrt(block_d)

struct Case {
    Cache cache;
    DeviceCache device;
    std::vector<long long> slots;

    Case(const Layout &layout, const Spec &spec, int kv_heads, unsigned seed)
        : cache(layout, spec, kv_heads, seed), device(cache) {
        for (int b = 0; b < cache.batch; ++b) {
            for (int t = 0; t < spec.lengths[b]; ++t) slots.push_back(cache.slot_number(b, t));
        }
        slots.push_back(-1);  // one token that is stored nowhere
    }
};

std::vector<unsigned char> run(Case &c, const wph_plan &plan, const std::string &where) {
    const size_t row = static_cast<size_t>(c.cache.kv_heads) * c.cache.layout.head_dim;
    std::vector<double> keys = c.cache.keys, values = c.cache.values;
    keys.resize(c.slots.size() * row, 1), values.resize(keys.size(), 1);
    const DeviceArray<unsigned short> key(rounded(keys, c.cache.spec.bf16)), value(rounded(values, c.cache.spec.bf16));
    const DeviceArray<long long> wide(c.slots);
    const DeviceArray<int> narrow(std::vector<int>(c.slots.begin(), c.slots.end()));
    c.device.poison();
    wph_store_params p = {};
    c.device.describe_slots(p);
    p.key = key.get(), p.value = value.get();
    p.key_token_stride = p.value_token_stride = static_cast<long long>(row);
    p.key_head_stride = p.value_head_stride = c.cache.layout.head_dim;
    p.is_bf16 = c.cache.spec.bf16;
    p.slot_mapping = c.cache.spec.wide_ids ? static_cast<const void *>(wide.get()) : narrow.get();
    p.slot_mapping_bytes = c.cache.spec.wide_ids ? 8 : 4;
    p.tokens = static_cast<int>(c.slots.size());
    finish(wph_store_launch(&plan, &p, nullptr), where);
    return c.device.to_host();
}

// Copies into `wanted` what rounding may have changed in one coded row; how many indices that were.
int accept_rounding(const Cache &cache, const Row &row, const double *channels, const unsigned char *got,
                    unsigned char *wanted) {
    if (row.coding != CODEBOOK) return 0;
    const std::vector<double> x(channels, channels + cache.layout.head_dim);
    double norm, sum = 0;
    const std::vector<double> y = coefficients(cache.layout, row, cache.layer, x, norm);
    for (int i = 0; i < cache.layout.normal; ++i) sum += std::fabs(row.outliers ? x[cache.layer.channels[i]] : x[i]);
    const double size = cache.layout.block_d;
    const double stages = std::log2(size) * sum / (norm * std::sqrt(size));
    int moved = 0;
    for (int i = 0; i < row.coefficients; ++i) {
        const unsigned a = load_index(got + row.indices_at, i, row.bits);
        const unsigned b = load_index(wanted + row.indices_at, i, row.bits);
        if (a != b + 1 && b != a + 1) continue;
        const float *level = cache.layout.centroids + std::min(a, b);
        const double allowed = UNIT * (stages + LENGTH_ROUNDINGS * std::fabs(y[i]));
        if (std::fabs(y[i] - (level[0] + level[1]) / 2) > allowed) continue;
        store_index(wanted + row.indices_at, i, row.bits, a);
        ++moved;
    }
    const unsigned short a = load_u16(got + row.norm_at), b = load_u16(wanted + row.norm_at);
    if (a + 1 == b || b + 1 == a) store_u16(wanted + row.norm_at, a);
    return moved;
}

int compare(const Case &c, const std::vector<unsigned char> &got, const std::string &where) {
    const Cache &cache = c.cache;
    std::vector<unsigned char> wanted = cache.bytes;
    int moved = 0;
    size_t at = 0;
    for (size_t token = 0; token + 1 < c.slots.size(); ++token) {
        const long long block = c.slots[token] / cache.spec.block_size, row = c.slots[token] % cache.spec.block_size;
        for (int h = 0; h < cache.kv_heads; ++h, at += cache.layout.head_dim) {
            const size_t key = block * cache.block_stride() + row * cache.token_stride() + h * cache.head_stride();
            const size_t value = key + (cache.layout.planes ? cache.plane_stride() : cache.layout.value_at);
            moved += accept_rounding(cache, cache.layout.key, &cache.keys[at], &got[key], &wanted[key]);
            moved += accept_rounding(cache, cache.layout.value, &cache.values[at], &got[value], &wanted[value]);
        }
    }
    for (size_t i = 0; i < wanted.size(); ++i) {
        if (got[i] == wanted[i]) continue;
        const std::string bytes = std::to_string(got[i]) + ", expected " + std::to_string(wanted[i]);
        fail(where + ": byte " + std::to_string(i) + " is " + bytes);
    }
    return moved;
}

void check_table(const wph::Table &table, const Layout &layout) {
    const std::vector<Spec> specs = all_specs();
    for (int kernel = table.first_kernel; kernel < table.first_kernel + table.kernel_count; ++kernel) {
        const std::string name = wph::all_tables().kernels[kernel].name;
        int moved = 0;
        for (size_t i = 0; i < specs.size(); ++i) {
            Case c(layout, specs[i], table.kv_heads, static_cast<unsigned>(i));
            const std::string where = name + ", " + describe(specs[i]);
            const wph_plan plan = wph::store_plan(kernel, static_cast<int>(c.slots.size()), table.kv_heads);
            const std::vector<unsigned char> got = run(c, plan, where);
            moved += compare(c, got, where);
            if (got != run(c, plan, where)) fail(where + ": two runs differ");
        }
        std::printf("ok   %s: %d indices moved by rounding\n", name.c_str(), moved);
    }
}

}  // namespace

int main() { return check_kernels(wph::STORE, check_table); }
