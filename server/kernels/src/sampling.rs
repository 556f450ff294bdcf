//! Choosing the next token from its logits.

use crate::{error::KernelError, tile::Isa, vector};

/// Below this temperature the choice is greedy, as in vLLM.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// Candidates looked at first when only `top_p` limits them: mostly enough.
const FIRST_CANDIDATES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; applied after `top_k`.
    pub top_p: f32,
    /// 0 means no limit.
    pub top_k: u32,
    /// Seed and position together determine the draw.
    pub seed: u64,
    pub position: u64,
}

/// Picks a token. Equal logits go to the lower id; a logit that is not a number is never picked.
pub fn sample(logits: &[f32], params: &SamplingParams) -> Result<u32, KernelError> {
    let best = greedy(logits).ok_or(KernelError::NotANumber {
        vocab: logits.len(),
    })?;
    let max = logits[best];
    if !params.temperature.is_finite()
        || params.temperature < LEAST_TEMPERATURE
        || params.top_k == 1
        || !max.is_finite()
    {
        return Ok(best as u32);
    }
    let mut weights = vec![0.0; logits.len()];
    let scale = 1.0 / params.temperature;
    vector::exp_scaled(Isa::detect(), logits, max, scale, &mut weights);
    for (weight, logit) in weights.iter_mut().zip(logits) {
        if logit.is_nan() || *logit == f32::NEG_INFINITY {
            *weight = 0.0;
        }
    }
    let draw = uniform(params.seed, params.position);
    let top_k = match params.top_k as usize {
        0 => logits.len(),
        k => k.min(logits.len()),
    };
    let unlimited = top_k == logits.len() && params.top_p >= 1.0;
    let picked = if unlimited {
        let all = weights.iter().copied().enumerate();
        walk(all, sum(weights.iter().copied()), draw)
    } else {
        let nucleus = nucleus(&weights, top_k, f64::from(params.top_p));
        let total = sum(nucleus.iter().map(|&i| weights[i as usize]));
        walk(
            nucleus.iter().map(|&i| (i as usize, weights[i as usize])),
            total,
            draw,
        )
    };
    Ok(picked.unwrap_or(best) as u32)
}

/// Index of the highest number; `None` where there is none.
fn greedy(logits: &[f32]) -> Option<usize> {
    let mut best = f32::NEG_INFINITY;
    let mut index = None;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > best {
            (best, index) = (logit, Some(i));
        }
    }
    index
}

/// The heaviest ids, heaviest first: at most `top_k`, and no more than make up `top_p` of the mass
/// of those.
fn nucleus(weights: &[f32], top_k: usize, top_p: f64) -> Vec<u32> {
    let heavier = |a: &u32, b: &u32| {
        let (x, y) = (weights[*a as usize], weights[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..weights.len() as u32).collect();
    let total_of_top_k = |ids: &[u32]| sum(ids.iter().map(|&i| weights[i as usize]));
    if top_k < ids.len() {
        ids.select_nth_unstable_by(top_k - 1, heavier);
        ids.truncate(top_k);
    }
    let wanted = top_p.max(0.0) * total_of_top_k(&ids);
    let mut sorted = 0;
    let mut mass = 0.0;
    let mut size = FIRST_CANDIDATES;
    while sorted < ids.len() {
        let end = size.min(ids.len());
        let rest = &mut ids[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted - 1, heavier);
        }
        ids[sorted..end].sort_unstable_by(heavier);
        for i in sorted..end {
            mass += f64::from(weights[ids[i] as usize]);
            if mass >= wanted {
                ids.truncate(i + 1);
                return ids;
            }
        }
        sorted = end;
        size *= 8;
    }
    ids
}

fn sum(weights: impl Iterator<Item = f32>) -> f64 {
    weights.map(f64::from).sum()
}

/// The first candidate at which the running sum passes `draw` of the total.
fn walk(candidates: impl Iterator<Item = (usize, f32)>, total: f64, draw: f64) -> Option<usize> {
    let target = draw * total;
    let mut running = 0.0;
    let mut last = None;
    for (index, weight) in candidates {
        if weight > 0.0 {
            running += f64::from(weight);
            last = Some(index);
            if running > target {
                break;
            }
        }
    }
    last
}

/// A number in 0..1 from a seed and a position (splitmix64 over both).
fn uniform(seed: u64, position: u64) -> f64 {
    let mixed = mix(mix(seed).wrapping_add(position));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Random;

    fn params(temperature: f32, top_k: u32, top_p: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            top_p,
            top_k,
            seed: 42,
            position: 0,
        }
    }

    /// How often each token is drawn over many positions.
    fn frequencies(logits: &[f32], params: SamplingParams, draws: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            let token = sample(logits, &SamplingParams { position, ..params }).unwrap();
            counts[token as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest_and_skips_what_isnt_a_number() {
        let logits = [1.0, f32::NAN, 3.0, 3.0, f32::NEG_INFINITY];
        assert_eq!(sample(&logits, &params(0.0, 0, 1.0)), Ok(2));
        assert_eq!(
            sample(&[f32::NAN; 3], &params(1.0, 0, 1.0)),
            Err(KernelError::NotANumber { vocab: 3 })
        );
        assert_eq!(sample(&[0.0, f32::INFINITY], &params(1.0, 0, 1.0)), Ok(1));
    }

    #[test]
    fn draws_follow_the_softmax_at_the_temperature() {
        let logits = [0.0, 1.0, 2.0, f32::NAN, f32::NEG_INFINITY];
        let found = frequencies(&logits, params(0.5, 0, 1.0), 20_000);
        let weights = [1.0, 2.0f64.exp(), 4.0f64.exp()];
        let total: f64 = weights.iter().sum();
        for (found, weight) in found.iter().zip(weights) {
            assert!(
                (found - weight / total).abs() < 0.01,
                "{found} for {}",
                weight / total
            );
        }
        assert_eq!(found[3..], [0.0, 0.0]);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let found = frequencies(&logits, params(1.0, 2, 1.0), 20_000);
        assert!(
            (found[0] - 4.0 / 7.0).abs() < 0.01 && found[2] + found[3] == 0.0,
            "{found:?}"
        );
        let found = frequencies(&logits, params(1.0, 0, 0.8), 20_000);
        assert!(
            (found[2] - 2.0 / 9.0).abs() < 0.01 && found[3] == 0.0,
            "{found:?}"
        );
        // After top_k = 3 the masses are 4/9, 3/9, 2/9: 0.75 takes the first two.
        let found = frequencies(&logits, params(1.0, 3, 0.75), 2_000);
        assert!(found[1] > 0.0 && found[2] + found[3] == 0.0, "{found:?}");
    }

    #[test]
    fn the_draw_depends_on_seed_and_position_only() {
        let logits = Random(1).values(1000);
        let at = |seed, position| {
            let params = SamplingParams {
                seed,
                position,
                ..params(1.0, 0, 0.95)
            };
            sample(&logits, &params).unwrap()
        };
        assert_eq!(at(1, 2), at(1, 2));
        let tokens: std::collections::HashSet<u32> = (0..50).map(|p| at(1, p)).collect();
        assert!(tokens.len() > 40);
        assert!((0..50).any(|p| at(1, p) != at(2, p)));
    }

    proptest! {
        #[test]
        fn the_nucleus_is_the_smallest_heaviest_set(
            len in 1usize..2000, top_k in 1usize..2000, top_p in 0.01f64..1.0, seed: u64,
        ) {
            let weights: Vec<f32> = Random(seed).values(len).iter().map(|x| (x * 4.0).exp()).collect();
            let mut expected: Vec<u32> = (0..len as u32).collect();
            expected.sort_by(|a, b| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b)));
            expected.truncate(top_k);
            let total: f64 = expected.iter().map(|&i| f64::from(weights[i as usize])).sum();
            let mut mass = 0.0;
            let count = expected.iter().take_while(|&&i| {
                let before = mass;
                mass += f64::from(weights[i as usize]);
                before < top_p * total
            }).count();
            expected.truncate(count);
            let found = nucleus(&weights, top_k.min(len), top_p);
            // Sums in another order may differ in the last bit right at the edge.
            prop_assert!(found.len().abs_diff(expected.len()) <= 1);
            let shorter = found.len().min(expected.len());
            prop_assert_eq!(&found[..shorter], &expected[..shorter]);
        }
    }
}
