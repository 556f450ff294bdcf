#!/usr/bin/env bash
# Checks the running local cluster by itself, without Stoker: what the
# end-to-end tests take for granted. Run it when they fail in odd ways.
set -euo pipefail
cd "$(dirname "$0")/../.."
eval "$(target/cluster/bin/local-cluster env)"
models=$(dirname "$KUBECONFIG")/models
work=$(mktemp -d)
forward=
finish() {
    [ -z "$forward" ] || kill "$forward" 2>/dev/null || true
    kubectl delete namespace smoke --ignore-not-found >/dev/null
    kubectl delete persistentvolume smoke --ignore-not-found >/dev/null
    rm -rf "$work"
}
trap finish EXIT

passed=0
check() { # TITLE WANTED COMMAND...: the command prints what is wanted, within 20 s
    local title=$1 wanted=$2 got='' end=$((SECONDS + 20))
    shift 2
    while ! got=$("$@" 2>&1) || [[ $got != *"$wanted"* ]]; do
        if ((SECONDS >= end)); then
            echo "FAILED: $title: wanted '$wanted', got: $got" >&2
            exit 1
        fi
        sleep 0.2
    done
    echo "ok: $title"
    passed=$((passed + 1))
}

(cd tests/cluster && CGO_ENABLED=0 go build -trimpath -o "$work/hello" ./cmd/hello)
local-cluster pack-image stoker/hello:1 "$work/hello" "$work/hello.tar"
local-cluster load-image "$work/hello.tar"

kubectl create namespace smoke >/dev/null
kubectl label namespace smoke pod-security.kubernetes.io/enforce=restricted >/dev/null
kubectl apply -f - >/dev/null <<MANIFEST
apiVersion: v1
kind: PersistentVolume
metadata: {name: smoke}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadOnlyMany]
  storageClassName: ""
  claimRef: {namespace: smoke, name: models}
  hostPath: {path: $models, type: Directory}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: models, namespace: smoke}
spec:
  accessModes: [ReadOnlyMany]
  storageClassName: ""
  resources: {requests: {storage: 1Gi}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: hello, namespace: smoke}
spec:
  replicas: 2
  selector: {matchLabels: {app: hello}}
  template:
    metadata: {labels: {app: hello}}
    spec:
      securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: hello
        image: stoker/hello:1
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
        lifecycle: {preStop: {sleep: {seconds: 1}}}
        resources: {limits: {nvidia.com/gpu: 1, memory: 64Mi}}
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {drop: [ALL]}
        volumeMounts: [{name: models, mountPath: /data, readOnly: true}]
      volumes:
      - name: models
        persistentVolumeClaim: {claimName: models, readOnly: true}
---
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: smoke}
spec:
  type: NodePort
  selector: {app: hello}
  ports: [{port: 80, targetPort: 8080}]
MANIFEST

k() { kubectl -n smoke "$@"; }
field() { k get "$1" -o "jsonpath={$2}"; }
fetch() { curl --silent --show-error --max-time 3 "$1"; }

check "pods are ready, restricted, with a GPU each" 2 field deployment/hello .status.readyReplicas
service=$(field service/hello .spec.clusterIP)
pod=$(k get pods -l app=hello -o 'jsonpath={.items[0].metadata.name}')
address=$(field "pod/$pod" .status.podIP)
node=$(k get node stoker-node -o 'jsonpath={.status.addresses[?(@.type=="InternalIP")].address}')
check "a pod's address answers this machine" "hello from" fetch "http://$address:8080/"
check "a Service answers this machine" "hello from" fetch "http://$service/"
check "a node port answers this machine" "hello from" fetch "http://$node:$(field service/hello '.spec.ports[0].nodePort')/"
check "a Service answers a pod" "hello from" fetch "http://$address:8080/ask?url=http://$service/"
for _ in 1 2 3 4 5 6; do # both pods behind the Service, so the caller itself too
    check "a Service answers its own pods" "hello from" fetch "http://$address:8080/ask?url=http://$service/"
done
check "the API server answers at its Service" "ok" curl --silent --cacert <(k config view --raw -o 'jsonpath={.clusters[0].cluster.certificate-authority-data}' | base64 -d) https://198.19.0.1/readyz
echo "a file" >"$models/smoke.txt"
check "a volume is mounted" "a file" fetch "http://$address:8080/files/smoke.txt"
rm "$models/smoke.txt"
check "logs" "listening on :8080" k logs "$pod"
# There is no shell in it: a second server finds the first's port taken.
check "exec" "address already in use" bash -c "! kubectl -n smoke exec $pod -- /hello"
kubectl -n smoke port-forward "pod/$pod" 18080:8080 >/dev/null &
forward=$!
check "port-forward" "hello from $pod" fetch http://127.0.0.1:18080/
check "a service account may do nothing unasked" no bash -c 'kubectl auth can-i list secrets --as=system:serviceaccount:smoke:default || true'
check "the kubelet may touch only its own node" no bash -c 'kubectl auth can-i list secrets --as=system:node:stoker-node --as-group=system:nodes -A || true'
check "a privileged pod is refused" violates bash -c '! kubectl -n smoke run bad --image=stoker/hello:1 --privileged'
k scale deployment hello --replicas=5 >/dev/null
check "a pod without a GPU left stays pending" "Insufficient nvidia.com/gpu" k get events
local-cluster gpus 5 >/dev/null
check "it runs once there is one" 5 field deployment/hello .status.readyReplicas
local-cluster gpus 4 >/dev/null
check "helm" "NAME" helm list -A
echo "$passed passed, 0 failed"
