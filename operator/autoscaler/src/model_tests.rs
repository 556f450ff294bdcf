use super::*;
use crate::dials::{Aim, best, ranges};
use crate::observation::{DialRange, Limits};

fn objectives(itl_of: ItlOf) -> Objectives {
    Objectives {
        good_percent: 99.0,
        ttft_seconds: 2.0,
        ttft_free_prompt_tokens: 1000.0,
        ttft_seconds_per_prompt_token: 1e-3,
        itl_seconds: 0.1,
        itl_of,
    }
}

fn mix(prompt: f64, output: f64, prompt_variation: f64) -> Mix {
    let shape = Mix::UNKNOWN;
    Mix {
        outputs: shape.outputs.map(|tokens| tokens * output / shape.output),
        prompt,
        prompt_variation,
        output,
        output_variation: 0.5,
        context: prompt + output / 2.0,
    }
}

/// The simulated devices: law, KV tokens, ceilings.
fn t4() -> (Law, u64) {
    let law = Law {
        base: 28.45e-3,
        per_kv_token: 0.36e-6,
        per_token: 0.27e-3,
        per_sequence: 0.17e-3,
        hidden: 1.0,
    };
    (law, 69_754)
}

/// The reference study's T4.
const STUDY_T4: Law = Law {
    base: 27.5e-3,
    per_kv_token: 0.36e-6,
    per_token: 0.27e-3,
    per_sequence: 0.2e-3,
    hidden: 1.0,
};

fn h100() -> (Law, u64) {
    let law = Law {
        base: 2.37e-3,
        per_kv_token: 50e-9,
        per_token: 9e-6,
        per_sequence: 10e-6,
        hidden: 0.85,
    };
    (law, 571_986)
}

fn pick((law, kv): (Law, u64), mix: Mix, itl_of: ItlOf) -> (Dials, Capacity) {
    let range = |max| DialRange {
        min: 1,
        max,
        initial: 8,
    };
    let limits = Limits {
        min_replicas: 1,
        idle_seconds: 0.0,
        max_replicas: 4,
        max_num_seqs: range(1024),
        max_num_batched_tokens: range(8192),
        scale_down_stabilization_seconds: 300.0,
    };
    let unbound = Dials {
        max_num_seqs: 0,
        max_num_batched_tokens: 0,
    };
    let model = ReplicaModel::new(law, mix, objectives(itl_of), kv);
    let aim = Aim {
        ranges: ranges(&limits, unbound),
        fleet: 4,
        pressed: false,
    };
    let choice = best(&model, aim, unbound).unwrap();
    assert!(model.keeps(choice.dials));
    (choice.dials, choice.capacity)
}

#[test]
fn a_t4_with_1000_token_prompts_gets_what_the_study_found() {
    for variation in [0.0, 1.0] {
        let (dials, one) = pick(t4(), mix(1000.0, 130.0, variation), ItlOf::Mean);
        let budget = dials.max_num_batched_tokens;
        assert!((224..=320).contains(&budget), "{dials:?}");
        assert!((24..=40).contains(&dials.max_num_seqs), "{dials:?}");
        assert!((0.9..2.5).contains(&one.rate), "{one:?}");
        assert!(one.saturated_rate > one.rate);
    }
}

/// The figures of docs/autoscaling.md.
#[test]
fn the_worked_example() {
    let law = STUDY_T4;
    let mix = Mix {
        outputs: Mix::UNKNOWN.outputs,
        prompt: 1155.0,
        prompt_variation: 0.92,
        output: 211.0,
        output_variation: 0.6,
        context: 1260.0,
    };
    let dials = Dials {
        max_num_seqs: 44,
        max_num_batched_tokens: 288,
    };
    let model = ReplicaModel::new(law, mix, objectives(ItlOf::Mean), 60_000);
    let operation = model.operation(15.0, 288).unwrap();
    let misses = model.missed(&operation, dials, 4);
    let one = model.capacity(dials, 4).unwrap();
    let figures = [
        format!("takes {:.1} ms, a full one", 1e3 * operation.decode),
        format!("a full one {:.1} ms", 1e3 * operation.mixed),
        format!("{:.1} % of the steps", 100.0 * operation.mixed_share),
        format!("the mean one takes {:.1} ms", 1e3 * operation.step),
        format!("serves {:.2} requests/s", operation.rate),
        format!(
            "{:.1} ms of full steps",
            1e3 * model.prompt_seconds(&operation, 288)
        ),
        format!("{:.1} % of the requests are expected", 100.0 * misses),
        format!("carries {:.2}/s before", one.rate),
    ];
    let page = include_str!("../../../docs/autoscaling.md");
    let told: String = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let lacks: Vec<&String> = figures.iter().filter(|f| !told.contains(*f)).collect();
    assert!(lacks.is_empty(), "docs/autoscaling.md lacks {lacks:?}");
}

#[test]
fn without_hiding_a_larger_budget_is_worth_its_stalls() {
    let (law, kv) = t4();
    let law = Law { hidden: 0.0, ..law };
    let (dials, _) = pick((law, kv), mix(1000.0, 130.0, 1.0), ItlOf::Mean);
    assert!(dials.max_num_batched_tokens >= 448, "{dials:?}");
}

#[test]
fn the_strict_objective_bounds_every_step() {
    for (prompt, output) in [(200.0, 100.0), (1000.0, 130.0), (4000.0, 300.0)] {
        for device in [t4(), h100()] {
            let mix = mix(prompt, output, 1.0);
            let (dials, _) = pick(device, mix, ItlOf::P95);
            let model = ReplicaModel::new(device.0, mix, objectives(ItlOf::P95), device.1);
            let full = model.step_seconds(
                f64::from(dials.max_num_seqs),
                f64::from(dials.max_num_batched_tokens),
            );
            assert!(full <= 0.1, "{dials:?}: {full}");
        }
    }
}

#[test]
fn larger_devices_get_larger_caps_and_carry_more() {
    for (prompt, output) in [(200.0, 100.0), (1000.0, 130.0), (4000.0, 300.0)] {
        let mix = mix(prompt, output, 1.0);
        let (small, one) = pick(t4(), mix, ItlOf::Mean);
        let (large, other) = pick(h100(), mix, ItlOf::Mean);
        println!("{prompt} + {output}: T4 {small:?} {one:?}; H100 {large:?} {other:?}");
        assert!(large.max_num_seqs > 2 * small.max_num_seqs);
        assert!(other.rate > 10.0 * one.rate);
    }
}

/// Below what a replica is worth at least, dials are still told apart by what they really carry.
#[test]
fn very_long_prompts_get_the_budget_that_carries_most_of_them() {
    let law = STUDY_T4;
    let (dials, one) = pick((law, 60_000), mix(6300.0, 250.0, 0.5), ItlOf::Mean);
    let model = ReplicaModel::new(
        law,
        mix(6300.0, 250.0, 0.5),
        objectives(ItlOf::Mean),
        60_000,
    );
    let small = Dials {
        max_num_seqs: model.cap(160, 1024),
        max_num_batched_tokens: 160,
    };
    let other = model.capacity(small, 4).unwrap();
    assert!(
        !other.keeps && other.kept_rate < other.rate,
        "{other:?}: taken for more than it carries"
    );
    assert!(
        one.kept_rate > 1.1 * other.kept_rate,
        "{dials:?} {one:?}: no better than {other:?}"
    );
}

#[test]
fn kv_memory_bounds_the_cap() {
    let (law, _) = t4();
    let mix = mix(1000.0, 1000.0, 0.0);
    let model = ReplicaModel::new(law, mix, objectives(ItlOf::Mean), 15_000);
    assert_eq!(model.cap(512, 256), 9);
    assert_eq!(model.cap(512, 4), 4);
}

#[test]
fn an_objective_below_the_base_is_hopeless_and_says_so() {
    let (law, kv) = t4();
    let hard = Objectives {
        itl_seconds: 0.02,
        ..objectives(ItlOf::Mean)
    };
    let model = ReplicaModel::new(law, mix(200.0, 100.0, 0.0), hard, kv);
    assert_eq!(model.cap(288, 256), 0);
}

#[test]
fn quantiles_of_the_normal_distribution() {
    for (p, z) in [(0.5, 0.0), (0.05, 1.645), (0.01, 2.326), (0.001, 3.090)] {
        assert!((upper_quantile(p) - z).abs() < 1e-3, "{p}");
    }
}
