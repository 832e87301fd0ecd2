"""A mergekit-moe file."""

MOE = """
base_model: base
gate_mode: {mode}
dtype: float32
experts_per_token: 1
experts:
  - source_model: math
    positive_prompts: [w5 w6 w7, "w8"]
    negative_prompts:
      - w30 w31
  - source_model: code
    positive_prompts: ["w10 w11 w12"]
  - source_model: math
    positive_prompts: [w40 w3]
"""
