// Convolution of binary inputs with binary weights on the cores of one CPU.
//
// 1. pack: a position's channels become bits of 64-bit words, a plane of words per 64 channels, zeros around it. An
//    input is 1 where it is at least the threshold: the sample's mean, or 0.
// 2. gather: for 32 output positions, word k of their windows lies in one line, one position per lane. Where a group
//    has 32 channels or fewer, several taps share a word.
// 3. multiply: a word of a filter is broadcast and compared with those of all positions; popcounts add up per lane.
//    Words come in threes (0 where there is none): a full adder turns three bits into a sum and a carry, so that two
//    popcounts do for three words. Of each three, prefixes (p, p ^ q, p ^ q ^ r) are kept, of inputs and of weights;
//    by them, one exclusive or gives the adder's sum. With AVX-512 and VPOPCNTDQ, these are eight instructions for
//    1536 products. AVX2 counts with a table of half bytes.
// 4. finish: popcounts become sums. A padded position is a 0 bit, which is -1 where nothing should be; what it adds is
//    known from which taps lie outside (`kind`) and the weights there, and is part of `base`. Then scale, shift,
//    residual and activation, and y is written as it will be read.
//
// Weights are kept inverted: what is counted is where inputs and weights agree, P. With K products, of which A inputs
// are +1, weights -1 and +1 give 2 P - K, and weights 0 and +1, which are half of that and half of the sum of the
// inputs, P + A - K.
//
// Plain C interface and GCC's vector types. What depends on the machine: `WIDE`, `multiply`, `pack_some`, `look_up`.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define POPCOUNT512
constexpr int WIDE = 16;  // floats to a vector
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
constexpr int BLOCK = 32, GROUP = 8, FILTERS = 4;  // positions at a time; in a line of words; filters at a time
constexpr int SMALL = 16;                          // kinds of positions that `look_up` is fast for

typedef float Floats __attribute__((vector_size(4 * WIDE), may_alias, aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDE), may_alias, aligned(4)));
typedef uint64_t Words __attribute__((vector_size(4 * WIDE), may_alias, aligned(8)));
typedef float Half __attribute__((vector_size(2 * WIDE), may_alias, aligned(4)));
typedef double Doubles __attribute__((vector_size(4 * WIDE), may_alias, aligned(8)));

namespace {

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// ---- what depends on the machine

// a: (words, R, GROUP), w: (words, FILTERS), both with prefixes; counts: (FILTERS, BLOCK), written for R * GROUP
// positions.
#if defined(POPCOUNT512)

// V vectors of positions from `a`, R to a line
template <int R, int V>
inline void multiply_some(const uint64_t* a, const uint64_t* w, int64_t words, int32_t* counts) {
    __m512i one[FILTERS][2], two[FILTERS][2];  // how many ones, how many twos
#pragma GCC unroll 4
    for (int f = 0; f < FILTERS; ++f)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) one[f][v] = two[f][v] = _mm512_setzero_si512();
    for (int64_t k = 0; k < words; k += 3, a += 3 * R * GROUP, w += 3 * FILTERS) {
        __m512i value[3][V];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                value[i][v] = _mm512_loadu_si512(a + (i * R + v) * GROUP);
                asm("" : "+v"(value[i][v]));  // in a register: else every use is a load, and these are what takes time
            }
#pragma GCC unroll 4
        for (int f = 0; f < FILTERS; ++f) {
            const __m512i w0 = _mm512_set1_epi64((long long)w[f]), w1 = _mm512_set1_epi64((long long)w[FILTERS + f]),
                          w2 = _mm512_set1_epi64((long long)w[2 * FILTERS + f]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                const __m512i p = _mm512_xor_si512(w0, value[0][v]), pq = _mm512_xor_si512(w1, value[1][v]),
                              sum = _mm512_xor_si512(w2, value[2][v]);
                const __m512i carry = _mm512_ternarylogic_epi64(pq, p, sum, 0x5c);  // pq ? ~sum : p
                one[f][v] = _mm512_add_epi64(one[f][v], _mm512_popcnt_epi64(sum));
                two[f][v] = _mm512_add_epi64(two[f][v], _mm512_popcnt_epi64(carry));
            }
        }
    }
    const __m512i low = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
#pragma GCC unroll 4
    for (int f = 0; f < FILTERS; ++f) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            one[f][v] = _mm512_add_epi64(one[f][v], _mm512_add_epi64(two[f][v], two[f][v]));
        _mm512_storeu_si512(counts + f * BLOCK, _mm512_permutex2var_epi32(one[f][0], low, one[f][1]));
    }
}

template <int R>
void multiply(const uint64_t* a, const uint64_t* w, int64_t words, int32_t* counts) {
    multiply_some<R, R == 1 ? 1 : 2>(a, w, words, counts);
    if (R > 2) multiply_some<R, R == 3 ? 1 : 2>(a + 2 * GROUP, w, words, counts + 2 * GROUP);
}

#elif defined(__AVX2__)

template <int R>
void multiply(const uint64_t* a, const uint64_t* w, int64_t words, int32_t* counts) {
    const __m256i once = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                          0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i twice = _mm256_add_epi8(once, once), low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const auto count = [&](__m256i table, __m256i bits) {
        return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(bits, low)),
                               _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), low)));
    };
    const auto compare = [&](int64_t k, int f, int64_t at) {
        return _mm256_xor_si256(_mm256_set1_epi64x((long long)w[k * FILTERS + f]),
                                _mm256_loadu_si256((const __m256i*)(a + k * R * GROUP + at)));
    };
    for (int r = 0; r < R; ++r) {
        __m256i total[FILTERS][2];
        for (auto& row : total) row[0] = row[1] = zero;
        for (int64_t k = 0; k < words;) {
            const int64_t last = std::min(words, k + 30);  // 10 times 8 + 16 fit a byte
            __m256i bytes[FILTERS][2];
            for (auto& row : bytes) row[0] = row[1] = zero;
            for (; k < last; k += 3)
#pragma GCC unroll 4
                for (int f = 0; f < FILTERS; ++f)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; ++h) {
                        const int64_t at = r * GROUP + h * 4;
                        const __m256i p = compare(k, f, at), pq = compare(k + 1, f, at), sum = compare(k + 2, f, at);
                        const __m256i carry = _mm256_or_si256(_mm256_andnot_si256(sum, pq), _mm256_andnot_si256(pq, p));
                        const __m256i ones = _mm256_add_epi8(count(once, sum), count(twice, carry));
                        bytes[f][h] = _mm256_add_epi8(bytes[f][h], ones);
                    }
            for (int f = 0; f < FILTERS; ++f)
                for (int h = 0; h < 2; ++h)
                    total[f][h] = _mm256_add_epi64(total[f][h], _mm256_sad_epu8(bytes[f][h], zero));
        }
        const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
        for (int f = 0; f < FILTERS; ++f) {
            const __m256i first = _mm256_permutevar8x32_epi32(total[f][0], even);
            const __m256i second = _mm256_permutevar8x32_epi32(total[f][1], even);
            _mm256_storeu_si256((__m256i*)(counts + f * BLOCK + r * GROUP), _mm256_blend_epi32(first, second, 0xf0));
        }
    }
}

#else

template <int R>
void multiply(const uint64_t* a, const uint64_t* w, int64_t words, int32_t* counts) {
    for (int f = 0; f < FILTERS; ++f)
        for (int i = 0; i < R * GROUP; i += 4) {
            int32_t sum[4] = {};
            for (int64_t k = 0; k < words; k += 3)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const uint64_t* x = a + k * R * GROUP + i + j;
                    const uint64_t p = x[0] ^ w[k * FILTERS + f], pq = x[R * GROUP] ^ w[(k + 1) * FILTERS + f],
                                   s = x[2 * R * GROUP] ^ w[(k + 2) * FILTERS + f];
                    sum[j] += __builtin_popcountll(s) + 2 * __builtin_popcountll((pq & ~s) | (p & ~pq));
                }
            std::memcpy(counts + f * BLOCK + i, sum, sizeof sum);
        }
}

#endif

// Bit c of the word of each of WIDE positions, c = 0 .. channels - 1: x[c * step + position] >= threshold; `count` of
// the positions are there.
inline void pack_some(const float* x, int64_t step, int64_t channels, int64_t count, float threshold, uint64_t* to) {
    Ints half[2];
    for (int h = 0; h < 2; ++h) {
        Ints bits = {};
        const int64_t last = std::min<int64_t>(32, channels - 32 * h);
#if defined(POPCOUNT512)
        const __mmask16 there = (__mmask16)((1u << count) - 1);
        const __m512 limit = _mm512_set1_ps(threshold);
        for (int64_t c = 0; c < last; ++c, x += step) {
            const __m512 value = _mm512_maskz_loadu_ps(there, x);
            const __mmask16 positive = _mm512_mask_cmp_ps_mask(there, value, limit, _CMP_GE_OQ);
            const __m512i bit = _mm512_set1_epi32((int)(1u << c));
            bits = (Ints)_mm512_mask_or_epi32((__m512i)bits, positive, (__m512i)bits, bit);
        }
#else
        if (count == WIDE)
            for (int64_t c = 0; c < last; ++c, x += step)
                bits |= (*(const Floats*)x >= threshold) & (int32_t)(1u << c);
        else
            for (int64_t c = 0; c < last; ++c, x += step)
                for (int64_t i = 0; i < count; ++i) bits[i] |= (int32_t)((uint32_t)(x[i] >= threshold) << c);
#endif
        half[h] = bits;
    }
    alignas(64) uint32_t pair[2][WIDE];
    std::memcpy(pair, half, sizeof pair);
    for (int64_t i = 0; i < count; ++i) to[i] = pair[0][i] | (uint64_t)pair[1][i] << 32;
}

// `count` floats, and zeros.
inline Floats load(const float* x, int64_t count) {
    if (count == WIDE) return *(const Floats*)x;
    Floats value = {};
    for (int64_t i = 0; i < count; ++i) value[i] = x[i];
    return value;
}

inline void store(float* y, Floats value, int64_t count) {
    if (count == WIDE)
        *(Floats*)y = value;
    else
        for (int64_t i = 0; i < count; ++i) y[i] = value[i];
}

// table[kind] for WIDE positions; a `small` table has 16 entries.
inline Ints look_up(const int32_t* table, const int32_t* kind, [[maybe_unused]] bool small) {
#if defined(POPCOUNT512)
    if (small) return (Ints)_mm512_permutexvar_epi32(_mm512_loadu_si512(kind), _mm512_loadu_si512(table));
#elif defined(__AVX2__)
    if (small) return __builtin_shuffle(*(const Ints*)table, *(const Ints*)(table + 8), *(const Ints*)kind);
#endif
    Ints found;
    for (int i = 0; i < WIDE; ++i) found[i] = table[kind[i]];
    return found;
}

// ---- the convolution

typedef void (*Multiply)(const uint64_t*, const uint64_t*, int64_t, int32_t*);

struct After {  // what follows the sum
    const float *scale, *shift, *slope, *residual;
    bool hardtanh;
};

struct Plan {
    int64_t channels, height, width, filters, groups, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
    bool zero_one;
    int64_t out_height, out_width, positions;
    int64_t group_channels, group_filters, quads;  // of a group; how often FILTERS filters
    int64_t group_planes, row, plane;              // words per position of a group; length of a line, of a plane
    int64_t words;                                 // of a filter
    int64_t kinds;                                 // of positions, by which taps are inside; the length of a table
    Multiply kernels[BLOCK / GROUP];

    struct Piece {
        int64_t offset;  // in the planes of a group
        int shift;
    };
    std::vector<Piece> pieces;      // of all words
    std::vector<int64_t> piece_of;  // where each word's begin
    std::vector<int32_t> window;    // of each position: where it begins in a plane
    std::vector<uint8_t> run;       // whether 8 positions are neighbours
    std::vector<int32_t> kind;      // of each position
    std::vector<uint64_t> weight;   // (groups, quads, words, FILTERS)
    std::vector<int32_t> base;      // (filters, kinds)

    void lay_out() {
        out_height = (height + 2 * pad_y - kernel_height) / stride_y + 1;
        out_width = (width + 2 * pad_x - kernel_width) / stride_x + 1;
        positions = out_height * out_width;
        group_channels = channels / groups, group_filters = filters / groups;
        quads = ceil_div(group_filters, FILTERS);
        group_planes = ceil_div(group_channels, 64);
        row = width + 2 * pad_x;
        plane = (height + 2 * pad_y) * row;
        const int64_t taps = kernel_height * kernel_width, share = std::max<int64_t>(1, 64 / group_channels);
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t p = 0; p < group_planes; ++p) {
                if (tap % share == 0) piece_of.push_back((int64_t)pieces.size());
                pieces.push_back({p * plane + tap / kernel_width * row + tap % kernel_width,
                                  (int)(tap % share * group_channels)});
            }
        words = ceil_div((int64_t)piece_of.size(), 3) * 3;  // those added are 0
        piece_of.push_back((int64_t)pieces.size());
        const int64_t rounded = ceil_div(positions, BLOCK) * BLOCK;
        for (int64_t p = 0; p < rounded; ++p) {
            const int64_t q = std::min(p, positions - 1);
            window.push_back((int32_t)(q / out_width * stride_y * row + q % out_width * stride_x));
        }
        for (int64_t p = 0; p < rounded; p += GROUP) {
            bool neighbours = true;
            for (int64_t i = 1; i < GROUP; ++i) neighbours &= window[p + i] == window[p] + i;
            run.push_back(neighbours);
        }
        kernels[0] = multiply<1>, kernels[1] = multiply<2>, kernels[2] = multiply<3>, kernels[3] = multiply<4>;
    }

    // packed: one row of bytes per filter, bits in the order (channel, tap), the first one lowest.
    void take(const uint8_t* packed) {
        const int64_t taps = kernel_height * kernel_width, bytes = ceil_div(group_channels * taps, 8);
        const int64_t share = std::max<int64_t>(1, 64 / group_channels);
        std::vector<int32_t> offs(filters * taps);  // how many weights of a tap are not +1
        weight.assign(groups * quads * words * FILTERS, 0);
        for (int64_t f = 0; f < filters; ++f) {
            const int64_t group = f / group_filters, in_group = f % group_filters;
            uint64_t* to = &weight[(group * quads + in_group / FILTERS) * words * FILTERS + in_group % FILTERS];
            for (int64_t c = 0; c < group_channels; ++c)
                for (int64_t tap = 0; tap < taps; ++tap) {
                    const int64_t i = c * taps + tap;
                    const uint64_t off = ~packed[f * bytes + i / 8] >> i % 8 & 1;
                    const int64_t shift = tap % share * group_channels + c % 64;
                    to[(tap / share * group_planes + c / 64) * FILTERS] |= off << shift;
                    offs[f * taps + tap] += (int32_t)off;
                }
            for (int64_t k = 0; k < words; k += 3) {
                to[(k + 1) * FILTERS] ^= to[k * FILTERS];
                to[(k + 2) * FILTERS] ^= to[(k + 1) * FILTERS];
            }
        }
        std::vector<std::vector<bool>> inside;  // of each kind, the taps
        std::map<std::vector<bool>, int32_t> known;
        for (int64_t p = 0; p < (int64_t)window.size(); ++p) {
            const int64_t q = std::min(p, positions - 1);
            const int64_t y = q / out_width * stride_y - pad_y, x = q % out_width * stride_x - pad_x;
            std::vector<bool> taken(taps);
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t at_y = y + tap / kernel_width, at_x = x + tap % kernel_width;
                taken[tap] = at_y >= 0 && at_y < height && at_x >= 0 && at_x < width;
            }
            const auto [found, is_new] = known.insert({taken, (int32_t)inside.size()});
            if (is_new) inside.push_back(taken);
            kind.push_back(found->second);
        }
        kinds = std::max<int64_t>(SMALL, (int64_t)inside.size());
        base.assign(filters * kinds, 0);
        for (int64_t f = 0; f < filters; ++f)
            for (int64_t k = 0; k < (int64_t)inside.size(); ++k)
                for (int64_t tap = 0; tap < taps; ++tap) {
                    // P counts padded positions, 0 bits, where the weight is not +1
                    const int32_t all = (int32_t)group_channels, off = offs[f * taps + tap], count = zero_one ? 1 : 2;
                    base[f * kinds + k] -= inside[k][tap] ? all : count * off;
                }
    }

    float mean(const float* x) const {
        const int64_t count = channels * height * width;
        Doubles sum[4] = {};
        constexpr int lanes = WIDE / 2;
        int64_t i = 0;
        for (; i + 4 * lanes <= count; i += 4 * lanes)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[j] += __builtin_convertvector(*(const Half*)(x + i + j * lanes), Doubles);
        double total = 0;
        for (; i < count; ++i) total += x[i];
        for (int j = 0; j < 4; ++j)
            for (int k = 0; k < lanes; ++k) total += sum[j][k];
        return (float)(total / (double)count);
    }

    // line y of plane p, counted over all groups; y may lie in the padding
    void pack(const float* x, int64_t p, int64_t y, float threshold, uint64_t* planes) const {
        uint64_t* to = planes + p * plane + (y + pad_y) * row;
        if (y < 0 || y >= height) {
            std::memset(to, 0, row * sizeof *to);
            return;
        }
        const int64_t first = p % group_planes * 64, count = std::min<int64_t>(64, group_channels - first);
        x += ((p / group_planes * group_channels + first) * height + y) * width;
        std::memset(to, 0, pad_x * sizeof *to);
        std::memset(to + pad_x + width, 0, pad_x * sizeof *to);
        for (int64_t i = 0; i < width; i += WIDE)
            pack_some(x + i, height * width, count, std::min<int64_t>(WIDE, width - i), threshold, to + pad_x + i);
    }

    // prefixes of each three words of the windows of `vectors * GROUP` positions; and how many inputs of each are +1
    void gather(const uint64_t* planes, int64_t first, int64_t vectors, uint64_t* a, int32_t* positive) const {
        const int64_t line = vectors * GROUP, real = (int64_t)piece_of.size() - 1;
        const int64_t* const begin = piece_of.data();
        const Piece* const piece = pieces.data();
        for (int64_t v = 0; v < vectors; ++v) {
            const int32_t* const at = &window[first + v * GROUP];
            uint64_t* to = a + v * GROUP;
            if (run[first / GROUP + v] && begin[real] == real) {  // neighbours, and no words that are shared
                const uint64_t* const from = planes + at[0];
                for (int64_t k = 0; k < real; ++k, to += line)
                    for (int j = 0; j < GROUP; j += WIDE / 2)
                        *(Words*)(to + j) = *(const Words*)(from + piece[k].offset + j);
                continue;
            }
            for (int64_t k = 0; k < real; ++k, to += line) {
                uint64_t word[GROUP] = {};
                for (int64_t i = begin[k]; i < begin[k + 1]; ++i)
                    for (int j = 0; j < GROUP; ++j) word[j] |= planes[piece[i].offset + at[j]] << piece[i].shift;
                std::memcpy(to, word, sizeof word);
            }
        }
        std::memset(a + real * line, 0, (words - real) * line * sizeof *a);
        if (positive)
            for (int64_t i = 0; i < line; ++i) {
                positive[i] = 0;
                for (int64_t k = 0; k < real; ++k) positive[i] += __builtin_popcountll(a[k * line + i]);
            }
        for (int64_t k = 0; k < words; k += 3, a += 3 * line)
            for (int64_t i = 0; i < line; i += WIDE / 2) {
                Words &p = *(Words*)(a + i), &q = *(Words*)(a + line + i), &r = *(Words*)(a + 2 * line + i);
                q ^= p;
                r ^= q;
            }
    }

    // From counts, and for weights 0 and +1 the numbers of inputs that are +1, to y. WHOLE: of BLOCK positions.
    template <bool WHOLE>
    void finish(const int32_t* counts, const int32_t* positive, int64_t filter, int64_t first, int64_t count,
                const After& after, float* y) const {
        constexpr int PARTS = BLOCK / WIDE;
        const auto here = [&](int v) { return WHOLE ? WIDE : std::min<int64_t>(WIDE, count - v * WIDE); };
        const int64_t parts = WHOLE ? PARTS : ceil_div(count, WIDE), at = filter * positions + first;
        const float scale = after.scale[filter], shift = after.shift ? after.shift[filter] : 0.0f;
        const int32_t *const table = &base[filter * kinds], *const other = zero_one ? positive : counts;
        const bool small = kinds == SMALL;
        Floats value[PARTS] = {};
#pragma GCC unroll 8
        for (int v = 0; v < parts; ++v) {
            const Ints sum = look_up(table, &kind[first + v * WIDE], small) + *(const Ints*)(counts + v * WIDE) +
                             *(const Ints*)(other + v * WIDE);
            value[v] = __builtin_convertvector(sum, Floats) * scale + shift;
        }
        if (after.residual)
#pragma GCC unroll 8
            for (int v = 0; v < parts; ++v) value[v] += load(after.residual + at + v * WIDE, here(v));
        if (after.slope) {
            const float slope = after.slope[filter];
#pragma GCC unroll 8
            for (int v = 0; v < parts; ++v) value[v] = value[v] > 0 ? value[v] : value[v] * slope;
        }
        if (after.hardtanh) {
            const Floats one = Floats{} + 1;
#pragma GCC unroll 8
            for (int v = 0; v < parts; ++v) {
                value[v] = value[v] > one ? one : value[v];
                value[v] = value[v] < -one ? -one : value[v];
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < parts; ++v) store(y + at + v * WIDE, value[v], here(v));
    }

    // all filters of a share of a group, for up to BLOCK positions
    void compute(const uint64_t* planes, int64_t group, int64_t first, int64_t from, int64_t to, const After& after,
                 float* y) const {
        static thread_local std::vector<uint64_t> lines;
        if ((int64_t)lines.size() < words * BLOCK + GROUP) lines.resize(words * BLOCK + GROUP);
        uint64_t* a = (uint64_t*)(((uintptr_t)lines.data() + 63) / 64 * 64);
        const int64_t count = std::min<int64_t>(BLOCK, positions - first), vectors = ceil_div(count, GROUP);
        alignas(64) int32_t positive[BLOCK] = {};
        gather(planes + group * group_planes * plane, first, vectors, a, zero_one ? positive : nullptr);
        alignas(64) int32_t counts[FILTERS * BLOCK] = {};
        for (int64_t quad = from; quad < to; ++quad) {
            kernels[vectors - 1](a, &weight[(group * quads + quad) * words * FILTERS], words, counts);
            for (int64_t f = quad * FILTERS; f < std::min(group_filters, (quad + 1) * FILTERS); ++f) {
                const int32_t* of = counts + f % FILTERS * BLOCK;
                const int64_t filter = group * group_filters + f;
                if (count == BLOCK)
                    finish<true>(of, positive, filter, first, count, after, y);
                else
                    finish<false>(of, positive, filter, first, count, after, y);
            }
        }
    }

    void multiply_only() const {
        const std::vector<uint64_t> lines(words * BLOCK);
        int32_t counts[FILTERS * BLOCK];
        for (int64_t first = 0; first < positions; first += BLOCK)
            for (int64_t quad = 0; quad < groups * quads; ++quad)
                kernels[ceil_div(std::min<int64_t>(BLOCK, positions - first), GROUP) - 1](
                    lines.data(), &weight[quad * words * FILTERS], words, counts);
    }

    void image(const float* x, const After& after, float* y, bool center, int threads) const {
        static thread_local std::vector<uint64_t> buffer;
        if ((int64_t)buffer.size() < groups * group_planes * plane + GROUP)
            buffer.resize(groups * group_planes * plane + GROUP);
        uint64_t* const planes = buffer.data();
        const float threshold = center ? mean(x) : 0.0f;
        const int64_t lines = height + 2 * pad_y, blocks = ceil_div(positions, BLOCK);
        int64_t shares = 1;
        while (threads > 1 && groups * blocks * shares < 2 * threads && shares * 2 <= quads) shares *= 2;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for
            for (int64_t i = 0; i < groups * group_planes * lines; ++i)
                pack(x, i / lines, i % lines - pad_y, threshold, planes);
#pragma omp for
            for (int64_t i = 0; i < groups * blocks * shares; ++i) {
                const int64_t share = i % shares, block = i / shares % blocks, group = i / shares / blocks;
                compute(planes, group, block * BLOCK, quads * share / shares, quads * (share + 1) / shares, after, y);
            }
        }
    }

    void convolve(const float* x, const After& after, float* y, int64_t images, bool center, int threads) const {
        const bool whole = images >= threads;  // images are shared out, not their parts
#pragma omp parallel for num_threads(threads) if (whole && threads > 1)
        for (int64_t i = 0; i < images; ++i) {
            After here = after;
            if (after.residual) here.residual += i * filters * positions;
            image(x + i * channels * height * width, here, y + i * filters * positions, center, whole ? 1 : threads);
        }
    }
};

}  // namespace

extern "C" {

int binary_conv2d_lanes() { return WIDE; }

// packed: (filters, ceil(channels / groups * kernel_height * kernel_width / 8)).
void* binary_conv2d_plan(const uint8_t* packed, int64_t channels, int64_t height, int64_t width, int64_t filters,
                         int64_t groups, int64_t kernel_height, int64_t kernel_width, int64_t stride_y,
                         int64_t stride_x, int64_t pad_y, int64_t pad_x, int zero_one) {
    auto plan = std::make_unique<Plan>();
    plan->channels = channels, plan->height = height, plan->width = width, plan->filters = filters;
    plan->groups = groups, plan->kernel_height = kernel_height, plan->kernel_width = kernel_width;
    plan->stride_y = stride_y, plan->stride_x = stride_x, plan->pad_y = pad_y, plan->pad_x = pad_x;
    plan->zero_one = zero_one;
    plan->lay_out();
    plan->take(packed);
    return plan.release();
}

void binary_conv2d_free(void* plan) { delete (Plan*)plan; }

// What `multiply` takes for one image, for measurements: the sums of inputs that are all 0 bits, which are not kept.
void binary_conv2d_multiply(const void* plan) { ((const Plan*)plan)->multiply_only(); }

// x (images, channels, height, width), y and residual (images, filters, ...), contiguous float32; scale, shift and
// slope (filters); all but x, scale and y may be null.
void binary_conv2d_run(const void* plan, const float* x, const float* scale, const float* shift, const float* slope,
                       const float* residual, float* y, int64_t images, int center, int hardtanh, int threads) {
    ((const Plan*)plan)->convolve(x, {scale, shift, slope, residual, hardtanh != 0}, y, images, center, threads);
}
}
