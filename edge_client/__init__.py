"""The data owner's side: holds the data and everything that trains. Never imports `cloud_node`."""

from edge_client.drop_in import connect, head, modules

__all__ = ["connect", "head", "modules"]
