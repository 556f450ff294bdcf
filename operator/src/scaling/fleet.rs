use k8s_openapi::api::apps::v1::Deployment;

/// The Deployment's counts, as far as scaling and status need them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    /// The controller has seen the current spec.
    pub observed: bool,
    /// Asked for, created, of the current template, ready.
    pub wanted: u32,
    pub created: u32,
    pub updated: u32,
    pub ready: u32,
}

impl Fleet {
    pub fn of(deployment: &Deployment) -> Self {
        let count = |n: Option<i32>| u32::try_from(n.unwrap_or(0)).unwrap_or(0);
        let status = deployment.status.clone().unwrap_or_default();
        let generation = deployment.metadata.generation;
        Fleet {
            observed: generation.is_some() && status.observed_generation >= generation,
            wanted: count(deployment.spec.as_ref().and_then(|spec| spec.replicas)),
            created: count(status.replicas),
            updated: count(status.updated_replicas),
            ready: count(status.ready_replicas),
        }
    }

    /// All pods are of the current template and as many as asked for, ready or not.
    pub fn settled(&self) -> bool {
        self.observed && self.created == self.wanted && self.updated == self.wanted
    }
}
