use stoker_api::{DialsStatus, LoadStatus, LoadingStatus};

use super::*;

fn finding(status: Status, reason: &'static str, message: &str) -> Finding {
    Finding::new(types::READY, status, reason, message)
}

fn base() -> InferenceServiceStatus {
    InferenceServiceStatus {
        conditions: dated(
            &[],
            &[finding(Status::True, reasons::REPLICAS_READY, "1 of 1")],
            Some(1),
        ),
        desired_replicas: Some(1),
        dials: Some(DialsStatus {
            max_num_seqs: 8,
            max_num_batched_tokens: 512,
        }),
        ..InferenceServiceStatus::default()
    }
}

#[test]
fn measured_figures_wait_and_changes_of_state_do_not() {
    let old = base();
    assert_eq!(urgency(&old, &old.clone()), Urgency::Same);
    let mut new = base();
    new.conditions = old.conditions.clone();
    new.load = Some(LoadStatus::default());
    assert_eq!(urgency(&old, &new), Urgency::Calm);
    new.load = Some(LoadStatus {
        running: 20,
        waiting: 4,
        ..LoadStatus::default()
    });
    assert_eq!(urgency(&old, &new), Urgency::Soon);
    let mut steady = new.clone();
    steady.load = Some(LoadStatus {
        running: 22,
        waiting: 5,
        ..LoadStatus::default()
    });
    assert_eq!(urgency(&new, &steady), Urgency::Calm);
    new.dials = Some(DialsStatus {
        max_num_seqs: 9,
        max_num_batched_tokens: 512,
    });
    assert_eq!(urgency(&old, &new), Urgency::Soon);
    new.loading = Some(LoadingStatus {
        phase: "Loading".to_owned(),
        ..LoadingStatus::default()
    });
    assert_eq!(urgency(&old, &new), Urgency::Now);
    let mut scaled = old.clone();
    scaled.desired_replicas = Some(2);
    assert_eq!(urgency(&old, &scaled), Urgency::Now);
    let mut failed = old.clone();
    let crash = finding(Status::False, reasons::CRASH_LOOP, "no such file");
    failed.conditions = dated(&old.conditions, &[crash], Some(1));
    assert_eq!(urgency(&old, &failed), Urgency::Now);
}

#[test]
fn transition_times_move_with_the_status_only() {
    let mut old = dated(
        &[],
        &[finding(Status::False, reasons::STARTING, "a")],
        Some(1),
    );
    old[0].last_transition_time = Time(Timestamp::UNIX_EPOCH);
    let same = dated(
        &old,
        &[finding(Status::False, reasons::CRASH_LOOP, "b")],
        Some(2),
    );
    assert_eq!(same[0].last_transition_time.0, Timestamp::UNIX_EPOCH);
    assert_eq!(same[0].reason, reasons::CRASH_LOOP);
    let other = dated(
        &old,
        &[finding(Status::True, reasons::REPLICAS_READY, "c")],
        Some(2),
    );
    assert!(other[0].last_transition_time.0 > Timestamp::UNIX_EPOCH);
}

#[test]
fn others_conditions_are_not_ours_to_apply() {
    let mut old = dated(
        &[],
        &[finding(Status::True, reasons::REPLICAS_READY, "")],
        None,
    );
    let mut foreign = old[0].clone();
    foreign.type_ = "example.com/Audited".to_owned();
    old.push(foreign);
    let new = dated(&old, &[], None);
    assert_eq!(new.len(), 1);
    assert_eq!(new[0].type_, types::READY);
}
