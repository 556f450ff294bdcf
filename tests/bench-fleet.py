#!/usr/bin/env python3
"""The same part of the reference trace at 5 replicas behind the routers and at 7 without routers, on
the local cluster, as `make bench-fleet`. Writes docs/results/fleet.json.

Replicas are simulated T4 GPUs, fixed in number (mode Manual); their dials are the operator's. The
trace is one conversation service; TRACE_WINDOW chooses the part, its busiest five minutes otherwise.
"""
import datetime
import json
import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "target" / "cluster" / "bin"
TRACE = ROOT / "tests" / "traces" / "azure_llm_2023_conv.csv"
WINDOW = os.environ.get("TRACE_WINDOW", "1620s..1920s")
GOODPUT = "ttft:2000+1/1000,tpot:100"
NAMESPACE, NAME = "bench-fleet", "llama-3b"
# Load that brings the dials to where they belong, before anything counts.
WARM_UP = "8:20s"


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **options)


def kubectl(*arguments, **options):
    return run(TOOLS / "kubectl", *arguments, capture_output=True, text=True, **options).stdout


def install(router):
    """The chart with or without routers."""
    run(TOOLS / "helm", "upgrade", "--install", "stoker", "charts/stoker", "--namespace", "stoker-system",
        "--create-namespace", "--wait", "--timeout", "3m", "--set", f"router.enabled={json.dumps(router)}",
        stdout=subprocess.DEVNULL)


def manifest(replicas):
    return json.dumps({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {
            "replicas": replicas, "scaling": {"mode": "Manual"},
            "engine": {"device": "simulated", "simulatedProfile": "t4"},
            "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
        },
    })


def wait_for(what, seconds, ask):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ask():
            return
        time.sleep(0.5)
    raise SystemExit(f"not within {seconds} s: {what}")


def load(url, name, *arguments):
    result = ROOT / "target" / "bench" / f"fleet-{name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    run(ROOT / "target" / "release" / "stoker-bench", "load", "--url", url, "--goodput", GOODPUT, "--json", result,
        *arguments)
    return json.loads(result.read_text())["runs"][0]


def measure(router, replicas):
    install(router)
    kubectl("apply", "-f", "-", input=manifest(replicas))
    get = lambda path: kubectl("get", "infsvc", NAME, "-n", NAMESPACE, "-o", f"jsonpath={path}")
    wait_for(f"{replicas} ready replicas", 180, lambda: get("{.status.readyReplicas}") == str(replicas))
    address = kubectl("get", "service", NAME, "-n", NAMESPACE, "-o", "jsonpath={.spec.clusterIP}")
    url, setup = f"http://{address}", "router" if router else "direct"
    load(url, f"{setup}-warm-up", "--ramp", WARM_UP, "--prompt-tokens", "1000", "--max-tokens", "100")
    print(f"== {replicas} replicas, {'with' if router else 'without'} routers, {WINDOW} of the trace", flush=True)
    seen = load(url, setup, "--trace", TRACE, "--trace-window", WINDOW)
    kubectl("delete", "infsvc", NAME, "-n", NAMESPACE)
    wait_for("the pods are gone", 120, lambda: not kubectl("get", "pods", "-n", NAMESPACE, "-o", "name").strip())
    return {
        "replicas": replicas, "requests": seen["requests"], "ok": seen["ok"],
        "good_percent": round(100 * seen["good"] / seen["requests"], 2),
        "ttft_p50_ms": round(1000 * seen["ttft"]["p50"]), "ttft_p99_ms": round(1000 * seen["ttft"]["p99"]),
        "itl_mean_ms": round(1000 * seen["itl"]["mean"], 1),
    }


def main():
    environment = run(TOOLS / "local-cluster", "kubeconfig", capture_output=True, text=True).stdout.strip()
    os.environ["KUBECONFIG"] = environment
    subprocess.run([TOOLS / "kubectl", "create", "namespace", NAMESPACE], capture_output=True)
    try:
        result = {
            "date": datetime.date.today().isoformat(), "trace": TRACE.name, "window": WINDOW, "goodput": GOODPUT,
            "with_router": measure(True, 5), "same_without": measure(False, 5), "without_router": measure(False, 7),
        }
    finally:
        install(True)
        kubectl("delete", "namespace", NAMESPACE)
    (ROOT / "docs" / "results" / "fleet.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'':16}{'replicas':>10}{'good':>10}{'TTFT p50':>12}{'TTFT p99':>12}{'ITL mean':>12}{'failed':>8}")
    for name in ("with_router", "same_without", "without_router"):
        row = result[name]
        print(f"{name:16}{row['replicas']:>10}{row['good_percent']:>8} %{row['ttft_p50_ms']:>9} ms"
              f"{row['ttft_p99_ms']:>9} ms{row['itl_mean_ms']:>9} ms{row['requests'] - row['ok']:>8}")


if __name__ == "__main__":
    main()
