#!/usr/bin/env python3
"""The same part of the reference trace at 5 replicas behind the routers and at 5 and 7 without
routers, on the local cluster, as `make bench-fleet`. Writes docs/results/fleet.json.

Replicas are fixed in number (mode Manual); their dials are the operator's. TRACE_WINDOW chooses the
part of the trace, its busiest five minutes otherwise.
"""
import datetime
import json
import os

from bench_cluster import GOODPUT, RESULTS, TRACE, Service, install_chart, namespace, report

WINDOW = os.environ.get("TRACE_WINDOW", "1620s..1920s")
# Load that brings the dials to where they belong, before anything counts.
WARM_UP = ["--ramp", "8:20s", "--prompt-tokens", "1000", "--max-tokens", "100"]


def measure(router, replicas):
    install_chart("--set", f"router.enabled={json.dumps(router)}")
    service = Service("bench-fleet", {"replicas": replicas, "scaling": {"mode": "Manual"}})
    service.wait_for_replicas(replicas)
    report(service.load("fleet-warm-up", *WARM_UP), "fleet-warm-up")
    print(f"== {replicas} replicas, {'with' if router else 'without'} routers, {WINDOW} of the trace", flush=True)
    name = f"fleet-{replicas}-{'router' if router else 'direct'}"
    seen = report(service.load(name, "--trace", TRACE, "--trace-window", WINDOW), name)
    service.delete()
    return {
        "router": router, "replicas": replicas, "requests": seen["requests"], "ok": seen["ok"],
        "good_percent": round(100 * seen["good"] / seen["requests"], 2),
        "ttft_p50_ms": round(1000 * seen["ttft"]["p50"]), "ttft_p99_ms": round(1000 * seen["ttft"]["p99"]),
        "itl_mean_ms": round(1000 * seen["itl"]["mean"], 1),
    }


def main():
    with namespace("bench-fleet"):
        try:
            rows = [measure(True, 5), measure(False, 5), measure(False, 7)]
        finally:
            install_chart()
    result = {"date": datetime.date.today().isoformat(), "trace": TRACE.name, "window": WINDOW, "goodput": GOODPUT,
              "fleets": rows}
    (RESULTS / "fleet.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'router':>8}{'replicas':>10}{'good':>10}{'TTFT p50':>12}{'TTFT p99':>12}{'ITL mean':>12}{'failed':>8}")
    for row in rows:
        print(f"{'yes' if row['router'] else 'no':>8}{row['replicas']:>10}{row['good_percent']:>8} %"
              f"{row['ttft_p50_ms']:>9} ms{row['ttft_p99_ms']:>9} ms{row['itl_mean_ms']:>9} ms"
              f"{row['requests'] - row['ok']:>8}")


if __name__ == "__main__":
    main()
