# shellcheck shell=bash
# Sourced by host.sh: `libtpu_flags GENERATION` prints LIBTPU_INIT_ARGS for that generation.
#
# Seen with jax 0.10.2 and its libtpu: a scan of gated MLP layers with their gradients, weights sharded over four chips
# (fsdp), compiled with and without the flags and its text compared. A flag that changes nothing is left out; libtpu ends
# the program at a flag that it does not know, so tests/launch compiles with these. No step was timed on a chip: measure
# yours, and set LIBTPU_INIT_ARGS yourself to add flags. Names are those that MaxText (benchmarks/xla_flags_library.py) and
# AXLearn (common/compiler_options.py) train with; Google publishes no reference of them.

# Gathers of weights run beside the products that do not need them yet, fused with these.
_FUSED_GATHERS="--xla_tpu_enable_async_collective_fusion=true"
_FUSED_GATHERS+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
_FUSED_GATHERS+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
_FUSED_GATHERS+=" --xla_tpu_overlap_compute_collective_tc=true"
_FUSED_GATHERS+=" --xla_enable_async_all_gather=true"

libtpu_flags() {
  case $1 in
    # Gathers become start and done with work between them: none of the 6 without the flag, 5 with it.
    v4) echo "--xla_enable_async_all_gather=true" ;;
    # Does all of it by itself: the compiled text is the same with _FUSED_GATHERS and without.
    v5e) echo "" ;;
    # No gather is fused without them.
    v5p) echo "$_FUSED_GATHERS" ;;
    # As v5p; the peak of that program was 116 MiB with them, 92 without. And 96 MiB of VMEM for what one fusion holds, the
    # value of AXLearn for v6e and of MaxText for dense models: alone it brought the peak from 92 MiB to 48.
    v6e) echo "$_FUSED_GATHERS --xla_tpu_scoped_vmem_limit_kib=98304" ;;
    *) fail "--tpu=$1: unknown generation; there are v4, v5e, v5p, v6e" ;;
  esac
}
