//! The settings that the reference study names for the recorded trace, beside its figures: nothing is tuned.

use stoker_simulation::policy::Peer;
use stoker_simulation::tuning::{self, Setting};
use stoker_simulation::{Setup, Trace};

/// Hours of the study's oracle on this trace.
const ORACLE: f64 = 4.99;

/// Peer, cap, parameter, good % and replica-hours as multiples of the oracle's: defaults (table B), one setting
/// for three traces (table C), and the settings that are best there.
const NAMED: [(Peer, u32, f64, f64, f64); 37] = [
    (Peer::Kpa, 8, 70.0, 2.0, 1.10),
    (Peer::Kpa, 32, 70.0, 6.0, 0.80),
    (Peer::HpaWaiting, 8, 5.0, 59.0, 6.58),
    (Peer::HpaWaiting, 32, 5.0, 66.0, 5.83),
    (Peer::HpaInflight, 8, 8.0, 98.0, 1.63),
    (Peer::HpaInflight, 32, 32.0, 86.0, 0.84),
    (Peer::KubeAi, 8, 100.0, 2.0, 0.81),
    (Peer::KubeAi, 32, 100.0, 24.0, 0.65),
    (Peer::WvaV1, 8, 5.1, 46.0, 1.49),
    (Peer::WvaV1, 32, 5.1, 61.0, 0.84),
    (Peer::WvaV2, 8, 0.85, 82.0, 2.64),
    (Peer::WvaV2, 32, 0.85, 78.0, 1.15),
    (Peer::AibrixApa, 8, 0.5, 7.0, 0.40),
    (Peer::AibrixApa, 32, 0.5, 97.0, 1.00),
    (Peer::Dynamo, 8, 1.0, 13.0, 1.40),
    (Peer::Dynamo, 32, 1.0, 49.0, 0.88),
    (Peer::RayServe, 8, 2.0, 93.0, 5.15),
    (Peer::RayServe, 32, 2.0, 93.0, 5.16),
    (Peer::ProductionStack, 8, 5.0, 100.0, 2.27),
    (Peer::ProductionStack, 32, 5.0, 99.9, 2.21),
    (Peer::Fixed, 32, 7.0, 99.49, 1.39),
    (Peer::Kpa, 128, 8.0, 99.3, 1.44),
    (Peer::HpaInflight, 32, 12.0, 99.5, 1.26),
    (Peer::KubeAi, 32, 6.0, 99.9, 1.65),
    (Peer::WvaV1, 32, 10.6, 99.78, 1.49),
    (Peer::AibrixApa, 32, 0.2, 99.8, 1.67),
    (Peer::Dynamo, 32, 0.4, 99.9, 2.23),
    (Peer::RayServe, 32, 12.0, 99.2, 1.30),
    (Peer::ProductionStack, 32, 12.0, 99.5, 1.25),
    (Peer::HpaWaiting, 32, 0.2, 95.75, 2.25),
    (Peer::HpaInflight, 32, 14.0, 99.28, 1.17),
    (Peer::KubeAi, 32, 10.0, 99.17, 1.21),
    (Peer::WvaV2, 128, 0.2, 99.60, 1.81),
    (Peer::AibrixApa, 32, 0.3, 99.31, 1.32),
    (Peer::Dynamo, 32, 0.6, 99.09, 1.06),
    (Peer::RayServe, 32, 14.0, 99.26, 1.20),
    (Peer::ProductionStack, 32, 14.0, 99.10, 1.16),
];

/// Prints good % and hours of each, here and there.
pub fn print(setup: &Setup, recorded: &Trace, threads: usize) {
    let outcomes = tuning::parallel(&NAMED, threads, |&(peer, max_num_seqs, parameter, _, _)| {
        let setting = Setting {
            peer,
            max_num_seqs,
            max_num_batched_tokens: 2048,
            parameter,
        };
        setting.run(setup, recorded).score
    });
    println!("| policy | setting | good % here | the study's | hours here | the study's | |");
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: |");
    for ((peer, cap, parameter, good, multiple), score) in NAMED.iter().zip(outcomes) {
        let (here, study) = (score.replica_hours, multiple * ORACLE);
        println!(
            "| {} | {cap}, {parameter} | {:.1} | {good:.1} | {here:.2} | {study:.2} | {:+.0} % |",
            peer.name(),
            score.good,
            100.0 * (here / study - 1.0)
        );
    }
}
