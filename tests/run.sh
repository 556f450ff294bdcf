#!/usr/bin/env bash
# `make test`: every test, from unit to end to end on a real cluster.
# CLUSTER=existing uses the current kubectl context instead of the local cluster.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=target/test-logs
mkdir -p "$logs"
begun=$SECONDS

# step TITLE LOG ADVICE COMMAND...: runs a command into a log; on failure says what to read and do.
step() {
  local title=$1 log=$logs/$2.log advice=$3 from=$SECONDS
  shift 3
  echo "== $title"
  "$@" >"$log" 2>&1 &
  local pid=$! last=$SECONDS
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - last >= 30)); then
      last=$SECONDS
      echo "   $((SECONDS - from)) s: $(tail -n 1 "$log" | cut -c1-100)"
    fi
  done
  if ! wait "$pid"; then
    tail -n 60 "$log"
    echo "FAILED: $title. Log: $log. What to do: $advice"
    exit 1
  fi
  grep -E '^(test result|ok  )' "$log" || true
  echo "   $((SECONDS - from)) s"
}

step "prerequisites" prerequisites "install what the log names" make prerequisites
step "the model" model "is PyPI reachable?" make model
# Kernels for the oldest and the newest GPU stand for the others; a release has all (make images).
export STOKER_CUDA_ARCHITECTURES=${STOKER_CUDA_ARCHITECTURES-75,90}
step "the CUDA kernels' compiler" kernels "is PyPI reachable?" make kernels
step "build" build "read the compiler's message" cargo build --release --workspace --tests --bins
step "unit tests" unit "cargo test --release -p CRATE TEST" cargo test --release --workspace --exclude stoker-e2e
if [ "${CLUSTER:-local}" = local ]; then
  step "Kubernetes from its Go modules" cluster-build "is the Go module proxy reachable?" make cluster-build
  step "tests of the local cluster's code" cluster-unit "go test ./internal/..." go -C tests/cluster test ./internal/...
  step "the local cluster" cluster-up "make cluster-down, then again" make cluster-up
  export PATH="$PWD/target/cluster/bin:$PATH"
  KUBECONFIG=$(local-cluster kubeconfig)
  export KUBECONFIG
fi
step "images" images "read the log" tests/cluster/images.sh
step "the chart" helm "kubectl get pods,events -n stoker-system" \
  helm upgrade --install stoker charts/stoker --namespace stoker-system --create-namespace --wait --timeout 3m \
  --set-string "podAnnotations.build=$(sha256sum target/release/stoker-operator | cut -c1-16)"
# Selected out of the whole workspace: with -p alone, cargo picks other features of the
# dependencies and compiles them once more.
e2e=()
for file in tests/e2e/tests/*.rs; do e2e+=(--test "$(basename "$file" .rs)"); done
step "end-to-end tests" e2e "cargo test --release -p stoker-e2e TEST" \
  cargo test --release --workspace "${e2e[@]}" -- --test-threads=1
if [ "${CI:-}" = true ] && [ "${CLUSTER:-local}" = local ]; then
  step "cluster down, without a trace" cluster-down "tests/cluster/README.md" make cluster-down
fi
echo "== all tests passed in $((SECONDS - begun)) s"
