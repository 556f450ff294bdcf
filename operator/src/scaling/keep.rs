//! The policy's memory of each service, kept in a ConfigMap beside it, so that an operator that was
//! restarted goes on with what the one before it had learnt.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::Value;
use stoker_api::{InferenceService, names};
use stoker_autoscaler::Memory;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use crate::fence::CallError;
use crate::resources;

/// Between two writes of one service.
const PERIOD: Duration = Duration::from_secs(60);
/// The first write of each service comes within this time, spread by its uid.
const SPREAD: Duration = Duration::from_secs(30);
/// A write that takes longer is given up until the next one is due: ticks wait for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// Twice what a memory grows to.
const MAX_BYTES: usize = 16 * 1024;

const VERSION_KEY: &str = "version";
const MEMORY_KEY: &str = "memory.json";

/// Reads and writes memories.
pub struct Keeper {
    client: Client,
    recorder: Recorder,
}

/// What is known about the ConfigMap of one service.
#[derive(Default)]
pub struct Place {
    standing: Standing,
    due: Option<Instant>,
    /// What was written last, but for its time.
    written: Option<Value>,
    /// It was said that the name is taken.
    told: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Standing {
    #[default]
    Unknown,
    Absent,
    /// Ours, with its uid: a write can't land on another object of the name.
    Ours(String),
    /// Somebody else's object has the name. It is left alone.
    Foreign,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Unusable {
    #[error("it has no {0}")]
    Lacks(&'static str),
    #[error("its version is {0:?}, and this operator reads version {expected}", expected = Memory::VERSION)]
    Version(String),
    #[error("it has {0} bytes, more than {MAX_BYTES}")]
    TooLarge(usize),
    #[error("it can't be read: {0}")]
    Garbage(String),
}

impl Keeper {
    pub fn new(client: Client, recorder: Recorder) -> Self {
        Keeper { client, recorder }
    }

    /// The memory that an operator before this one stored. One that can't be used is told and passed
    /// over.
    ///
    /// # Errors
    /// When the API server doesn't say whether there is one.
    pub async fn read(
        &self,
        place: &mut Place,
        service: &InferenceService,
    ) -> Result<Option<Memory>, CallError> {
        let found = self.find(place, service).await?;
        let Some(data) = found.and_then(|found| found.data) else {
            return Ok(None);
        };
        Ok(match parse(&data) {
            Ok(memory) => Some(memory),
            Err(why) => {
                let name = names::memory_config_map(&service.name_any());
                let note = format!(
                    "the scaling memory in ConfigMap {name} is not used, and learnt anew: {why}"
                );
                self.tell(service, "MemoryDiscarded", note).await;
                None
            }
        })
    }

    /// Writes the memory where that is due and it has changed.
    pub async fn write(&self, place: &mut Place, service: &InferenceService, memory: &Memory) {
        let uid = service.uid().unwrap_or_default();
        let now = Instant::now();
        let due = *place.due.get_or_insert_with(|| now + first_after(&uid));
        if now < due {
            return;
        }
        place.due = Some(now + PERIOD);
        let Ok(mut content) = serde_json::to_value(memory) else {
            return;
        };
        let text = content.to_string();
        if text.len() > MAX_BYTES {
            warn!(
                bytes = text.len(),
                "the scaling memory is too large to keep"
            );
            return;
        }
        if let Some(fields) = content.as_object_mut() {
            fields.remove("decided_at");
        }
        if place.written.as_ref() == Some(&content) {
            return;
        }
        match timeout(PATIENCE, self.store(place, service, text)).await {
            Ok(Ok(true)) => place.written = Some(content),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                debug!(%error, "could not keep the scaling memory");
                // Whatever there is now is looked at before the next write.
                place.standing = Standing::Unknown;
            }
            Err(_) => debug!("keeping the scaling memory took too long"),
        }
    }

    /// Gives whether it was written.
    async fn store(
        &self,
        place: &mut Place,
        service: &InferenceService,
        text: String,
    ) -> Result<bool, CallError> {
        if matches!(place.standing, Standing::Unknown | Standing::Foreign) {
            self.find(place, service).await?;
        }
        let uid = match &place.standing {
            Standing::Foreign => return Ok(false),
            Standing::Ours(uid) => Some(uid.clone()),
            Standing::Unknown | Standing::Absent => None,
        };
        let api = self.api(service);
        let mut object = build(service, text);
        let written = match uid {
            None => {
                let params = PostParams {
                    field_manager: Some(names::MEMORY_FIELD_MANAGER.to_owned()),
                    ..PostParams::default()
                };
                api.create(&params, &object).await?
            }
            Some(uid) => {
                object.metadata.uid = Some(uid);
                let params = PatchParams::apply(names::MEMORY_FIELD_MANAGER).force();
                let name = object.name_any();
                api.patch(&name, &params, &Patch::Apply(&object)).await?
            }
        };
        place.standing = Standing::Ours(written.uid().unwrap_or_default());
        metrics::counter!("stoker_operator_memory_writes_total").increment(1);
        Ok(true)
    }

    /// The service's ConfigMap, where there is one that is ours.
    async fn find(
        &self,
        place: &mut Place,
        service: &InferenceService,
    ) -> Result<Option<ConfigMap>, CallError> {
        let name = names::memory_config_map(&service.name_any());
        let found = self.api(service).get_opt(&name).await?;
        let ours = |found: &ConfigMap| {
            let owners = found.owner_references();
            owners
                .iter()
                .any(|owner| Some(&owner.uid) == service.metadata.uid.as_ref())
        };
        place.standing = match &found {
            None => Standing::Absent,
            Some(found) if ours(found) => Standing::Ours(found.uid().unwrap_or_default()),
            Some(_) => Standing::Foreign,
        };
        if place.standing == Standing::Foreign {
            let note = format!(
                "ConfigMap {name} is not this service's: it is left alone, and what scaling learns is lost \
                 when the operator restarts"
            );
            if !std::mem::replace(&mut place.told, true) {
                self.tell(service, "MemoryNotKept", note).await;
            }
            return Ok(None);
        }
        Ok(found)
    }

    fn api(&self, service: &InferenceService) -> Api<ConfigMap> {
        let namespace = service.namespace().unwrap_or_default();
        Api::namespaced(self.client.clone(), &namespace)
    }

    async fn tell(&self, service: &InferenceService, reason: &str, note: String) {
        warn!(reason, "{note}");
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(note),
            action: "KeepMemory".to_owned(),
            secondary: None,
        };
        let about: ObjectReference = service.object_ref(&());
        if let Err(error) = self.recorder.publish(&event, &about).await {
            let error = CallError::from(error);
            debug!(reason, %error, "could not publish an event");
        }
    }
}

fn build(service: &InferenceService, text: String) -> ConfigMap {
    let name = service.name_any();
    let uid = service.uid().unwrap_or_default();
    let namespace = service.namespace().unwrap_or_default();
    let mut metadata = resources::owned_meta(&name, &namespace, &uid);
    metadata.name = Some(names::memory_config_map(&name));
    let label = (names::COMPONENT_LABEL, names::MEMORY_COMPONENT);
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(label.0.to_owned(), label.1.to_owned());
    ConfigMap {
        metadata,
        data: Some(BTreeMap::from([
            (VERSION_KEY.to_owned(), Memory::VERSION.to_string()),
            (MEMORY_KEY.to_owned(), text),
        ])),
        ..ConfigMap::default()
    }
}

fn parse(data: &BTreeMap<String, String>) -> Result<Memory, Unusable> {
    let version = data.get(VERSION_KEY).ok_or(Unusable::Lacks(VERSION_KEY))?;
    if *version != Memory::VERSION.to_string() {
        return Err(Unusable::Version(version.chars().take(20).collect()));
    }
    let text = data.get(MEMORY_KEY).ok_or(Unusable::Lacks(MEMORY_KEY))?;
    if text.len() > MAX_BYTES {
        return Err(Unusable::TooLarge(text.len()));
    }
    serde_json::from_str(text).map_err(|error| Unusable::Garbage(error.to_string()))
}

/// When a service's first write is due, so that those of many services don't come together.
fn first_after(uid: &str) -> Duration {
    let mut hasher = DefaultHasher::new();
    uid.hash(&mut hasher);
    Duration::from_millis(hasher.finish() % SPREAD.as_millis() as u64)
}

#[cfg(test)]
#[path = "keep_tests.rs"]
mod tests;
