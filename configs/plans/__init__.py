"""Real sizes, to be planned: `jaxpost plan --config=configs/plans/llama3_8b_dpo.py --topology=v5e:4x4`."""
