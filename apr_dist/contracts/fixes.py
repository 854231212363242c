"""What to do about a gate of the verdict that failed: its error says one thing for all of them."""

from collections.abc import Mapping

FIXES: Mapping[str, str] = {
    "FALSIFY-APR-PRETRAIN-INIT-006": (
        "with `--init`, the text and the weights do not belong together: use the tokenizer the model "
        "was trained with, encode the corpus with it, and import the model again; from random "
        "weights, a loss below chance means that the held-out text is trivial or was seen"
    ),
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003": (
        "the model predicts this text hardly better than chance: check that it is text of a kind the "
        "model was trained on, and that the shards were encoded with the model's own tokenizer"
    ),
    "FALSIFY-APR-DIST-CHECKPOINT-005": (
        "evaluate under the conditions of the save (same held-out shards, `evaluation.max_sequences`,"
        " `seq_length` and precision); if they are the same, the file was altered or this machine "
        "computes otherwise: compare with `apr-dist diff`"
    ),
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005": (
        "lower `lr` or lengthen `warmup_steps`; a fine-tuned model that ends this high has lost what it knew"
    ),
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007": (
        "two gates: when evaluation and training disagree, report it, for they must not; when the "
        "validation loss is far below the training loss, the held-out text is easier or was trained "
        "on: hold out again with `apr-dist tokenize encode-corpus --val-fraction`"
    ),
    "FALSIFY-APR-DIST-TRAINER-010": (
        "advisory: train for longer, raise `lr` where it is tiny, lower it where the loss rose, and "
        "look at the curves with `apr-dist report`"
    ),
    "INV-TRAIN-004": (
        "advisory: train for longer, or set `target_val_loss` to what this model can reach on this data"
    ),
}
"""Id of a gate of ``gates/losses.py`` to what to do."""
