#!/usr/bin/env bash
# GKE with TPU node pools: the JobSet gke/jobset.yaml by kubectl, or a workload of XPK on a cluster that XPK made.
#
#   gke.sh image  --image=IMAGE                                          builds gke/Dockerfile, pushes it
#   gke.sh apply  --name=NAME --image=IMAGE --topology=v5e:4x4 [OPTIONS] -- --config=... --config.run.dir=gs://...
#   gke.sh xpk    --name=NAME --image=IMAGE --topology=v5e:4x4 --cluster=C [OPTIONS] -- ...
#   gke.sh logs   --name=NAME                                            the end of the first host's log
#   gke.sh delete --name=NAME
#
# Options: --slices=N; --spot; --restarts=100 (a preemption takes one); --project=ID, --zone=ZONE (xpk);
# --dry-run prints commands and manifest and runs nothing. JobSet has to be installed in the cluster (XPK does it).

set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' image='' topology='' cluster='' spot='' slices=1 restarts=100 where=()
verb=${1:---help}
(($#)) && shift
while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --cluster=?*) cluster=${1#*=} ;;
    --project=?* | --zone=?*) where+=("$1") ;;
    --slices=*) slices=${1#*=} && is_count --slices "$slices" ;;
    --restarts=*) restarts=${1#*=} && is_count --restarts "$restarts" ;;
    --spot) spot=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) verb=--help ;;
    --) shift && break ;;
    *) fail "$1: unknown argument; see gke.sh --help" ;;
  esac
  shift
done

# The arguments as a list in JSON, which is YAML too. Kubernetes replaces $(NAME) in arguments: $$( stands for $(.
json() {
  local argument list=''
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    argument=${argument//\"/\\\"}
    argument=${argument//$'\n'/\\n}
    argument=${argument//$'\t'/\\t}
    argument=${argument//'$('/'$$('}
    list+="${list:+, }\"$argument\""
  done
  printf '[%s]' "$list"
}

command_line() {  # COMMAND: what runs in the container
  jaxpost_arguments "$@"
  if ((HOSTS * slices > 1)); then JAXPOST+=(--config.hosts.coordinator=auto); fi  # GKE sets what jax reads
  COMMAND=(launch/host.sh run "--tpu=$GENERATION" "${JAXPOST[@]}")
}

manifest() {  # jobset.yaml with its ${...} filled in
  local text ACCELERATOR ARGUMENTS key
  case $GENERATION in
    v4) ACCELERATOR=tpu-v4-podslice ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
  esac
  ARGUMENTS=$(json "${COMMAND[@]}")
  # shellcheck disable=SC2034  # read by name below
  local NAME=$name IMAGE=$image SLICES=$slices RESTARTS=$restarts
  text=$(cat "$LAUNCH/gke/jobset.yaml")
  if [[ ! $spot ]]; then text=$(grep -v '# spot$' <<< "$text"); fi
  for key in NAME IMAGE SLICES RESTARTS HOSTS CHIPS_PER_HOST ACCELERATOR SHAPE ARGUMENTS; do  # ARGUMENTS last: they are free
    text=${text//"\${$key}"/"${!key}"}
  done
  printf '%s\n' "$text"
}

apply() {
  command_line "$@"
  if [[ $DRY_RUN ]]; then
    printf "kubectl apply --filename=- <<'MANIFEST'\n%s\nMANIFEST\n" "$(manifest)"
  else
    manifest | kubectl apply --filename=-
  fi
}

xpk_create() {
  command_line "$@"
  local more=("--max-restarts=$restarts" ${where[@]+"${where[@]}"})
  if [[ $spot ]]; then more+=(--spot); fi
  run xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$slices" \
    "--docker-image=$image" "${more[@]}" "--command=cd /jaxpost && $(quoted bash "${COMMAND[@]}")"
}

case $verb in
  image | apply | xpk | logs | delete) ;;
  --help | -h) usage && exit ;;
  *) fail "$verb: unknown verb; there are image, apply, xpk, logs, delete" ;;
esac
if [[ $verb != image ]]; then
  # two hyphens and a number follow it in the names of jobs and pods, of at most 63 characters
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name=$name: give at most 40 of a-z, 0-9, -, a letter first"
fi
case $verb in image | apply | xpk) [[ $image ]] || fail "--image: missing; give the image, as in --image=REGION-docker.pkg.dev/..." ;; esac
case $verb in
  apply | xpk)
    [[ $topology ]] || fail "--topology: missing; give the slice, as in --topology=v5e:4x4"
    read_topology "$topology"
    ;;
  *) (($# == 0)) || fail "--: $verb takes no config" ;;
esac
[[ $verb != xpk || $cluster ]] || fail "--cluster: missing; give the cluster that XPK made"

case $verb in
  image)
    need docker "install Docker"
    run docker build "--file=$LAUNCH/gke/Dockerfile" "--tag=$image" "$REPOSITORY"
    run docker push "$image"
    ;;
  apply)
    need kubectl "install kubectl"
    apply "$@"
    ;;
  xpk)
    need xpk "pip install xpk"
    xpk_create "$@"
    ;;
  logs)
    need kubectl "install kubectl"
    selector=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    run kubectl logs "--selector=$selector" --tail=200
    ;;
  delete)
    need kubectl "install kubectl"
    run kubectl delete jobset "$name" --wait=true --timeout=300s
    ;;
esac
