#!/usr/bin/env bash
# Hosts that you reach by ssh without a password: copies this repository to them, installs, runs, shows logs.
#
#   ssh.sh VERB --hosts=HOST[,HOST...] [OPTIONS] [-- --config=... --config.run.dir=...]
#
#   copy     the repository, as it lies here, to all hosts      logs  the end of the first host's log
#   install  jaxpost with the extra (--extra) on all hosts      stop  SIGTERM on all hosts: saves and ends
#   run      starts jaxpost on all hosts, in the background     all   copy, install, run
#
# Options: --extra=cuda (or tpu); --tpu=GENERATION (v5e, ...: its libtpu flags); --coordinator=HOST:PORT, where the others
# reach the first host (its name and port 8476); --dry-run prints the commands and runs none of them.
# run.dir has to be a folder that all hosts see, or gs://. After a stop: `run` with the same arguments goes on.

set -euo pipefail
source "$(dirname "$0")/common.sh"

hosts='' extra=cuda generation='' coordinator=''
verb=${1:---help}
(($#)) && shift
while (($#)); do
  case $1 in
    --hosts=?*) hosts=${1#*=} ;;
    --extra=cuda | --extra=tpu) extra=${1#*=} ;;
    --tpu=?*) generation=${1#*=} ;;
    --coordinator=?*:?*) coordinator=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) verb=--help ;;
    --) shift && break ;;
    *) fail "$1: unknown argument; see ssh.sh --help" ;;
  esac
  shift
done

on() { run ssh -n -o BatchMode=yes -o ConnectTimeout=20 "$1" "$2"; }

everywhere() {
  local host
  for host in "${hosts[@]}"; do on "$host" "$1"; done
}

copy() {
  local host
  archive=${TMPDIR:-/tmp}/$FOLDER-$$.tgz  # not local: the trap outlives this function
  if [[ ! $DRY_RUN ]]; then trap 'rm -f "$archive"' EXIT; fi
  pack "$archive"
  for host in "${hosts[@]}"; do run scp -q -o BatchMode=yes -o ConnectTimeout=20 "$archive" "$host:$FOLDER.tgz"; done
  everywhere "$UNPACK"
}

start() {
  local index command=(start) several=()
  if [[ $generation ]]; then command+=("--tpu=$generation"); fi
  for ((index = 0; index < ${#hosts[@]}; index++)); do
    several=("--config.hosts.coordinator=$coordinator" "--config.hosts.count=${#hosts[@]}" "--config.hosts.index=$index")
    if ((${#hosts[@]} == 1)); then several=(); fi
    on "${hosts[index]}" "$(on_host "${command[@]}" "${JAXPOST[@]}" ${several[@]+"${several[@]}"})"
  done
}

case $verb in
  copy | install | run | logs | stop | all) ;;
  --help | -h) usage && exit ;;
  *) fail "$verb: unknown verb; there are copy, install, run, logs, stop, all" ;;
esac
[[ $hosts ]] || fail "--hosts: missing; give the hosts, as in --hosts=gpu1,gpu2"
IFS=, read -r -a hosts <<< "$hosts"
first=${hosts[0]##*@}
coordinator=${coordinator:-$first:8476}
if [[ $verb == run || $verb == all ]]; then jaxpost_arguments "$@"; elif (($#)); then fail "--: $verb takes no config"; fi
need ssh "install an ssh client"

case $verb in
  copy) copy ;;
  install) everywhere "$(on_host install "$extra")" ;;
  run) start ;;
  logs) on "${hosts[0]}" "$(on_host log)" ;;
  stop) everywhere "$(on_host stop)" ;;
  all)
    copy
    everywhere "$(on_host install "$extra")"
    start
    ;;
esac
