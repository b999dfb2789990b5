"""Lets `python -m cloud_node` be the console command."""

from cloud_node.cli import main

main()
