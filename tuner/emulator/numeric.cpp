// Bytes, number formats and half arithmetic in software: one rounding to nearest even, NaN becomes the GPU's 0x7fff.
#include <cmath>
#include <cstdint>

#include "runtime.h"

namespace wph {

// mma alone needs 384 per call. Exponents of halves are 112 less than those of floats, subnormal ones too.
float half_value(unsigned short v) {
    const unsigned magnitude = v & 0x7fffu;
    const unsigned sign = (v & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | (magnitude > 0x7c00u ? 0x7fc00000u : 0x7f800000u));
    return bits_to_float(sign | magnitude << 13) * 0x1p112f;
}

unsigned short half_bits(double v) {
    if (v != v) return 0x7fffu;
    const unsigned sign = std::signbit(v) ? 0x8000u : 0u;
    const double magnitude = std::fabs(v);
    if (magnitude >= 65520.0) return static_cast<unsigned short>(sign | 0x7c00u);
    if (magnitude < 0x1p-14) {  // multiples of 2^-24; a carry into the first normal number comes out right
        return static_cast<unsigned short>(sign + static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24)));
    }
    int exponent;
    const double fraction = std::frexp(magnitude, &exponent);  // [0.5, 1), so magnitude = 2^(exponent - 1) * 1.m
    const unsigned mantissa = static_cast<unsigned>(std::nearbyint(fraction * 2048.0));
    return static_cast<unsigned short>(sign + (static_cast<unsigned>(exponent + 13) << 10) + mantissa);
}

unsigned short bfloat_bits(float v) {
    if (v != v) return 0x7fffu;
    const unsigned bits = float_to_bits(v);
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

unsigned short half_from_e4m3(unsigned char v) {
    if ((v & 0x7fu) == 0x7fu) return 0x7fffu;
    const int exponent = v >> 3 & 15;
    const int mantissa = v & 7;
    const double magnitude = exponent ? std::ldexp(8.0 + mantissa, exponent - 10) : std::ldexp(1.0 * mantissa, -9);
    return half_bits(v & 0x80u ? -magnitude : magnitude);
}

unsigned char e4m3_bits(float v) {
    if (v != v) return 0x7fu;
    const unsigned sign = std::signbit(v) ? 0x80u : 0u;
    const double magnitude = std::fmin(std::fabs(static_cast<double>(v)), 448.0);
    if (magnitude < 0x1p-6) {  // multiples of 2^-9; a carry into the first normal number comes out right
        return static_cast<unsigned char>(sign + static_cast<unsigned>(std::nearbyint(magnitude * 0x1p9)));
    }
    int exponent;
    const double fraction = std::frexp(magnitude, &exponent);  // magnitude = 2^(exponent - 1) * 1.m
    const unsigned mantissa = static_cast<unsigned>(std::nearbyint(fraction * 16.0));
    return static_cast<unsigned char>(sign + (static_cast<unsigned>(exponent + 5) << 3) + mantissa);
}

// The sum is exact in double unless the smaller operand lies wholly below the other's 53 bits; there a negative one is
// lost, which no kernel adds.
float sum_down(float a, float b) {
    const double exact = static_cast<double>(a) + static_cast<double>(b);
    const float rounded = static_cast<float>(exact);
    return static_cast<double>(rounded) > exact ? std::nextafterf(rounded, -INFINITY) : rounded;
}

unsigned choose_halves(Element element, bool greater, unsigned a, unsigned b) {
    const auto value = [element](unsigned h) {
        return element == Element::bfloat ? bits_to_float(h << 16) : half_value(static_cast<unsigned short>(h));
    };
    unsigned word = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const unsigned x = a >> shift & 0xffffu, y = b >> shift & 0xffffu;
        const float p = value(x), q = value(y);
        const bool less = p < q || (p == q && std::signbit(p));
        unsigned chosen = less == greater ? y : x;
        if (p != p) chosen = q != q ? 0x7fffu : y;
        else if (q != q) chosen = x;
        word |= chosen << shift;
    }
    return word;
}

unsigned half2_arithmetic(Half2 kind, unsigned a, unsigned b, unsigned c) {
    unsigned word = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto half = [shift](unsigned w) -> double {
            return half_value(static_cast<unsigned short>(w >> shift & 0xffffu));
        };
        // A product has 22 bits and a sum of halves 41: exact in double. So is any fma whose result is finite.
        double d = 0;
        switch (kind) {
            case Half2::add: d = half(a) + half(b); break;
            case Half2::subtract: d = half(a) - half(b); break;
            case Half2::multiply: d = half(a) * half(b); break;
            case Half2::fma: d = half(a) * half(b) + half(c); break;
        }
        word |= static_cast<unsigned>(half_bits(d)) << shift;
    }
    return word;
}

unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
    unsigned d = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 15u;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7u))) & 0xffu;
        if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        d |= byte << (8 * i);
    }
    return d;
}

}  // namespace wph
