"""What the benches on the local cluster share: tools, simulated services, and load."""
import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "target" / "cluster" / "bin"
WORK = ROOT / "target" / "bench"
TRACE = ROOT / "tests" / "traces" / "azure_llm_2023_conv.csv"
RESULTS = ROOT / "docs" / "results"
# The default objectives, as stoker-bench judges answers by them.
GOODPUT = "ttft:2000+1/1000,tpot:100"


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **options)


# The benches have a cluster of their own, whatever the caller's kubectl talks to.
os.environ["KUBECONFIG"] = run(TOOLS / "local-cluster", "kubeconfig", capture_output=True, text=True).stdout.strip()


def kubectl(*arguments, **options):
    return run(TOOLS / "kubectl", *arguments, capture_output=True, text=True, **options).stdout


def install_chart(*values):
    run(TOOLS / "helm", "upgrade", "--install", "stoker", "charts/stoker", "--namespace", "stoker-system",
        "--create-namespace", "--wait", "--timeout", "3m", *values, stdout=subprocess.DEVNULL)


def wait_for(what, seconds, ask):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ask():
            return
        time.sleep(0.25)
    raise SystemExit(f"not within {seconds} s: {what}")


@contextlib.contextmanager
def namespace(name):
    """A namespace for the time of a bench."""
    WORK.mkdir(parents=True, exist_ok=True)
    subprocess.run([TOOLS / "kubectl", "create", "namespace", name], capture_output=True)
    try:
        yield
    finally:
        kubectl("delete", "namespace", name)


class Service:
    """An InferenceService on simulated T4 GPUs."""

    def __init__(self, namespace, spec):
        self.where = ["-n", namespace]
        manifest = {
            "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService",
            "metadata": {"name": "llama-3b", "namespace": namespace},
            "spec": {
                "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
                **spec,
                "engine": {"device": "simulated", "simulatedProfile": "t4", **spec.get("engine", {})},
            },
        }
        kubectl("apply", "-f", "-", input=json.dumps(manifest))

    def status(self):
        return json.loads(kubectl("get", "infsvc", "llama-3b", *self.where, "-o", "json")).get("status", {})

    def wait_for_replicas(self, count):
        wait_for(f"{count} ready replicas", 180, lambda: self.status().get("readyReplicas") == count)

    def load(self, name, *arguments):
        """Starts stoker-bench; its report goes to WORK/NAME.json."""
        address = kubectl("get", "service", "llama-3b", *self.where, "-o", "jsonpath={.spec.clusterIP}")
        program = ROOT / "target" / "release" / "stoker-bench"
        command = [program, "load", "--url", f"http://{address}", "--goodput", GOODPUT, "--json", report_path(name)]
        return subprocess.Popen([str(part) for part in [*command, *arguments]], stdout=subprocess.DEVNULL)

    def delete(self):
        kubectl("delete", "infsvc", "llama-3b", *self.where)
        pods = lambda: kubectl("get", "pods", *self.where, "-o", "name").strip()
        wait_for("the pods are gone", 180, lambda: not pods())


def report_path(name):
    return WORK / f"{name}.json"


def report(load, name):
    """What a load that `Service.load` started came to."""
    if load.wait() != 0:
        raise SystemExit("the load generator failed")
    return json.loads(report_path(name).read_text())["runs"][0]
