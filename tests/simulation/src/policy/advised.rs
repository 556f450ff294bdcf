//! `stoker-advise` as a policy: observations over its stdin, decisions over its stdout.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Map, Value, json};
use stoker_autoscaler::Phase;

use super::action;
use crate::fleet::{Action, Gauge, Policy, ReplicaView, Setup, View};
use crate::flight::Goals;
use crate::replica::Tally;

const PERIOD: f64 = 5.0;

pub struct Advised {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    goals: Goals,
    start: f64,
    /// The newest counters of every replica there ever was.
    tallies: BTreeMap<u32, Tally>,
    /// The first thing that went wrong with the program.
    error: Option<io::Error>,
}

impl Advised {
    /// Starts the program.
    pub fn new(program: &Path, setup: &Setup) -> io::Result<Self> {
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let gone = || io::Error::other("it has no stdin or stdout");
        Ok(Advised {
            input: child.stdin.take().ok_or_else(gone)?,
            output: BufReader::new(child.stdout.take().ok_or_else(gone)?),
            child,
            goals: setup.goals,
            start: setup.starts.warm_seconds,
            tallies: BTreeMap::new(),
            error: None,
        })
    }

    /// Closes its stdin and waits for it to end. What went wrong with it on the way, or now.
    pub fn end(self) -> io::Result<()> {
        let Advised {
            mut child,
            input,
            error,
            ..
        } = self;
        drop(input);
        let status = child.wait()?;
        match error {
            Some(error) => Err(error),
            None if status.success() => Ok(()),
            None => Err(io::Error::other(format!("it ended with {status}"))),
        }
    }

    fn ask(&mut self, view: &View) -> io::Result<Value> {
        for (replica, gauge) in told(view) {
            self.tallies.insert(replica.id, gauge.tally);
        }
        let mut fleet = Value::Null;
        for tally in self.tallies.values() {
            add(&mut fleet, Value::Object(counters(tally)));
        }
        let kv = told(view).next().map_or(0, |(_, gauge)| gauge.kv_capacity);
        let goals = &self.goals;
        let observation = json!({
            "t": view.now,
            "max_num_seqs": view.dials.max_num_seqs,
            "max_num_batched_tokens": view.dials.max_num_batched_tokens,
            "desired": view.desired,
            "min_replicas": view.min_replicas,
            "max_replicas": view.max_replicas,
            "held_at_router": view.held,
            "kv_capacity_tokens": kv,
            "start_s": self.start,
            "goals": {"ttft_s": goals.ttft, "ttft_free_tokens": goals.ttft_free_tokens,
                "ttft_s_per_token": goals.ttft_per_token, "itl_s": goals.itl, "gap_s": goals.gap,
                "timeout_s": goals.timeout},
            "replicas": view.replicas.iter().map(|r| replica(r, view.now)).collect::<Vec<_>>(),
            "fleet": fleet,
        });
        writeln!(self.input, "{observation}")?;
        self.input.flush()?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Policy for Advised {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let answer = match self.ask(view) {
            Ok(answer) => answer,
            Err(error) => {
                self.error.get_or_insert(error);
                Value::Null
            }
        };
        // What is left out stays as it is.
        let field = |name: &str, now: u32| {
            let told = answer.get(name).and_then(Value::as_u64);
            told.and_then(|n| u32::try_from(n).ok()).unwrap_or(now)
        };
        let mut dials = view.dials;
        dials.max_num_seqs = field("max_num_seqs", dials.max_num_seqs);
        dials.max_num_batched_tokens =
            field("max_num_batched_tokens", dials.max_num_batched_tokens);
        action(field("replicas", view.desired), dials)
    }
}

fn told(view: &View) -> impl Iterator<Item = (&ReplicaView, &Gauge)> {
    let replicas = view.replicas.iter();
    replicas.filter_map(|replica| Some((replica, replica.gauge.as_ref()?)))
}

fn replica(replica: &ReplicaView, now: f64) -> Value {
    let state = match replica.phase {
        Phase::Unschedulable | Phase::Starting => "starting",
        Phase::Ready => "ready",
        Phase::Draining => "draining",
    };
    let gauge = replica.gauge.as_ref();
    let mut told = counters(&gauge.map_or_else(Tally::default, |gauge| gauge.tally));
    told.insert("id".into(), json!(replica.id));
    told.insert("state".into(), json!(state));
    told.insert("age_s".into(), json!(now - replica.created));
    told.insert("running".into(), json!(gauge.map_or(0, |g| g.running)));
    told.insert("waiting".into(), json!(gauge.map_or(0, |g| g.waiting)));
    told.insert("kv_use".into(), json!(gauge.map_or(0.0, Gauge::kv_use)));
    told.insert("kv_tokens".into(), json!(gauge.map_or(0, |g| g.kv_tokens)));
    Value::Object(told)
}

fn counters(tally: &Tally) -> Map<String, Value> {
    let told = json!({
        "prompt_tokens": tally.prompt_tokens,
        "generation_tokens": tally.generation_tokens,
        "arrived": tally.received,
        "arrived_prompt_tokens": tally.prompt_tokens_received,
        "finished": tally.finished - tally.timeouts,
        "finished_generation_tokens": tally.generation_length.sum,
        "preemptions": tally.preemptions,
        "timeouts": tally.timeouts,
        "ttft_over_goal": tally.ttft_missed - tally.timeouts,
        "itl_over_goal": tally.itl_missed,
        "ttft_hist": tally.ttft.counts.as_slice(),
        "itl_hist": tally.itl.counts.as_slice(),
        "prompt_hist": tally.prompt_length.counts.as_slice(),
        "gen_hist": tally.generation_length.counts.as_slice(),
        "reg_decode": tally.decodes,
        "reg_prefill": tally.prefills,
    });
    match told {
        Value::Object(told) => told,
        _ => Map::new(),
    }
}

/// Adds number by number.
fn add(sum: &mut Value, more: Value) {
    match (sum, more) {
        (Value::Object(sum), Value::Object(more)) => {
            for (name, value) in more {
                add(sum.entry(name).or_insert(Value::Null), value);
            }
        }
        (Value::Array(sum), Value::Array(more)) => {
            for (sum, value) in sum.iter_mut().zip(more) {
                add(sum, value);
            }
        }
        (sum @ Value::Null, more) => *sum = more,
        (sum, more) => {
            let number = |value: &Value| value.as_f64().unwrap_or(0.0);
            *sum = json!(number(sum) + number(&more));
        }
    }
}
