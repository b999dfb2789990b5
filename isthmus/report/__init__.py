"""A run's figures for people and programs: `run.json`, tables and Markdown."""
