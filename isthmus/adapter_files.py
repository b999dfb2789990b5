"""What the files of an adapter are called, in either of its two formats.

Knows names alone; never what stands in the files.
"""

PEFT_SETTINGS = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
"""What peft calls the weights of an adapter."""

OWN_WEIGHTS = "adapter.safetensors"
"""What weights are called that peft has no format for."""

FILES = {"peft": frozenset((PEFT_SETTINGS, PEFT_WEIGHTS)), "isthmus": frozenset((OWN_WEIGHTS,))}
"""What an adapter consists of, in each format; a signed one has a manifest and a signature beside them."""
