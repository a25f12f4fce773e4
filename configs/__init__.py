"""One file a stage, each a lab note with `get_config()`. Installed as `jaxpost.configs`, so `--config=dpo` is found anywhere."""
