"""What the claims share: seeds, and runs of the packaged configs."""

import tempfile

import jaxpost

SEEDS = (0, 1, 2)


def train(stage: str, seed: int, *, model=None, train=None, learning_rate=None, max_dropped=0.05, **batch):
    """One run of a packaged config with a seed of its own, in a folder that is thrown away."""
    config = jaxpost.get_config(stage)
    config.run.seed, config.run.dir = seed, tempfile.mkdtemp() + "/run"
    config.run.eval_prompts = 0
    config.model.path, config.data.train = model or config.model.path, train or config.data.train
    config.optimizer.learning_rate = learning_rate or config.optimizer.learning_rate
    config.data.max_dropped = max_dropped
    config.batch.update(batch)
    return jaxpost.run(config)
