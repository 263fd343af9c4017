#!/usr/bin/env bash
# What launch/tpu_rl.sh has each worker of a TPU do, in ~/musicrl, where it unpacked a commit.
#   launch/tpu_worker.sh setup TREE[@IMAGE]     installs what the commit needs, or pulls the image; TREE names the commit
#   launch/tpu_worker.sh run ATTEMPT [flags]    `musicrl run`; called again for the same ATTEMPT, it joins what runs
#   launch/tpu_worker.sh join ATTEMPT           the same, but starts nothing
#   launch/tpu_worker.sh stop                   tells what runs to save, and waits for it
# The run does not hang on the connection that started it: where one breaks, gcloud repeats the command over another.
set -euo pipefail
cd "$(dirname "$0")/.."
attempts=${TMPDIR:-/tmp}/musicrl-attempts  # empty after a boot, as the process ids in it have no meaning then

new_enough() {
  "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

set_up() {
  local python
  stop
  remove_what_is_no_longer_shipped
  if [[ $1 == *@* ]]; then
    sudo docker pull --quiet "${1#*@}"
    echo "musicrl-code $1" > .code
    return
  fi
  for python in python3.12 python3.11 python3 none; do new_enough "$python" && break; done
  if [ "$python" = none ]; then  # as on Google's images of Ubuntu 22.04
    python=python3.12
    sudo add-apt-repository --yes ppa:deadsnakes/ppa
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes "$python" "$python-venv"
  fi
  PYTHON=$python launch/setup.sh tpu
  echo "musicrl-code $1" > .code
}

remove_what_is_no_longer_shipped() {
  tar -tzf ../musicrl.tar.gz | grep -v '/$' | sort > .shipped.new
  [ ! -e .shipped ] || comm -23 .shipped .shipped.new | xargs --no-run-if-empty --delimiter='\n' rm -f
  mv .shipped.new .shipped
}

mount_bucket() {  # as ~/gcs/BUCKET
  mkdir -p "$HOME/gcs/$1"
  ! mountpoint --quiet "$HOME/gcs/$1" || return 0
  command -v gcsfuse > /dev/null || install_gcsfuse
  # Checkpoints are written beside and renamed; what one worker wrote, the others must see at once.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$1" "$HOME/gcs/$1"
}

install_gcsfuse() {
  local from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl --fail --silent --show-error "$from/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release --codename --short) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update
  sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse
}

run() {
  local attempt=$attempts/$1
  shift
  trap tell EXIT
  mkdir -p "$attempts"
  exec 9> "$attempts/lock"
  flock 9
  if [ -e "$attempt/pid" ]; then
    flock --unlock 9
    follow "$attempt" 10
  else
    start "$attempt" "$@"
    flock --unlock 9
    follow "$attempt" +1
  fi
}

join() {
  trap tell EXIT
  [ -e "$attempts/$1/pid" ] || exit 255
  follow "$attempts/$1" 10
}

follow() {  # to its end, from that line of its log
  tail --pid="$(cat "$1/pid")" --sleep-interval=0.2 --lines="$2" --follow "$1/log" |
    sed --unbuffered "s/^/$(hostname): /"
  exit "$(cat "$1/status" 2> /dev/null || echo 255)"
}

tell() {  # the last word, since gcloud's status is that of one worker, and where it is 255 of a connection
  local status=$?
  printf '\nmusicrl-exit %s %s\n' "$(hostname)" "$status"
  exit 0
}

start() {
  local attempt=$1 argument code mounted=() musicrl=(.venv/bin/musicrl)
  shift
  code=$(cat .code 2> /dev/null || true)
  if [[ $code == *@* ]]; then  # as this user, who alone sees the bucket; privileged, for the TPU
    musicrl=(sudo docker run --rm --privileged --network=host "--user=$(id -u):$(id -g)" "--env=HOME=$HOME"
      --env=JAX_COMPILATION_CACHE_DIR --env=XDG_CACHE_HOME= "--volume=$HOME:$HOME" "--workdir=$PWD")
    [ -z "${SHARED_DIR:-}" ] || musicrl+=("--volume=$SHARED_DIR:$SHARED_DIR")
    musicrl+=("${code#*@}")
  fi
  if [ "${SHARED_DIR:-}" ] && ! mountpoint --quiet "$SHARED_DIR"; then
    echo "SHARED_DIR=$SHARED_DIR is no mount point on $(hostname): have a startup script mount it, or use gs://" >&2
    exit 1
  fi
  for argument in "$@"; do
    while [[ $argument =~ gs://([a-z0-9][a-z0-9._-]+) ]]; do
      mount_bucket "${BASH_REMATCH[1]}"
      argument=${argument//"gs://${BASH_REMATCH[1]}"/"$HOME/gcs/${BASH_REMATCH[1]}"}
    done
    mounted+=("$argument")
  done
  stop
  mkdir -p "$attempt"
  : > "$attempt/log"  # here, lest it be followed before it is there
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/xla-cache} PYTHONUNBUFFERED=1
  # shellcheck disable=SC2016  # expanded by that bash
  setsid bash -c '"${@:2}"; echo $? > "$1/status"' bash "$attempt" "${musicrl[@]}" run "${mounted[@]}" \
    < /dev/null >> "$attempt/log" 2>&1 9>&- &
  echo $! > "$attempt/pid"
}

stop() {
  local attempt pid
  for attempt in "$attempts"/*; do
    [ -e "$attempt/pid" ] && [ ! -e "$attempt/status" ] || continue
    pid=$(cat "$attempt/pid")
    pkill -TERM --parent "$pid" || continue  # gone
    timeout 60 tail --pid="$pid" --sleep-interval=0.2 --follow /dev/null || pkill -KILL --session "$pid" || true
  done
}

case ${1:-} in
  setup) set_up "$2" ;;
  run) run "${@:2}" ;;
  join) join "$2" ;;
  stop) stop ;;
  *) echo "tpu_worker.sh: '${1:-}' is none of setup, run, join and stop" >&2 && exit 2 ;;
esac
