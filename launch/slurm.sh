#!/usr/bin/env bash
# SLURM with NVIDIA GPUs: submits slurm.sbatch from this folder of a shared file system, where jaxpost[cuda] is installed.
#
#   slurm.sh --nodes=N --gpus=GPUS_A_NODE [OPTIONS] -- --config=... --config.run.dir=/shared/runs/NAME
#
# Options: --partition=P, --account=A, --time=HH:MM:SS, --name=NAME; --dry-run prints the command and does not run it.
# Any other sbatch option: SBATCH_... variables of sbatch, or `sbatch OPTIONS launch/slurm.sbatch --config=...` itself.
# Logs: tail -f jaxpost-JOB.log. Ends: scancel JOB. A preempted or timed-out job goes back to the queue and resumes.

set -euo pipefail
source "$(dirname "$0")/common.sh"

nodes='' gpus='' options=(--job-name=jaxpost)
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} && is_count --nodes "$nodes" ;;
    --gpus=*) gpus=${1#*=} && is_count --gpus "$gpus" ;;
    --partition=?* | --account=?* | --time=?*) options+=("$1") ;;
    --name=?*) options+=("--job-name=${1#*=}") ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) fail "$1: unknown argument; see slurm.sh --help" ;;
  esac
  shift
done
[[ $nodes ]] || fail "--nodes: missing; give how many nodes, as in --nodes=2"
[[ $gpus ]] || fail "--gpus: missing; give the GPUs of a node, as in --gpus=8"
jaxpost_arguments "$@"
if ((nodes * gpus > 1)); then JAXPOST+=(--config.hosts.coordinator=auto); fi  # jax reads the others from SLURM's variables
need sbatch "submit from a login node of the cluster"

# One task a GPU: under SLURM jax.distributed gives each process one device, that of its number on the node.
run sbatch "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "${options[@]}" "--chdir=$REPOSITORY" \
  "$LAUNCH/slurm.sbatch" "${JAXPOST[@]}"
