"""The main job from end to end, on public data that plays the part of private data."""
