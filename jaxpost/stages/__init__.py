"""One short file a method: a numbered list of calls. `RUN[stage](config)` runs it."""

from jaxpost.stages import distill, dpo, kto, ppo, reward, sft

PAIRS = dict.fromkeys(("dpo", "orpo", "simpo", "cpo"), dpo.run)
RUN = {"sft": sft.run, **PAIRS, "kto": kto.run, "reward": reward.run, "distill": distill.run, "ppo": ppo.run}
