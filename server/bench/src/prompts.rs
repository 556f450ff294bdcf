//! Prompts as token ids, of given lengths, each different.

use std::ops::Range;
use std::str::FromStr;

use anyhow::{Result, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A kind of request: so many prompt tokens, at most so many new ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kind {
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    /// How often it comes, relative to the others.
    pub weight: f64,
}

/// Kinds of requests, as in `200/100:3,2000/50:1`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix(Vec<Kind>);

impl Mix {
    pub fn single(prompt_tokens: u32, max_tokens: u32) -> Self {
        Self(vec![Kind {
            prompt_tokens,
            max_tokens,
            weight: 1.0,
        }])
    }

    fn draw(&self, rng: &mut StdRng) -> Kind {
        let total: f64 = self.0.iter().map(|kind| kind.weight).sum();
        let mut at = rng.random::<f64>() * total;
        for kind in &self.0 {
            at -= kind.weight;
            if at < 0.0 {
                return *kind;
            }
        }
        // Rounding may leave `at` at 0.
        self.0[self.0.len() - 1]
    }
}

impl FromStr for Mix {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let kinds = text.split(',').map(kind).collect::<Result<Vec<_>>>()?;
        Ok(Self(kinds))
    }
}

fn kind(text: &str) -> Result<Kind> {
    let parse = || {
        let (lengths, weight) = text.split_once(':').unwrap_or((text, "1"));
        let (prompt, new) = lengths.split_once('/')?;
        Some(Kind {
            prompt_tokens: prompt.trim().parse().ok().filter(|n| *n > 0)?,
            max_tokens: new.trim().parse().ok().filter(|n| *n > 0)?,
            weight: weight
                .trim()
                .parse()
                .ok()
                .filter(|w| *w > 0.0 && *w < 1e9)?,
        })
    };
    match parse() {
        Some(kind) => Ok(kind),
        None => bail!("{text:?} is not PROMPT_TOKENS/MAX_TOKENS:WEIGHT, such as 200/100:3"),
    }
}

/// A request's prompt and limit.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub ids: Vec<u32>,
    pub max_tokens: u32,
}

/// Makes prompts up. The same seed and number give the same prompt, whoever asks for it.
#[derive(Clone, Debug)]
pub struct Prompts {
    pub mix: Mix,
    /// Where token ids are drawn from.
    pub token_ids: Range<u32>,
    pub seed: u64,
}

impl Prompts {
    pub fn get(&self, number: u64) -> Prompt {
        let mut rng = self.rng(number);
        let kind = self.mix.draw(&mut rng);
        self.made(kind, rng)
    }

    /// A prompt of this kind instead of one of the mix.
    pub fn of(&self, kind: Kind, number: u64) -> Prompt {
        self.made(kind, self.rng(number))
    }

    fn rng(&self, number: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    fn made(&self, kind: Kind, mut rng: StdRng) -> Prompt {
        Prompt {
            ids: (0..kind.prompt_tokens)
                .map(|_| rng.random_range(self.token_ids.clone()))
                .collect(),
            max_tokens: kind.max_tokens,
        }
    }
}

/// A range of token ids, as in `1000..30000`.
pub fn token_ids(text: &str) -> Result<Range<u32>> {
    let range = text
        .split_once("..")
        .and_then(|(from, to)| Some(from.trim().parse().ok()?..to.trim().parse().ok()?));
    match range {
        Some(range) if !range.is_empty() => Ok(range),
        _ => bail!("{text:?} is not a range of token ids, such as 1000..30000"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixes_parse_and_draw_by_weight() {
        let mix: Mix = "200/100:3, 2000/50:1".parse().unwrap();
        let prompts = Prompts {
            mix,
            token_ids: 10..20,
            seed: 1,
        };
        let long = (0..2000)
            .filter(|n| prompts.get(*n).ids.len() == 2000)
            .count();
        assert!(
            (400..600).contains(&long),
            "{long} of 2000 long, expected 500"
        );
        assert_eq!(prompts.get(7).ids, prompts.get(7).ids);
        assert_ne!(prompts.get(7).ids[..50], prompts.get(8).ids[..50]);
        assert!(prompts.get(3).ids.iter().all(|id| (10..20).contains(id)));
        for bad in ["", "200", "0/5", "5/0", "5/5:0", "5/5:x", "5/5:NaN"] {
            assert!(bad.parse::<Mix>().is_err(), "{bad}");
        }
        assert!(token_ids("5..5").is_err());
        assert_eq!(token_ids("5..9").unwrap(), 5..9);
    }
}
