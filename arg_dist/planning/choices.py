"""What a plan may be asked for; nothing here needs more than Python."""

ENGINES: dict[str, str] = {
    "none": "one process",
    "ddp": "DDP",
    "zero0": "ZeRO-0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
"""Engines by the name that an option takes, and what they are called."""
DTYPES = {"fp32": 4, "bf16": 2}
"""Bytes of a weight that the model computes with."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size` unless its JSON has another."""
VOCABULARY = 32000
"""Tokens of a model by name, as in the papers that the sizes are from."""
