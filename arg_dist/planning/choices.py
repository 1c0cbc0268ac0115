"""Values that the options of a plan accept; depends on nothing but the standard library."""

ENGINES: dict[str, str] = {
    "none": "one process",
    "ddp": "DDP",
    "zero0": "ZeRO-0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
"""Display names of engines, by the value of ``--engine``."""
AGAINST = {"adamw": "AdamW", "adamw-8bit": "AdamW, 8 bit", "muon": "Muon", "galore": "GaLore"}
"""Display names of the optimizers to compare with, by the values of ``--against``."""
DTYPES = {"fp32": 4, "bf16": 2}
"""Bytes per element of the weights used in forward and backward."""
BUCKET = 500_000_000
"""DeepSpeed's default for `reduce_bucket_size`, in elements."""
VOCABULARY = 32000
"""Vocabulary size of a named model, as in the papers that define the sizes."""
FP32, FP64 = 4, 8
"""Bytes per number."""
