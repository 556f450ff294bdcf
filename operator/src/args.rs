//! Command line and environment.

use std::collections::BTreeSet;

use clap::{Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
#[command(version, about = "Runs InferenceServices on Kubernetes")]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch InferenceServices and run them.
    Run(Box<RunArgs>),
    /// Lead Services straight to their pods: for an uninstallation.
    Release(Place),
    /// Print the CustomResourceDefinitions as YAML.
    Crds,
}

/// Where the operator stands, and what it looks after.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// Namespace of the operator itself: its lease and its key live there.
    #[arg(
        long,
        env = "POD_NAMESPACE",
        default_value = "stoker-system",
        value_name = "NAME"
    )]
    pub namespace: String,

    /// Name of this pod: the holder of the lease.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub pod_name: String,

    /// Namespaces whose InferenceServices are looked after, separated by commas; without it all.
    #[arg(
        long,
        env = "STOKER_WATCH_NAMESPACES",
        value_delimiter = ',',
        value_name = "NAMES"
    )]
    watch_namespaces: Vec<String>,
}

#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub place: Place,

    /// Image of stoker-server for services that name none.
    #[arg(long, env = "STOKER_SERVER_IMAGE", value_name = "IMAGE")]
    pub server_image: String,

    /// When kubelets pull the server's image.
    #[arg(
        long,
        env = "STOKER_IMAGE_PULL_POLICY",
        value_enum,
        default_value = "if-not-present"
    )]
    pub image_pull_policy: PullPolicy,

    /// Base URL of the Hugging Face hub that hf:// sources mean; without it they are refused.
    #[arg(long, env = "STOKER_HUB_ENDPOINT", value_name = "URL")]
    pub hub_endpoint: Option<String>,

    /// Directory of the nodes in which their pods share downloaded models; without it each pod
    /// downloads its own.
    #[arg(long, env = "STOKER_MODEL_CACHE_HOST_PATH", value_name = "PATH")]
    pub model_cache_host_path: Option<String>,

    /// Port of /metrics, /healthz and /readyz.
    #[arg(long, env = "STOKER_METRICS_PORT", default_value_t = 8080)]
    pub metrics_port: u16,

    /// Labels of the routers' pods in the operator's namespace, such as app=router; without it
    /// services have no router.
    #[arg(long, env = "STOKER_ROUTER_SELECTOR", value_name = "SELECTOR")]
    pub router_selector: Option<String>,

    /// Form of the log lines.
    #[arg(long, env = "STOKER_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Kubernetes' own spellings are understood, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PullPolicy {
    #[value(alias = "Always")]
    Always,
    #[value(alias = "IfNotPresent")]
    IfNotPresent,
    #[value(alias = "Never")]
    Never,
}

impl PullPolicy {
    /// As the Kubernetes API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            PullPolicy::Always => "Always",
            PullPolicy::IfNotPresent => "IfNotPresent",
            PullPolicy::Never => "Never",
        }
    }
}

impl Place {
    /// `None` for all namespaces. Blank items come from an empty environment variable.
    pub fn scopes(&self) -> Vec<Option<String>> {
        let names = self.watch_namespaces.iter().map(|name| name.trim());
        let names: BTreeSet<&str> = names.filter(|name| !name.is_empty()).collect();
        match names.is_empty() {
            true => vec![None],
            false => names
                .into_iter()
                .map(|name| Some(name.to_owned()))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_args(more: &[&str]) -> RunArgs {
        let base = ["stoker-operator", "run", "--pod-name=p", "--server-image=i"];
        match Args::parse_from(base.iter().chain(more)).command {
            Command::Run(args) => *args,
            _ => panic!("not run"),
        }
    }

    #[test]
    fn an_empty_list_of_namespaces_is_all_of_them() {
        assert_eq!(run_args(&[]).place.scopes(), [None]);
        assert_eq!(run_args(&["--watch-namespaces="]).place.scopes(), [None]);
        let two = run_args(&["--watch-namespaces=b, a,b"]).place.scopes();
        assert_eq!(two, [Some("a".to_owned()), Some("b".to_owned())]);
    }

    #[test]
    fn pull_policies_go_by_kubernetes_names_as_well() {
        let policy = run_args(&["--image-pull-policy=IfNotPresent"]).image_pull_policy;
        assert_eq!(policy.as_str(), "IfNotPresent");
    }
}
