//! What a pod is up to, in words that help at night.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};
use kube::ResourceExt;
use stoker_api::conditions::reasons;
use stoker_api::names;

use crate::scaling::{self, PodOutlook};

/// Waiting reasons of the kubelet that mean that the image can't be had.
const IMAGE_REASONS: [&str; 7] = [
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
    "ImageInspectError",
    "SignatureValidationFailed",
];
/// Waiting reasons that mean that the container can't be made or started.
const CONFIG_REASONS: [&str; 4] = [
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "PreStartHookError",
];
/// A container that ended sooner than this after its start, time and again, is in a crash loop.
const SHORT_RUN_SECONDS: i64 = 60;
/// A container that crashed before counts as crashing until it has run this long.
const TRIAL_SECONDS: i64 = 10;
/// Of a container's last words.
const MAX_WORDS: usize = 700;

/// Ordered by how much it needs a person.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodState {
    Answering,
    /// Told to go.
    Leaving,
    /// On its way, no trouble known.
    Starting {
        message: String,
    },
    Loading {
        percent: i32,
        eta_seconds: Option<i32>,
        message: String,
    },
    /// The kubelet calls it ready, but it doesn't answer.
    Silent {
        message: String,
    },
    /// The scheduler has no node for it; its words.
    NoNode {
        words: String,
    },
    /// Won't come up by itself; one of [`reasons`].
    Stuck {
        reason: &'static str,
        message: String,
    },
}

impl PodState {
    /// The reason and message that this pod gives for a service not being ready.
    pub fn trouble(&self, accelerator: Option<&str>) -> Option<(&'static str, String)> {
        match self {
            PodState::Answering | PodState::Leaving => None,
            PodState::Starting { message } => Some((reasons::STARTING, message.clone())),
            PodState::Loading { message, .. } => Some((reasons::MODEL_LOADING, message.clone())),
            PodState::Silent { message } => Some((reasons::NO_REPLICA_ANSWERS, message.clone())),
            PodState::NoNode { words } => Some((no_node_reason(words, accelerator), words.clone())),
            PodState::Stuck { reason, message } => Some((reason, message.clone())),
        }
    }
}

/// Why the scheduler found no node, by its own words.
pub fn no_node_reason(words: &str, accelerator: Option<&str>) -> &'static str {
    match accelerator {
        Some(resource) if words.contains(&format!("Insufficient {resource}")) => {
            reasons::WAITING_FOR_ACCELERATOR
        }
        _ => reasons::UNSCHEDULABLE,
    }
}

pub fn diagnose(pod: &Pod, outlook: Option<&PodOutlook>, now: Timestamp) -> PodState {
    let name = pod.name_any();
    if pod.metadata.deletion_timestamp.is_some() {
        return PodState::Leaving;
    }
    if scaling::is_ready(pod) {
        return match outlook.and_then(|outlook| outlook.silent.as_ref()) {
            None => PodState::Answering,
            Some(error) => PodState::Silent {
                message: format!("pod {name} is ready by its probes but does not answer: {error}"),
            },
        };
    }
    let scheduled = scaling::condition(pod, "PodScheduled").filter(|c| c.status == "False");
    if let Some(condition) = scheduled {
        let words = condition.message.clone();
        return PodState::NoNode {
            words: words.unwrap_or_else(|| condition.reason.clone().unwrap_or_default()),
        };
    }
    let status = pod.status.as_ref();
    let first = status.and_then(|s| s.init_container_statuses.as_ref());
    if let Some(stuck) = first
        .into_iter()
        .flatten()
        .find_map(|s| init_failure(&name, s, now))
    {
        return stuck;
    }
    let statuses = status.and_then(|s| s.container_statuses.as_ref());
    let server = statuses
        .into_iter()
        .flatten()
        .find(|s| s.name == names::SERVER_CONTAINER);
    let Some(server) = server else {
        let message = format!("pod {name} is being set up on its node");
        return PodState::Starting { message };
    };
    if let Some(stuck) = stuck(&name, server, now) {
        return stuck;
    }
    if let Some(outlook) = outlook
        && let Some(percent) = outlook.loading_percent
    {
        let eta = outlook.loading_eta_seconds;
        let left = eta.map_or(String::new(), |s| format!(", about {s} s left"));
        return match percent {
            100 => PodState::Starting {
                message: format!("pod {name} has loaded the model and is about to be ready"),
            },
            _ => PodState::Loading {
                percent,
                eta_seconds: eta,
                message: format!("pod {name} has loaded {percent} % of the model{left}"),
            },
        };
    }
    PodState::Starting {
        message: starting(&name, server),
    }
}

/// An init container that ended well is over.
fn init_failure(name: &str, container: &ContainerStatus, now: Timestamp) -> Option<PodState> {
    let ended = container.state.as_ref().and_then(|s| s.terminated.as_ref());
    match ended {
        Some(ended) if ended.exit_code == 0 => None,
        _ => stuck(name, container, now),
    }
}

fn stuck(name: &str, server: &ContainerStatus, now: Timestamp) -> Option<PodState> {
    let state = server.state.as_ref();
    let waiting = state.and_then(|state| state.waiting.as_ref());
    let why = waiting
        .and_then(|w| w.reason.as_deref())
        .unwrap_or_default();
    let words = waiting
        .and_then(|w| w.message.as_deref())
        .unwrap_or_default();
    let told = |reason| {
        let message = format!("pod {name}: {why}: {}", last_words(words));
        Some(PodState::Stuck { reason, message })
    };
    if IMAGE_REASONS.contains(&why) {
        return told(reasons::IMAGE_PULL_FAILED);
    }
    if CONFIG_REASONS.contains(&why) {
        return told(reasons::CONTAINER_CONFIG_ERROR);
    }
    let now_ended = state.and_then(|state| state.terminated.as_ref());
    let before = server
        .last_state
        .as_ref()
        .and_then(|s| s.terminated.as_ref());
    let ended = now_ended.or(before)?;
    let running_since = state
        .and_then(|state| state.running.as_ref())
        .and_then(|running| running.started_at.as_ref());
    let on_trial = running_since.is_none_or(|t| now.as_second() - t.0.as_second() < TRIAL_SECONDS);
    let looping = why == "CrashLoopBackOff"
        || (server.restart_count >= 2 && on_trial && run_seconds(ended) < SHORT_RUN_SECONDS)
        || now_ended.is_some();
    looping.then(|| PodState::Stuck {
        reason: match ended.reason.as_deref() {
            Some("OOMKilled") => reasons::OUT_OF_MEMORY,
            _ if ended.exit_code == names::DEVICE_EXIT_CODE => reasons::DEVICE_UNUSABLE,
            _ => reasons::CRASH_LOOP,
        },
        message: crash(name, server, ended),
    })
}

fn crash(name: &str, server: &ContainerStatus, ended: &ContainerStateTerminated) -> String {
    let code = ended.exit_code;
    let how = match ended.reason.as_deref() {
        Some("OOMKilled") => {
            "was killed for using more memory than resources.limits.memory".to_owned()
        }
        Some("Error") | None => format!("ended with exit code {code}"),
        Some(reason) => format!("ended with exit code {code} ({reason})"),
    };
    let restarts = match server.restart_count {
        0 => String::new(),
        1 => " after 1 restart".to_owned(),
        n => format!(" after {n} restarts"),
    };
    let words = last_words(ended.message.as_deref().unwrap_or_default());
    match words.is_empty() {
        true => format!("pod {name} {how}{restarts}; kubectl logs {name} --previous may say why"),
        false => format!("pod {name} {how}{restarts}: {words}"),
    }
}

fn starting(name: &str, server: &ContainerStatus) -> String {
    let state = server.state.as_ref();
    if let Some(waiting) = state.and_then(|state| state.waiting.as_ref()) {
        return match waiting.reason.as_deref() {
            Some("ContainerCreating") | None => format!(
                "pod {name} is being created on its node: image and volumes (events: kubectl describe \
                 pod {name})"
            ),
            Some(reason) => format!("pod {name}: {reason}"),
        };
    }
    let before = server
        .last_state
        .as_ref()
        .and_then(|s| s.terminated.as_ref());
    match before {
        Some(ended) => format!("restarted: {}", crash(name, server, ended)),
        None => format!("pod {name} runs and is not ready yet"),
    }
}

fn run_seconds(ended: &ContainerStateTerminated) -> i64 {
    match (&ended.started_at, &ended.finished_at) {
        (Some(start), Some(end)) => end.0.as_second() - start.0.as_second(),
        _ => 0,
    }
}

/// The end of a text, on one line: what a process said last says why it went. Where it names its
/// error, as stoker-server and most programs do, the log before that only repeats it.
fn last_words(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    let error = lines.iter().rposition(|line| line.starts_with("error: "));
    let joined = lines
        .get(error.unwrap_or(0)..)
        .unwrap_or_default()
        .join(" | ");
    match joined.char_indices().rev().nth(MAX_WORDS) {
        None => joined,
        Some((at, c)) => format!("…{}", &joined[at + c.len_utf8()..]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOW: i64 = 1_767_225_600;

    fn pod(conditions: Value, server: Value) -> Pod {
        let mut server = server;
        if server.is_object() {
            server["name"] = json!("server");
            server["image"] = json!("i");
            server["imageID"] = json!("");
            server["ready"] = json!(false);
            if server.get("restartCount").is_none() {
                server["restartCount"] = json!(0);
            }
        }
        let statuses = if server.is_object() {
            json!([server])
        } else {
            json!([])
        };
        serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "status": {"conditions": conditions, "containerStatuses": statuses},
        }))
        .unwrap()
    }

    fn at(pod: &Pod, outlook: Option<&PodOutlook>) -> PodState {
        diagnose(pod, outlook, Timestamp::from_second(NOW).unwrap())
    }

    fn stuck(server: Value) -> (&'static str, String) {
        match at(&pod(json!([]), server), None) {
            PodState::Stuck { reason, message } => (reason, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_init_container_that_fails_is_told_and_one_that_is_over_isnt() {
        let with_init = |code: i32| {
            let mut pod = pod(
                json!([]),
                json!({"state": {"waiting": {"reason": "PodInitializing"}}}),
            );
            let ended = json!({"exitCode": code, "reason": "Error",
                "message": "error: the model cache can't be used"});
            let init = json!([{"name": "model-cache", "image": "i", "imageID": "", "ready": false,
                "restartCount": 1, "state": {"terminated": ended}}]);
            let status = pod.status.as_mut().unwrap();
            status.init_container_statuses = serde_json::from_value(init).unwrap();
            at(&pod, None)
        };
        let PodState::Stuck { reason, message } = with_init(1) else {
            panic!("not stuck");
        };
        assert_eq!(reason, "CrashLoop");
        assert!(
            message.contains("the model cache can't be used"),
            "{message}"
        );
        assert!(matches!(with_init(0), PodState::Starting { .. }));
    }

    #[test]
    fn image_and_config_errors_carry_the_kubelets_words() {
        let server = json!({"state": {"waiting": {"reason": "ImagePullBackOff",
            "message": "Back-off pulling image \"nope:1\": not found"}}});
        let (reason, message) = stuck(server);
        assert_eq!(reason, "ImagePullFailed");
        assert!(message.contains("nope:1\": not found"), "{message}");
        let server = json!({"state": {"waiting": {"reason": "CreateContainerConfigError",
            "message": "configmap \"x\" not found"}}});
        assert_eq!(stuck(server).0, "ContainerConfigError");
    }

    #[test]
    fn a_crash_loop_shows_the_last_words_in_every_phase_of_the_loop() {
        let ended = json!({"exitCode": 1, "reason": "Error", "message": "loading\nerror: no such file\n",
            "startedAt": "2025-12-31T23:59:50Z", "finishedAt": "2025-12-31T23:59:51Z"});
        let backing_off = json!({"restartCount": 3, "lastState": {"terminated": ended},
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}});
        let (reason, message) = stuck(backing_off);
        assert_eq!(reason, "CrashLoop");
        assert_eq!(
            message,
            "pod p ended with exit code 1 after 3 restarts: error: no such file"
        );
        let running_again = json!({"restartCount": 3, "lastState": {"terminated": ended},
            "state": {"running": {"startedAt": "2025-12-31T23:59:58Z"}}});
        assert_eq!(stuck(running_again).0, "CrashLoop");
        let ended_now = json!({"restartCount": 0, "state": {"terminated": ended}});
        assert_eq!(stuck(ended_now).0, "CrashLoop");
        let recovering = json!({"restartCount": 1, "lastState": {"terminated": ended},
            "state": {"running": {"startedAt": "2025-12-31T23:59:58Z"}}});
        let state = at(&pod(json!([]), recovering), None);
        assert!(matches!(state, PodState::Starting { message } if message.contains("restarted")));
    }

    #[test]
    fn a_gpu_that_cannot_be_used_is_told_in_the_servers_words() {
        let said = "INFO listening\nERROR exit error=--device cuda: no NVIDIA driver is here\n\
                    error: --device cuda: no NVIDIA driver is here\n";
        let server = json!({"restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 3, "reason": "Error", "message": said}}});
        let (reason, message) = stuck(server);
        assert_eq!(reason, "DeviceUnusable");
        assert_eq!(
            message,
            "pod p ended with exit code 3 after 2 restarts: error: --device cuda: no NVIDIA driver is here"
        );
    }

    #[test]
    fn out_of_memory_names_the_limit() {
        let server = json!({"restartCount": 1,
            "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}});
        let (reason, message) = stuck(server);
        assert_eq!(reason, "OutOfMemory");
        assert!(message.contains("resources.limits.memory"), "{message}");
    }

    #[test]
    fn the_schedulers_words_decide_what_is_waited_for() {
        let words = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.";
        let pod = pod(
            json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}]),
            Value::Null,
        );
        let state = at(&pod, None);
        let gpu = state.trouble(Some("nvidia.com/gpu")).unwrap();
        assert_eq!(gpu, ("WaitingForAccelerator", words.to_owned()));
        assert_eq!(state.trouble(None).unwrap().0, "Unschedulable");
    }

    #[test]
    fn loading_has_a_percentage_and_silence_is_noticed() {
        let running = json!({"state": {"running": {"startedAt": "2025-12-31T23:00:00Z"}}});
        let outlook = PodOutlook {
            loading_percent: Some(42),
            loading_eta_seconds: Some(31),
            silent: None,
        };
        let state = at(&pod(json!([]), running.clone()), Some(&outlook));
        let (reason, message) = state.trouble(None).unwrap();
        assert_eq!(reason, "ModelLoading");
        assert_eq!(
            message,
            "pod p has loaded 42 % of the model, about 31 s left"
        );

        let ready = pod(json!([{"type": "Ready", "status": "True"}]), running);
        assert_eq!(at(&ready, None), PodState::Answering);
        let silent = PodOutlook {
            silent: Some("timed out after 1000 ms".to_owned()),
            ..PodOutlook::default()
        };
        assert!(matches!(at(&ready, Some(&silent)), PodState::Silent { .. }));
    }

    #[test]
    fn last_words_are_the_last_and_bounded() {
        let long = format!("first\n{}\nlast", "é".repeat(2000));
        let words = last_words(&long);
        assert!(words.starts_with('…') && words.ends_with("| last"));
        assert_eq!(words.chars().count(), MAX_WORDS + 1);
    }
}
