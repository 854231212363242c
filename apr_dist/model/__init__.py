"""The decoder: what it is (``config``, ``families``), how it computes, and its loss. No Accelerate here."""
