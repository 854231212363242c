"""The conversations of the package ``chitchat-dataset`` (MIT) as JSON lines of messages, for encode-chat.

    pip install chitchat-dataset
    python docs/examples/chitchat.py | apr-dist tokenize encode-chat --corpus - ...

Two people talk: the one who begins is the user, the other the assistant. What one writes in a row is a turn.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Print one conversation a line."""
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        sys.exit("error: the package chitchat-dataset is not installed. fix: pip install chitchat-dataset")
    for talk in json.loads((Path(spec.origin).parent / "dataset.json").read_text("utf-8")).values():
        turns = ["\n".join(said["text"] for said in turn) for turn in talk["messages"]]
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)
        ]
        if len(messages) > 1:
            print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the encoder has as many as it was asked to take
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
