#!/usr/bin/env bash
# TPU VMs: rents a slice, copies this repository to every host of it, installs, runs, shows logs, deletes.
#
#   tpu_vm.sh VERB --name=NAME --zone=ZONE --topology=v5e:4x4 [OPTIONS] [-- --config=... --config.run.dir=gs://...]
#
#   create   rents the slice now               copy     the repository, as it lies here, to all hosts
#   queue    asks for it, waits until it is    install  jaxpost[tpu] on all hosts
#            there (--wait minutes)            run      starts jaxpost on all hosts, in the background
#   logs     the end of a host's log           stop     SIGTERM on all hosts: saves and ends
#   delete   gives the slice back              all      create (or queue), copy, install, run
#
# Options: --project=ID; --spot; --queued (all, delete: by queue); --slices=N (queue alone); --wait=60; --worker=0 (logs);
# --dry-run prints the commands and runs none of them.
# A spot slice that was taken away: `delete`, then `all` with the same arguments; the run goes on from its folder.

set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' zone='' project='' topology='' spot='' queued='' slices=1 wait=60 worker=0
verb=${1:---help}
(($#)) && shift
while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --slices=*) slices=${1#*=} && is_count --slices "$slices" ;;
    --wait=*) wait=${1#*=} && is_count --wait "$wait" ;;
    --worker=?*) worker=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) verb=--help ;;
    --) shift && break ;;
    *) fail "$1: unknown argument; see tpu_vm.sh --help" ;;
  esac
  shift
done

# Software of the VM: https://cloud.google.com/tpu/docs/runtimes
runtime() {
  case $GENERATION in
    v4) echo tpu-ubuntu2204-base ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

# The type of v5e and v6e says the shape; that of v5p means the usual shape of the size, for gcloud takes --type up to v4.
slice() {
  shape=("--accelerator-type=$ACCELERATOR_TYPE")
  if [[ $GENERATION == v4 ]]; then shape=(--type=v4 "--topology=$SHAPE"); fi
  if [[ $spot ]]; then shape+=(--spot); fi
}

create() {
  ((slices == 1)) || fail "--slices=$slices: several slices come by queue; use queue, or all --queued"
  slice
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${shape[@]}" "--version=$(runtime)"
}

queue() {
  local nodes=("--node-id=$name")
  if ((slices > 1)); then nodes=("--node-count=$slices" "--node-prefix=$name"); fi
  slice
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${shape[@]}" "--runtime-version=$(runtime)" \
    "${nodes[@]}" "--valid-until-duration=${wait}m"
  await_active
}

await_active() {
  local state='' deadline=$((SECONDS + 60 * wait))
  local describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  if [[ $DRY_RUN ]]; then run "${describe[@]}" && return; fi
  while ((SECONDS < deadline)); do
    state=$("${describe[@]}")
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) break ;;
    esac
    sleep 20
  done
  echo "error: $name is $state and not ACTIVE; tpu_vm.sh delete --queued frees the request" >&2
  exit 1
}

nodes() {
  local index
  if ((slices == 1)); then echo "$name"; else for ((index = 0; index < slices; index++)); do echo "$name-$index"; done; fi
}

everywhere() {  # one command on every host of every slice
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --quiet --worker=all "--command=$1"
  done
}

copy() {
  local node
  archive=${TMPDIR:-/tmp}/$FOLDER-$$.tgz  # not local: the trap outlives this function
  if [[ ! $DRY_RUN ]]; then trap 'rm -f "$archive"' EXIT; fi
  pack "$archive"
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:$FOLDER.tgz" "${where[@]}" --quiet --worker=all
  done
  everywhere "$UNPACK"
}

start() {
  if ((HOSTS * slices > 1)); then JAXPOST+=(--config.hosts.coordinator=auto); fi  # jax asks the VM who the others are
  everywhere "$(on_host start "--tpu=$GENERATION" "${JAXPOST[@]}")"
}

case $verb in
  create | queue | copy | install | run | logs | stop | delete | all) ;;
  --help | -h) usage && exit ;;
  *) fail "$verb: unknown verb; there are create, queue, copy, install, run, logs, stop, delete, all" ;;
esac
[[ $name ]] || fail "--name: missing; give the slice a name"
[[ $zone ]] || fail "--zone: missing; give the zone, as in --zone=us-west4-a"
case $verb in
  create | queue | run | all) [[ $topology ]] || fail "--topology: missing; give the slice, as in --topology=v5e:4x4" ;;
esac
if [[ $topology ]]; then read_topology "$topology"; fi
if [[ $verb == run || $verb == all ]]; then jaxpost_arguments "$@"; elif (($#)); then fail "--: $verb takes no config"; fi
where=("--zone=$zone")
if [[ $project ]]; then where+=("--project=$project"); fi
need gcloud "install the Google Cloud CLI"

case $verb in
  create) create ;;
  queue) queue ;;
  copy) copy ;;
  install) everywhere "$(on_host install tpu)" ;;
  run) start ;;
  logs) run gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" "${where[@]}" --quiet "--worker=$worker" "--command=$(on_host log)" ;;
  stop) everywhere "$(on_host stop)" ;;
  delete)
    if [[ $queued ]] || ((slices > 1)); then
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    fi
    ;;
  all)
    if [[ $queued ]]; then queue; else create; fi
    copy
    everywhere "$(on_host install tpu)"
    start
    ;;
esac
