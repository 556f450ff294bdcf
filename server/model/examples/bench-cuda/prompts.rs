//! Steps with prompt tokens.

use serde_json::{Value, json};
use stoker_engine::executor::Row;

use crate::{Bench, CONTEXT, Error, row, step_seconds};

/// Steps of decodes and a prompt chunk, against the larger of the two alone.
pub fn mixed(bench: &Bench) -> Result<Value, Error> {
    let mut executor = bench.executor(64, 2048, 4096, None)?;
    let mut runs = Vec::new();
    println!("mixed  decodes  prompt   alone ms (decodes, prompt)   both ms  of larger");
    for (decodes, prompt) in [(32, 256), (16, 128), (32, 512), (8, 256)] {
        let mut next = 0;
        let mut rows: Vec<Row> = (0..decodes)
            .map(|i| row(i, CONTEXT, 1, &mut next, true))
            .collect();
        let chunk = row(decodes, 0, prompt, &mut next, true);
        let first = step_seconds(&mut executor, &rows, 15)?;
        let second = step_seconds(&mut executor, std::slice::from_ref(&chunk), 15)?;
        rows.push(chunk);
        let both = step_seconds(&mut executor, &rows, 15)?;
        let ratio = both / first.max(second);
        println!(
            "{decodes:14} {prompt:7} {:11.3} {:8.3} {:17.3} {ratio:10.2}",
            first * 1e3,
            second * 1e3,
            both * 1e3
        );
        runs.push(json!({"decodes": decodes, "prompt_tokens": prompt, "of_larger_part": ratio}));
    }
    Ok(runs.into())
}

/// Prompts by themselves, against a large product of cuBLAS (operations a second), if there is one.
pub fn prefill(bench: &Bench, cublas: Option<f64>) -> Result<Value, Error> {
    let mut runs = Vec::new();
    match cublas {
        Some(rate) => println!("cuBLAS, 8192-cube f16: {:.0} TFLOP/s", rate / 1e12),
        None => println!("cuBLAS isn't here"),
    }
    println!("prefill  tokens  chunk       ms   TFLOP/s (products and attention)  of cuBLAS");
    let config = &bench.config;
    let layer = &bench.weights.layers[0];
    let of_layer: usize = layer.matrices().iter().map(|m| m.rows() * m.cols()).sum();
    let matrices = (of_layer * config.layers) as f64;
    for chunk in [2048, 8192] {
        let mut executor = bench.executor(4, chunk, 8448, None)?;
        for tokens in [512, 2048, 8192] {
            let mut seconds = 0.0;
            for start in (0..tokens).step_by(chunk) {
                let mut next = 0;
                let mut part = row(0, start, chunk.min(tokens - start), &mut next, true);
                part.blocks = (0..next).collect();
                seconds += step_seconds(&mut executor, &[part], 7)?;
            }
            let products = 2.0 * matrices * tokens as f64;
            let pairs = (tokens * (tokens + 1) / 2) as f64;
            let attention =
                4.0 * pairs * config.attention.out_width() as f64 * config.layers as f64;
            let rate = (products + attention) / seconds;
            let share = cublas.map(|cublas| rate / cublas);
            println!(
                "{tokens:15} {chunk:6} {:8.2} {:9.1} {:33.1} %",
                seconds * 1e3,
                rate / 1e12,
                share.unwrap_or(0.0) * 100.0
            );
            runs.push(json!({"tokens": tokens, "chunk": chunk, "tflops": rate / 1e12, "of_cublas": share}));
        }
    }
    Ok(runs.into())
}
