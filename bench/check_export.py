"""Does an exported folder give the same logits or scores in transformers, or an adapter in PEFT?

Run by the python of bench/setup.sh's trl environment:

    DIR/trl/bin/python bench/check_export.py FOLDER LOGITS.npz

LOGITS.npz holds ids int[B, T] and logits float32[B, T, V] of the exporting side, rows without padding; of a reward
model float32[B, R], its scores at the last tokens (python -m tests.parity.exports writes both). Prints the largest
difference; exits 1 where it is above 1e-4, where a weight was missing or left over, or where the tokenizer
does not load.
"""

import argparse
import os
import sys
import warnings

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch
import transformers

TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("logits")
    options = parser.parse_args()
    adapter, folder = None, options.folder
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        import peft

        adapter, folder = folder, peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    (architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
    auto, what = transformers.AutoModelForCausalLM, "logits"
    if architecture.endswith("ForSequenceClassification"):
        auto, what = transformers.AutoModelForSequenceClassification, "scores"
    model, loading = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    faults = [f"{kind}: {', '.join(map(str, names))}" for kind, names in loading.items() if names]
    if adapter:
        warnings.filterwarnings("error", message=".*adapter keys")  # how PEFT tells of missing ones
        model = peft.PeftModel.from_pretrained(model, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    stored = np.load(options.logits)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(stored["ids"], dtype=torch.long)).logits.numpy()
    if logits.shape != stored["logits"].shape:
        faults.append(f"{what}: {logits.shape} in transformers, {stored['logits'].shape} stored")
    else:
        difference = float(np.abs(logits - stored["logits"]).max())
        print(f"{options.folder}: {len(tokenizer)} tokens, {what} differ by at most {difference:.1e}")
        if not difference <= TOLERANCE:  # also where it is NaN
            faults.append(f"{what} differ by {difference:.1e}, more than {TOLERANCE}")
    for fault in faults:
        print(f"FAILED {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
