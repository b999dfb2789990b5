"""Tensors as bytes, messages in chunks, and the stubs generated from `protos/`."""
