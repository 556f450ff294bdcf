#!/usr/bin/env bash
# Runs the engine by itself and behind its HTTP server on the simulated T4, prints what share of
# its speed HTTP keeps, and writes docs/results/http.json. Fails when a request was not answered
# or less than 97 % of the speed is left.
set -euo pipefail
cd "$(dirname "$0")/.."

batches=1,2,4,8
rounds=6
requests=20x # 20 times the concurrency
same=(--prompt-tokens 32 --max-tokens 100)
budget=512

cargo build --release --workspace --bins
programs=target/release
work=$(mktemp -d)
server=
cleanup() {
  if [ -n "$server" ]; then
    kill -TERM "$server" 2>/dev/null && wait "$server" || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT

echo "== the engine by itself ($rounds rounds each of batch $batches, a good minute)"
"$programs/stoker-bench" direct --device simulated --simulated-profile t4 --batch "$batches" \
  --rounds "$rounds" "${same[@]}" --max-num-batched-tokens "$budget" --json "$work/direct.json"

"$programs/stoker-server" --device simulated --simulated-profile t4 --host 127.0.0.1 --port 0 \
  --control-port 0 --max-num-seqs 8 --max-num-batched-tokens "$budget" --log-format json \
  2>"$work/server.log" &
server=$!
url=
for _ in $(seq 300); do
  port=$(sed -n 's/.*"message":"listening","public":"127\.0\.0\.1:\([0-9]*\)".*/\1/p' "$work/server.log")
  if [ -n "$port" ] && grep -q '"to":"ready"' "$work/server.log"; then
    url=http://127.0.0.1:$port
    break
  fi
  kill -0 "$server" 2>/dev/null || break
  sleep 0.1
done
if [ -z "$url" ]; then
  echo "the server did not get ready; its log:" >&2
  cat "$work/server.log" >&2
  exit 1
fi

echo "== over HTTP (20 requests of each user, about 4 minutes)"
"$programs/stoker-bench" load --url "$url" --concurrency "$batches" --requests "$requests" \
  "${same[@]}" --json "$work/load.json"

"$programs/stoker-bench" compare --direct "$work/direct.json" --load "$work/load.json" \
  --min-share 0.97 --json docs/results/http.json
