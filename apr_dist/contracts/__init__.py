"""The promises in ``contracts/*.yaml``: read, checked, bound to tests, and shown with what backs them."""
