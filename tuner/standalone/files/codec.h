// SPDX-License-Identifier: Apache-2.0
// What the bytes of a compressed cache mean, in plain C++ and double precision: the reference of the tests.
//
// A row is one key or value of one token and KV head. Bit strings are packed from the low bit up, little endian.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "wph.h"

namespace wph_test {

enum Coding { CODEBOOK, AFFINE, FP8 };

// Offsets in bytes from the row's first; what a row does not have is at -1.
struct Row {
    Coding coding;
    int bits, coefficients, indices_at, outliers, norm_at, scale_at, zero_at;
};

// Slots of one format and head dim. `planes`: keys and values lie in planes of their own, else in one slot. `normal`
// channels go through a Walsh-Hadamard transform of length `block_d`, the others are kept in bf16.
struct Layout {
    wph_format format;
    int head_dim, block_d, normal, slot_bytes, value_at, planes, norm_correction;
    Row key, value;
    float centroids[16];
};

// The constants of a layer: signs of the normal channels, and the channel ids, normal ones first.
struct Layer {
    std::vector<float> signs;
    std::vector<int> channels;
};

inline unsigned short to_half(double x) { return __half_as_ushort(__float2half_rn(static_cast<float>(x))); }
inline double from_half(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
inline unsigned short to_bf16(double x) { return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x))); }
inline double from_bf16(unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }

inline unsigned short load_u16(const unsigned char *p) { return static_cast<unsigned short>(p[0] | p[1] << 8); }
inline void store_u16(unsigned char *p, unsigned short v) { p[0] = v & 255, p[1] = v >> 8; }

inline unsigned load_index(const unsigned char *indices, int i, int bits) {
    unsigned index = 0;
    for (int b = 0; b < bits; ++b) {
        const int at = i * bits + b;
        index |= (indices[at / 8] >> at % 8 & 1u) << b;
    }
    return index;
}
inline void store_index(unsigned char *indices, int i, int bits, unsigned index) {
    for (int b = 0; b < bits; ++b) {
        const int at = i * bits + b;
        const unsigned char mask = static_cast<unsigned char>(1u << at % 8);
        indices[at / 8] = static_cast<unsigned char>((indices[at / 8] & ~mask) | (index >> b & 1u) << at % 8);
    }
}

// x times Sylvester's Hadamard matrix over sqrt(n); its own inverse.
inline void rotate(std::vector<double> &x) {
    for (size_t step = 1; step < x.size(); step *= 2) {
        for (size_t i = 0; i < x.size(); ++i) {
            if (i & step) continue;
            const double a = x[i], b = x[i + step];
            x[i] = a + b, x[i + step] = a - b;
        }
    }
    for (double &v : x) v /= std::sqrt(static_cast<double>(x.size()));
}

inline double length_of(const std::vector<double> &x) {
    double sum = 0;
    for (double v : x) sum += v * v;
    return std::sqrt(sum);
}

// Index of the nearest level: how many midpoints are not above x.
inline unsigned nearest_level(const Layout &layout, int bits, double x) {
    unsigned index = 0;
    for (int i = 0; i + 1 < 1 << bits; ++i) index += x >= (layout.centroids[i] + layout.centroids[i + 1]) / 2;
    return index;
}

// Coefficients of the normal channels: brought to unit length, signed, rotated. `norm` becomes their length.
inline std::vector<double> coefficients(const Layout &layout, const Row &row, const Layer &layer,
                                        const std::vector<double> &x, double &norm) {
    std::vector<double> normal(layout.block_d);
    for (int i = 0; i < layout.normal; ++i) normal[i] = row.outliers ? x[layer.channels[i]] : x[i];
    norm = length_of(normal);
    for (int i = 0; i < layout.normal; ++i) normal[i] *= (layer.signs.empty() ? 1 : layer.signs[i]) / (norm + 1e-8);
    rotate(normal);
    return normal;
}

// Writes the bytes of `x` that carry data. The affine arithmetic is fp32 step by step: the format fixes it.
inline void encode(const Layout &layout, const Row &row, const Layer &layer, const std::vector<double> &x,
                   unsigned char *to) {
    unsigned char *indices = to + row.indices_at;
    std::memset(indices, 0, (row.coefficients * row.bits + 7) / 8);
    if (row.coding == FP8) {
        for (size_t i = 0; i < x.size(); ++i) {
            indices[i] = __nv_cvt_float_to_fp8(static_cast<float>(x[i]), __NV_SATFINITE, __NV_E4M3);
        }
        return;
    }
    if (row.coding == AFFINE) {
        const auto [least, most] = std::minmax_element(x.begin(), x.end());
        const float zero = static_cast<float>(*least), top = static_cast<float>((1 << row.bits) - 1);
        const float scale = std::max((static_cast<float>(*most) - zero) / top, 1e-8f);
        for (size_t i = 0; i < x.size(); ++i) {
            const float index = std::floor((static_cast<float>(x[i]) - zero) / scale + 0.5f);
            store_index(indices, static_cast<int>(i), row.bits, static_cast<unsigned>(std::min(index, top)));
        }
        store_u16(to + row.scale_at, to_half(scale));
        store_u16(to + row.zero_at, to_half(zero));
        return;
    }
    double norm;
    const std::vector<double> y = coefficients(layout, row, layer, x, norm);
    for (int i = 0; i < row.outliers; ++i) store_u16(to + 2 * i, to_bf16(x[layer.channels[layout.normal + i]]));
    for (int i = 0; i < row.coefficients; ++i) store_index(indices, i, row.bits, nearest_level(layout, row.bits, y[i]));
    store_u16(to + row.norm_at, to_half(norm));
}

// The row's channels, in the original space.
inline std::vector<double> decode(const Layout &layout, const Row &row, const Layer &layer, const unsigned char *from) {
    const unsigned char *indices = from + row.indices_at;
    std::vector<double> x(layout.head_dim);
    if (row.coding == FP8) {
        for (size_t i = 0; i < x.size(); ++i) {
            x[i] = from_half(static_cast<unsigned short>(__nv_cvt_fp8_to_halfraw(indices[i], __NV_E4M3).x));
        }
        return x;
    }
    if (row.coding == AFFINE) {
        const double scale = from_half(load_u16(from + row.scale_at)), zero = from_half(load_u16(from + row.zero_at));
        for (size_t i = 0; i < x.size(); ++i) x[i] = load_index(indices, static_cast<int>(i), row.bits) * scale + zero;
        return x;
    }
    std::vector<double> normal(layout.block_d);
    for (int i = 0; i < row.coefficients; ++i) normal[i] = layout.centroids[load_index(indices, i, row.bits)];
    const double norm = from_half(load_u16(from + row.norm_at)) / (layout.norm_correction ? length_of(normal) : 1);
    rotate(normal);
    for (int i = 0; i < layout.normal; ++i) {
        x[row.outliers ? layer.channels[i] : i] = normal[i] * norm * (layer.signs.empty() ? 1 : layer.signs[i]);
    }
    for (int i = 0; i < row.outliers; ++i) x[layer.channels[layout.normal + i]] = from_bf16(load_u16(from + 2 * i));
    return x;
}

}  // namespace wph_test
