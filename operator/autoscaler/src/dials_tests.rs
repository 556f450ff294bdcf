use super::*;
use crate::mix::Mix;
use crate::observation::{ItlOf, Objectives};
use stoker_law::Law;

const CAPS: DialRange = DialRange {
    min: 1,
    max: 256,
    initial: 32,
};
const BUDGETS: DialRange = DialRange {
    min: 64,
    max: 8192,
    initial: 2048,
};

/// The simulated T4 under a chat's requests.
fn t4() -> ReplicaModel {
    let law = Law {
        base: 28.45e-3,
        per_kv_token: 0.36e-6,
        per_token: 0.27e-3,
        per_sequence: 0.17e-3,
        hidden: 1.0,
    };
    let objectives = Objectives {
        good_percent: 99.0,
        ttft_seconds: 2.0,
        ttft_free_prompt_tokens: 1000.0,
        ttft_seconds_per_prompt_token: 1e-3,
        itl_seconds: 0.1,
        itl_of: ItlOf::Mean,
    };
    let mix = Mix {
        prompt: 1100.0,
        output: 220.0,
        context: 1210.0,
        ..Mix::UNKNOWN
    };
    ReplicaModel::new(law, mix, objectives, 69_754)
}

/// The cap at a look every 2 s for so many seconds, from one that was set at second 0.
fn caps(first: u32, budget: u32, seconds: u32) -> Vec<u32> {
    let aim = Aim {
        ranges: (CAPS, BUDGETS),
        fleet: 3,
        pressed: false,
    };
    let mut motion = Motion {
        cap: Some((0.0, true)),
        ..Motion::default()
    };
    let mut dials = Dials {
        max_num_seqs: first,
        max_num_batched_tokens: budget,
    };
    let looks = (2..=seconds).step_by(2).map(|second| {
        let look = Look {
            peak: 16,
            may_search: true,
            now: f64::from(second),
        };
        dials = settled(&t4(), aim, dials, look, &mut motion).unwrap().dials;
        dials.max_num_seqs
    });
    looks.collect()
}

#[test]
fn where_a_cap_began_doesnt_decide_where_it_stays() {
    let model = t4();
    let aim = Aim {
        ranges: (CAPS, BUDGETS),
        fleet: 3,
        pressed: false,
    };
    let anywhere = Dials {
        max_num_seqs: 32,
        max_num_batched_tokens: 2048,
    };
    let best = best(&model, aim, anywhere).unwrap().dials;
    for share in [0.82, 0.95, 1.05, 1.24] {
        let first = (f64::from(best.max_num_seqs) * share) as u32;
        let caps = caps(first, best.max_num_batched_tokens, 120);
        // Law and mix are young: a small move would go back with the next look.
        assert!(caps[..29].iter().all(|cap| *cap == first), "{caps:?}");
        let last = f64::from(caps[caps.len() - 1]);
        let off = (last / f64::from(best.max_num_seqs) - 1.0).abs();
        assert!(off <= TRIMMED_FROM, "{caps:?}, best {best:?}");
    }
}
