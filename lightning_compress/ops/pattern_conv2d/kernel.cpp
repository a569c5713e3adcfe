// Convolution 3x3, padding 1, stride 1 or 2, with few non-zero weights, on the cores of one CPU.
//
// A stripe of output lines at a time, small enough for the second-level cache, every input channel is copied into a
// plane with zeros around it, so that tap (dy, dx) of a channel is one constant offset: output position q = y * row + x
// reads input q + offset. The columns x >= width are computed and dropped. K filters share their non-zeros: an input
// vector that is loaded feeds K multiply-adds. Channels come in blocks, so that the inputs of a run of positions stay in
// the nearest cache, with the sums in registers.
//
// With K <= 2 the loads are what takes time, and a load that straddles two cache lines takes twice as long. There rows
// are whole vectors, a kernel is split into its rows, and of each row the aligned vectors are loaded once and shifted
// left and right in registers (`multiply_rows`). Otherwise every non-zero is a load from where it points (`multiply`).
//
// Plain C interface and GCC's vector types: `LANES`, floats to a vector, is all that depends on the machine.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 26, ROW_SUMS = 16;  // sums that fit the registers beside the operands
#elif defined(__AVX2__)
constexpr int LANES = 8, SUMS = 12, ROW_SUMS = 8;
#else
constexpr int LANES = 4, SUMS = 12, ROW_SUMS = 8;
#endif
constexpr int MOST = SUMS < 24 ? SUMS : 24;  // vectors per filter

typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));

namespace {

constexpr int SHAPES = 8;  // which of the three taps of a row are there: bit 0 left, 1 middle, 2 right

struct Run {                // what one block of K filters reads of one block of channels
    const float* input;     // at the first position
    const int32_t* offset;  // of each non-zero, or of each row of a kernel
    const float* weight;    // K per non-zero
    const int32_t* end;     // one past the last of either; for rows, of each shape
    float* sums;            // K rows
    int64_t row;            // their length
    const float* bias;      // K, for the first block of channels; else null: go on with the sums
    bool relu;              // for the last one
};

template <int K, int R>
struct Sums {
    Vector at[K][R];

    explicit Sums(const Run& run) {
        for (int k = 0; k < K; ++k)
            for (int r = 0; r < R; ++r)
                at[k][r] = run.bias ? Vector{} + run.bias[k] : *(const Unaligned*)(run.sums + k * run.row + r * LANES);
    }
    void store(const Run& run) {
        if (run.relu)
            for (int k = 0; k < K; ++k)
                for (int r = 0; r < R; ++r) at[k][r] = at[k][r] > Vector{} ? at[k][r] : Vector{};
        for (int k = 0; k < K; ++k)
            for (int r = 0; r < R; ++r) *(Unaligned*)(run.sums + k * run.row + r * LANES) = at[k][r];
    }
};

#if defined(__AVX512F__)
inline Vector all_lanes(float value) { return (Vector)_mm512_set1_ps(value); }
inline Vector left_of(Vector before, Vector here) {  // each lane's left neighbour
    return (Vector)_mm512_alignr_epi32((__m512i)here, (__m512i)before, LANES - 1);
}
inline Vector right_of(Vector here, Vector after) {
    return (Vector)_mm512_alignr_epi32((__m512i)after, (__m512i)here, 1);
}
#else
inline Vector all_lanes(float value) { return Vector{} + value; }
template <int... I>
constexpr Lanes shifted_by(int by, std::integer_sequence<int, I...>) {
    return Lanes{(I + by)...};
}
const auto EACH = std::make_integer_sequence<int, LANES>();
inline Vector left_of(Vector before, Vector here) {
    return __builtin_shuffle(before, here, shifted_by(LANES - 1, EACH));
}
inline Vector right_of(Vector here, Vector after) { return __builtin_shuffle(here, after, shifted_by(1, EACH)); }
#endif

template <int K, int R>
void multiply(const Run& run) {
    Sums<K, R> sum(run);
    const float* w = run.weight;
    for (const int32_t* offset = run.offset; offset < run.end; ++offset, w += K) {
        const float* x = run.input + *offset;
        Vector value[R];
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) value[r] = *(const Unaligned*)(x + r * LANES);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vector broadcast = all_lanes(w[k]);
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) sum.at[k][r] += broadcast * value[r];
        }
    }
    sum.store(run);
}

template <int K, int R, int SHAPE>
inline void multiply_shape(const Run& run, const int32_t*& offset, const float*& w, const int32_t* end, Sums<K, R>& sum) {
    constexpr int LEFT = SHAPE & 1, MIDDLE = SHAPE >> 1 & 1, RIGHT = SHAPE >> 2 & 1, TAPS = LEFT + MIDDLE + RIGHT;
    for (; offset < end; ++offset, w += TAPS * K) {
        const float* x = run.input + *offset;
        Vector weight[TAPS][K];
        for (int t = 0; t < TAPS; ++t)
            for (int k = 0; k < K; ++k) weight[t][k] = all_lanes(w[t * K + k]);
        Vector before = LEFT ? *(const Vector*)(x - LANES) : Vector{}, here = *(const Vector*)x;
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            const Vector after = RIGHT || r + 1 < R ? *(const Vector*)(x + (r + 1) * LANES) : Vector{};
#pragma GCC unroll 2
            for (int k = 0; k < K; ++k) {
                if (LEFT) sum.at[k][r] += weight[0][k] * left_of(before, here);
                if (MIDDLE) sum.at[k][r] += weight[LEFT][k] * here;
                if (RIGHT) sum.at[k][r] += weight[LEFT + MIDDLE][k] * right_of(here, after);
            }
            before = here;
            here = after;
        }
    }
}

template <int K, int R>
void multiply_rows(const Run& run) {
    Sums<K, R> sum(run);
    const int32_t* offset = run.offset;
    const float* w = run.weight;
    multiply_shape<K, R, 1>(run, offset, w, run.offset + run.end[1], sum);
    multiply_shape<K, R, 2>(run, offset, w, run.offset + run.end[2], sum);
    multiply_shape<K, R, 3>(run, offset, w, run.offset + run.end[3], sum);
    multiply_shape<K, R, 4>(run, offset, w, run.offset + run.end[4], sum);
    multiply_shape<K, R, 5>(run, offset, w, run.offset + run.end[5], sum);
    multiply_shape<K, R, 6>(run, offset, w, run.offset + run.end[6], sum);
    multiply_shape<K, R, 7>(run, offset, w, run.offset + run.end[7], sum);
    sum.store(run);
}

typedef void (*Kernel)(const Run&);

template <int K, int R, bool ROWS>
constexpr Kernel kernel_if_it_fits() {
    if constexpr (ROWS) {
        if constexpr (K <= 2 && K * R <= ROW_SUMS) return multiply_rows<K, R>;
    } else {
        if constexpr (K * R <= SUMS) return multiply<K, R>;
    }
    return nullptr;
}

template <int K, bool ROWS, int... R>
Kernel kernel_of(int vectors, std::integer_sequence<int, R...>) {
    static const Kernel table[] = {kernel_if_it_fits<K, R + 1, ROWS>()...};
    return vectors >= 1 && vectors <= MOST ? table[vectors - 1] : nullptr;
}

Kernel find_kernel(int block, int vectors, bool rows) {
    const auto all = std::make_integer_sequence<int, MOST>();
    switch (block) {
        case 1: return rows ? kernel_of<1, true>(vectors, all) : kernel_of<1, false>(vectors, all);
        case 2: return rows ? kernel_of<2, true>(vectors, all) : kernel_of<2, false>(vectors, all);
        case 4: return rows ? nullptr : kernel_of<4, false>(vectors, all);
        case 8: return rows ? nullptr : kernel_of<8, false>(vectors, all);
    }
    return nullptr;
}

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The first `count` lanes, the others zero; and to write no more than these.
#if defined(__AVX512F__)
inline Vector load_some(const float* from, int64_t count) {
    return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
inline void store_some(float* to, Vector value, int64_t count) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
}
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_some(const float* from, int64_t count) { return (Vector)_mm256_maskload_ps(from, first_lanes(count)); }
inline void store_some(float* to, Vector value, int64_t count) {
    _mm256_maskstore_ps(to, first_lanes(count), (__m256)value);
}
#else
inline Vector load_some(const float* from, int64_t count) {
    Vector value{};
    for (int64_t i = 0; i < count; ++i) value[i] = from[i];
    return value;
}
inline void store_some(float* to, Vector value, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}
#endif

// For lines of some dozen floats, where calling memcpy takes as long as the copy.
inline void copy(const float* from, float* to, int64_t count) {
    for (; count >= LANES; count -= LANES, from += LANES, to += LANES) *(Unaligned*)to = *(const Unaligned*)from;
    if (count) store_some(to, load_some(from, count), count);
}

// `count` floats, then zeros: writes whole vectors, up to LANES - 1 zeros more than asked for.
inline void copy_and_zero(const float* from, int64_t count, float* to, int64_t all) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) *(Unaligned*)(to + i) = *(const Unaligned*)(from + i);
    if (i < count) *(Unaligned*)(to + i) = load_some(from + i, count - i), i += LANES;
    for (; i < all; i += LANES) *(Unaligned*)(to + i) = Vector{};
}

template <class T>
struct Aligned : std::vector<T> {  // whose data() begins a cache line
    T* begin_line() {
        return (T*)(((uintptr_t)this->data() + 63) / 64 * 64);
    }
    void reserve_line(int64_t count) {
        if ((int64_t)this->size() < count + 64) this->resize(count + 64);
    }
};

constexpr int64_t STRIPE = 512 << 10, SUMS_BYTES = 256 << 10;  // what the second-level cache holds, in bytes

// A layer for inputs of one height and width, its weights in the order in which they are used.
struct Plan {
    int64_t channels, height, width, filters, blocks, out_height, out_width;
    int block, stride, vectors;
    bool rows;                 // kernels split into rows
    int64_t lines, stripes;    // output lines of a stripe; how many stripes
    int64_t row, part, plane;  // length of a row; of a plane (4 of them for stride 2); of a channel
    int64_t sums_row;          // of the sums of a stripe
    int64_t tile, channel_block, channel_blocks;
    Kernel kernel;
    std::vector<int32_t> filter, offset, weight_start, ends;
    std::vector<int64_t> start;
    std::vector<float> weight;

    void lay_out(bool by_rows, int given_vectors) {
        rows = by_rows;
        // the zero behind a row is the one before the next; planes of even and odd columns need both
        row = rows ? up(width + 1, LANES) : stride == 1 ? width + 1 : (width + 3) / 2;
        const int64_t line_bytes = channels * row * stride * stride * 4;
        lines = std::max<int64_t>(1, std::min(out_height, STRIPE / line_bytes - 2));
        if (lines < 4) lines = std::min<int64_t>(4, out_height);  // of three input lines, two are halo
        stripes = (out_height + lines - 1) / lines;
        lines = (out_height + stripes - 1) / stripes;
        vectors = given_vectors;
        if (vectors <= 0) {
            double least = 1e30;
            for (int r = 1; r <= MOST; ++r) {
                if (!find_kernel(block, r, rows)) continue;
                const double cost = double(up(lines * row, r * LANES)) * (1 + 2.0 / (block * r));
                if (cost < least) least = cost, vectors = r;
            }
        }
        tile = (int64_t)vectors * LANES;
        part = up(row * (lines + 2) + tile + 3 * LANES, LANES);
        sums_row = up(lines * row, tile);
        for (int64_t* length : {&part, &sums_row})
            if (*length % 256 == 0) *length += LANES;  // planes must not meet in the same cache sets
        plane = part * stride * stride;
    }

    int32_t place(int tap) const {  // of a tap; LANES zeros stand before the first row
        const int dy = tap / 3, dx = tap % 3;
        if (stride == 1) return (int32_t)(LANES + dy * row + dx - 1);
        return (int32_t)(LANES + (dy % 2 * 2 + dx % 2) * part + dy / 2 * row + dx / 2);
    }

    void fill(const float* x, int64_t first, float* to) const {  // for output lines from `first`
        for (int64_t p = 0; p < stride * stride; ++p) std::memset(to + p * part, 0, LANES * sizeof(float));
        for (int64_t i = 0; i < (lines + 2) * stride; ++i) {
            const int64_t y = first * stride - 1 + i;
            float* line = to + LANES + i % stride * stride * part + i / stride * row;
            if (stride == 2 && i / 2 >= lines + 1) break;
            if (y < 0 || y >= height) {
                for (int64_t p = 0; p < stride; ++p) std::memset(line + p * part, 0, row * sizeof(float));
            } else if (stride == 1) {
                copy_and_zero(x + y * width, width, line, row);  // lines are written in order: the next one goes over it
            } else {
                const float* from = x + y * width;
                float *even = line, *odd = line + part;  // columns of the padded row
                std::memset(even, 0, row * sizeof(float));
                odd[row - 1] = 0;
                for (int64_t j = 0; 2 * j < width; ++j) odd[j] = from[2 * j];
                for (int64_t j = 0; 2 * j + 1 < width; ++j) even[j + 1] = from[2 * j + 1];
                if (width % 2 == 0) odd[width / 2] = 0;
            }
        }
    }

    void take(const int32_t* index, const int32_t* bounds, const float* values) {
        const int each = rows ? SHAPES : 1;
        start.assign(blocks * channel_blocks + 1, 0);
        weight_start.assign(blocks * channel_blocks, 0);
        ends.assign(blocks * channel_blocks * each, 0);
        offset.reserve(bounds[blocks]);
        weight.reserve((int64_t)bounds[blocks] * block);
        std::vector<std::pair<int, int>> part_of;  // (shape, first non-zero) of each row of a kernel
        for (int64_t b = 0; b < blocks; ++b) {
            int64_t i = bounds[b];
            for (int64_t cb = 0; cb < channel_blocks; ++cb) {
                const int64_t run = b * channel_blocks + cb, limit = (cb + 1) * channel_block * 9;
                start[run] = (int64_t)offset.size();
                weight_start[run] = (int32_t)(weight.size() / block);
                int64_t stop = i;
                while (stop < bounds[b + 1] && index[stop] < limit) ++stop;
                if (!rows) {
                    for (; i < stop; ++i) {
                        offset.push_back((int32_t)(index[i] / 9 * plane + place(index[i] % 9)));
                        weight.insert(weight.end(), values + i * block, values + (i + 1) * block);
                    }
                    ends[run] = (int32_t)((int64_t)offset.size() - start[run]);
                    continue;
                }
                part_of.clear();
                while (i < stop) {
                    const int32_t line = index[i] / 3;
                    int shape = 0;
                    const int first = (int)i;
                    for (; i < stop && index[i] / 3 == line; ++i) shape |= 1 << index[i] % 3;
                    part_of.push_back({shape, first});
                }
                for (int shape = 1; shape < SHAPES; ++shape) {
                    for (const auto& [s, first] : part_of) {
                        if (s != shape) continue;
                        const int taps = __builtin_popcount(shape);
                        offset.push_back((int32_t)(index[first] / 9 * plane + place(index[first] / 3 % 3 * 3 + 1)));
                        weight.insert(weight.end(), values + (int64_t)first * block, values + (int64_t)(first + taps) * block);
                    }
                    ends[run * SHAPES + shape] = (int32_t)((int64_t)offset.size() - start[run]);
                }
            }
        }
        start[blocks * channel_blocks] = (int64_t)offset.size();
    }

    void run(const float* x, const float* bias, float* y, int64_t images, bool relu, int threads) const {
        // groups of filters, whose sums must fit the second-level cache
        int64_t groups = std::max<int64_t>(1, blocks * block * sums_row * 4 / SUMS_BYTES);
        // and filters in shares where stripes alone leave a thread idle, though each share fills the stripe anew
        int64_t shares = 1;
        double least = 1e30;
        for (int64_t s = 1; s <= std::min<int64_t>(blocks, threads > 1 ? 2 * threads : 1); ++s) {
            const double cost = double((images * stripes * s + threads - 1) / threads) * (1.0 / double(s) + 0.1);
            if (cost < least) least = cost, shares = s;
        }
        groups = up(groups, shares);
        const int64_t group = (blocks + groups - 1) / groups;

#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            static thread_local Aligned<float> planes, local;
            planes.reserve_line(channels * plane);
            local.reserve_line(group * block * sums_row);
            float *const in = planes.begin_line(), *const sums = local.begin_line();
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < images * stripes * shares; ++task) {
                const int64_t image = task / (stripes * shares), line = task / shares % stripes * lines;
                const int64_t count = std::min(lines, out_height - line);
                for (int64_t c = 0; c < channels; ++c)
                    fill(x + (image * channels + c) * height * width, line, in + c * plane);
                for (int64_t g = task % shares; g < groups; g += shares) {
                    const int64_t first = g * group, last = std::min(blocks, first + group);
                    for (int64_t q = 0; q < count * row; q += tile) multiply_tile(in + q, bias, sums + q, first, last, relu);
                    // all lines of a filter at once: going back and forth between the pages of y costs more than sums
                    for (int64_t f = first * block; f < last * block; ++f) {
                        if (filter[f] < 0) continue;
                        const float* from = sums + (f - first * block) * sums_row;
                        float* to = y + ((image * filters + filter[f]) * out_height + line) * out_width;
                        for (int64_t i = 0; i < count; ++i) copy(from + i * row, to + i * out_width, out_width);
                    }
                }
            }
        }
    }

    void multiply_tile(const float* in, const float* bias, float* sums, int64_t first, int64_t last, bool relu) const {
        for (int64_t cb = 0; cb < channel_blocks; ++cb)
            for (int64_t b = first; b < last; ++b) {
                const int64_t at = b * channel_blocks + cb;
                Run run;
                run.relu = relu && cb + 1 == channel_blocks;
                if (cb && !run.relu && start[at] == start[at + 1]) continue;
                float given[8];
                if (cb == 0)
                    for (int k = 0; k < block; ++k) {
                        const int32_t f = filter[b * block + k];
                        given[k] = bias && f >= 0 ? bias[f] : 0;
                    }
                run.input = in;
                run.offset = offset.data() + start[at];
                run.weight = weight.data() + (int64_t)weight_start[at] * block;
                run.end = rows ? &ends[at * SHAPES] : run.offset + ends[at];
                run.sums = sums + (b - first) * block * sums_row;
                run.row = sums_row;
                run.bias = cb == 0 ? given : nullptr;
                kernel(run);
            }
    }
};

}  // namespace

extern "C" {

int pattern_conv2d_lanes() { return LANES; }

// index: channel * 9 + tap of each non-zero, ascending within its block; bounds: blocks + 1, where each block begins;
// weight: (non-zeros, block); filter: blocks * block output channels, -1 where a block is not full.
// vectors, channel_block, by_rows: 0, 0, -1 to choose here. Null if there is no such kernel.
void* pattern_conv2d_plan(const int32_t* index, const int32_t* bounds, const float* weight, const int32_t* filter,
                          int64_t channels, int64_t height, int64_t width, int64_t filters, int64_t blocks, int block,
                          int stride, int vectors, int channel_block, int by_rows) {
    auto plan = std::make_unique<Plan>();
    plan->channels = channels, plan->height = height, plan->width = width, plan->filters = filters;
    plan->blocks = blocks, plan->block = block, plan->stride = stride;
    plan->out_height = (height - 1) / stride + 1, plan->out_width = (width - 1) / stride + 1;
    // rows of whole vectors compute more positions, but load each vector once: worth it up to 1.4 times as many
    const bool rows_pay = stride == 1 && block <= 2 && 1.4 * double(width + 1) > double(up(width + 1, LANES));
    plan->lay_out(by_rows < 0 ? rows_pay : by_rows > 0 && stride == 1 && block <= 2, vectors);
    plan->kernel = find_kernel(block, plan->vectors, plan->rows);
    if (!plan->kernel) return nullptr;
    plan->channel_block = channel_block;
    if (channel_block <= 0) {
        const int64_t near = (block <= 2 ? 40 : 256) << 10;  // where loads take the time, inputs must be nearer
        const int64_t bytes = 4 * stride * stride * (plan->tile + 2 * plan->row);
        plan->channel_block = std::max<int64_t>(16, std::min<int64_t>(256, near / bytes));
        // with few non-zeros, sums that come and go cost more than inputs that are farther away
        const int64_t dense = std::max<int64_t>(1, blocks * channels * 9 / std::max<int32_t>(1, bounds[blocks]));
        plan->channel_block = std::min<int64_t>(channels, plan->channel_block * std::max<int64_t>(1, dense / 4));
    }
    plan->channel_blocks = (channels + plan->channel_block - 1) / plan->channel_block;
    plan->filter.assign(filter, filter + blocks * block);
    plan->take(index, bounds, weight);
    return plan.release();
}

void pattern_conv2d_free(void* plan) { delete (Plan*)plan; }

// x (images, channels, height, width) and y (images, filters, ...), contiguous float32; bias (filters) or null.
void pattern_conv2d_run(const void* plan, const float* x, const float* bias, float* y, int64_t images, int relu,
                        int threads) {
    ((const Plan*)plan)->run(x, bias, y, images, relu, threads);
}
}
