use stoker_kernels::{
    SamplingParams,
    cuda::{Buffer, NOWHERE, StepSample},
    sample,
};

use crate::support::{Device, Random, device};

fn choose(
    d: &Device,
    logits: &[f32],
    vocab: usize,
    samples: &[StepSample],
) -> (Vec<u32>, Vec<u32>) {
    let values = logits;
    let logits = d.buffer(logits);
    let samples = d.buffer(samples);
    let previous: Buffer<u32> = d.buffer(&vec![NOWHERE; samples.len()]);
    let out: Buffer<u32> = d.buffer(&vec![NOWHERE - 1; samples.len()]);
    // The highest looked for here, then known beforehand.
    let parts = vocab.div_ceil(100);
    let best: Vec<u64> = (values.chunks_exact(vocab))
        .flat_map(|row| row.chunks(100).enumerate())
        .map(|(part, values)| highest(values, part * 100))
        .collect();
    let best = d.buffer(&best);
    let mut answers = [None, Some((best.all(), parts))].map(|best| {
        d.kernels
            .choose(
                &d.stream,
                logits.all(),
                best,
                vocab,
                samples.all(),
                previous.all(),
                out.all(),
            )
            .unwrap();
        out.all().read().unwrap()
    });
    assert_eq!(answers[0], answers[1]);
    (
        std::mem::take(&mut answers[0]),
        previous.all().read().unwrap(),
    )
}

/// The highest of some logits as the head's kernel leaves it: a key that grows with it, and its id.
fn highest(logits: &[f32], first: usize) -> u64 {
    let keys = logits.iter().zip(first as u32..).map(|(v, id)| {
        let bits = (v + 0.0).to_bits();
        let key = if v.is_nan() {
            return 0;
        } else if v.is_sign_negative() && *v != 0.0 {
            !bits
        } else {
            bits | 0x8000_0000
        };
        u64::from(key) << 32 | u64::from(!id)
    });
    keys.max().unwrap_or(0)
}

#[test]
fn tokens_of_small_vocabularies_are_the_cpus() {
    tokens_are_the_cpus(&[1, 5, 300, 4099]);
}

#[test]
fn tokens_of_large_vocabularies_are_the_cpus() {
    tokens_are_the_cpus(&[49152, 128_256]);
}

fn tokens_are_the_cpus(vocabularies: &[usize]) {
    let Some(d) = device("tokens_are_the_cpus") else {
        return;
    };
    let mut random = Random(6);
    let (mut all, mut different) = (0, Vec::new());
    for &vocab in vocabularies {
        for _ in 0..3 {
            let rows = 24;
            // Rounded to f16, so that there are ties.
            let logits: Vec<f32> = (0..rows * vocab)
                .map(|_| half::f16::from_f32(random.value() * 8.0).to_f32())
                .collect();
            let params: Vec<SamplingParams> = (0..rows)
                .map(|i| SamplingParams {
                    temperature: [0.0, 0.3, 1.0, 1.7][i % 4],
                    top_p: [1.0, 0.9, 0.5, 0.05, 1.0][random.below(5)],
                    top_k: [0, 1, 2, 40, 1000][random.below(5)],
                    seed: random.next(),
                    position: random.next() % 5000,
                })
                .collect();
            let samples: Vec<StepSample> = params
                .iter()
                .enumerate()
                .map(|(i, p)| StepSample {
                    row: 0,
                    slot: i as u32,
                    out: (rows - 1 - i) as u32,
                    top_k: p.top_k,
                    temperature: p.temperature,
                    top_p: p.top_p,
                    seed: p.seed,
                    position: p.position,
                })
                .collect();
            let (out, previous) = choose(&d, &logits, vocab, &samples);
            for (i, p) in params.iter().enumerate() {
                let expected = sample(&logits[i * vocab..(i + 1) * vocab], p).unwrap();
                assert_eq!(
                    out[rows - 1 - i],
                    previous[i],
                    "what the host and the next step are told"
                );
                all += 1;
                if previous[i] != expected {
                    different.push(format!(
                        "vocabulary {vocab}, {p:?}: {} instead of {expected}",
                        previous[i]
                    ));
                    assert!(p.temperature > 0.0, "greedy: {different:?}");
                }
            }
        }
    }
    // A draw may fall between two tokens where sums are rounded otherwise.
    eprintln!(
        "tokens_are_the_cpus: {all} tokens, {} differ",
        different.len()
    );
    assert!(different.len() * 100 <= all, "{}", different.join("\n"));
}

#[test]
fn greedy_takes_the_first_of_equals_and_nothing_that_is_no_number() {
    let Some(d) = device("greedy") else { return };
    let vocab = 1003;
    let mut logits = vec![-1.0f32; 3 * vocab];
    logits[17] = 3.0;
    logits[600] = 3.0;
    logits[900] = f32::NAN;
    logits[vocab + 1002] = 2.0;
    logits[2 * vocab..].fill(f32::NAN);
    let sample = |i: u32| StepSample {
        slot: i,
        out: i,
        top_p: 1.0,
        ..StepSample::default()
    };
    let (out, _) = choose(&d, &logits, vocab, &[sample(0), sample(1), sample(2)]);
    assert_eq!(out, [17, 1002, u32::MAX]);
    let place = StepSample {
        out: NOWHERE,
        ..sample(0)
    };
    let (out, previous) = choose(&d, &logits, vocab, &[place]);
    assert_eq!(
        (out[0], previous[0]),
        (NOWHERE - 1, NOWHERE),
        "a place that isn't taken"
    );
}
