"""How `capture` sees a model: its skeleton on `meta`, traced by `torch.export`, every weight an input under its own name."""
