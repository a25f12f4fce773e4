"""One file a stage, each a lab note. Installed as `jaxpost.configs`, so that `--config=dpo` is found anywhere."""
