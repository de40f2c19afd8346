"""What `trace` is made of: from a module that runs to a flat graph over its own tensors."""
