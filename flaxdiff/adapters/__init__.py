"""What changes a pipeline without changing its networks: LoRA and its kin, textual inversion."""
