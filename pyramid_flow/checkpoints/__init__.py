"""Checkpoints on disk: layout, weight files, fingerprint, adapters, and the classes that diffusers loads and saves. The
modules themselves belong to `transformer`, `vae` and `text`.
"""
