// SPDX-License-Identifier: Apache-2.0
// A small paged cache, filled on the host, and what the GPU is given of it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>

#include "codec.h"
#include "dispatch.h"
#include "layouts.h"

namespace wph_test {

[[noreturn]] inline void fail(const std::string &line) {
    std::fprintf(stderr, "FAIL %s\n", line.c_str());
    std::exit(1);
}

inline void expect(cudaError_t error, const char *what) {
    if (error != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(error));
}

// Waits for a launch that answered `status`.
inline void finish(wph_status status, const std::string &where) {
    if (status != WPH_OK) fail(where + ": " + wph_status_text(status) + ": " + cudaGetErrorString(cudaGetLastError()));
    expect(cudaDeviceSynchronize(), where.c_str());
}

template <typename T>
class DeviceArray {
public:
    explicit DeviceArray(size_t count) : count_(count) {
        expect(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
    }
    explicit DeviceArray(const std::vector<T> &host) : DeviceArray(host.size()) {
        expect(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy to the GPU");
    }
    DeviceArray(const DeviceArray &) = delete;
    DeviceArray &operator=(const DeviceArray &) = delete;
    ~DeviceArray() { cudaFree(data_); }

    T *get() const { return static_cast<T *>(data_); }
    void fill(int byte) { expect(cudaMemset(data_, byte, count_ * sizeof(T)), "cudaMemset"); }
    std::vector<T> to_host() const {
        std::vector<T> host(count_);
        expect(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy from the GPU");
        return host;
    }

private:
    void *data_ = nullptr;
    size_t count_;
};

// Requests of these lengths on shuffled pages. Unused slots and the unused part of the block table hold rubbish.
struct Spec {
    std::vector<int> lengths;
    int block_size;
    bool bf16, wide_ids;  // types of query and output; of block ids: int64 or int32
    bool head_major;      // what lies side by side in a block: a head's tokens, or a token's heads
};

// Both memory orders, each with both types.
inline std::vector<Spec> all_specs() {
    std::vector<Spec> specs;
    for (bool head_major : {false, true}) {
        specs.push_back({{0, 1, 15, 16, 17, 700}, 16, true, false, head_major});
        specs.push_back({{333, 31, 0, 33}, 32, false, true, head_major});
    }
    return specs;
}

inline std::string describe(const Spec &spec) {
    std::string text = "lengths";
    for (int length : spec.lengths) text += " " + std::to_string(length);
    text += ", block size " + std::to_string(spec.block_size) + (spec.bf16 ? ", bf16" : ", fp16");
    return text + (spec.head_major ? ", heads before tokens" : "");
}

class Cache {
public:
    Cache(const Layout &layout, const Spec &spec, int kv_heads, unsigned seed)
        : layout(layout), spec(spec), kv_heads(kv_heads), random_(seed) {
        batch = static_cast<int>(spec.lengths.size());
        make_layer();
        make_pages();
        fill_slots();
    }

    const Layout &layout;
    const Spec &spec;
    const int kv_heads;
    int batch, max_blocks = 2;
    Layer layer;
    std::vector<long long> block_table;
    std::vector<unsigned char> bytes;
    std::vector<double> keys, values;  // what was encoded, [tokens of all requests, kv_heads, head_dim]

    long long head_stride() const { return layout.slot_bytes * (spec.head_major ? spec.block_size : 1LL); }
    long long token_stride() const { return layout.slot_bytes * (spec.head_major ? 1LL : kv_heads); }
    long long plane_stride() const { return layout.planes ? plane_bytes() : 0; }
    long long block_stride() const { return plane_bytes() * (layout.planes ? 2 : 1); }

    // Where slots lie, as a kernel is told.
    template <typename Params>
    void describe_order(Params &p) const {
        p.block_stride = block_stride(), p.plane_stride = plane_stride();
        p.token_stride = token_stride(), p.head_stride = head_stride();
        p.block_size = spec.block_size, p.kv_heads = kv_heads;
    }

    std::vector<double> key(int request, int token, int head) const {
        return decode(layout, layout.key, layer, bytes.data() + slot(request, token, head));
    }
    std::vector<double> value(int request, int token, int head) const {
        const long long at = slot(request, token, head) + (layout.planes ? plane_stride() : layout.value_at);
        return decode(layout, layout.value, layer, bytes.data() + at);
    }

    // Slot of a token: block * block_size + token of the block.
    long long slot_number(int request, int token) const {
        return block_table[request * max_blocks + token / spec.block_size] * spec.block_size + token % spec.block_size;
    }

    // Gaussian numbers that bf16 and fp16 hold exactly; `loud` of them ten times larger.
    std::vector<double> gaussian(int count, int loud) {
        std::normal_distribution<double> normal;
        std::vector<double> x(count);
        for (int i = 0; i < count; ++i) {
            x[i] = from_half(to_half(from_bf16(to_bf16(normal(random_) * (i < loud ? 10 : 1)))));
        }
        return x;
    }

private:
    std::mt19937 random_;

    long long plane_bytes() const { return static_cast<long long>(layout.slot_bytes) * kv_heads * spec.block_size; }

    void make_layer() {
        if (layout.planes) {
            for (int i = 0; i < layout.normal; ++i) layer.signs.push_back(random_() % 2 ? 1.f : -1.f);
        }
        if (layout.key.outliers) {
            layer.channels.resize(layout.head_dim);
            std::iota(layer.channels.begin(), layer.channels.end(), 0);
            std::shuffle(layer.channels.begin(), layer.channels.end(), random_);
            std::sort(layer.channels.begin(), layer.channels.begin() + layout.normal);
            std::sort(layer.channels.begin() + layout.normal, layer.channels.end());
        }
    }

    void make_pages() {
        int used = 0, longest = 0;
        for (int length : spec.lengths) {
            const int blocks = (length + spec.block_size - 1) / spec.block_size;
            used += blocks;
            longest = std::max(longest, blocks);
        }
        max_blocks = longest + 2;
        std::vector<int> pages(used + 3);
        std::iota(pages.begin(), pages.end(), 0);
        std::shuffle(pages.begin(), pages.end(), random_);
        block_table.assign(static_cast<size_t>(batch) * max_blocks, 0x7fffffff);
        int next = 0;
        for (int b = 0; b < batch; ++b) {
            for (int i = 0; i * spec.block_size < spec.lengths[b]; ++i) block_table[b * max_blocks + i] = pages[next++];
        }
        bytes.assign(pages.size() * block_stride(), 0xff);
    }

    void fill_slots() {
        for (int b = 0; b < batch; ++b) {
            for (int t = 0; t < spec.lengths[b]; ++t) {
                for (int h = 0; h < kv_heads; ++h) {
                    unsigned char *at = bytes.data() + slot(b, t, h);
                    fill(layout.key, keys, at);
                    fill(layout.value, values, at + (layout.planes ? plane_stride() : layout.value_at));
                }
            }
        }
    }

    void fill(const Row &row, std::vector<double> &kept, unsigned char *to) {
        const std::vector<double> x = gaussian(layout.head_dim, 3);
        encode(layout, row, layer, x, to);
        kept.insert(kept.end(), x.begin(), x.end());
    }

    long long slot(int request, int token, int head) const {
        const long long block = block_table[request * max_blocks + token / spec.block_size];
        return block * block_stride() + token % spec.block_size * token_stride() + head * head_stride();
    }
};

inline std::vector<unsigned short> rounded(const std::vector<double> &x, bool bf16) {
    std::vector<unsigned short> bits(x.size());
    for (size_t i = 0; i < x.size(); ++i) bits[i] = bf16 ? to_bf16(x[i]) : to_half(x[i]);
    return bits;
}

// The cache on the GPU, and the part of a kernel's parameters that describes it.
class DeviceCache {
public:
    explicit DeviceCache(const Cache &cache)
        : cache_(cache), bytes_(cache.bytes), wide_(cache.block_table),
          narrow_(std::vector<int>(cache.block_table.begin(), cache.block_table.end())), lengths_(cache.spec.lengths),
          centroids_(std::vector<float>(cache.layout.centroids, cache.layout.centroids + 16)),
          signs_(cache.layer.signs), channels_(cache.layer.channels) {}

    // Everything that a kernel must know of the bytes.
    template <typename Params>
    void describe_slots(Params &p) const {
        p.kv_cache = bytes_.get();
        cache_.describe_order(p);
        p.centroids = centroids_.get();
        p.signs = cache_.layer.signs.empty() ? nullptr : signs_.get();
        p.channels = cache_.layer.channels.empty() ? nullptr : channels_.get();
    }

    // And of the requests.
    template <typename Params>
    void describe(Params &p) const {
        describe_slots(p);
        p.batch = cache_.batch;
        p.block_table = cache_.spec.wide_ids ? static_cast<const void *>(wide_.get()) : narrow_.get();
        p.block_table_stride = p.max_blocks = cache_.max_blocks;
        p.block_table_bytes = cache_.spec.wide_ids ? 8 : 4;
        p.seq_lens = lengths_.get();
    }

    // Every byte 0xff again.
    void poison() { bytes_.fill(0xff); }
    std::vector<unsigned char> to_host() const { return bytes_.to_host(); }

private:
    const Cache &cache_;
    DeviceArray<unsigned char> bytes_;
    DeviceArray<long long> wide_;
    DeviceArray<int> narrow_, lengths_;
    DeviceArray<float> centroids_, signs_;
    DeviceArray<int> channels_;
};

// Compute capability of the GPU, 10 * major + minor. Ends the program where there is none.
inline int attached_sm() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        fail(std::string("no GPU to run on: ") + (error != cudaSuccess ? cudaGetErrorString(error) : "none attached"));
    }
    cudaDeviceProp properties;
    expect(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    std::printf("%s (sm_%d%d)\n", properties.name, properties.major, properties.minor);
    return 10 * properties.major + properties.minor;
}

// Runs `check` on every table of one op that was tuned for the attached GPU, and the layout that its kernels read; the
// program's exit status.
template <typename Check>
int check_kernels(wph::Op op, const Check &check) {
    const int sm = attached_sm();
    const wph::Tables tables = wph::all_tables();
    int checked = 0;
    for (const wph::Table *table = tables.tables; table < tables.tables + tables.count; ++table) {
        if (table->op != op || table->sm != sm) continue;
        const Layout *layout = find_layout(table->format, table->head_dim);
        if (!layout) fail("no layout for head dim " + std::to_string(table->head_dim));
        check(*table, *layout);
        checked += table->kernel_count;
    }
    if (checked == 0) fail("no kernel was tuned for sm_" + std::to_string(sm) + ": export tables of this GPU");
    std::printf("%d kernels pass\n", checked);
    return 0;
}

}  // namespace wph_test
