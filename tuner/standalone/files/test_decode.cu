// SPDX-License-Identifier: Apache-2.0
// Runs every decode kernel for the attached GPU and compares it with attention in double precision.
//
// Outputs are poisoned with NaN and surrounded by more of it; every call is made twice and must give the same bits. A
// cache whose memory order a kernel cannot read must be refused; in one of the two orders every kernel must be right.
#include <memory>
#include <set>

#include "cache.h"
#include "tolerance.h"

using namespace wph_test;

namespace {

struct Case {
    Cache cache;
    DeviceCache device;
    int group;
    std::vector<double> query, expected;  // [batch, query heads, head_dim]
    DeviceArray<unsigned short> device_query;

    Case(const Layout &layout, const Spec &spec, int kv_heads, int group, unsigned seed)
        : cache(layout, spec, kv_heads, seed), device(cache), group(group),
          query(cache.gaussian(cache.batch * heads() * layout.head_dim, 0)), expected(attend()),
          device_query(rounded(query, spec.bf16)) {}

    int heads() const { return cache.kv_heads * group; }
    double scale() const { return 1 / std::sqrt(static_cast<double>(cache.layout.head_dim)); }

    std::vector<double> attend() const {
        const int dim = cache.layout.head_dim;
        std::vector<double> out(query.size());
        for (int b = 0; b < cache.batch; ++b) {
            for (int kv_head = 0; kv_head < cache.kv_heads; ++kv_head) attend_group(b, kv_head, dim, out);
        }
        return out;
    }

    // The query heads that share one KV head.
    void attend_group(int b, int kv_head, int dim, std::vector<double> &out) const {
        const int length = cache.spec.lengths[b];
        std::vector<std::vector<double>> weights(group, std::vector<double>(length));
        for (int t = 0; t < length; ++t) {
            const std::vector<double> key = cache.key(b, t, kv_head);
            for (int g = 0; g < group; ++g) {
                const double *q = &query[(static_cast<size_t>(b) * heads() + kv_head * group + g) * dim];
                for (int d = 0; d < dim; ++d) weights[g][t] += q[d] * key[d] * scale();
            }
        }
        for (std::vector<double> &w : weights) {
            if (w.empty()) continue;
            const double largest = *std::max_element(w.begin(), w.end());
            double total = 0;
            for (double &x : w) total += x = std::exp(x - largest);
            for (double &x : w) x /= total;
        }
        for (int t = 0; t < length; ++t) {
            const std::vector<double> value = cache.value(b, t, kv_head);
            for (int g = 0; g < group; ++g) {
                double *o = &out[(static_cast<size_t>(b) * heads() + kv_head * group + g) * dim];
                for (int d = 0; d < dim; ++d) o[d] += weights[g][t] * value[d];
            }
        }
    }
};

bool readable(const Case &c, int kernel) {
    wph_decode_params p = {};
    c.device.describe(p);
    return wph::reads(wph::all_tables().kernels[kernel], p);
}

// A launch that must be refused.
void refuse(const Case &c, const wph_plan &plan, const std::string &where) {
    wph_decode_params p = {};
    c.device.describe(p);
    const wph_status status = wph_decode_launch(&plan, &p, nullptr);
    if (status != WPH_UNREADABLE_CACHE) fail(where + ": expected to be refused, got: " + wph_status_text(status));
}

// One call into a poisoned output with a row of heads to spare per request, and a request to spare on either side.
std::vector<unsigned short> run(const Case &c, const wph_plan &plan, const std::string &where) {
    const int dim = c.cache.layout.head_dim, row = (c.heads() + 1) * dim;
    DeviceArray<unsigned short> out(static_cast<size_t>(c.cache.batch + 2) * row);
    DeviceArray<unsigned char> partials(plan.partials_bytes), counters(plan.counters_bytes);
    out.fill(0xff), partials.fill(0xff), counters.fill(0);
    wph_decode_params p = {};
    c.device.describe(p);
    p.query = c.device_query.get();
    p.query_batch_stride = static_cast<long long>(c.heads()) * dim, p.query_head_stride = dim;
    p.out = out.get() + row;
    p.out_batch_stride = row, p.out_head_stride = dim;
    p.is_bf16 = c.cache.spec.bf16;
    p.scale = static_cast<float>(c.scale());
    p.partials = reinterpret_cast<float *>(partials.get());
    p.counters = reinterpret_cast<int *>(counters.get());
    finish(wph_decode_launch(&plan, &p, nullptr), where);
    for (unsigned char byte : counters.to_host()) {
        if (byte) fail(where + ": counters are not zero after the launch");
    }
    return out.to_host();
}

// Largest relative error of a head.
double compare(const Case &c, const std::vector<unsigned short> &got, const std::string &where) {
    const int dim = c.cache.layout.head_dim, row = (c.heads() + 1) * dim;
    double worst = 0;
    for (int b = -1; b <= c.cache.batch; ++b) {
        for (int h = 0; h <= c.heads(); ++h) {
            const unsigned short *bits = &got[static_cast<size_t>(b + 1) * row + h * dim];
            const bool inside = b >= 0 && b < c.cache.batch && h < c.heads();
            double error = 0, length = 0;
            for (int d = 0; d < dim; ++d) {
                const double x = c.cache.spec.bf16 ? from_bf16(bits[d]) : from_half(bits[d]);
                if (inside && std::isnan(x)) fail(where + ": NaN in the output, or part of it not written");
                if (!inside && !std::isnan(x)) fail(where + ": writes outside its output");
                if (!inside) continue;
                const double wanted = c.expected[(static_cast<size_t>(b) * c.heads() + h) * dim + d];
                error += (x - wanted) * (x - wanted);
                length += wanted * wanted;
            }
            if (!inside || error == 0) continue;
            if (length == 0) fail(where + ": a request of length 0 is not zero");
            worst = std::max(worst, std::sqrt(error / length));
        }
    }
    return worst;
}

void check_table(const wph::Table &table, const Layout &layout) {
    const std::vector<Spec> specs = all_specs();
    std::vector<std::unique_ptr<Case>> cases;
    for (const Spec &spec : specs) {
        const unsigned seed = static_cast<unsigned>(cases.size());
        cases.push_back(std::make_unique<Case>(layout, spec, table.kv_heads, table.group, seed));
    }
    for (int kernel = table.first_kernel; kernel < table.first_kernel + table.kernel_count; ++kernel) {
        std::set<int> splits = {1, 3, 16};
        for (int i = 0; i < table.by_batch_count; ++i) {
            if (table.by_batch[i].kernel == kernel) splits.insert(table.by_batch[i].splits);
        }
        for (int i = 0; i < table.bucket_count; ++i) {
            if (table.buckets[i].kernel == kernel) splits.insert(table.buckets[i].splits);
        }
        const std::string name = wph::all_tables().kernels[kernel].name;
        double worst = 0;
        std::set<bool> types;
        for (const auto &c : cases) {
            const double tolerance = c->cache.spec.bf16 ? TOLERANCE_BF16 : TOLERANCE_FP16;
            if (!readable(*c, kernel)) {
                const wph_plan plan = wph::decode_plan(table, kernel, c->cache.batch, c->cache.kv_heads, 1);
                refuse(*c, plan, name + ", " + describe(c->cache.spec));
                continue;
            }
            types.insert(c->cache.spec.bf16);
            for (int n : splits) {
                const std::string where = name + ", splits " + std::to_string(n) + ", " + describe(c->cache.spec);
                const wph_plan plan = wph::decode_plan(table, kernel, c->cache.batch, c->cache.kv_heads, n);
                const std::vector<unsigned short> got = run(*c, plan, where);
                const double error = compare(*c, got, where);
                if (got != run(*c, plan, where)) fail(where + ": two runs differ");
                const std::string allowed = ", allowed " + std::to_string(tolerance);
                if (!(error <= tolerance)) fail(where + ": relative error " + std::to_string(error) + allowed);
                worst = std::max(worst, error / tolerance);
            }
        }
        if (types.size() < 2) fail(name + ": reads neither memory order, so it was not run");
        std::printf("ok   %s: worst error %.2f of what is allowed\n", name.c_str(), worst);
    }
}

}  // namespace

int main() { return check_kernels(wph::DECODE, check_table); }
