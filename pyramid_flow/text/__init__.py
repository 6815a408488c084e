"""Prompts as embeddings: the text encoders and tokenizers of a checkpoint, and what the transformer receives from
them.
"""
