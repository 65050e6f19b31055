#!/usr/bin/env bash
# Builds docker/Dockerfile and runs in it, as its own user, on a read-only root file system with one volume: the demo, and
# the CPU tests.  With a Docker engine where one runs; else, as root on Debian or Ubuntu, with buildah and a stand-in for the
# base image made by debootstrap, which is kept in $CACHE.
#
#   DEMO_ONLY=1  leaves the tests out
#   CACHE=DIR    instead of ~/.cache/gpusaver-docker
set -euo pipefail
cd "$(dirname "$0")/.."
with_tmp=
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gpusaver-docker}
BASE=docker.io/library/python:3.13-slim-bookworm # the Dockerfile's PYTHON_BASE
DEMO=(python /opt/gpusaver/examples/train_digits.py --output /data/demo)

# Runs inside: nothing but the volume can be written, by a user who is not root.
CONFINED='set -e; test "$(id -u)" = 10001; touch /data/yes; for dir in / /opt/gpusaver /etc /usr; do
    if touch "$dir/no" 2>/dev/null; then echo "$dir can be written"; exit 1; fi; done; echo "user $(id -u), root read-only"'

# What `buildah run` lacks with chroot isolation, a read-only root: here, in a mount name space that ends with the command.
ENTER='set -e; mount --bind "$root" "$root"; mount -o remount,bind,ro "$root"; mount --bind "$work" "$root/data"
    mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"; mount --rbind /sys "$root/sys"
    [ -z "${with_tmp:-}" ] || mount -t tmpfs tmp "$root/tmp"
    exec chroot --userspec "$user" "$root" env -i -C /data "$@"'

fail() {
    echo "make docker-test CANNOT RUN HERE, and nothing was tested: $*" >&2
    exit 1
}

with_docker() {
    docker build --file docker/Dockerfile --target ci --tag gpusaver:ci .
    local volume
    volume=$(docker volume create)
    trap 'docker volume rm --force "$volume" >/dev/null' EXIT
    inside() { docker run --rm --read-only ${with_tmp:+--tmpfs /tmp} --volume "$volume:/data" gpusaver:ci "$@"; }
    run_all
}

with_buildah() {
    [ "$(id -u)" = 0 ] || fail "without a Docker engine it takes root, for buildah with chroot isolation"
    command -v buildah >/dev/null && command -v debootstrap >/dev/null \
        || fail "no Docker engine answers, and buildah or debootstrap is missing: apt install buildah debootstrap"
    export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
    mkdir -p "$CACHE"
    config() { buildah inspect --type image --format "$1" gpusaver:ci; }
    buildah() { command buildah --root "$CACHE/images" --runroot "$CACHE/run" "$@"; }
    buildah inspect --type image "$BASE" >/dev/null 2>&1 || make_base

    # What this machine needs to reach package registries.
    local mounts=() path
    for path in /etc/pip.conf /etc/ssl/certs /usr/local/share/ca-certificates /etc/apt/apt.conf.d; do
        [ ! -e "$path" ] || mounts+=(--volume "$path:$path:ro")
    done
    buildah build --pull-never --format docker --layers=false "${mounts[@]}" \
        --file docker/Dockerfile --target ci --tag gpusaver:ci .

    work=$(mktemp -d) container=$(buildah from --pull-never gpusaver:ci)
    trap 'buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT
    root=$(buildah mount "$container") user=$(config '{{.Docker.Config.User}}')
    mapfile -t environment < <(config '{{range .Docker.Config.Env}}{{println .}}{{end}}')
    chown "$user" "$work"
    inside() { export root work user with_tmp; unshare --mount bash -c "$ENTER" - "${environment[@]:0:${#environment[@]}-1}" tini -s -- "$@"; }
    run_all
}

make_base() {
    echo "making a stand-in for $BASE, once"
    local tree="$CACHE/base"
    rm -rf "$tree"
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$tree" \
        >"$CACHE/debootstrap.log" || fail "debootstrap failed; see $CACHE/debootstrap.log"
    local container
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$tree" / >/dev/null
    buildah commit --quiet "$container" "$BASE" >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$tree"
}

run_all() {
    inside sh -c "$CONFINED"
    inside gpusaver doctor # the image's health check
    inside "${DEMO[@]}"
    with_tmp=1 # the S3 server of the tests has its sockets there
    [ "${DEMO_ONLY:-}" = 1 ] || inside env -C /opt/gpusaver/src TMPDIR=/data python -m pytest -n 2 -q --ignore tests/tf \
        --ignore tests/gpu -p no:cacheprovider
    echo "docker-test: passed${DEMO_ONLY:+, without the tests}"
}

if docker info >/dev/null 2>&1; then
    with_docker
else
    with_buildah
fi
