"""The training loop and everything it decides with."""
