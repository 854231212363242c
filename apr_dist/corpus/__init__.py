"""From text to shards: corpus readers, tokenizers, the encoder, its journal, and repair of a manifest."""
