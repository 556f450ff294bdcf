#!/usr/bin/env bash
# Measures the router beside nginx in one run, and writes docs/results/router.json.
#
#   ROUNDS=5       rounds of each measurement; the medians are reported
#   SOAK_SECONDS=N also runs the random-kill soak for so long (20 minutes: 1200)
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${ROUNDS:-5}
work=$(mktemp -d)
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT
ulimit -n 20000

cargo build --release --workspace --bins --examples
router=target/release/stoker-router
server=target/release/stoker-server
load=target/release/examples/router-load

# nginx as Debian builds it: the installed one, else unpacked without installing it.
nginx=$(command -v nginx || true)
if [[ -z $nginx ]]; then
    nginx=target/bench/nginx/usr/sbin/nginx
    if [[ ! -x $nginx ]]; then
        mkdir -p target/bench/nginx
        (cd target/bench && apt-get download nginx 2>/dev/null && dpkg-deb -x nginx_*.deb nginx && rm nginx_*.deb) ||
            { echo "nginx is missing: apt-get install nginx-light" >&2; exit 1; }
    fi
fi

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
wait_for() {
    for _ in $(seq 100); do
        (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return
        sleep 0.1
    done
    echo "nothing listens on port $1; logs: $(cat "$work"/*.log)" >&2
    exit 1
}
upstream_port=$(free_port) server_port=$(free_port) router_port=$(free_port) control_port=$(free_port)
metrics_port=$(free_port) nginx_port=$(free_port)

"$load" upstream "$upstream_port" >"$work/upstream.log" 2>&1 &
pids+=($!)
wait_for "$upstream_port"

"$router" --host 127.0.0.1 --port "$router_port" --control-port "$control_port" \
    --metrics-port "$metrics_port" >"$work/access.jsonl" 2>"$work/router.log" &
router_pid=$!
pids+=("$router_pid")
wait_for "$control_port"
# VERSION PORT CAP MORE: one replica at PORT.
put_table() {
    curl -sf -X PUT "http://127.0.0.1:$control_port/control/v1/table" -d "{\"version\":$1,\"services\":[{
        \"namespace\":\"bench\",\"name\":\"bench\",\"models\":[\"bench\"],\"hosts\":[\"bench\"],\"replicas\":[
        {\"id\":\"at-$2\",\"address\":\"127.0.0.1:$2\",\"max_num_seqs\":$3}]$4}]}" >/dev/null
}
put_table 1 "$upstream_port" 100000 ""

# A plain reverse proxy for streams: no buffering, connections kept alive, access log as ours.
mkdir -p "$work/nginx"
cat >"$work/nginx.conf" <<CONFIG
worker_processes auto;
worker_rlimit_nofile 20000;
pid $work/nginx.pid;
error_log $work/nginx.log;
events { worker_connections 9000; }
http {
    access_log $work/nginx-access.log combined buffer=64k flush=1s;
    client_body_temp_path $work/nginx; proxy_temp_path $work/nginx; fastcgi_temp_path $work/nginx;
    uwsgi_temp_path $work/nginx; scgi_temp_path $work/nginx;
    keepalive_requests 1000000;
    tcp_nodelay on;
    upstream replica { server 127.0.0.1:$upstream_port; keepalive 256; keepalive_requests 1000000; }
    server {
        listen 127.0.0.1:$nginx_port;
        location / {
            proxy_pass http://replica;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host \$host;
            proxy_buffering off;
        }
    }
}
CONFIG
"$nginx" -p "$work" -e "$work/nginx.log" -c "$work/nginx.conf" -g 'daemon off;' &
pids+=($!)
wait_for "$nginx_port"

for round in $(seq "$rounds"); do
    echo "round $round of $rounds"
    "$load" latency "127.0.0.1:$upstream_port" "127.0.0.1:$router_port" "127.0.0.1:$nginx_port" >>"$work/latency"
    # In turns, so that neither has the quieter half.
    for target in router nginx nginx router; do
        port=${target}_port
        "$load" streams "127.0.0.1:${!port}" --seconds 4 >>"$work/streams-$target"
    done
done
"$load" idle "127.0.0.1:$router_port" 5000 "$router_pid" >"$work/idle"

# Two keys in front of a simulated T4: one keeps its limit of a request a second, or asks 50 times
# as much; the other must not feel it.
"$server" --device simulated --simulated-profile t4 --host 127.0.0.1 --port "$server_port" --control-port 0 \
    --max-num-seqs 32 --served-model-name bench >"$work/server.log" 2>&1 &
pids+=($!)
wait_for "$server_port"
key() { printf '{"name":"%s","sha256":"%s"%s}' "$1" "$(printf %s "$1" | sha256sum | cut -d' ' -f1)" "$2"; }
put_table 2 "$server_port" 32 ",\"api_keys\":[$(key calm ""),$(key flood ',"requests_per_minute":60')]"
for round in $(seq "$rounds"); do
    "$load" fairness "127.0.0.1:$router_port" --seconds 20 >>"$work/fairness"
done

if [[ -n ${SOAK_SECONDS:-} ]]; then
    SOAK_SECONDS=$SOAK_SECONDS cargo test --release -p stoker-router --test soak -- --nocapture
fi

mkdir -p docs/results
python3 - "$work" docs/results/router.json <<'REPORT'
import json, statistics, sys

work, result_path = sys.argv[1:]
lines = lambda name: [json.loads(line) for line in open(f"{work}/{name}")]
median = statistics.median
latency = lines("latency")
def added(place, field):
    return median(round_[place][field] - round_[0][field] for round_ in latency)
def shown(place, field):
    return median(round_[place][field] for round_ in latency)
rate = {name: median(line["requests_per_second"] for line in lines(f"streams-{name}"))
        for name in ("router", "nginx")}
idle = lines("idle")[0]
print(f"\nmedians of {len(latency)} rounds      direct    router     nginx")
for field in ("p50_ms", "p99_ms"):
    print(f"latency {field} at 200/s    " + "".join(f"{shown(place, field):10.3f}" for place in range(3)))
for field in ("p50_ms", "p99_ms"):
    print(f"added {field}               {'':8}" + "".join(f"{added(place, field):10.3f}" for place in (1, 2)))
print(f"streams of 100 events, 1/s  {'':8}{rate['router']:10.0f}{rate['nginx']:10.0f}")
print(f"router of nginx             {rate['router'] / rate['nginx']:18.2f}")
print(f"{idle['streams']} idle streams: {idle['mb']:.0f} MB (before: {idle['before_mb']:.0f} MB)")
fairness = lines("fairness")
fair = median(line["ratio"] for line in fairness)
refused = median(line["flood_refused"] for line in fairness)
print(f"p95 of a key beside one that asks 50x its limit ({refused:.0f} refused): {fair:.3f} of its p95 beside one that keeps it")
result = {
    "added_p50_ms": round(added(1, "p50_ms"), 3),
    "added_p99_ms": round(added(1, "p99_ms"), 3),
    "of_nginx": round(rate["router"] / rate["nginx"], 3),
    "idle_streams": idle["streams"],
    "idle_mb": round(idle["mb"], 1),
    "p95_beside_flood": round(fair, 3),
}
with open(result_path, "w") as out:
    json.dump(result, out, indent=2)
    out.write("\n")
REPORT
