"""What the split costs: benchmarks, their results by commit and machine, and the page that shows them.

Nothing here is a test: no figure fails a build. `make bench` runs what has no result for the present commit.
"""
