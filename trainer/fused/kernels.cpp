// Attention of short segments and the small operations of a layer, in float32, for the cores of a CPU.
//
// Plain C++ with GCC's vector extension: 16 numbers at a time, whatever the processor makes of them. Rows lie `stride`
// numbers apart, so that slices of wider tensors need no copy. Segments are given by `bounds`: n + 1 row numbers.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int W = 16;
#ifdef __AVX512F__
constexpr int ROWS = 8, VECTORS = 3;  // of the tile that stays in registers
#else
constexpr int ROWS = 6, VECTORS = 1;
#endif
constexpr int QUERIES = 64;  // rows whose scores are in the cache at once

inline long padded(long n) { return (n + W - 1) / W * W; }
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline vec all(float x) { return x - vec{}; }

inline float sum(vec x) {
    float s[W];
    std::memcpy(s, &x, sizeof s);
    for (int i = 0; i < 8; i++) s[i] += s[i + 8];
    for (int i = 0; i < 4; i++) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// e^x to 2 ulp, after Cephes: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 below the smallest normal number.
inline vec exp16(vec x) {
    vec low = all(-87.f), high = all(88.f);
    vec y = x < low ? low : x;
    y = y > high ? high : y;
    const vec magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    vec n = y * 1.44269504f + magic;
    n -= magic;
    vec r = y - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec scaled = p * reinterpret_cast<vec&>(bits);
    return x < low ? vec{} : scaled;
}

// C (R x 16 V) = or += A (R x K) B (K x 16 V); number (r, k) of A lies at r * lda + k * ska.
template <int R, int V>
inline void tile(long K, const float* A, long lda, long ska, const float* B, long ldb, float* C, long ldc, bool add) {
    vec c[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) c[r][v] = add ? load(C + r * ldc + v * W) : vec{};
    for (long k = 0; k < K; k++, B += ldb, A += ska) {
        vec b[V];
        for (int v = 0; v < V; v++) b[v] = load(B + v * W);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) c[r][v] += A[r * lda] * b[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(C + r * ldc + v * W, c[r][v]);
}

template <int V>
void panel(long M, long K, const float* A, long lda, long ska, const float* B, long ldb, float* C, long ldc, bool add) {
    long m = 0;
    for (; m + ROWS <= M; m += ROWS) tile<ROWS, V>(K, A + m * lda, lda, ska, B, ldb, C + m * ldc, ldc, add);
    for (; m + 4 <= M; m += 4) tile<4, V>(K, A + m * lda, lda, ska, B, ldb, C + m * ldc, ldc, add);
    for (; m < M; m++) tile<1, V>(K, A + m * lda, lda, ska, B, ldb, C + m * ldc, ldc, add);
}

// C (M x N) = or += A (M x K) B (K x N); N a multiple of 16.
void multiply(long M, long N, long K, const float* A, long lda, long ska, const float* B, long ldb, float* C, long ldc,
              bool add) {
    long n = 0;
    for (; n + VECTORS * W <= N; n += VECTORS * W)
        panel<VECTORS>(M, K, A, lda, ska, B + n, ldb, C + n, ldc, add);
    for (; n + 2 * W <= N; n += 2 * W) panel<2>(M, K, A, lda, ska, B + n, ldb, C + n, ldc, add);
    for (; n < N; n += W) panel<1>(M, K, A, lda, ska, B + n, ldb, C + n, ldc, add);
}

float* scratch(std::vector<float>& buffer, long size) {
    if ((long)buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

// `rows` rows of d numbers into rows of padded(d), zeros behind them.
void gather(const float* from, long stride, long rows, long d, float* to) {
    const long dp = padded(d);
    for (long i = 0; i < rows; i++) {
        std::memcpy(to + i * dp, from + i * stride, d * sizeof(float));
        std::memset(to + i * dp + d, 0, (dp - d) * sizeof(float));
    }
}

void transpose(const float* from, long stride, long rows, long d, float* to, long ld) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < d; c++) to[c * ld + i] = from[i * stride + c];
    for (long c = 0; c < d; c++) std::memset(to + c * ld + rows, 0, (ld - rows) * sizeof(float));
}

}  // namespace

extern "C" {

// out = softmax(q k^T scale) v in each segment, heads sharing keys in groups; sums (h, T): logarithms of the
// softmax's denominators. The keys of every segment are the `shared` first rows of pk and pv, then its own.
void attend(const float* q, long sq, const float* k, long sk, const float* v, long sv, const float* pk, long spk,
            const float* pv, long spv, long shared, float* out, float* sums, const long* bounds, long n, long h, long g,
            long d, int causal, float scale) {
    const long dp = padded(d), T = bounds[n], group = h / g;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (long s = 0; s < n; s++)
        for (long kv = 0; kv < g; kv++) {
            static thread_local std::vector<float> b1, b2, b3, b4;
            const long first = bounds[s], L = bounds[s + 1] - first, keys = shared + L, ld = padded(keys);
            float* kt = scratch(b1, d * ld);
            float* vs = scratch(b2, ld * dp);
            float* scores = scratch(b3, QUERIES * ld);
            float* o = scratch(b4, QUERIES * dp);
            for (long c = 0; c < d; c++)
                for (long i = 0; i < shared; i++) kt[c * ld + i] = pk[i * spk + kv * d + c];
            for (long c = 0; c < d; c++) {
                for (long i = 0; i < L; i++) kt[c * ld + shared + i] = k[(first + i) * sk + kv * d + c];
                std::memset(kt + c * ld + keys, 0, (ld - keys) * sizeof(float));
            }
            gather(pv + kv * d, spv, shared, d, vs);
            gather(v + first * sv + kv * d, sv, L, d, vs + shared * dp);
            for (long head = kv * group; head < (kv + 1) * group; head++)
                for (long i0 = 0; i0 < L; i0 += QUERIES) {
                    const long rows = std::min<long>(QUERIES, L - i0), seen = causal ? shared + i0 + rows : keys;
                    const long width = padded(seen);
                    multiply(rows, width, d, q + (first + i0) * sq + head * d, sq, 1, kt, ld, scores, ld, false);
                    for (long i = 0; i < rows; i++) {
                        float* row = scores + i * ld;
                        const long valid = causal ? shared + i0 + i + 1 : keys;
                        for (long j = valid; j < width; j++) row[j] = -INFINITY;
                        vec most = load(row);
                        for (long j = W; j < width; j += W) most = load(row + j) > most ? load(row + j) : most;
                        float top = most[0];
                        for (int j = 1; j < W; j++) top = std::max(top, most[j]);
                        vec total{};
                        for (long j = 0; j < width; j += W) {
                            vec p = exp16((load(row + j) - top) * scale);
                            store(row + j, p);
                            total += p;
                        }
                        const float whole = sum(total);
                        sums[head * T + first + i0 + i] = top * scale + std::log(whole);
                        const float inverse = 1.f / whole;
                        for (long j = 0; j < width; j += W) store(row + j, load(row + j) * inverse);
                    }
                    multiply(rows, dp, seen, scores, ld, 1, vs, dp, o, dp, false);
                    for (long i = 0; i < rows; i++)
                        std::memcpy(out + ((first + i0 + i) * h + head) * d, o + i * dp, d * sizeof(float));
                }
        }
}

// Gradients of q (T, h, d), k and v (T, g, d); of the shared keys and values added to dpk and dpv (shared, g, d), if
// these are not null.
void attend_backward(const float* dout, const float* q, long sq, const float* k, long sk, const float* v, long sv,
                     const float* pk, long spk, const float* pv, long spv, long shared, const float* out,
                     const float* sums, float* dq, float* dk, float* dv, float* dpk, float* dpv, const long* bounds,
                     long n, long h, long g, long d, int causal, float scale) {
    const long dp = padded(d), T = bounds[n], group = h / g;
#pragma omp parallel for schedule(dynamic)
    for (long kv = 0; kv < g; kv++)
        for (long s = 0; s < n; s++) {
            static thread_local std::vector<float> b1, b2, b3, b4, b5, b6, b7, b8, b9, b10;
            const long first = bounds[s], L = bounds[s + 1] - first, keys = shared + L, ld = padded(keys);
            float* kt = scratch(b1, d * ld);
            float* vt = scratch(b2, d * ld);
            float* ks = scratch(b3, ld * dp);
            float* dks = scratch(b4, ld * dp);
            float* dvs = scratch(b5, ld * dp);
            float* p = scratch(b6, QUERIES * ld);
            float* ds = scratch(b7, QUERIES * ld);
            float* qs = scratch(b8, QUERIES * dp);
            float* dos = scratch(b9, QUERIES * dp);
            float* dqs = scratch(b10, QUERIES * dp);
            gather(pk + kv * d, spk, shared, d, ks);
            gather(k + first * sk + kv * d, sk, L, d, ks + shared * dp);
            transpose(ks, dp, keys, d, kt, ld);
            gather(pv + kv * d, spv, shared, d, dvs);  // until it is transposed
            gather(v + first * sv + kv * d, sv, L, d, dvs + shared * dp);
            transpose(dvs, dp, keys, d, vt, ld);
            std::memset(dks, 0, ld * dp * sizeof(float));
            std::memset(dvs, 0, ld * dp * sizeof(float));
            for (long head = kv * group; head < (kv + 1) * group; head++)
                for (long i0 = 0; i0 < L; i0 += QUERIES) {
                    const long rows = std::min<long>(QUERIES, L - i0), seen = causal ? shared + i0 + rows : keys;
                    const long width = padded(seen), at = (first + i0) * h + head;
                    gather(q + (first + i0) * sq + head * d, sq, rows, d, qs);
                    gather(dout + at * d, h * d, rows, d, dos);
                    multiply(rows, width, d, qs, dp, 1, kt, ld, p, ld, false);
                    multiply(rows, width, d, dos, dp, 1, vt, ld, ds, ld, false);
                    for (long i = 0; i < rows; i++) {
                        const long valid = causal ? shared + i0 + i + 1 : keys;
                        const float whole = sums[head * T + first + i0 + i];
                        const float* o = out + (at + i * h) * d;
                        float delta = 0;
                        for (long c = 0; c < d; c++) delta += o[c] * dos[i * dp + c];
                        float* prow = p + i * ld;
                        float* dsrow = ds + i * ld;
                        for (long j = valid; j < width; j++) prow[j] = -INFINITY;
                        for (long j = 0; j < width; j += W) {
                            vec x = exp16(load(prow + j) * scale - whole);
                            store(prow + j, x);
                            store(dsrow + j, x * (load(dsrow + j) - delta) * scale);
                        }
                    }
                    multiply(rows, dp, seen, ds, ld, 1, ks, dp, dqs, dp, false);
                    multiply(seen, dp, rows, ds, 1, ld, qs, dp, dks, dp, true);
                    multiply(seen, dp, rows, p, 1, ld, dos, dp, dvs, dp, true);
                    for (long i = 0; i < rows; i++)
                        std::memcpy(dq + (at + i * h) * d, dqs + i * dp, d * sizeof(float));
                }
            for (long i = 0; i < L; i++) {
                const long to = ((first + i) * g + kv) * d;
                for (long c = 0; c < d; c++) dk[to + c] = dks[(shared + i) * dp + c];
                for (long c = 0; c < d; c++) dv[to + c] = dvs[(shared + i) * dp + c];
            }
            if (dpk)
                for (long i = 0; i < shared; i++)
                    for (long c = 0; c < d; c++) {
                        dpk[(i * g + kv) * d + c] += dks[i * dp + c];
                        dpv[(i * g + kv) * d + c] += dvs[i * dp + c];
                    }
        }
}

// y = x r w, r = 1 / sqrt(mean(x^2) + eps): (T, D), (T).
void rms_norm(const float* x, const float* w, float* y, float* r, long T, long D, float eps) {
#pragma omp parallel for
    for (long i = 0; i < T; i++) {
        const float* a = x + i * D;
        vec squares{};
        long c = 0;
        for (; c + W <= D; c += W) squares += load(a + c) * load(a + c);
        float total = sum(squares);
        for (; c < D; c++) total += a[c] * a[c];
        const float f = 1.f / std::sqrt(total / D + eps);
        float* __restrict b = y + i * D;
        for (long c = 0; c < D; c++) b[c] = a[c] * f * w[c];
        r[i] = f;
    }
}

// dx = r (dy w - n mean(dy w n)) + plus, n = x r.
void rms_norm_backward(const float* dy, const float* x, const float* w, const float* r, const float* plus, float* dx,
                       long T, long D) {
#pragma omp parallel for
    for (long i = 0; i < T; i++) {
        const float *a = x + i * D, *b = dy + i * D, *p = plus + i * D;
        vec dots{};
        long c = 0;
        for (; c + W <= D; c += W) dots += load(a + c) * load(b + c) * load(w + c);
        float dot = sum(dots);
        for (; c < D; c++) dot += a[c] * b[c] * w[c];
        const float f = r[i], m = dot * f * f * f / D;
        float* __restrict o = dx + i * D;
        for (long c = 0; c < D; c++) o[c] = b[c] * w[c] * f - a[c] * m + p[c];
    }
}

// The first m of each row's heads (d numbers each, `stride` a row) normed by weights (m, d) and turned by the tables
// (T, d / 2) -> y (T, m, d). Without weights they are only turned.
void turn_heads(const float* x, long stride, const float* w, const float* cos, const float* sin, float* __restrict y,
                long T, long m, long d, float eps) {
    const long half = d / 2;
#pragma omp parallel for
    for (long i = 0; i < T; i++)
        for (long j = 0; j < m; j++) {
            const float* a = x + i * stride + j * d;
            float* __restrict b = y + (i * m + j) * d;
            const float *c = cos + i * half, *s = sin + i * half;
            if (!w) {
                for (long e = 0; e < half; e++) {
                    b[e] = a[e] * c[e] - a[half + e] * s[e];
                    b[half + e] = a[half + e] * c[e] + a[e] * s[e];
                }
                continue;
            }
            const float *w1 = w + j * d, *w2 = w1 + half;
            vec squares{};
            for (long e = 0; e + W <= d; e += W) squares += load(a + e) * load(a + e);
            float total = sum(squares);
            for (long e = d / W * W; e < d; e++) total += a[e] * a[e];
            const float f = 1.f / std::sqrt(total / d + eps);
            for (long e = 0; e < half; e++) {
                const float one = a[e] * f * w1[e], two = a[half + e] * f * w2[e];
                b[e] = one * c[e] - two * s[e];
                b[half + e] = two * c[e] + one * s[e];
            }
        }
}

// From the gradient of what `turn_heads` makes, rows `dy_stride` apart, to that of its input, rows `dx_stride` apart.
void turn_heads_backward(const float* dy, long dy_stride, const float* x, long stride, const float* w, const float* cos,
                         const float* sin, float* dx, long dx_stride, long T, long m, long d, float eps) {
    const long half = d / 2;
#pragma omp parallel for
    for (long i = 0; i < T; i++)
        for (long j = 0; j < m; j++) {
            const float *a = x + i * stride + j * d, *b = dy + i * dy_stride + j * d;
            float* __restrict o = dx + i * dx_stride + j * d;
            const float *c = cos + i * half, *s = sin + i * half;
            for (long e = 0; e < half; e++) {
                const float one = b[e], two = b[half + e];
                o[e] = one * c[e] + two * s[e];
                o[half + e] = two * c[e] - one * s[e];
            }
            if (!w) continue;
            const float* v = w + j * d;
            vec squares{}, dots{};
            long e = 0;
            for (; e + W <= d; e += W) {
                squares += load(a + e) * load(a + e);
                dots += load(a + e) * load(o + e) * load(v + e);
            }
            float total = sum(squares), dot = sum(dots);
            for (; e < d; e++) total += a[e] * a[e], dot += a[e] * o[e] * v[e];
            const float f = 1.f / std::sqrt(total / d + eps), mean = dot * f * f * f / d;
            for (long e = 0; e < d; e++) o[e] = o[e] * v[e] * f - a[e] * mean;
        }
}

// silu(gate) up: rows of 2 M, gate first -> (T, M).
void swiglu(const float* x, float* y, long T, long M) {
#pragma omp parallel for
    for (long i = 0; i < T; i++) {
        const float *a = x + i * 2 * M, *b = a + M;
        long c = 0;
        for (; c + W <= M; c += W) store(y + i * M + c, load(a + c) / (exp16(-load(a + c)) + 1.f) * load(b + c));
        for (; c < M; c++) y[i * M + c] = a[c] / (std::exp(-a[c]) + 1.f) * b[c];
    }
}

void swiglu_backward(const float* dy, const float* x, float* dx, long T, long M) {
#pragma omp parallel for
    for (long i = 0; i < T; i++) {
        const float *a = x + i * 2 * M, *b = a + M, *g = dy + i * M;
        float *da = dx + i * 2 * M, *db = da + M;
        long c = 0;
        for (; c + W <= M; c += W) {
            const vec s = 1.f / (exp16(-load(a + c)) + 1.f), t = load(g + c);
            store(db + c, t * load(a + c) * s);
            store(da + c, t * load(b + c) * s * (load(a + c) * (1.f - s) + 1.f));
        }
        for (; c < M; c++) {
            const float s = 1.f / (std::exp(-a[c]) + 1.f);
            db[c] = g[c] * a[c] * s;
            da[c] = g[c] * b[c] * s * (a[c] * (1.f - s) + 1.f);
        }
    }
}
}
