# shellcheck shell=bash
# Sourced by the launchers: quoting, dry runs, the arguments of jaxpost, TPU topologies. Keeps to bash 3.2, which macOS has.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(dirname "$LAUNCH")
DRY_RUN=

fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }  # the comment at the top of the launcher

# The arguments as one line that any POSIX shell reads back. (`printf %q` may write $'...', which a plain sh does not know.)
quoted() {
  local argument line='' apostrophe="'\\''"
  for argument in "$@"; do
    [[ $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || argument="'${argument//\'/$apostrophe}'"
    line+="${line:+ }$argument"
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry-run only prints it.
run() {
  if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

need() { [[ $DRY_RUN ]] || command -v "$1" > /dev/null || fail "$1: not found; $2"; }

is_count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: not a whole number from 1 on"; }

# JAXPOST: the arguments of jaxpost.main. Every start resumes, so a launcher begins a run and goes on with it by one command.
jaxpost_arguments() {
  local argument config='' folder=''
  for argument in "$@"; do
    case $argument in
      --config=?*) config=1 ;;
      --config.run.dir=?*) folder=1 ;;
      --config.?*=*) ;;
      *) fail "$argument: no argument of jaxpost; after -- come --config=FILE and --config.KEY=VALUE" ;;
    esac
  done
  [[ $config ]] || fail "--config: missing; after -- give the config, as in -- --config=configs/dpo.py"
  [[ $folder ]] || fail "--config.run.dir: missing; a run that is stopped goes on from its folder"
  JAXPOST=(--config.run.resume=True "$@")
}

# `v5e:4x4` -> GENERATION, SHAPE, CHIPS, HOSTS, CHIPS_PER_HOST, ACCELERATOR_TYPE.
# https://cloud.google.com/tpu/docs/v5e (and v4, v5p, v6e): a slice of v5e or v6e of at most 8 chips is one host, every other
# host has 4 chips. The number in the type counts chips there, and TensorCores (two a chip) for v4 and v5p.
read_topology() {
  local side='[1-9][0-9]*'
  [[ $1 =~ ^(v5e|v6e):${side}x${side}$ || $1 =~ ^(v4|v5p):${side}x${side}x${side}$ ]] ||
    fail "--topology=$1: give v5e:ROWSxCOLUMNS or v6e:..., as in v5e:4x4, or v4:XxYxZ or v5p:..., as in v5p:2x2x4"
  GENERATION=${1%%:*} SHAPE=${1#*:}
  CHIPS=$((${SHAPE//x/*}))
  CHIPS_PER_HOST=4
  case $GENERATION in
    v5e) ACCELERATOR_TYPE=v5litepod-$CHIPS ;;
    v6e) ACCELERATOR_TYPE=v6e-$CHIPS ;;
    *) ACCELERATOR_TYPE=$GENERATION-$((2 * CHIPS)) ;;
  esac
  if [[ $GENERATION == v[56]e ]] && ((CHIPS <= 8)); then CHIPS_PER_HOST=$CHIPS; fi
  HOSTS=$((CHIPS / CHIPS_PER_HOST))
  ((HOSTS * CHIPS_PER_HOST == CHIPS)) || fail "--topology=$1: $CHIPS chips; a host has $CHIPS_PER_HOST, so give a multiple"
}

# Where the hosts of tpu_vm.sh and ssh.sh keep source, environment and log, below the home folder.
FOLDER=jaxpost-launch
UNPACK="rm -rf $FOLDER/src && mkdir -p $FOLDER/src && tar -xzf $FOLDER.tgz -C $FOLDER/src"

# Packs the repository as it lies here, what is not committed included, into the file given.
pack() {
  run tar -czf "$1" --exclude=./.git --exclude=./runs --exclude=./.venv --exclude=./build --exclude=__pycache__ -C "$REPOSITORY" .
}

# A command for the shell of a host: `on_host VERB ARGUMENTS`.
on_host() { quoted bash "$FOLDER/src/launch/host.sh" "$@"; }
