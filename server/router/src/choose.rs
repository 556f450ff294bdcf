//! Which replica gets a request: pure, so that tests and the simulation replay it.

use rand::Rng;
use rand::seq::index;

/// What is known of a replica that may take the request now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Tokens to do with the new request, by this router's own count: prompts not yet computed
    /// and answers not yet generated.
    pub own_tokens: f64,
    /// The same of other routers' requests, from what the replica last reported: stale.
    pub others_tokens: f64,
    /// Prompt tokens of this request that the replica has cached, as far as we know.
    pub cached_tokens: f64,
    pub weight: f64,
    /// It failed this very request before.
    pub tried: bool,
}

impl Candidate {
    /// Tokens to wait for, less what a cached prefix saves: affinity wins until it costs more
    /// waiting than it saves.
    fn score(&self) -> f64 {
        (self.own_tokens + self.others_tokens) / self.weight.max(f64::MIN_POSITIVE)
            - self.cached_tokens
    }
}

/// How replicas are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// All are compared: right while one router sees all load.
    Least,
    /// Two at random (and those with a cached prefix) are compared: several routers that all
    /// took the same least loaded one would pile their requests on it until the next report.
    TwoChoices,
}

/// Index of the candidate to take; None without candidates. Each comes with a number of the
/// caller's.
pub fn choose<N>(
    candidates: &[(N, Candidate)],
    policy: Policy,
    random: &mut impl Rng,
) -> Option<usize> {
    let fresh = candidates.iter().filter(|(_, candidate)| !candidate.tried);
    let all_tried = fresh.count() == 0;
    let eligible = |candidate: &Candidate| all_tried || !candidate.tried;
    let mut pair = [usize::MAX; 2];
    if policy == Policy::TwoChoices && candidates.len() > 2 {
        for (place, picked) in pair
            .iter_mut()
            .zip(index::sample(random, candidates.len(), 2))
        {
            *place = picked;
        }
        if !pair.iter().any(|place| eligible(&candidates[*place].1)) {
            pair = [usize::MAX; 2];
        }
    }
    let everyone = pair[0] == usize::MAX;
    let mut best: Option<(usize, f64)> = None;
    let mut ties = 1;
    for (place, (_, candidate)) in candidates.iter().enumerate() {
        let compared = everyone || pair.contains(&place) || candidate.cached_tokens > 0.0;
        if !compared || !eligible(candidate) {
            continue;
        }
        let score = candidate.score();
        match best {
            Some((_, lowest)) if score > lowest => {}
            Some((_, lowest)) if score == lowest => {
                // Equal ones take turns by chance.
                ties += 1;
                if random.random_ratio(1, ties) {
                    best = Some((place, score));
                }
            }
            _ => {
                ties = 1;
                best = Some((place, score));
            }
        }
    }
    best.map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn replica(own_tokens: f64) -> ((), Candidate) {
        let candidate = Candidate {
            own_tokens,
            others_tokens: 0.0,
            cached_tokens: 0.0,
            weight: 1.0,
            tried: false,
        };
        ((), candidate)
    }

    fn pick(candidates: &[((), Candidate)], policy: Policy) -> Option<usize> {
        choose(candidates, policy, &mut StdRng::seed_from_u64(1))
    }

    #[test]
    fn takes_the_fewest_tokens_to_do() {
        let mut replicas = [replica(500.0), replica(100.0), replica(300.0)];
        assert_eq!(pick(&replicas, Policy::Least), Some(1));
        replicas[1].1.others_tokens = 300.0;
        assert_eq!(pick(&replicas, Policy::Least), Some(2));
        replicas[0].1.weight = 4.0;
        assert_eq!(pick(&replicas, Policy::Least), Some(0));
        assert_eq!(pick(&[], Policy::Least), None);
    }

    #[test]
    fn affinity_holds_while_it_saves_more_than_it_costs() {
        let mut replicas = [replica(900.0), replica(0.0)];
        replicas[0].1.cached_tokens = 1000.0;
        assert_eq!(pick(&replicas, Policy::Least), Some(0));
        replicas[0].1.own_tokens = 1100.0;
        assert_eq!(pick(&replicas, Policy::Least), Some(1));
    }

    #[test]
    fn a_replica_that_failed_the_request_is_the_last_resort() {
        let mut replicas = [replica(0.0), replica(900.0)];
        replicas[0].1.tried = true;
        assert_eq!(pick(&replicas, Policy::Least), Some(1));
        replicas[1].1.tried = true;
        assert_eq!(pick(&replicas, Policy::Least), Some(0));
    }

    #[test]
    fn two_choices_never_take_the_worst_and_see_affinity() {
        let mut replicas: Vec<((), Candidate)> =
            (0..10).map(|n| replica(f64::from(n) * 100.0)).collect();
        let mut random = StdRng::seed_from_u64(7);
        let mut counts = [0; 10];
        for _ in 0..10_000 {
            counts[choose(&replicas, Policy::TwoChoices, &mut random).unwrap()] += 1;
        }
        assert_eq!(counts[9], 0);
        assert!(counts[0] > counts[4] && counts[4] > counts[8], "{counts:?}");
        replicas[9].1.cached_tokens = 5000.0;
        let picked = choose(&replicas, Policy::TwoChoices, &mut random);
        assert_eq!(picked, Some(9));
    }

    #[test]
    fn equal_replicas_share() {
        let replicas = [replica(5.0); 4];
        let mut random = StdRng::seed_from_u64(3);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[choose(&replicas, Policy::Least, &mut random).unwrap()] += 1;
        }
        assert!(
            counts.iter().all(|count| (800..1200).contains(count)),
            "{counts:?}"
        );
    }
}
