"""Lets `python -m edge_client` be the console command."""

from edge_client.cli import main

main()
