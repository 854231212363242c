"""Fine-tune a pretrained model, half the learning rate when the loss stops falling, keep the best steps."""

import sys

import apr_dist

model, shards, held_out, run_dir = sys.argv[1:5]

with apr_dist.open_session(
    init=model, dataset=shards, val_dataset=held_out, run_dir=run_dir,
    num_steps=20, batch_size=4, seq_length=32, lr=1e-3, warmup_steps=2,
    checkpoint={"keep_last": 2}, evaluation={"max_sequences": 64},
) as session:  # fmt: skip
    best = session.evaluate().loss
    for step in session.steps():
        print(f"step {step.step}: loss {step.train_loss:.3f}, {step.tokens_per_sec:,.0f} tokens/s")
        if step.step % 10 == 0:
            loss = session.evaluate().loss
            session.save()
            if loss >= best:
                session.lr /= 2
            best = min(best, loss)
    print(f"best validation loss {best:.4f}, saved in {session.run.path}")
