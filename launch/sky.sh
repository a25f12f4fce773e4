#!/usr/bin/env bash
# SkyPilot: a managed job from sky.yaml, on whatever cloud has the accelerators; it comes back after a preemption.
#
#   sky.sh launch --name=NAME (--topology=v5e:4x4 | --gpus=H100:8 [--nodes=N]) [--spot] -- --config=... --config.run.dir=gs://...
#   sky.sh logs --name=NAME          sky.sh cancel --name=NAME
#
# Options: --dry-run prints the command and does not run it.

set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' topology='' gpus='' nodes=1 spot=--no-use-spot
verb=${1:---help}
(($#)) && shift
while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --gpus=?*) gpus=${1#*=} ;;
    --nodes=*) nodes=${1#*=} && is_count --nodes "$nodes" ;;
    --spot) spot=--use-spot ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) verb=--help ;;
    --) shift && break ;;
    *) fail "$1: unknown argument; see sky.sh --help" ;;
  esac
  shift
done

launch() {
  jaxpost_arguments "$@"
  local what=()
  if [[ $topology && ! $gpus ]]; then
    read_topology "$topology"
    if ((HOSTS > 1)); then JAXPOST+=(--config.hosts.coordinator=auto); fi
    what=("--gpus=tpu-$ACCELERATOR_TYPE" --env EXTRA=tpu --env "TPU=$GENERATION")
  elif [[ $gpus && ! $topology ]]; then
    what=("--gpus=$gpus" "--num-nodes=$nodes" --env EXTRA=cuda --env TPU=)
  else
    fail "--topology, --gpus: give one of them, as in --topology=v5e:4x4 or --gpus=H100:8"
  fi
  run cd "$REPOSITORY"  # workdir of sky.yaml
  run sky jobs launch --yes "--name=$name" "$spot" "${what[@]}" --env "ARGUMENTS=$(quoted "${JAXPOST[@]}")" launch/sky.yaml
}

case $verb in
  launch | logs | cancel) ;;
  --help | -h) usage && exit ;;
  *) fail "$verb: unknown verb; there are launch, logs, cancel" ;;
esac
[[ $name ]] || fail "--name: missing; give the job a name"
[[ $verb == launch || $# == 0 ]] || fail "--: $verb takes no config"
need sky "pip install 'skypilot[gcp]'"

case $verb in
  launch) launch "$@" ;;
  logs) run sky jobs logs "--name=$name" --no-follow ;;
  cancel) run sky jobs cancel --yes "--name=$name" ;;
esac
