#!/usr/bin/env bash
# Runs on a machine with an NVIDIA GPU: the engine's own figures (bench-cuda), the time from exec to
# the first token with a checkpoint in the page cache, and the server over HTTP against the engine by
# itself. `make bench-cuda` puts it and its programs into one folder, which is all that it needs.
# Environment: OUT, where results go (results/ here); DTYPE; CONCURRENCY.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$here/results}
dtype=${DTYPE:-float16}
concurrency=${CONCURRENCY:-1,2,4,8,16,32,64,128,256}
mkdir -p "$out"
work=$(mktemp -d)
server=
cleanup() {
  if [ -n "$server" ]; then kill -TERM "$server" 2>/dev/null && wait "$server" || true; fi
  rm -rf "$work"
}
trap cleanup EXIT

[ -n "${SKIP_ENGINE:-}" ] || "$here/bench-cuda" --json "$out/engine.json"

echo "== a checkpoint in the shape of Llama 3.2 3B"
"$here/bench-cuda" checkpoint "$work/model"
du -sh "$work/model" | cut -f1
cat "$work/model"/*.safetensors >/dev/null

echo "== from exec to the first token"
same=(--device cuda --model "$work/model" --dtype "$dtype" --max-model-len 4096)
port=18000
begun=$(date +%s.%N)
"$here/stoker-server" "${same[@]}" --host 127.0.0.1 --port $port --control-port 0 \
  --max-num-seqs 256 --max-num-batched-tokens 2048 --max-waiting 1024 2>"$out/server.log" &
server=$!
body='{"prompt": [1, 2, 3], "max_tokens": 1, "ignore_eos": true}'
until curl -sf -o /dev/null -H 'content-type: application/json' -d "$body" \
  http://127.0.0.1:$port/v1/completions; do
  kill -0 $server || { cat "$out/server.log"; exit 1; }
  sleep 0.02
done
awk -v a="$begun" -v b="$(date +%s.%N)" 'BEGIN {printf "%.2f\n", b - a}' | tee "$out/startup_s"

echo "== over HTTP"
lengths=(--prompt-tokens 150 --max-tokens 100)
"$here/stoker-bench" load --url http://127.0.0.1:$port --concurrency "$concurrency" --requests 20x \
  "${lengths[@]}" --json "$out/load.json"
kill -TERM $server
wait $server || true
server=

echo "== the engine by itself"
"$here/stoker-bench" direct "${same[@]}" --batch "$concurrency" --rounds 3 "${lengths[@]}" \
  --max-num-batched-tokens 2048 --kv-cache-memory-bytes 16000000000 --json "$out/direct.json"
"$here/stoker-bench" compare --direct "$out/direct.json" --load "$out/load.json" \
  --json "$out/http.json"
