"""What the decoder is computed with: one interface, the sets that implement it, and the choice among them.

``plain`` is the interface and its plain PyTorch implementation, for any device and for the compiler; ``cpu``
and ``cuda`` override what they compute better. ``choice`` decides, and nothing else asks for a device. What a
block computes is in ``layers``, ``attention`` and ``transformer``, one package up.
"""
