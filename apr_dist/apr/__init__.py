"""The APR file: its bytes, its metadata, reading it and writing it. No torch here."""
