// Instructions on registers alone. Results are those of the PTX manual; approximations (ex2, rcp,
// div.full) are as close as the host's functions are.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {
inline float from_half(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}
inline uint16_t to_half(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float from_bfloat(uint16_t bits) { return get<float>(uint64_t(bits) << 16); }
inline uint16_t to_bfloat(float value) {  // nearest, ties to even
  if (value != value) return 0x7fff;
  const uint32_t bits = uint32_t(put(value));
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float flushed(float v) {
  return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.f, v) : v;
}

// f(operands) of types A... into D, lane by lane
template <class D, class... A, class F, size_t... I>
inline void apply(Warp& w, const Instruction& i, uint32_t mask, F f, std::index_sequence<I...>) {
  uint64_t* to = w.lane(i.at[0]);
  const uint64_t* from[] = {w.lane(i.at[1 + I])...};
  each(mask, [&](int l) { to[l] = put<D>(f(get<A>(from[I][l])...)); });
}
template <class F, class D, class... A>
void computed(Warp& w, const Instruction& i, uint32_t mask) {
  if (i.count != 1 + int(sizeof...(A))) fail("%s: %d operands", i.name, i.count);
  apply<D, A...>(w, i, mask, F(), std::index_sequence_for<A...>());
}
#define PTX_OP(table, name, D, expression, ...) \
  table[name] = operation<D, ##__VA_ARGS__>([] expression)
template <class D, class... A, class F>
Instruction::Run operation(F) {
  return computed<F, D, A...>;
}

template <class T>
using Wider = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T>
using Wrapping = std::conditional_t<(sizeof(T) < 4), uint32_t, std::make_unsigned_t<T>>;

template <class T>
T field(T value, uint32_t position, uint32_t length) {  // bfe
  constexpr uint32_t BITS = 8 * sizeof(T);
  position &= 255, length &= 255;
  std::make_unsigned_t<T> taken = 0;
  for (uint32_t b = 0; b < BITS; ++b) {
    uint32_t from = position + b;
    if (b >= length) {
      if (!std::is_signed_v<T> || !length) break;
      from = position + length - 1;
    }
    if (from >= BITS) {
      if (!std::is_signed_v<T>) break;
      from = BITS - 1;
    }
    taken |= std::make_unsigned_t<T>(value >> from & 1) << b;
  }
  return T(taken);
}
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {  // prmt
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <class T>
void add_integer(Table& t, const std::string& bits, bool is_signed) {
  const std::string s = (is_signed ? ".s" : ".u") + bits;
  using U = Wrapping<T>;
  using W = Wider<T>;
  PTX_OP(t, "add" + s, T, (T a, T b) { return T(U(a) + U(b)); }, T, T);
  PTX_OP(t, "sub" + s, T, (T a, T b) { return T(U(a) - U(b)); }, T, T);
  PTX_OP(t, "mul.lo" + s, T, (T a, T b) { return T(U(a) * U(b)); }, T, T);
  PTX_OP(t, "mul.hi" + s, T, (T a, T b) { return T(W(a) * W(b) >> 8 * sizeof(T)); }, T, T);
  PTX_OP(t, "mad.lo" + s, T, (T a, T b, T c) { return T(U(a) * U(b) + U(c)); }, T, T, T);
  if constexpr (sizeof(T) < 8) {
    using V = std::make_unsigned_t<W>;
    PTX_OP(t, "mul.wide" + s, W, (T a, T b) { return W(W(a) * W(b)); }, T, T);
    PTX_OP(t, "mad.wide" + s, W, (T a, T b, W c) { return W(V(W(a) * W(b)) + V(c)); }, T, T, W);
  }
  PTX_OP(
      t, "div" + s, T,
      (T a, T b) {
        return b == 0 ? T(-1) : b == T(-1) && std::is_signed_v<T> ? T(U(0) - U(a)) : T(a / b);
      },
      T, T);
  PTX_OP(
      t, "rem" + s, T,
      (T a, T b) {
        return b == 0 || (b == T(-1) && std::is_signed_v<T>) ? T(b ? 0 : a) : T(a % b);
      },
      T, T);
  PTX_OP(t, "min" + s, T, (T a, T b) { return a < b ? a : b; }, T, T);
  PTX_OP(t, "max" + s, T, (T a, T b) { return a > b ? a : b; }, T, T);
  PTX_OP(t, "neg" + s, T, (T a) { return T(U(0) - U(a)); }, T);
  PTX_OP(
      t, "shr" + s, T,
      (T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a >> n) : T(a < 0 ? -1 : 0); }, T, uint32_t);
  PTX_OP(t, "setp.lt" + s, bool, (T a, T b) { return a < b; }, T, T);
  PTX_OP(t, "setp.le" + s, bool, (T a, T b) { return a <= b; }, T, T);
  PTX_OP(t, "setp.gt" + s, bool, (T a, T b) { return a > b; }, T, T);
  PTX_OP(t, "setp.ge" + s, bool, (T a, T b) { return a >= b; }, T, T);
  PTX_OP(t, "mov" + s, T, (T a) { return a; }, T);
  if constexpr (sizeof(T) > 2)
    PTX_OP(
        t, "bfe" + s, T, (T a, uint32_t p, uint32_t n) { return field<T>(a, p, n); }, T, uint32_t,
        uint32_t);
  PTX_OP(t, "cvt" + s + ".s8", T, (int8_t a) { return T(a); }, int8_t);
  PTX_OP(t, "cvt" + s + ".u8", T, (uint8_t a) { return T(a); }, uint8_t);
  PTX_OP(t, "cvt" + s + ".s16", T, (int16_t a) { return T(a); }, int16_t);
  PTX_OP(t, "cvt" + s + ".u16", T, (uint16_t a) { return T(a); }, uint16_t);
  PTX_OP(t, "cvt" + s + ".s32", T, (int32_t a) { return T(a); }, int32_t);
  PTX_OP(t, "cvt" + s + ".u32", T, (uint32_t a) { return T(a); }, uint32_t);
  PTX_OP(t, "cvt" + s + ".s64", T, (int64_t a) { return T(a); }, int64_t);
  PTX_OP(t, "cvt" + s + ".u64", T, (uint64_t a) { return T(a); }, uint64_t);
  PTX_OP(t, "cvt.rn.f32" + s, float, (T a) { return float(a); }, T);
  PTX_OP(t, "cvt.rn.f64" + s, double, (T a) { return double(a); }, T);
}
template <class T>
void add_bits(Table& t, const std::string& bits) {
  const std::string b = ".b" + bits;
  PTX_OP(t, "and" + b, T, (T a, T b) { return T(a & b); }, T, T);
  PTX_OP(t, "or" + b, T, (T a, T b) { return T(a | b); }, T, T);
  PTX_OP(t, "xor" + b, T, (T a, T b) { return T(a ^ b); }, T, T);
  PTX_OP(t, "not" + b, T, (T a) { return T(~a); }, T);
  PTX_OP(
      t, "shl" + b, T, (T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); }, T,
      uint32_t);
  PTX_OP(t, "mov" + b, T, (T a) { return a; }, T);
  PTX_OP(t, "selp" + b, T, (T a, T b, bool p) { return p ? a : b; }, T, T, bool);
  PTX_OP(t, "setp.eq" + b, bool, (T a, T b) { return a == b; }, T, T);
  PTX_OP(t, "setp.ne" + b, bool, (T a, T b) { return a != b; }, T, T);
}
template <class T>
void add_float(Table& t, const std::string& s) {
  PTX_OP(t, "add" + s, T, (T a, T b) { return a + b; }, T, T);
  PTX_OP(t, "sub" + s, T, (T a, T b) { return a - b; }, T, T);
  PTX_OP(t, "mul" + s, T, (T a, T b) { return a * b; }, T, T);
  PTX_OP(t, "div.rn" + s, T, (T a, T b) { return a / b; }, T, T);
  PTX_OP(t, "fma.rn" + s, T, (T a, T b, T c) { return std::fma(a, b, c); }, T, T, T);
  PTX_OP(t, "neg" + s, T, (T a) { return -a; }, T);
  PTX_OP(t, "abs" + s, T, (T a) { return std::fabs(a); }, T);
  PTX_OP(t, "min" + s, T, (T a, T b) { return std::fmin(a, b); }, T, T);
  PTX_OP(t, "max" + s, T, (T a, T b) { return std::fmax(a, b); }, T, T);
  PTX_OP(t, "selp" + s, T, (T a, T b, bool p) { return p ? a : b; }, T, T, bool);
  PTX_OP(t, "setp.eq" + s, bool, (T a, T b) { return a == b; }, T, T);
  PTX_OP(t, "setp.ne" + s, bool, (T a, T b) { return a < b || a > b; }, T, T);
  PTX_OP(t, "setp.lt" + s, bool, (T a, T b) { return a < b; }, T, T);
  PTX_OP(t, "setp.le" + s, bool, (T a, T b) { return a <= b; }, T, T);
  PTX_OP(t, "setp.gt" + s, bool, (T a, T b) { return a > b; }, T, T);
  PTX_OP(t, "setp.ge" + s, bool, (T a, T b) { return a >= b; }, T, T);
  PTX_OP(t, "setp.equ" + s, bool, (T a, T b) { return !(a < b || a > b); }, T, T);
  PTX_OP(t, "setp.neu" + s, bool, (T a, T b) { return a != b; }, T, T);
  PTX_OP(t, "setp.ltu" + s, bool, (T a, T b) { return !(a >= b); }, T, T);
  PTX_OP(t, "setp.leu" + s, bool, (T a, T b) { return !(a > b); }, T, T);
  PTX_OP(t, "setp.gtu" + s, bool, (T a, T b) { return !(a <= b); }, T, T);
  PTX_OP(t, "setp.geu" + s, bool, (T a, T b) { return !(a < b); }, T, T);
  PTX_OP(t, "setp.nan" + s, bool, (T a, T b) { return a != a || b != b; }, T, T);
  PTX_OP(t, "setp.num" + s, bool, (T a, T b) { return a == a && b == b; }, T, T);
}

// mov with a vector on one side: the first part is the lowest
template <int PARTS, int BITS>
void join(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    uint64_t whole = 0;
    for (int n = 0; n < PARTS; ++n)
      whole |= (w.lane(i.at[1 + n])[l] & ((uint64_t(1) << BITS) - 1)) << BITS * n;
    w.lane(i.at[0])[l] = whole;
  });
}
template <int PARTS, int BITS>
void cut(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    const uint64_t whole = w.lane(i.at[PARTS])[l];
    for (int n = 0; n < PARTS; ++n)
      w.lane(i.at[n])[l] = whole >> BITS * n & ((uint64_t(1) << BITS) - 1);
  });
}
// comparisons of halves: ordered and different, different, greater, and unordered; u: or unordered
inline bool is_ne(float x, float y) { return x < y || x > y; }
inline bool is_neu(float x, float y) { return x != y; }
inline bool is_gtu(float x, float y) { return !(x <= y); }
inline bool is_nan(float x, float y) { return x != x || y != y; }
template <float DECODE(uint16_t), bool IS(float, float)>
void compared(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    const uint64_t a = w.lane(i.at[1])[l], b = w.lane(i.at[2])[l];
    w.lane(i.at[0])[l] = IS(DECODE(uint16_t(a)), DECODE(uint16_t(b)));
  });
}
// two predicates from two halves each
template <float DECODE(uint16_t), bool IS(float, float)>
void compared_pairs(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    const uint64_t a = w.lane(i.at[2])[l], b = w.lane(i.at[3])[l];
    for (int n = 0; n < 2; ++n)
      w.lane(i.at[n])[l] = IS(DECODE(uint16_t(a >> 16 * n)), DECODE(uint16_t(b >> 16 * n)));
  });
}
template <float DECODE(uint16_t)>
void add_halves(Table& t, const std::string& type) {
  t["setp.ne." + type] = compared<DECODE, is_ne>;
  t["setp.neu." + type] = compared<DECODE, is_neu>;
  t["setp.gtu." + type] = compared<DECODE, is_gtu>;
  t["setp.nan." + type] = compared<DECODE, is_nan>;
  t["setp.ne." + type + "x2"] = compared_pairs<DECODE, is_ne>;
  t["setp.neu." + type + "x2"] = compared_pairs<DECODE, is_neu>;
  t["setp.gtu." + type + "x2"] = compared_pairs<DECODE, is_gtu>;
  t["setp.nan." + type + "x2"] = compared_pairs<DECODE, is_nan>;
}

inline void add_arithmetic(Table& t) {
  add_integer<int16_t>(t, "16", true);
  add_integer<uint16_t>(t, "16", false);
  add_integer<int32_t>(t, "32", true);
  add_integer<uint32_t>(t, "32", false);
  add_integer<int64_t>(t, "64", true);
  add_integer<uint64_t>(t, "64", false);
  add_bits<uint16_t>(t, "16");
  add_bits<uint32_t>(t, "32");
  add_bits<uint64_t>(t, "64");
  add_float<float>(t, ".f32");
  add_float<double>(t, ".f64");
  using u16 = uint16_t;
  using u32 = uint32_t;
  PTX_OP(t, "and.pred", bool, (bool a, bool b) { return a && b; }, bool, bool);
  PTX_OP(t, "or.pred", bool, (bool a, bool b) { return a || b; }, bool, bool);
  PTX_OP(t, "xor.pred", bool, (bool a, bool b) { return a != b; }, bool, bool);
  PTX_OP(t, "not.pred", bool, (bool a) { return !a; }, bool);
  PTX_OP(t, "mov.pred", bool, (int64_t a) { return a != 0; }, int64_t);
  PTX_OP(t, "prmt.b32", u32, (u32 a, u32 b, u32 s) { return permuted(a, b, s); }, u32, u32, u32);
  PTX_OP(
      t, "add.s16x2", u32,
      (u32 a, u32 b) { return ((a + b) & 0xffff) | ((a >> 16) + (b >> 16)) << 16; }, u32, u32);
  PTX_OP(t, "abs.f16x2", u32, (u32 a) { return a & 0x7fff7fff; }, u32);
  PTX_OP(t, "abs.bf16x2", u32, (u32 a) { return a & 0x7fff7fff; }, u32);
  PTX_OP(t, "cvt.s8.s32", int8_t, (int32_t a) { return int8_t(a); }, int32_t);
  PTX_OP(t, "cvt.f32.bf16", float, (u16 a) { return from_bfloat(a); }, u16);
  PTX_OP(t, "cvt.f32.f16", float, (u16 a) { return from_half(a); }, u16);
  PTX_OP(t, "cvt.f64.f32", double, (float a) { return double(a); }, float);
  PTX_OP(t, "cvt.rn.f32.f64", float, (double a) { return float(a); }, double);
  PTX_OP(t, "cvt.rn.bf16.f32", u16, (float a) { return to_bfloat(a); }, float);
  PTX_OP(t, "cvt.rn.f16.f32", u16, (float a) { return to_half(a); }, float);
  PTX_OP(
      t, "cvt.rn.bf16x2.f32", u32,
      (float high, float low) { return u32(to_bfloat(high)) << 16 | to_bfloat(low); }, float,
      float);
  PTX_OP(
      t, "cvt.rn.f16x2.f32", u32,
      (float high, float low) { return u32(to_half(high)) << 16 | to_half(low); }, float, float);
  PTX_OP(t, "div.full.f32", float, (float a, float b) { return a / b; }, float, float);
  PTX_OP(t, "ex2.approx.f32", float, (float a) { return std::exp2(a); }, float);
  PTX_OP(t, "lg2.approx.f32", float, (float a) { return std::log2(a); }, float);
  PTX_OP(
      t, "fma.rn.ftz.f32", float,
      (float a, float b, float c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); },
      float, float, float);
  // the hardware gives the upper half of the result
  PTX_OP(
      t, "rcp.approx.ftz.f64", double, (double a) { return get<double>(put(1 / a) >> 32 << 32); },
      double);
  t["join.b64.2"] = join<2, 32>;
  t["join.b32.2"] = join<2, 16>;
  t["cut.b64.2"] = cut<2, 32>;
  t["cut.b32.2"] = cut<2, 16>;
  add_halves<from_half>(t, "f16");
  add_halves<from_bfloat>(t, "bf16");
}
}  // namespace ptx
