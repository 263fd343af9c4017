#!/usr/bin/env bash
# Runs `musicrl run` on a Google Cloud TPU, through its pre-emptions. Creates or reuses the TPU,
# copies the checked-out commit to all workers, and resumes in the same MODEL_DIR until the run is
# done.
#
#   PROJECT=my-project ZONE=us-west4-a TPU_NAME=rl ACCELERATOR_TYPE=v5litepod-16 \
#     MODEL_DIR=gs://my-bucket/rl \
#     launch/tpu_rl.sh [--dry-run] --gin_file=gin/experiments/musicrl_r.gin \
#     --gin_file=gin/sizes/base.gin --gin_file=YOUR_RUN.gin \
#     --gin.DATA_DIR="'gs://my-bucket/data'" [more flags for `musicrl run`]
#
#   --dry-run              prints the commands of a new run, ready to paste, and does nothing
#   PROJECT ZONE TPU_NAME  name the TPU
#   ACCELERATOR_TYPE       v5litepod-16, v5p-128, v6e-64, v4-32, ... as in gcloud
#   MODEL_DIR              the run's folder: gs://BUCKET/..., or under SHARED_DIR. One host may have
#                          any other folder, but it is lost with the TPU. Workers mount the buckets
#                          that MODEL_DIR and flags name
#   SHARED_DIR             where all workers have mounted a shared disk, for example by a startup
#                          script in CREATE_FLAGS
#   SPOT=1                 creates a TPU that may be pre-empted
#   SLICES=2               number of slices of ACCELERATOR_TYPE; default 1
#   PROVISION=vm           creates the TPU at once or fails; default `queued`: waits for a free one
#   RUNTIME_VERSION        software version of the workers; by default that of the TPU generation
#   IMAGE                  image of launch/Dockerfile that runs `musicrl` on the workers; by default
#                          each worker installs the commit. Gin files always come from the commit
#   CREATE_FLAGS           more flags for gcloud's create, separated by spaces
#   TOPOLOGY=v5p:4x4x28    shape for the plan, if this script does not know it
#   SKIP_PLAN=1            starts without a plan
#   LOG_DIR                folder of attempt-001.log, ...: a log for each attempt; default
#                          runs/tpu_rl/TPU_NAME
#   MAX_ATTEMPTS           default 100; then exits with status 75
#   PAUSE_SECONDS          between two looks at a state, and before the next attempt; default 30
#   DELETE_WHEN_DONE=1     deletes the TPU when the run is done
#
# Ctrl-C or SIGTERM stops the run: the workers save, and the same command resumes. nohup, cron and &
# in a script start this script with SIGINT ignored: then only SIGTERM stops it, by kill -TERM and
# its process id.
#
# The worst exit status of the workers decides what follows an attempt:
#   0                   done
#   75                  saved: resumes on the same TPU
#   134, 137, 143, 255  lost: resumes on a new TPU, also if the TPU is no longer READY
#   any other           a mistake: three, without a 75 in between, end this script with that status
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TOPOLOGIES="
v5litepod v5e 4=2x2 8=2x4 16=4x4 32=4x8 64=8x8 128=8x16 256=16x16
v6e v6e 4=2x2 8=2x4 16=4x4 32=4x8 64=8x8 128=8x16 256=16x16
v4 v4 8=2x2x1 16=2x2x2 32=2x2x4 64=2x4x4 128=4x4x4 256=4x4x8 512=4x8x8 1024=8x8x8 2048=8x8x16 4096=8x16x16
v5p v5p 8=2x2x1 16=2x2x2 32=2x2x4 64=2x4x4 128=4x4x4 256=4x4x8 512=4x8x8 1024=8x8x8 2048=8x8x16 4096=8x16x16
"  # accelerator type, its name in jax.experimental.topologies, and Google's shape of each size
readonly WORKER=musicrl/launch/tpu_worker.sh  # on a worker, relative to its home

# --- messages ---

say() {
  if [ "$dry_run" ]; then echo "# $*"; else printf '%(%F %T)T %s\n' -1 "$*"; fi
}

die() {
  echo "tpu_rl.sh: $*" >&2
  exit 1
}

quoted() {  # COMMAND...: prints it, ready to paste
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

say_how_to_resume() {
  say "The same command resumes this run. The TPU stays, and costs, until it is deleted:"
  quoted "${delete[@]}"
}

# --- settings ---

need() {  # SETTING DESCRIPTION EXAMPLE
  [ "${!1:-}" ] || die "$1 is not set: give $2, as in $1=$3"
}

one_of() {  # SETTING VALUES
  [[ " $2 " == *" ${!1} "* ]] || die "$1=${!1} must be one of: $2"
}

number() {  # SETTING LEAST
  [[ ${!1} =~ ^(0|[1-9][0-9]*)$ && ${!1} -ge $2 ]] || die "$1=${!1} must be a whole number of at least $2"
}

read_settings() {
  need PROJECT "the Google Cloud project" my-project
  need ZONE "the zone of the TPU" us-west4-a
  need TPU_NAME "a name for the TPU" rl
  need ACCELERATOR_TYPE "the type of the TPU" v5litepod-16
  need MODEL_DIR "the run's folder" gs://my-bucket/rl
  PROVISION=${PROVISION:-queued} SPOT=${SPOT:-} SLICES=${SLICES:-1} SKIP_PLAN=${SKIP_PLAN:-}
  LOG_DIR=${LOG_DIR:-runs/tpu_rl/$TPU_NAME} MAX_ATTEMPTS=${MAX_ATTEMPTS:-100} PAUSE_SECONDS=${PAUSE_SECONDS:-30}
  IMAGE=${IMAGE:-} SHARED_DIR=${SHARED_DIR:-} SHARED_DIR=${SHARED_DIR%/} DELETE_WHEN_DONE=${DELETE_WHEN_DONE:-}
  one_of PROVISION "queued vm"
  local switch
  for switch in SPOT SKIP_PLAN DELETE_WHEN_DONE; do
    [[ ${!switch} =~ ^1?$ ]] || die "$switch=${!switch} must be 1, or not set"
  done
  number SLICES 1
  number MAX_ATTEMPTS 1
  number PAUSE_SECONDS 0
  [[ $TPU_NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    die "TPU_NAME=$TPU_NAME must be of a-z, 0-9 and hyphens, with a letter first and no hyphen last"
  [ "$SLICES" = 1 ] || [ "$PROVISION" = queued ] ||
    die "SLICES=$SLICES with PROVISION=vm: only a queued resource has several slices; leave PROVISION out"
  read_accelerator_type
  check_model_dir
}

read_accelerator_type() {  # sets workers, RUNTIME_VERSION and TOPOLOGY
  local generation=${ACCELERATOR_TYPE%-*} size=${ACCELERATOR_TYPE##*-} chips hosts runtime name jax sizes row known=
  case $generation in
    v5litepod) chips=$size runtime=v2-alpha-tpuv5-lite ;;
    v6e) chips=$size runtime=v2-alpha-tpuv6e ;;
    v4) chips=$size/2 runtime=tpu-ubuntu2204-base ;;  # its name counts cores, two a chip
    v5p) chips=$size/2 runtime=v2-alpha-tpuv5 ;;
    *) die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE must be v4-N, v5litepod-N, v5p-N or v6e-N: no other is supported" ;;
  esac
  [[ $size =~ ^[1-9][0-9]*$ ]] || die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: '$size' is no size; $generation-16 is a type"
  hosts=$(((chips + 3) / 4))
  case $generation in v5litepod | v6e) [ "$size" -gt 8 ] || hosts=1 ;; esac
  workers=$((hosts * SLICES))
  RUNTIME_VERSION=${RUNTIME_VERSION:-$runtime}
  while read -r name jax sizes; do
    [ "$name" = "$generation" ] || continue
    for row in $sizes; do
      known+=" $name-${row%=*}"
      [ "${row%=*}" != "$size" ] || TOPOLOGY=${TOPOLOGY:-$jax:${row#*=}}
    done
    [ "${TOPOLOGY:-}" ] || [ "$SKIP_PLAN" ] ||
      die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is none of the types whose shape is known ($known ):" \
        "set TOPOLOGY=$jax:AxB or AxBxC, or SKIP_PLAN=1 to start without a plan"
  done <<< "$TOPOLOGIES"
}

check_model_dir() {
  if [[ $MODEL_DIR == gs:* ]]; then
    [[ $MODEL_DIR =~ ^gs://[a-z0-9][a-z0-9._-]+/.+$ ]] ||
      die "MODEL_DIR=$MODEL_DIR must be of the form gs://BUCKET/FOLDER"
  elif [ -z "$SHARED_DIR" ] || [[ $MODEL_DIR != "$SHARED_DIR"/* ]]; then
    [ "$workers" = 1 ] || die "MODEL_DIR=$MODEL_DIR is on the own disk of each of the $workers hosts, which need one" \
      "in common: set MODEL_DIR=gs://BUCKET/FOLDER, or SHARED_DIR to a folder above it that all of them have mounted"
    say "MODEL_DIR=$MODEL_DIR is on the TPU's own disk: if the TPU is lost, the run starts from nothing"
  fi
}

read_arguments() {  # sets arguments, of `musicrl run`, and planned, of `musicrl plan`
  [ $# != 0 ] || die "say what to run: --gin_file=gin/experiments/musicrl_r.gin, and more flags of \`musicrl run\`"
  local argument flag=
  planned=()
  for argument in "$@"; do
    [[ $argument != --* ]] || flag=${argument%%=*}  # its value may be the next argument
    case $flag in
      --gin.MODEL_DIR) die "$argument: the run's folder is a setting of this script: set MODEL_DIR=..." ;;
      --dry-run | --dry_run) die "$argument must come first" ;;
      --gin* | --only) planned+=("$argument") ;;
    esac
    [ "$flag" != --gin_file ] || [ "$argument" = --gin_file ] || check_gin_file "${argument#--gin_file=}"
  done
  local folder=${MODEL_DIR//\\/\\\\}
  arguments=("$@" "--gin.MODEL_DIR='${folder//\'/\\\'}'")
}

check_gin_file() {
  [[ $SHARED_DIR && $1 == "$SHARED_DIR"/* ]] || git cat-file -e "HEAD:./$1" 2> /dev/null ||
    die "--gin_file=$1 is not in the commit that the workers get: git add and commit it, and name it from $PWD"
}

read_checkout() {  # sets code, which identifies what workers run: the commit's TREE or TREE@IMAGE
  local tree
  tree=$(git rev-parse --verify --quiet 'HEAD^{tree}') || die "$PWD is no git checkout with a commit: clone one"
  git diff --quiet HEAD -- || die "the checkout has changes that are not committed, and the workers get its commit:" \
    "commit or stash them ($(git diff --name-only HEAD -- | head -n 1), ...)"
  code=$tree${IMAGE:+@$IMAGE}
}

prepare() {  # sets nodes, where, create and delete
  local kind=(gcloud compute tpus tpu-vm) shape=("--accelerator-type=$ACCELERATOR_TYPE") flags number
  where=("--project=$PROJECT" "--zone=$ZONE" --quiet)
  nodes=("$TPU_NAME")
  read -ra flags <<< "${CREATE_FLAGS:-}"
  [ -z "$SPOT" ] || flags+=(--spot)
  if [ "$PROVISION" = vm ]; then
    shape+=("--version=$RUNTIME_VERSION")
    delete=("${kind[@]}" delete "$TPU_NAME" "${where[@]}")
  else
    kind=(gcloud compute tpus queued-resources)
    shape+=("--runtime-version=$RUNTIME_VERSION")
    delete=("${kind[@]}" delete "$TPU_NAME" "${where[@]}" --force)
    if [ "$SLICES" = 1 ]; then
      shape+=("--node-id=$TPU_NAME")
    else
      shape+=("--node-count=$SLICES" "--node-prefix=$TPU_NAME")
      nodes=()
      for ((number = 0; number < SLICES; number++)); do nodes+=("$TPU_NAME-$number"); done
    fi
  fi
  create=("${kind[@]}" create "$TPU_NAME" "${where[@]}" "${shape[@]}" ${flags[@]+"${flags[@]}"})
}

# --- commands ---

pause() {
  setsid sleep "$PAUSE_SECONDS" &
  wait $!
}

# COMMAND...: starts it in the background, so that bash handles signals while it runs, and in its
# own session, so that all its processes can be stopped.
start() {
  if [ "$dry_run" ]; then
    quoted "$@"
  else
    quoted "$@" >&3
    setsid "$@" < /dev/null >&3 2>&1 4>&- &
  fi
}

call() {
  start "$@"
  [ "$dry_run" ] || wait $!
}

# COMMAND: runs it on all workers of all slices at once. Ignore the exit status: read the log.
on_workers() {
  local node
  for node in "${nodes[@]}"; do
    # A worker that does not answer for two minutes is lost. TCP alone may never notice.
    start gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --ssh-flag=-oServerAliveInterval=30 \
      --ssh-flag=-oServerAliveCountMax=4 "--command=$1"
  done
  wait
}

check() {  # ends the script if the run does not fit the TPU or its flags are wrong
  exec 3>&1
  call launch/setup.sh tpu
  if [ "$SKIP_PLAN" ]; then
    say "No plan: SKIP_PLAN=1"
  else
    local slices=()
    [ "$SLICES" = 1 ] || slices=("--slices=$SLICES")
    say "Plan of the run on $SLICES x $TOPOLOGY"
    call .venv/bin/musicrl plan ${planned[@]+"${planned[@]}"} "--topology=$TOPOLOGY" ${slices[@]+"${slices[@]}"} ||
      die "the plan above says that this run does not fit ACCELERATOR_TYPE=$ACCELERATOR_TYPE: change what it names," \
        "take a larger type, or set SKIP_PLAN=1 to start without a plan"
  fi
  [ "$dry_run" ] || exec 3> "$LOG_DIR/config.txt"
  call .venv/bin/musicrl run "${arguments[@]}" --dry_run ||
    die "\`musicrl run\` rejects these flags: $(tail -n 1 "$LOG_DIR/config.txt")"
}

# --- the TPU ---

describe() {  # KIND NAME FIELD: sets state, MISSING if there is no such resource
  local try error=$LOG_DIR/describe.txt
  for try in 1 2 3; do
    if state=$(gcloud compute tpus "$1" describe "$2" "${where[@]}" "--format=value($3)" 2> "$error"); then
      state=${state:-UNKNOWN}
      return
    elif grep -q NOT_FOUND "$error"; then
      state=MISSING
      return
    fi
    state=
    [ "$try" = 3 ] || pause
  done
  die "gcloud cannot say in which state $2 is: $(tail -n 5 "$error")"
}

look() {  # sets state: READY if all resources are, else the state of one that is not
  local node
  if [ "$PROVISION" = queued ]; then
    describe queued-resources "$TPU_NAME" state.state
    [ "$state" = ACTIVE ] || return 0
  fi
  for node in "${nodes[@]}"; do
    describe tpu-vm "$node" state
    [ "$state" != MISSING ] || [ "$PROVISION" = vm ] || state=GONE  # but its queued resource exists
    [ "$state" = READY ] || return 0
  done
}

bring_up() {  # returns once the TPU is READY
  local failures=0 said='' node
  while look && [ "$state" != READY ]; do
    [ "$state" = "$said" ] || say "$TPU_NAME is $state"
    said=$state
    case $state in
      MISSING)
        say "Creating $TPU_NAME: $SLICES x $ACCELERATOR_TYPE"
        call "${create[@]}" || failed_to_create
        ;;
      STOPPED)
        for node in "${nodes[@]}"; do
          call gcloud compute tpus tpu-vm start "$node" "${where[@]}" || pause
        done
        ;;
      FAILED)
        failed_to_create
        delete_tpu
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | GONE | UNKNOWN | HIDDEN) delete_tpu ;;
      *) pause ;;
    esac
  done
  say "$TPU_NAME is READY"
}

failed_to_create() {
  failures=$((failures + 1))
  if [ "$failures" -ge 3 ]; then
    tail -n 5 "$log" >&2
    die "$TPU_NAME could not be created in three tries: see gcloud's errors above, and $log"
  fi
  pause
}

delete_tpu() {
  say "Deleting $TPU_NAME, to create a new one"
  call "${delete[@]}" || pause
}

# --- an attempt ---

ship() {  # copies the commit to the workers, unless all have it
  local archive=$LOG_DIR/musicrl.tar.gz node
  [ "$dry_run" ] || ! have_code || return 0
  say "Copying the commit to the workers, and installing what it needs"
  call git archive --format=tar.gz "--output=$archive" HEAD || return
  for node in "${nodes[@]}"; do
    call gcloud compute tpus tpu-vm scp "$archive" "$node:musicrl.tar.gz" "${where[@]}" --worker=all || return
  done
  on_workers "mkdir -p musicrl && tar -xzf musicrl.tar.gz -C musicrl && $(quoted "$WORKER" setup "$code")"
  [ "$dry_run" ] || have_code
}

have_code() {  # succeeds if all workers have the commit
  local before
  before=$(grep -cFx "musicrl-code $code" "$log" || true)
  on_workers "cat musicrl/.code || true"
  [ $(($(grep -cFx "musicrl-code $code" "$log" || true) - before)) = "$workers" ]
}

attempt() {  # sets status: the worst one of the workers
  status=1
  ship || { say "The workers could not be set up"; return 0; }
  say "Running, workers: $workers, log: $log"
  running=1
  on_workers "$(printf '%q ' ${SHARED_DIR:+env "SHARED_DIR=$SHARED_DIR"} "$WORKER" run "$token" "${arguments[@]}")"
  [ "$dry_run" ] || connect_again
  running=
  [ "$dry_run" ] || status=$(worst)
}

connect_again() {  # to workers that have not reported an exit status: their runs may still go on
  local try reported
  for try in 1 2 3; do
    reported=$(awk '/^musicrl-exit / {print $2}' "$log" | sort -u | wc -l)
    [ "$reported" -lt "$workers" ] || return 0
    look
    [ "$state" = READY ] || return 0
    say "Workers that reported their end: $reported of $workers. Connecting again"
    pause
    on_workers "$WORKER join $token"
  done
}

# Prints the worst status of the workers. A mistake of one worker makes the others lose it: it
# counts more than their statuses. A worker without a status is lost.
worst() {
  local statuses mistake='' lost='' again=''
  mapfile -t statuses < <(awk '/^musicrl-exit / {last[$2] = $3} END {for (worker in last) print last[worker]}' "$log")
  [ "${#statuses[@]}" -ge "$workers" ] || lost=255
  for status in ${statuses[@]+"${statuses[@]}"}; do
    case $status in
      0) ;;
      75) again=75 ;;
      134 | 137 | 143 | 255) lost=${lost:-$status} ;;
      *) mistake=$status ;;
    esac
  done
  echo "${mistake:-${lost:-${again:-0}}}"
}

# --- the run ---

finish() {
  say "Done: $MODEL_DIR"
  if [ "$DELETE_WHEN_DONE" ]; then
    call "${delete[@]}" || die "$TPU_NAME could not be deleted, and costs until it is: see $log"
  else
    say "The TPU stays, and costs, until it is deleted:"
    quoted "${delete[@]}"
  fi
}

interrupted() {  # SIGNAL
  local group
  trap - INT TERM
  for group in $(jobs -p); do kill -TERM -- "-$group" 2> /dev/null || true; done
  wait 2> /dev/null || true
  if [ "$running" ]; then
    say "Stopping by SIG$1: the workers save, which takes up to a minute"
    on_workers "$WORKER stop"
  fi
  [ -z "$state" ] || say_how_to_resume
  exit $((128 + $(kill -l "$1")))
}

next_log() {  # sets log, and token, which no earlier attempt on a worker has
  local number=1
  while log=$LOG_DIR/$(printf 'attempt-%03d.log' "$number") && [ -e "$log" ]; do number=$((number + 1)); done
  token=$(basename "$log" .log)-$(date +%s)
  exec 3>> "$log"
}

dry_run() {
  log=$LOG_DIR/attempt-001.log token=attempt-001-0
  check
  say "Create, and wait until it is READY"
  call "${create[@]}"
  attempt
  say "Repeat until done: on the same TPU after status 75, on a new one if it is lost. At the end"
  call "${delete[@]}"
}

main() {
  local mistakes=0 attempts
  for ((attempts = 1; attempts <= MAX_ATTEMPTS; attempts++)); do
    next_log
    bring_up
    attempt
    if [ "$status" = 0 ]; then
      finish
      return
    fi
    look
    if [ "$state" != READY ]; then
      say "Lost: status $status, and $TPU_NAME is $state"
      continue
    fi
    case $status in
      75)
        mistakes=0
        say "Resuming on the same TPU: the run saved, and left with status 75"
        ;;
      134 | 137 | 143 | 255)
        say "Lost: a worker left with status $status"
        delete_tpu
        ;;
      *)
        mistakes=$((mistakes + 1))
        say "A mistake, $mistakes of 3: status $status"
        if [ "$mistakes" = 3 ]; then
          tail -n 20 "$log" >&2
          say_how_to_resume
          exit "$status"
        fi
        ;;
    esac
    pause
  done
  say "MAX_ATTEMPTS=$MAX_ATTEMPTS are over"
  say_how_to_resume
  exit 75
}

dry_run='' running='' state=''
case ${1:-} in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
  --dry-run | --dry_run) dry_run=1 && shift ;;
esac
[ "${1:-}" != -- ] || shift
read_settings
read_checkout
read_arguments "$@"
prepare
if [ "$dry_run" ]; then
  dry_run
  exit
fi
command -v gcloud > /dev/null || die "gcloud is not on the PATH: install the Google Cloud CLI, cloud.google.com/sdk"
mkdir -p "$LOG_DIR"
exec 4> "$LOG_DIR/lock"
flock --nonblock 4 || die "another launcher runs with LOG_DIR=$LOG_DIR: end it, or set another TPU_NAME"
trap 'interrupted INT' INT
trap 'interrupted TERM' TERM
[[ $(trap -p INT) == *interrupted* ]] ||  # bash cannot trap a signal that was ignored at its start
  say "nohup, cron or & ignores SIGINT: stop with kill -TERM $$"
check
main
