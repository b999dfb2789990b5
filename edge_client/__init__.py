"""The data owner's side: holds the data and everything that trains. Never imports `cloud_node`."""
