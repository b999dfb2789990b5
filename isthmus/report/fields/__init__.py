"""The blocks that `run.json` is made of, by what they are about."""
