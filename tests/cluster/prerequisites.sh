#!/usr/bin/env bash
# Checks what the local cluster needs, and installs the Debian packages among it.
# Prints nothing but one line where all is there.
set -euo pipefail

rust_wanted=1.89
go_wanted=1.26
missing=()

# at_least WANTED HAVE: whether a version is new enough.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

rust=$(rustc --version 2>/dev/null | awk '{print $2}') || true
if [ -z "$rust" ] || ! at_least "$rust_wanted" "$rust"; then
    missing+=("Rust $rust_wanted or newer (found: ${rust:-none}): install it with rustup, or set the toolchain with 'rustup default stable'")
fi
if [ "${CLUSTER:-local}" = local ]; then
    go=$(go env GOVERSION 2>/dev/null | sed 's/^go//') || true
    if [ -z "$go" ] || ! at_least "$go_wanted" "$go"; then
        missing+=("Go $go_wanted or newer (found: ${go:-none}): install it from the Go project's download page")
    fi
    [ "$(id -u)" = 0 ] ||
        missing+=("root: the local cluster makes a bridge, mounts and cgroups. Run make as root, or use your own cluster with CLUSTER=existing")
    [ -f /etc/debian_version ] ||
        missing+=("Debian 12 or newer, or a relative of it: the container runtime comes from its packages. Elsewhere use CLUSTER=existing")
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
    missing+=("Python 3.9 or newer: 'apt-get install python3'")

if [ "${#missing[@]}" -gt 0 ]; then
    printf 'missing: %s\n' "${missing[@]}" >&2
    exit 1
fi
if [ "${CLUSTER:-local}" != local ]; then
    command -v kubectl >/dev/null && command -v helm >/dev/null ||
        { echo "missing: kubectl and helm, for CLUSTER=${CLUSTER}: install them and point kubectl at your cluster" >&2; exit 1; }
    echo "prerequisites: all there"
    exit 0
fi

packages=()
# need FILE PACKAGE: the package, unless what it brings is there.
need() { [ -e "$1" ] || command -v "$1" >/dev/null || packages+=("$2"); }
need containerd containerd
need runc runc
need /usr/lib/cni/bridge containernetworking-plugins
need nft nftables
need ip iproute2
need mount mount
if ! docker info >/dev/null 2>&1 && ! podman info >/dev/null 2>&1; then
    need buildah buildah
fi

if [ "${#packages[@]}" -gt 0 ]; then
    echo "installing Debian packages: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # The packaged containerd service is not used: keep its installation from
    # starting it, unless the machine has a policy of its own.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    # One unreachable source must not keep the others from being read.
    apt-get update -qq || echo "apt-get update had errors; trying with what it has" >&2
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
        { echo "could not install ${packages[*]}: run 'apt-get install ${packages[*]}' and see why" >&2; exit 1; }
fi
echo "prerequisites: all there"
