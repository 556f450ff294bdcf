//! A small scheduler that drives an executor as the engine does: rows of different sequences in
//! one step, prompts in chunks, one step ahead.

use std::collections::VecDeque;

use stoker_engine::executor::{Executor, InputToken, Row, Sampling, StepBatch, Ticket};

pub const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_p: 1.0,
    top_k: 0,
    seed: 0,
};

#[derive(Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub eos: Vec<u32>,
    pub sampling: Sampling,
}

struct Sequence<'a> {
    request: &'a Request,
    slot: u32,
    blocks: Vec<u32>,
    computed: usize,
    /// Samples asked for, of which `generated` have arrived.
    asked: usize,
    generated: Vec<u32>,
    done: bool,
}

/// Generates for all requests together and gives each one's tokens, the ending one included.
/// `chunk(step, request)` is how many prompt tokens of a request a step takes.
pub fn generate(
    executor: &mut dyn Executor,
    requests: &[Request],
    chunk: impl Fn(usize, usize) -> usize,
) -> Vec<Vec<u32>> {
    let block_size = executor.capacity().block_size as usize;
    let count = requests.len() as u32;
    let mut sequences: Vec<Sequence> = requests
        .iter()
        .zip(0..)
        .map(|(request, i)| {
            let tokens = request.prompt.len() + request.max_tokens;
            Sequence {
                request,
                slot: i + 5,
                // Every sequence's blocks lie scattered between those of the others.
                blocks: (0..tokens.div_ceil(block_size) as u32)
                    .map(|b| b * count + (i + b) % count)
                    .collect(),
                computed: 0,
                asked: 0,
                generated: Vec::new(),
                done: false,
            }
        })
        .collect();
    let mut in_flight: VecDeque<(Ticket, Vec<usize>)> = VecDeque::new();
    for step in 0.. {
        let (mut rows, mut owners) = (Vec::new(), Vec::new());
        for (i, sequence) in sequences.iter_mut().enumerate() {
            rows.extend(
                sequence
                    .next_row(chunk(step, i))
                    .inspect(|_| owners.push(i)),
            );
        }
        let idle = rows.is_empty();
        if !idle {
            let ticket = executor.submit(StepBatch { rows }).unwrap();
            in_flight.push_back((ticket, owners));
        }
        if in_flight.len() == 2 || idle {
            let Some((ticket, owners)) = in_flight.pop_front() else {
                break;
            };
            let output = executor.wait(ticket).unwrap();
            assert_eq!(output.tokens.len(), owners.len());
            for (token, i) in output.tokens.into_iter().zip(owners) {
                if let Some(token) = token {
                    sequences[i].take(token);
                }
            }
        }
    }
    sequences.into_iter().map(|s| s.generated).collect()
}

impl Sequence<'_> {
    fn next_row(&mut self, chunk: usize) -> Option<Row> {
        if self.done || self.asked == self.request.max_tokens {
            return None;
        }
        let prompt = &self.request.prompt;
        let start = self.computed;
        let tokens: Vec<InputToken> = if start < prompt.len() {
            let end = (start + chunk).min(prompt.len());
            prompt[start..end]
                .iter()
                .map(|&t| InputToken::Known(t))
                .collect()
        } else {
            let known = self.generated.get(start - prompt.len());
            vec![known.map_or(InputToken::FromPreviousStep, |&t| InputToken::Known(t))]
        };
        self.computed += tokens.len();
        let sample = (self.computed >= prompt.len()).then_some(self.request.sampling);
        self.asked += usize::from(sample.is_some());
        Some(Row {
            slot: self.slot,
            tokens,
            start: start as u32,
            blocks: self.blocks.clone(),
            sample,
        })
    }

    fn take(&mut self, token: u32) {
        if self.done {
            return;
        }
        self.generated.push(token);
        self.done =
            self.generated.len() == self.request.max_tokens || self.request.eos.contains(&token);
    }
}
