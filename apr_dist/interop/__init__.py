"""Other formats to and from APR: GGUF and Hugging Face folders, streamed tensor by tensor."""
