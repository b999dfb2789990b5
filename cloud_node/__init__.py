"""The model owner's side: holds the frozen backbone and runs its span for edge clients. Never imports `edge_client`."""
