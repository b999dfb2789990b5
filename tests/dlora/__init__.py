"""DLoRA: adapters on the edge for modules on the cloud."""
