"""One short file a method: a numbered list of calls. `RUN[stage](config)` runs it."""

from jaxpost.stages import dpo, reward, sft

RUN = {"sft": sft.run, "dpo": dpo.run, "reward": reward.run}
