//! Misses expected of fleets of constant size, and those measured.

use stoker_simulation::policy::Stoker;
use stoker_simulation::{Mix, Score, Setup, Shape, simulate, tuning};

/// Steady loads on fleets of constant size whose dials ours sets, from few to many misses.
pub fn calibrate(setup: &Setup, mix: &Mix, threads: usize) {
    const SIZES: [u32; 4] = [1, 2, 4, 8];
    const LOADS: [f64; 6] = [0.5, 0.7, 0.8, 0.9, 1.0, 1.1];
    let setup = &setup.with_dials(32, 288);
    let cases: Vec<(u32, f64)> = SIZES
        .into_iter()
        .flat_map(|size| LOADS.map(|load| (size, load)))
        .collect();
    let rows = tuning::parallel(&cases, threads, |&(size, load)| {
        let setup = setup.with_replicas(size);
        // The load is told in shares of what a replica says that it carries.
        let run = |rate: f64, seconds: f64| {
            let trace = Shape::Steady.generate(rate * f64::from(size) / 0.7, mix, setup.seed);
            let mut ours = Stoker::new(&setup).with_replicas_held(size);
            let outcome = simulate(&setup, &trace.first(seconds), &mut ours);
            (outcome, ours)
        };
        let (_, probe) = run(0.5, 600.0);
        let carries = probe.outlooks().last().map_or(1.0, |o| o.one_carries);
        let (outcome, ours) = run(load * carries, 3600.0);
        let after = ours.outlooks().len() / 10;
        let outlooks = ours.outlooks().get(after..).unwrap_or(&[]);
        let expected: f64 = outlooks.iter().map(|o| 100.0 - o.good_percent).sum();
        let dials = outcome.timeline.last().map(|point| point.dials);
        let measured = 100.0 - Score::part(&outcome, 360.0, 3600.0).good;
        let flights = outcome.ledger.flights.iter().filter(|f| f.arrival >= 360.0);
        let goals = &outcome.ledger.goals;
        let (late, slow, all) = flights.fold((0.0, 0.0, 0.0), |(late, slow, all), f| {
            let is = |no: bool| f64::from(u8::from(no));
            (
                late + is(!f.meets_ttft(goals)),
                slow + is(!f.meets_itl(goals)),
                all + 1.0,
            )
        });
        let measured = (measured, 100.0 * late / all, 100.0 * slow / all);
        let expected = expected / outlooks.len() as f64;
        (size, load, carries, dials, expected, measured)
    });
    println!(
        "| replicas | load | requests/s each | cap / budget | expected % | measured % | of which late, slow % | ratio |"
    );
    println!("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |");
    for (size, load, carries, dials, expected, (measured, late, slow)) in rows {
        let dials = dials.map_or(String::new(), |d| {
            format!("{} / {}", d.max_num_seqs, d.max_num_batched_tokens)
        });
        println!(
            "| {size} | {load} | {:.2} | {dials} | {expected:.2} | {measured:.2} | {late:.2}, {slow:.2} | {:.2} |",
            load * carries,
            expected / measured
        );
    }
}
