"""A run's figures for people and programs: `run.json`, tables, Markdown, a page with plots, event files."""
