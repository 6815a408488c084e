"""The transformers of both families: tokens, attention, the blocks, the history cache. What happens between their
evaluations belongs to `sampling`.
"""
