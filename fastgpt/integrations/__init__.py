"""Our ops in other people's models."""
