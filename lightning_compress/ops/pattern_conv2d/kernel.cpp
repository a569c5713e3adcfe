// Convolution 3x3, padding 1, with few non-zero weights, for one CPU.
//
// Every input plane is copied once into a padded one of row length `row`, so that a tap (dy, dx) of channel c is one
// constant offset: output position q = y * row + x reads input q + dy * row + dx. The columns x >= width are computed
// and dropped. K filters that share their non-zeros run together: each input vector that is loaded feeds K
// multiply-adds. For small K the loads are what takes time, and one that straddles two cache lines takes twice as long:
// then there are three planes, shifted by dx = 0, 1, 2, with rows of whole vectors, and no load straddles.
// A block of channels at a time, so that the inputs of a run of positions stay near.
//
// Plain C interface, no library: `LANES` floats to a vector is all that depends on the machine.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

namespace {

struct Run {                // non-zeros of one block of K filters and one block of channels
    const float* input;     // at the first position
    const int32_t* offset;  // of each non-zero
    const float* weight;    // K per non-zero
    int count;
    float* sums;            // K rows
    int64_t row;            // their length
    const float* bias;      // K, for the first block of channels; else null: go on with the sums
    bool relu;              // for the last one
};

template <int K, int R>
void multiply(const Run& run) {
    Vector sum[K][R];
    for (int k = 0; k < K; ++k)
        for (int r = 0; r < R; ++r)
            sum[k][r] = run.bias ? Vector{} + run.bias[k] : *(const Vector*)(run.sums + k * run.row + r * LANES);
    for (int i = 0; i < run.count; ++i) {
        const float* x = run.input + run.offset[i];
        const float* w = run.weight + (int64_t)i * K;
        if (K == 1) {
            const Vector broadcast = Vector{} + w[0];
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) sum[0][r] += broadcast * *(const Vector*)(x + r * LANES);
        } else {
            Vector value[R];
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) value[r] = *(const Vector*)(x + r * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                const Vector broadcast = Vector{} + w[k];
#pragma GCC unroll 32
                for (int r = 0; r < R; ++r) sum[k][r] += broadcast * value[r];
            }
        }
    }
    if (run.relu)
        for (int k = 0; k < K; ++k)
            for (int r = 0; r < R; ++r) sum[k][r] = sum[k][r] > Vector{} ? sum[k][r] : Vector{};
    for (int k = 0; k < K; ++k)
        for (int r = 0; r < R; ++r) *(Vector*)(run.sums + k * run.row + r * LANES) = sum[k][r];
}

typedef void (*Kernel)(const Run&);
constexpr int MOST = 24;     // vectors per filter
#ifndef SHIFTED
#define SHIFTED 2
#endif
constexpr int usable(int k, int r) { return k * r <= (REGISTERS == 32 ? 26 : 13); }

template <int K, int R>
constexpr Kernel kernel_if() {
    if constexpr (usable(K, R)) return multiply<K, R>;
    else return nullptr;
}

template <int K>
Kernel kernel_of(int vectors) {
    static const Kernel table[MOST + 1] = {
        nullptr,           kernel_if<K, 1>(),  kernel_if<K, 2>(),  kernel_if<K, 3>(),  kernel_if<K, 4>(),
        kernel_if<K, 5>(), kernel_if<K, 6>(),  kernel_if<K, 7>(),  kernel_if<K, 8>(),  kernel_if<K, 9>(),
        kernel_if<K, 10>(), kernel_if<K, 11>(), kernel_if<K, 12>(), kernel_if<K, 13>(), kernel_if<K, 14>(),
        kernel_if<K, 15>(), kernel_if<K, 16>(), kernel_if<K, 17>(), kernel_if<K, 18>(), kernel_if<K, 19>(),
        kernel_if<K, 20>(), kernel_if<K, 21>(), kernel_if<K, 22>(), kernel_if<K, 23>(), kernel_if<K, 24>()};
    return vectors >= 1 && vectors <= MOST ? table[vectors] : nullptr;
}

Kernel find_kernel(int block, int vectors) {
    switch (block) {
        case 1: return kernel_of<1>(vectors);
        case 2: return kernel_of<2>(vectors);
        case 4: return kernel_of<4>(vectors);
        case 8: return kernel_of<8>(vectors);
    }
    return nullptr;
}

// Vectors per filter: the fewest positions computed in vain, then the most sums in registers.
int choose_vectors(int block, int64_t positions) {
    int best = 1;
    double least = 1e30;
    for (int r = 1; r <= MOST; ++r) {
        if (!find_kernel(block, r)) continue;
        const int64_t tile = (int64_t)r * LANES;
        const double computed = double((positions + tile - 1) / tile * tile);
        const double cost = computed * (1.0 + 1.5 / (block * r));  // a block that is small waits for its loads
        if (cost < least) least = cost, best = r;
    }
    return best;
}

struct Plane {  // how one input channel is laid out: `size` floats, `parts` planes of `part` floats in it
    bool shifted;
    int stride;
    int64_t row, part, parts, size;

    Plane(int64_t height, int64_t width, int stride_, bool shifted_, int64_t slack)
        : shifted(shifted_ && stride_ == 1), stride(stride_) {
        row = (width + 2 + stride - 1) / stride;
        if (shifted) row = (width + LANES - 1) / LANES * LANES;
        if (shifted && 4 * row > 5 * width) row = (width + LANES / 2 - 1) / (LANES / 2) * (LANES / 2);
        const int64_t rows = (height + 2 + stride - 1) / stride;
        parts = shifted ? 3 : stride * stride;
        part = (row * rows + slack + LANES - 1) / LANES * LANES;
        if (part % 256 == 0) part += LANES;  // planes must not meet in the same cache sets
        size = part * parts;
    }

    int64_t tap(int dy, int dx) const {
        if (shifted) return dx * part + dy * row;
        return (dy % stride * stride + dx % stride) * part + dy / stride * row + dx / stride;
    }

    void fill(const float* x, float* to, int64_t height, int64_t width) const {
        std::memset(to, 0, size * sizeof(float));
        for (int64_t y = 0; y < height; ++y, x += width) {
            float* line = to + (y + 1) % stride * stride * part + (y + 1) / stride * row;
            if (shifted) {
                std::memcpy(line + 1, x, (width - 1) * sizeof(float));
                std::memcpy(line + part, x, width * sizeof(float));
                std::memcpy(line + 2 * part, x + 1, (width - 1) * sizeof(float));
            } else if (stride == 1) {
                std::memcpy(line + 1, x, width * sizeof(float));
            } else {
                for (int64_t i = 0; 2 * i < width; ++i) line[part + i] = x[2 * i];           // padded column 2i + 1
                for (int64_t i = 0; 2 * i + 1 < width; ++i) line[i + 1] = x[2 * i + 1];      // padded column 2i + 2
            }
        }
    }
};

}  // namespace

extern "C" {

int pattern_conv2d_lanes() { return LANES; }

// x (images, channels, height, width), y (images, filters, ...), both contiguous.
// index: channel * 9 + tap of each non-zero, ascending within its block; offset: blocks + 1; weight: (non-zeros, block).
// filter: blocks * block output channels, -1 where a block is not full. vectors, channel_block: 0 to choose here.
int pattern_conv2d(const float* x, const int32_t* index, const int32_t* offset, const float* weight,
                   const int32_t* filter, const float* bias, float* y, int64_t images, int64_t channels,
                   int64_t height, int64_t width, int64_t filters, int64_t blocks, int block, int stride, int relu,
                   int vectors, int channel_block, int threads) {
    const int64_t out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
    const bool shifted = block <= SHIFTED;
    const int64_t row = Plane(height, width, stride, shifted, 0).row, positions = out_height * row;
    if (vectors <= 0) vectors = choose_vectors(block, positions);
    const Kernel kernel = find_kernel(block, vectors);
    if (!kernel) return 1;
    const int64_t tile = (int64_t)vectors * LANES, tiles = (positions + tile - 1) / tile;
    const Plane plane(height, width, stride, shifted, tile + 2 * row + 4);
    if (channel_block <= 0) {
        const int64_t bytes = 4 * plane.parts * (tile + 2 * row + 2);
        channel_block = (int)std::max<int64_t>(8, std::min<int64_t>(64, 65536 / bytes));
    }
    const int64_t channel_blocks = std::max<int64_t>(1, (channels + channel_block - 1) / channel_block);

    int32_t tap[9];
    for (int t = 0; t < 9; ++t) tap[t] = (int32_t)plane.tap(t / 3, t % 3);
    const int64_t total = offset[blocks];
    std::vector<int32_t> at(total), start(blocks * channel_blocks + 1);
    for (int64_t b = 0; b < blocks; ++b) {
        int64_t cb = 0;
        start[b * channel_blocks] = offset[b];
        for (int64_t i = offset[b]; i < offset[b + 1]; ++i) {
            const int32_t c = index[i] / 9;
            while (c >= (cb + 1) * channel_block) start[b * channel_blocks + ++cb] = (int32_t)i;
            at[i] = (int32_t)(c * plane.size + tap[index[i] - 9 * c]);
        }
        while (cb + 1 < channel_blocks) start[b * channel_blocks + ++cb] = offset[b + 1];
    }
    start[blocks * channel_blocks] = (int32_t)total;

    // As many groups of filters as give every thread something to do, and sums that fit the second-level cache.
    int64_t groups = std::max<int64_t>(1, filters * tile * 4 / 262144);
    while (images * tiles * groups < 3 * threads && groups * 2 <= blocks) groups *= 2;
    const int64_t group = (blocks + groups - 1) / groups;
    groups = (blocks + group - 1) / group;

    static thread_local std::vector<float> padded;
    const int64_t needed = images * channels * plane.size;
    if ((int64_t)padded.size() < needed + 64) padded.resize(needed + 64);
    float* const in = (float*)(((uintptr_t)padded.data() + 63) / 64 * 64);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < images * channels; ++i)
            plane.fill(x + i * height * width, in + i * plane.size, height, width);

        std::vector<float> sums(group * block * tile + LANES);
        float zero[8] = {0}, given[8];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < images * tiles * groups; ++task) {
            const int64_t image = task / (tiles * groups), q = task / groups % tiles * tile, first = task % groups * group;
            const int64_t last = std::min(blocks, first + group);
            for (int64_t cb = 0; cb < channel_blocks; ++cb)
                for (int64_t b = first; b < last; ++b) {
                    const int32_t* bounds = &start[b * channel_blocks + cb];
                    Run run;
                    run.input = in + image * channels * plane.size + q;
                    run.offset = at.data() + bounds[0];
                    run.weight = weight + (int64_t)bounds[0] * block;
                    run.count = bounds[1] - bounds[0];
                    run.sums = sums.data() + (b - first) * block * tile;
                    run.row = tile;
                    run.bias = nullptr;
                    if (cb == 0) {
                        run.bias = zero;
                        if (bias) {
                            for (int k = 0; k < block; ++k) {
                                const int32_t f = filter[b * block + k];
                                given[k] = f < 0 ? 0 : bias[f];
                            }
                            run.bias = given;
                        }
                    } else if (!run.count && !(relu && cb + 1 == channel_blocks)) continue;
                    run.relu = relu && cb + 1 == channel_blocks;
                    kernel(run);
                }
            const int64_t end = std::min(positions, q + tile);
            for (int64_t f = first * block; f < last * block; ++f) {
                if (filter[f] < 0) continue;
                float* out = y + (image * filters + filter[f]) * out_height * out_width;
                const float* from = sums.data() + (f - first * block) * tile - q;
                for (int64_t line = q / row; line * row < end; ++line) {
                    const int64_t begin = std::max(q, line * row), stop = std::min(end, line * row + out_width);
                    if (begin < stop)
                        std::memcpy(out + line * out_width + begin - line * row, from + begin, (stop - begin) * sizeof(float));
                }
            }
        }
    }
    return 0;
}
}
