"""What a run would cost, told from a configuration alone: the model behind `edge_client plan`."""
