#!/usr/bin/env bash
# Builds the images stoker/operator, stoker/server and stoker/router of the workspace's version
# from the binaries in target/release, and loads them into the local cluster.
# With CLUSTER=existing it says how to push them instead.
# Environment: RUNTIME_IMAGE, the base of all images; by default one is made of
# Debian's packages, so that no registry is asked.
set -euo pipefail
cd "$(dirname "$0")/../.."

limit_mb=60
work=target/images
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' Cargo.toml)
binaries=${CARGO_TARGET_DIR:-target}/release
base_packages=(libc6 libgcc-s1 ca-certificates base-files)

fail() { echo "images: $*" >&2; exit 1; }
[ -n "$version" ] || fail "Cargo.toml has no version under [workspace.package]"

# --- the tool that builds: a working docker or podman, else buildah ------------
if docker info >/dev/null 2>&1; then
    builder=docker
    # The older builder would build the stages that aren't needed, too.
    export DOCKER_BUILDKIT=1
elif podman info >/dev/null 2>&1; then
    builder=podman
else
    builder=buildah
fi
# Its storage lies in target/, so that nothing is left elsewhere.
own_buildah() { buildah --root "$PWD/$work/storage" --runroot "$PWD/$work/run" --storage-driver vfs "$@"; }

build() { # NAME ARGUMENT... CONTEXT
    local name=$1
    shift
    case $builder in
    # A fixed time, so that the same content is the same image.
    buildah) own_buildah bud --quiet --isolation chroot --pull-never --timestamp 0 --tag "$name" "$@" >/dev/null ;;
    *) "$builder" build --quiet --tag "$name" "$@" >/dev/null ;;
    esac
}

save() { # NAME FILE
    rm -f "$2"
    case $builder in
    buildah) own_buildah push --quiet "$1" "docker-archive:$2:$1" ;;
    # Its `save` would put localhost/ before the name.
    podman) podman push --quiet "$1" "docker-archive:$2:$1" ;;
    docker) docker save --output "$2" "$1" ;;
    esac
}

# --- the base ----------------------------------------------------------------
# What a dynamically linked program needs, out of Debian's packages: no shell,
# no package manager, no locales, no documentation.
unpack_base() {
    local folder=$work/base.new package
    rm -rf "$folder" "$work/packages"
    mkdir -p "$folder" "$work/packages"
    apt-cache show "${base_packages[0]}" >/dev/null 2>&1 || apt-get update -qq || true
    # As the user that apt drops to can't write here, it says so: no matter.
    (cd "$work/packages" && apt-get download -qq "${base_packages[@]}" 2>download.log) ||
        fail "apt-get download ${base_packages[*]} failed: $(cat "$work/packages/download.log"). Try 'apt-get update', or name a base with RUNTIME_IMAGE"
    for package in "$work/packages"/*.deb; do
        dpkg-deb --extract "$package" "$folder"
    done
    mkdir -p "$folder/etc/ssl/certs" "$folder/tmp"
    chmod 1777 "$folder/tmp"
    find "$folder/usr/share/ca-certificates" -name '*.crt' -print0 | sort -z | xargs -0 cat \
        >"$folder/etc/ssl/certs/ca-certificates.crt"
    printf 'root:x:0:0:root:/root:/nologin\nstoker:x:65532:65532:stoker:/tmp:/nologin\n' >"$folder/etc/passwd"
    printf 'root:x:0:\nstoker:x:65532:\n' >"$folder/etc/group"
    find "$folder" -type d \( -name gconv -o -name locale -o -name i18n \) -prune -exec rm -rf {} +
    rm -rf "$folder"/usr/share/{doc,man,info,lintian,bug,base-files,ca-certificates} \
        "$folder"/usr/{bin,sbin} "$folder"/{bin,sbin,root} "$folder"/usr/lib/locale "$folder"/etc/{ca-certificates,update-motd.d}
    mv "$folder" "$work/base"
}

base=${RUNTIME_IMAGE:-}
if [ -z "$base" ]; then
    command -v dpkg-deb >/dev/null || fail "no dpkg-deb to make a base image with: name one, RUNTIME_IMAGE=debian:12-slim"
    base=stoker/runtime:debian
    # Once: a newer package comes with the next `cargo clean` or new checkout.
    [ -d "$work/base" ] || unpack_base
    build "$base" --file - "$work/base" <<<$'FROM scratch\nCOPY . /'
    # A library that the base lacks would show only when a pod starts.
    for name in stoker-operator stoker-server stoker-router; do
        [ -x "$binaries/$name" ] || fail "$binaries/$name is missing: cargo build --release -p $name"
        ldd "$binaries/$name" 2>/dev/null | awk '/\.so/ {print $1}' | while read -r library; do
            [[ $library == linux-vdso* || -n $(find "$work/base" -name "$(basename "$library")" -print -quit) ]] ||
                fail "$name needs $library, which is in none of: ${base_packages[*]}. Add its package to base_packages"
        done
    done
fi

# --- the images ----------------------------------------------------------------
mkdir -p "$work/bin"
for name in stoker-operator stoker-server stoker-router; do
    strip -o "$work/bin/$name" "$binaries/$name"
done
for target in operator server router; do
    image=stoker/$target:$version
    archive=$work/$target.tar
    build "$image" --file Dockerfile --target "$target" \
        --build-arg BINARIES=prebuilt --build-arg "RUNTIME_IMAGE=$base" .
    save "$image" "$archive"
    size=$(stat -c %s "$archive")
    printf '%-24s %5.1f MB (limit %d MB)\n' "$image" "$((size / 100000))e-1" "$limit_mb"
    ((size <= limit_mb * 1000000)) || fail "$image is over the limit of $limit_mb MB"
    if [ "${CLUSTER:-local}" = local ]; then
        target/cluster/bin/local-cluster load-image "$archive"
    fi
done

if [ "$builder" = buildah ]; then
    # Earlier builds: nothing names them any more, and each is a whole copy.
    own_buildah rmi --prune >/dev/null 2>&1 || true
fi

if [ "${CLUSTER:-local}" != local ]; then
    cat <<TEXT
To use them in your cluster, copy them to a registry that it pulls from, say REGISTRY:
  skopeo copy docker-archive:$work/operator.tar docker://REGISTRY/stoker/operator:$version
  skopeo copy docker-archive:$work/server.tar docker://REGISTRY/stoker/server:$version
  skopeo copy docker-archive:$work/router.tar docker://REGISTRY/stoker/router:$version
and name them in the chart's values.
TEXT
fi
