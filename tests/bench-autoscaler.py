#!/usr/bin/env python3
"""Three traces of ten minutes, live: the operator, routers and simulated T4 pods of the local cluster
beside what the simulator expects of the same policy, as `make bench-autoscaler`. Writes
docs/results/autoscaler-live.json. SECONDS is for each trace; arguments name traces to run, and the others' rows
stay as they are.
"""
import datetime
import json
import os
import sys
import time

from bench_cluster import (GOODPUT, RESULTS, ROOT, TRACE, WORK, Service, install_chart, kubectl, namespace, report,
                           run)

SECONDS = int(os.environ.get("SECONDS", "600"))
# Seconds that a pod takes to load its model: a start matters in ten minutes, and fits into them.
LOAD_SECONDS = 20
LEAST, MOST = 2, 8
# The first replicas have been ready for so long when the load begins.
LEAD = 30
# A ready replica which is to go is marked, found marked at the next tick 2 s later, and 15 s out of rotation.
TRIAL = 17
# From when the Deployment is asked for fewer until the pod is gone, requests aside.
LEAVES = 7
# What the simulator watches after the last arrival, and pays for.
TAIL = 60
TRACES = {
    "conv": ["--from", "1200"],
    "diurnal": ["--shape", "diurnal", "--peak", "6", "--hasten", "6"],
    "sawtooth": ["--shape", "sawtooth", "--peak", "6", "--hasten", "6"],
}


def start_seconds(service):
    """From a pod's creation until it is ready, the slowest of them."""
    pods = json.loads(kubectl("get", "pods", *service.where, "-o", "json"))["items"]
    parse = lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    ready = lambda pod: next(c for c in pod["status"]["conditions"] if c["type"] == "Ready")["lastTransitionTime"]
    return max(parse(ready(pod)) - parse(pod["metadata"]["creationTimestamp"]) for pod in pods)


def predict(name, arguments, seconds):
    command = [ROOT / "target" / "release" / "predict", "--trace", TRACE, *arguments, "--seconds", SECONDS,
               "--min-replicas", LEAST, "--max-replicas", MOST, "--start-seconds", seconds,
               "--lead", LEAD, "--trial-seconds", TRIAL, "--leave-seconds", LEAVES,
               "--write", WORK / f"{name}.csv"]
    return json.loads(run(*command, capture_output=True, text=True).stdout)


def watch(service, load):
    """Replica-hours and the dials over time, until `TAIL` seconds after the load."""
    begun = last = time.monotonic()
    hours, caps, budgets, most, ended = 0.0, [], [], 0, None
    while ended is None or time.monotonic() - ended < TAIL:
        time.sleep(2)
        if ended is None and (load.poll() is not None or time.monotonic() - begun >= SECONDS):
            ended = time.monotonic()
        # One process: it takes what the replicas need.
        found = json.loads(kubectl("get", "infsvc,pods", *service.where, "-o", "json"))["items"]
        status = next(item for item in found if item["kind"] == "InferenceService").get("status", {})
        now = time.monotonic()
        hours += (len(found) - 1) * (now - last) / 3600
        last = now
        most = max(most, status.get("readyReplicas", 0))
        if dials := status.get("dials"):
            caps.append(dials["maxNumSeqs"])
            budgets.append(dials["maxNumBatchedTokens"])
    return {"replica_hours": hours, "max_num_seqs": sum(caps) / len(caps),
            "max_num_batched_tokens": sum(budgets) / len(budgets), "most_ready": most}


def measure(name, arguments):
    service = Service("bench-autoscaler", {
        "engine": {"extraArgs": [f"--simulated-load-seconds={LOAD_SECONDS}"], "maxNumSeqs": {"initial": 32},
                   "maxNumBatchedTokens": {"initial": 2048}},
        "scaling": {"minReplicas": LEAST, "maxReplicas": MOST},
    })
    service.wait_for_replicas(LEAST)
    ready = time.monotonic()
    seconds = start_seconds(service)
    expected = predict(name, arguments, seconds)
    time.sleep(max(0, ready + LEAD - time.monotonic()))
    print(f"== {name}: {expected['requests']} requests", flush=True)
    load = service.load(name, "--trace", WORK / f"{name}.csv")
    seen = watch(service, load)
    answers = report(load, name)
    seen |= {"requests": answers["requests"], "good_percent": 100 * answers["good"] / answers["requests"],
             "failed": answers["failed"]}
    service.delete()
    return {"trace": name, "start_seconds": seconds, "predicted": expected, "live": seen}


def main():
    file = RESULTS / "autoscaler-live.json"
    before = json.loads(file.read_text())["runs"] if file.exists() else []
    rows = {row["trace"]: row for row in before}
    install_chart()
    for name in sys.argv[1:] or TRACES:
        with namespace("bench-autoscaler"):
            rows[name] = measure(name, TRACES[name])
    rows = [rows[name] for name in TRACES if name in rows]
    result = {"date": datetime.date.today().isoformat(), "goodput": GOODPUT, "seconds": SECONDS, "runs": rows}
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'':12}{'misses':>22}{'replica-hours':>22}{'cap':>20}{'budget':>20}{'failed':>8}")
    print(f"{'trace':12}" + f"{'predicted':>12}{'live':>10}" * 2 + f"{'predicted':>11}{'live':>9}" * 2)
    for row in rows:
        pair = lambda field: (row["predicted"][field], row["live"][field])
        misses = [100 - good for good in pair("good_percent")]
        hours, caps, budgets = pair("replica_hours"), pair("max_num_seqs"), pair("max_num_batched_tokens")
        print(f"{row['trace']:12}{misses[0]:10.2f} %{misses[1]:8.2f} %{hours[0]:12.3f}{hours[1]:10.3f}"
              f"{caps[0]:11.1f}{caps[1]:9.1f}{budgets[0]:11.0f}{budgets[1]:9.0f}{row['live']['failed']:8}")


if __name__ == "__main__":
    main()
