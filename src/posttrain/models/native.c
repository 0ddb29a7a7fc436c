/* What lies between the products of a Llama-shaped layer, in float32 on a CPU.

   `native.py` builds it, with WIDTH, the width of a head. It knows no torch: addresses and counts. A row is computed by one
   thread in one order, so that how many threads there are changes no bit. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define HALF (WIDTH / 2)
#define TILE 64

struct attention {
    const float *query, *key, *value; /* [rows, heads * WIDTH]; one row `*_stride` behind the other */
    int64_t query_stride, key_stride, value_stride;
    const float *query_norm, *key_norm; /* [WIDTH], or null */
    const float *cosine, *sine;         /* [rows, WIDTH]; the first half of the sine negated */
    float *own_keys, *own_values;       /* [rows, kv_heads, columns, WIDTH] */
    const int64_t *own;                 /* [rows]: tokens that are there before this one */
    const int64_t *prompt_keys, *prompt_values; /* [rows]: addresses of [kv_heads, prompt_width, WIDTH] */
    const int64_t *prompt_widths, *prompts;     /* [rows]: and how many of them are the prompt's */
    float *out;                                 /* [rows, heads * WIDTH] */
    int64_t rows, heads, kv_heads, columns, window; /* window 0: none */
    int64_t threads;
    float scale, norm_epsilon;
};

/* exp of a number up to 88. Source: Cephes' expf. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float inverse_rms(const float *x, int64_t width, float epsilon)
{
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; d++)
        sum += x[d] * x[d];
    return 1.0f / sqrtf(sum / (float)width + epsilon);
}

/* One head in its position, normed before where the model does that. */
static inline void turn(const float *head, const float *norm, float epsilon, const float *cosine, const float *sine, float *out)
{
    float x[WIDTH], by = norm ? inverse_rms(head, WIDTH, epsilon) : 1.0f;
    for (int d = 0; d < WIDTH; d++)
        x[d] = norm ? head[d] * by * norm[d] : head[d];
    for (int d = 0; d < HALF; d++) {
        out[d] = x[d] * cosine[d] + x[d + HALF] * sine[d];
        out[d + HALF] = x[d + HALF] * cosine[d + HALF] + x[d] * sine[d + HALF];
    }
}

struct seen {
    float most, sum, out[WIDTH];
};

/* More keys of one query, tile by tile; what was seen shrinks where a score is larger than all before. */
static void look(struct seen *seen, const float *query, const float *keys, const float *values, int64_t count)
{
    for (int64_t first = 0; first < count; first += TILE) {
        int n = count - first < TILE ? (int)(count - first) : TILE;
        float score[TILE], most = seen->most, sum = 0.0f;
        for (int j = 0; j < n; j++) {
            const float *key = keys + (first + j) * WIDTH;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int d = 0; d < WIDTH; d++)
                dot += query[d] * key[d];
            score[j] = dot;
            most = dot > most ? dot : most;
        }
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < n; j++) {
            score[j] = exponential(score[j] - most);
            sum += score[j];
        }
        float shrink = exponential(seen->most - most);
        float out[WIDTH];
        for (int d = 0; d < WIDTH; d++)
            out[d] = seen->out[d] * shrink;
        for (int j = 0; j < n; j++) {
            const float *value = values + (first + j) * WIDTH;
            for (int d = 0; d < WIDTH; d++)
                out[d] += score[j] * value[d];
        }
        memcpy(seen->out, out, sizeof out);
        seen->sum = seen->sum * shrink + sum;
        seen->most = most;
    }
}

/* The queries that share one head of keys and values, in one row. */
static void attend_head(const struct attention *a, int64_t row, int64_t head)
{
    int64_t group = a->heads / a->kv_heads, own = a->own[row], prompt = a->prompts[row];
    int64_t hidden = a->window && prompt + own + 1 > a->window ? prompt + own + 1 - a->window : 0;
    int64_t before = hidden < prompt ? hidden : prompt, after = hidden - before;
    int64_t lane = (row * a->kv_heads + head) * a->columns * WIDTH;
    float *keys = a->own_keys + lane, *values = a->own_values + lane;
    int64_t place = head * a->prompt_widths[row] * WIDTH;
    const float *prompt_keys = (const float *)a->prompt_keys[row] + place;
    const float *prompt_values = (const float *)a->prompt_values[row] + place;
    const float *cosine = a->cosine + row * WIDTH, *sine = a->sine + row * WIDTH;

    turn(a->key + row * a->key_stride + head * WIDTH, a->key_norm, a->norm_epsilon, cosine, sine, keys + own * WIDTH);
    memcpy(values + own * WIDTH, a->value + row * a->value_stride + head * WIDTH, WIDTH * sizeof(float));
    for (int64_t g = head * group; g < (head + 1) * group; g++) {
        float query[WIDTH], *out = a->out + (row * a->heads + g) * WIDTH;
        struct seen seen = {-INFINITY, 0.0f, {0}};
        turn(a->query + row * a->query_stride + g * WIDTH, a->query_norm, a->norm_epsilon, cosine, sine, query);
        for (int d = 0; d < WIDTH; d++)
            query[d] *= a->scale;
        look(&seen, query, prompt_keys + before * WIDTH, prompt_values + before * WIDTH, prompt - before);
        look(&seen, query, keys + after * WIDTH, values + after * WIDTH, own + 1 - after);
        for (int d = 0; d < WIDTH; d++)
            out[d] = seen.out[d] / seen.sum;
    }
}

/* Norm and turn, keep the new key and value, attend to prompt and own tokens. Head by head: rows of one prompt find its keys in the cache. */
void attend(const struct attention *a)
{
#pragma omp parallel for num_threads(a->threads) if (a->threads > 1)
    for (int64_t n = 0; n < a->rows * a->kv_heads; n++)
        attend_head(a, n % a->rows, n / a->rows);
}

/* Heads in their positions: [rows, heads * WIDTH], one row `stride` behind the other, to the same without a gap. */
void turn_heads(const float *x, int64_t stride, const float *norm, const float *cosine, const float *sine, float *out, int64_t rows, int64_t heads, float epsilon, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            turn(x + row * stride + head * WIDTH, norm, epsilon, cosine + row * WIDTH, sine + row * WIDTH, out + (row * heads + head) * WIDTH);
}

/* x += update, where there is one; out = norm(x) * weight. */
void add_and_norm(float *x, const float *update, const float *weight, float *out, int64_t rows, int64_t width, float epsilon, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float *own = x + row * width, *to = out + row * width;
        if (update)
            for (int64_t d = 0; d < width; d++)
                own[d] += update[row * width + d];
        float by = inverse_rms(own, width, epsilon);
        for (int64_t d = 0; d < width; d++)
            to[d] = own[d] * by * weight[d];
    }
}

/* out = silu(gate) * up */
void swiglu(const float *gate, int64_t gate_stride, const float *up, int64_t up_stride, float *out, int64_t rows, int64_t width, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t d = 0; d < width; d++) {
            float g = gate[row * gate_stride + d];
            out[row * width + d] = g / (1.0f + exponential(-g)) * up[row * up_stride + d];
        }
}
