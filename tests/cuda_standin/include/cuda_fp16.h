/* cuda_fp16.h of the stand-in: __half and its conversions, round to nearest even. */
#ifndef STANDIN_CUDA_FP16_H
#define STANDIN_CUDA_FP16_H
#include "cuda_runtime.h"

namespace standin {
inline unsigned short half_bits(float value) {
    unsigned u = __float_as_uint(value), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<unsigned short>(0x7fff);                      /* NaN: one pattern, as on the device */
    if (a >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);             /* rounds to 2^16 or more */
    if (a < 0x38800000u) {                                                                /* subnormal: units of 2^-24 */
        float units = __uint_as_float(a) * 16777216.0f;
        return static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(units)));
    }
    return static_cast<unsigned short>(sign | ((a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13));
}
inline float half_value(unsigned short bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) / 16777216.0f));
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}
}

struct __half_raw { unsigned short x; };
struct __half {
    unsigned short __x;
    __half() = default;
    __half(float value) : __x(standin::half_bits(value)) {}
    __half(__half_raw raw) : __x(raw.x) {}
    operator float() const { return standin::half_value(__x); }
    operator __half_raw() const { return {__x}; }
};
struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half a, __half b) : x(a), y(b) {}
};
typedef __half half;
typedef __half2 half2;

inline __half __float2half(float a) { return __half(a); }
inline __half __float2half_rn(float a) { return __half(a); }
inline float __half2float(__half a) { return a; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline float2 __half22float2(__half2 a) { return make_float2(a.x, a.y); }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline unsigned short __half_as_ushort(__half a) { return a.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
#endif
