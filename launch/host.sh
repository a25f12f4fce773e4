#!/usr/bin/env bash
# What the launchers run on each host, from the copied repository or the image; works by hand too.
#
#   host.sh install tpu|cuda         makes the virtual environment ~/jaxpost-launch/venv with this repository in it
#   host.sh run [OPTIONS] ARGUMENTS  python -m jaxpost.main ARGUMENTS in the foreground
#   host.sh start ...                the same in the background, logged to ~/jaxpost-launch/log
#   host.sh log [LINES]              the end of that log (200 lines)
#   host.sh stop                     SIGTERM, which saves; waits ten minutes for the end
#
# OPTIONS: --tpu=GENERATION sets LIBTPU_INIT_ARGS (libtpu_flags.sh). `host.sh --dry-run VERB ...` prints the commands only.
# Exit codes of run: those of jaxpost, but 143 where SIGTERM stopped it, for it ends with 0 then as a finished run does,
# and a scheduler that saw 0 would not start it again.

set -euo pipefail
source "$(dirname "$0")/common.sh"
source "$LAUNCH/libtpu_flags.sh"

HOME_FOLDER=$HOME/$FOLDER

install() {
  [[ ${1:-} == tpu || ${1:-} == cuda ]] || fail "install: give the extra, tpu or cuda"
  local candidate python=''
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      python=$candidate && break
    fi
  done
  if [[ $python ]]; then
    run "$python" -m venv "$HOME_FOLDER/venv"
  else  # the image of most TPU VMs is Ubuntu 22.04, whose Python is 3.10
    run bash -c 'set -o pipefail; curl -LsSf https://astral.sh/uv/install.sh | sh'
    run "$HOME/.local/bin/uv" venv --allow-existing --seed --python 3.13 "$HOME_FOLDER/venv"
  fi
  run "$HOME_FOLDER/venv/bin/pip" install --quiet "${REPOSITORY}[$1]"
}

train() {
  local flags python=python child='' stopped='' code=0
  if [[ ${1:-} == --tpu=* ]]; then
    flags=$(libtpu_flags "${1#*=}")
    export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS:-}"  # what is set already comes last
    shift
  fi
  if [[ -x $HOME_FOLDER/venv/bin/python ]]; then python=$HOME_FOLDER/venv/bin/python; fi
  if [[ $DRY_RUN ]]; then
    quoted cd "$REPOSITORY"
    quoted env "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}" "$python" -m jaxpost.main "$@"
    return
  fi
  cd "$REPOSITORY"  # --config=configs/dpo.py lies here
  # bash, not python, is the first process of a container: one without a handler would never see the signal.
  trap 'stopped=1; if [[ $child ]]; then kill -TERM "$child" 2> /dev/null || true; fi' TERM
  "$python" -m jaxpost.main "$@" &
  child=$!
  if [[ $stopped ]]; then kill -TERM "$child"; fi
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do  # a signal ends `wait` while the run still saves
    code=0 && wait "$child" || code=$?
  done
  if [[ $stopped && $code == 0 ]]; then code=143; fi
  exit "$code"
}

running() {  # prints the process of `start` that still runs
  local process
  process=$(cat "$HOME_FOLDER/pid" 2> /dev/null) && ps -o args= -p "$process" 2> /dev/null | grep -q host.sh && echo "$process"
}

start() {
  local process
  if process=$(running); then fail "start: process $process runs already; stop it first"; fi
  mkdir -p "$HOME_FOLDER"
  nohup bash "$LAUNCH/host.sh" run "$@" >> "$HOME_FOLDER/log" 2>&1 < /dev/null &
  echo $! > "$HOME_FOLDER/pid"
}

stop() {
  local process deadline=$((SECONDS + 600))
  process=$(running) || return 0
  kill -TERM "$process"
  while running > /dev/null; do
    ((SECONDS < deadline)) || fail "stop: process $process still runs after ten minutes"
    sleep 1
  done
}

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1 && shift; fi
verb=${1:---help}
(($#)) && shift
case $verb in
  install) install "$@" ;;
  run) train "$@" ;;
  start) if [[ $DRY_RUN ]]; then train "$@"; else start "$@"; fi ;;
  log) run tail -n "${1:-200}" "$HOME_FOLDER/log" ;;
  stop) if [[ $DRY_RUN ]]; then quoted kill -TERM "$(running || echo PROCESS)"; else stop; fi ;;
  --help | -h) usage ;;
  *) fail "$verb: unknown verb; there are install, run, start, log, stop" ;;
esac
