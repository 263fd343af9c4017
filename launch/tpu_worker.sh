#!/usr/bin/env bash
# Runs on each worker of a TPU, in ~/musicrl, where launch/tpu_rl.sh has unpacked a commit.
#   launch/tpu_worker.sh setup TREE[@IMAGE]   installs the requirements of a commit, by its git tree,
#                                             or pulls the image
#   launch/tpu_worker.sh run ATTEMPT [flags]  starts `musicrl run` and prints its log. If ATTEMPT was
#                                             started before, only prints the log
#   launch/tpu_worker.sh join ATTEMPT         prints the log of an attempt that was started
#   launch/tpu_worker.sh stop                 lets running attempts save and end, and waits for them
# A run does not depend on the connection that started it: if one breaks, gcloud repeats the command
# over another.
set -euo pipefail
cd "$(dirname "$0")/.."
attempts=${TMPDIR:-/tmp}/musicrl-attempts  # empty after a boot, when its process ids are invalid

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
  if [ "$python" = none ]; then  # Google's images of Ubuntu 22.04
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

mount_bucket() {  # BUCKET: mounts it as ~/gcs/BUCKET
  mkdir -p "$HOME/gcs/$1"
  ! mountpoint --quiet "$HOME/gcs/$1" || return 0
  command -v gcsfuse > /dev/null || install_gcsfuse
  # Checkpoints are renamed after writing. Other workers must see a worker's files at once.
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
  trap report_status EXIT
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
  trap report_status EXIT
  [ -e "$attempts/$1/pid" ] || exit 255
  follow "$attempts/$1" 10
}

follow() {  # ATTEMPT_FOLDER LINE: prints its log from that line on, and exits with its status
  tail --pid="$(cat "$1/pid")" --sleep-interval=0.2 --lines="$2" --follow "$1/log" |
    sed --unbuffered "s/^/$(hostname): /"
  exit "$(cat "$1/status" 2> /dev/null || echo 255)"
}

# Prints the exit status. The launcher reads it from the log: gcloud returns the status of one
# worker only, and 255 for a broken connection too.
report_status() {
  local status=$?
  printf '\nmusicrl-exit %s %s\n' "$(hostname)" "$status"
  exit 0
}

start() {
  local attempt=$1 argument code mounted=() musicrl=(.venv/bin/musicrl)
  shift
  code=$(cat .code 2> /dev/null || true)
  if [[ $code == *@* ]]; then
    # As this user, who alone can read the mounted bucket. Privileged, for the TPU.
    musicrl=(sudo docker run --rm --privileged --network=host "--user=$(id -u):$(id -g)" "--env=HOME=$HOME"
      --env=JAX_COMPILATION_CACHE_DIR --env=XDG_CACHE_HOME= "--volume=$HOME:$HOME" "--workdir=$PWD")
    [ -z "${SHARED_DIR:-}" ] || musicrl+=("--volume=$SHARED_DIR:$SHARED_DIR")
    musicrl+=("${code#*@}")
  fi
  if [ "${SHARED_DIR:-}" ] && ! mountpoint --quiet "$SHARED_DIR"; then
    echo "SHARED_DIR=$SHARED_DIR is no mount point on $(hostname): mount it in a startup script, or use gs://" >&2
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
  : > "$attempt/log"  # before the run starts, so that `follow` finds it
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/xla-cache} PYTHONUNBUFFERED=1
  # shellcheck disable=SC2016  # the inner bash expands it
  setsid bash -c '"${@:2}"; echo $? > "$1/status"' bash "$attempt" "${musicrl[@]}" run "${mounted[@]}" \
    < /dev/null >> "$attempt/log" 2>&1 9>&- &
  echo $! > "$attempt/pid"
}

stop() {
  local attempt pid
  for attempt in "$attempts"/*; do
    [ -e "$attempt/pid" ] && [ ! -e "$attempt/status" ] || continue
    pid=$(cat "$attempt/pid")
    pkill -TERM --parent "$pid" || continue  # it has ended
    timeout 60 tail --pid="$pid" --sleep-interval=0.2 --follow /dev/null || pkill -KILL --session "$pid" || true
  done
}

case ${1:-} in
  setup) set_up "$2" ;;
  run) run "${@:2}" ;;
  join) join "$2" ;;
  stop) stop ;;
  *) echo "tpu_worker.sh: '${1:-}' is none of setup, run, join, stop" >&2 && exit 2 ;;
esac
