# The verbs of this project. `make help` lists them.
#
# CLUSTER=existing works on the cluster of the current kubectl context instead
# of the local one.
CLUSTER ?= local
export CLUSTER

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-cuda bench-router bench-fleet bench-autoscaler kernels images model prerequisites cluster-build cluster-up cluster-down

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: ## show Stoker at work, from nothing
	python3 examples/demo.py

test: ## run every test
	tests/run.sh

lint: ## check style: Rust, Go and shell
	cargo fmt --all -- --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cd tests/cluster && test -z "$$(gofmt -l . | tee /dev/stderr)" && go vet ./internal/... ./cmd/...
	for script in $$(git ls-files '*.sh'); do bash -n "$$script" || exit 1; done

bench: ## measure, and write the report
	tests/bench.sh

bench-router: ## measure the router beside nginx
	tests/bench-router.sh

bench-fleet: cluster-up images ## measure a fleet with and without routers on the local cluster
	tests/bench-fleet.py

bench-autoscaler: cluster-up images ## measure the autoscaler live beside what the simulator expects
	tests/bench-autoscaler.py

kernels: ## fetch the compiler of the CUDA kernels; builds have them from then on
	server/kernels/fetch-nvrtc.sh

bench-cuda: kernels ## make the folder of benches that is run on a machine with a GPU
	cargo build --release --workspace --bins --example bench-cuda
	mkdir -p target/bench-cuda
	for program in stoker-server stoker-bench examples/bench-cuda; do \
	  strip -o target/bench-cuda/$${program##*/} target/release/$$program; done
	cp tests/bench-cuda.sh target/bench-cuda/
	@echo "copy target/bench-cuda to a machine with an NVIDIA GPU and run bench-cuda.sh there"

images: prerequisites kernels ## build the images and load them into the cluster
	cargo build --release --workspace --bins
	tests/cluster/images.sh

model: ## fetch the small real model
	tests/cluster/model.sh

cluster-up: prerequisites cluster-build ## start the local cluster
	$(cluster) up

cluster-down: cluster-build ## remove the local cluster without a trace
	$(cluster) down

prerequisites:
	@tests/cluster/prerequisites.sh

# Kubernetes and the tools as one program; README.md in tests/cluster says more.
cluster_bin := target/cluster/bin
cluster := $(cluster_bin)/local-cluster
cluster_sources := $(shell find tests/cluster -name '*.go' -o -name 'go.*' -o -path '*/templates/*')
kubernetes := $(shell sed -n 's/.*Kubernetes = "\(.*\)"/\1/p' tests/cluster/internal/settings/settings.go)
helm := $(shell sed -n 's/.*Helm *= "\(.*\)"/\1/p' tests/cluster/internal/settings/settings.go)
version_flags := $(foreach package,k8s.io/component-base/version k8s.io/client-go/pkg/version,\
	-X $(package).gitVersion=$(kubernetes) -X $(package).gitMajor=1 -X $(package).gitMinor=$(word 2,$(subst ., ,$(kubernetes)))) \
	-X helm.sh/helm/v4/internal/version.version=$(helm)

cluster-build: $(cluster)

$(cluster): $(cluster_sources)
	@echo "building the local cluster (the first time takes 5 to 10 minutes)"
	mkdir -p $(cluster_bin)
	cd tests/cluster && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w" -o ../../$(cluster_bin)/pause ./cmd/pause
	cd tests/cluster && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w $(version_flags)" -o ../../$(cluster) .
	for name in kubectl helm; do ln -sf local-cluster $(cluster_bin)/$$name || exit 1; done
	touch $(cluster)
