"""What whoever trains needs, whatever stands in the model: rows, batches, scores, the optimizer, checkpoints."""
