//! The blocks in plain loops, one row at a time, as the papers define them. Slow on purpose: what
//! the kernels are compared with.

/// `x / sqrt(mean(x^2) + epsilon) * weight`.
pub fn norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let squares: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    let scale = 1.0 / (squares / x.len() as f64 + f64::from(epsilon)).sqrt();
    x.iter()
        .zip(weight)
        .map(|(&v, &w)| (f64::from(v) * scale) as f32 * w)
        .collect()
}

/// `x * weights^T` for one row; `weights` is `[rows, cols]`, row-major.
pub fn matmul(x: &[f32], weights: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows)
        .map(|r| {
            let row = &weights[r * cols..(r + 1) * cols];
            let products = x
                .iter()
                .zip(row)
                .map(|(&a, &b)| f64::from(a) * f64::from(b));
            products.sum::<f64>() as f32
        })
        .collect()
}

pub fn silu(x: f32) -> f32 {
    let x = f64::from(x);
    (x / (1.0 + (-x).exp())) as f32
}

/// `silu(gate) . up`.
pub fn gated(gate: &[f32], up: &[f32]) -> Vec<f32> {
    gate.iter().zip(up).map(|(&g, &u)| silu(g) * u).collect()
}

/// Rotates the pairs (0, 1), (2, 3), … of a head.
pub fn rope(head: &mut [f32], position: usize, base: f32, factors: Option<&[f32]>) {
    let size = head.len() as f64;
    for (i, pair) in head.chunks_exact_mut(2).enumerate() {
        let factor = factors.map_or(1.0, |f| f64::from(f[i]));
        let angle = position as f64 * f64::from(base).powf(-2.0 * i as f64 / size) / factor;
        let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
        pair[0] = (a * angle.cos() - b * angle.sin()) as f32;
        pair[1] = (a * angle.sin() + b * angle.cos()) as f32;
    }
}

/// Attention of one token to the tokens whose keys and values are given (itself the last; with a
/// sliding window only those within it). A token's keys hold all KV heads side by side, as `query`
/// holds all heads.
pub fn attention(
    query: &[f32],
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    heads: usize,
    kv_heads: usize,
) -> Vec<f32> {
    let size = query.len() / heads;
    let mut out = Vec::with_capacity(query.len());
    for (head, query) in query.chunks_exact(size).enumerate() {
        let at = head / (heads / kv_heads) * size;
        let scores: Vec<f64> = keys
            .iter()
            .map(|key| {
                let products = query.iter().zip(&key[at..at + size]);
                let dot: f64 = products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                dot / (size as f64).sqrt()
            })
            .collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        out.extend((at..at + size).map(|d| {
            let parts = weights.iter().zip(values).map(|(w, v)| w * f64::from(v[d]));
            (parts.sum::<f64>() / total) as f32
        }));
    }
    out
}
