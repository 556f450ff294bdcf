//! Which pod a scale-down takes: the one with the least work, marked before the count falls.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use stoker_api::names;

use crate::fence::CallError;

/// <https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#pod-deletion-cost>
const ANNOTATION: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Below 0, the cost of every pod without the annotation.
const COST: &str = "-1000";

/// A ready pod of the fleet, as a scale-down sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub uid: String,
    pub name: String,
    /// Seconds since it was marked, and with that out of the router's rotation; `None`: it isn't.
    pub marked_seconds: Option<u64>,
    /// Requests that it runs or holds waiting; `None` when its last scrape failed.
    pub requests: Option<u32>,
    pub ready_seconds: u64,
}

/// The pod to go: one that is already marked, else the one with the fewest requests, and among
/// equals the youngest. A pod whose load is unknown comes last.
pub fn choose_victim(candidates: &[Candidate]) -> Option<&Candidate> {
    let marked = candidates
        .iter()
        .find(|candidate| candidate.marked_seconds.is_some());
    marked.or_else(|| {
        candidates.iter().min_by_key(|candidate| {
            (
                candidate.requests.unwrap_or(u32::MAX),
                candidate.ready_seconds,
                &candidate.uid,
            )
        })
    })
}

/// Reads and writes the mark.
pub struct DeletionCost {
    client: Client,
}

impl DeletionCost {
    pub fn new(client: Client) -> Self {
        DeletionCost { client }
    }

    pub fn is_marked(pod: &Pod) -> bool {
        pod.annotations()
            .get(ANNOTATION)
            .is_some_and(|cost| cost == COST)
    }

    /// Marks the pod, or takes the mark off. The uid makes sure that it is still the same pod.
    pub async fn set(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        marked: bool,
    ) -> Result<(), CallError> {
        let cost = marked.then_some(COST);
        let patch = json!({"metadata": {"uid": uid, "annotations": {ANNOTATION: cost}}});
        let params = PatchParams {
            field_manager: Some(names::FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        Api::<Pod>::namespaced(self.client.clone(), namespace)
            .patch_metadata(name, &params, &Patch::Merge(patch))
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Method;

    use super::*;
    use crate::testing::{answer, body_of, mock_client};

    fn candidate(
        uid: &str,
        marked_seconds: Option<u64>,
        requests: Option<u32>,
        ready_seconds: u64,
    ) -> Candidate {
        Candidate {
            uid: uid.to_owned(),
            name: format!("pod-{uid}"),
            marked_seconds,
            requests,
            ready_seconds,
        }
    }

    #[test]
    fn the_idlest_goes_and_a_mark_is_kept() {
        let mut pods = vec![
            candidate("a", None, Some(4), 10),
            candidate("b", None, Some(1), 900),
            candidate("c", None, Some(1), 30),
            candidate("d", None, None, 5),
        ];
        assert_eq!(choose_victim(&pods).unwrap().uid, "c");
        pods[0].marked_seconds = Some(3);
        assert_eq!(choose_victim(&pods).unwrap().uid, "a");
        assert_eq!(choose_victim(&[]), None);
    }

    #[tokio::test]
    async fn the_mark_is_put_on_the_very_pod() {
        let (client, mut server) = mock_client();
        let marking = tokio::spawn(async move {
            DeletionCost::new(client)
                .set("ns", "pod-a", "uid-a", true)
                .await
        });
        let (request, respond) = server.next_request().await.unwrap();
        assert_eq!(request.method(), Method::PATCH);
        assert!(request.uri().path().ends_with("/namespaces/ns/pods/pod-a"));
        let patch = body_of(request).await;
        assert_eq!(patch["metadata"]["uid"], "uid-a");
        assert_eq!(patch["metadata"]["annotations"][ANNOTATION], COST);
        respond.send_response(answer(200, &patch));
        marking.await.unwrap().unwrap();
    }
}
